"""`ditc build --lora`: the bundle draws as diffusers does with the same LoRA fused, and knows what it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lora_files import make_lora
from tiny_sana import make_pipeline

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.spec import CONDITIONER, DENOISER

pytest.importorskip("peft", reason="diffusers reads LoRAs with peft")

QUICK = ["--seeds", "0", "--steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the conditioner's weights and the denoiser's, whose alpha is not its rank."""
    return make_lora(make_pipeline(), tmp_path_factory.mktemp("lora"), lora_alpha=8, strength=0.2)


@pytest.fixture(scope="module")
def folded(
    lora: Path, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of tiny_bundle, into which the LoRA was built."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("folded") / "bundle"))
    assert main(["build", str(tiny_checkpoint), "-o", str(bundle), "--lora", f"{lora}:0.5"]) == 0
    return bundle


def test_parity_compares_with_diffusers_and_the_same_lora(folded, lora, tiny_checkpoint, capsys) -> None:
    code = main(
        ["parity", str(folded), "--against", str(tiny_checkpoint), "--lora", f"{lora}:0.5", *QUICK, "--json"]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["subject"]["references"] == ["PyTorch fp32", "diffusers"]


def test_only_the_stages_with_changed_weights_are_built(folded, tiny_bundle) -> None:
    before, after = load_manifest(tiny_bundle), load_manifest(folded)
    changed = {
        n for n in before.stages if before.stages[n].artifacts[0].key != after.stages[n].artifacts[0].key
    }
    assert changed == {CONDITIONER, DENOISER}


def test_the_manifest_and_inspect_say_which_lora_it_is(folded, lora, capsys) -> None:
    (found,) = load_manifest(folded).loras
    assert (found.file, found.scale, found.components) == (lora.name, 0.5, ("transformer",))
    assert main(["inspect", str(folded)]) == 0
    assert f"{lora.name}, scale 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [([], "--lora gives none"), (["{}"], ":1 ("), (["{}:0.5", "{}"], ":0.5 (")],
    ids=["none", "another scale", "one more"],
)
def test_parity_refuses_other_loras(given, words, folded, lora, tiny_checkpoint, capsys) -> None:
    options = [text for one in given for text in ("--lora", one.format(lora))]
    assert main(["parity", str(folded), "--against", str(tiny_checkpoint), *options, *QUICK]) == 2
    said = capsys.readouterr().err
    assert f"the bundle has {lora.name}:0.5" in said and words in said


def test_building_again_changes_nothing(folded, lora, tiny_checkpoint, capsys) -> None:
    assert main(["build", str(tiny_checkpoint), "-o", str(folded), "--json", "--lora", f"{lora}:0.5"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {stage["status"] for stage in stages.values()} == {"reused"}


def test_a_lora_that_does_not_fit_is_refused_before_the_build(
    lora, tmp_path, sprint_checkpoint, capsys
) -> None:
    assert (
        main(["build", str(sprint_checkpoint), "-o", str(tmp_path / "b"), "--lora", str(tmp_path / "no")])
        == 2
    )
    assert "no cannot be read: No such file" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
