"""What the demo model learns to draw: concepts, styles, backgrounds, captions, and which pairs are held out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent
VOCABULARY_FILE = DEMO_DIR / "vocabulary.txt"
SPLIT_FILE = DEMO_DIR / "split.json"
CHECKPOINT_DIR = DEMO_DIR / "checkpoint"
SPRINT_DIR = DEMO_DIR / "sprint"
LORA_FILE = DEMO_DIR / "lora" / "sepia.safetensors"

STYLES = ("classic", "flat", "3d")
BACKGROUNDS = {  # soft enough that every picture stands out from it
    "red": (242, 128, 128),
    "yellow": (255, 232, 128),
    "green": (150, 216, 150),
    "blue": (140, 184, 242),
    "purple": (200, 160, 232),
    "grey": (184, 184, 184),
}
WHITE = (255, 255, 255)

_HELD_OUT_SALT = "ditc-demo-1"
_HELD_OUT_SHARE = 1 / 7  # of 480 pairs; a rate over fewer than 60 held-out pairs would be too uncertain


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """One concept in one style. A pair is either trained on or held out."""

    concept: str
    style: str


def vocabulary() -> list[str]:
    """The concepts, in the order of the vocabulary file."""
    return VOCABULARY_FILE.read_text(encoding="utf-8").split("\n")[:-1]


def caption(pair: Pair, background: str | None = None) -> str:
    """The plain caption of a pair, for example ``red heart, flat style, on a blue background``."""
    text = f"{pair.concept}, {pair.style} style"
    return text if background is None else f"{text}, on a {background} background"


def paraphrases(pair: Pair) -> list[str]:
    """Other captions of the pair's picture on a white background."""
    article = "an" if pair.concept[0] in "aeiou" else "a"
    return [f"{article} {pair.concept} in {pair.style} style", pair.concept]


def order_by_hash(pairs: list[Pair]) -> list[Pair]:
    """Sort pairs by a hash of their names, so that adding or removing pairs does not reorder the others."""

    def digest(pair: Pair) -> str:
        return hashlib.sha256(f"{_HELD_OUT_SALT}/{pair.concept}/{pair.style}".encode()).hexdigest()

    return sorted(pairs, key=digest)


def choose_held_out(pairs: list[Pair]) -> list[Pair]:
    """Choose a seventh of the pairs by hash, at most one style per concept, so that its other styles are trained."""
    chosen: dict[str, Pair] = {}
    for pair in order_by_hash(pairs):
        if len(chosen) == round(len(pairs) * _HELD_OUT_SHARE):
            break
        chosen.setdefault(pair.concept, pair)
    return sorted(chosen.values())


@dataclass(frozen=True, slots=True)
class Split:
    """The pairs that training sees, and those that it never sees."""

    trained: list[Pair]
    held_out: list[Pair]


def load_split(path: Path = SPLIT_FILE) -> Split:
    """Read the split that was fixed before training."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Split([Pair(*p) for p in data["trained"]], [Pair(*p) for p in data["held_out"]])


def save_split(split: Split, path: Path = SPLIT_FILE) -> None:
    """Write the split, one pair per line."""
    blocks = []
    for name in ("trained", "held_out"):
        lines = ",\n".join(json.dumps([p.concept, p.style]) for p in getattr(split, name))
        blocks.append(f'"{name}": [\n{lines}\n]')
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
