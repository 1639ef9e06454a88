"""How many seconds and how much memory does a full-size build take on a CPU? Export and TensorRT-RTX engine.

    python -m benchmarks.build_scale sana-0.6b sana-1.6b dc-ae gemma-2-2b sana-4.8b sd3.5-medium

Each model has random weights. It is written to a temporary directory in diffusers layout, shard by shard, in the
element type of the release. It is built in its own process, whose largest resident size is reported. The graph is not
checked against PyTorch here (docs/engines.md says from which size on a build leaves that to `ditc parity`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.machine import write

if TYPE_CHECKING:
    from ditc.export.checkpoint.open import Checkpoint
    from ditc.export.contract import BuildOptions, ModelPlan
    from ditc.export.engine.build import EngineReport
    from ditc.runtime.spec import StageSpec

SHARD_BYTES = 10**9
TOKENIZER = Path(__file__).parents[1] / "demo" / "checkpoint" / "tokenizer"
TARGETS = ("sm80", "sm86", "sm89", "sm120")
# Each bundle is for square, landscape and portrait pictures at 1024 px.
BINS = [[1024, 1024], [832, 1216], [1216, 832]]
# Goals by model: seconds, and peak memory in bytes.
GOALS = {"sana-1.6b": (180, 12e9), "gemma-2-2b": (180, 18e9), "sd3.5-medium": (240, 14e9)}


def transformer(layers: int, heads: int, cross_heads: int, *, qk_norm: bool) -> dict[str, Any]:
    """The config of a released Sana, from NVlabs/Sana's configs and diffusers' conversion script."""
    width = heads * 32
    return {
        "_class_name": "SanaTransformer2DModel",
        **{"in_channels": 32, "out_channels": 32, "num_attention_heads": heads, "attention_head_dim": 32},
        **{"num_layers": layers, "num_cross_attention_heads": cross_heads, "cross_attention_dim": width},
        **{"cross_attention_head_dim": width // cross_heads, "caption_channels": 2304, "mlp_ratio": 2.5},
        **{"sample_size": 32, "patch_size": 1, "qk_norm": "rms_norm_across_heads" if qk_norm else None},
    }


# mit-han-lab/dc-ae-f32c32-sana-1.0: arXiv 2410.10733, and diffusers' conversion script.
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC_AE = {
    "_class_name": "AutoencoderDC",
    **{"latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407},
    **{"encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS},
    **{"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    **{"decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    **{"encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6},
    **{"encoder_qkv_multiscales": [[], [], [], [5], [5], [5]]},
    **{"decoder_qkv_multiscales": [[], [], [], [5], [5], [5]]},
    **{"upsample_block_type": "interpolate", "downsample_block_type": "Conv"},
}
# google/gemma-2-2b-it's config.json.
GEMMA = {
    "model_type": "gemma2",
    **{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    **{"sliding_window": 4096},
}
SANA_1600M = transformer(20, 70, 20, qk_norm=False)
# stabilityai/stable-diffusion-3.5-medium: Stability-AI/sd3.5, and diffusers' conversion script.
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24},
    **{"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
    **{"dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"},
}
KL_VAE = {
    "_class_name": "AutoencoderKL",
    **{"latent_channels": 16, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]},
    **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    **{"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    **{"use_quant_conv": False, "use_post_quant_conv": False},
}
CLIP = {"model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = {**CLIP, "hidden_size": 768, "projection_dim": 768, "num_attention_heads": 12}
CLIP_G = {**CLIP, "hidden_size": 1280, "projection_dim": 1280, "num_attention_heads": 20}
# Configs of all components, because a plan reads also those that are not built. An SD3 checkpoint may lack T5.
OTHERS = {
    "sana": {"transformer": SANA_1600M, "vae": DC_AE, "text_encoder": GEMMA},
    "sd3": {"transformer": SD35_MEDIUM, "vae": KL_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
}
_CLIP = ["transformers", "CLIPTextModelWithProjection"]
INDEXES: dict[str, dict[str, Any]] = {
    "sana": {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    },
    "sd3": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{"text_encoder": _CLIP, "text_encoder_2": _CLIP},
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")},
        **{name: [None, None] for name in ("text_encoder_3", "tokenizer_3")},
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sana": {
        "_class_name": "DPMSolverMultistepScheduler",
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    },
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sana": {"resolution_bins": BINS, "complex_human_instruction": None},
    "sd3": {"skip_guidance_layers": [7, 8, 9]},
}


@dataclass(frozen=True)
class Case:
    """One stage to build, and the component whose weights it needs.

    Attributes:
        dtype: the element type of the release, in which a denoiser is also built.
    """

    stage: str
    component: str
    config: dict[str, Any]
    dtype: str
    family: str = "sana"


CASES = {
    "sana-0.6b": Case("denoiser", "transformer", transformer(28, 36, 16, qk_norm=False), "fp16"),
    "sana-1.6b": Case("denoiser", "transformer", SANA_1600M, "fp16"),
    "dc-ae": Case("vae_decoder", "vae", DC_AE, "bf16"),
    "gemma-2-2b": Case("text_encoder", "text_encoder", GEMMA, "bf16"),
    "sana-4.8b": Case("denoiser", "transformer", transformer(60, 70, 20, qk_norm=True), "bf16"),
    "sd3.5-medium": Case("denoiser", "transformer", SD35_MEDIUM, "fp16", "sd3"),
}


def make(name: str, directory: Path) -> None:
    """Write random weights for the component, with at most one shard in memory."""
    import torch
    from safetensors.torch import save_file

    case = CASES[name]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in _reference(case)().state_dict().items()}
    # Every tensor is the same block of normal numbers at another offset, because equal tensors would be stored once.
    block = (torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    shard: dict[str, Any] = {}
    index: dict[str, str] = {}
    size, count = 0, itertools.count(1)

    def flush() -> None:
        nonlocal shard, size
        file = f"{_stem(case)}-{next(count):05d}.safetensors"
        save_file(shard, directory / file)
        index.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for number, (key, shape) in enumerate(shapes.items()):
        length = math.prod(shape)
        values = block.roll(number * 104_729).repeat(-(-length // len(block)))[:length]
        shard[key] = values.reshape(shape).clone()
        size += length * dtype.itemsize
        if size >= SHARD_BYTES:
            flush()
    flush()
    record = {"metadata": {}, "weight_map": index}
    (directory / f"{_stem(case)}.safetensors.index.json").write_text(json.dumps(record))
    (directory / "config.json").write_text(json.dumps(case.config))


def _stem(case: Case) -> str:
    return "model" if case.component == "text_encoder" else "diffusion_pytorch_model"


def _reference(case: Case) -> Callable[[], Any]:
    """A function that makes the upstream network, which has the names and shapes of the checkpoint's tensors."""
    if case.component == "text_encoder":
        from transformers import Gemma2Config, Gemma2Model

        return lambda: Gemma2Model(Gemma2Config(**case.config))
    import diffusers

    arguments = {key: value for key, value in case.config.items() if key != "_class_name"}
    return lambda: getattr(diffusers, case.config["_class_name"])(**arguments)


def checkpoint_around(
    case: Case, directory: Path, tokenizers: dict[str, Path], defaults: dict[str, Any]
) -> Checkpoint:
    """A whole checkpoint around the component in `directory`. The other components have a config but no weights."""
    from ditc.export.checkpoint.open import Checkpoint, Component, open_component
    from ditc.export.checkpoint.tensors import TensorSource

    others = OTHERS[case.family].items()
    classes = INDEXES[case.family]
    components = {
        key: Component(key, config, TensorSource({}), (), classes[key][1]) for key, config in others
    }
    components[case.component] = open_component(directory)
    return Checkpoint(
        path=directory,
        model_index=INDEXES[case.family],
        components=components,
        scheduler_config=SCHEDULERS[case.family],
        tokenizers=tokenizers,
        defaults=defaults,
    )


def measure(name: str, directory: Path, out: Path) -> dict[str, Any]:
    """Export the stage and build its engine. Call it in a fresh process: peak memory counts the whole process."""
    import psutil

    from ditc.export.build import estimates
    from ditc.export.contract import BuildOptions
    from ditc.export.engine.build import estimate_memory_bytes
    from ditc.export.engine.memory import PeakMemory
    from ditc.export.families import find_adapter
    from ditc.runtime.spec import Backend, Precision

    case = CASES[name]
    defaults = {"height": 1024, "width": 1024, **DEFAULTS[case.family]}
    checkpoint = checkpoint_around(case, directory, _tokenizers(case.family, out), defaults)
    denoiser = case.dtype if case.component == "transformer" else "bf16"
    options = BuildOptions(precision=Precision(denoiser), backend=Backend.TENSORRT_RTX, max_batch=1)
    plan = find_adapter(checkpoint).plan(checkpoint, options)
    precision = plan.stages[case.stage].precision
    weights = estimates.weight_bytes([checkpoint.component(case.component)], precision)
    export_estimate = estimates.estimate_export_bytes(weights, precision)
    started = perf_counter()
    with PeakMemory() as exporting:
        spec, model = _export(case, checkpoint, plan, options, out)
    export_s = perf_counter() - started
    before = psutil.Process().memory_info().rss
    engine_estimate = before + estimate_memory_bytes(model)
    with PeakMemory() as compiling:
        report = _build_engine(case, spec, model, plan)
    return {
        "stage": case.stage,
        "precision": precision.value,
        "weights_bytes": weights,
        "export_s": export_s,
        "export_peak_bytes": exporting.peak_bytes,
        "export_estimated_bytes": export_estimate,
        "resident_before_engine_bytes": before,
        "engine_s": report.seconds,
        "engine_peak_bytes": report.peak_memory_bytes,
        "engine_estimated_bytes": engine_estimate,
        "engine_bytes": report.size_bytes,
        "profiles": len(report.profiles),
        "library": f"{report.library} {report.version}",
        "seconds": export_s + report.seconds,
        # Imports included. Far below the seconds above, it shows that the machine was busy, not that the build is slow.
        "cpu_s": sum(psutil.Process().cpu_times()[:2]),
        "peak_bytes": max(exporting.peak_bytes, report.peak_memory_bytes),
        # Without the checkpoint's mapped pages, which the system drops when memory is short.
        "peak_anonymous_bytes": max(exporting.peak_anonymous_bytes, compiling.peak_anonymous_bytes),
    }


def _export(
    case: Case, checkpoint: Checkpoint, plan: ModelPlan, options: BuildOptions, out: Path
) -> tuple[StageSpec, Path]:
    """Export the stage and free its weights. Returns its spec and its ONNX file."""
    from ditc.export.checkpoint.release_memory import drop_pages
    from ditc.export.families import find_adapter
    from ditc.export.graph.onnx import to_onnx

    module = find_adapter(checkpoint).load(checkpoint, plan, case.stage, options)
    spec = module.spec
    files = to_onnx(module, out / f"{case.stage}.onnx", check=False)
    del module
    gc.collect()
    drop_pages(checkpoint.component(case.component).files)
    return spec, files.model


def _build_engine(case: Case, spec: StageSpec, model: Path, plan: ModelPlan) -> EngineReport:
    """Build the engine beside its graph, with the profiles that `ditc build` gives it."""
    from ditc.export.engine.build import build_engine
    from ditc.export.engine.profiles import orientation_profiles
    from ditc.runtime.spec import Backend

    return build_engine(
        model,
        model.with_name(f"{case.stage}.engine"),
        spec=spec,
        backend=Backend.TENSORRT_RTX,
        targets=TARGETS,
        profiles=orientation_profiles(spec, plan.defaults, Backend.TENSORRT_RTX),
    )


def _tokenizers(family: str, folder: Path) -> dict[str, Path]:
    """The tokenizers' folders, by name. Their tokens are letters: only their number and the padding matter here."""
    if family == "sana":
        return {"tokenizer": gemma_tokenizer(folder / "tokenizer")}
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = [f"{letter}{end}" for end in ("", "</w>") for letter in sorted(ByteLevel.alphabet())]
    unused = [f"<unused{i}>" for i in range(CLIP["vocab_size"] - len(letters) - 2)]
    tokens = [*letters, *unused, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizers = {}
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=padding, model_max_length=77)
        tokenizers[name] = folder / name
        tokenizer.save_pretrained(folder / name)
    return tokenizers


def gemma_tokenizer(folder: Path) -> Path:
    """Write the demo's tokenizer with unused tokens up to the size of Gemma's vocabulary."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<filler{i}>": i for i in range(len(vocabulary), GEMMA["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def run(name: str, temporary: Path | None) -> dict[str, Any]:
    """Make, measure and remove one model. A build that fails or is killed is recorded as such."""
    folder = Path(tempfile.mkdtemp(prefix="build-scale-", dir=temporary))
    directory = folder / CASES[name].component
    directory.mkdir()
    try:
        _child("make", name, directory, folder)
        print(f"{name}: weights written", file=sys.stderr)
        try:
            result = json.loads(_child("measure", name, directory, folder).splitlines()[-1])
        except subprocess.CalledProcessError as e:
            killed = "killed: not enough memory" if e.returncode == -9 else f"exit code {e.returncode}"
            return {"failed": killed, "stderr": e.stderr[-2000:]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if name in GOALS:
        seconds, peak = GOALS[name]
        result["within_goal"] = result["seconds"] <= seconds and result["peak_bytes"] <= peak
    return dict(result)


def _child(task: str, name: str, directory: Path, out: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.build_scale", "--task", task, name]
    command += ["--directory", str(directory), "--out", str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Measure the named models one after the other, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=CASES)
    parser.add_argument("--temporary", type=Path, help="folder for the weights: up to 30 GB for 4.8B")
    parser.add_argument("--task", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task == "make":
        make(arguments.models[0], arguments.directory)
    elif arguments.task == "measure":
        print(json.dumps(measure(arguments.models[0], arguments.directory, arguments.out)))
    else:
        results = {}
        for name in arguments.models:
            results[name] = run(name, arguments.temporary)
            print(name, json.dumps(results[name]), file=sys.stderr)
            print(write("build_scale", results))


if __name__ == "__main__":
    main()
