"""LoadOptions: the same in the API and on the command line. Bad values are refused before a file is read."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime import opening
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import DEFAULTS, LoadKeywords, LoadOptions, add_load_arguments, load_options
from ditc.runtime.pipeline import Pipeline

# For every option, a value other than its default, as the command line writes it and as the field holds it.
CHOICES: dict[str, tuple[list[str], Any]] = {
    "backend": (["--backend", "tensorrt"], "tensorrt"),
    "precision": (["--precision", "fp16"], "fp16"),
    "threads": (["--threads", "3"], 3),
    "provider": (["--provider", "cuda"], "cuda"),
    "device": (["--device", "1"], "1"),
    "low_vram": (["--low-vram"], True),
    "stage_precision": (["--stage-precision", "vae_decoder=int8"], "vae_decoder=int8"),
    "require_signature": (["--require-signature", "key.pem"], Path("key.pem")),
    "require_certificate": (["--require-certificate"], True),
    "private_copy": (["--private-copy"], True),
    "self_test": (["--no-self-test"], False),
}
NAMES = [field.name for field in fields(LoadOptions)]


def parsed(arguments: list[str], *names: str) -> LoadOptions:
    parser = argparse.ArgumentParser()
    add_load_arguments(parser, *names)
    return load_options(parser.parse_args(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_an_argument_and_a_keyword(name: str) -> None:
    arguments, value = CHOICES[name]
    assert parsed(arguments) == LoadOptions(**{name: value}) != DEFAULTS
    assert name in LoadKeywords.__annotations__ and len(LoadKeywords.__annotations__) == len(NAMES)


def test_without_arguments_the_defaults_are_the_options_own() -> None:
    assert parsed([]) == parsed([], "backend", "threads") == DEFAULTS


def test_a_verb_may_have_only_some_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(["--threads", "2"], "threads") == LoadOptions(threads=2)
    with pytest.raises(SystemExit):
        parsed(["--low-vram"], "threads")
    assert "--low-vram" in capsys.readouterr().err


def test_every_help_text_is_sentences_with_the_default() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_load_arguments(parser, when="Only sometimes.")
    for action in parser._actions:
        text = action.help or ""
        assert text.startswith("Only sometimes. ") and text.endswith(".") and "(default: " in text, text


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            {"backend": "cuda"},
            "backend 'cuda' is unknown",
            "choose one of auto, tensorrt, tensorrt-rtx, openvino, onnxruntime",
        ),
        ({"precision": "fp64"}, "precision 'fp64' is unknown", "choose one of fp32, tf32, fp16"),
        ({"threads": -1}, "threads is -1", "0 for one per core"),
        ({"provider": "npu"}, "provider 'npu' is unknown", "auto, cpu, cuda"),
        ({"device": "1", "backend": "openvino"}, "device 1 does not belong", "CPU, GPU, NPU"),
        ({"device": "GPU", "backend": "tensorrt"}, "device GPU does not belong", "the number or UUID"),
        ({"provider": "cpu", "backend": "tensorrt"}, "cpu belongs to ONNX Runtime, not", "leave out"),
    ],
)
def test_bad_values_are_refused_before_a_file_is_read(
    changes: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Pipeline.load("no bundle", **changes)
    assert hint in str(caught.value.hint)


def test_a_provider_asks_for_its_backend() -> None:
    assert LoadOptions(provider="cuda").named_backend == "onnxruntime"
    assert LoadOptions(backend="tensorrt").named_backend == "tensorrt"
    assert LoadOptions(device="npu").named_backend == "openvino" and LoadOptions(device="npu").gpu == ""
    assert LoadOptions(device="1").named_backend == "auto" and LoadOptions(device="1").gpu == "1"
    assert DEFAULTS.named_backend == "auto"


def test_keywords_change_fields_of_the_options(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoadOptions] = []
    real = opening.load_parts
    monkeypatch.setattr(opening, "load_parts", lambda bundle, o: (seen.append(o), real(bundle, o))[1])
    Pipeline.load(tiny_bundle, options=LoadOptions(threads=1, provider="cpu"), threads=2).close()
    assert seen == [LoadOptions(threads=2, provider="cpu")]
    with pytest.raises(TypeError, match="speed"):
        Pipeline.load(tiny_bundle, speed=2)  # type: ignore[call-arg]
