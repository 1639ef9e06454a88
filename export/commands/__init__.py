"""Verbs that need the export extra: `add_arguments(parser)` and `run(arguments) -> exit code`."""
