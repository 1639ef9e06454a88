"""How many replicas there are, what each gets, and when one counts as stuck. Command-line options of `--ray`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from ditc.runtime.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """Choices of the operator.

    Attributes:
        least, most: bounds of the number of replicas.
        cpus: what Ray reserves for each, which is the number of its threads.
        gpus: the GPUs of each; less than 1 lets replicas share one. None takes one where the options ask for a GPU.
        pixel_steps: how much accepted work one replica should have. More work starts another replica.
        idle_seconds: for how long fewer replicas must be enough before one is ended.
        hang_seconds: a replica that has work and makes no progress for so long, or does not answer, is replaced.

    Raises:
        UsageError: a value is out of range.
    """

    least: int = 1
    most: int = 1
    cpus: int = 1
    gpus: float | None = None
    pixel_steps: int = 4 * 1024 * 1024 * 20  # four pictures of 1024x1024 pixels with 20 steps
    idle_seconds: float = 60.0
    hang_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 256:
            raise UsageError(
                f"{self.least} to {self.most} replicas are not possible",
                hint="choose --min-replicas from 1 on, and --max-replicas from there to 256",
            )
        if self.cpus < 1:
            raise UsageError(f"{self.cpus} threads are not possible", hint="choose --threads 1 or more")
        if self.gpus is not None and not (
            0 <= self.gpus <= 16 and (self.gpus <= 1 or self.gpus.is_integer())
        ):
            raise UsageError(
                f"{self.gpus:g} GPUs per replica are not possible",
                hint="choose a fraction from 0 to 1, or a whole number",
            )
        if self.pixel_steps < 1:
            raise UsageError(
                f"{self.pixel_steps} pixel-steps per replica are not possible", hint="choose 1 or more"
            )
        for name, seconds in (("idle", self.idle_seconds), ("hang", self.hang_seconds)):
            if not (math.isfinite(seconds) and seconds >= 1):
                raise UsageError(f"--{name}-seconds is {seconds:g}", hint="choose 1 or more seconds")


def add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options. Their defaults are those of `ReplicaOptions`."""
    defaults = ReplicaOptions()
    parser.add_argument(
        "--ray",
        action="store_true",
        help="Draw in replicas, which are processes of a Ray on this machine or of the cluster that RAY_ADDRESS names; "
        "needs the extra ray (default: in this process).",
    )
    parser.add_argument(
        "--min-replicas",
        type=int,
        metavar="REPLICAS",
        help=f"With --ray: least number of replicas (default: {defaults.least}).",
    )
    parser.add_argument(
        "--max-replicas",
        type=int,
        metavar="REPLICAS",
        help="With --ray: most replicas, which are started when there is more work (default: --min-replicas).",
    )
    parser.add_argument(
        "--gpus-per-replica",
        type=float,
        metavar="GPUS",
        help="With --ray: GPUs of each replica, such as 1 or 0.5 (default: 1 if the options ask for a GPU, else 0).",
    )
    parser.add_argument(
        "--replica-pixel-steps",
        type=int,
        default=defaults.pixel_steps,
        metavar="PIXEL_STEPS",
        help="With --ray: accepted work per replica, in pixel-steps, above which another replica is started "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--idle-seconds",
        type=float,
        default=defaults.idle_seconds,
        metavar="SECONDS",
        help="With --ray: seconds for which fewer replicas must be enough before one is ended (default: %(default)g).",
    )
    parser.add_argument(
        "--hang-seconds",
        type=float,
        default=defaults.hang_seconds,
        metavar="SECONDS",
        help="With --ray: a replica that makes no progress for so many seconds is replaced; longer than the longest "
        "step of a bundle (default: %(default)g).",
    )


def replica_options(arguments: argparse.Namespace, threads: int) -> ReplicaOptions:
    """The choices on the command line.

    Args:
        threads: of each replica.

    Raises:
        UsageError: as `ReplicaOptions`.
    """
    least = 1 if arguments.min_replicas is None else arguments.min_replicas
    return ReplicaOptions(
        least=least,
        most=least if arguments.max_replicas is None else arguments.max_replicas,
        cpus=threads,
        gpus=arguments.gpus_per_replica,
        pixel_steps=arguments.replica_pixel_steps,
        idle_seconds=arguments.idle_seconds,
        hang_seconds=arguments.hang_seconds,
    )
