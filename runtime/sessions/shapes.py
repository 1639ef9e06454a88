"""Checks inputs against a stage's spec and an engine's profiles, before anything is copied to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.session import numpy_dtype
from ditc.runtime.sessions.engine import Shape, ShapeRange
from ditc.runtime.spec import StageSpec, TensorSpec

TAKES = "feed what the stage takes: ditc inspect BUNDLE lists its inputs"


def check_feeds(spec: StageSpec, feeds: Mapping[str, Any]) -> None:
    """Check the names, element types and sizes of all inputs.

    Raises:
        SessionError: the message names the tensor, its shape and what the stage takes.
    """
    wanted, given = {t.name for t in spec.inputs}, set(feeds)
    if wanted != given:
        parts = [
            f"{what} {', '.join(sorted(names))}"
            for what, names in (("lacks", wanted - given), ("does not take", given - wanted))
            if names
        ]
        raise SessionError(f"{spec.name}: {' and '.join(parts)}", hint=TAKES)
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in spec.inputs:
        _check_type(spec, tensor, feeds[tensor.name])
        _check_shape(spec, tensor, tuple(feeds[tensor.name].shape), sizes)


def choose_profile(
    spec: StageSpec, profiles: Sequence[Mapping[str, ShapeRange]], shapes: Mapping[str, Shape]
) -> int:
    """The index of the first profile that allows these shapes.

    Raises:
        SessionError: no profile allows them. The message is about the profile that allows most of them.
    """
    for index, profile in enumerate(profiles):
        if all(shapes[name] in range_ for name, range_ in profile.items() if name in shapes):
            return index
    closest = max(range(len(profiles)), key=lambda i: _fitting(profiles[i], shapes))
    wrong = [
        f"{name} {shapes[name]} is not between {range_.min} and {range_.max}"
        for name, range_ in profiles[closest].items()
        if name in shapes and shapes[name] not in range_
    ]
    raise SessionError(
        f"{spec.name}: no profile of the engine allows these sizes: {'; '.join(wrong)}",
        hint="build the engine with a larger --max-batch or other sizes, or run with --backend onnxruntime",
    )


def _fitting(profile: Mapping[str, ShapeRange], shapes: Mapping[str, Shape]) -> int:
    return sum(shapes[name] in range_ for name, range_ in profile.items() if name in shapes)


def _check_type(spec: StageSpec, tensor: TensorSpec, feed: Any) -> None:
    kind = feed.dtype
    good = kind == numpy_dtype(tensor.dtype) if isinstance(feed, np.ndarray) else kind == tensor.dtype
    if not good:
        raise SessionError(
            f"{spec.name}: {tensor.name} is {kind}, but the stage takes {tensor.dtype.value}", hint=TAKES
        )


def _check_shape(
    spec: StageSpec, tensor: TensorSpec, shape: Shape, sizes: dict[str, tuple[int, str]]
) -> None:
    fits = len(shape) == len(tensor.shape)
    for dim, size in zip(tensor.shape, shape, strict=False):
        if isinstance(dim, int):
            fits = fits and size == dim
            continue
        known, where = sizes.setdefault(dim, (size, tensor.name))
        if known != size:
            raise SessionError(
                f"{spec.name}: {dim} is {known} in {where} and {size} in {tensor.name}, but must be the same",
                hint=TAKES,
            )
        if dim in spec.profile and size not in spec.profile[dim]:
            range_ = spec.profile[dim]
            raise SessionError(
                f"{spec.name}: {dim} of {tensor.name} is {size}, but the stage takes {range_.min} to {range_.max} "
                f"in steps of {range_.multiple_of}",
                hint="ask for other sizes, or build the bundle with a larger --max-batch or another --resolution",
            )
    if not fits:
        raise SessionError(
            f"{spec.name}: {tensor.name} is {shape}, but the stage takes {tensor.shape}", hint=TAKES
        )
