"""Readers of checkpoints: directories, hub ids, tensors, tokenizers, scheduler configs. Start at open.py."""
