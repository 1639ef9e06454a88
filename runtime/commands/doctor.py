"""`ditc doctor`: what this machine can build and run, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {
    "runtime": ("numpy", "onnxruntime", "tokenizers", "pillow", "rich", "filelock"),
    "export": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors"),
    "parity": ("polygraphy",),
    "rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt",),
    "gpu": ("onnxruntime-gpu", "cuda-python"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer. ok None: neither good nor bad."""

    topic: str
    text: str
    ok: bool | None = True
    hint: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the form of the answer."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when something that the runtime needs is missing or known to be bad."""
    findings = [*_machine(), *_packages(), *_conflicts(), *_backends()]
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        marks = {True: "ok  ", False: "bad ", None: "-   "}
        for finding in findings:
            sys.stdout.write(f"{marks[finding.ok]}{finding.topic:<12}{finding.text}\n")
            if finding.hint:
                sys.stdout.write(f"    hint: {finding.hint}\n")
    return int(any(finding.ok is False for finding in findings))


def _machine() -> list[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    findings = [
        Finding(
            "machine",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python "
            f"{platform.python_version()}",
        ),
        Finding(
            "disk",
            f"{free:.0f} GB free here",
            free > 5 or None,
            None if free > 5 else "a full-size checkpoint needs about three times its own size to build",
        ),
    ]
    memory = _memory_gb()
    if memory is not None:
        enough = memory[0] > 4
        findings.append(
            Finding(
                "memory",
                f"{memory[0]:.0f} of {memory[1]:.0f} GB free",
                enough or None,
                None if enough else "the demo builds in 2 GB; a 1.6B model needs about 12 GB",
            )
        )
    return findings


def _memory_gb() -> tuple[float, float] | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            fields = dict(line.split(":", 1) for line in file)
        return tuple(int(fields[name].split()[0]) / 1e6 for name in ("MemAvailable", "MemTotal"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return None  # not Linux: nothing to say


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for extra, names in PACKAGES.items():
        found = {name: _installed(name) for name in names}
        if extra == "runtime" and found["onnxruntime"] is None and _installed("onnxruntime-gpu"):
            del found["onnxruntime"]  # the same library, built for CUDA
            found["onnxruntime-gpu"] = _installed("onnxruntime-gpu")
        missing = [name for name, v in found.items() if v is None]
        text = ", ".join(f"{name} {v}" for name, v in found.items() if v) or "not installed"
        required = extra == "runtime"
        hint = None
        if missing:
            hint = f"for {', '.join(missing)}: " + (
                "pip install ditc" if required else f'pip install "ditc[{extra}]"'
            )
        findings.append(Finding(extra, text, not missing if required or not missing else None, hint))
    return findings


def _conflicts() -> list[Finding]:
    findings = []
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        findings.append(
            Finding(
                "conflict",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
                False,
                "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
            )
        )
    torch = _installed("torch")
    if torch and tuple(int(part) for part in torch.split("+")[0].split(".")[:2]) < (2, 11):
        findings.append(
            Finding("conflict", f"torch {torch} is too old to export", False, "pip install 'torch>=2.11'")
        )
    return findings


def _backends() -> list[Finding]:
    from ditc.runtime.sessions import available_backends

    runnable = available_backends()
    findings = [Finding("runs", f"{backend.value}: {why}") for backend, why in runnable.items()]
    if _installed("onnxruntime") or _installed("onnxruntime-gpu"):
        import onnxruntime

        findings.append(Finding("providers", ", ".join(onnxruntime.get_available_providers()), None))
    return findings
