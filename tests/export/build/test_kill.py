"""After kill -9 at any moment, the next build resumes, and no half-written file is ever read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditc.runtime.bundle.manifest import load_manifest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once")
def test_a_build_killed_at_thirty_random_moments_ends_in_the_same_bundle(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path; from benchmarks.kill_build import kill_and_resume; "
        f"print(kill_and_resume(Path({str(tiny_checkpoint)!r}), Path({str(tmp_path)!r}), kills=30))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'kills': 30" in done.stdout


def test_a_lock_dies_with_its_owner(tiny_bundle: Path, tmp_path: Path) -> None:
    """The lock file stays, but the operating system frees the lock when its process ends."""
    from ditc.export.build.journal import FOLDER, locked
    from ditc.runtime.errors import BuildError

    out = tmp_path / "bundle"
    (out / FOLDER).mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path; from ditc.export.build.journal import locked\n"
        f"with locked(Path({str(out)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(BuildError, match="another build is working"), locked(out):
            pass
    finally:
        owner.kill()
        owner.wait()
    with locked(out):
        assert load_manifest(tiny_bundle)


def test_half_written_files_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    from ditc.export.build.journal import FOLDER, locked

    (tmp_path / FOLDER).mkdir()
    half = tmp_path / "onnx" / ".denoiser.onnx.0123456789abcdef.partial"
    half.mkdir(parents=True)
    (half / "denoiser.onnx").write_bytes(b"half")
    (half / ".denoiser.onnx.data.x1y2").mkdir()  # as onnx_ir makes it
    (half / ".denoiser.onnx.data.x1y2" / "denoiser.onnx.data").write_bytes(b"half")
    (tmp_path / ".manifest.json.0123456789abcdef.partial").write_bytes(b"{")
    with locked(tmp_path):
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]
        assert not half.exists()
