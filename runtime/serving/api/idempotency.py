"""Idempotency keys: requests of one client that carry the same key and ask for the same get one drawing.

Only successes are kept. What was refused or has failed is drawn again when the client tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.api.ongoing import Ongoing, Shared
from ditc.runtime.serving.api.results import Result
from ditc.runtime.serving.refusals import Invalid

KEY_HEADER = "idempotency-key"


class Idempotency:
    """Finds the drawing of a key. Keys of one client are unknown to the others.

    Args:
        kept: what was asked for with a key, and its drawing.
    """

    def __init__(self, kept: Kept[tuple[str, Shared]]) -> None:
        self._kept = kept

    def shared(
        self, owner: str, key: str | None, asked_for: str, begin: Callable[[], Coroutine[Any, Any, Ongoing]]
    ) -> Shared:
        """The drawing of this key, begun if there is none.

        Args:
            key: None for a drawing that nothing else shares.
            asked_for: identifies what the client asks for.

        Raises:
            Invalid: the key was used for something else (422).
            Overloaded: the owner has too many in work.
        """
        if key is None:
            return Shared(begin)
        known = self._kept.get(owner, key)
        if known is not None:
            if known[0] != asked_for:
                raise Invalid(
                    "the idempotency key was used for another request",
                    hint="choose a new key for each request",
                    param=KEY_HEADER,
                    status=422,
                    code="idempotency_key_reused",
                )
            return known[1]

        def forget() -> None:
            found = self._kept.get(owner, key)
            if found is not None and found[1] is shared:
                self._kept.remove(owner, key)

        def settle(result: asyncio.Task[Result]) -> None:
            if result.cancelled() or result.exception() is not None:
                forget()
            else:
                self._kept.settle(owner, key, result.result().size_bytes)

        async def begin_and_keep() -> Ongoing:
            try:
                ongoing = await begin()
            except BaseException:
                forget()
                raise
            ongoing.when_done(settle)
            return ongoing

        shared = Shared(begin_and_keep, abandoned=forget)
        self._kept.add(owner, key, (asked_for, shared))
        return shared
