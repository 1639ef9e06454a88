"""The reference pictures of the evaluation: a 16 px thumbnail of every pair, all in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.concepts import DEMO_DIR, Pair, Split
from demo.errors import DemoError

REFERENCES_FILE = DEMO_DIR / "references.png"
SIDE = 16  # coarse enough that a soft picture is not punished, fine enough to tell a wink from a grin
_COLUMNS = 30


def all_pairs(split: Split) -> list[Pair]:
    """All pairs, in the order of their thumbnails."""
    return sorted(split.trained + split.held_out)


def thumbnail(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) averaged down to (16, 16, 3)."""
    return np.asarray(Image.fromarray(rgb).resize((SIDE, SIDE), Image.Resampling.BOX))


def save_references(thumbnails: list[NDArray[np.uint8]], path: Path = REFERENCES_FILE) -> None:
    """Write the thumbnails, row by row, as one picture."""
    rows = -(-len(thumbnails) // _COLUMNS)
    sheet = np.full((rows * _COLUMNS, SIDE, SIDE, 3), 255, np.uint8)
    sheet[: len(thumbnails)] = np.stack(thumbnails)
    cells = sheet.reshape(rows, _COLUMNS, SIDE, SIDE, 3)
    grid = cells.swapaxes(1, 2).reshape(rows * SIDE, _COLUMNS * SIDE, 3)
    Image.fromarray(grid).save(path, optimize=True)


def load_references(split: Split, path: Path = REFERENCES_FILE) -> NDArray[np.uint8]:
    """The thumbnails (P, 16, 16, 3) in the order of ``all_pairs``.

    Raises:
        DemoError: the file is missing, or was made for another vocabulary.
    """
    count = len(split.trained) + len(split.held_out)
    if not path.is_file():
        raise DemoError(f"{path} is missing.", "run: python -m demo.train data")
    grid = np.asarray(Image.open(path).convert("RGB"))
    rows = -(-count // _COLUMNS)
    if grid.shape != (rows * SIDE, _COLUMNS * SIDE, 3):
        raise DemoError(
            f"{path} has shape {grid.shape}, not that of {count} pairs.", "run: python -m demo.train data"
        )
    cells = grid.reshape(rows, SIDE, _COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    return cells[:count]


def concept_ranks(drawn: NDArray[np.uint8], asked: list[str], split: Split) -> NDArray[np.int64]:
    """For each picture (N, H, W, 3), count the concepts that are nearer to it than the asked concept.

    Distance is the Euclidean distance of the thumbnails' RGB values. A concept's distance is that of its nearest style.
    Rank 0 is a top-1 hit, a rank under 5 is a top-5 hit.
    """
    pairs = all_pairs(split)
    concepts = sorted({p.concept for p in pairs})
    number = {c: i for i, c in enumerate(concepts)}
    owner = np.array([number[p.concept] for p in pairs])
    references = load_references(split).reshape(len(pairs), -1).astype(np.float32)
    mine = np.stack([thumbnail(rgb) for rgb in drawn]).reshape(len(drawn), -1).astype(np.float32)
    squared = (mine**2).sum(1)[:, None] + (references**2).sum(1)[None] - 2 * mine @ references.T
    nearest = np.full((len(drawn), len(concepts)), np.inf)
    for column, concept in enumerate(owner):
        nearest[:, concept] = np.minimum(nearest[:, concept], squared[:, column])
    wanted = nearest[np.arange(len(drawn)), [number[a] for a in asked]]
    return np.asarray((nearest < wanted[:, None]).sum(1), np.int64)
