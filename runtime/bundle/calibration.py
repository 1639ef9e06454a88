"""What the calibrated ranges of an 8-bit artifact rest on, and the reasons to doubt them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.bundle.jsondata import from_json
from ditc.runtime.bundle.manifest import Artifact

RECORD_KEY = "calibration"  # the name of this part in the record that Artifact.quantization names

# Bounds from the demo model's INT8 pictures (benchmarks/results/calibration_evidence-*.json, docs/calibration.md).
FEWEST_PROMPTS = 16
LEAST_SHARE_OF_STEPS = 0.25
MOST_HALF_LOSS_DB = 1.0
# The built-in general prompts have 2.4 bytes per token with the demo's vocabulary, and 3.9 and 4.2 with those of two
# published text encoders; the demo's own prompts have 6.0.
LEAST_BYTES_PER_TOKEN = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What ranges rest on.

    Attributes:
        prompts: number of prompts that differ after tokenizing.
        num_inference_steps: steps of each prompt.
        usual_steps: the checkpoint's default number of steps.
        buckets: parts of the schedule that were counted separately.
        bytes_per_token: UTF-8 bytes of the prompts per token. A byte that the vocabulary does not know is one token.
        halves: how many of the prompts are in each of two halves, whose ranges are compared.
        half_loss_db: how much more noise INT8 makes on one half with the other half's range than with its own, in dB:
            nine of ten tensors lose at most this. None if a half is empty.
        half_loss_layer: the layer whose input loses most; "" if there is none.
    """

    prompts: int
    num_inference_steps: int
    usual_steps: int
    buckets: int
    bytes_per_token: float
    halves: tuple[int, int]
    half_loss_db: float | None
    half_loss_layer: str

    def __str__(self) -> str:
        text = (
            f"ranges of {self.prompts} prompts x {self.num_inference_steps} steps in {self.buckets} parts of the "
            f"schedule, {self.bytes_per_token:.1f} bytes of text per token"
        )
        if self.half_loss_db is None:
            return text + "; too few prompts to compare two halves"
        return f"{text}; the ranges of two halves agree within {self.half_loss_db:.1f} dB"

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the ranges may not hold for other prompts, each with what helps; empty if nothing speaks against them."""
        doubts = []
        if self.prompts < FEWEST_PROMPTS:
            doubts.append(
                f"the ranges rest on {self.prompts} prompt(s): calibrate with at least {FEWEST_PROMPTS}, better with 64"
            )
        if self.num_inference_steps < LEAST_SHARE_OF_STEPS * self.usual_steps:
            doubts.append(
                f"the ranges rest on {self.num_inference_steps} step(s) per prompt, but this model takes "
                f"{self.usual_steps}: calibrate without --steps"
            )
        if self.bytes_per_token < LEAST_BYTES_PER_TOKEN:
            doubts.append(
                f"the calibration prompts have {self.bytes_per_token:.1f} bytes of text per token: this model's "
                "tokenizer was made for other words (its own have about 4 to 6), so give --prompts with texts like "
                "those that the model was trained on"
            )
        if self.half_loss_db is not None and self.half_loss_db > MOST_HALF_LOSS_DB:
            doubts.append(
                f"the ranges of two halves of the prompts disagree by {self.half_loss_db:.1f} dB, most at the input of "
                f"{self.half_loss_layer}, so other prompts may exceed them: calibrate with more prompts"
            )
        return tuple(doubts)


def read_calibration(bundle: Path, artifact: Artifact) -> Calibration | None:
    """What the artifact's ranges rest on; None if it has none, or if an older version of ditc has built it."""
    if artifact.quantization is None:
        return None
    try:
        record = json.loads((bundle / artifact.quantization.path).read_bytes())
        return from_json(Calibration, record[RECORD_KEY])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
