"""Equal modules give equal files: without paths of the machine that builds, and without torch's running numbers."""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.bundle.manifest import load_manifest


def test_graphs_hold_no_trace_of_the_machine_that_built_them(tiny_bundle: Path) -> None:
    for stage in load_manifest(tiny_bundle).stages.values():
        content = (tiny_bundle / stage.artifacts[0].file.path).read_bytes()
        assert b"name_scopes" in content, "modules are named"
        for trace in (b"eval_with_key", b"stack_trace", str(Path(__file__).parents[3]).encode()):
            assert trace not in content
