"""`ditc run` refuses what no bundle can draw before it loads one, so nothing but the error is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.runtime.cli import USAGE, main
from ditc.runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> Pipeline:
        raise AssertionError("the bundle is loaded")

    monkeypatch.setattr(Pipeline, "load", load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--strength", "0.5"], "strength is given without an image"),
        (["--lora", "nowhere.safetensors"], "the LoRA nowhere.safetensors cannot be read: No such file"),
    ],
)
def test_a_request_that_no_bundle_can_draw_is_refused_before_a_bundle_is_loaded(
    options: list[str], message: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tiny_bundle), "cat", "-o", str(tmp_path / "x.png"), *options]) == USAGE
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_scale_that_is_no_number_is_named(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tmp_path / "style.safetensors"
    lora.touch()
    assert (
        main(["run", str(tiny_bundle), "cat", "-o", f"{tmp_path}/x.png", "--lora", f"{lora}:strong"]) == USAGE
    )
    assert f"{lora} is there, but 'strong' is not a number" in capsys.readouterr().err
