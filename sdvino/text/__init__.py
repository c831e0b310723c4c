"""Prompts: the CLIP tokenizer and the text encoders."""
