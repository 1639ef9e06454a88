"""The small trained checkpoint that ships with the project, and the code that trains and evaluates it."""
