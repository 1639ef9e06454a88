"""The chart of the error by step, as inline SVG: logarithmic, one line per case and kind, with dashed bounds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ditc.parity.results import StepError

WIDTH, HEIGHT = 1000, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40
COLORS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)")
FLOOR = 1e-9


def step_chart(steps: Sequence[StepError]) -> str:
    """The chart and its legend, as HTML. `steps` must not be empty."""
    lines: dict[tuple[str, str], list[StepError]] = defaultdict(list)
    for step in steps:
        lines[step.kind, step.case].append(step)
    kinds = list(dict.fromkeys(kind for kind, _ in lines))
    count = max(step.step for step in steps) + 1
    bounds = {kind: limits for kind in kinds if (limits := _bounds(steps, kind))}
    low, high = _range(steps, [bound for limits in bounds.values() for bound in limits.values()])

    def x(step: int) -> float:
        return LEFT + (step + 0.5) / count * (WIDTH - LEFT - RIGHT)

    def y(error: float) -> float:
        share = (math.log10(max(error, FLOOR)) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [*_grid(low, high, y), *_ticks(count, x)]
    for level in sorted({next(iter(one.values())) for one in bounds.values() if _is_one(one)}):
        parts.append(
            f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        )
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{_beside(y(level)):.1f}" text-anchor="end">bound {level:.1e}</text>'
        )
    for kind, limits in bounds.items():
        if not _is_one(limits):
            points = " ".join(f"{x(step):.1f},{y(bound):.1f}" for step, bound in limits.items())
            parts.append(
                f'<polyline class="bound" points="{points}" fill="none"><title>bound, {escape(kind)}</title>'
            )
            parts.append("</polyline>")
    for (kind, case), found in lines.items():
        color = COLORS[kinds.index(kind) % len(COLORS)]
        points = " ".join(f"{x(s.step):.1f},{y(s.error):.1f}" for s in found if s.error == s.error)
        title = f"<title>{escape(f'{kind}: {case}')}</title>"
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round">{title}'
            "</polyline>"
        )
        parts += [
            f'<circle cx="{x(s.step):.1f}" cy="{y(s.error):.1f}" r="3" fill="{color}"><title>'
            f"{escape(f'{case}, step {s.step + 1}: {s.error:.2e}')}</title></circle>"
            for s in found
            if s.error == s.error
        ]
        parts += [
            f'<text x="{x(s.step):.1f}" y="{TOP + 12}" text-anchor="middle" fill="var(--bad)">NaN</text>'
            for s in found
            if s.error != s.error
        ]
    legend = "".join(
        f'<span><b style="background:{COLORS[i % len(COLORS)]}"></b>{escape(kind)}</span>'
        for i, kind in enumerate(kinds)
    )
    chart = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="error by step">{"".join(parts)}</svg>'
    )
    return f'{chart}<div class="legend">{legend}</div>'


def _bounds(steps: Sequence[StepError], kind: str) -> dict[int, float]:
    """The tightest bound of all cases at every step. In fp32 it is the same for all, else every case has its own."""
    found: dict[int, float] = {}
    for step in steps:
        if step.kind == kind and step.bound is not None:
            found[step.step] = min(step.bound, found.get(step.step, step.bound))
    return dict(sorted(found.items()))


def _is_one(bounds: Mapping[int, float]) -> bool:
    return len(set(bounds.values())) == 1


def _beside(line: float) -> float:
    """The y of a label for a line: above the line, or below it if there is no room above."""
    return line - 6 if line - 18 > TOP else line + 15


def _range(steps: Sequence[StepError], bounds: Sequence[float]) -> tuple[int, int]:
    """The whole decades that contain every value and bound."""
    values = [max(s.error, FLOOR) for s in steps if s.error == s.error] + list(bounds) or [FLOOR]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _grid(low: int, high: int, y: Callable[[float], float]) -> list[str]:
    stride = max(1, (high - low) // 6)
    parts = []
    for decade in range(low, high + 1, stride):
        at = y(10.0**decade)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{at + 4:.1f}" text-anchor="end">1e{decade}</text>')
    return parts


def _ticks(count: int, x: Callable[[int], float]) -> list[str]:
    stride = max(1, count // 10)
    shown = [s for s in range(count) if s % stride == 0 or s == count - 1]
    labels = [f'<text x="{x(s):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{s + 1}</text>' for s in shown]
    return [*labels, f'<text x="{LEFT - 10}" y="{HEIGHT - 18}" text-anchor="end">step</text>']
