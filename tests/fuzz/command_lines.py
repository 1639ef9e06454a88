"""Odd command lines, whose files are undamaged."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shlex
import shutil
from pathlib import Path

from fuzz import mutate
from fuzz.child import WrongResult
from PIL import Image
from records import make_keys

from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.bundle.signature import check_signature
from ditc.runtime.cli import FAILED, USAGE, VERBS, main

# What is named on a command line may be written to, so these name nothing outside.
TEXTS = tuple(text for text in mutate.TEXTS if not text.startswith(("/", ".")))
# Command lines that work, each in a folder with the files that it names.
USUAL = {
    "run": ["bundle", "a red cat", "--steps", "1", "--seed", "1", "--threads", "1"],
    "verify": ["bundle", "--run"],
    "inspect": ["bundle"],
    "sign": ["bundle", "--key", "key.pem"],
    "doctor": [],
    "pull": ["someone/something", "-o", "pulled"],
    "push": ["bundle", "someone/something"],
}
OFTEN = ("run",) * 12 + ("verify", "sign") * 4
USUAL_OF_THE_EXPORTER = {
    "build": ["checkpoint", "-o", "bundle"],
    "parity": ["bundle", "--against", "checkpoint", "--level", "stage", "--seeds", "0"],
    "calibrate": ["checkpoint", "-o", "ranges.safetensors", "--num-prompts", "1", "--steps", "1"],
    "convert": ["checkpoint", "native.safetensors", "--to-native"],
}
# Tests of engines have their own places.
LEFT_OUT = ("tensorrt-rtx", "tensorrt")


class CommandLines:
    """A command line does what it says and ends with 0, or says what is wrong with it and ends with 1 or 2."""

    usual = USUAL
    often: tuple[str, ...] = OFTEN

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        self.subjects = subjects
        self.keys = folder / "home" / "keys"
        self.keys.mkdir()
        make_keys(self.keys)
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        for name in self.usual:
            self.parsers[name] = argparse.ArgumentParser(prog=name, add_help=False)
            importlib.import_module(VERBS[name].module).add_arguments(self.parsers[name])

    def lay_out(self, chooser: random.Random, work: Path) -> None:
        """Put the files that command lines name into the working folder."""
        skip = shutil.ignore_patterns(".build")
        shutil.copytree(self.subjects[chooser.choice(list(self.subjects))], work / "bundle", ignore=skip)

    def attempt(self, chooser: random.Random, work: Path) -> str:
        self.lay_out(chooser, work)
        for key in self.keys.iterdir():
            shutil.copy(key, work)
        (work / "prompts.txt").write_text("a red cat\na blue dog\n")
        verb = chooser.choice([*self.often, *self.parsers])
        argv = _damaged(self.usual[verb] + _options(self.parsers[verb], chooser), chooser)
        try:
            code = main([verb, *argv])
        except SystemExit as end:
            if end.code != 0 or not any("-h" in argument for argument in argv):
                raise WrongResult(f"{verb} {shlex.join(argv)}: sys.exit({end.code!r})") from end
            return "help"
        if code == USAGE:
            return "refused"
        if code not in (0, FAILED):
            raise WrongResult(f"{verb} {shlex.join(argv)} ended with {code}")
        if code == 0:
            options, _ = self.parsers[verb].parse_known_intermixed_args(argv)
            check_done(verb, options)
        return f"{verb} {code}"


class CommandLinesOfTheExporter(CommandLines):
    """The same for verbs that read checkpoints. Most of what they have to do is done already."""

    usual = USUAL_OF_THE_EXPORTER
    often = ()

    def lay_out(self, chooser: random.Random, work: Path) -> None:
        shutil.copytree(self.subjects["checkpoint"], work / self.subjects["checkpoint"].name)
        (work / "checkpoint").symlink_to(self.subjects["checkpoint"].name)
        shutil.copytree(self.subjects["bundle"], work / "bundle")


def check_done(verb: str, options: argparse.Namespace) -> None:
    """Raise WrongResult, or another error, unless what was asked for is there."""
    if verb in ("build", "sign", "verify"):
        bundle = Path(options.output if verb == "build" else options.bundle)
        check_bundle(bundle, load_manifest(bundle))
        if verb == "sign" or (verb == "build" and options.sign):
            check_signature(bundle, load_manifest(bundle), Path("public.pem"))
    elif verb == "run":
        _check_pictures(options)
    elif verb in ("calibrate", "convert"):
        output = Path(options.output if verb == "calibrate" else options.out)
        if not output.exists():
            raise WrongResult(f"{verb}: there is no {output}")


def _check_pictures(options: argparse.Namespace) -> None:
    count = options.num_images_per_prompt * (1 if options.prompts is None else 2)
    output = Path(options.output or "out.png")
    paths = [output.with_name(f"{output.stem}-{i}.png") for i in range(count)] if count > 1 else [output]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            settings = json.loads(image.text["settings"])  # type: ignore[attr-defined]
            wanted = (options.width or settings["width"], options.height or settings["height"])
            if image.size != wanted:
                raise WrongResult(f"{path} has {image.size}, not {wanted}")


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
        return str(chooser.choice([choice for choice in action.choices if choice not in LEFT_OUT]))
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
