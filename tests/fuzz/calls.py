"""Odd requests and odd command lines for undamaged bundles."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import shlex
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutate
from fuzz.bundles import Bundles
from fuzz.child import WrongResult
from PIL import Image
from records import make_keys

from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import FAILED, USAGE, VERBS, main
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
    if request.get("return_dict") is False:
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


# What is named on a command line may be written to, so these name nothing outside.
TEXTS = tuple(text for text in mutate.TEXTS if not text.startswith(("/", ".")))
HEAVY = ("build", "parity", "calibrate", "convert")
OFFLINE = ("pull", "push")


class CommandLines(Bundles):
    """A command line does what it says and ends with 0, or says what is wrong with it and ends with 1 or 2."""

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        super().__init__(subjects, folder)
        (folder / "home" / "keys").mkdir()
        make_keys(folder / "home" / "keys")
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        for name, verb in VERBS.items():
            if name not in HEAVY:
                self.parsers[name] = argparse.ArgumentParser(prog=name, add_help=False)
                importlib.import_module(verb.module).add_arguments(self.parsers[name])

    def attempt(self, chooser: random.Random, work: Path) -> str:
        _, _bundle = self.take(chooser, work)
        for key in (self.folder / "home" / "keys").iterdir():
            shutil.copy(key, work)
        (work / "prompts.txt").write_text("a red cat\na blue dog\n")
        verb = chooser.choice(["run"] * 12 + ["verify", "sign"] * 4 + list(self.parsers))
        argv = _usual(verb) + _options(self.parsers[verb], chooser)
        argv = _damaged(argv, chooser)
        try:
            code = main([verb, *argv])
        except SystemExit as end:
            code = end.code
            if not {"-h", "--help"} & {argument[:2] for argument in argv} | set(argv) or code != 0:
                raise WrongResult(f"{shlex.join(argv)}: sys.exit({code!r})") from end
            return "help"
        if code == USAGE:
            return "refused"
        if code not in (0, FAILED):
            raise WrongResult(f"{verb} {argv!r}: ended with {code}")
        self._check_done(verb, argv, code)
        return f"{verb} {code}"

    def _check_done(self, verb: str, argv: list[str], code: int) -> None:
        """What was asked for is there."""
        parser = self.parsers[verb]
        options, _ = parser.parse_known_intermixed_args(
            [a for a in argv if a not in ("-v", "--verbose", "-vv")]
        )
        if verb == "sign" and code == 0:
            from ditc.runtime.bundle.signature import check_signature

            check_signature(Path(options.bundle), load_manifest(Path(options.bundle)), Path("public.pem"))
        if verb == "verify" and code == 0:
            check_bundle(Path(options.bundle), load_manifest(Path(options.bundle)))
        if verb == "run" and code == 0:
            prompts = 1 if options.prompts is None else 2
            count = prompts * options.num_images_per_prompt
            output = Path(options.output)
            paths = (
                [output] if count == 1 else [output.with_name(f"{output.stem}-{i}.png") for i in range(count)]
            )
            for path in paths:
                with Image.open(path) as image:
                    image.load()
                    settings = json.loads(image.text["settings"])  # type: ignore[attr-defined]
                    wanted = (options.width or settings["width"], options.height or settings["height"])
                    if image.size != wanted:
                        raise WrongResult(f"{path} has {image.size}, not {wanted}")


def _usual(verb: str) -> list[str]:
    """A command line that works."""
    return {
        "run": ["bundle", "a red cat", "--steps", "1", "--seed", "1", "--threads", "1"],
        "sign": ["bundle", "--key", "key.pem"],
        "doctor": [],
        "verify": ["bundle", "--run"],
        "pull": ["someone/something", "-o", "pulled"],
        "push": ["bundle", "someone/something"],
    }.get(verb, ["bundle"])


def _options(parser: argparse.ArgumentParser, chooser: random.Random) -> list[str]:
    """Some of a verb's options with values."""
    argv = []
    actions = [action for action in parser._actions if action.option_strings]
    for action in mutate.pick_some(actions, chooser, 3):
        argv.append(chooser.choice(action.option_strings))
        if action.nargs != 0:
            argv.append(_text_for(action, chooser))
    return argv


SENSIBLE_TEXTS = {
    "NUMBERS": ("1.0,0.5", "999,500", "1", "0.5,1", "nan", "1,,2"),
    "FILE": ("out.png", "new/out.png", "prompts.txt", "-", "bundle/manifest.json", "bundle"),
    "DIR": ("new", "bundle", "prompts.txt"),
    "KEY.pem": ("key.pem", "public.pem", "bundle"),
    "PUBLIC.pem": ("public.pem", "key.pem", "bundle"),
    "GPU": ("0", "1", "-1", "GPU-1234"),
}


def _text_for(action: argparse.Action, chooser: random.Random) -> str:
    if chooser.random() < 0.1:
        return chooser.choice(TEXTS)
    if action.choices:
        return str(chooser.choice([*action.choices]))
    if action.type is int:
        return str(chooser.choice([1, 2, 3, 32, 64, 1, 2, 3, 32, 64, 0, -1, 10**9, 2**64, "1.5", "1e3"]))
    if action.type is float:
        return str(chooser.choice([0, 1, 0.5, 4.5, 0, 1, 0.5, 4.5, -1, "nan", "inf", 1e308, "1e999", "0x1"]))
    return chooser.choice(SENSIBLE_TEXTS.get(str(action.metavar), ("a cat", "", "bundle")))


def _damaged(argv: list[str], chooser: random.Random) -> list[str]:
    argv = list(argv)
    for _ in range(chooser.choice([0, 0, 0, 1, 2])):
        place = chooser.randrange(len(argv)) if argv else 0
        kind = chooser.randrange(5)
        if kind == 0 and argv:
            del argv[place]
        elif kind == 1 and argv:
            argv[place] = chooser.choice(TEXTS)
        elif kind == 2:
            argv.insert(place, chooser.choice([*TEXTS, "--json", "-h", "--verbose", "--no-such-option"]))
        elif kind == 3 and argv:
            argv.insert(place, argv[place])
        else:
            chooser.shuffle(argv)
    return argv
