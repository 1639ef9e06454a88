"""Readers and writers of checkpoint layouts; export/checkpoint.py is the way in."""
