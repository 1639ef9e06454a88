"""A family that only tests know: the files that a family's folder must have for the table to work."""
