"""Parts of the report that a whole run does not show: bounds that differ by step, and results that were not checked."""

from __future__ import annotations

from ditc.parity.report.chart import step_chart
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


def _step(step: int, bound: float) -> StepError:
    return StepError(case="a", kind="teacher-forced", step=step, timestep=1.0, error=1e-7, bound=bound)
