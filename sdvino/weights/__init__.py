"""A checkpoint's tensors: known by their names and headers, their numbers mapped on demand."""
