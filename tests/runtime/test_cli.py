"""The `ditc` command: help texts, exit codes, JSON, and files that are either complete or absent."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditc.runtime import cli, decode
from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.cli import FAILED, INTERRUPTED, USAGE, VERBS, main
from ditc.runtime.commands import run, run_results
from ditc.runtime.errors import OutputError

FAST = ["--steps", "1", "--threads", "1"]


def draw(bundle: Path, *arguments: str) -> int:
    return main(["run", str(bundle), *arguments, *FAST])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


# Help

# The metavar of every option that takes a number names its unit, and the help text says it with these words.
UNITS = {
    "PX": "pixels",
    "STEPS": "steps",
    "PICTURES": "pictures",
    "LORAS": "loras",
    "DRAWINGS": "drawings",
    "PROCESSES": "processes",
    "PROMPTS": "prompts",
    "THREADS": "threads",
    "CHANNELS": "channels",
    "MINUTES": "minutes",
    "FRACTION": "fraction of the steps from 0 to 1",
    "RADIANS": "radians",
    "SEED": "whole number",
    "PORT": "tcp port",
    "SECONDS": "seconds",
    "MILLISECONDS": "milliseconds",
    "REQUESTS": "requests",
    "PIXELS": "pixels",
    "JOBS": "jobs",
    "CONNECTIONS": "connections",
    "BYTES": "bytes",
    "PIXEL_STEPS": "pixel-steps",
    "SCALE": "without a unit",
    "SHIFT": "without a unit",
    "SCORE": "without a unit",
    "FRAMES": "frames",
    "INSTANCES": "instances",
    "REPLICAS": "replicas",
    "GPUS": "gpus",
    "REL_L2": "without a unit",
}


def arguments_of(verb: str) -> list[argparse.Action]:
    parser = cli._parser().verbs[verb]
    importlib.import_module(VERBS[verb].module).add_arguments(parser)
    return parser._actions


def is_sentence(text: str) -> bool:
    """Three words or more that begin with a capital letter or with code, and end with a full stop."""
    begins = re.match(r"[A-Z`]|\S*[\d_./-]\S* ", text)
    return begins is not None and len(text.split()) >= 3 and text.endswith(".")


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_text_is_a_sentence_that_names_the_default(verb: str) -> None:
    assert is_sentence(VERBS[verb].help)
    for action in arguments_of(verb):
        text = action.help or ""
        assert is_sentence(text), (action.dest, text)
        if action.option_strings and not action.required and action.dest != "help":
            assert "(default: " in text, (action.dest, text)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_that_takes_a_number_names_its_unit(verb: str) -> None:
    for action in arguments_of(verb):
        if action.type in (int, float) and not action.choices:
            assert UNITS[str(action.metavar)] in (action.help or "").lower(), action.dest


@pytest.mark.parametrize("text", ["", "Height.", "Picture height", "one prompt a line", "of the denoiser."])
def test_fragments_are_not_sentences(text: str) -> None:
    assert not is_sentence(text)


def test_the_help_of_the_command_lists_every_verb_with_its_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert all(f"{name} {verb.help}" in shown for name, verb in VERBS.items())


# Pictures


def test_a_picture_carries_what_is_needed_to_draw_it_again(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "deep" / "a.png", tmp_path / "b.png"
    assert draw(tiny_bundle, "red cat ☃", "--seed", "3", "-o", str(first), "--negative-prompt", "dog") == 0
    text = Image.open(first).text  # type: ignore[attr-defined]
    settings = json.loads(text["settings"])
    assert text["prompt"] == "red cat ☃" and text["negative_prompt"] == "dog" and text["seed"] == "3"
    assert text["bundle"] == load_manifest(tiny_bundle).digest
    assert settings["num_inference_steps"] == 1 and settings["height"] == settings["width"] == 64
    again = ["--seed", text["seed"], "--guidance-scale", str(settings["guidance_scale"]), "-o", str(second)]
    assert draw(tiny_bundle, text["prompt"], "--negative-prompt", text["negative_prompt"], *again) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    assert "seed 3" in capsys.readouterr().out


def test_a_chosen_seed_is_printed_and_reproduces_the_picture(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tiny_bundle, "cat", "-o", str(tmp_path / "a.png")) == 0
    found = re.search(r"seed (\d+)", capsys.readouterr().out)
    assert found
    assert draw(tiny_bundle, "cat", "--seed", found[1], "-o", str(tmp_path / "b.png")) == 0
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(a, b)


def _built_by(bundle: Path, ditc: str, place: Path) -> Path:
    """A copy that says it was built by that version of ditc."""
    copy = Path(shutil.copytree(bundle, place / "bundle"))
    manifest = load_manifest(copy)
    save_manifest(replace(manifest, tools={**manifest.tools, "ditc": ditc}), copy)
    return copy


def test_several_pictures_get_numbered_names(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n\n  a photo of an apple \n", encoding="utf-8")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "-n", "2", "--json", "--seed", "1"]
    assert draw(_built_by(tiny_bundle, "0.0.1", tmp_path), *arguments, "-o", str(tmp_path / "x.png")) == 0
    result = json.loads(capsys.readouterr().out)
    assert [Path(f).name for f in result["files"]] == ["x-0.png", "x-1.png", "x-2.png", "x-3.png"]
    assert result["seed"] == 1 and set(result["seconds"]) == {"text", "denoise", "decode"}
    texts = [Image.open(f).text for f in result["files"]]  # type: ignore[attr-defined]
    assert [t["prompt"] for t in texts] == ["cat", "cat", "a photo of an apple", "a photo of an apple"]
    settings = [json.loads(t["settings"]) for t in texts]
    assert [s["index"] for s in settings] == [0, 1, 2, 3]
    assert all(s["num_prompts"] == s["num_images_per_prompt"] == 2 for s in settings)
    assert {t["software"] for t in texts} == {f"ditc {version('ditc')}"}


def test_previews_are_written_after_every_step(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["cat", "-o", str(tmp_path / "x.png"), "--preview", str(tmp_path / "steps"), "--threads", "1"]
    assert main(["run", str(tiny_bundle), *arguments, "--steps", "3"]) == 0
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == ["step-000-0-0.png", "step-001-0-0.png", "step-002-0-0.png"]


def test_the_asked_size_is_the_size_of_the_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    assert draw(tiny_bundle, "cat", "--height", "32", "--width", "96", "-o", str(tmp_path / "x.png")) == 0
    assert Image.open(tmp_path / "x.png").size == (96, 32)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, INTERRUPTED, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_an_interrupted_run_ends_with_128_and_the_signal_and_leaves_no_file(
    tiny_bundle: Path, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    output, previews = tmp_path / "out" / "x.png", tmp_path / "steps"
    command = [sys.executable, "-m", "ditc.runtime.cli", "run", str(tiny_bundle), "cat", "-o", str(output)]
    process = subprocess.Popen(
        # The only batch of 10,000 steps is far from done on any machine when the first preview appears.
        [*command, "--steps", "10000", "--threads", "1", "--preview", str(previews)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts tests in the background ignores SIGINT in them, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (previews.is_dir() and any(previews.glob("step-*.png"))):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert stderr.strip().splitlines()[-1] == word and "Traceback" not in stderr
    assert not output.parent.exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_an_interrupt_while_a_compiled_module_is_imported_ends_with_130_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: argparse.Namespace) -> int:
        try:
            raise ImportError("initialization failed") from KeyboardInterrupt()
        except ImportError as e:
            raise ImportError("numpy wraps it once more") from e

    def broken(arguments: argparse.Namespace) -> int:
        raise ImportError("initialization failed")

    monkeypatch.setattr(run, "run", interrupted)
    assert main(["run", "x", "y"]) == INTERRUPTED
    assert errors(capsys) == ["interrupted"]
    monkeypatch.setattr(run, "run", broken)
    with pytest.raises(ImportError, match="initialization failed"):
        main(["run", "x", "y"])


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat", "--steps", "0"], "num_inference_steps is 0"),
        (["cat", "--height", "33"], "height 33"),
        (["cat", "-o", "x.jpg"], "x.jpg is not a .png"),
        ([], "give a PROMPT or --prompts FILE"),
        (["cat", "--prompts", "file"], "give a PROMPT or --prompts FILE"),
        (["cat", "--prompt", "dog"], "give a PROMPT or --prompts FILE"),
        (["--prompt", "cat", "--steps", "0"], "num_inference_steps is 0"),
        (["--prompts", "missing.txt"], "cannot read prompts from missing.txt"),
        (["cat", "--backend", "cuda"], "backend 'cuda' is unknown"),
        (["cat", "--precision", "bf16"], "holds denoisers for onnxruntime fp32"),
        (["cat", "--seed", "-99999999999999999999"], "seed is -99999999999999999999"),
        (["cat", "-o", "/dev/null/x.png", "--steps", "1"], "cannot write /dev/null/x.png"),
        (["cat", "-n", "1000000000"], "1 prompts x 1000000000 pictures are 1000000000 pictures"),
        (["cat", "--preview", "/dev/null/x"], "cannot write /dev/null/x/step-000-0-0.png"),
    ],
)
def test_wrong_arguments_end_with_2_and_two_lines(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(tiny_bundle), *arguments]) == USAGE
    error, hint = errors(capsys)
    assert error.startswith("error: ") and message in error
    assert hint.startswith("hint: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "several", "message"),
    [
        ("folder.png/", "1", "folder.png: it is a directory"),
        ("file/x.png", "1", "file/x.png: .*file is a file"),
        ("x.png", "2", "x-1.png: it is a directory"),
        (f"{'x' * 249}.png", "12", "x-10.png: File name too long"),
        (f"new/{'x' * 252}.png", "1", "x.png: File name too long"),
    ],
)
def test_a_place_that_takes_no_picture_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, several: str, message: str
) -> None:
    for name in ("folder.png", "x-1.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert main(["run", "no-bundle", "cat", "-n", several, "-o", f"{tmp_path}/{output}"]) == USAGE
    error, hint = errors(capsys)
    assert re.search(f"cannot write .*{message}", error) and hint == "hint: choose another -o"


def test_one_bad_picture_is_named_and_the_others_are_saved(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr(decode, "is_uniform", lambda picture: checked.append(0) or len(checked) % 3 == 2)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "x.png"
    prompts.write_text("cat\ndog\nred heart\n")
    assert draw(tiny_bundle, "--prompts", str(prompts), "-o", str(out), "--seed", "1", "--json") == FAILED
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["files"] == [f"{tmp_path}/x-0.png", None, f"{tmp_path}/x-2.png"]
    assert result["failures"][0]["index"] == 1 and result["failures"][0]["prompt"] == "dog"
    assert captured.err.startswith(
        "error: picture 1 ('dog'): vae_decoder: the picture has one colour only\nhint:"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "x-0.png", "x-2.png"]
    strict = tmp_path / "strict.png"
    assert draw(tiny_bundle, "--prompts", str(prompts), "-o", str(strict), "--strict") == USAGE
    assert not list(tmp_path.glob("strict*"))


def test_a_picture_that_cannot_be_saved_does_not_take_the_others_along(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run_results.save_png

    def fill_the_disk_once(picture: Image.Image, path: Path, metadata: dict[str, str]) -> Path:
        if path.name == "x-0.png":
            raise OutputError(f"cannot write {path}: No space left on device", hint="free some space")
        return save(picture, path, metadata)

    monkeypatch.setattr(run_results, "save_png", fill_the_disk_once)
    assert draw(tiny_bundle, "cat", "-n", "2", "-o", f"{tmp_path}/x.png", "--seed", "7") == USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["x-1.png"]
    error, hint = errors(capsys)
    assert "No space left on device; 1 of 2 pictures are written" in error and "the seed was 7" in hint


def test_a_preview_that_cannot_be_written_does_not_stop_the_drawing(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_preview_path", lambda folder, *_: folder if _[0] else folder / "x.png")
    (tmp_path / "previews").mkdir()
    out = tmp_path / "x.png"
    assert draw(tiny_bundle, "cat", "-o", str(out), "--steps", "2", "--preview", f"{tmp_path}/previews") == 0
    assert out.exists()


def test_a_missing_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "nothing"), "cat"]) == USAGE
    assert "is not a bundle" in errors(capsys)[0]


def test_a_path_that_cannot_be_looked_up_is_an_error_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["inspect", "x" * 256], ["run", "x" * 256, "cat"], ["verify", "x" * 256]):
        assert main(arguments) == USAGE
        error, hint = errors(capsys)
        assert error.endswith("File name too long") and hint.startswith("hint: check the path")


def test_with_json_an_error_is_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--json"]) == USAGE
    result = json.loads(capsys.readouterr().out)
    assert result["error"] == "BundleError" and "is not a bundle" in result["message"] and result["hint"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["draw"], "argument VERB: invalid choice: 'draw'", "ditc --help"),
        (["-v", "run"], "unrecognized arguments: -v", "ditc --help"),
        (["--nonsense"], "unrecognized arguments: --nonsense", "ditc --help"),
        (["run"], "the following arguments are required: BUNDLE", "ditc run --help"),
        (
            ["run", "x", "y", "z"],
            "unrecognized arguments: z",
            "put a text of several words in quotes; ditc run --help",
        ),
        (
            ["run", "x", "y", "--width", "wide"],
            "argument --width: invalid int value: 'wide'",
            "ditc run --help",
        ),
    ],
)
def test_a_line_that_does_not_parse_ends_with_2_and_two_lines(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == USAGE
    error, advice = errors(capsys)
    assert error.startswith(f"error: {message}") and advice == f"hint: {hint}"
    assert main([*arguments, "--json"]) == USAGE
    result = json.loads(capsys.readouterr().out)
    assert (
        result["error"] == "UsageError" and result["message"].startswith(message) and result["hint"] == hint
    )


@pytest.mark.parametrize(
    "line",
    [
        ["BUNDLE", "cat", "--steps", "2", "--seed", "-1"],
        ["BUNDLE", "--steps", "2", "--seed", "-1", "cat"],
        ["--steps", "2", "BUNDLE", "--seed", "-1", "--", "cat"],
        ["--seed=-1", "--num-inference-steps=2", "BUNDLE", "cat"],
    ],
)
def test_options_may_stand_before_between_and_after_the_prompt(
    line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(run, "run", lambda arguments: seen.append(arguments) or 0)
    assert main(["run", *line]) == 0
    (read,) = seen
    assert (read.bundle, read.prompt, read.num_inference_steps, read.seed) == (Path("BUNDLE"), "cat", 2, -1)


def test_no_verb_prints_the_help_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == USAGE
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and re.fullmatch(r"ditc \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_missing_library_prints_its_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_torch(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", no_torch)
    assert main(["build", "x", "-o", "y"]) == USAGE
    assert errors(capsys) == ["error: torch is not installed", 'hint: pip install "ditc[export]"']
