"""The self-test of a bundle: runs every stage on its golden inputs. certificate.json keeps the result if it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ditc.runtime.bundle.certificate import Line, Record, add_record, record
from ditc.runtime.bundle.certification import Certification
from ditc.runtime.bundle.golden import read_golden, self_test
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.errors import NumericsError
from ditc.runtime.session import Session


def run_self_test(
    bundle: Path,
    manifest: Manifest,
    sessions: Mapping[str, Session],
    artifacts: Mapping[str, Artifact],
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Record:
    """Run every stage on its golden inputs. A stage without golden values is reported as not checked.

    Args:
        on_stage: is called with the name of each stage before it runs.

    Raises:
        BundleError: a golden file is damaged.
    """
    check_files(bundle, [g for name in artifacts if (g := manifest.stages[name].golden) is not None])
    lines = []
    for name, artifact in artifacts.items():
        on_stage(name)
        golden = manifest.stages[name].golden
        if golden is None:
            lines.append(_without_golden(name))
            continue
        lines.append(self_test(name, sessions[name], artifact, read_golden(bundle / golden.path)))
    return record(tuple(lines), {"golden": manifest.digest})


def first_use(
    bundle: Path, certification: Certification, sessions: Mapping[str, Session], *, required: bool = False
) -> Record | None:
    """Run the self-test before stages compute for the first time on this machine's device.

    Nothing is run if the certificate says that these artifacts have passed the self-test on this machine, or if every
    build runs its graphs on such a device, unless the result is what a required certificate lacks.

    Args:
        required: whether the artifacts must be certified for this machine.

    Returns:
        the result; None if nothing was run.

    Raises:
        NumericsError: a stage does not compute on this machine what it computed in PyTorch.
    """
    artifacts, known = certification.artifacts, certification.self_test_here()
    tried = all(sessions[name].device.tried_at_build for name in artifacts)
    if (known is not None and known.passed) or (tried and not (required and certification.why_uncertified())):
        return None
    result = run_self_test(bundle, certification.manifest, sessions, artifacts)
    add_record(bundle, certification.manifest, artifacts, self_test=result)
    broken = next((line for line in result.lines if line.passed is False), None)
    if broken is not None:
        raise NumericsError(
            f"the self-test failed on this machine: {describe(broken)}",
            hint="build the engine again with another version of its library, or run it anyway with --no-self-test",
        )
    return result


def describe(line: Line) -> str:
    """One line of a result as text."""
    verdict = {True: "pass", False: "FAIL", None: "not checked"}[line.passed]
    value = "-" if line.value is None else f"{line.value:.2e}"
    bound = "" if line.bound is None else f" <= {line.bound:.2e}"
    return f"{line.name:<16}{verdict:<13}{line.metric} {value}{bound}  {line.detail}"


def _without_golden(stage: str) -> Line:
    detail = "the bundle holds no golden values for this stage"
    return Line(name=stage, metric="relative L2", value=None, bound=None, passed=None, detail=detail)
