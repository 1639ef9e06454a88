"""Shared by the tests of parity: the results without any defect, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ditc.parity.results import Result, Verdict
from ditc.runtime.tolerances import Level


@pytest.fixture(scope="session")
def healthy(tiny_checkpoint: Path) -> Callable[[Level, str], Result]:
    """The worst result of a level and stage on a candidate without a defect; it must pass."""
    from planted import TWO_CASES, context_of, torch_candidate

    from ditc.parity.levels import LEVELS

    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint), TWO_CASES)
    known: dict[Level, list[Result]] = {}

    def of(level: Level, stage: str) -> Result:
        if level not in known:
            known[level] = list(LEVELS[level](context))
        results = [r for r in known[level] if r.stage == stage or stage == "pipeline"]
        assert results, f"level {level.value} has no result for {stage}"
        worst = max(results, key=lambda r: r.share_of_bound)
        assert worst.verdict is Verdict.PASS, worst
        return worst

    return of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: it is faster for small tensors, and parallel test processes do not compete for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks with other weights."""
    from tiny_sana import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", seed=1)
