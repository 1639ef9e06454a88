"""A loaded pipeline and references in diffusers, shared by the tests of the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import Reference

from ditc.runtime.pipeline import Pipeline

DEMO_CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def video(video_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(video_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Reference:
    return Reference(tiny_checkpoint)


@pytest.fixture(scope="session")
def demo_reference(demo_bundle: Path) -> Reference:
    return Reference(DEMO_CHECKPOINT)
