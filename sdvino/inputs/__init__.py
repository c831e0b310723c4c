"""What somebody else wrote: how it comes in, what a field takes of it, how it is shown."""
