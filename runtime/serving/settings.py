"""What the operator of a server chooses. The command line reads the defaults from here, so it imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditc.runtime.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much accepted work there may be at one time.

    Attributes:
        requests: requests that wait or are drawn.
        pixel_steps: their width x height x steps, over all their pictures and frames. 2**33 is 8 pictures of 1024x1024
            pixels with 1,024 steps, or 400 with 20, or 5 videos of 832x480 pixels with 81 frames and 50 steps.

    Raises:
        UsageError: a bound is not positive.
    """

    requests: int = 64
    pixel_steps: int = 2**33

    def __post_init__(self) -> None:
        for name, bound in (("requests", self.requests), ("pixel_steps", self.pixel_steps)):
            if bound < 1:
                raise UsageError(f"the bound of {name} is {bound}", hint="choose 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """How requests share the denoiser.

    Attributes:
        max_batch: the most pictures of one run; 0 takes as many as the bundle allows.
        window: how many seconds a first step waits for company while nothing else runs.
        max_loras: of how many LoRAs that are inputs of a bundle's graphs matrices are in memory. Each has 92 MB in fp32
            with rank 32 of both attentions of a network of 1.6 billion weights.

    Raises:
        UsageError: a value is negative, the window is longer than a minute, or no LoRA is kept.
    """

    max_batch: int = 0
    window: float = 0.0
    max_loras: int = 8

    def __post_init__(self) -> None:
        if self.max_loras < 1:
            raise UsageError(f"{self.max_loras} LoRAs in memory are none", hint="choose 1 or more")
        if self.max_batch < 0:
            raise UsageError(
                f"a batch of at most {self.max_batch} is none",
                hint="choose 1 or more, or 0 for the bundle's own",
            )
        if not 0 <= self.window <= 60:
            raise UsageError(
                f"a batch window of {1000 * self.window:g} ms is not possible", hint="choose 0 to 60,000 ms"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens, how it begins, and how it ends.

    Attributes:
        port: 0 takes one that is free.
        warm_up_seconds: after so many seconds, no larger batch is tried before a bundle is served.
        drain_seconds: how many seconds the server takes to end after a signal.

    Raises:
        UsageError: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    warm_up_seconds: float = 30.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port} does not exist", hint="choose one from 1 to 65535, or 0")
        for name, seconds in (("warm-up", self.warm_up_seconds), ("draining", self.drain_seconds)):
            if not (math.isfinite(seconds) and 0 <= seconds <= 86400):
                raise UsageError(f"{seconds:g} s are not a time for {name}", hint="choose 0 to 86,400 s")
