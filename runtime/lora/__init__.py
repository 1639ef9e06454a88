"""LoRAs: small files of changes to a network's weights, added to the weights at build or when a bundle is loaded."""
