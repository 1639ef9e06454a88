"""A script for test_kernels.py, which runs it as a process: BUNDLE FORM OUT builds an engine of the denoiser."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ditc.export.engine import build as engine
from ditc.export.engine.tensorrt import Compiler
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.spec import DENOISER, Backend


def main(bundle: Path, form: str, out: Path) -> None:
    """Print the number of plugin layers that the parser made."""
    artifact = load_manifest(bundle).stages[DENOISER].artifacts[0]
    kinds: list[str] = []

    class Watched(Compiler):
        def parse(self, path: Path) -> str | None:
            complaint = super().parse(path)
            kinds.extend(self.layer_kinds())
            return complaint

    engine.Compiler = Watched  # type: ignore[misc]
    engine.build_engine(
        bundle / artifact.file.path,
        out,
        spec=artifact.spec,
        backend=Backend.TENSORRT_RTX,
        targets=("sm89",),
        linear_attention="plugin" if form == "plugin" else "decomposed",
    )
    sys.stdout.write(json.dumps({"plugins": sum("PLUGIN" in kind for kind in kinds)}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
