"""The networks of Stable Diffusion as OpenVINO graphs, written from a checkpoint's tensors."""
