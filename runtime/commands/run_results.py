"""What `ditc run` has drawn so far: PNG files with their settings, each written as soon as it is there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.atomic import atomic_path
from ditc.runtime.errors import OutputError

if TYPE_CHECKING:
    from PIL import Image

    from ditc.runtime.failure import Failure
    from ditc.runtime.output import Drawn
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan

# Fields of Request that a picture's settings name if they are given.
TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
SCHEDULE = ("timesteps", "sigmas", "mu")


class Results:
    """What was drawn so far: the files that are written, and the pictures that failed."""

    def __init__(self, pipeline: Pipeline, plan: Plan, prompts: list[str], paths: list[Path]) -> None:
        self._pipeline, self.plan, self._prompts, self._paths = pipeline, plan, prompts, paths
        self.files: list[Path | None] = []  # None for a picture that failed
        self.failures: list[Failure] = []
        self.seconds: dict[str, float] = {}

    @property
    def written(self) -> str:
        files = sum(file is not None for file in self.files)
        return f"{files} of {len(self._paths)} pictures are written"

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
                    self.files[index] = save_picture(picture, self._paths[index], self._metadata(index))
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

    def _metadata(self, index: int) -> dict[str, str]:
        from ditc.runtime.machine import library_versions

        plan, skip = self.plan, self.plan.skip_layer_guidance
        settings = {
            "num_inference_steps": plan.num_inference_steps,
            **{name: value for name in SCHEDULE if (value := getattr(plan.request, name)) is not None},
            "guidance_scale": plan.guidance_scale,
            "skip_layer_guidance_scale": skip.scale if skip else 0,
            **(
                {"skip_layer_guidance_start": skip.start, "skip_layer_guidance_stop": skip.stop}
                if skip
                else {}
            ),
            "height": plan.height,
            "width": plan.width,
            "backend": self._pipeline.chosen,
            # One seed draws the noise of all pictures, so the place of this one among them is needed to draw it again.
            "index": index,
            "num_prompts": len(self._prompts),
            "num_images_per_prompt": plan.request.num_images_per_prompt,
        }
        given = {name: getattr(plan.request, name) for name in TEXTS}
        return {
            "prompt": plan.request.prompt_of(index),
            **{name: text for name, text in given.items() if text is not None},
            "seed": str(plan.seed),
            "settings": json.dumps(settings),
            "bundle": self._pipeline.manifest.digest,
            "software": f"ditc {library_versions().get('ditc', '')}".strip(),
        }


def save_picture(picture: Image.Image, path: Path, metadata: dict[str, str]) -> Path:
    """Write one picture. Raises OutputError if it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in metadata.items():
        info.add_itxt(name, text)
    with atomic_path(path, hint="choose another -o") as partial:
        picture.save(partial, format="PNG", pnginfo=info)
    return path
