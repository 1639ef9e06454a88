"""The LoRAs of a pipeline: which are loaded, which are active, and its sessions with their changes in the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path

from ditc.runtime.conditioning import Conditioning
from ditc.runtime.errors import UsageError
from ditc.runtime.lora.choice import MAX_LORAS, check_scale
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.lora.lora import Change, Lora, ScaledLora, described
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.session import Session


class Adapters:
    """The LoRAs that are loaded, by name, and those that are active, with their scales.

    Args:
        reopener: opens the bundle's stages.
        sessions: the pipeline's sessions, in which those of changed stages are replaced.
        conditioning: the pipeline's, without LoRAs.
        uncertified: why parity has not certified the bundle's own weights here; "" if it has.
    """

    def __init__(
        self,
        reopener: Reopener,
        sessions: MutableMapping[str, Session],
        conditioning: Conditioning,
        *,
        uncertified: str = "",
    ) -> None:
        self.reopener, self._sessions, self._plain = reopener, sessions, conditioning
        self._uncertified = uncertified
        self._loaded: dict[str, Lora] = {}
        self._changed: dict[str, str] = {}  # for each changed stage, which LoRAs are in its weights
        self._opened: set[str] = set()  # stages whose session has other weights than the bundle's
        self.active: dict[str, float] = {}
        self.conditioning = conditioning

    def load(self, file: Path, name: str | None) -> str:
        """Read a LoRA, and keep it under a name, by default `default_0` and so on. Weights do not change yet.

        Raises:
            UsageError: the file is no LoRA, or does not fit; the name is taken; or there are too many.
        """
        if name is None:
            free = (f"default_{index}" for index in range(MAX_LORAS + 1))
            name = next(text for text in free if text not in self._loaded)
        if name in self._loaded:
            raise UsageError(
                f"there is a LoRA {name!r} already",
                hint="give another adapter_name, or unload_lora_weights() first",
            )
        if len(self._loaded) >= MAX_LORAS:
            raise UsageError(f"{MAX_LORAS} LoRAs are loaded", hint="unload_lora_weights() removes them")
        self.check_allowed()
        lora = self.reopener.resolved(read_lora(file))
        self.reopener.stages_of([ScaledLora(lora)])
        self._loaded[name] = lora
        return name

    def check_allowed(self) -> None:
        """Raise UsageError if the pipeline was opened for certified pictures alone."""
        if self.reopener.options.require_certificate:
            raise UsageError(
                "a certificate is required, and none is about weights with a LoRA in them",
                hint="build the bundle with the LoRA, and run ditc parity on it",
            )

    def forget(self) -> None:
        """Forget all LoRAs; none is active."""
        self._loaded.clear()

    @property
    def uncertified(self) -> str:
        """Why parity has not certified the weights in use on this machine; "" if it has."""
        return (
            f"LoRAs were added to its weights: {', '.join(self.active)}" if self.active else self._uncertified
        )

    def described(self) -> list[dict[str, object]]:
        """The active LoRAs, in their order."""
        return described(ScaledLora(self._loaded[name], scale) for name, scale in self.active.items())

    def activate(self, scales: Mapping[str, float]) -> None:
        """Put the changes of these LoRAs into the weights, with their scales and in this order, and of no others.

        The old session of a stage is closed before the new one is opened, so that its weights are in memory once.

        Raises:
            UsageError: a name is not loaded, a scale is not finite, or the weights of a stage cannot be changed.
            SessionError: a stage cannot be opened. The bundle's own weights are then opened again.
        """
        loras = self._scaled(scales)
        wanted = self.reopener.stages_of(loras)
        component = self.reopener.component
        keys = {
            stage: "+".join(s.identity for s in loras if component(stage) in s.lora.components)
            for stage in wanted
        }
        stages = [stage for stage in {*keys, *self._changed} if keys.get(stage) != self._changed.get(stage)]
        try:
            self._replace(stages, wanted)
        except BaseException:
            self._replace({*stages, *self._changed}, {})  # also those that would have stayed as they are
            self._changed, self.active = {}, {}
            self._condition()
            raise
        self._changed, self.active = keys, dict(scales)
        self._condition()

    def _replace(self, stages: Iterable[str], changes: Mapping[str, Mapping[str, Sequence[Change]]]) -> None:
        for stage in stages:
            wanted, session = changes.get(stage, {}), self._sessions[stage]
            base = session.base if isinstance(session, WithLoras) else session
            feeds = None if stage in self._opened else self.reopener.feeds(stage, base, wanted)
            if feeds is not None:
                self._sessions[stage] = WithLoras(base, partial(dict, feeds)) if feeds else base
                continue
            self._opened.add(stage)  # also if it cannot be opened
            base.close()
            self._sessions[stage] = self.reopener.open(stage, wanted)
            if not wanted:
                self._opened.discard(stage)

    def _condition(self) -> None:
        """Let the conditioning use the stages' sessions. Its rows of other weights stay in the cache."""
        stages = self._plain.stages
        key = ";".join(f"{stage}:{self._changed[stage]}" for stage in stages if stage in self._changed)
        self.conditioning = self._plain.with_weights({s: self._sessions[s] for s in stages}, key)

    def _scaled(self, scales: Mapping[str, float]) -> tuple[ScaledLora, ...]:
        for name, scale in scales.items():
            if name not in self._loaded:
                raise UsageError(
                    f"there is no LoRA {name!r}, only {', '.join(self._loaded) or 'none'}",
                    hint="load it first: pipe.load_lora_weights(FILE, adapter_name=NAME)",
                )
            check_scale(scale, name)
        return tuple(ScaledLora(self._loaded[name], float(scale)) for name, scale in scales.items())
