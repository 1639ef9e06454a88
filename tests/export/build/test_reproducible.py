"""Builds of one checkpoint are equal byte for byte, whatever process, machine's settings and interruptions they had."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditc.calib.collect import Settings, collect
from ditc.export.build.golden import write_golden
from ditc.export.build.journal import FOLDER
from ditc.export.build.latent_rgb import fit_latent_rgb
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.families import find_adapter
from ditc.export.options import BuildOptions
from ditc.runtime.spec import VAE_ENCODER

# Ends itself with SIGKILL after the given number of stages, as if it had been killed then.
BUILD = """
import json, os, signal, sys
from pathlib import Path
from ditc.export.build.builder import build_bundle
from ditc.export.contract import BuildOptions
from ditc.runtime.spec import Precision

built = 0
def on_event(event):
    global built
    built += event.status == "built"
    if event.status == "built" and built == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

os.umask(int(sys.argv[5], 8))
given = json.loads(sys.argv[3])
options = BuildOptions(
    precision=Precision(given.get("precision", "fp32")),
    recipes=tuple(filter(None, [given.get("recipe")])),
    ranges=(Path(given["ranges"]),) if "ranges" in given else (),
)
build_bundle(sys.argv[1], Path(sys.argv[2]), options, on_event=on_event)
"""
WEIGHTS_ONLY = {"precision": "int8", "recipe": "int8-weight-only"}
CALIBRATED = {"precision": "int8"}


def build(
    checkpoint: Path, out: Path, options: dict[str, str], *, kill_after: int = 0, **settings: str
) -> int:
    """Build in a fresh process, in the folder that holds the result, and return its exit code."""
    umask = settings.pop("umask", "022")
    command = [
        sys.executable,
        "-c",
        BUILD,
        str(checkpoint),
        out.name,
        json.dumps(options),
        str(kill_after),
        umask,
    ]
    out.parent.mkdir(exist_ok=True)
    done = subprocess.run(
        command, cwd=out.parent, env={**os.environ, **settings}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def digests(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file, without the journal, which holds times and costs."""
    return {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.relative_to(bundle).parts[0] != FOLDER
    }


def test_what_torch_computes_for_a_bundle_does_not_depend_on_the_number_of_threads(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint, options = open_checkpoint(tiny_checkpoint), BuildOptions()
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    module = adapter.load(checkpoint, plan, VAE_ENCODER, options)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        golden = write_golden(lambda: module, tmp_path / f"{threads}.safetensors").read_bytes()
        found.append((golden, fit_latent_rgb(module.module, plan.latents).tobytes()))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tiny_checkpoint", {}),
        ("tiny_checkpoint", CALIBRATED),
        ("sd3_checkpoint", {}),
        ("sd3_checkpoint", WEIGHTS_ONLY),
        ("mmdit_checkpoint", {}),
    ],
)
def test_builds_under_other_settings_and_after_a_kill_are_equal(
    family: str, options: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(family)
    if options == CALIBRATED:
        collect(checkpoint, ["a red cat"], tmp_path / "ranges.safetensors", Settings(num_inference_steps=2))
        options = {**options, "ranges": str(tmp_path / "ranges.safetensors")}
    ours, theirs = tmp_path / "ours" / "bundle", tmp_path / "theirs \u00fc" / "another name"
    first = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "TZ": "UTC", "LC_ALL": "C"}
    assert build(checkpoint, ours, options, **first) == 0
    settings = {"LC_ALL": "C.UTF-8", "TZ": "Asia/Kolkata", "OMP_NUM_THREADS": "2", "umask": "077"}
    assert build(checkpoint, theirs, options, kill_after=2, PYTHONHASHSEED="2", **settings) == -signal.SIGKILL
    assert build(checkpoint, theirs, options, PYTHONHASHSEED="3", **settings) == 0
    assert digests(theirs) == digests(ours)
    assert "manifest.json" in digests(ours)
