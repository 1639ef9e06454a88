"""`ditc export-triton BUNDLE -o repository/`: writes a model repository for Triton Inference Server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.files import check_writable
from ditc.runtime.sessions.registry import GRAPH_BACKEND, rows
from ditc.runtime.spec import Backend, Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the bundle and the repository."""
    add_bundle_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder to make. It is the server's --model-repository.",
    )
    parser.add_argument(
        "--name",
        default="ditc",
        metavar="NAME",
        help="Name of the model that clients call; those of the stages begin with it (default: %(default)s).",
    )
    parser.add_argument(
        "--backend",
        default=str(GRAPH_BACKEND),
        choices=[str(row.name) for row in rows() if row.triton is not None],
        help="Library that runs the stages. The bundle must have been built for it (default: %(default)s).",
    )
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        help="Precision of the denoiser (default: the highest that the bundle holds for the backend).",
    )
    parser.add_argument(
        "--instances",
        type=int,
        default=1,
        metavar="INSTANCES",
        help="Number of instances of every stage, each of which holds its weights (default: %(default)s).",
    )
    parser.add_argument(
        "--kind",
        default="auto",
        choices=["auto", "cpu", "gpu"],
        help="Where ONNX Runtime runs; auto takes the GPUs that the server sees, else the CPU. TensorRT's stages run "
        "on GPUs and OpenVINO's on CPUs (default: %(default)s).",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="THREADS",
        help="Threads of ONNX Runtime per instance; 0 leaves their number to the library (default: %(default)s).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Write the repository. Prints its models and the version."""
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.triton_server.repository import Choices, version_of, write_repository

    choices = Choices(
        name=arguments.name,
        backend=Backend(arguments.backend),
        precision=None if arguments.precision is None else Precision(arguments.precision),
        instances=arguments.instances,
        kind=arguments.kind.upper(),
        threads=arguments.threads,
    )
    check_writable(arguments.output / arguments.name / "config.pbtxt", "-o")
    bundle = read_bundle_argument(arguments)
    models = write_repository(bundle, arguments.output, choices)
    version = version_of(load_manifest(bundle))
    if arguments.json:
        result = {"repository": str(arguments.output), "models": models, "version": version}
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write(f"{arguments.output}: {', '.join(models)}, version {version}\n")
    return 0
