"""How long does one guided denoiser step take, compared with diffusers on the same weights in the same run?

It is measured at two sizes: the demo checkpoint at its default size, and the width of Sana-0.6B with random weights (4
of 28 layers, 16x16 latents = 512 px, 300 text tokens, two rows for guidance). Our time is that of a whole step, solver
update included; diffusers' time is that of the transformer's forward alone. Candidates alternate, so that a busy
machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SanaTransformer2DModel

from benchmarks.machine import alternating_s, spread, write
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_onnx
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession
from ditc.runtime.spec import DENOISER

# Sana_600M_512px's transformer/config.json, 4 layers of 28.
SANA_600M = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 2304,
    "num_layers": 4,
    "sample_size": 16,
}
TEXT_TOKENS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/checkpoint"))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wide = sana_600m(arguments.model, Path(folder) / "sana-600m")
        results = {
            name: measure(
                checkpoint, Path(folder) / name, arguments.repeats, compiled=not arguments.no_compile
            )
            for name, checkpoint in (("demo", arguments.model), ("sana-0.6b-4-layers", wide))
        }
    print(json.dumps(results, indent=1))
    if not arguments.no_write:
        print(write("denoiser_step", results))


def sana_600m(model: Path, out: Path) -> Path:
    """The demo checkpoint with a transformer of Sana-0.6B's width: its f16 VAE gives 16x16 latents at 256 px."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    SanaTransformer2DModel(**SANA_600M).save_pretrained(out / "transformer")
    defaults = json.loads((out / "ditc.json").read_text())
    defaults |= {"height": 256, "width": 256, "max_sequence_length": TEXT_TOKENS}
    (out / "ditc.json").write_text(json.dumps(defaults))
    return out


def measure(checkpoint: Path, work: Path, repeats: int, *, compiled: bool) -> dict[str, Any]:
    """Seconds per step of each candidate, and how many times as fast ours is."""
    source, options = open_checkpoint(checkpoint), BuildOptions(max_batch=2)
    adapter = find_adapter(source)
    stage = adapter.load(source, adapter.plan(source, options), DENOISER, options)
    files = to_onnx(stage, work / "denoiser.onnx")
    sizes = {**example_sizes(stage.spec), "batch": 1, "rows": 2}
    feeds = example_feeds(stage.spec, sizes)
    del stage.module.network  # frees its weights: diffusers loads its own
    session = OnnxRuntimeSession(files.model, stage.spec)
    candidates: dict[str, Callable[[], object]] = {"ditc onnxruntime fp32": lambda: session.run(feeds)}
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        network = SanaTransformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype).eval()
        candidates[f"diffusers eager {label}"] = diffusers_forward(network, sizes, dtype)
        if compiled:
            candidates[f"torch.compile {label}"] = diffusers_forward(torch.compile(network), sizes, dtype)
    seconds = alternating_s(candidates, warmup=3, repeats=repeats)
    ours = np.array(seconds["ditc onnxruntime fp32"])
    return {
        "sizes": sizes,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast_as": {name: float(np.median(np.array(v) / ours)) for name, v in seconds.items()},
    }


def diffusers_forward(network: Any, sizes: dict[str, int], dtype: torch.dtype) -> Callable[[], object]:
    """A function that runs unmodified diffusers' forward at the same sizes, with two rows and all text tokens."""
    config = network.config
    latents = torch.randn(2, config.in_channels, sizes["height"], sizes["width"]).to(dtype)
    text = torch.randn(2, sizes["text_length"], config.caption_channels).to(dtype)
    timestep, mask = torch.tensor([500.0, 500.0]), torch.ones(2, sizes["text_length"], dtype=torch.int64)

    @torch.inference_mode()
    def call() -> object:
        return network(latents, text, timestep=timestep, encoder_attention_mask=mask, return_dict=False)

    return call


if __name__ == "__main__":
    main()
