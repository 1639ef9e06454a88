"""Verbs of the command line that need PyTorch references."""
