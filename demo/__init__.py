"""The small trained checkpoint that ships with the project, and everything that made and judges it."""
