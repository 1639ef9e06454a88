"""Verbs that need the export extra. Each module has `add_arguments(parser)` and `run(arguments) -> exit code`."""
