"""Rewrites of an ov.Model, one to a file."""
