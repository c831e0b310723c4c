"""Models as people have them, converted when they are first used, and kept."""
