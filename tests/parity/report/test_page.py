"""Parts of the report that a whole run does not show: bounds that differ by step, and results that were not checked."""

from __future__ import annotations

from html import unescape

from ditc.parity.report.chart import step_chart
from ditc.parity.report.page import to_page
from ditc.parity.report.text import to_text
from ditc.parity.results import Evidence, Report, StepError, judged, not_checked
from ditc.runtime.tolerances import Level, Limit, Metric


def test_one_bound_is_a_labelled_line_and_bounds_that_differ_are_a_curve() -> None:
    assert step_chart([_step(0, 1e-5), _step(1, 1e-5)]).count("bound 1.0e-05") == 1
    chart = step_chart([_step(0, 0.2), _step(1, 0.1), _step(1, 0.3)])
    assert 'polyline class="bound"' in chart
    assert "bound 2.0e-01" not in chart


def test_the_text_says_why_something_was_not_checked_once_for_each_reason() -> None:
    shown = judged(Level.STAGE, "denoiser", "x0", Metric.RELATIVE_L2, 1e-7, Limit(1e-5, ""))
    left = [not_checked(Level.STAGE, "denoiser", f"case {i}", "no 16-bit kernels here") for i in range(3)]
    report = Report(results=[shown, *left], evidence=Evidence(), subject={}, machine={}, tools={}, seconds={})
    assert to_text(report).count("no 16-bit kernels here") == 1
    assert "not checked: stage, denoiser (3)" in to_text(report)


def test_a_broken_bound_is_not_written_as_if_it_held() -> None:
    high = judged(Level.STEP, "denoiser", "step 1", Metric.RELATIVE_L2, 0.3, Limit(1e-5, ""))
    low = judged(Level.PICTURE, "vae_decoder", "a", Metric.PSNR, 20.0, Limit(45.0, ""))
    right = judged(Level.STAGE, "denoiser", "x0", Metric.RELATIVE_L2, 1e-7, Limit(1e-5, ""))
    subject = {"references": ["PyTorch fp32"]}
    report = Report(
        results=[high, low, right], evidence=Evidence(), subject=subject, machine={}, tools={}, seconds={}
    )
    for text in (to_text(report), unescape(to_page(report))):
        assert "3.00e-01 > 1.00e-05" in text
        assert "20 < 45" in text
        assert "1.00e-07 <= 1.00e-05" in text


def test_what_the_ranges_of_an_8_bit_denoiser_rest_on_is_in_both_reports() -> None:
    subject = {"references": [], "calibration": ["denoiser: ranges of 1 prompts", "rest on 1 prompt(s)"]}
    report = Report(results=[], evidence=Evidence(), subject=subject, machine={}, tools={}, seconds={})
    assert "calibration: rest on 1 prompt(s)" in to_text(report)
    assert "rest on 1 prompt(s)" in unescape(to_page(report))


def _step(step: int, bound: float) -> StepError:
    return StepError(case="a", kind="teacher-forced", step=step, timestep=1.0, error=1e-7, bound=bound)
