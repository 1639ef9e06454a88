"""The held-out pairs: enough of them, chosen by hash, and out of reach of every training batch and phrase."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from demo.concepts import STYLES, Pair, caption, choose_held_out, load_split, vocabulary
from demo.train import packages
from demo.train.autoencoder import Pictures
from demo.train.text import corpus


def test_at_least_a_twentieth_and_sixty_pairs_are_held_out() -> None:
    split = load_split()
    total = len(split.trained) + len(split.held_out)
    assert len(split.held_out) >= max(60, 0.05 * total)


def test_no_pair_is_both_trained_and_held_out() -> None:
    split = load_split()
    assert not set(split.trained) & set(split.held_out)


def test_the_split_file_is_what_the_hash_of_the_vocabulary_chooses() -> None:
    pairs = [Pair(c, s) for c in vocabulary() for s in STYLES]
    assert load_split().held_out == choose_held_out(pairs)
    assert set(load_split().trained) == set(pairs) - set(load_split().held_out)


def test_the_choice_of_a_pair_does_not_depend_on_the_order_of_the_vocabulary() -> None:
    pairs = [Pair(c, s) for c in vocabulary() for s in STYLES]
    assert choose_held_out(pairs[::-1]) == choose_held_out(pairs)


def test_every_held_out_concept_is_trained_in_another_style() -> None:
    split = load_split()
    assert {p.concept for p in split.held_out} <= {p.concept for p in split.trained}


def test_a_held_out_picture_is_never_in_a_training_batch(tmp_path: Path) -> None:
    split = load_split()
    _write_art(tmp_path, split.trained, value=255)
    _write_art(tmp_path, [Pair("quill", "flat")], value=255)  # art that no prompt names
    _write_art(tmp_path, split.held_out, value=0)  # black: any in a batch would show
    pictures = Pictures(tmp_path)
    for step in range(20):
        assert pictures.batch(64, torch.Generator().manual_seed(step)).min() > 0
    assert pictures.held_out().max() == -1


def test_a_held_out_caption_is_never_among_the_phrases_of_the_text_encoder(tmp_path: Path) -> None:
    emoji = [{"label": c, "emoji": c, "tags": [f"{c}, {s} style" for s in STYLES]} for c in vocabulary()]
    _write_package(tmp_path, packages.EMOJIBASE, "package/en/data.json", emoji)
    _write_package(tmp_path, packages.EMOJILIB, "package/dist/emoji-en-US.json", {})
    phrases = set(corpus(tmp_path))
    assert not phrases & {caption(p).lower() for p in load_split().held_out}
    assert phrases >= {caption(p).lower() for p in load_split().trained}


def _write_art(cache: Path, pairs: list[Pair], value: int) -> None:
    """Append opaque grey 8 px pictures of the pairs to the cache's art."""
    images = np.full((len(pairs), 8, 8, 4), 255, np.uint8)
    images[..., :3] = value
    named = [{"concept": p.concept, "style": p.style, "tags": []} for p in pairs]
    if (cache / "art.json").is_file():
        images = np.concatenate([np.load(cache / "art.npy"), images])
        named = json.loads((cache / "art.json").read_text()) + named
    np.save(cache / "art.npy", images)
    (cache / "art.json").write_text(json.dumps(named))


def _write_package(cache: Path, package: packages.Package, file: str, content: object) -> None:
    path = cache / "packages" / f"{package.file}.d" / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
