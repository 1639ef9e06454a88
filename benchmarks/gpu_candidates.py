"""The candidates of the GPU benchmark: diffusers, torch.compile and all our sessions, on the same weights."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.full_size import CASES, checkpoint_around, gemma_tokenizer, make
from ditc.export.contract import BuildOptions, StageModule
from ditc.export.engine.build import LinearAttention, build_engine
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_onnx
from ditc.export.graph.torch_session import TorchSession, to_torch
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.errors import DitcError
from ditc.runtime.gpu import find_gpu
from ditc.runtime.load_options import DEFAULTS
from ditc.runtime.session import Array, Session, to_numpy
from ditc.runtime.sessions.device import open_device
from ditc.runtime.sessions.onnxruntime_device import open_on_device
from ditc.runtime.sessions.opening import open_session
from ditc.runtime.sessions.registry import library_version, missing, row_of, rows
from ditc.runtime.spec import DENOISER, Backend, Precision, StageSpec

BATCHES = (1, 2, 4, 8, 16)
DEVICE = "cuda"
PRECISIONS = (Precision.FP16, Precision.BF16)
SCALE = 32  # pixels per latent cell of DC-AE f32


@dataclass(frozen=True)
class Candidate:
    """Something that computes a stage.

    Attributes:
        call: starts the computation; the GPU may still be working when it returns.
        wait: returns when the GPU is done.
        result: computes the stage and returns its first output as a fp32 array.
    """

    call: Callable[[], Any]
    wait: Callable[[], None]
    result: Callable[[], Array]


@contextmanager
def checkpoint(name: str) -> Iterator[Path]:
    """A temporary directory with random weights at full width, in diffusers layout."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    directory = folder / CASES[name].component
    directory.mkdir()
    try:
        make(name, directory)
        yield directory
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torch_candidates(name: str, directory: Path, size: int) -> dict[str, Callable[[int], Candidate]]:
    """diffusers in fp32 (the reference for fidelity) and bf16, and torch.compile. Each function takes a batch size."""
    import diffusers
    import torch

    case = CASES[name]
    network_class = getattr(diffusers, case.config["_class_name"])
    # The reference must be exact fp32, but cuDNN's convolutions use TF32 by default.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def build(batch: int, dtype: Any, mode: str | None) -> Candidate:
        network = network_class.from_pretrained(directory, torch_dtype=dtype).requires_grad_(False)
        network.eval().to(DEVICE)
        feeds = torch_feeds(name, size, batch, dtype)
        run = network if case.stage == DENOISER else network.decode
        # torch.compile is fastest with static shapes. By default it would compile the second batch size for any size.
        run = torch.compile(run, mode=mode, dynamic=False) if mode else run

        @torch.inference_mode()
        def call() -> Any:
            return run(**feeds, return_dict=False)[0]

        return Candidate(call, wait_for_torch, lambda: call().float().cpu().numpy())

    return {
        "diffusers fp32": lambda batch: build(batch, torch.float32, None),
        "diffusers bf16": lambda batch: build(batch, torch.bfloat16, None),
        "torch.compile bf16": lambda batch: build(batch, torch.bfloat16, "max-autotune"),
    }


def wait_for_torch() -> None:
    import torch

    torch.cuda.synchronize()


def clear() -> None:
    """Free what earlier candidates have left: compiled code, networks in reference cycles, torch's cached memory."""
    import torch

    torch.compiler.reset()  # else all batch sizes share one cache, with dynamic shapes from the second on
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def inputs(name: str, size: int, batch: int) -> dict[str, Array]:
    """The same inputs for every candidate: latents, and the text of a guided step (two rows per picture)."""
    rng, cells = np.random.default_rng(0), size // SCALE
    latents = rng.standard_normal((batch, 32, cells, cells), np.float32)
    if CASES[name].stage != DENOISER:
        return {"latents": latents}
    text = rng.standard_normal((2 * batch, 300, 2304), np.float32)
    return {"latents": latents, "text": text, "mask": np.ones((2 * batch, 300), np.int64)}


def torch_feeds(name: str, size: int, batch: int, dtype: Any) -> dict[str, Any]:
    """`inputs` under diffusers' names."""
    import torch

    given = {key: torch.from_numpy(value).to(DEVICE) for key, value in inputs(name, size, batch).items()}
    latents = given["latents"].to(dtype)
    if CASES[name].stage != DENOISER:
        return {"z": latents}
    return {
        "hidden_states": torch.cat([latents, latents]),
        "encoder_hidden_states": given["text"].to(dtype),
        "timestep": torch.full((2 * batch,), 500.0, device=DEVICE),
        "encoder_attention_mask": given["mask"],
    }


class Ours:
    """Our sessions of a model at one size, on the weights that diffusers gets.

    Args:
        directory: the component's weights, in diffusers layout.
        work: the folder for graphs and engines.
        size: height and width of the picture in pixels.
    """

    def __init__(self, name: str, directory: Path, work: Path, size: int) -> None:
        self._case, self._work, self._size = CASES[name], work, size
        defaults = {"height": size, "width": size, "complex_human_instruction": None}
        tokenizer = gemma_tokenizer(work / "tokenizer")
        self._source = checkpoint_around(self._case, directory, {"tokenizer": tokenizer}, defaults)

    def openers(self) -> dict[str, Callable[[], tuple[Session, Any]]]:
        """A function per backend and 16-bit precision that opens the session, or raises an error that says why not."""
        made: dict[str, Callable[[], tuple[Session, Any]]] = {}
        for precision in PRECISIONS:
            made[f"onnxruntime {precision.value}"] = partial(self._onnxruntime, precision)
            for backend in [row.name for row in rows() if row.same_gpu]:
                for form in ("decomposed", "plugin"):
                    made[f"{backend.value} {precision.value} {form}"] = partial(
                        self._engine, backend, precision, form
                    )
        return made

    def exact(self) -> Array:
        """The fp32 output of the network in PyTorch, at batch 1 and on the feeds of `session_candidate`."""
        module = self._module(Precision.FP32)
        session = TorchSession(module.module, module.spec, device=DEVICE)
        return session_candidate(session, None, self._size, 1).result()

    def _module(self, precision: Precision) -> StageModule:
        options = BuildOptions(precision=precision, max_batch=max(BATCHES))
        adapter = find_adapter(self._source)
        plan = adapter.plan(self._source, options)
        return adapter.load(self._source, plan, self._case.stage, options)

    def _graph(self, precision: Precision) -> tuple[Path, StageSpec]:
        module = self._module(precision)
        path = self._work / f"{self._case.stage}-{self._size}-{precision.value}.onnx"
        if not path.is_file():
            to_onnx(module, path, check=False)
        return path, module.spec

    def _onnxruntime(self, precision: Precision) -> tuple[Session, Any]:
        path, spec = self._graph(precision)
        return open_on_device(path, spec, precision=precision, graphs=True, device=DEVICE), None

    def _engine(self, backend: Backend, precision: Precision, form: LinearAttention) -> tuple[Session, Any]:
        gpu = find_gpu()
        if gpu is None or (lack := missing(backend)):
            raise DitcError(lack if gpu else "no NVIDIA GPU with a driver")
        path, spec = self._graph(precision)
        out = path.with_name(f"{path.stem}-{form}.{backend.value}")
        targets = ("this-gpu",) if row_of(backend).built_on_gpu else (gpu.sm,)
        build_engine(path, out, spec=spec, backend=backend, targets=targets, linear_attention=form)
        artifact = Artifact(
            spec=spec,
            precision=precision,
            backend=backend,
            file=file_ref(out, self._work),
            key=out.name,
            targets=targets,
            library=library_version(backend),
            gpu=gpu.name,
        )
        device = open_device()
        return open_session(out, artifact, DEFAULTS, device), device


def session_candidate(session: Session, device: Any, size: int, batch: int) -> Candidate:
    """A session as a candidate, on seeded feeds for its spec. Its result is the stage's first output."""
    sizes = {**example_sizes(session.spec), "batch": batch, "height": size // SCALE, "width": size // SCALE}
    if "rows" in sizes:
        sizes["rows"] = 2 * batch
    feeds = example_feeds(session.spec, sizes)  # the same numbers for every precision, rounded to it
    for value in feeds.values():
        value.flags.writeable = False
    output = session.spec.outputs[0]
    last: list[Any] = []

    def call() -> Any:
        last[:] = [session.run(feeds)[output.name]]
        return last[0]

    def result() -> Array:
        found = to_numpy(call())
        return to_torch(found, output.dtype).float().numpy()

    wait = device.synchronize if device is not None else lambda: to_numpy(last[0]) is None
    return Candidate(call, wait, result)
