"""What `ditc run` has drawn so far: files with their settings, each written as soon as it is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.errors import OutputError
from ditc.runtime.png import picture_settings, save_png
from ditc.runtime.video_files import save_video

if TYPE_CHECKING:
    from ditc.runtime.failure import Failure
    from ditc.runtime.output import Drawn
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan


class Results:
    """What was drawn so far: the files that are written, and the pictures that failed.

    Args:
        fps: frames per second of the files of videos; None for pictures.
    """

    def __init__(self, pipeline: Pipeline, plan: Plan, paths: list[Path], *, fps: int | None = None) -> None:
        self._pipeline, self.plan, self._paths, self._fps = pipeline, plan, paths, fps
        self.files: list[Path | None] = []  # None for a picture that failed
        self.failures: list[Failure] = []
        self.seconds: dict[str, float] = {}

    @property
    def written(self) -> str:
        files = sum(file is not None for file in self.files)
        what = "pictures" if self._fps is None else "videos"
        return f"{files} of {len(self._paths)} {what} are written"

    def save(self, part: Drawn) -> None:
        """Write every picture that was drawn, and name those that failed on stderr.

        Raises:
            OutputError: some cannot be written. The others are written all the same.
        """
        for failure in part.failures:
            sys.stderr.write(f"error: {failure}\n")
        self.failures += part.failures
        for name, seconds in part.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        errors: list[OutputError] = []
        for index, picture in enumerate(part.pictures, part.first):
            self.files.append(None)
            if picture is not None:
                try:
                    settings = picture_settings(
                        self._pipeline, self.plan, index, backend=self._pipeline.chosen
                    )
                    path = self._paths[index]
                    self.files[index] = (
                        save_png(picture, path, settings)
                        if self._fps is None
                        else save_video(picture, path, settings, fps=self._fps)
                    )
                except OutputError as e:
                    errors.append(e)
        if errors:
            hint = f"{errors[0].hint}; the seed was {self.plan.seed}"
            raise OutputError(f"{errors[0]}; {self.written}", hint=hint) from errors[0]

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Say what there is if the drawing ends early, by ctrl-C for example."""
        try:
            yield
        except OutputError:  # says it too
            raise
        except BaseException:
            if any(self.files):
                sys.stderr.write(f"{self.written}; the seed was {self.plan.seed}\n")
            raise
