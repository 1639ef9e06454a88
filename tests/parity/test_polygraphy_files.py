"""What `ditc parity --save-polygraphy` writes, run by Polygraphy itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from polygraphy.comparator import RunResults

from ditc.parity.context import Context
from ditc.parity.polygraphy_files import SCRIPT, save_polygraphy
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.spec import DENOISER, DType, StageSpec, TensorSpec


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("polygraphy") / "files"
    less = ["--level", "graph", "--seeds", "0", "--steps", "2", "--threads", "1", "--no-diffusers"]
    command = ["parity", str(tiny_bundle), "--against", str(tiny_checkpoint), *less]
    assert main([*command, "--save-polygraphy", str(out)]) == 0
    return out


def compare(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["sh", str(folder / SCRIPT)]
    return subprocess.run(script, capture_output=True, text=True, env=environment, check=False)


def test_polygraphy_passes_every_stage_by_the_bounds_of_ditc(folder: Path, tiny_bundle: Path) -> None:
    done = compare(folder)
    assert done.returncode == 0, done.stdout[-2000:]
    for stage in load_manifest(tiny_bundle).stages:
        if stage != "vae_encoder":
            assert f"{stage}-pytorch.json" in done.stdout
    assert done.stdout.count("(min required: 100 dB) | PASSED") >= 10


def test_polygraphy_fails_where_a_result_differs(folder: Path, tmp_path: Path) -> None:
    script = (folder / SCRIPT).read_text().splitlines()
    (denoiser,) = (line for line in script if f"{DENOISER}-pytorch.json" in line)
    (tmp_path / SCRIPT).write_text("\n".join([*script[:4], denoiser, script[-1]]))
    (tmp_path / f"{DENOISER}-inputs.json").write_bytes((folder / f"{DENOISER}-inputs.json").read_bytes())
    results = RunResults.load(str(folder / f"{DENOISER}-pytorch.json"))
    (_, iterations) = next(iter(results.items()))
    iterations[0]["x0"] = iterations[0]["x0"] * 1.0001  # a relative error of 1e-4: 80 dB
    results.save(str(tmp_path / f"{DENOISER}-pytorch.json"))
    done = compare(tmp_path)
    assert done.returncode == 1
    (snr,) = re.findall(r"SNR: ([\d.]+) dB.* \(min required: 100 dB\) \| FAILED", done.stdout)
    # The two libraries themselves may be 1e-5 apart, a tenth of what was changed, which is 0.9 dB.
    assert float(snr) == pytest.approx(80, abs=1)


def test_a_bf16_stage_is_left_out_with_a_comment(tmp_path: Path) -> None:
    tensor = TensorSpec("x", DType.BFLOAT16, (1,))
    session = SimpleNamespace(spec=StageSpec("net", inputs=(tensor,), outputs=(tensor,), profile={}))
    context: Any = SimpleNamespace(candidate=SimpleNamespace(sessions={"net": session}))
    save_polygraphy(tmp_path, cast(Context, context))
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT]
    assert "# net is left out: Polygraphy's files have no bf16" in (tmp_path / SCRIPT).read_text()


def test_a_folder_that_cannot_be_written_is_refused_first(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "folder")
    command = ["parity", str(tiny_bundle), "--against", str(tiny_checkpoint), "--save-polygraphy", place]
    assert main(command) == 2
    assert "choose another --save-polygraphy" in capsys.readouterr().err
