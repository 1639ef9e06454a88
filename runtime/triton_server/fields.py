"""What a client of the pipeline's model sends and gets: a tensor per argument of a request, and one picture back.

Every request is one picture, so each tensor has the shape (1, 1). Names and meaning are those of `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ditc.runtime.errors import UsageError
from ditc.runtime.offline.lines import FIELDS
from ditc.runtime.request import INTEGERS, NUMBERS, Request
from ditc.runtime.session import Array
from ditc.runtime.triton_server.config import Value, Word

TEXT, INTEGER, NUMBER, FLAG = "TYPE_STRING", "TYPE_INT64", "TYPE_FP64", "TYPE_BOOL"
IMAGE, SEED = "image", "seed"


def _types() -> dict[str, str]:
    types = {}
    for name in FIELDS:
        if name in INTEGERS:
            types[name] = INTEGER
        elif name in NUMBERS:
            types[name] = NUMBER
        elif "prompt" in name:
            types[name] = TEXT
        elif name in ("use_resolution_binning", "allow_uniform"):
            types[name] = FLAG
    del types["num_images_per_prompt"]
    return types


# The arguments of a request that are one value.
INPUTS = _types()


def tensors() -> dict[str, Value]:
    """The inputs and outputs of the pipeline's model, for its configuration."""
    return {
        "input": [
            {
                "name": name,
                "data_type": Word(kind),
                "dims": [1],
                **({} if name == "prompt" else {"optional": Word("true")}),
            }
            for name, kind in INPUTS.items()
        ],
        "output": [
            {"name": IMAGE, "data_type": Word("TYPE_UINT8"), "dims": [-1, -1, 3]},
            {"name": SEED, "data_type": Word(INTEGER), "dims": [1]},
        ],
    }


def read_request(given: Mapping[str, Array]) -> Request:
    """The request that a client's tensors ask for.

    Raises:
        UsageError: a tensor has more than one value, or text that is not UTF-8.
    """
    asked: dict[str, Any] = {}
    for name, array in given.items():
        if array.size != 1:
            raise UsageError(
                f"{name} has {array.size} values",
                hint="send one value per tensor, and one request per picture",
            )
        value = array.reshape(-1)[0]
        if INPUTS[name] == TEXT:
            try:
                asked[name] = value.decode("utf-8") if isinstance(value, bytes) else str(value)
            except UnicodeDecodeError as e:
                raise UsageError(f"{name} is not UTF-8", hint="encode the text as UTF-8") from e
        else:
            asked[name] = value.item() if isinstance(value, np.generic) else value
    return Request(**asked)
