"""The autoencoder and its queue, previews, and picture files with how they were made."""
