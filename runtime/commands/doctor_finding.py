"""One line of what `ditc doctor` answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """ok None: neither good nor bad."""

    topic: str
    text: str
    ok: bool | None = True
    hint: str | None = None
