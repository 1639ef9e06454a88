"""The `ditc` command: a table of verbs, resolved when one is typed.

Progress and errors go to stderr, results to stdout. Exit codes: 0 done, 1 a check failed, 2 usage or bad input,
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

from ditc.runtime.errors import DitcError, MissingExtra, UsageError

FAILED = 1
USAGE = 2
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb lives, what it does, and the extra that installs what it needs."""

    module: str
    help: str
    extra: str | None = None


# Strings, so that the runtime imports no part that may be absent.
VERBS = {
    "build": Verb(
        "ditc.export.commands.build", "checkpoint -> bundle (ONNX graphs, optionally engines)", "export"
    ),
    "parity": Verb(
        "ditc.parity.commands.parity", "prove that a bundle computes what PyTorch computes", "parity"
    ),
    "run": Verb("ditc.runtime.commands.run", "draw pictures with a bundle"),
    "inspect": Verb("ditc.runtime.commands.inspect", "what a bundle holds"),
    "verify": Verb("ditc.runtime.commands.verify", "check every hash of a bundle"),
    "sign": Verb("ditc.runtime.commands.sign", "sign a bundle with an ed25519 key", "sign"),
    "doctor": Verb(
        "ditc.runtime.commands.doctor", "what this machine can build and run, and what is missing"
    ),
    "convert": Verb(
        "ditc.export.commands.convert", "native checkpoint -> diffusers layout, and back", "export"
    ),
    "calibrate": Verb(
        "ditc.calib.commands.calibrate", "checkpoint -> ranges for 8-bit builds; precision search", "export"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    place = next((i for i, a in enumerate(arguments) if not a.startswith("-")), len(arguments))
    try:
        if place == len(arguments) or arguments[place] not in VERBS:
            parser.parse_args(arguments)  # --help, --version, or an error that lists the verbs
            parser.print_help()
            return USAGE
        parser.parse_args(arguments[:place])
        verb, typed = VERBS[arguments[place]], parser.verbs[arguments[place]]
        module = _resolve(verb)
        module.add_arguments(typed)
        # Intermixed, or `run BUNDLE --steps 2 PROMPT` has no PROMPT: argparse of Python 3.11 fills an optional
        # positional together with the one before it.
        options = typed.parse_intermixed_args(arguments[place + 1 :])
        _configure_logging(options.verbose)
        return _run(verb, module, options)
    except DitcError as error:
        report(error, as_json="--json" in arguments)
        return USAGE
    except (KeyboardInterrupt, ImportError) as error:
        if not _is_interrupt(error):
            raise
        print("interrupted", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether ctrl-C is what happened: while a compiled module starts (onnxruntime 1.31's), it ends as ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def report(error: DitcError, *, as_json: bool = False) -> None:
    """One line of what happened, one of what to do, to stderr; as JSON to stdout where a program reads."""
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error), "hint": error.hint}))  # noqa: T201
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201


class _Parser(argparse.ArgumentParser):
    """Refuses as every other part does; the top-level one has its verbs' at hand so that only the typed is filled."""

    verbs: dict[str, _Parser]

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(prog="ditc", description="Compile diffusion transformers, run them, prove them.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    parser.verbs = {}
    for name, verb in VERBS.items():
        parser.verbs[name] = verbs.add_parser(name, help=verb.help, description=verb.help)
        parser.verbs[name].add_argument(
            "-v", "--verbose", action="count", default=0, help="more log; twice for all"
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
    """A verb may import what it needs only when it works: what is missing then is said in the same way."""
    try:
        code: int = module.run(options)
    except ModuleNotFoundError as e:
        if verb.extra is None or e.name is None or e.name.startswith("ditc"):
            raise
        raise MissingExtra(e.name.split(".")[0], verb.extra) from e
    return code


def _configure_logging(verbosity: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Once())
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[handler]
    )
    logging.getLogger("ditc").setLevel(level)


class _Once(logging.Filter):
    """Says a warning once: a text that is cut is cut each time that it is encoded."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new


if __name__ == "__main__":
    sys.exit(main())
