"""The verbs of the command line, one file per verb: `add_arguments(parser)` and `run(arguments) -> exit code`."""
