"""One verb of the command line a file: `add_arguments(parser)` and `run(arguments) -> exit code`."""
