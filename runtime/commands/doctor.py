"""`ditc doctor`: shows what this machine can build and run, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ditc.runtime.commands.doctor_finding import Finding
from ditc.runtime.cores import most_threads
from ditc.runtime.cpu_features import cpu_features, int8_products_saturate
from ditc.runtime.errors import CheckpointError
from ditc.runtime.gpu import check_device, select_gpu
from ditc.runtime.load_options import add_load_arguments

# The packages of each extra in pyproject.toml. The extras of backends are in the table of backends.
PACKAGES = {
    "runtime": ("numpy", "onnxruntime", "tokenizers", "pillow", "rich", "filelock"),
    "export": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors"),
    "parity": ("polygraphy",),
    "sign": ("cryptography",),
}

# Estimates of a build with engines. Memory: bytes that every build takes, and bytes per byte of the largest component's
# weights. Disk: bytes per byte of all weights. docs/engines.md lists the builds that they were measured on.
FIXED_MEMORY = 1.3e9
MEMORY_PER_WEIGHT_BYTE = 3.5
DISK_PER_WEIGHT_BYTE = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the checkpoint that may be built here, and for the output's form."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="A diffusers directory. If given, also estimate whether this machine can build it.",
    )
    add_load_arguments(parser, "device", when="Say what this GPU can do.")
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Print all findings. The exit code is 1 if one of them is bad: a package is missing or has a known defect."""
    from ditc.runtime.commands.doctor_engines import engine_findings

    check_device(arguments.device)
    select_gpu(arguments.device)
    findings = [*_machine(), *_packages(), *_conflicts(), *_backends(), *engine_findings()]
    if arguments.checkpoint is not None:
        findings += checkpoint_findings(arguments.checkpoint)
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        marks = {True: "ok  ", False: "bad ", None: "-   "}
        for finding in findings:
            sys.stdout.write(f"{marks[finding.ok]}{finding.topic:<12}{finding.text}\n")
            if finding.hint:
                sys.stdout.write(f"    hint: {finding.hint}\n")
        sys.stdout.write(f"\n{summary(findings)}\n")
    return int(any(finding.ok is False for finding in findings))


def summary(findings: Sequence[Finding]) -> str:
    """One sentence for somebody who reads only the last line."""
    bad = list(dict.fromkeys(finding.topic for finding in findings if finding.ok is False))
    if not bad:
        return "Nothing is wrong. Lines that begin with - are facts, or parts that you need not have."
    return f"Look at the lines that begin with bad: {', '.join(bad)}."


def _machine() -> list[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    findings = [
        Finding(
            "machine",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, of which this process may use "
            f"{most_threads()}, Python {platform.python_version()}",
        ),
        Finding(
            "disk",
            f"{free:.0f} GB free here",
            free > 5 or None,
            None if free > 5 else "the build of a full-size checkpoint needs about three times its size",
        ),
    ]
    if features := cpu_features():
        no_vnni = "it has no VNNI, so OpenVINO computes 8-bit stages in fp32: build them for ONNX Runtime"
        hint = no_vnni if int8_products_saturate() else None
        findings.append(Finding("cpu", f"has {' '.join(features)}", None, hint))
    memory = _memory_gb()
    if memory is not None:
        enough = memory[0] > 4
        findings.append(
            Finding(
                "memory",
                f"{memory[0]:.0f} of {memory[1]:.0f} GB free",
                enough or None,
                None
                if enough
                else "the build of the demo needs 2 GB, that of a model of 1.6 billion weights about 12 GB",
            )
        )
    return findings


def checkpoint_findings(checkpoint: Path) -> list[Finding]:
    """Compare the free disk and memory with estimates for building the checkpoint with engines.

    Raises:
        CheckpointError: the folder holds no .safetensors file.
    """
    folders: dict[Path, int] = {}
    for path in checkpoint.rglob("*.safetensors"):
        folders[path.parent] = folders.get(path.parent, 0) + path.stat().st_size
    if not folders:
        raise CheckpointError(f"{checkpoint} holds no .safetensors file", hint="give a diffusers directory")
    disk = max(DISK_PER_WEIGHT_BYTE * sum(folders.values()) / 1e9, 0.1)  # not 0.0 GB for a small one
    memory = (FIXED_MEMORY + MEMORY_PER_WEIGHT_BYTE * max(folders.values())) / 1e9
    free_disk, free_memory = shutil.disk_usage(".").free / 1e9, _memory_gb()
    largest = max(folders, key=lambda folder: folders[folder]).name
    findings = [
        Finding(
            "build",
            f"{checkpoint} needs about {disk:.1f} GB of disk for graphs and engines; {free_disk:.1f} GB are free",
            free_disk >= disk,
            None if free_disk >= disk else "free some space, or build with -o on another disk",
        )
    ]
    if free_memory is not None:
        enough = free_memory[0] >= memory
        text = f"{checkpoint} needs about {memory:.1f} GB of memory (for {largest}); {free_memory[0]:.1f} GB are free"
        hint = None if enough else "build on a larger machine, and copy the bundle to this one"
        findings.append(Finding("build", text, enough, hint))
    return findings


def _memory_gb() -> tuple[float, float] | None:
    """Free and total memory in GB; None on systems other than Linux."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            fields = dict(line.split(":", 1) for line in file)
        return tuple(int(fields[name].split()[0]) / 1e6 for name in ("MemAvailable", "MemTotal"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    from ditc.runtime.sessions.registry import rows

    findings = []
    backends = {row.extra: (*row.packages, *row.needs) for row in rows() if row.extra is not None}
    for extra, names in (PACKAGES | backends).items():
        found = {name: _installed(name) for name in names}
        if extra == "runtime" and found["onnxruntime"] is None and _installed("onnxruntime-gpu"):
            del found["onnxruntime"]  # onnxruntime-gpu is the same library, built for CUDA
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
    from ditc.runtime.sessions.onnxruntime_cuda import INSTALL

    findings = []
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        findings.append(
            Finding(
                "conflict",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
                False,
                INSTALL,
            )
        )
    torch = _installed("torch")
    if torch and tuple(int(part) for part in torch.split("+")[0].split(".")[:2]) < (2, 11):
        findings.append(
            Finding("conflict", f"torch {torch} is too old to export", False, "pip install 'torch>=2.11'")
        )
    return findings


def _backends() -> list[Finding]:
    from ditc.runtime.sessions.registry import available_backends

    runnable = available_backends()
    findings = [Finding("runs", f"{backend}: {why}") for backend, why in runnable.items()]
    if _installed("onnxruntime") or _installed("onnxruntime-gpu"):
        import onnxruntime

        findings.append(Finding("providers", ", ".join(onnxruntime.get_available_providers()), None))
    return findings
