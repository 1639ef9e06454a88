"""The data step: the art, the split, and the reference thumbnails that the evaluation compares with."""

from __future__ import annotations

from pathlib import Path

from demo.concepts import STYLES, WHITE, Pair, Split, choose_held_out, save_split, vocabulary
from demo.errors import DemoError
from demo.references import all_pairs, save_references, thumbnail
from demo.train import art


def run(cache: Path) -> None:
    """Render what is missing, then write the split and the thumbnails.

    Raises:
        DemoError: a package is missing or differs, or a concept of the vocabulary has no art in some style.
    """
    art.build(cache)
    rgba, pictures = art.load(cache)
    row = {Pair(p.concept, p.style): i for i, p in enumerate(pictures)}
    pairs = [Pair(c, s) for c in vocabulary() for s in STYLES]
    if missing := [p for p in pairs if p not in row]:
        raise DemoError(
            f"{len(missing)} pairs have no art; the first is {missing[0]}.", "edit demo/vocabulary.txt."
        )
    held_out = choose_held_out(pairs)
    split = Split([p for p in pairs if p not in set(held_out)], held_out)
    save_split(split)
    save_references([thumbnail(art.on_background(rgba[row[p]], WHITE)) for p in all_pairs(split)])
