"""The training recipe, one file per step: data, text encoder, autoencoder, transformer, assembled checkpoint."""
