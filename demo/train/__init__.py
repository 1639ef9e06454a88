"""The recipe: data, text encoder, autoencoder, transformer, and the assembled checkpoint, one file per step."""
