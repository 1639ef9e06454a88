"""Writes docs/cli.md from the parsers themselves: `python docs/cli_reference.py > docs/cli.md`."""

from __future__ import annotations

import argparse
import importlib
import sys

from ditc.runtime.cli import VERBS

HEAD = """# The `ditc` command

Written by `python docs/cli_reference.py > docs/cli.md`; a test holds it to the code.

Results go to stdout, progress and errors to stderr. Errors are one line with the values and a `hint:` line; with
`--json` they are JSON on stdout as well. Exit codes: 0 done, 1 a check failed, 2 usage or bad input, 130 interrupted.
Every verb takes `-h` and `-v` (more log; twice for all).
"""


def reference() -> str:
    """The whole page."""
    return HEAD + "".join(section(name) for name in VERBS)


def section(name: str) -> str:
    """One verb: what it does, its arguments, the extra that it needs."""
    verb, parser = VERBS[name], argparse.ArgumentParser(prog=f"ditc {name}", add_help=False)
    importlib.import_module(verb.module).add_arguments(parser)
    needs = f' Needs `pip install "ditc[{verb.extra}]"`.' if verb.extra else ""
    rows = [f"| {_names(action)} | {_help(action)} |\n" for action in parser._actions]
    table = "| argument | meaning |\n|---|---|\n" + "".join(rows) if rows else ""
    return f"\n## `ditc {name}`\n\n{verb.help[0].upper()}{verb.help[1:]}.{needs}\n\n{table}"


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        name = str(action.metavar or action.dest).upper()
        return f"`[{name}]`" if action.nargs in ("?", "*") else f"`{name}`"
    value = (
        ""
        if action.nargs == 0
        else f" {action.metavar or '{' + ','.join(map(str, action.choices or ())) + '}'}"
    )
    if value == " {}":
        value = f" {action.dest.upper()}"
    return "`" + ", ".join(action.option_strings) + value + "`" + (" (required)" if action.required else "")


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default}
    shown = action.default not in (None, False, "", argparse.SUPPRESS) and "default" not in text
    return (f"{text}; default `{action.default}`".removeprefix("; ") if shown else text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
