"""The `ditc` command: a table of verbs. A verb's module is imported when the verb is typed.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a check or one of several pictures failed, 2
wrong usage, bad input or output that cannot be written, 130 interrupted, 143 terminated.

Text that is not ditc's own is shown in printable form, whoever writes it (`printable.py`, `console.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

from ditc.runtime.command_parser import CommandParser
from ditc.runtime.cores import limit_openmp
from ditc.runtime.errors import DitcError, MissingExtra, OutputError
from ditc.runtime.printable import one_line, printable_streams
from ditc.runtime.signals import Terminated, endings_as_interrupts

log = logging.getLogger(__name__)

FAILED = 1
USAGE = 2
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb of the command line.

    Attributes:
        module: the module with its `add_arguments` and `run`, as a string: the runtime must not import parts that may
            not be installed.
        help: what the verb does, in one sentence.
        extra: the extra that installs the packages that it needs; None if ditc itself requires them.
        stays: whether it runs until it is ended. Its log then has times, and a warning that comes again is news.
    """

    module: str
    help: str
    extra: str | None = None
    stays: bool = False


VERBS = {
    "build": Verb(
        "ditc.export.commands.build",
        "Build a bundle from a checkpoint: ONNX graphs and, if asked for, engines.",
        "export",
    ),
    "parity": Verb(
        "ditc.parity.commands.parity",
        "Prove that a bundle computes what its checkpoint computes in PyTorch.",
        "parity",
    ),
    "run": Verb("ditc.runtime.commands.run", "Draw pictures with a bundle."),
    "batch": Verb(
        "ditc.runtime.commands.batch", "Draw many requests from a file, with several processes or with Ray."
    ),
    "serve": Verb("ditc.runtime.commands.serve", "Serve bundles to clients over HTTP.", "serve", stays=True),
    "export-triton": Verb(
        "ditc.runtime.commands.export_triton",
        "Write a bundle as a model repository of Triton Inference Server.",
    ),
    "bench": Verb(
        "ditc.runtime.commands.bench",
        "Measure how fast a bundle is on this machine, its backends and precisions side by side.",
    ),
    "inspect": Verb("ditc.runtime.commands.inspect", "Show what a bundle holds, without loading it."),
    "verify": Verb(
        "ditc.runtime.commands.verify",
        "Check the hashes of all files of a bundle and, if asked for, run its self-test.",
    ),
    "sign": Verb("ditc.runtime.commands.sign", "Sign a bundle with an ed25519 key.", "sign"),
    "pull": Verb(
        "ditc.runtime.commands.pull", "Fetch a bundle from the Hugging Face hub, and check its hashes.", "hub"
    ),
    "push": Verb(
        "ditc.runtime.commands.push", "Check a bundle, and upload it to the Hugging Face hub.", "hub"
    ),
    "doctor": Verb(
        "ditc.runtime.commands.doctor", "Show what this machine can build and run, and what is missing."
    ),
    "convert": Verb(
        "ditc.export.commands.convert",
        "Convert a checkpoint between its family's own layout and the layout of diffusers.",
        "export",
    ),
    "calibrate": Verb(
        "ditc.calib.commands.calibrate",
        "Measure the ranges that 8-bit builds need, and search for the best format of every layer.",
        "export",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the console script. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    closed = sys.stdout is None  # as Python has it when the descriptor is closed
    with printable_streams(), endings_as_interrupts():
        try:
            if closed:
                raise OutputError(
                    "stdout is closed, but results are printed there",
                    hint=f"redirect it to a file or to {os.devnull}",
                )
            try:
                code = _main(arguments)
            except SystemExit:  # --help and --version
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # so that a full disk is found here
            return code
        except DitcError as error:
            report(error, as_json="--json" in arguments)
            return USAGE
        except (KeyboardInterrupt, ImportError) as error:
            interrupt = _interrupt(error)
            if interrupt is None:
                raise
            if isinstance(interrupt, Terminated):
                print("terminated", file=sys.stderr)  # noqa: T201
                return 128 + interrupt.number
            print("interrupted", file=sys.stderr)  # noqa: T201
            return INTERRUPTED
        except (
            OSError
        ) as error:  # a path that cannot be looked up, a full disk or a closed pipe behind stdout
            log.debug("the error came from here", exc_info=True)
            report(_as_output_error(error), as_json=error.filename is not None and "--json" in arguments)
            return USAGE


def _main(arguments: list[str]) -> int:
    """Run the verb that is named in the arguments. Returns the exit code."""
    parser = _parser()
    place = next((i for i, a in enumerate(arguments) if not a.startswith("-")), len(arguments))
    if place == len(arguments) or arguments[place] not in VERBS:
        parser.parse_args(arguments)  # --help, --version, or an error that lists the verbs
        parser.print_help()
        return USAGE
    parser.parse_args(arguments[:place])
    limit_openmp()
    verb, typed = VERBS[arguments[place]], parser.verbs[arguments[place]]
    module = _resolve(verb)
    module.add_arguments(typed)
    # The plain parse_args of Python 3.11 fills an optional positional together with the one before it, and would
    # find no PROMPT in `run BUNDLE --steps 2 PROMPT`.
    options = typed.parse_intermixed_args(arguments[place + 1 :])
    _configure_logging(options.verbose, stays=verb.stays)
    return _run(verb, module, options)


def _as_output_error(error: OSError) -> OutputError:
    """What the operating system refused, in words. Nearly everywhere, closer code has said more before."""
    reason = error.strerror or str(error)
    if error.filename is None:
        hint = "free some space, or write elsewhere"
        if isinstance(error, BrokenPipeError):
            hint = "the program behind the pipe has ended; let it read all of the output, or write to a file"
        return OutputError(f"cannot write the output: {reason}", hint=hint)
    return OutputError(f"{error.filename}: {reason}", hint="check the path and the permissions")


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The ctrl-C that caused the error. onnxruntime 1.31 turns a ctrl-C during its import into an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def report(error: DitcError, *, as_json: bool = False) -> None:
    """Write one line that says what happened and one with a hint to stderr; with as_json, also JSON to stdout."""
    if as_json:
        with suppress(OSError):  # stdout may be what failed
            print(json.dumps({"error": type(error).__name__, "message": str(error), "hint": error.hint}))  # noqa: T201
            sys.stdout.flush()
    print(f"error: {one_line(str(error))}", file=sys.stderr)  # noqa: T201
    if error.hint:
        print(f"hint: {one_line(error.hint)}", file=sys.stderr)  # noqa: T201


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="ditc",
        description="Compile diffusion transformers, run them, and prove that they compute what PyTorch computes.",
        epilog="`ditc VERB --help` lists the options of a verb.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="Print the version and exit.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    parser.verbs = {}
    for name, verb in VERBS.items():
        parser.verbs[name] = verbs.add_parser(name, help=verb.help, description=verb.help)
        parser.verbs[name].add_argument(
            "-v",
            "--verbose",
            action="count",
            default=0,
            help="Log what is done to stderr; -vv logs all details (default: only warnings).",
        )
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ditc.runtime.version import __version__

        print(f"ditc {__version__}")  # noqa: T201
        parser.exit()


def _resolve(verb: Verb) -> ModuleType:
    try:
        return importlib.import_module(verb.module)
    except ModuleNotFoundError as e:
        missing = e.name or verb.module
        if verb.extra is None:
            raise
        raise MissingExtra(
            missing.split(".")[0] if not missing.startswith("ditc") else missing, verb.extra
        ) from e


def _run(verb: Verb, module: ModuleType, options: argparse.Namespace) -> int:
    """Run the verb. A package that is missing is reported like one that `_resolve` misses: `run` imports late."""
    try:
        code: int = module.run(options)
    except ModuleNotFoundError as e:
        if verb.extra is None or e.name is None or e.name.startswith("ditc"):
            raise
        raise MissingExtra(e.name.split(".")[0], verb.extra) from e
    return code


def _configure_logging(verbosity: int, *, stays: bool) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    handler = logging.StreamHandler(sys.stderr)
    if not stays:
        handler.addFilter(_Once())
    time = "%(asctime)s " if stays else ""
    formatter = _OneLine if stays or verbosity else _Short
    handler.setFormatter(formatter(f"{time}%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ditc").setLevel(level)


class _OneLine(logging.Formatter):
    """Writes every message on one line. A traceback, which only -vv shows, has its own lines below that."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


class _Short(_OneLine):
    """Begins a warning of ditc as an error begins. A line of another library begins with the library's name."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name.startswith("ditc."):
            return one_line(f"{record.levelname.lower()}: {record.message}")
        return super().formatMessage(record)


class _Once(logging.Filter):
    """Passes every warning once. A text that is too long, for example, is cut with a warning at every encoding."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


if __name__ == "__main__":
    sys.exit(main())
