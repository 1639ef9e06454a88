"""A pipeline of engine sessions, and the pictures that it must draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_pipeline import SETTINGS, Gpu

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request


@pytest.fixture
def gpu(tiny_bundle: Path) -> Iterator[Gpu]:
    gpu = Gpu(tiny_bundle)
    yield gpu
    gpu.pipeline.close()


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> Any:
    """The picture from ONNX Runtime. It must be equal bit for bit: the fake uses the same kernels and one thread."""

    def draw(prompt: str = "red cat", **changes: Any) -> np.ndarray:
        return np.asarray(
            pipeline.draw(Request(prompt=prompt, output_type="np", **{**SETTINGS, **changes})).images
        )

    return draw
