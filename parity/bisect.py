"""Find where an error begins: compare two traces of one input place by place, and name the first that differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ditc.parity.compare import check_reference, worst_element
from ditc.parity.results import Culprit, Element
from ditc.parity.trace import Place, PlaceInfo, Shape, Tracer
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array

# The most memory that activations of both sides take at once.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class PlaceError:
    """How far the two sides are apart at one place.

    Attributes:
        amax: the largest magnitude in the reference.
        same_form: whether the module takes the same number of tensors on both sides. Upstream's norm_out, for example,
            takes the modulation too and so returns something different from ditc's. That is not an error: if it were
            one, the modules after it would differ as well.
    """

    place: Place
    error: float
    amax: float
    worst: Element | None
    same_form: bool = True


def errors_by_place(
    reference: Tracer,
    candidate: Tracer,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    on_chunk: Callable[[], None] = lambda: None,
) -> Iterator[PlaceError]:
    """Yield the error at every place that both sides have, in the reference's order of execution.

    Args:
        chunk_bytes: how many bytes of activations are fetched at a time.

    Raises:
        NumericsError: the reference has NaN or Inf at a place, which the message names.
    """
    known = {seen.place: seen.inputs for seen in candidate.places()}
    for chunk in _chunks([seen for seen in reference.places() if seen.place in known], chunk_bytes):
        alike = {seen.place: known[seen.place] in (0, seen.inputs) for seen in chunk}
        shapes: dict[Place, Shape] = {seen.place: seen.shape for seen in chunk}
        deltas: dict[Place, Shape] = {Place(p.module, "delta"): None for p in shapes if p.kind == "out"}
        expected = {place: values[0] for place, values in reference.fetch(shapes | deltas).items()}
        found = candidate.fetch(shapes)
        for place in shapes:
            if place in expected and place in found:
                closest = [error for value in found[place] for error in _compared(place, value, expected)]
                if closest:
                    best = min(closest, key=lambda e: float("inf") if e.error != e.error else e.error)
                    yield replace(best, same_form=alike[place])
        on_chunk()


def find_culprit(
    stage: str, errors: list[PlaceError], limit: Callable[[PlaceError], float], output_error: float
) -> Culprit:
    """The module in which the error begins.

    The first place in execution order that exceeds its limit decides. If it is a module's output, the places inside
    the module agreed, so the error is in that module. If it is a module's input, the error is in the code of the
    module around it.

    Args:
        errors: in execution order.
        output_error: relative L2 of the stage's outputs. It is reported if every place agrees: then the error begins
            after the last place.
    """
    modules = {error.place.module for error in errors}
    last = "the stage's inputs"
    before = 0.0
    for found in errors:
        place = found.place
        if not found.error <= limit(found):
            if place.kind == "out" and _is_leaf(place.module, modules):
                return Culprit(
                    stage=stage, module=place.module, error=found.error, before=before, worst=found.worst
                )
            module = place.module if place.kind == "out" else _parent(place.module, modules)
            return Culprit(
                stage=stage,
                module=module,
                error=found.error,
                before=before,
                between=(last, str(place)),
                worst=found.worst,
            )
        last, before = str(place), found.error
    between = (last, "the stage's outputs")
    return Culprit(stage=stage, module="", error=output_error, before=before, between=between)


def align(candidate: Array, reference: Array) -> list[Array]:
    """The reference in the candidate's layout. If the shapes fit several layouts, all of them are returned.

    Rows: upstream runs both rows of guidance at once. Where the candidate runs one, it is the last, conditional row.
    Frames: upstream embeds one timestep per row of a video, and ditc one per frame. They are alike where none is held.
    Layout: upstream's 1x1 convolutions are (B,C,H,W) or (B,H,W,C) where ditc has Linears on (B,N,C).

    Returns:
        An empty list if no known layout fits.
    """
    if candidate.ndim and reference.ndim and candidate.shape[0] < reference.shape[0]:
        reference = reference[-candidate.shape[0] :]
    if candidate.ndim == reference.ndim == 2 and candidate.shape[0] > reference.shape[0] > 0:
        frames, rest = divmod(candidate.shape[0], reference.shape[0])
        reference = reference if rest else np.repeat(reference, frames, axis=0)
    if candidate.shape == reference.shape and candidate.ndim != 4:
        return [reference]
    if candidate.ndim == 3 and reference.ndim == 4:
        batch = reference.shape[0]
        forms: list[Array] = [
            reference.reshape(batch, reference.shape[1], -1).transpose(0, 2, 1),
            reference.reshape(batch, -1, reference.shape[3]),
            *_patches(reference, candidate.shape[2]),
        ]
    elif candidate.ndim == 4 and reference.ndim == 3:
        batch, _, height, width = candidate.shape
        if reference.size != candidate.size:
            return []
        # tokens (B,N,C); or (B,C,H*W), which upstream's attention in a VAE passes to its group norm
        forms = [
            reference.transpose(0, 2, 1).reshape(batch, -1, height, width),
            reference.reshape(candidate.shape),
        ]
    elif candidate.ndim == 4 and reference.ndim == 4:
        # the same layout; (B,H,W,C) for (B,C,H,W) or the reverse; heads before tokens, (B,H,N,D) for (B,N,H,D)
        forms = [
            reference,
            *(reference.transpose(axes) for axes in ((0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1, 3))),
        ]
    else:
        return []
    return [form for form in forms if form.shape == candidate.shape]


def _patches(reference_BCHW: Array, features: int) -> list[Array]:
    """The input of a patch embedding's convolution as its Linear reads it: (B,h*w,C*p*p), if some p gives `features`.

    Without this layout, the input of a convolution with p = 2 on 16 channels would be compared with columns of 64
    cells, which have the same shape.
    """
    batch, channels, height, width = reference_BCHW.shape
    p = math.isqrt(features // channels)
    if p < 2 or channels * p * p != features or height % p or width % p:
        return []
    cells = reference_BCHW.reshape(batch, channels, height // p, p, width // p, p)
    return [cells.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, features)]


def _compared(place: Place, found: Array, expected: dict[Place, Array]) -> Iterator[PlaceError]:
    candidate = widened(found)
    forms = []
    for kind in (place, Place(place.module, "delta")):
        if kind in expected:
            forms += align(candidate, check_reference(str(place), expected[kind]))
        if kind == place and not forms:
            return  # the two sides have layouts that cannot be compared
    errors = [relative_l2(candidate, form) for form in forms]
    best = int(np.nanargmin(errors)) if not all(np.isnan(errors)) else 0
    worst = worst_element(str(place), candidate, forms[best]) if candidate.size else None
    amax = float(np.abs(expected[place]).max()) if expected[place].size else 0.0
    yield PlaceError(place, errors[best], amax, worst)


def _chunks(seen: list[PlaceInfo], limit: int) -> Iterator[list[PlaceInfo]]:
    chunk: list[PlaceInfo] = []
    size = 0
    for one in seen:
        if chunk and size + one.size_bytes > limit // 2:  # each side takes one half
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += one.size_bytes
    if chunk:
        yield chunk


def _is_leaf(module: str, modules: set[str]) -> bool:
    return not any(other.startswith(f"{module}.") for other in modules)


def _parent(module: str, modules: set[str]) -> str:
    """The nearest enclosing module that has places. Containers such as ModuleList are never called and have none."""
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return module
    return ""
