"""``python -m demo.evaluate [--quick] [--json]``: does the shipped checkpoint draw what it is asked for?

Everything is drawn by unmodified diffusers with the defaults of ``ditc.json``. A picture counts as right
when the nearest reference picture, of all concepts in all styles, shows the prompted concept.
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
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from demo.concepts import CHECKPOINT_DIR, Pair, Split, caption, load_split, order_by_hash
from demo.errors import DemoError
from demo.references import concept_ranks

if TYPE_CHECKING:
    from diffusers import SanaPipeline

_QUICK_PAIRS = 32  # of each kind
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
    """What the evaluation found; ``ae_psnr_db`` is None where the art was not at hand (``--quick``)."""

    ae_psnr_db: float | None
    concepts: int
    trained: Retrieval
    held_out: Retrieval
    seconds: float
    quick: bool


def main() -> int:
    """Parse the arguments, evaluate, print."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 fixed prompts, half held out; needs no art")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT_DIR, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=_CACHE, help="the art, for the autoencoder's figure")
    args = parser.parse_args()
    try:
        result = evaluate(args.checkpoint, args.cache, quick=args.quick)
    except DemoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)) if args.json else as_text(result))
    return 0


def evaluate(checkpoint: Path, cache: Path, *, quick: bool) -> Result:
    """Draw and judge the prompts of all pairs, or of 64.

    Raises:
        DemoError: the checkpoint or the references are missing, or the art is not available for a full run.
    """
    split = load_split()
    trained, held_out = quick_pairs(split) if quick else (split.trained, split.held_out)
    if not quick:
        from demo.train import art

        art.build(cache)
    started = time.monotonic()
    pipeline = load_pipeline(checkpoint)
    pairs = trained + held_out
    drawn = draw(pipeline, [caption(p) for p in pairs], defaults(checkpoint))
    ranks = concept_ranks(drawn, [p.concept for p in pairs], split)
    return Result(
        ae_psnr_db=None if quick else held_out_psnr_db(pipeline, cache),
        concepts=len({p.concept for p in split.trained}),
        trained=Retrieval.of(ranks[: len(trained)]),
        held_out=Retrieval.of(ranks[len(trained) :]),
        seconds=round(time.monotonic() - started, 1),
        quick=quick,
    )


def quick_pairs(split: Split) -> tuple[list[Pair], list[Pair]]:
    """The fixed pairs of the quick run: the first of each kind in the order of their hashes."""
    return order_by_hash(split.trained)[:_QUICK_PAIRS], order_by_hash(split.held_out)[:_QUICK_PAIRS]


def load_pipeline(checkpoint: Path) -> SanaPipeline:
    """The checkpoint in fp32, through diffusers alone."""
    import torch
    from diffusers import SanaPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not (checkpoint / "model_index.json").is_file():
        raise DemoError(f"{checkpoint} holds no model_index.json.", "run: make demo-checkpoint")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = SanaPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def defaults(checkpoint: Path) -> dict[str, object]:
    """The checkpoint's inference defaults as arguments of SanaPipeline."""
    stated = json.loads((checkpoint / "ditc.json").read_text(encoding="utf-8"))
    return {**{k: v for k, v in stated.items() if k != "resolution_bins"}, "use_resolution_binning": False}


def draw(pipeline: SanaPipeline, prompts: list[str], arguments: dict[str, object]) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3); the noise of each depends on its prompt alone, not on the batch."""
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
    """A seed that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def held_out_psnr_db(pipeline: SanaPipeline, cache: Path) -> float:
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
    """The result for a reader."""
    psnr = "not measured (needs the art)" if result.ae_psnr_db is None else f"{result.ae_psnr_db:.2f} dB"
    lines = [f"autoencoder PSNR, held-out pictures: {psnr}", f"concepts: {result.concepts}"]
    for name, r in (("trained", result.trained), ("held out", result.held_out)):
        (low1, high1), (low5, high5) = r.top1_interval, r.top5_interval
        lines.append(
            f"{name}: {r.prompts} prompts, top-1 {r.top1:.1%} (95 % interval {low1:.1%} to {high1:.1%}), "
            f"top-5 {r.top5:.1%} ({low5:.1%} to {high5:.1%})"
        )
    return "\n".join([*lines, f"seconds: {result.seconds}"])


if __name__ == "__main__":
    sys.exit(main())
