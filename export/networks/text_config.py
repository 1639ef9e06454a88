"""Read the config.json of a transformers text encoder, and refuse one that its network cannot be made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ditc.export.networks.config import LARGEST
from ditc.export.networks.loading import CONTRADICTIONS
from ditc.runtime.errors import CheckpointError

C = TypeVar("C", bound=PreTrainedConfig)

# What every text encoder counts, by transformers' common names.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
FETCH = "fetch the text encoder's config.json again, or use the text encoder that the checkpoint was published with"


def read_text_config(
    cls: type[C], values: Mapping[str, Any], *, sizes: tuple[str, ...] = (), numbers: tuple[str, ...] = ()
) -> C:
    """Make the config from the content of config.json. Settings that are missing have transformers' defaults.

    Args:
        sizes, numbers: settings that transformers allows to be null, a list or negative, and of which the network
            here needs a positive number, or any number.

    Raises:
        CheckpointError: the config is of another model type, names a file of weights of its own, or has a value that
            transformers refuses or that is not a size.
    """
    if values.get("model_type") != cls.model_type:
        raise CheckpointError(
            f"the text encoder's model_type is {values.get('model_type')!r}, not {cls.model_type!r}",
            hint=FETCH,
        )
    if values.get("transformers_weights"):
        raise CheckpointError(
            f"the text encoder's config.json names its weights, {values['transformers_weights']!r}, which is not "
            "supported",
            hint="load the text encoder with transformers and save it again with save_pretrained(...)",
        )
    _check_integers(values)
    try:
        config = cls(**values)
    except (StrictDataclassError, *CONTRADICTIONS) as e:
        raise CheckpointError(
            f"transformers refuses the {cls.model_type} config.json: {e}", hint=FETCH
        ) from e
    checked = {name: getattr(config, name) for name in (*SIZES, *sizes, *numbers)}
    checked |= {name: value for name, value in values.items() if isinstance(value, float)}
    for name, value in checked.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (name in {*SIZES, *sizes} and value < 1):
            raise CheckpointError(
                f"{name} is {value!r} in the {cls.model_type} config.json, which no network can be made from",
                hint=FETCH,
            )
    return config


def _check_integers(values: Mapping[str, Any]) -> None:
    """Refuse numbers that no text encoder has. transformers makes lists and tables of the length that some state."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_integers(value)
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise CheckpointError(
                f"{name} is {value!r:.80} in the text encoder's config.json, but no number there is above {LARGEST}",
                hint=FETCH,
            )


def refuse_setting(config: PreTrainedConfig, name: str, value: object, served: object) -> CheckpointError:
    """The error of a setting that transformers computes and the network here does not."""
    return CheckpointError(
        f"{name} is {value!r} in the {config.model_type} config.json, but only {served!r} is supported",
        hint="no published checkpoint of this kind has another value: use the text encoder that it was published with",
    )
