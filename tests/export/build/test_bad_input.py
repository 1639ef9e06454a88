"""Mistakes of a user who builds: each gives one error, one hint, exit code 2, and no half-written file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditc.export.build import builder as bundle_module
from ditc.export.build import estimates, graph_artifact
from ditc.export.build.noop import up_to_date
from ditc.export.graph.ops import relu_linear_attention as ops
from ditc.export.options import BuildOptions
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import MissingExtra

Damage = Callable[[Path], None]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an export begins: bad input must be refused before it, because it takes minutes at full size."""

    def export(*_: object, **__: object) -> None:
        raise AssertionError("an export was begun")

    monkeypatch.setattr(graph_artifact, "to_onnx", export)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end with exit code 2, an error and a hint. Returns the error."""
    assert main([str(argument) for argument in arguments]) == USAGE
    out, err = capsys.readouterr()
    *_, error, hint = err.splitlines()
    assert not out and error.startswith("error: ") and hint.startswith("hint: ") and len(hint) > 10, err
    return error


def weights(checkpoint: Path, component: str = "transformer") -> Path:
    return next((checkpoint / component).glob("*.safetensors"))


def change_tensors(
    change: Callable[[dict[str, torch.Tensor]], None], component: str = "transformer"
) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = weights(checkpoint, component)
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

    return damage


def change_json(name: str, change: Callable[[dict[str, object]], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        data = json.loads((checkpoint / name).read_text())
        change(data)
        (checkpoint / name).write_text(json.dumps(data))

    return damage


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"][0, 0] = float("nan")


def pickle_instead(checkpoint: Path) -> None:
    weights(checkpoint).unlink()
    torch.save({"x": torch.zeros(1)}, checkpoint / "transformer" / "diffusion_pytorch_model.bin")


def other_family(checkpoint: Path) -> None:
    name = "FluxTransformer2DModel"
    change_json("transformer/config.json", lambda data: data.update(_class_name=name))(checkpoint)
    change_json("model_index.json", lambda data: data.update(transformer=["diffusers", name]))(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "is not a directory"),
        (lambda path: (path / "model_index.json").unlink(), "has no model_index.json"),
        (lambda path: shutil.rmtree(path / "vae"), "has no folder 'vae'"),
        (other_family, "which belongs to no known family"),
        (change_tensors(lambda tensors: tensors.pop("proj_out.bias")), "lacks proj_out.bias"),
        (
            change_tensors(lambda tensors: tensors.update(extra=torch.zeros(1))),
            "has an unknown tensor extra",
        ),
        (
            change_tensors(lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)})),
            "proj_out.bias has shape (3,)",
        ),
        (change_tensors(poison), "proj_out.weight has 1 of"),
        (lambda path: pickle_instead(path), "pickle"),
        (
            lambda path: torch.save({}, path / "vae" / "diffusion_pytorch_model.bin"),
            "pickle",
        ),
        (lambda path: (path / "tokenizer" / "tokenizer.json").unlink(), "'tokenizer' has no vocabulary"),
        (lambda path: weights(path, "vae").write_bytes(weights(path, "vae").read_bytes()[:-9]), "vae"),
    ],
    ids=[
        "no-checkpoint",
        "no-index",
        "no-component",
        "unknown-family",
        "missing-tensor",
        "extra-tensor",
        "misshapen-tensor",
        "nan",
        "pickle-instead",
        "pickle-beside",
        "no-vocabulary",
        "truncated",
    ],
)
def test_a_checkpoint_that_cannot_be_built_is_refused_before_any_export(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, message: str
) -> None:
    damage(checkpoint)
    out = tmp_path / "bundle"
    assert message in refused(capsys, "build", checkpoint, "-o", out)
    assert not (out / "manifest.json").exists() and not list(out.glob("onnx/*"))


def test_a_pth_with_more_than_tensors_is_refused_and_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'boom'}",)

    torch.save({"state_dict": Bomb()}, tmp_path / "model.pth")
    refused(capsys, "convert", tmp_path / "model.pth", tmp_path / "out")
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "tensorrt-rtx", "--targets", "sm90"], "cannot build for sm90"),
        (["--backend", "tensorrt-rtx", "--targets", "sm75", "--precision", "bf16"], "sm75 cannot run bf16"),
        (["--resolution", "65"], "resolution 65 is not a multiple"),
        (["--ranges", "nothing.safetensors"], "belongs to an 8-bit build"),
        (
            ["--base-precision", "bf16", "--precision", "fp16"],
            "--base-precision bf16 belongs to an 8-bit build, but this one is fp16",
        ),
        (["--targets", "sm86,sm89"], "--targets sm86,sm89 is an option of engines"),
        (["--linear-attention", "plugin"], "--linear-attention plugin is an option of engines"),
        (["--weight-streaming"], "--weight-streaming is an option of engines"),
        (
            ["--precision", "fp8", "--backend", "tensorrt-rtx", "--targets", "sm86"],
            "sm86 cannot run fp8|ranges",
        ),
    ],
)
def test_options_that_cannot_be_served_are_refused(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    error = refused(capsys, "build", tiny_checkpoint, "-o", tmp_path / "bundle", *arguments)
    assert any(part in error for part in message.split("|"))
    assert not (tmp_path / "bundle").exists()


def test_a_size_outside_the_profile_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    assert "4096" in refused(capsys, "run", tiny_bundle, "cat", "-o", out, "--height", 4096, "--width", 4096)
    assert not out.exists()


def test_a_missing_library_names_the_pip_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> str:
        raise MissingExtra("tensorrt_rtx", "rtx")

    monkeypatch.setattr(bundle_module, "library_version", missing)
    out = tmp_path / "bundle"
    assert main(["build", str(tiny_checkpoint), "-o", str(out), "--backend", "tensorrt-rtx"]) == USAGE
    assert 'hint: pip install "ditc[rtx]"' in capsys.readouterr().err and not out.exists()


def test_a_missing_triton_is_reported_before_the_export(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "library_version", lambda *_: "1.0")
    monkeypatch.delitem(sys.modules, f"{ops.__name__}.kernels", raising=False)
    monkeypatch.delattr(ops, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    engine = ["--backend", "tensorrt-rtx", "--linear-attention", "plugin"]
    assert main(["build", str(tiny_checkpoint), "-o", str(tmp_path / "bundle"), *engine]) == USAGE
    assert 'hint: pip install "ditc[plugin]"' in capsys.readouterr().err


def test_a_key_that_cannot_sign_is_refused_before_the_build(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ec.pem").write_bytes(pem)
    (tmp_path / "text.pem").write_text("no key")
    build = ["build", tiny_checkpoint, "-o", tmp_path / "bundle", "--sign"]
    assert "is not an ed25519 private key" in refused(capsys, *build, tmp_path / "ec.pem")
    assert "cannot be read as a PEM key" in refused(capsys, *build, tmp_path / "text.pem")
    assert "No such file" in refused(capsys, *build, tmp_path / "missing.pem")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs Linux and root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_build(
    tiny_checkpoint: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "bundle"
    assert "the build needs about" in refused(capsys, "build", tiny_checkpoint, "-o", out)
    assert not (out / "manifest.json").exists()


def test_a_disk_that_fills_up_while_writing_is_named(
    tiny_checkpoint: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def export(module: object, path: Path, **_: object) -> None:
        write_atomic(path, bytes(10**6))

    monkeypatch.setattr(graph_artifact, "to_onnx", export)
    monkeypatch.setattr(estimates, "check_disk", lambda *_, **__: None)
    out = small_disk / "bundle"
    assert "No space left" in refused(capsys, "build", tiny_checkpoint, "-o", out)
    assert not (out / "manifest.json").exists()
    assert not list((out / "onnx").iterdir())


def test_a_read_only_output_is_refused(
    tiny_checkpoint: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "cannot write into" in refused(capsys, "build", tiny_checkpoint, "-o", small_disk / "bundle")


def test_a_build_with_nothing_to_do_needs_no_torch(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The whole command may take one second, and importing torch alone takes longer."""
    assert up_to_date(tiny_checkpoint, tiny_bundle, BuildOptions(max_batch=3)) is None
    code = (
        "import sys; from ditc.runtime.cli import main; "
        f"code = main(['build', {str(tiny_checkpoint)!r}, '-o', {str(tiny_bundle)!r}]); "
        "heavy = {'torch', 'transformers', 'diffusers', 'onnx', 'onnxruntime', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing changed") == len(load_manifest(tiny_bundle).stages)
