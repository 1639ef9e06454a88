"""How much quality does the demo model lose in 8 bits? PSNR against fp32, and retrieval on the same prompts and noise.

    python -m benchmarks.quantized build/demo/bundle [--precisions int8 fp8] [--pictures 480] [--for-psnr 32]

The bundle must hold an fp32 denoiser and one in each precision. Every prompt has its own noise, which is the same for
all precisions. The difference in retrieval is paired over prompts and given with its 95 % interval. The result is
written to benchmarks/results/quantized.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from demo.concepts import CHECKPOINT_DIR, Pair, caption, load_split, order_by_hash
from demo.evaluate import seed_of
from demo.references import concept_ranks
from ditc.runtime.atomic import atomic_path
from ditc.runtime.machine import library_versions, this_machine
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array
from ditc.runtime.sessions.registry import is_graph

RESULTS = Path(__file__).parent / "results" / "quantized.json"
Z_95 = 1.96


def main() -> None:
    """Draw and judge pictures in every precision, and print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["int8", "fp8"])
    parser.add_argument(
        "--pictures",
        type=int,
        default=480,
        help="number of prompts, taken in an order that mixes all concepts",
    )
    parser.add_argument("--for-psnr", type=int, default=32, help="number of pictures for PSNR")
    parser.add_argument("--cache", type=Path, help="folder for drawn pictures; a killed run resumes")
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        help="what draws in 8 bits, for which the bundle must be built; ONNX Runtime draws in fp32",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the result")
    arguments = parser.parse_args()
    split = load_split()
    pairs = order_by_hash(split.trained + split.held_out)[: arguments.pictures]
    reference = draw(arguments.bundle, "fp32", pairs, arguments.cache)
    ranks = concept_ranks(to_uint8(reference), [p.concept for p in pairs], split)
    results: dict[str, object] = {"fp32_top1": float((ranks == 0).mean())}
    for precision in arguments.precisions:
        pictures = draw(arguments.bundle, precision, pairs, arguments.cache, arguments.backend)
        found = concept_ranks(to_uint8(pictures), [p.concept for p in pairs], split)
        each = [psnr(a, b) for a, b in zip(pictures, reference, strict=True)][: arguments.for_psnr]
        difference, interval = paired(found == 0, ranks == 0)
        results[precision] = {
            "psnr_db_mean": float(np.mean(each)),
            "psnr_db_median": float(np.median(each)),
            "psnr_db_min": float(np.min(each)),
            "psnr_db": [round(value, 1) for value in each],
            "psnr_pictures": len(each),
            "top1": float((found == 0).mean()),
            "top1_minus_fp32": difference,
            "interval_95": interval,
        }
        print(f"{precision}: {json.dumps(results[precision])}")
    weights = next((CHECKPOINT_DIR / "transformer").glob("*.safetensors"))
    result = {
        "machine": str(this_machine()),
        "versions": library_versions(),
        "transformer_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "backend": arguments.backend,
        "prompts": len(pairs),
        **results,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(f"fp32 top-1 {results['fp32_top1']:.1%} over {len(pairs)} prompts; wrote {arguments.results}")


def draw(
    bundle: Path, precision: str, pairs: Sequence[Pair], cache: Path | None, backend: str = "onnxruntime"
) -> Array:
    """Draw one picture per pair: floats (N,H,W,3) in [0,1]. Pictures in the cache are not drawn again."""
    with Pipeline.load(bundle, backend=backend, precision=precision) as pipeline:
        largest = pipeline.sessions["denoiser"].spec.profile["batch"].max
        artifact = next(
            a
            for a in pipeline.manifest.stages["denoiser"].artifacts
            if a.precision == precision and is_graph(a)
        )
        pictures: list[Array] = []
        for start in track(range(0, len(pairs), largest), description=precision):
            prompts = [caption(pair) for pair in pairs[start : start + largest]]
            known = None if cache is None else cache / f"{backend}-{artifact.key}-{start}-{len(prompts)}.npy"
            if known is not None and known.exists():
                pictures.append(np.load(known))
                continue
            request = Request(
                prompt=prompts,
                generator=[Generator(seed_of(prompt)) for prompt in prompts],
                output_type="np",
                allow_uniform=True,
            )
            pictures.append(pipeline.draw(request).images)
            if known is not None:
                with atomic_path(known) as partial, partial.open("wb") as file:
                    np.save(file, pictures[-1])
    return np.concatenate(pictures)


def to_uint8(pictures: Array) -> Array:
    """The pictures as bytes in [0, 255], as PNG files store them."""
    return np.rint(pictures * 255).astype(np.uint8)


def paired(hits: Array, reference: Array) -> tuple[float, tuple[float, float]]:
    """The difference of two rates over the same prompts, and its 95 % interval (normal approximation, paired)."""
    differences = hits.astype(float) - reference.astype(float)
    middle = float(differences.mean())
    half = Z_95 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return middle, (middle - half, middle + half)


if __name__ == "__main__":
    main()
