"""``python -m demo.evaluate [--quick] [--json]``: does a checkpoint of the demo model draw what it is asked for?

Unmodified diffusers draws everything, with the defaults of ``ditc.json``. A picture counts as right if the nearest
reference picture, among all concepts in all styles, shows the concept of its prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from demo.concepts import CHECKPOINT_DIR, Pair, Split, caption, load_split, order_by_hash
from demo.errors import DemoError
from demo.references import concept_ranks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_QUICK_PAIRS = 32  # trained pairs, and as many held-out ones
_BATCH = 16
_CACHE = Path(__file__).resolve().parents[1] / "build" / "demo-train"
_Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Retrieval rates over some prompts, and the 95 % Wilson interval of each."""

    prompts: int
    top1: float
    top5: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]

    @classmethod
    def of(cls, ranks: NDArray[np.int64]) -> Retrieval:
        """The rates of the given concept ranks."""
        hits1, hits5, n = int((ranks == 0).sum()), int((ranks < 5).sum()), len(ranks)
        return cls(n, hits1 / n, hits5 / n, wilson_interval(hits1, n), wilson_interval(hits5, n))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of the evaluation. ``ae_psnr_db`` is None with ``--quick`` and ``--no-art``."""

    ae_psnr_db: float | None
    concepts: int
    steps: int
    trained: Retrieval
    held_out: Retrieval
    seconds: float
    quick: bool


def main() -> int:
    """Parse the arguments, evaluate the checkpoint, and print the result."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="64 fixed prompts, half of them held out; needs no art"
    )
    parser.add_argument(
        "--no-art", action="store_true", help="leave out the autoencoder's PSNR, which needs the art"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT_DIR, help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=_CACHE, help="folder of the art, for the autoencoder's PSNR"
    )
    args = parser.parse_args()
    try:
        result = evaluate(
            args.checkpoint,
            args.cache,
            quick=args.quick,
            art=not (args.quick or args.no_art),
            steps=args.steps,
        )
    except DemoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)) if args.json else as_text(result))
    return 0


def evaluate(checkpoint: Path, cache: Path, *, quick: bool, art: bool, steps: int | None = None) -> Result:
    """Draw and judge one picture per pair, for all pairs or for the 64 of the quick run.

    Args:
        art: measure the autoencoder's PSNR too, on the art that is rendered if need be.
        steps: the number of denoising steps; by default the checkpoint's.

    Raises:
        DemoError: the checkpoint or the references are missing, or the art cannot be rendered.
    """
    split = load_split()
    trained, held_out = quick_pairs(split) if quick else (split.trained, split.held_out)
    if art:
        from demo.train.art import build

        build(cache)
    started = time.monotonic()
    pipeline = load_pipeline(checkpoint)
    pairs = trained + held_out
    arguments = defaults(checkpoint, steps)
    drawn = draw(pipeline, [caption(p) for p in pairs], arguments)
    ranks = concept_ranks(drawn, [p.concept for p in pairs], split)
    return Result(
        ae_psnr_db=held_out_psnr_db(pipeline, cache) if art else None,
        concepts=len({p.concept for p in split.trained}),
        steps=int(arguments["num_inference_steps"]),
        trained=Retrieval.of(ranks[: len(trained)]),
        held_out=Retrieval.of(ranks[len(trained) :]),
        seconds=round(time.monotonic() - started, 1),
        quick=quick,
    )


def quick_pairs(split: Split) -> tuple[list[Pair], list[Pair]]:
    """The fixed pairs of the quick run: the first trained and the first held-out ones, ordered by hash."""
    return order_by_hash(split.trained)[:_QUICK_PAIRS], order_by_hash(split.held_out)[:_QUICK_PAIRS]


def load_pipeline(checkpoint: Path) -> DiffusionPipeline:
    """Load the checkpoint in fp32 with diffusers; ditc is not involved.

    Raises:
        DemoError: the folder holds no checkpoint.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not (checkpoint / "model_index.json").is_file():
        raise DemoError(f"{checkpoint} holds no model_index.json.", "run: make demo-checkpoint")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def defaults(checkpoint: Path, steps: int | None = None) -> dict[str, Any]:
    """The checkpoint's inference defaults as arguments of its pipeline, with another number of steps if it is given."""
    stated = json.loads((checkpoint / "ditc.json").read_text(encoding="utf-8"))
    arguments = {
        **{k: v for k, v in stated.items() if k != "resolution_bins"},
        "use_resolution_binning": False,
    }
    if steps is not None:
        arguments["num_inference_steps"] = steps
    index = json.loads((checkpoint / "model_index.json").read_text(encoding="utf-8"))
    if index["_class_name"] == "SanaSprintPipeline" and arguments["num_inference_steps"] != 2:
        arguments["intermediate_timesteps"] = None  # the default is refused with other numbers of steps
    return arguments


def draw(pipeline: DiffusionPipeline, prompts: list[str], arguments: dict[str, Any]) -> NDArray[np.uint8]:
    """Draw pictures (N, H, W, 3). The noise of each depends on its prompt alone, not on the batch."""
    import torch
    from tqdm import tqdm

    pictures = []
    starts = range(0, len(prompts), _BATCH)
    for start in tqdm(starts, desc="draw", unit="batch", disable=None):
        batch = prompts[start : start + _BATCH]
        generators = [torch.Generator().manual_seed(seed_of(p)) for p in batch]
        pictures += pipeline(batch, generator=generators, **arguments).images
    return np.stack([np.asarray(p) for p in pictures])


def seed_of(prompt: str) -> int:
    """A seed derived from the prompt, the same on every machine."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def held_out_psnr_db(pipeline: DiffusionPipeline, cache: Path) -> float:
    """Mean PSNR of the autoencoder's reconstructions of all held-out pictures on white."""
    from demo.train.autoencoder import Pictures, psnr_db, reconstruct

    pictures = Pictures(cache).held_out()
    return psnr_db(reconstruct(pipeline.vae, pictures), pictures)


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927)."""
    rate, z2 = hits / n, _Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return round(centre - half, 4), round(centre + half, 4)


def as_text(result: Result) -> str:
    """The result as lines of text."""
    psnr = "not measured (needs the art)" if result.ae_psnr_db is None else f"{result.ae_psnr_db:.2f} dB"
    lines = [f"autoencoder PSNR, held-out pictures: {psnr}"]
    lines.append(f"concepts: {result.concepts}; denoising steps: {result.steps}")
    for name, r in (("trained", result.trained), ("held out", result.held_out)):
        (low1, high1), (low5, high5) = r.top1_interval, r.top5_interval
        lines.append(
            f"{name}: {r.prompts} prompts, top-1 {r.top1:.1%} (95 % interval {low1:.1%} to {high1:.1%}), "
            f"top-5 {r.top5:.1%} ({low5:.1%} to {high5:.1%})"
        )
    return "\n".join([*lines, f"seconds: {result.seconds}"])


if __name__ == "__main__":
    sys.exit(main())
