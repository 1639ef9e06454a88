"""Ranges: statistics of the input of every quantizable layer, tied to the checkpoint that they were measured on.

The file is a safetensors file. A site is one tensor, which several layers may read. For each site, and B buckets of the
schedule, the file holds:

    amax/SITE              (B,) fp32            largest magnitude
    histogram/SITE         (B,BINS) int64       counts of magnitudes, see histogram.py
    channel_amax/SITE      (B,C) fp32           largest magnitude of each channel
    channel_squares/SITE   (B,C) fp64           sum of squares of each channel
    channel_histogram/SITE (C,CHANNEL_BINS) uint32  counts of each channel's magnitudes, over all buckets
    half_histogram/SITE    (BINS,) int64       counts of the prompts of the first half (half_of), over all buckets
    rows/SITE              (B,) int64           number of vectors seen

Bucket b holds the steps with step_index * B // num_inference_steps = b. The file holds no scale and no format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ditc.export.build.build_key import digest
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.safetensors_file import safetensors_path
from ditc.export.quant.histogram import BINS, CHANNEL_BINS
from ditc.runtime.bundle.integrity import sha256
from ditc.runtime.bundle.jsondata import LEFT_OUT_IF_NONE, check_numbers, from_json, to_json
from ditc.runtime.errors import UsageError
from ditc.runtime.limits import MAX_STEPS
from ditc.runtime.session import Array
from ditc.runtime.spec import DENOISER

VERSION = 3
METADATA = "ditc.ranges"
OVER_ALL_BUCKETS = ("channel_histogram", "half_histogram")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics of one tensor, in the fields of the file."""

    amax: Array
    histogram: Array
    channel_amax: Array
    channel_squares: Array
    rows: Array
    channel_histogram: Array
    half_histogram: Array

    @property
    def buckets(self) -> int:
        return int(self.amax.shape[0])

    @property
    def channels(self) -> int:
        return int(self.channel_amax.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the ranges were measured on. Two files can be merged if these facts agree.

    Attributes:
        identity: hash of the network's weights and config.
        network: name of the network's component in the checkpoint.
        dtype: element type in which the network ran.
        num_inference_steps, guidance_scale, seed: settings of every request; prompt i starts from seed + i.
        usual_steps: the checkpoint's default number of steps.
        stage: the stage whose layers were watched.
        control: with which control pictures, for a checkpoint with a ControlNet; None for one without.
        buckets: number of parts into which the schedule is divided.
        version: format of the file.
    """

    identity: str
    network: str
    dtype: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    buckets: int
    usual_steps: int
    stage: str = DENOISER
    control: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt that was seen.

    Attributes:
        text, ids: digests of its text, and of its token ids in all text encoders.
        size_bytes: bytes of its text in UTF-8, once for each text encoder.
        tokens: number of its tokens in all text encoders. A byte that a vocabulary does not know counts as one token.
    """

    text: str
    ids: str
    size_bytes: int
    tokens: int


def half_of(text: str) -> int:
    """The half, 0 or 1, that a prompt belongs to, by the digest of its text, so that shards agree about it."""
    return int(text, 16) % 2


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """All statistics of one calibration.

    Attributes:
        sites: statistics by site.
        site_of: layer (a module's path in the checkpoint) -> the site that is the layer's input.
        prompts: the prompts that were seen, so that none counts twice.
    """

    origin: Origin
    sites: Mapping[str, Statistics]
    site_of: Mapping[str, str]
    prompts: tuple[Prompt, ...]

    def of(self, layer: str) -> Statistics:
        """Statistics of the layer's input.

        Raises:
            UsageError: calibration did not see the layer.
        """
        if layer not in self.site_of:
            raise UsageError(
                f"the ranges have no statistics of {layer}",
                hint="calibrate again with this version: ditc calibrate CHECKPOINT -o RANGES",
            )
        return self.sites[self.site_of[layer]]


def checkpoint_identity(checkpoint: Checkpoint, component: str) -> str:
    """Hash of one network's config and weights, to which ranges are tied."""
    part = checkpoint.component(component)
    files = {path.name: sha256(path) for path in part.files}
    return digest({"config": part.config, "weights": files})


def save_ranges(ranges: Ranges, path: Path) -> Path:
    """Write the file, which appears complete or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Array] = {}
    for site, statistics in ranges.sites.items():
        for name in Statistics.__slots__:
            tensors[f"{name}/{site}"] = np.ascontiguousarray(getattr(statistics, name))
    facts = {
        "origin": to_json(ranges.origin),
        "site_of": dict(ranges.site_of),
        "prompts": to_json(ranges.prompts),
    }
    # One metadata entry only: safetensors writes several in any order, but equal ranges must give equal files.
    metadata = {METADATA: json.dumps(facts, sort_keys=True)}
    with safetensors_path(path, hint="choose another -o") as partial:
        save_file(tensors, partial, metadata=metadata)
    return path


def load_ranges(path: Path, *, identity: str | None = None) -> Ranges:
    """Read and check a file of ranges.

    Args:
        identity: `checkpoint_identity` of the checkpoint that the ranges are for; None to skip the comparison.

    Raises:
        UsageError: the file is missing or not a file of ranges, is of another checkpoint or version, or has a tensor
            of the wrong shape or with values that are negative or not finite. The message names the tensor.
    """
    again = f"measure again: ditc calibrate CHECKPOINT -o {path}"
    try:
        with safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if METADATA not in metadata:
                raise UsageError(f"{path} holds no ranges", hint=again)
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata[METADATA])
        if (version := facts["origin"]["version"]) != VERSION:
            raise UsageError(
                f"{path} has format version {version}, but this ditc reads {VERSION}", hint=again
            )
        check_numbers(facts)
        origin = from_json(Origin, facts["origin"])
        site_of = from_json(dict[str, str], facts["site_of"])
        prompts = from_json(tuple[Prompt, ...], facts["prompts"])
        _check_counts(origin, prompts)
    except FileNotFoundError as e:
        raise UsageError(f"there is no file {path}", hint=again) from e
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as e:
        raise UsageError(f"{path} is not a whole file of ranges: {e}", hint=again) from e
    if identity is not None:
        check_identity(origin, identity, path)
    sites = {site: _statistics(site, tensors, origin.buckets, path) for site in sorted(set(site_of.values()))}
    return Ranges(origin=origin, sites=sites, site_of=site_of, prompts=prompts)


def check_identity(origin: Origin, identity: str, path: Path) -> None:
    """Raise UsageError if ranges of this origin, in the file `path`, were measured on other weights."""
    if origin.identity != identity:
        raise UsageError(
            f"{path} was measured on other weights: it names {origin.identity[:12]}, but this checkpoint is "
            f"{identity[:12]}",
            hint=f"measure again: ditc calibrate CHECKPOINT -o {path}",
        )


def merge_ranges(parts: Sequence[Ranges]) -> Ranges:
    """Merge calibrations over different prompts, from the same machine or several, into one.

    Counts and amax are as if one run had seen all prompts; sums of squares agree up to fp64 rounding.

    Raises:
        UsageError: there is nothing to merge, or the parts differ in checkpoint, settings or layers, or share a prompt.
    """
    if not parts:
        raise UsageError("there are no ranges to merge", hint="name at least one file")
    first = parts[0]
    for part in parts[1:]:
        if part.origin != first.origin or part.site_of != first.site_of:
            raise UsageError(
                f"the ranges do not belong together: {_difference(first.origin, part.origin)}",
                hint="calibrate all parts with the same checkpoint and settings",
            )
    prompts = sorted((prompt for part in parts for prompt in part.prompts), key=lambda prompt: prompt.text)
    if len({prompt.text for prompt in prompts}) < len(prompts):
        raise UsageError("the same prompt is in two of the files", hint="give each machine its own --shard")
    sites = {site: add([part.sites[site] for part in parts]) for site in first.sites}
    return replace(first, sites=sites, prompts=tuple(prompts))


def add(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of everything that the parts have seen."""
    return Statistics(
        amax=np.maximum.reduce([p.amax for p in parts]),
        histogram=np.sum([p.histogram for p in parts], axis=0),
        channel_amax=np.maximum.reduce([p.channel_amax for p in parts]),
        channel_squares=np.sum([p.channel_squares for p in parts], axis=0),
        rows=np.sum([p.rows for p in parts], axis=0),
        channel_histogram=np.add.reduce([p.channel_histogram for p in parts], dtype=np.uint32),
        half_histogram=np.sum([p.half_histogram for p in parts], axis=0),
    )


def _check_counts(origin: Origin, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for a number of steps, buckets or prompts' bytes that cannot be."""
    for name in ("num_inference_steps", "usual_steps", "buckets"):
        if not 1 <= getattr(origin, name) <= MAX_STEPS:
            raise ValueError(f"{name} is {getattr(origin, name)}, which is not between 1 and {MAX_STEPS}")
    for prompt in prompts:
        if min(prompt.size_bytes, prompt.tokens) < 0:
            raise ValueError(f"a prompt has {prompt.size_bytes} bytes and {prompt.tokens} tokens")


def _statistics(site: str, tensors: Mapping[str, Array], buckets: int, path: Path) -> Statistics:
    again = "measure again: ditc calibrate CHECKPOINT -o RANGES"
    found = {field: tensors.get(f"{field}/{site}") for field in Statistics.__slots__}
    widest = found["channel_amax"]
    channels = widest.shape[1] if widest is not None and widest.ndim == 2 else 1
    shapes = {
        "histogram": (buckets, BINS),
        "channel_amax": (buckets, channels),
        "channel_squares": (buckets, channels),
        "channel_histogram": (channels, CHANNEL_BINS),
        "half_histogram": (BINS,),
    }
    fields: dict[str, Any] = {}
    for name, tensor in found.items():
        wanted = shapes.get(name, (buckets,))
        if tensor is None or (name not in OVER_ALL_BUCKETS and tensor.shape[:1] != (buckets,)):
            raise UsageError(f"{path} lacks {name} of {site} for {buckets} buckets", hint=again)
        if tensor.shape != wanted or tensor.dtype.kind not in "fiu" or not tensor.size:
            kind = f"{tensor.shape} of {tensor.dtype}"
            raise UsageError(f"{path}: {name} of {site} is {kind}, not {wanted} of numbers", hint=again)
        if not np.isfinite(tensor).all() or (tensor < 0).any():
            raise UsageError(f"{path}: {name} of {site} is negative, NaN or infinite", hint=again)
        fields[name] = tensor
    statistics = Statistics(**fields)
    if (statistics.half_histogram > statistics.histogram.sum(axis=0)).any():
        raise UsageError(f"{path}: half_histogram of {site} is not a part of its histogram", hint=again)
    return statistics


def _difference(one: Origin, other: Origin) -> str:
    differing = [name for name in Origin.__slots__ if getattr(one, name) != getattr(other, name)]
    if not differing:
        return "their layers differ"
    return ", ".join(
        f"{name} {getattr(one, name)!r:.20} and {getattr(other, name)!r:.20}" for name in differing
    )
