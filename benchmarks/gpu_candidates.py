"""Who takes part in the GPU benchmark: diffusers, torch.compile and every session of ours, on the same weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.build_scale import CASES, TOKENIZER, checkpoint_around, make
from ditc.runtime.errors import DitcError
from ditc.runtime.gpu import find_gpu
from ditc.runtime.session import Array, Session, to_numpy
from ditc.runtime.sessions import ENGINES, missing
from ditc.runtime.spec import DENOISER, Backend, Precision, StageSpec

BATCHES = (1, 2, 4, 8, 16)
SCALE = 32  # pixels a latent cell of DC-AE f32


@dataclass(frozen=True)
class Candidate:
    """Something that computes a stage. call returns its result; wait ends when the GPU is done."""

    call: Callable[[], Any]
    wait: Callable[[], None]
    result: Callable[[], Array]


@contextmanager
def checkpoint(name: str) -> Iterator[Path]:
    """Random weights at full width, as diffusers would save them."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    directory = folder / CASES[name].component
    directory.mkdir()
    try:
        make(name, directory)
        yield directory
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torch_candidates(name: str, directory: Path, size: int, batch: int) -> dict[str, Callable[[], Candidate]]:
    """diffusers in fp32 (the reference of fidelity) and bf16, and torch.compile."""
    import diffusers
    import torch

    case = CASES[name]
    network_class = getattr(diffusers, case.config["_class_name"])

    def build(dtype: Any, mode: str | None) -> Candidate:
        network = network_class.from_pretrained(directory, torch_dtype=dtype).eval().to("cuda")
        feeds = torch_feeds(name, size, batch, dtype)
        run = network if case.stage == DENOISER else network.decode
        run = torch.compile(run, mode=mode) if mode else run

        @torch.inference_mode()
        def call() -> Any:
            return run(**feeds, return_dict=False)[0]

        return Candidate(call, torch.cuda.synchronize, lambda: call().float().cpu().numpy())

    return {
        "diffusers fp32": lambda: build(torch.float32, None),
        "diffusers bf16": lambda: build(torch.bfloat16, None),
        "torch.compile bf16": lambda: build(torch.bfloat16, "max-autotune"),
    }


def inputs(name: str, size: int, batch: int) -> dict[str, Array]:
    """The same numbers for every candidate: latents, and the text of a guided step (two rows a picture)."""
    rng, cells = np.random.default_rng(0), size // SCALE
    latents = rng.standard_normal((batch, 32, cells, cells), np.float32)
    if CASES[name].stage != DENOISER:
        return {"latents": latents}
    text = rng.standard_normal((2 * batch, 300, 2304), np.float32)
    return {"latents": latents, "text": text, "mask": np.ones((2 * batch, 300), np.int64)}


def torch_feeds(name: str, size: int, batch: int, dtype: Any) -> dict[str, Any]:
    """`inputs` under diffusers' names."""
    import torch

    given = {key: torch.from_numpy(value).cuda() for key, value in inputs(name, size, batch).items()}
    latents = given["latents"].to(dtype)
    if CASES[name].stage != DENOISER:
        return {"z": latents}
    return {
        "hidden_states": torch.cat([latents, latents]),
        "encoder_hidden_states": given["text"].to(dtype),
        "timestep": torch.full((2 * batch,), 500.0, device="cuda"),
        "encoder_attention_mask": given["mask"],
    }


def ours(name: str, directory: Path, work: Path, size: int) -> dict[str, Callable[[], tuple[Session, Any]]]:
    """Every backend and 16-bit precision of ours; each makes its session, or says with an error why it cannot."""
    from ditc.export.adapters import find_adapter
    from ditc.export.engine import build_engine
    from ditc.export.onnx import to_onnx
    from ditc.export.stages import BuildOptions
    from ditc.runtime.manifest import Artifact
    from ditc.runtime.sessions import open_device, open_session
    from ditc.runtime.sessions.onnxruntime_device import open_on_cuda

    case, gpu = CASES[name], find_gpu()
    assert gpu is not None
    defaults = {"height": size, "width": size, "complex_human_instruction": None}
    source = checkpoint_around(case, directory, {"tokenizer": TOKENIZER}, defaults)

    def graph(precision: Precision) -> tuple[Path, StageSpec]:
        options = BuildOptions(precision=precision, max_batch=max(BATCHES))
        adapter = find_adapter(source)
        module = adapter.load(source, adapter.plan(source, options), case.stage, options)
        path = work / f"{case.stage}-{size}-{precision.value}.onnx"
        if not path.is_file():
            to_onnx(module, path, check=False)
        return path, module.spec

    def onnxruntime(precision: Precision) -> tuple[Session, Any]:
        path, spec = graph(precision)
        return open_on_cuda(path, spec, precision=precision, graphs=True), None

    def engine(backend: Backend, precision: Precision, form: Any) -> tuple[Session, Any]:
        if lack := missing(backend):
            raise DitcError(lack)
        path, spec = graph(precision)
        out = path.with_name(f"{path.stem}-{form}.{backend.value}")
        targets = (gpu.sm,) if backend is Backend.TENSORRT_RTX else ("this-gpu",)
        build_engine(path, out, spec=spec, backend=backend, targets=targets, linear_attention=form)
        from ditc.runtime.gpu import library_version
        from ditc.runtime.integrity import file_ref

        artifact = Artifact(
            spec=spec,
            precision=precision,
            backend=backend,
            file=file_ref(out, work),
            key=out.name,
            targets=targets,
            library=library_version(backend),
            gpu=gpu.name,
        )
        device = open_device()
        return open_session(out, artifact, device=device), device

    made: dict[str, Callable[[], tuple[Session, Any]]] = {}
    for precision in (Precision.FP16, Precision.BF16):
        made[f"onnxruntime {precision.value}"] = lambda p=precision: onnxruntime(p)
        for backend in ENGINES:
            for form in ("decomposed", "plugin"):
                made[f"{backend.value} {precision.value} {form}"] = lambda b=backend, p=precision, f=form: (
                    engine(b, p, f)
                )
    return made


def session_candidate(session: Session, device: Any, name: str, size: int, batch: int) -> Candidate:
    """A session on random feeds of its spec; what the host reads of the result is the prediction."""
    from ditc.export.stages import example_feeds, example_sizes

    sizes = {**example_sizes(session.spec), "batch": batch, "height": size // SCALE, "width": size // SCALE}
    if "rows" in sizes:
        sizes["rows"] = 2 * batch
    feeds: dict[str, Any] = {**example_feeds(session.spec, sizes)}
    feeds["latents"] = inputs(name, size, batch)["latents"]
    for value in feeds.values():
        value.flags.writeable = False
    output = session.spec.outputs[0].name
    last: list[Any] = []

    def call() -> Any:
        last[:] = [session.run(feeds)[output]]
        return last[0]

    wait = device.synchronize if device is not None else lambda: to_numpy(last[0]) is None
    return Candidate(call, wait, lambda: to_numpy(call()))
