"""Jobs whose results are videos, as OpenAI's videos API shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ditc.runtime.serving.api.answers import VideoAnswer, VideoDetails
from ditc.runtime.serving.api.jobs import AsyncJob


@dataclass(eq=False, slots=True, kw_only=True)
class VideoJob(AsyncJob):
    """One job for a video."""

    prefix: ClassVar[str] = "video_"

    def answer(self) -> VideoAnswer:
        """What a client is told about it."""
        self.note_progress()
        status, result = self.status, self.result
        details = self.details if result is None else result.details
        assert isinstance(details, VideoDetails)  # as every drawing of a video has
        return VideoAnswer(
            id=self.id,
            created_at=self.created,
            completed_at=self.ended if result is not None else None,
            expires_at=self.expires,
            model=details.model,
            # OpenAI has no further status. A job that its client cancels is removed.
            status="failed" if status == "cancelled" else status,
            progress=self.progress,
            prompt=self.asked.request.prompt_of(0),
            seconds=seconds_of(details.frames, details.fps),
            size=f"{details.width}x{details.height}",
            error=self.error,
            ditc=details.model_copy(update={"steps_done": self.steps_done, "frames_done": self.frames_done}),
        )


def seconds_of(frames: int, fps: int) -> str:
    """How long a video takes, as a text as in OpenAI's API, with three decimals at most.

    seconds_of(81, 16)  # "5.063"
    """
    return f"{frames / fps:.3f}".rstrip("0").rstrip(".")
