"""The log names where an error was raised, and does not repeat its message, which may quote a prompt."""

from __future__ import annotations

from ditc.runtime.serving.log_text import where_raised


def test_the_place_and_the_kinds_are_told_and_no_message() -> None:
    try:
        try:
            raise ValueError("a secret prompt")
        except ValueError as e:
            raise RuntimeError("cannot encode 'a secret prompt'") from e
    except RuntimeError as error:
        text = where_raised(error)
    assert "test_log_text.py" in text and "RuntimeError from ValueError" in text
    assert "'a secret" not in text.splitlines()[-1] and "cannot encode" not in text.splitlines()[-1]
