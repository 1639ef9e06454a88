"""Pipelines that share the sessions of another one, with LoRAs that the graphs take as inputs.

Each holds small matrices and no weights, so several can draw at the same time. `Matrices` bounds what they hold
together: the matrices of LoRAs that have not been used for the longest time are forgotten, and read again when needed.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from ditc.runtime.errors import LoraError, UsageError
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.lora.lora import ScaledLora, described
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.session import Array, Session

if TYPE_CHECKING:
    from ditc.runtime.lora.adapters import Adapters
    from ditc.runtime.pipeline import Pipeline

log = logging.getLogger(__name__)

P = TypeVar("P", bound="Pipeline")

# For each stage, the matrices by the names of its inputs.
StageFeeds = Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class GivenLoras:
    """LoRAs that sessions get as inputs.

    Attributes:
        choices: their files and scales.
        identities: of the LoRAs when they were first read.
        sessions: those of the changed stages, without LoRAs.
    """

    reopener: Reopener
    choices: tuple[LoraChoice, ...]
    identities: tuple[str, ...]
    sessions: Mapping[str, Session]

    def read(self) -> StageFeeds:
        """Read the files again.

        Raises:
            LoraError: one is gone, or has changed.
        """
        before = monotonic()
        try:
            loras = read_choices(self.reopener, self.choices)
        except UsageError as e:
            raise LoraError(
                f"a LoRA cannot be read again: {e}", hint="put the file back, or load without it"
            ) from e
        names = names_of(self.choices)
        if tuple(scaled.identity for scaled in loras) != self.identities:
            raise LoraError(
                f"{names} has changed since it was loaded",
                hint="put the file back, or load it again: a server is started again for that",
            )
        found = {}
        for stage, changes in self.reopener.stages_of(loras).items():
            feeds = self.reopener.feeds(stage, self.sessions[stage], changes)
            assert feeds is not None  # as `given_loras` has checked
            found[stage] = feeds
        log.info("%s was read again in %.2f s", names, monotonic() - before)
        return found


class Matrices:
    """The matrices of the LoRAs that were used last. Threads can share it.

    Args:
        most: of how many pipelines with LoRAs matrices are in memory.

    Raises:
        UsageError: `most` is less than 1.
    """

    def __init__(self, most: int = 1) -> None:
        if most < 1:
            raise UsageError(f"{most} LoRAs in memory are none", hint="choose 1 or more")
        self.most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[GivenLoras, StageFeeds] = (
            OrderedDict()
        )  # the one that was used last is the last

    def of_stage(self, given: GivenLoras, stage: str) -> Mapping[str, Array]:
        """The matrices for one stage, which are read again if they were forgotten.

        Raises:
            LoraError: as `GivenLoras.read`.
        """
        with self._lock:
            if given not in self._kept:
                self._forget(self.most - 1)
                self._kept[given] = given.read()
            self._kept.move_to_end(given)
            return self._kept[given][stage]

    def keep(self, given: GivenLoras, feeds: StageFeeds) -> None:
        """Keep matrices that were just computed."""
        with self._lock:
            self._forget(self.most - 1)
            self._kept[given] = feeds

    @property
    def count(self) -> int:
        """Of how many pipelines with LoRAs matrices are in memory now."""
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """The memory of these matrices."""
        with self._lock:
            kept = [matrices for feeds in self._kept.values() for matrices in feeds.values()]
        return sum(matrix.nbytes for matrices in kept for matrix in matrices.values())

    def _forget(self, left: int) -> None:
        while len(self._kept) > left:
            self._kept.popitem(last=False)


def read_choices(reopener: Reopener, choices: Sequence[LoraChoice]) -> tuple[ScaledLora, ...]:
    """The LoRAs of files, under the names of the checkpoint's tensors.

    Raises:
        UsageError: a file is no LoRA, or does not fit the bundle.
    """
    return tuple(
        ScaledLora(reopener.resolved(read_lora(choice.file)), float(choice.scale)) for choice in choices
    )


def given_loras(
    reopener: Reopener, sessions: Mapping[str, Session], choices: Sequence[LoraChoice]
) -> tuple[GivenLoras, StageFeeds, tuple[ScaledLora, ...]]:
    """LoRAs for these open sessions of a bundle, which take them as inputs; with their matrices for each session.

    Raises:
        UsageError: a file is no LoRA, or does not fit the bundle; or a LoRA cannot be an input there.
    """
    loras = read_choices(reopener, choices)
    why, feeds = reopener.why_no_inputs(loras), dict[str, Mapping[str, Array]]()
    changed = {} if why else reopener.stages_of(loras)
    for stage, changes in ((stage, changed[stage]) for stage in changed if stage in sessions):
        found = reopener.feeds(stage, sessions[stage], changes)
        if found is None:
            why = f"the open session of the {stage} has no inputs for them"
            break
        feeds[stage] = found
    if why:
        raise UsageError(
            f"{names_of(choices)} cannot be an input of the graphs: {why}",
            hint="build the bundle with --lora-inputs, or add the LoRA to the weights: load_lora_weights(FILE)",
        )
    identities = tuple(scaled.identity for scaled in loras)
    given = GivenLoras(
        reopener=reopener,
        choices=tuple(choices),
        identities=identities,
        sessions={stage: sessions[stage] for stage in feeds},
    )
    return given, feeds, loras


def with_matrices(given: GivenLoras, matrices: Matrices) -> dict[str, Session]:
    """The sessions of the changed stages with the LoRAs."""
    return {
        stage: WithLoras(base, partial(matrices.of_stage, given, stage))
        for stage, base in given.sessions.items()
    }


def pipeline_with_loras(
    pipeline: P, adapters: Adapters, choices: Sequence[LoraChoice], matrices: Matrices
) -> P:
    """See `Pipeline.with_loras`."""
    adapters.check_allowed()
    if adapters.active:
        raise UsageError(
            f"the pipeline has LoRAs of its own: {', '.join(adapters.active)}",
            hint="give all LoRAs to with_loras(), after set_adapters([])",
        )
    given, feeds, loras = given_loras(adapters.reopener, pipeline.sessions, choices)
    matrices.keep(given, feeds)
    sessions = with_matrices(given, matrices)
    shared, key = pipeline.with_sessions(sessions), "+".join(given.identities)
    stages = pipeline.conditioning.stages
    shared.conditioning = pipeline.conditioning.with_weights(
        {stage: shared.sessions[stage] for stage in stages},
        ";".join(f"{stage}:{key}" for stage in stages if stage in sessions),
    )
    shared.given = tuple(described(loras))
    shared.uncertified = f"LoRAs are inputs of its graphs: {names_of(choices)}"
    return shared


def names_of(choices: Sequence[LoraChoice]) -> str:
    """The names of the files, for messages."""
    return ", ".join(choice.file.name for choice in choices)
