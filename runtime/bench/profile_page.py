"""Profiles as one HTML page that needs nothing else: for every stage and candidate, a flame graph of its modules."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from ditc.runtime.bench.choices import Case

TEMPLATE = Path(__file__).with_name("profile_page.html")


def page(report: dict[str, Any]) -> str:
    """The page of a benchmark's report that has profiles."""
    profiles = report["profiles"]
    machine = (
        f"{report['machine']['processor']}, {report['threads']} threads, {' '.join(report['cpu_features'])}"
    )
    title = f"{report['bundle']}, {Case(**profiles[0]['case'])}"
    stages = dict.fromkeys(name for profile in profiles for name in profile["stages"])
    data = [
        {
            "stage": stage,
            "candidates": [
                {"name": profile["name"], **profile["stages"][stage]}
                for profile in profiles
                if stage in profile["stages"]
            ],
        }
        for stage in stages
    ]
    filled = TEMPLATE.read_text(encoding="utf-8")
    for mark, text in (
        ("{{title}}", escape(title)),
        ("{{machine}}", escape(machine)),
        ("{{date}}", escape(report["date"])),
        ("{{data}}", _inert(data)),
    ):
        filled = filled.replace(mark, text)
    return filled


def _inert(data: object) -> str:
    """JSON inside of a script element: no text in it can end the element or begin a comment."""
    return json.dumps(data).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
