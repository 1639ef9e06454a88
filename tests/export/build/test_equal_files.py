"""Equal modules give equal files: without paths of the machine that builds, and without torch's running numbers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from ditc.runtime.bundle.manifest import load_manifest

EXPORT = """
import sys
from pathlib import Path
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_onnx
from ditc.export.options import BuildOptions
from ditc.runtime.spec import VAE_ENCODER
checkpoint, options = open_checkpoint(sys.argv[1]), BuildOptions()
adapter = find_adapter(checkpoint)
plan = adapter.plan(checkpoint, options)
to_onnx(adapter.load(checkpoint, plan, VAE_ENCODER, options), Path(sys.argv[2]), check=False)
"""


def test_graphs_hold_no_trace_of_the_machine_that_built_them(tiny_bundle: Path) -> None:
    for stage in load_manifest(tiny_bundle).stages.values():
        content = (tiny_bundle / stage.artifacts[0].file.path).read_bytes()
        assert b"name_scopes" in content, "modules are named"
        for trace in (
            b"eval_with_key",
            b"stack_trace",
            b"range_constraints",
            str(Path(__file__).parents[3]).encode(),
        ):
            assert trace not in content


def test_processes_with_different_hash_seeds_export_equal_files(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The vae_encoder has the most constraints between its dimensions, which torch keeps in a set."""
    digests = set()
    for seed in ("1", "2", "3"):
        path = tmp_path / seed / "vae_encoder.onnx"
        path.parent.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", EXPORT, str(tiny_checkpoint), str(path)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
