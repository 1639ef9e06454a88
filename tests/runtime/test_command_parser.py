"""The hint of a line that does not parse says what was probably meant."""

from __future__ import annotations

import logging

import pytest

from ditc.runtime import cli
from ditc.runtime.cli import USAGE, main


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (["rnu", "b", "cat"], "did you mean run? ditc --help"),
        (["run", "b", "cat", "--outptu", "x.png"], "did you mean --output? ditc run --help"),
        (["run", "b", "cat", "--sted", "3"], "did you mean --seed or --steps? ditc run --help"),
        (["run", "b", "cat", "--sede=3"], "did you mean --seed? ditc run --help"),
        (["run", "b", "a", "red", "cat"], "put a text of several words in quotes; ditc run --help"),
        (
            ["export-triton", "b", "-o", "x", "--backend", "onnxruntim"],
            "did you mean onnxruntime? ditc export-triton --help",
        ),
        (["run", "b", "cat", "--zzzzzz"], "ditc run --help"),
    ],
)
def test_what_is_near_a_misspelt_word_is_named(
    line: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == USAGE
    assert capsys.readouterr().err.splitlines()[1] == f"hint: {hint}"


def test_a_warning_begins_as_an_error_does_and_names_its_module_to_those_who_ask() -> None:
    def line(formatter: logging.Formatter, name: str) -> str:
        return formatter.format(logging.LogRecord(name, logging.WARNING, "", 0, "x is %d", (3,), None))

    form = "%(levelname)s %(name)s: %(message)s"
    assert line(cli._Short(form), "ditc.runtime.x") == "warning: x is 3"
    assert line(cli._Short(form), "transformers.x") == "WARNING transformers.x: x is 3"
    assert line(cli._OneLine(form), "ditc.runtime.x") == "WARNING ditc.runtime.x: x is 3"
