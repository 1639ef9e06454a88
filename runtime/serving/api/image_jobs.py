"""Jobs whose results are pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ditc.runtime.serving.api.answers import JobAnswer
from ditc.runtime.serving.api.bodies import usage_of
from ditc.runtime.serving.api.jobs import AsyncJob


@dataclass(eq=False, slots=True, kw_only=True)
class ImageJob(AsyncJob):
    """One job for pictures."""

    prefix: ClassVar[str] = "imgjob_"

    def answer(self) -> JobAnswer:
        """What a client is told about it."""
        self.note_progress()
        result = self.result
        return JobAnswer(
            id=self.id,
            created_at=self.created,
            completed_at=self.ended if result is not None else None,
            expires_at=self.expires,
            model=self.details.model,
            status=self.status,
            progress=self.progress,
            size=f"{self.details.width}x{self.details.height}",
            n=self.count,
            error=self.error,
            usage=None if result is None else usage_of(result),
            ditc=self.details if result is None else result.details,
        )
