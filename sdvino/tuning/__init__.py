"""Measuring: `sdvino tune` and `sdvino bench`."""
