"""What a model folder is: its parts, its manifest, and how it comes from the hub."""
