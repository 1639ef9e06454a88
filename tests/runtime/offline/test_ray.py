"""`ditc batch --ray` on a Ray that it starts on this machine. `make test-scale` makes the environment for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.scale
ray = pytest.importorskip("ray", reason="needs the extra: pip install ditc[ray]")


def test_ray_gives_the_same_folder_as_processes(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"cat {i}", "height": 64, "width": 64, "steps": 2} for i in range(10)]
    lines[4]["height"] = 63  # fails by itself
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trees, summaries = [], []
    for name, options in (("local", ()), ("ray", ("--ray", "--workers", "2"))):
        out = tmp_path / name
        command = [
            "batch",
            str(tiny_bundle),
            str(source),
            "-o",
            str(out),
            "--threads",
            "1",
            "--json",
            *options,
        ]
        done = subprocess.run(
            [sys.executable, "-m", "ditc.runtime.cli", *command], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1, done.stderr
        summaries.append(json.loads(done.stdout))
        files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
        trees.append({path.relative_to(out).as_posix(): path.read_bytes() for path in files})
    assert trees[0] == trees[1]
    assert [(each["done"], each["failed"]) for each in summaries] == [(9, 1)] * 2
