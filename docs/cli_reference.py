"""Writes docs/cli.md from the parsers of the verbs: `python docs/cli_reference.py > docs/cli.md`."""

from __future__ import annotations

import argparse
import importlib
import sys

from ditc.runtime.cli import VERBS

HEAD = r"""# The `ditc` command

This page is written by `python docs/cli_reference.py > docs/cli.md`; a test compares it with the code.

Results go to stdout, progress and errors to stderr. An error is one line with the values and a `hint:` line; with
`--json` it is JSON on stdout as well. The exit code is 0 if all is done, 1 if a check or one of several pictures
failed, 2 after wrong usage, bad input or output that cannot be written (a full disk, a closed stdout or pipe), and 128
plus the number of a signal that ended it: 130 after ctrl-C, 143 after SIGTERM, which leave no temporary files. Control
characters in names and texts, and characters that the terminal's encoding lacks, are shown as escapes such as `\x1b`.
Every verb also takes `-h`, which prints its help, and `-v`, which logs what is done to stderr (`-vv` logs all details).
"""


def reference() -> str:
    """The whole page."""
    return HEAD + "".join(section(name) for name in VERBS)


def section(name: str) -> str:
    """One verb: what it does, the extra that it needs, and its arguments."""
    verb, parser = VERBS[name], argparse.ArgumentParser(prog=f"ditc {name}", add_help=False)
    importlib.import_module(verb.module).add_arguments(parser)
    needs = f' Needs `pip install "ditc[{verb.extra}]"`.' if verb.extra else ""
    rows = [f"| {_names(action)} | {_help(action)} |\n" for action in parser._actions]
    table = "| argument | meaning |\n|---|---|\n" + "".join(rows) if rows else ""
    return f"\n## `ditc {name}`\n\n{verb.help}{needs}\n\n{table}"


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        name = str(action.metavar or action.dest).upper()
        return f"`[{name}]`" if action.nargs in ("?", "*") else f"`{name}`"
    value = (
        ""
        if action.nargs == 0
        else f" {action.metavar or '{' + ','.join(map(str, action.choices or ())) + '}'}"
    )
    if action.nargs == "+":
        value += " ..."
    return "`" + ", ".join(action.option_strings) + value + "`" + (" (required)" if action.required else "")


def _help(action: argparse.Action) -> str:
    return ((action.help or "") % {"default": action.default}).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
