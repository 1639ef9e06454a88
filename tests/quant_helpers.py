"""Ranges of a stage from its example inputs, for tests of the steps after calibration."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ditc.calib.observe import Observer, watching
from ditc.export.contract import StageModule
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.ranges import Origin, Prompt, Ranges, Statistics
from ditc.runtime.session import Array

ORIGIN = Origin(
    identity="0" * 64,
    network="transformer",
    dtype="fp32",
    num_inference_steps=4,
    guidance_scale=3.0,
    seed=0,
    buckets=2,
    usual_steps=4,
)


def prompt(text: str) -> Prompt:
    """A prompt as calibration records it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Prompt(text=digest, ids=digest, size_bytes=len(text), tokens=max(len(text) // 4, 1))


def feeds_of(stage: StageModule, seed: int) -> dict[str, Array]:
    """Example inputs of the first set of example sizes."""
    return example_feeds(stage.spec, example_sizes(stage.spec), seed=seed)


def ranges_of(stage: StageModule, runs: int = 4) -> Ranges:
    """The ranges that an observer counts over a few seeded runs of the stage."""
    observer, session = Observer(ORIGIN.buckets), TorchSession(stage.module, stage.spec)
    with watching(quantizable_layers(stage), observer.see):
        for seed in range(runs):
            observer.bucket = seed * ORIGIN.buckets // runs
            session.run(feeds_of(stage, seed))
            observer.forget_tensor()
    return Ranges(origin=ORIGIN, sites=observer.sites, site_of=observer.site_of, prompts=(prompt("a"),))


def signal_to_noise_db(value: Array, reference: Array) -> float:
    """The ratio of the reference's power to the difference's, in dB."""
    noise = ((value.astype(np.float64) - reference) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(noise, 1e-300)))


def statistics(*buckets: np.ndarray) -> Statistics:
    """Statistics with one (N,C) tensor per bucket, as an observer counts them."""
    observer = Observer(len(buckets))
    for observer.bucket, values in enumerate(buckets):
        observer.see("x", torch.from_numpy(values))
    return observer.sites["x"]
