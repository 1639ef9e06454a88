"""How long does a user wait for a build that has nothing to do? It times `ditc build` as a process.

    python -m benchmarks.noop_build CHECKPOINT --bundle OUT [--precision fp16]

The bundle is built first if it does not exist. `ditc verify`, which reads every byte, is timed for comparison. The
goals are 1 s for the demo model and 5 s for Sana 1.6B.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import spread, times_s, write
from ditc.runtime.bundle.manifest import load_manifest


def ditc(*arguments: str) -> str:
    """Run the command and return what it prints. A command that fails ends the benchmark."""
    command = [str(Path(sys.executable).with_name("ditc")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Build once, then time builds that have nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    build = ("build", arguments.checkpoint, "-o", arguments.bundle, "--precision", arguments.precision)
    ditc(*build)
    verify = ("verify", arguments.bundle)
    result = {
        "bundle_bytes": sum(file.size_bytes for file in load_manifest(Path(arguments.bundle)).all_files()),
        "build_s": spread(times_s(lambda: ditc(*build), warmup=1, repeats=arguments.repeats)),
        "verify_s": spread(times_s(lambda: ditc(*verify), warmup=1, repeats=arguments.repeats)),
    }
    print(result)
    print(write("noop_build", {Path(arguments.bundle).name: result}))


if __name__ == "__main__":
    main()
