"""The methods of a pipeline for LoRAs. Names and arguments are those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from ditc.runtime.conditioning import Conditioning
from ditc.runtime.errors import SessionError, UsageError
from ditc.runtime.lora.adapters import Adapters
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.shared import Matrices, pipeline_with_loras


class LoraMethods:
    """What `Pipeline` inherits. No request may be drawn while LoRAs change: the changed stages are opened again."""

    conditioning: Conditioning
    uncertified: str
    adapters: Adapters | None  # None for sessions that are not a bundle's
    _closed: bool
    given: tuple[Mapping[str, object], ...] = ()  # LoRAs that `with_loras` has given to the graphs as inputs

    def load_lora_weights(
        self, file: str | Path, adapter_name: str | None = None, *, weight_name: str | None = None
    ) -> str:
        """Add a LoRA to the weights, alone and with the scale 1, and return its name. `set_adapters` changes that.

        Args:
            file: a safetensors file, or its folder; docs/lora.md says what is read.
            adapter_name: under which it is known; None for default_0, default_1 and so on.
            weight_name: the name of the file, if `file` is its folder.

        Raises:
            UsageError: the file is no LoRA or does not fit the bundle, or the name is taken.
            SessionError: a stage cannot be opened with it. The pipeline then has the bundle's own weights.
        """
        adapters = self._changeable()
        name = adapters.load(Path(file, weight_name or ""), adapter_name)
        self._activate(adapters, {name: 1.0})
        return name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Have these LoRAs in the weights, in this order and with these scales, and no others.

        Args:
            adapter_names: names that `load_lora_weights` returned; none for the bundle's own weights.
            adapter_weights: one scale per name, or one for all; None for 1.

        Raises:
            UsageError: a name is not loaded or given twice, a scale is not finite, or their numbers differ.
            SessionError: as `load_lora_weights`.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = 1.0 if adapter_weights is None else adapter_weights
        scales = [given] * len(names) if isinstance(given, int | float) else list(given)
        if len(scales) != len(names) or len(set(names)) != len(names):
            raise UsageError(
                f"set_adapters got the names {names} and the weights {scales}",
                hint="give every name once, and one weight for each name or for all",
            )
        self._activate(self._changeable(), dict(zip(names, scales, strict=True)))

    def load_loras(self, choices: Sequence[LoraChoice]) -> None:
        """Add the LoRAs of these files to the weights, in this order. The weights change once.

        Raises:
            UsageError, SessionError: as `load_lora_weights`.
        """
        if choices:
            adapters = self._changeable()
            names = [adapters.load(choice.file, None) for choice in choices]
            scales = [choice.scale for choice in choices]
            self._activate(adapters, dict(zip(names, scales, strict=True)))

    def with_loras(self, choices: Sequence[LoraChoice], *, matrices: Matrices | None = None) -> Self:
        """A pipeline that draws with these LoRAs, and shares this one's sessions, whose graphs take them as inputs.

        Both can draw at the same time. The new one holds small matrices and no weights, and `close` closes nothing of
        this one, which must stay open and keep its weights as long as the new one draws.

        Args:
            choices: files and scales.
            matrices: bounds the matrices of several such pipelines; None keeps these as long as the new pipeline lives.

        Raises:
            UsageError: a file is no LoRA, or does not fit the bundle; a LoRA cannot be an input of the graphs, such as
                a DoRA or one for a bundle that was built without `--lora-inputs`; or this pipeline has LoRAs itself.
        """
        adapters = self._changeable()
        shared: Self = pipeline_with_loras(cast(Any, self), adapters, choices, matrices or Matrices())
        return shared

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs. The bundle's own weights are used again."""
        adapters = self._changeable()
        self._activate(adapters, {})
        adapters.forget()

    def get_active_adapters(self) -> list[str]:
        """The names of the LoRAs in the weights, or the files' names of those that are inputs of the graphs."""
        own = [] if self.adapters is None else list(self.adapters.active)
        return own + [str(lora["file"]) for lora in self.given]

    def loras_in_weights(self) -> list[dict[str, object]]:
        """The files, hashes and scales of the LoRAs that were added to the bundle's weights since it was loaded."""
        own = [] if self.adapters is None else self.adapters.described()
        return own + [dict(lora) for lora in self.given]

    def _activate(self, adapters: Adapters, scales: dict[str, float]) -> None:
        try:
            adapters.activate(scales)
        finally:
            self.conditioning = adapters.conditioning
            self.uncertified = adapters.uncertified

    def _changeable(self) -> Adapters:
        if self._closed:
            raise SessionError("the pipeline is closed", hint="load the bundle again")
        if self.adapters is None:
            raise UsageError(
                "this pipeline has sessions that are not a bundle's",
                hint="load LoRAs in one of Pipeline.load()",
            )
        return self.adapters
