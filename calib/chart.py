"""The curve of a precision search as SVG, without a plotting library: fidelity by the share of FLOPs in 8 bits."""

from __future__ import annotations

import math

from ditc.calib.search import Result

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 400, 60, 30, 20, 50
EXACT_DB = 80.0  # the top of the chart: equal pictures have an infinite PSNR and are drawn here


def curve_svg(result: Result) -> str:
    """PSNR in dB by share.

    A line joins assignments without scales per token. The chosen assignment is circled, and a PSNR budget is dashed.
    """
    points = [(p.share, min(p.fidelity.psnr_db, EXACT_DB)) for p in result.curve]
    low = math.floor(min(db for _, db in points) / 10) * 10

    def at(share: float, db: float) -> tuple[float, float]:
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        y = TOP + (EXACT_DB - db) / (EXACT_DB - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for db in range(low, int(EXACT_DB) + 1, 10):
        (x0, y), (x1, _) = at(0, db), at(1, db)
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4}" text-anchor="end">{db}</text>')
    for tenth in range(0, 11, 2):
        x, y = at(tenth / 10, low)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{tenth * 10} %</text>')
    limit = dict(part.split("=") for part in result.budget.split(",")).get("psnr")
    if limit is not None:
        (x0, y), (x1, _) = at(0, min(float(limit), EXACT_DB)), at(1, min(float(limit), EXACT_DB))
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" stroke="#c00" stroke-dasharray="5 4"/>')
    static = [point for point, p in zip(points, result.curve, strict=True) if not p.per_token]
    line = " ".join(f"{x},{y}" for x, y in (at(*point) for point in static))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>')
    parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="#06c"/>' for x, y in (at(*point) for point in points)]
    x, y = at(result.chosen.share, min(result.chosen.fidelity.psnr_db, EXACT_DB))
    parts.append(f'<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="#c00" stroke-width="2"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">share of GEMM FLOPs in 8 bits</text>'
    )
    parts.append(
        f'<text x="{LEFT}" y="18">PSNR of the pictures in dB (budget {result.budget}; the choice is circled)</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
