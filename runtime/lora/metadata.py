"""peft's settings of a LoRA file, from which the factor alpha / rank of each layer follows.

diffusers' save_lora_weights writes them as JSON into the file's metadata, under one key, `lora_adapter_metadata`, with
the component before each name: {"transformer.lora_alpha": 16, "transformer.alpha_pattern": {...}, ...}
(loaders/lora_base.py, 0.42.1). peft's save_pretrained writes them into adapter_config.json, without a component.

They are data here. peft takes the names in their patterns for regular expressions; only plain names are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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
ONLY = "only plain LoRA, rsLoRA and DoRA are"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalings:
    """The settings of each component.

    Attributes:
        file: the file's name, for messages.
        settings: by what the names of a component's modules begin with.
        alphas, ranks: for each such beginning, the values that are for some of its modules alone.
    """

    file: str
    settings: Mapping[str, Mapping[str, Any]]
    alphas: Mapping[str, _Pattern]
    ranks: Mapping[str, _Pattern] = field(default_factory=dict)

    def of(self, module: str, rank: int, alpha: float | None) -> float:
        """The factor of a module's B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (peft, `update_layer`).

        Args:
            module: its name in the file.
            alpha: that of the module's own key; None without such a key.

        Raises:
            UsageError: an alpha is not a finite number, or the settings tell another rank.
        """
        start = next((start for start in self.settings if module.startswith(start)), "")
        settings, inner = self.settings.get(start, {}), module.removeprefix(start)
        if start in self.ranks:
            told = self.ranks[start].of(inner, settings.get("r", rank))
            if told != rank:
                raise UsageError(
                    f"{self.file}: the rank of {module} is {told!r:.60}, but its matrices have {rank}",
                    hint="the settings belong to another file",
                )
        if alpha is None:
            found = settings.get("lora_alpha", rank)
            if start in self.alphas:
                found = self.alphas[start].of(inner, found)
            alpha = _number(self.file, f"the alpha of {module}", found)
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


class _Pattern:
    """Values for some modules: peft's alpha_pattern and rank_pattern.

    A name means the module with this whole name, or unless it begins with ^, any whose name ends with it after a dot.
    The first one counts (peft, `get_pattern_key`).
    """

    def __init__(self, file: str, what: str, patterns: object) -> None:
        if not isinstance(patterns, dict):
            raise UsageError(f"{file}: the {what} is {patterns!r:.60}", hint="save it again")
        self._values: list[object] = list(patterns.values())
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        for place, pattern in enumerate(patterns):
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            # A foreign regular expression could take for ever, so only names are read.
            if set(name) & set("*+?()[]{}|\\^$"):
                what = what.partition(" ")[0]
                raise UsageError(
                    f"{file}: the {what} {pattern!r:.80} is a regular expression, which is not read",
                    hint="save the LoRA with pipe.save_lora_weights(), which writes modules' names",
                )
            self._whole.setdefault(name, place)
            if not pattern.startswith("^"):
                self._ends.setdefault(name, place)

    def of(self, module: str, default: object) -> object:
        """The value for a module."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(1, len(parts)))
        places = [self._whole.get(module), *(self._ends.get(end) for end in ends)]
        found = [place for place in places if place is not None]
        return self._values[min(found)] if found else default


def read_scalings(file: str, metadata: Mapping[str, str], modules: Collection[str]) -> Scalings:
    """The settings in a file's metadata; none if it has no such metadata.

    Args:
        file: its name, for messages.
        modules: the names of all modules in it.

    Raises:
        UsageError: they cannot be read, describe something that is not applied, or are for no module of the file.
    """
    flat = _object(f"{file}: its {KEY}", metadata.get(KEY, "{}"))
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.rpartition(".")
        settings.setdefault(f"{component}." if component else "", {})[name] = value
    if settings and not any(module.startswith(tuple(settings)) for module in modules):
        raise UsageError(
            f"{file}: its {KEY} is for {', '.join(settings):.80}, but no name begins so, such as "
            f"{next(iter(modules), '')}",
            hint="save the LoRA with pipe.save_lora_weights()",
        )
    for start, given in settings.items():
        _check(file, f"the LoRA of the {start.rstrip('.')}", given)
    alphas = {
        start: _Pattern(file, f"alpha_pattern of the {start.rstrip('.')}", given.get("alpha_pattern") or {})
        for start, given in settings.items()
    }
    return Scalings(file=file, settings=settings, alphas=alphas)


def read_config(file: str, start: str, content: bytes) -> Scalings:
    """The settings in an adapter_config.json, which are for the modules whose names begin with `start`.

    Raises:
        UsageError: they cannot be read, or describe something that is not applied.
    """
    settings = _object(file, content)
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UsageError(f"{file}: its peft_type is {kind!r:.60}, which is not applied", hint=ONLY)
    _check(file, "the LoRA", settings)
    alphas = _Pattern(file, "alpha_pattern", settings.get("alpha_pattern") or {})
    ranks = _Pattern(file, "rank_pattern", settings.get("rank_pattern") or {})
    return Scalings(file=file, settings={start: settings}, alphas={start: alphas}, ranks={start: ranks})


def _object(what: str, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{what} is not JSON: {e}", hint="save the LoRA again") from e
    return found


def _check(file: str, what: str, settings: Mapping[str, Any]) -> None:
    started = settings.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(CHANGES_BASE):
        raise UsageError(
            f"{file}: {what} began with {started}, which also changed the network's own weights",
            hint="save it as a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    other = next((name for name in NOT_APPLIED if settings.get(name)), None)
    if other is not None:
        raise UsageError(f"{file}: {what} was trained with {other}, which is not applied", hint=ONLY)


def _number(file: str, what: str, value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number that no float holds
        pass
    raise UsageError(
        f"{file}: {what} is {value!r:.60}, which is not a finite number", hint="save the LoRA again"
    )
