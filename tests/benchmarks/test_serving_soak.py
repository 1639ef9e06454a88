"""A server under clients that go away, wrong requests and planted faults: nothing is lost, nothing grows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx2", reason="the clients need httpx2, which openai brings: pip install ditc[dev]")

from benchmarks.serving_soak import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")
FULL_SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))


def test_a_short_soak_loses_no_request(tiny_bundle: Path) -> None:
    assert soak(tiny_bundle, seconds=4, disconnects=20)["problems"] == []


@pytest.mark.slow
def test_half_an_hour_of_random_load_loses_no_request_and_memory_stays(demo_bundle: Path) -> None:
    assert soak(demo_bundle, seconds=FULL_SECONDS, disconnects=1000)["problems"] == []
