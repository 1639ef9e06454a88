"""A Report as text (one line per level) and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ditc.parity.results import Report, Result, Verdict, verdict_of
from ditc.runtime.bundle.certificate import Line
from ditc.runtime.printable import one_line
from ditc.runtime.tolerances import Level, Metric

MARKS = {Verdict.PASS: "pass", Verdict.FAIL: "FAIL", Verdict.NOT_CHECKED: "not checked"}
SHOWN_CULPRITS = 3
# The metric that stands for a level with several metrics: the best known one.
MAIN = {Level.PICTURE: Metric.PSNR}
# The PSNR of equal pictures in a certificate, as JSON has no infinity. Pictures that differ in the last bit of an fp32
# value have about 150 dB.
EQUAL_DB = 200.0


def to_text(report: Report) -> str:
    """One line per level, what was not checked, what 8-bit ranges rest on, the first failures, and the verdict."""
    lines = [_level_line(level, report.of_level(level)) for level in Level if report.of_level(level)]
    lines += [f"  {line}" for line in _unchecked_lines(report)]
    lines += [f"  calibration: {line}" for line in report.subject.get("calibration", ())]
    failures = [r for level in Level for r in report.of_level(level) if r.verdict is Verdict.FAIL]
    for result in failures[:SHOWN_CULPRITS]:
        lines += ["", *_story(result)]
    if len(failures) > SHOWN_CULPRITS:
        lines += [
            "",
            f"{len(failures) - SHOWN_CULPRITS} more comparisons failed; --json and --html show all",
        ]
    counts = {v: sum(r.verdict is v for r in report.results) for v in Verdict}
    lines += [
        "",
        f"{MARKS[report.verdict].upper()}: {counts[Verdict.PASS]} comparisons passed, "
        f"{counts[Verdict.FAIL]} failed, {counts[Verdict.NOT_CHECKED]} not checked",
    ]
    return "".join(one_line(line) + "\n" for line in lines)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data. Infinite and NaN numbers become null, because JSON has neither."""
    return {
        "pass": report.passed,
        "verdict": report.verdict.value,
        "levels": [_result(result) for level in Level for result in report.of_level(level)],
        "subject": report.subject,
        "machine": report.machine,
        "tools": report.tools,
        "seconds": {name: round(value, 2) for name, value in report.seconds.items()},
    }


def certificate_lines(report: Report) -> tuple[Line, ...]:
    """The worst comparison of every level, for certificate.json."""
    lines = []
    for level in Level:
        results = report.of_level(level)
        if results:
            shown = shown_of(results)
            passed = None if shown.verdict is Verdict.NOT_CHECKED else shown.verdict is Verdict.PASS
            lines.append(
                Line(
                    name=level.value,
                    metric=shown.metric.value,
                    value=_finite(_written(shown)),
                    bound=shown.bound,
                    passed=passed,
                    detail=f"{shown.stage}: {shown.what}{_left_out(results)}",
                )
            )
    return tuple(lines)


def _written(result: Result) -> float | None:
    """A value as certificates have it."""
    return EQUAL_DB if result.metric is Metric.PSNR and result.value == math.inf else result.value


def _left_out(results: Sequence[Result]) -> str:
    """How many of a level's comparisons were not checked, which a level that passes as a whole would hide."""
    count = sum(result.verdict is Verdict.NOT_CHECKED for result in results)
    return f"; {count} of {len(results)} comparisons not checked" if count else ""


def number(value: float | None, metric: Metric) -> str:
    """A value of a metric, for a reader."""
    if value is None:
        return "-"
    if metric is Metric.COUNT:
        return f"{value:.0f}"
    if metric in (Metric.PSNR, Metric.SSIM):
        return f"{value:.4g}" if math.isfinite(value) else "equal" if value > 0 else "NaN"
    return f"{value:.2e}"


def sign(result: Result) -> str:
    """The comparison sign between a result's value and its bound."""
    if result.verdict is Verdict.FAIL:
        return "<" if result.metric.at_least else ">"
    return ">=" if result.metric.at_least else "<="


def _level_line(level: Level, results: list[Result]) -> str:
    """The level, its verdict, how many comparisons passed, and the one that stands for the level."""
    verdict, shown = verdict_of(results), shown_of(results)
    bound = f"{sign(shown)} {number(shown.bound, shown.metric)}" if shown.bound is not None else ""
    counted = f"{sum(r.verdict is Verdict.PASS for r in results)}/{len(results)}"
    return (
        f"{level.value:<11}{MARKS[verdict]:<12}{counted:>7}  {shown.metric.value} {number(shown.value, shown.metric)} "
        f"{bound}  {shown.stage}: {shown.what}"
    )


def shown_of(results: list[Result]) -> Result:
    """The result that stands for a level. `results` are those of the level, worst first.

    It is the one closest to its bound among those with the level's verdict, of the level's main metric if there is one.
    """
    verdict = verdict_of(results)
    deciding = [r for r in results if r.verdict is verdict]
    main = MAIN.get(deciding[0].level, deciding[0].metric) if verdict is Verdict.PASS else deciding[0].metric
    return next((r for r in deciding if r.metric is main), deciding[0])


def _unchecked_lines(report: Report) -> list[str]:
    """What was not checked and why: one line for all comparisons with the same reason."""
    counts: dict[tuple[str, str], int] = {}
    for level in Level:
        for result in report.of_level(level):
            if result.verdict is Verdict.NOT_CHECKED:
                key = (
                    f"{level.value}, {result.metric.value if result.metric is Metric.LPIPS else result.stage}",
                    result.detail,
                )
                counts[key] = counts.get(key, 0) + 1
    return [f"not checked: {what} ({count}): {why}" for (what, why), count in counts.items()]


def _story(result: Result) -> list[str]:
    lines = [f"{result.level.value}: {result.stage}, {result.what}"]
    if result.detail:
        lines.append(f"  {result.detail}")
    if result.culprit is not None:
        lines.append(f"  begins in {result.culprit}")
    worst = (result.culprit.worst if result.culprit else None) or result.worst
    if worst is not None:
        lines.append(f"  worst element: {worst}")
    lines += [f"  cause: {cause}" for cause in result.causes]
    return lines


def _result(result: Result) -> dict[str, Any]:
    culprit = result.culprit
    return {
        "level": result.level.value,
        "stage": result.stage,
        "what": result.what,
        "against": result.against,
        "metric": result.metric.value,
        "value": _finite(result.value),
        "bound": result.bound,
        "pass": None if result.verdict is Verdict.NOT_CHECKED else result.verdict is Verdict.PASS,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "detail": result.detail,
        "where": None
        if culprit is None
        else {
            "stage": culprit.stage,
            "module": culprit.module,
            "between": culprit.between,
            "error": _finite(culprit.error),
            "error_before": _finite(culprit.before),
        },
        "worst": None
        if result.worst is None
        else {
            "tensor": result.worst.tensor,
            "index": result.worst.index,
            "candidate": _finite(result.worst.candidate),
            "reference": _finite(result.worst.reference),
        },
        "causes": result.causes,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
