"""The files that hold a tokenizer's vocabulary.

From a folder without them, transformers 5 makes up a tokenizer of a few special tokens, for which all texts are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ditc.runtime.errors import CheckpointError

TOKENIZER_JSON = "tokenizer.json"
# transformers 5.24 also reads this name, for classes that ask for another one.
SENTENCEPIECE = "tokenizer.model"
SENTENCEPIECE_FILES = (SENTENCEPIECE, "spiece.model")
# What transformers needs to read them.
SENTENCEPIECE_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def check_vocabulary_files(directory: Path, names: Iterable[str]) -> None:
    """Refuse a tokenizer's folder that holds no vocabulary, or only one that this machine cannot read.

    Args:
        names: the file names that the tokenizer's class knows: tokenizer.json, and those that together take its place.
    """
    others = sorted(set(names) - {TOKENIZER_JSON})
    choices = [[TOKENIZER_JSON], *([others] if others else [])]
    if all(name.endswith(".model") for name in others) and [SENTENCEPIECE] not in choices:
        choices.append([SENTENCEPIECE])
    found = next((c for c in choices if all((directory / name).is_file() for name in c)), None)
    if found is None:
        raise CheckpointError(
            f"the component {directory.name!r} has no vocabulary: {directory} was searched for "
            + ", or ".join(" with ".join(choice) for choice in choices),
            hint="the checkpoint is incomplete: fetch the folder again, with all of its files",
        )
    if found[0] in SENTENCEPIECE_FILES:
        missing = [package for module, package in SENTENCEPIECE_PACKAGES.items() if not _installed(module)]
        if missing:
            raise CheckpointError(
                f"the component {directory.name!r} has its vocabulary only in {directory / found[0]}, which cannot be "
                f"read without {' and '.join(missing)}",
                hint=f"pip install {' '.join(missing)}",
            )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around the module is missing
        return False
