"""The metadata of a LoRA file: peft's settings, from which the factor alpha / rank of each layer follows.

diffusers' save_lora_weights writes them as JSON under one key, `lora_adapter_metadata`, with the component before each
name: {"transformer.lora_alpha": 16, "transformer.alpha_pattern": {...}, ...} (loaders/lora_base.py, 0.42.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.runtime.errors import UsageError

KEY = "lora_adapter_metadata"
# Ways to begin a training that also change the network's own weights, which the file does not hold (peft, LoraConfig).
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Settings of peft that make another product of the matrices, or change more than weights (LoraConfig, 0.21.2).
NOT_APPLIED = (
    *("fan_in_fan_out", "use_bdlora", "use_qalora", "velora_config", "monteclora_config", "kasa_config"),
    *("arrow_config", "alora_invocation_tokens", "layer_replication", "trainable_token_indices"),
)


@dataclass(frozen=True, slots=True)
class Scalings:
    """The settings of each component, by its name.

    Attributes:
        file: the file's name, for messages.
    """

    file: str
    settings: Mapping[str, Mapping[str, Any]]

    def of(self, module: str, rank: int, alpha: float | None) -> float:
        """The factor of a module's B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (peft, `update_layer`).

        Args:
            module: with the component before it.
            alpha: that of the module's own key; None without such a key.

        Raises:
            UsageError: an alpha is not a finite number.
        """
        component, _, inner = module.partition(".")
        settings = self.settings.get(component, {})
        if alpha is None:
            patterns = settings.get("alpha_pattern") or {}
            matching = next((key for key in patterns if _matches(key, inner)), None)
            found = settings.get("lora_alpha", rank) if matching is None else patterns[matching]
            alpha = _number(self.file, f"the alpha of {module}", found)
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def read_scalings(path: Path, metadata: Mapping[str, str]) -> Scalings:
    """The settings in a file's metadata; none if it has no such metadata.

    Raises:
        UsageError: they cannot be read, or describe something that is not applied.
    """
    try:
        flat = json.loads(metadata.get(KEY, "{}"))
        if not isinstance(flat, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path.name}: its {KEY} is not JSON: {e}", hint="save the LoRA again") from e
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.rpartition(".")
        settings.setdefault(component, {})[name] = value
    for component, given in settings.items():
        _check(path.name, component, given)
    return Scalings(path.name, settings)


def _check(file: str, component: str, settings: Mapping[str, Any]) -> None:
    started = settings.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(CHANGES_BASE):
        raise UsageError(
            f"{file}: the LoRA of the {component} began with {started}, which also changed the network's own weights",
            hint="save it as a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    other = next((name for name in NOT_APPLIED if settings.get(name)), None)
    if other is not None:
        raise UsageError(
            f"{file}: the LoRA of the {component} was trained with {other}, which is not applied",
            hint="only plain LoRA, rsLoRA and DoRA are",
        )
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UsageError(
            f"{file}: the alpha_pattern of the {component} is {patterns!r:.60}", hint="save it again"
        )
    for pattern in patterns:
        # peft reads a pattern as a regular expression. A foreign one could take for ever, so only names are read.
        if set(_plain(pattern)) & set("*+?()[]{}|\\^$"):
            raise UsageError(
                f"{file}: the alpha_pattern {pattern!r:.80} is a regular expression, which is not read",
                hint="save the LoRA with pipe.save_lora_weights(), which writes modules' names",
            )


def _plain(pattern: str) -> str:
    """A pattern that is a module's name, without the marks that it begins and ends there."""
    return pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern means the module: its whole name, or the end of it (peft, `get_pattern_key`)."""
    name = _plain(pattern)
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))


def _number(file: str, what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(
            f"{file}: {what} is {value!r:.60}, which is not a finite number", hint="save the LoRA again"
        )
    return float(value)
