"""Does a build survive being killed? It gets SIGKILL at random moments, and the bundle must always be whole.

    python -m benchmarks.kill_build CHECKPOINT --kills 100

After every kill, the output must hold either no manifest or one whose files all have their recorded hashes. A build
that gets through must give the graphs of an undisturbed build, bit for bit. This runs on POSIX only: children are
forked, so that the imports are done once.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ditc.export.build.builder import build_bundle
from ditc.export.build.journal import Journal
from ditc.export.contract import BuildOptions
from ditc.runtime.atomic import SUFFIX
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import MANIFEST, load_manifest


def kill_and_resume(checkpoint: Path, folder: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill builds at random moments and check the bundle after each.

    A moment is drawn uniformly from the seconds that an undisturbed build takes. Whenever a build gets through, the
    next one starts from nothing, so that early and late moments are hit alike.

    Raises:
        AssertionError: a file is half-written, or the result differs from that of an undisturbed build.
    """
    rng = random.Random(seed)
    reference = build_bundle(checkpoint, folder / "undisturbed", BuildOptions()).manifest
    started = time.monotonic()
    _, status = os.waitpid(_fork_build(checkpoint, folder / "timed"), 0)
    assert status == 0, "an undisturbed build failed"
    whole_s = (
        time.monotonic() - started
    )  # timed in a child, because the first build of a process takes twice as long
    out = folder / "killed"
    killed = finished = 0
    kept: list[int] = []
    while killed < kills:
        child = _fork_build(checkpoint, out)
        status = _end(child, rng.uniform(0, whole_s))
        if os.WIFSIGNALED(status):
            killed += 1
            kept.append(len(Journal(out).records()))
            if (out / MANIFEST).exists():
                check_files(out, load_manifest(out).all_files())
        else:
            assert os.WEXITSTATUS(status) == 0, f"a build failed after {killed} kills"
            finished += 1
            _check_same(out, reference)
            shutil.rmtree(out)
    report = build_bundle(checkpoint, out, BuildOptions())
    _check_same(out, reference)
    leftovers = [path.name for path in out.rglob(f"*{SUFFIX}")]
    assert not leftovers, leftovers
    return {
        "kills": killed,
        "builds_that_got_through": finished + 1,
        "undisturbed_build_s": whole_s,
        "artifacts_kept_at_each_kill": kept,
        "reused_by_the_last_build": sum(event.status == "reused" for event in report.events),
    }


def _end(child: int, seconds: float) -> int:
    """The child's exit status. The child is killed if it has not ended by itself within `seconds`."""
    latest = time.monotonic() + seconds
    while time.monotonic() < latest:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _check_same(bundle: Path, reference: Any) -> None:
    """Check that the bundle's files are whole and that its graphs are those of the undisturbed build.

    The rest of the manifest is not compared: golden outputs and the preview's matrix are computed in fp32, and their
    last bits may depend on the alignment of memory.
    """
    manifest = load_manifest(bundle)
    check_files(bundle, manifest.all_files())
    for name, stage in reference.stages.items():
        assert manifest.stages[name].artifacts == stage.artifacts, f"the resumed build gave another {name}"


def _fork_build(checkpoint: Path, out: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            build_bundle(checkpoint, out, BuildOptions())
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return child


def main() -> None:
    """Kill builds as often as asked, and write the result."""
    from benchmarks.machine import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_and_resume(arguments.checkpoint, Path(folder), kills=arguments.kills)
    print(write("kill_build", result))


if __name__ == "__main__":
    main()
