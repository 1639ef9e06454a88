"""The reference thumbnails and the retrieval figures that are computed from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.concepts import Pair, Split, load_split
from demo.errors import DemoError
from demo.evaluate import quick_pairs, wilson_interval
from demo.references import all_pairs, concept_ranks, load_references, save_references


def test_every_reference_is_nearest_to_its_own_concept() -> None:
    split = load_split()
    references = load_references(split)
    upscaled = references.repeat(8, axis=1).repeat(8, axis=2)
    ranks = concept_ranks(upscaled, [p.concept for p in all_pairs(split)], split)
    assert (ranks == 0).all()


def test_the_picture_of_another_concept_is_not_a_hit() -> None:
    split = load_split()
    pairs = all_pairs(split)
    references = load_references(split).repeat(8, axis=1).repeat(8, axis=2)
    heart = references[pairs.index(Pair("red heart", "flat"))]
    assert concept_ranks(heart[None], ["bicycle"], split)[0] > 5


def test_references_survive_saving(tmp_path: Path) -> None:
    split = Split([Pair("a", "flat"), Pair("b", "flat")], [Pair("c", "3d")])
    thumbnails = list(np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8))
    save_references(thumbnails, tmp_path / "r.png")
    np.testing.assert_array_equal(load_references(split, tmp_path / "r.png"), np.stack(thumbnails))


def test_references_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    save_references([np.zeros((16, 16, 3), np.uint8)] * 31, tmp_path / "r.png")
    with pytest.raises(DemoError, match="shape"):
        load_references(Split([Pair("a", "flat")], []), tmp_path / "r.png")


def test_the_quick_run_has_32_fixed_pairs_of_each_kind() -> None:
    trained, held_out = quick_pairs(load_split())
    assert (len(set(trained)), len(set(held_out))) == (32, 32)
    assert set(held_out) <= set(load_split().held_out)


def test_the_interval_of_a_rate_is_wilsons() -> None:
    low, high = wilson_interval(8, 10)  # 0.490 to 0.943, e.g. Brown, Cai and DasGupta 2001
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)
