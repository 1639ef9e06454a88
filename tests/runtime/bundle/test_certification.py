"""What counts as proof: certificates that are written by hand, changed, loosened, empty, or signed by another."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import line, make_keys, parity_record, self_test_record

from ditc.runtime.bundle.certificate import (
    Certificate,
    Line,
    Record,
    load_certificate,
    read_certificate,
    save_certificate,
)
from ditc.runtime.bundle.certification import count_signed, find_certification, sign_record
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.bundle.manifest import Artifact, Manifest, load_manifest
from ditc.runtime.bundle.signature import load_private_key, sign
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BundleError
from ditc.runtime.loader import choose
from ditc.runtime.machine import this_machine
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession
from ditc.runtime.tolerances import Level


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A signed bundle without a certificate."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    sign(copy, keys[0])
    return copy


def parts_of(bundle: Path) -> tuple[Manifest, dict[str, Artifact]]:
    manifest = load_manifest(bundle)
    return manifest, choose(manifest)[0]


def certify(bundle: Path, **records: Record) -> Certificate:
    manifest, artifacts = parts_of(bundle)
    save_certificate(bundle, load_certificate(bundle, manifest).with_record(artifacts, **records))
    return load_certificate(bundle, manifest)


def move(bundle: Path) -> None:
    """Say in the certificate that its results are those of another machine."""
    certificate = load_certificate(bundle, load_manifest(bundle))
    entries = tuple(
        replace(e, machine=replace(this_machine(), processor="another")) for e in certificate.entries
    )
    save_certificate(bundle, replace(certificate, entries=entries))


def why(bundle: Path, key: Path | None = None) -> str:
    return find_certification(bundle, *parts_of(bundle), key).why_uncertified()


@pytest.mark.parametrize(
    "lines", [[], [{"passed": True}], [{"passed": False}]], ids=["none", "bare", "failed"]
)
def test_a_certificate_of_the_first_form_written_by_hand_proves_nothing(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    """Its form had no digest and no settings. It is refused before anything is opened, also beside a signature."""
    manifest, artifacts = parts_of(bundle)
    form = {"name": "stage", "metric": "relative L2", "value": 1e-7, "bound": 1e-5, "detail": ""}
    passed = {
        "passed": True,
        "lines": [form | one for one in lines],
        "date": "",
        "tools": {},
        "reference": {},
    }
    (entry,) = Certificate(manifest="").with_record(artifacts).entries
    old = {"manifest": manifest.digest, "entries": [{**to_json(entry), "parity": passed}]}
    (bundle / "certificate.json").write_text(json.dumps(old))
    monkeypatch.setattr(OnnxRuntimeSession, "__init__", lambda *_: pytest.fail("a session was opened"))
    with pytest.raises(BundleError, match="of an earlier version of ditc, which kept no settings: renew it"):
        Pipeline.load(bundle, require_signature=keys[1], require_certificate=True)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((), "did not check stage, step, trajectory, picture"),
        ((line("graph"),), "did not check stage, step, trajectory, picture"),
        (tuple(line(level, None) for level in Level), "did not check"),
        ((*(line(level) for level in Level), line("more", passed=False)), "failed on this machine"),
    ],
    ids=["no lines", "only the graph", "not checked", "one failed"],
)
def test_the_lines_of_a_certificate_decide(bundle: Path, lines: tuple[Line, ...], reason: str) -> None:
    certify(bundle, parity=replace(parity_record(load_manifest(bundle)), lines=lines))
    with pytest.raises(BundleError, match=reason):
        Pipeline.load(bundle, require_certificate=True)


@pytest.mark.parametrize(
    ("value", "bound", "metric"),
    [(None, 1e-5, "relative L2"), (1e-7, None, "relative L2"), (1.0, 1e-5, "relative L2"), (30.0, 45.0, "PSNR dB"),
     (float("nan"), 1e-5, "relative L2"), (1.0, float("inf"), "relative L2"), (-1.0, 1.0, "relative L2")],
)  # fmt: skip
def test_a_line_cannot_pass_beyond_its_bound(value: float | None, bound: float | None, metric: str) -> None:
    with pytest.raises(ValueError, match="does not keep"):
        Line(name="step", metric=metric, value=value, bound=bound, passed=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget": 0.5, "loosened": True}, "bounds were loosened with --budget 0.5"),
        ({"num_inference_steps": 1}, "drew in 1 steps, not 4"),
        ({"guidance_scale": 1.0}, "guidance_scale 1.0, not 3.0"),
        ({"height": 32}, "drew 32x"),
        ({"upstream": ""}, "not compared with upstream"),
        ({"prompts": ()}, "drew nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_with_weaker_settings_says_so_and_is_not_enough(
    bundle: Path, capsys: pytest.CaptureFixture[str], settings: Mapping[str, Any], reason: str
) -> None:
    manifest = load_manifest(bundle)
    certify(bundle, parity=parity_record(manifest, **settings))
    assert reason in why(bundle)
    assert main(["inspect", str(bundle)]) == 0
    assert reason in capsys.readouterr().out
    certify(bundle, parity=parity_record(manifest))
    assert why(bundle) == ""


def test_a_run_that_was_judged_by_other_tolerances_is_not_enough(bundle: Path) -> None:
    certify(bundle, parity=replace(parity_record(load_manifest(bundle)), tolerances="0" * 64))
    assert "other tolerances" in why(bundle)


def test_verify_and_inspect_say_that_a_certificate_was_changed(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certify(bundle, parity=parity_record(load_manifest(bundle)))
    assert main(["verify", str(bundle)]) == 0
    assert "1 record, as it was written" in capsys.readouterr().out
    path = bundle / "certificate.json"
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        with pytest.raises(BundleError):
            read_certificate(bundle)
    path.write_bytes(content.replace(b"a red heart", b"a red hearT"))
    assert main(["verify", str(bundle)]) == USAGE
    assert "was changed after ditc wrote it" in capsys.readouterr().err
    assert main(["inspect", str(bundle)]) == 0
    assert "was changed after ditc wrote it" in capsys.readouterr().out
    assert "no parity result" in why(bundle)


def test_with_a_key_only_results_count_that_its_owner_has_signed(
    bundle: Path, keys: tuple[Path, Path]
) -> None:
    manifest, artifacts = parts_of(bundle)
    made = parity_record(manifest)
    certify(bundle, parity=made)
    assert why(bundle) == ""
    assert "is not signed with public.pem" in why(bundle, keys[1])
    signed = sign_record(made, load_private_key(keys[0]), manifest, artifacts, "parity")
    certify(bundle, parity=signed)
    assert why(bundle, keys[1]) == ""
    Pipeline.load(bundle, require_signature=keys[1], require_certificate=True, threads=1).close()
    certify(bundle, parity=replace(signed, lines=(*signed.lines, line("more"))))
    assert "is not signed" in why(bundle, keys[1])


def test_a_signature_is_not_valid_for_another_machine_another_kind_or_other_artifacts(
    bundle: Path, keys: tuple[Path, Path]
) -> None:
    manifest, artifacts = parts_of(bundle)
    private = load_private_key(keys[0])
    signed = sign_record(self_test_record(artifacts), private, manifest, artifacts, "self_test")
    assert count_signed(certify(bundle, parity=signed, self_test=signed), manifest, keys[1]) == 1
    move(bundle)
    assert count_signed(load_certificate(bundle, manifest), manifest, keys[1]) == 0
    fewer = sign_record(self_test_record(artifacts), private, manifest, {}, "self_test")
    assert count_signed(certify(bundle, self_test=fewer), manifest, keys[1]) == 0


def test_a_required_certificate_of_another_machine_is_completed_by_a_self_test(
    bundle: Path, keys: tuple[Path, Path]
) -> None:
    """The process has run it itself, so it needs no signature. The signature of the proof names the other machine."""
    manifest, artifacts = parts_of(bundle)
    certify(bundle, parity=parity_record(manifest))
    move(bundle)
    with pytest.raises(BundleError, match=r"another machine .*: run ditc verify BUNDLE --run here"):
        Pipeline.load(bundle, threads=1, require_certificate=True, self_test=False)
    assert not any(entry.self_test for entry in load_certificate(bundle, manifest).entries)
    Pipeline.load(bundle, threads=1, require_certificate=True).close()
    assert find_certification(bundle, manifest, artifacts).self_test_here() is not None
    assert find_certification(bundle, manifest, artifacts, keys[1]).self_test_here() is None


def test_verify_signs_the_self_test_that_it_runs(
    bundle: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(bundle), "--sign", str(keys[0]), "--require-signature", str(keys[1])]
    assert main(arguments) == USAGE
    assert "nothing reads --sign" in capsys.readouterr().err
    assert main([*arguments, "--run", "--threads", "1"]) == 0
    assert "1 record, 1 signed with public.pem" in capsys.readouterr().out
