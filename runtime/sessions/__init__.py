"""Backends. `registry.py` is the table of them, `opening.py` opens a stage by it; one file and one row for each."""
