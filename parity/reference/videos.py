"""Upstream's pipelines of videos: those that start from a picture, and those that start from a text alone.

diffusers has two classes over the same networks. Which of them model_index.json names does not matter here: each case
is drawn with the class that it needs.
"""

# B rows, F latent frames, h/w patches

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

PICTURE = "ImageToVideoPipeline"
TEXT = ("VideoPipeline", "Pipeline")


def from_text(pipeline: Any) -> Any:
    """The pipeline that needs no picture, over the same networks; `pipeline` itself if it needs none."""
    name = type(pipeline).__name__
    if not name.endswith(PICTURE):
        return pipeline
    return _made(pipeline, [name.removesuffix(PICTURE) + ending for ending in TEXT])


def from_picture(pipeline: Any) -> Any:
    """The pipeline whose first frame is a picture, over the same networks."""
    name = type(pipeline).__name__
    if name.endswith(PICTURE):
        return pipeline
    ending = next(ending for ending in TEXT if name.endswith(ending))
    return _made(pipeline, [name.removesuffix(ending) + PICTURE])


def _made(pipeline: Any, names: list[str]) -> Any:
    """A pipeline of the first class that diffusers has.

    Raises:
        ValueError: it has none of them.
    """
    import diffusers

    found = next((getattr(diffusers, name) for name in names if hasattr(diffusers, name)), None)
    if found is None:
        raise ValueError(f"diffusers has no {' or '.join(names)}")
    made = found(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def one_timestep_for_all_frames(transformer: nn.Module) -> Iterator[None]:
    """Let a transformer see the held frame with the timestep of the others: the mistake that a report names."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        timestep = kwargs["timestep"]  # (B,1,F,h,w)
        return args, {**kwargs, "timestep": timestep.amax(dim=2, keepdim=True).expand_as(timestep)}

    handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
