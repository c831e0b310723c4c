"""Noise, sigma schedules, samplers, guidance and the denoiser. NumPy only."""
