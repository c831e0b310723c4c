"""Prompts: the CLIP tokenizer, the text encoders, and what the UNet is told of them."""
