"""What do few prompts, few steps or the wrong words cost the demo model in INT8, and which evidence shows it?

    python -m benchmarks.calibration_evidence

Each variant is calibrated as `ditc calibrate` does it, and 16 other prompts are drawn in PyTorch with the graph's
rounding. Their PSNR to fp32, from the same noise, stands beside what the ranges say about themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import write
from demo.concepts import CHECKPOINT_DIR
from ditc.calib.collect import Settings, collect
from ditc.calib.prompts import GENERAL, read_prompts
from ditc.calib.sensitivity import base_recipe
from ditc.calib.trial import Trial
from ditc.export.quant.evidence import calibration_of
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import make_plan
from ditc.parity.reference.pytorch import TorchModel


def main() -> None:
    """Calibrate each variant, draw with its ranges, and write the table after each."""
    own, general = read_prompts(GENERAL.with_name("demo.txt")), read_prompts(GENERAL)
    trial = Trial(TorchModel(CHECKPOINT_DIR), own[5::25][:16], seed=1000)
    chosen = own[0::12]  # none of those that are drawn
    variants = {f"{count} prompts": (chosen[:count], None) for count in (35, 16, 8, 4, 2, 1)}
    variants |= {f"35 prompts, {steps} of 20 steps": (chosen, steps) for steps in (10, 5, 2, 1)}
    variants |= {
        "1 prompt, 1 of 20 steps": (chosen[:1], 1),
        "34 general prompts": (general[0::8], None),
        "8 general prompts": (general[0::34][:8], None),
    }
    results = {}
    for name, (prompts, steps) in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "ranges.safetensors"
            ranges = collect(CHECKPOINT_DIR, prompts, out, Settings(num_inference_steps=steps))
        plan = make_plan(base_recipe(Format.INT8, trial.family), ranges, trial.layers)
        calibration = calibration_of(ranges)
        results[name] = {
            **asdict(trial.fidelity(plan.layers)),
            **asdict(calibration),
            "doubts": calibration.doubts,
        }
        print(name, json.dumps(results[name]), file=sys.stderr)
        print(write("calibration_evidence", results))


if __name__ == "__main__":
    main()
