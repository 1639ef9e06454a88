"""One finding of `ditc doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ok is None if it is neither good nor bad."""

    topic: str
    text: str
    ok: bool | None = True
    hint: str | None = None
