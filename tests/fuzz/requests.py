"""Odd requests to undamaged bundles."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutate
from fuzz.bundles import Bundles
from fuzz.child import WrongResult

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import INTEGERS, NUMBERS
from ditc.runtime.rng import Generator

Choose = Callable[[random.Random], Any]
PROMPTS = (
    "a red cat",
    "",
    "é" * 40,
    "a " * 300,
    "\x1b[2J",
    "\u202etac",
    "a\0b",
    "😀 <bos> </s> <pad>",
    "\ud800",
    "x" * 100_000,
)


def _array(*shape: int) -> Choose:
    def make(chooser: random.Random) -> Any:
        rank = [size if chooser.random() < 0.8 else chooser.choice([0, 1, 2, 77]) for size in shape]
        array = np.random.default_rng(chooser.randrange(9)).standard_normal(rank)
        return array.astype(
            chooser.choice([np.float32, np.float32, np.float64, np.float16, np.int64, np.bool_])
        )

    return make


def _one_of(*values: Any) -> Choose:
    return lambda chooser: chooser.choice(values)


# For each argument, values that may be sensible. Any argument may get another one's values, or none of this world.
SENSIBLE: dict[str, Choose] = {
    "prompt": lambda chooser: chooser.choice(
        [chooser.choice(PROMPTS), mutate.pick_some(PROMPTS, chooser, 3)]
    ),
    **{
        name: _one_of(*PROMPTS, None, ["a", "b"], [])
        for name in ("negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
    },
    "num_inference_steps": _one_of(1, 2, 5, 30, np.int64(3), True),
    "timesteps": _one_of([999, 500], [1000.0, 1.0], (), [1, 2, 3], [0], np.array([900, 300])),
    "sigmas": _one_of([1.0, 0.5], [0.5, 1.0], [0.0], [float("nan")], [1.0] * 9, np.linspace(1, 0.1, 4)),
    "mu": _one_of(0.0, 1.0, -3, 50.0, 800.0),
    "guidance_scale": _one_of(0, 1, 1.0, 4.5, 100.0, -1, np.float32(2)),
    "height": _one_of(32, 64, 96, 63, 16, np.int32(64), 64.0),
    "width": _one_of(32, 64, 128, 1, 0),
    "seed": _one_of(0, 1, 2**32, 2**63, 2**64, -1, np.uint64(5)),
    "generator": lambda chooser: chooser.choice(
        [Generator(1), [Generator(1)], [Generator(1)] * 2, [], "cuda"]
    ),
    "num_images_per_prompt": _one_of(1, 2, 3, 7),
    "latents": _array(1, 8, 32, 32),
    "prompt_embeds": _array(1, 12, 24),
    "prompt_attention_mask": _array(1, 12),
    "negative_prompt_embeds": _array(1, 12, 24),
    "negative_prompt_attention_mask": _array(1, 12),
    "pooled_prompt_embeds": _array(1, 24),
    "negative_pooled_prompt_embeds": _array(1, 24),
    "max_sequence_length": _one_of(1, 2, 12, 77, 256, 300, 100_000),
    "complex_human_instruction": _one_of(None, [], ["a"], "abc", ["a" * 5000], [1], ["a"] * 3000),
    "skip_guidance_layers": _one_of(None, [], [0], [1], [0, 1, 2], [-1], [99]),
    "skip_layer_guidance_scale": _one_of(0, 2.8, -1, 1e6),
    "skip_layer_guidance_start": _one_of(0, 0.01, 0.9, 2),
    "skip_layer_guidance_stop": _one_of(0.2, 1.0, 0, -1),
    "pag_scale": _one_of(0, 3.0, -1, 1e6),
    "pag_adaptive_scale": _one_of(0, 0.003, -1, 1e6),
    "guidance_interval": _one_of(None, (0, 1), (0.2, 0.8), (0.5, 0.5), (1, 0), [0.1], "ab", (0.0, 1e-9)),
    "use_resolution_binning": _one_of(True, False, None, 1),
    "output_type": _one_of("pil", "np", "latent", "pt", "", None),
    "allow_uniform": _one_of(True, False),
    "strict": _one_of(True, False),
    "callback_on_step_end": _one_of(None, 3, "print"),
    "eta": _one_of(0.0, 1.0),
    "clip_skip": _one_of(None, 1),
    "return_dict": _one_of(True, False),
}


class Requests(Bundles):
    """A request gives as many finite pictures of the size that it names as it asks for, or is refused."""

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        super().__init__(subjects, folder)
        self.stack = ExitStack()
        self.pipelines = {
            name: self.stack.enter_context(Pipeline.load(path, threads=1)) for name, path in subjects.items()
        }

    def attempt(self, chooser: random.Random, work: Path) -> str:
        name = chooser.choice(list(self.pipelines))
        request: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 2}
        for argument in mutate.pick_some(list(SENSIBLE), chooser, 3):
            request[argument] = _argument(argument, chooser)
        output = self.pipelines[name](**request)
        _check_output(request, output, self.pipelines[name])
        return "drawn"


def _argument(name: str, chooser: random.Random) -> Any:
    kind = chooser.randrange(10)
    if kind < 6:
        return SENSIBLE[name](chooser)
    if kind < 8:
        return mutate.value(chooser)
    return SENSIBLE[chooser.choice(list(SENSIBLE))](chooser)


def _check_output(request: dict[str, Any], output: Any, pipeline: Pipeline) -> None:
    for name in (*INTEGERS, *NUMBERS):
        given = request.get(name)
        if given is not None and not (
            np.isscalar(given) and not isinstance(given, str | bytes) and math.isfinite(given)
        ):
            raise WrongResult(f"{name}={given!r:.80} was accepted")
    if isinstance(output, tuple):  # return_dict=False
        output, images = None, output[0]
    else:
        images = output.images
    prompt = request.get("prompt")
    prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)
    if prompt is None and request.get("prompt_embeds") is not None:
        prompts = len(request["prompt_embeds"])
    wanted = prompts * int(request.get("num_images_per_prompt") or 1)
    if len(images) != wanted:
        raise WrongResult(f"{len(images)} pictures for {request!r:.300}, not {wanted}")
    failed = {failure.index for failure in output.failures} if output is not None else set()
    defaults = pipeline.manifest.defaults
    size = (int(request.get("height") or defaults.height), int(request.get("width") or defaults.width))
    if request.get("output_type") == "latent":
        return
    for index, image in enumerate(images):
        if image is None and (index in failed or output is None):
            continue
        array = np.asarray(image)
        if array.shape != (*size, 3) or not np.isfinite(array).all():
            raise WrongResult(
                f"picture {index} is {array.shape}, not {size}, or not finite: {request!r:.300}"
            )
