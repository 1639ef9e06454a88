"""What parity writes into a certificate: settings that decide, and no more than was compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from planted import context_of, torch_candidate

from ditc.parity.candidate import Candidate
from ditc.parity.certify import settings_of
from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.report.text import EQUAL_DB, certificate_lines
from ditc.parity.results import Evidence, Report, Verdict, judged, not_checked
from ditc.parity.run import run_parity
from ditc.runtime.spec import DENOISER, Precision
from ditc.runtime.tolerances import Level, Limit, Metric


@pytest.mark.parametrize(
    ("precision", "budget", "pytorch", "loosened"),
    [
        (Precision.INT8, None, 0.02, False),
        (Precision.INT8, 0.01, 0.02, False),
        (Precision.INT8, 0.5, 0.02, True),
        (Precision.INT8, 0.01, None, True),
        (Precision.FP16, 0.5, 0.02, False),
    ],
    ids=["no budget", "stricter", "looser", "without a plan", "no effect in 16 bits"],
)
def test_a_budget_that_allows_more_than_the_table_is_noted(
    precision: Precision, budget: float | None, pytorch: float | None, loosened: bool
) -> None:
    candidate = Candidate(pipeline=None, precisions={DENOISER: precision})  # type: ignore[arg-type]
    context = Context(reference_or_none=None, candidate=candidate, settings=None, eight_bit_budget=budget)  # type: ignore[arg-type]
    context.bound(Level.STEP, Metric.RELATIVE_L2, DENOISER, pytorch=pytorch)
    assert context.loosened is loosened


def test_a_level_that_compares_nothing_is_not_checked(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEVELS, Level.STAGE, lambda context: iter(()))
    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint))
    report = run_parity(context, [Level.STAGE])
    assert report.verdict is Verdict.NOT_CHECKED
    assert [line.passed for line in certificate_lines(report)] == [None]
    assert settings_of(context).upstream == ""


def test_lines_hold_equal_pictures_and_say_how_much_was_left_out() -> None:
    equal = judged(Level.PICTURE, "vae_decoder", "a", Metric.PSNR, math.inf, Limit(45.0, ""))
    left = not_checked(Level.STEP, DENOISER, "case 1", "no bound")
    done = judged(Level.STEP, DENOISER, "case 0", Metric.RELATIVE_L2, 1e-7, Limit(1e-5, ""))
    report = Report(
        results=[equal, left, done], evidence=Evidence(), subject={}, machine={}, tools={}, seconds={}
    )
    step, picture = certificate_lines(report)
    assert (picture.value, picture.passed) == (EQUAL_DB, True)
    assert "1 of 2 comparisons not checked" in step.detail
