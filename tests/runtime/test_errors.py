"""Deliberate errors: one line for the message, whatever it quotes."""

from __future__ import annotations

from ditc.runtime.errors import CheckpointError


def test_a_message_that_quotes_another_librarys_is_one_line() -> None:
    error = CheckpointError(
        "config.json: Class validation error:\n    ValueError: layers differ\n", hint="fetch it"
    )
    assert str(error) == "config.json: Class validation error: ValueError: layers differ"
