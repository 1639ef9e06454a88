"""A Report as one self-contained HTML page: it loads no script, font or picture from elsewhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from ditc.parity.report.chart import step_chart
from ditc.parity.report.style import CSS
from ditc.parity.report.text import number, shown_of, sign
from ditc.parity.results import ModuleError, PicturePair, Report, Result, Verdict, verdict_of
from ditc.runtime.atomic import write_atomic
from ditc.runtime.session import Array
from ditc.runtime.tolerances import TABLE, Form, Level, Metric

FP16_MAX = 65504.0
SHOWN_MODULES = 24
CHIPS = {
    Verdict.PASS: ("pass", "pass"),
    Verdict.FAIL: ("fail", "fail"),
    Verdict.NOT_CHECKED: ("not", "not checked"),
}
ABOUT = {
    Level.GRAPH: "Weights, scheduler numbers, token ids and fp32 islands are read from the files and compared.",
    Level.OP: "The custom op runs alone and is compared with its definition in fp64.",
    Level.MODULE: "Modules are compared by name: ditc's networks with upstream's, and the graphs with ditc's networks.",
    Level.STAGE: "Each stage runs alone, at several shapes and batches and on real inputs.",
    Level.STEP: "Every step starts from the reference's latents, so that errors do not compound.",
    Level.TRAJECTORY: "The whole loop runs freely from the same noise.",
    Level.PICTURE: "The pictures that a user sees are compared.",
}


def write_page(path: Path, report: Report) -> Path:
    """Write the page as a whole.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_atomic(path, to_page(report), hint="choose another --html")


def to_page(report: Report) -> str:
    """The whole page, as HTML."""
    parts = [
        _hero(report),
        _levels(report),
        _stories(report),
        _pictures(report.evidence.pictures),
        _steps(report),
        _modules(report.evidence.modules),
        _ranges(report.evidence.modules),
        _unchecked(report),
        _tolerances(),
        _provenance(report),
    ]
    title = f"ditc parity: {report.verdict.value}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{CSS}</style><main>{''.join(parts)}</main></html>\n"
    )


def _hero(report: Report) -> str:
    subject, css = report.subject, CHIPS[report.verdict][0]
    counts = {v: sum(r.verdict is v for r in report.results) for v in Verdict}
    broken = "1 bound is broken" if counts[Verdict.FAIL] == 1 else f"{counts[Verdict.FAIL]} bounds are broken"
    words = {
        Verdict.PASS: "Every bound holds",
        Verdict.FAIL: broken,
        Verdict.NOT_CHECKED: "Nothing could be checked",
    }
    candidate = str(subject.get("candidate", "")).partition(":")[0]
    text = (
        f"A bundle of {escape(str(subject.get('checkpoint', '')))} ({escape(candidate)}) is compared with "
        f"{escape(' and '.join(subject.get('references', [])))}."
    )
    return (
        f'<div class="hero"><div><h1>Parity report</h1><p class="soft">{text}<br>Of {len(report.results)} '
        f"comparisons, {counts[Verdict.PASS]} passed, {counts[Verdict.FAIL]} failed and {counts[Verdict.NOT_CHECKED]} "
        f"could not be checked. The run took "
        f'{sum(report.seconds.values()):.0f} s.</p></div><div class="verdict {css}">{words[report.verdict]}</div></div>'
    )


def _levels(report: Report) -> str:
    rows = []
    for level in Level:
        results = report.of_level(level)
        if not results:
            continue
        verdict = verdict_of(results)
        worst = shown_of(results)
        rows.append(
            f"<tr><td><b>{level.value}</b><br><span class='soft small'>{ABOUT[level]}</span></td>"
            f"<td>{_chip(verdict)}</td><td class='num'>{sum(r.verdict is Verdict.PASS for r in results)}/{len(results)}"
            f"</td><td class='num'>{_measured(worst)}</td><td class='small'>{escape(worst.stage)}: {escape(worst.what)}"
            f"</td></tr>"
        )
    head = "<tr><th>level<th>verdict<th class='num'>passed<th class='num'>closest to its bound<th>where</tr>"
    return f"<section><h2>Levels</h2><div class='wide'><table>{head}{''.join(rows)}</table></div></section>"


def _stories(report: Report) -> str:
    failed = [r for level in Level for r in report.of_level(level) if r.verdict is Verdict.FAIL]
    if not failed:
        return ""
    stories = []
    for result in failed[:12]:
        lines = [
            f"<b>{result.level.value}</b>, {escape(result.stage)}: {escape(result.what)} ({_measured(result)})"
        ]
        lines += [escape(result.detail)] if result.detail else []
        if result.culprit is not None:
            lines.append(f"The error begins in <b>{escape(str(result.culprit))}</b>")
        worst = (result.culprit.worst if result.culprit else None) or result.worst
        lines += [f"Worst element: <code>{escape(str(worst))}</code>"] if worst else []
        lines += [f"Likely cause: <b>{escape(cause)}</b>" for cause in result.causes]
        stories.append(f"<div class='story'>{'<br>'.join(lines)}</div>")
    more = f"<p class='soft'>{len(failed) - 12} more comparisons failed.</p>" if len(failed) > 12 else ""
    return f"<section><h2>Where it went wrong</h2>{''.join(stories)}{more}</section>"


def _pictures(pairs: Sequence[PicturePair]) -> str:
    if not pairs:
        return ""
    blocks = []
    for pair in pairs:
        difference = np.abs(pair.candidate.astype(np.float64) - pair.reference)
        factor = _amplification(float(difference.max()))
        blocks.append(
            f"<p style='margin:10px 0 0'><b>{escape(pair.case)}</b> <span class='soft num'>PSNR "
            f"{number(pair.psnr, Metric.PSNR)} dB, SSIM {pair.ssim:.6f}</span></p><div class='pictures'>"
            f"{_figure(pair.reference, 'reference')}{_figure(pair.candidate, 'this bundle')}"
            f"{_figure(difference * factor, _difference_caption(float(difference.max()), factor))}</div>"
        )
    return f"<section><h2>Pictures</h2>{''.join(blocks)}</section>"


def _difference_caption(largest: float, factor: float) -> str:
    if largest == 0:
        return "difference: the pictures are equal"
    return f"difference, amplified {factor:,.0f} times; the largest is {largest:.1e}, where white is 1"


def _amplification(largest: float) -> float:
    """The power of ten that brings the largest difference to between a tenth of white and white."""
    return 1.0 if largest == 0 else 10.0 ** max(0, math.floor(-math.log10(largest)))


def _figure(picture: Array, caption: str) -> str:
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{escape(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _steps(report: Report) -> str:
    if not report.evidence.steps:
        return ""
    return (
        "<section><h2>Error by step</h2><p class='soft'>The chart shows the relative L2 error of the latents after "
        "each step. In a teacher-forced run, every step starts from the reference's latents; in a free-running one, "
        "it starts from the bundle's own. Dashed lines are bounds.</p>"
        f"{step_chart(report.evidence.steps)}</section>"
    )


def _modules(modules: Sequence[ModuleError]) -> str:
    if not modules:
        return ""
    ranked = sorted(modules, key=lambda m: -m.error if m.error == m.error else -math.inf)
    rows = [_module_row(module) for module in ranked[:SHOWN_MODULES]]
    head = "<tr><th>module<th>stage<th class='num'>relative L2<th class='num'>bound<th></tr>"
    more = (
        f"<p class='soft small'>These are the {SHOWN_MODULES} worst of {len(ranked)} modules.</p>"
        if len(ranked) > SHOWN_MODULES
        else ""
    )
    references = " or ".join(dict.fromkeys(module.against for module in modules))
    about = (
        f"The bundle's graph is compared with {references}, on the real inputs of one picture. Modules have PyTorch's "
        "names. The bar is logarithmic and is full at the bound."
    )
    table = f"<div class='wide'><table>{head}{''.join(rows)}</table></div>{more}"
    return f"<section><h2>Error by module, worst first</h2><p class='soft'>{about}</p>{table}</section>"


def _module_row(module: ModuleError) -> str:
    share = 1.0 if module.error != module.error else _log_share(module.error, 1e-9, module.bound)
    return (
        f"<tr><td><code>{escape(module.module)}</code></td><td class='small soft'>{escape(module.stage)}</td>"
        f"<td class='num'>{module.error:.2e}</td><td class='num soft'>{module.bound:.2e}</td>"
        f"<td>{_bar(share, hot=not module.error <= module.bound)}</td></tr>"
    )


def _ranges(modules: Sequence[ModuleError]) -> str:
    if not modules:
        return ""
    ranked = sorted(modules, key=lambda m: -m.amax)[:12]
    rows = [
        f"<tr><td><code>{escape(m.module)}</code></td><td class='small soft'>{escape(m.stage)}</td>"
        f"<td class='num'>{m.amax:.4g}</td><td class='num'>{m.amax / FP16_MAX:.2%}</td>"
        f"<td>{_bar(_log_share(m.amax, 1e-2, FP16_MAX), hot=m.amax > FP16_MAX / 4)}</td></tr>"
        for m in ranked
    ]
    head = "<tr><th>module<th>stage<th class='num'>largest magnitude<th class='num'>share of fp16's 65504<th></tr>"
    about = "These are the largest magnitudes in the reference. The logarithmic bar ends at the largest fp16 number."
    table = f"<div class='wide'><table>{head}{''.join(rows)}</table></div>"
    return f"<section><h2>Range of activations</h2><p class='soft'>{about}</p>{table}</section>"


def _unchecked(report: Report) -> str:
    results = [r for r in report.results if r.verdict is Verdict.NOT_CHECKED]
    if not results:
        return ""
    items = "".join(
        f"<tr><td>{r.level.value}</td><td>{escape(r.stage)}: {escape(r.what)}</td>"
        f"<td class='soft'>{escape(r.detail)}</td></tr>"
        for r in results
    )
    return f"<section><h2>Not checked here</h2><div class='wide'><table>{items}</table></div></section>"


def _tolerances() -> str:
    rows = []
    for reason, group in groupby(TABLE, key=lambda row: (row.metric, row.number, row.form, row.reason)):
        members = list(group)
        metric, value, form, why = reason
        levels = ", ".join(dict.fromkeys(row.level.value for row in members))
        precisions = ", ".join(dict.fromkeys(p.value for row in members for p in row.precisions))
        bound = f"{value:g}" if form is Form.ABSOLUTE else f"{value:g} {form.value}"
        rows.append(
            f"<tr><td>{levels}</td><td class='small'>{precisions}</td><td class='num'>{metric.value} {bound}</td>"
            f"<td class='soft small'>{escape(why)}</td></tr>"
        )
    head = "<tr><th>level<th>precision<th class='num'>bound<th>why</tr>"
    table = f"<div class='wide'><table>{head}{''.join(rows)}</table></div>"
    return f"<section><details><summary>Tolerances and their reasons</summary>{table}</details></section>"


def _provenance(report: Report) -> str:
    facts = {**report.subject, **report.machine, **report.tools}
    items = "".join(
        f"<dt>{escape(str(k))}</dt><dd><code>{escape(_plain(v))}</code></dd>" for k, v in facts.items() if v
    )
    return f"<section><h2>What was compared, and on which machine</h2><dl>{items}</dl></section>"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _measured(result: Result) -> str:
    if result.value is None and result.bound is None:
        return "-"
    bound = (
        f" {escape(sign(result))} {number(result.bound, result.metric)}" if result.bound is not None else ""
    )
    return f"{result.metric.value} {number(result.value, result.metric)}{bound}"


def _chip(verdict: Verdict) -> str:
    css, words = CHIPS[verdict]
    return f"<span class='chip {css}'>{words}</span>"


def _bar(share: float, *, hot: bool) -> str:
    return f"<div class='bar'><i{' class=hot' if hot else ''} style='width:{max(0.0, min(1.0, share)):.1%}'></i></div>"


def _log_share(value: float, low: float, high: float) -> float:
    if value <= low:
        return 0.0
    return (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
