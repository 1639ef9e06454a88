"""`ditc build`: every argument reaches the option that it stands for."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from ditc.export.commands.build import add_arguments, build_options
from ditc.export.options import BuildOptions

# For every option, a value that is not its default.
CHOICES = {
    "precision": ["--precision", "fp8"],
    "backend": ["--backend", "tensorrt-rtx"],
    "variant": ["--variant", "fp16"],
    "resolution": ["--resolution", "512"],
    "max_batch": ["--max-batch", "2"],
    "targets": ["--targets", "sm89"],
    "raw": ["--raw"],
    "recipes": ["--recipe", "sana-fp8", "--recipe", "mixed.json"],
    "ranges": ["--ranges", "ranges.safetensors"],
    "base_precision": ["--base-precision", "bf16"],
    "opset": ["--opset", "23"],
    "linear_attention": ["--linear-attention", "plugin"],
    "weight_streaming": ["--weight-streaming"],
    "lora_inputs": ["--lora-inputs"],
    "refit": ["--refit"],
    "loras": ["--lora", "style.safetensors:0.5"],
    "controlnet": ["--controlnet", "edges"],
}


def options(*arguments: str) -> BuildOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return build_options(parser.parse_args(["checkpoint", "-o", "bundle", *arguments]))


@pytest.mark.parametrize("name", [field.name for field in fields(BuildOptions)])
def test_every_option_of_a_build_is_an_argument_and_reaches_it(name: str) -> None:
    chosen = options(*CHOICES[name])
    assert [f.name for f in fields(chosen) if getattr(chosen, f.name) != getattr(options(), f.name)] == [name]


def test_without_arguments_the_defaults_are_the_options_own() -> None:
    assert options() == BuildOptions()


def test_spaces_between_targets_are_ignored() -> None:
    assert options("--targets", "sm80, sm89,").targets == ("sm80", "sm89")
