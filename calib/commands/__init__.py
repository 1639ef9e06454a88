"""Verbs of the command line that calibration adds."""
