"""Offline batches: many requests from a file, drawn by processes of this machine or by Ray."""
