"""Readers and writers of checkpoint layouts; export/checkpoint/open.py is the way in."""
