"""A picture does not depend on what is drawn together with it.

On ONNX Runtime's CPU provider in fp32 it is the same bit for bit: every kernel of these networks sums the values of one
sample in an order that does not depend on the others. There are two exceptions.

- The sum over rows in `guide` (export/graph/step.py). ONNX Runtime groups its terms by their places, and with three
  rows, which a sample has with skip-layer guidance, the grouping changes the rounding. Two terms have only one sum.
- A product of two activations that is divided among threads by its columns (ONNX Runtime 1.32). That happens if there
  are fewer products than threads, and each has fewer rows than columns: seen with 8x512 times 512x300 in 8 threads, not
  with the products of attention, of which each has as many rows as there are tokens.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from ditc.runtime.pipeline import Pipeline

from .mixes import Alone, Entry, Finished, Mixer, drawn_alone, ends, variants

# With three rows per sample: each step rounds the guided prediction differently by about 2**-24 times the sum of the
# absolute weights (12.6 at guidance 4 and skip-layer guidance 2.8), and the network passes that on for at most 4 steps.
# 3.5e-7 was measured.
THREE_ROWS_BOUND = 1e-5


def run_mixes(
    pipeline: Pipeline, known: list[Alone], count: int
) -> tuple[Mixer, list[tuple[Entry, Finished]]]:
    mixer, drawn = Mixer(pipeline), []
    for seed in range(count):
        drawn += ends(mixer.mix(random.Random(seed), known))
    scheduler = mixer.scheduler
    assert scheduler.idle and not scheduler._queue.pictures and not scheduler._queue.tasks
    assert (scheduler.admission.requests, scheduler.admission.pixel_steps) == (0, 0)
    # How many pictures a run takes also depends on measured times, so only many mixes are sure to have larger runs.
    assert {1, 2} <= set(mixer.sizes), "no two requests shared a run"
    return mixer, drawn


def latents_of(mixer: Mixer, entry: Entry) -> np.ndarray:
    by_picture = mixer.latents[entry.job.id]  # type: ignore[union-attr]
    return np.concatenate([by_picture[index] for index in sorted(by_picture)])


def check_equal(mixer: Mixer, drawn: list[tuple[Entry, Finished]]) -> None:
    for entry, end in drawn:
        request = entry.alone.request
        assert np.array_equal(latents_of(mixer, entry), entry.alone.latents), request
        for image, expected in zip(end.images, entry.alone.pictures, strict=True):
            assert np.array_equal(np.asarray(image), expected), request


def test_pictures_of_200_random_mixes_are_those_drawn_alone_bit_for_bit(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle, threads=1) as pipeline:
        known = [drawn_alone(pipeline, request) for request in variants(random.Random(0), 24, (32, 64))]
        mixer, drawn = run_mixes(pipeline, known, 200)
    assert len(drawn) > 400 and 4 in mixer.sizes
    check_equal(mixer, drawn)


def test_pictures_of_mixes_are_those_drawn_alone_in_two_threads(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle, threads=2) as pipeline:
        known = [drawn_alone(pipeline, request) for request in variants(random.Random(1), 6, (64,))]
        check_equal(*run_mixes(pipeline, known, 6))


def test_pictures_of_a_trained_model_are_those_drawn_alone(demo_bundle: Path) -> None:
    with Pipeline.load(demo_bundle, threads=1) as pipeline:
        known = [drawn_alone(pipeline, request) for request in variants(random.Random(2), 8, (64,))]
        check_equal(*run_mixes(pipeline, known, 15))


def test_pictures_with_fresh_noise_in_every_step_are_those_drawn_alone(stochastic_bundle: Path) -> None:
    """The noise of all pictures of a request comes from one generator, also where each is stepped by itself."""
    with Pipeline.load(stochastic_bundle, threads=1) as pipeline:
        assert pipeline.drawable.contract.noise
        known = [drawn_alone(pipeline, request) for request in variants(random.Random(3), 12, (32, 64))]
        assert any(alone.request.num_images_per_prompt > 1 for alone in known)
        check_equal(*run_mixes(pipeline, known, 15))


def test_three_rows_per_sample_differ_by_the_rounding_of_their_sum(sd3_bundle: Path) -> None:
    with Pipeline.load(sd3_bundle, threads=1) as pipeline:
        requests = variants(random.Random(4), 12, (64,), skip_layer_guidance_scale=(0.0, 2.8))
        known = [drawn_alone(pipeline, request) for request in requests]
        mixer, drawn = run_mixes(pipeline, known, 20)
    three = [(entry, end) for entry, end in drawn if has_three_rows(entry)]
    assert 0 < len(three) < len(drawn)
    check_equal(mixer, [each for each in drawn if each not in three])
    for entry, end in three:
        ours, theirs = latents_of(mixer, entry), entry.alone.latents
        assert np.linalg.norm(ours - theirs) <= THREE_ROWS_BOUND * np.linalg.norm(theirs)
        for image, expected in zip(end.images, entry.alone.pictures, strict=True):
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def has_three_rows(entry: Entry) -> bool:
    return entry.job is not None and entry.job.plan.skip_layer_guidance is not None
