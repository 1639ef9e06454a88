"""The backends. Each has one file here and one row in `registry.py`; `opening.py` opens a stage with them."""
