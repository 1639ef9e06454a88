"""Watch the inputs of a network's layers while it runs, and count their values. Memory does not grow with the run."""

# B buckets of the schedule, C channels

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ditc.export.quant.histogram import (
    BINS,
    CHANNEL_BINS,
    CHANNEL_DROPPED_BITS,
    CHANNEL_FIRST,
    DROPPED_BITS,
    FIRST,
)
from ditc.export.quant.layers import Layer
from ditc.export.quant.ranges import Statistics


class Observer:
    """Statistics of the inputs of some layers.

    Layers that read the same tensor share a site, which is named after the first of them.

    Attributes:
        bucket: the part of the schedule that inputs are counted into.
        half: the half of the prompts, 0 or 1, that the running prompt belongs to.
        sites: the statistics of each site.
        site_of: the site of each layer.
    """

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self.bucket = self.half = 0
        self.sites: dict[str, Statistics] = {}
        self.site_of: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def see(self, layer: str, x: Tensor) -> None:
        """Count one input (..., C) of a layer in the current bucket."""
        if self._last is not None and self._last[0] is x:  # another layer has just counted this tensor
            self.site_of.setdefault(layer, self._last[1])
            return
        self._last = (x, layer)
        self.site_of.setdefault(layer, layer)
        statistics = self.sites.get(layer)
        if statistics is None:
            statistics = self.sites[layer] = _empty(self.buckets, x.shape[-1])
        _count(statistics, self.bucket, self.half, x)

    def forget_tensor(self) -> None:
        """Release the last tensor. Call this between two runs of the network."""
        self._last = None


@contextmanager
def watching(layers: Mapping[str, Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context is open, every run of a layer calls `see` with the layer's name and input (...,C)."""

    def hook(name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        if layer.is_convolution:
            return lambda module, arguments: see(name, arguments[0].movedim(1, -1))
        return lambda module, arguments: see(name, arguments[0])

    handles = [layer.linear.register_forward_pre_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _empty(buckets: int, channels: int) -> Statistics:
    return Statistics(
        amax=np.zeros(buckets, np.float32),
        histogram=np.zeros((buckets, BINS), np.int64),
        channel_amax=np.zeros((buckets, channels), np.float32),
        channel_squares=np.zeros((buckets, channels), np.float64),
        rows=np.zeros(buckets, np.int64),
        channel_histogram=np.zeros((channels, CHANNEL_BINS), np.uint32),
        half_histogram=np.zeros(BINS, np.int64),
    )


def _count(statistics: Statistics, bucket: int, half: int, x: Tensor) -> None:
    """Add one tensor (..., C) to one bucket and half. Counting runs on the tensor's device; counts leave it."""
    magnitudes = x.detach().flatten(0, -2).float().abs()
    channel_amax = magnitudes.amax(dim=0)
    # As in histogram.bin_of, the upper bits of an fp32 number are the index of its bin.
    bits = magnitudes.view(torch.int32)
    bins = ((bits >> DROPPED_BITS) - FIRST).clamp_(0, BINS - 1)
    counts = torch.bincount(bins.flatten(), minlength=BINS).cpu().numpy()
    channels = magnitudes.shape[1]
    bins = ((bits >> CHANNEL_DROPPED_BITS) - CHANNEL_FIRST).clamp_(0, CHANNEL_BINS - 1)
    bins += torch.arange(channels, dtype=torch.int32, device=x.device) * CHANNEL_BINS
    channel_counts = torch.bincount(bins.flatten(), minlength=channels * CHANNEL_BINS)
    squares = magnitudes.square_().sum(dim=0, dtype=torch.float64)
    statistics.histogram[bucket] += counts
    if half == 0:
        statistics.half_histogram[:] += counts
    counted = channel_counts.view(channels, CHANNEL_BINS).cpu().numpy()
    statistics.channel_histogram[:] += counted.astype(np.uint32)
    statistics.channel_squares[bucket] += squares.cpu().numpy()
    statistics.rows[bucket] += magnitudes.shape[0]
    np.maximum(
        statistics.channel_amax[bucket], channel_amax.cpu().numpy(), out=statistics.channel_amax[bucket]
    )
    statistics.amax[bucket] = statistics.channel_amax[bucket].max()
