"""Every error that ditc raises on purpose tells what to do, as the documentation promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ditc.runtime import errors

ROOT = Path(__file__).parents[1]
# MissingExtra makes its hint by itself.
NAMES = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.DitcError) and name != "MissingExtra"
}


def without_hint(source: str) -> list[str]:
    """The calls that make an error without a hint, or with an empty one, with their line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in NAMES):
            continue
        hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
        if not hints or (isinstance(hints[0], ast.Constant) and not hints[0].value):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("part", ["runtime", "export", "parity", "calib"])
def test_every_error_has_a_hint(part: str) -> None:
    found = {
        path.name: without_hint(path.read_text(encoding="utf-8")) for path in (ROOT / part).rglob("*.py")
    }
    assert len(found) > 5 and not {name: calls for name, calls in found.items() if calls}


def test_the_check_finds_errors_without_one() -> None:
    assert without_hint('raise UsageError("x")') and without_hint('errors.BundleError("x", hint="")')
    assert without_hint('SessionError("x", hint=None)') and not without_hint('SessionError("x", hint=h)')
