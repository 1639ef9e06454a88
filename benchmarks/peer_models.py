"""Prepares what the contestants of benchmarks/cpu_peers.py load: checkpoints, bundles, optimum-intel's exports.

    CACHE/MODEL/checkpoint    in diffusers layout, with seeded random weights
    CACHE/MODEL/ditc-*        ditc's bundle for a backend, with all precisions; ranges.safetensors lies beside it
    CACHE/MODEL/optimum-*     optimum-intel's exports

Everything is made once, in child processes, so that no memory stays behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peer_cases import DEMO, Contestant, Model
from ditc.runtime.atomic import atomic_folder

HERE = Path(__file__).parent
WORKER, EXPORT = HERE / "peer_worker.py", HERE / "peer_export.py"
REQUIREMENTS = HERE / "peer_requirements.txt"
PROMPTS = HERE.parent / "calib" / "prompts" / "demo.txt"
DITC = ("-m", "ditc.runtime.cli")


class PrepareError(Exception):
    """A contestant's model cannot be made. The message has the last line that the command printed."""


def make_environment(folder: Path) -> Path:
    """Make the environment of optimum-intel, and return its Python.

    Its pins do not go together with ditc's: it needs huggingface-hub below 1.22. The file of requirements is also the
    constraint, because pip would replace torch to satisfy torchvision. torchvision itself is removed, because PyPI's
    build of it needs CUDA and breaks transformers' imports where there is none; Sana does not use it.

    Raises:
        PrepareError: pip fails, or what it installed cannot be imported.
    """
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(REQUIREMENTS)]
    run([*pip, "torch"])
    run([*pip, "--requirement", str(REQUIREMENTS)])
    run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
    run([str(python), "-c", "from optimum.intel.openvino import OVSanaPipeline"], bare=True)
    return python


def checkpoint_of(model: Model, cache: Path) -> Path:
    """The checkpoint of a model, in diffusers layout."""
    return model.source or cache / model.name / "checkpoint"


def loads(contestant: Contestant, model: Model, cache: Path) -> Path:
    """The folder that the contestant loads."""
    return cache / model.name / contestant.build if contestant.build else checkpoint_of(model, cache)


def prepare(
    model: Model, contestants: Sequence[Contestant], cache: Path, peer: Path | None
) -> dict[str, str]:
    """Make whatever is missing for these contestants. Returns, by contestant, why its model could not be made."""
    failed: dict[str, str] = {}
    if model.source is None and not checkpoint_of(model, cache).exists():
        code = f"from benchmarks.peer_models import write_checkpoint; write_checkpoint({model!r}, {str(cache)!r})"
        run([sys.executable, "-c", f"from benchmarks.peer_cases import Model; {code}"])
    for contestant in contestants:
        try:
            if contestant.kind == "ditc":
                build(model, contestant, cache)
            elif contestant.kind == "optimum":
                export(model, contestant, cache, peer)
        except PrepareError as e:
            failed[contestant.name] = str(e)
    return failed


def build(model: Model, contestant: Contestant, cache: Path) -> None:
    """Add the contestant's precision to the bundle. ditc itself knows what of it is there and up to date."""
    backend, precision = contestant.settings["backend"], contestant.settings["precision"]
    checkpoint, bundle = checkpoint_of(model, cache), loads(contestant, model, cache)
    ranged: list[object] = []
    if precision == "int8":
        ranged += ["--ranges", ranges_of(model, cache)]
    if "stage_precision" in contestant.settings:
        ranged += ["--recipe", "dc-ae-int8", "--ranges", ranges_of(model, cache, "vae_decoder")]
    run(
        [
            *(sys.executable, *DITC, "build", checkpoint, "-o", bundle),
            *("--backend", backend, "--precision", precision, "--max-batch", 2, *ranged),
        ]
    )


def ranges_of(model: Model, cache: Path, stage: str = "denoiser") -> Path:
    """The file of a stage's ranges, which is measured if it is not there."""
    ranges = (
        cache / model.name / ("ranges.safetensors" if stage == "denoiser" else f"ranges-{stage}.safetensors")
    )
    if not ranges.exists():
        prompts, steps = model.calibration
        settings = ["--prompts", PROMPTS, "--num-prompts", prompts, "--steps", steps, "--stage", stage]
        run([sys.executable, *DITC, "calibrate", checkpoint_of(model, cache), "-o", ranges, *settings])
    return ranges


def export(model: Model, contestant: Contestant, cache: Path, peer: Path | None) -> None:
    """Export the checkpoint with optimum-intel, if that has not been done."""
    folder = loads(contestant, model, cache)
    if folder.exists():
        return
    if peer is None:
        raise PrepareError("optimum-intel has no environment here: --make-peer-env DIR makes one")
    with atomic_folder(folder) as partial:
        weights = contestant.settings["weights"]
        run([peer, "-P", EXPORT, checkpoint_of(model, cache), partial, weights], bare=True)


def write_checkpoint(model: Model, cache: str) -> None:
    """Write a Sana checkpoint with random weights, from seed 0, around the demo's tokenizer and scheduler."""
    import json

    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    def arguments(config: Mapping[str, object]) -> dict[str, object]:
        return {key: value for key, value in config.items() if key != "_class_name"}

    torch.manual_seed(0)
    pipe = SanaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(DEMO / "tokenizer"),
        text_encoder=Gemma2Model(Gemma2Config(**model.text_encoder)).eval(),
        vae=AutoencoderDC(**arguments(model.vae)).eval(),
        transformer=SanaTransformer2DModel(**arguments(model.transformer or {})).eval(),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(DEMO / "scheduler"),
    )
    with atomic_folder(checkpoint_of(model, Path(cache))) as partial:
        pipe.save_pretrained(partial)
        # Few steps, because every 8-bit build draws with the defaults to see what it lost.
        defaults = {
            **{"resolution_bins": None, "complex_human_instruction": None},
            **{"num_inference_steps": 2},
        }
        (partial / "ditc.json").write_text(json.dumps(defaults))


def run(command: Sequence[object], *, bare: bool = False) -> None:
    """Run a command, and show what it prints.

    Args:
        bare: leave out PYTHONPATH, which belongs to this environment and not to another one.

    Raises:
        PrepareError: it fails.
    """
    words = [str(word) for word in command]
    sys.stderr.write(f"$ {' '.join(words)[:300]}\n")
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(bare=bare),
        check=False,
    )
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        raise PrepareError((lines or [f"{words[0]} ended with {done.returncode}"])[-1][:300])


def environment(*, bare: bool, threads: int = 0, cache: Path | None = None) -> dict[str, str]:
    """The variables of a child process. What torch.compile has compiled is kept in the cache."""
    found = {name: value for name, value in os.environ.items() if not (bare and name == "PYTHONPATH")}
    if threads:
        found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if cache is not None:
        found["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    return {**found, "HF_HUB_OFFLINE": "1"} if cache is not None else found
