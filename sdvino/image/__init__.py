"""The autoencoder, previews, and picture files with their settings."""
