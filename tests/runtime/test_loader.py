"""Loading a bundle: which artifacts are chosen, and which damage is found before anything is opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from ditc.runtime import loader
from ditc.runtime.bundle.certification import Certification
from ditc.runtime.bundle.integrity import check_file, check_files, file_ref
from ditc.runtime.bundle.manifest import Artifact, FileRef, Manifest, Stage, load_manifest, save_manifest
from ditc.runtime.errors import BundleError, SessionError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose, load_parts
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER, VAE_ENCODER, Backend, Precision


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def load(bundle: Path) -> set[str]:
    """The stages for which loading opened a session."""
    parts = load_parts(bundle, LoadOptions(threads=1))
    for session in parts.sessions.values():
        session.close()
    return set(parts.sessions)


def denoiser_of(bundle: Path) -> Artifact:
    return load_manifest(bundle).stages[DENOISER].artifacts[0]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def leave_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[2] / "outside")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "has been changed"),
        (truncate, "bytes, but the manifest says"),
        (Path.unlink, "is missing"),
        (leave_a_link, "is a link to nothing"),
    ],
)
@pytest.mark.parametrize("which", ["graph", "weights", "tokenizer"])
def test_damaged_files_are_refused_by_name_before_a_session_is_made(
    copy: Path, monkeypatch: pytest.MonkeyPatch, which: str, damage: Callable[[Path], None], message: str
) -> None:
    artifact = denoiser_of(copy)
    path = {
        "graph": artifact.file.path,
        "weights": artifact.data[0].path,
        "tokenizer": load_manifest(copy).text[0].tokenizer,
    }
    damage(copy / path[which])
    opened: list[str] = []
    monkeypatch.setattr(loader, "open_session", lambda model, *_, **__: opened.append(model))
    with pytest.raises(BundleError, match=message) as caught:
        load(copy)
    assert path[which] in str(caught.value) and "ditc build" in str(caught.value.hint)
    assert not opened


def test_files_that_are_not_read_may_be_missing(copy: Path) -> None:
    (copy / load_manifest(copy).stages[VAE_ENCODER].artifacts[0].file.path).unlink()
    assert load(copy) == set(load_manifest(copy).stages) - {VAE_ENCODER}


def test_all_files_are_checked_and_the_bad_one_is_named(tmp_path: Path) -> None:
    refs = []
    for name in "abc":
        (tmp_path / name).write_text(name * 100)
        refs.append(file_ref(tmp_path / name, tmp_path))
    seen: list[FileRef] = []
    check_files(tmp_path, refs, done=seen.append)
    assert sorted(ref.path for ref in seen) == ["a", "b", "c"]
    flip_a_byte(tmp_path / "b")
    with pytest.raises(BundleError, match="b has been changed"):
        check_files(tmp_path, refs)
    check_file(tmp_path, refs[0])


def test_a_file_that_is_not_a_graph_is_refused_with_its_stage(copy: Path) -> None:
    """The build itself wrote nonsense, so the hash in the manifest is right."""
    manifest, artifact = load_manifest(copy), denoiser_of(copy)
    (copy / artifact.file.path).write_bytes(b"no graph")
    broken = replace(artifact, file=file_ref(copy / artifact.file.path, copy))
    save_manifest(_with(manifest, DENOISER, broken), copy)
    with pytest.raises(BundleError, match=r"denoiser-fp32-\w+\.onnx is not a graph that ditc opens"):
        load(copy)


def test_sessions_opened_before_a_failure_are_closed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[OnnxRuntimeSession] = []
    real = loader.open_session

    def open_some(model: Path, artifact: Artifact, *settings: Any) -> OnnxRuntimeSession:
        if artifact.spec.name == VAE_DECODER:
            raise SessionError("no")
        session = real(model, artifact, *settings)
        assert isinstance(session, OnnxRuntimeSession)
        opened.append(session)
        return session

    monkeypatch.setattr(loader, "open_session", open_some)
    with pytest.raises(SessionError):
        load(copy)
    assert len(opened) == 3 and not any(hasattr(session, "_session") for session in opened)


def test_a_graph_with_other_names_than_promised_is_refused(copy: Path) -> None:
    manifest = load_manifest(copy)
    (artifact,) = manifest.stages[VAE_DECODER].artifacts
    renamed = replace(artifact.spec, inputs=(replace(artifact.spec.inputs[0], name="noise"),))
    save_manifest(_with(manifest, VAE_DECODER, replace(artifact, spec=renamed)), copy)
    with pytest.raises(SessionError, match="the manifest promises"):
        load(copy)


@pytest.mark.parametrize("change", ["value", "length"])
def test_another_schedule_than_at_build_time_is_refused(copy: Path, change: str) -> None:
    manifest = load_manifest(copy)
    golden = manifest.golden_table
    first, *rest = golden.coefficients
    rows = ((*first[:-1], first[-1] + 1e-4), *rest) if change == "value" else tuple(rest)
    times = golden.timesteps[-len(rows) :]
    save_manifest(replace(manifest, golden_table=replace(golden, coefficients=rows, timesteps=times)), copy)
    with pytest.raises(BundleError, match="different scheduler coefficients"):
        load(copy)


# Choosing artifacts


def _with(manifest: Manifest, stage: str, *artifacts: Artifact) -> Manifest:
    return replace(manifest, stages={**manifest.stages, stage: Stage(artifacts=artifacts)})


def test_auto_takes_what_runs_here_and_says_why(tiny_bundle: Path) -> None:
    chosen, reason = choose(load_manifest(tiny_bundle))
    assert {a.backend for a in chosen.values()} == {Backend.ONNXRUNTIME}
    assert VAE_ENCODER not in chosen, "a picture needs no encoder"
    assert reason == "onnxruntime fp32: ONNX Runtime is installed"


def test_the_named_precision_is_taken_with_a_conditioner_of_its_types(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    fp32 = {name: manifest.stages[name].artifacts[0] for name in (CONDITIONER, DENOISER)}
    for name, artifact in fp32.items():
        spec = artifact.spec
        half = replace(
            spec,
            inputs=tuple(replace(t, dtype="float16") if t.name == "cross_kv" else t for t in spec.inputs),
            outputs=tuple(replace(t, dtype="float16") if t.name == "cross_kv" else t for t in spec.outputs),
        )
        manifest = _with(manifest, name, artifact, replace(artifact, precision=Precision.FP16, spec=half))
    chosen, reason = choose(manifest, LoadOptions(precision="fp16"))
    assert chosen[DENOISER].precision is chosen[CONDITIONER].precision is Precision.FP16
    assert chosen[VAE_DECODER].precision is Precision.FP32
    assert reason.startswith("onnxruntime fp16")
    only_fp16 = _with(manifest, DENOISER, manifest.stages[DENOISER].artifacts[1])
    mismatched = _with(only_fp16, CONDITIONER, fp32[CONDITIONER])
    with pytest.raises(BundleError, match="no artifact of conditioner fits"):
        choose(mismatched)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "onnx"}, "backend 'onnx' is unknown"),
        ({"precision": "fp64"}, "precision 'fp64' is unknown"),
        ({"precision": "bf16"}, "holds denoisers for onnxruntime fp32; requested: auto, bf16"),
        ({"backend": "tensorrt"}, "requested: tensorrt, any precision"),
    ],
)
def test_what_the_bundle_does_not_hold_is_refused(
    tiny_bundle: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        choose(load_manifest(tiny_bundle), LoadOptions(**arguments))
    assert caught.value.hint
    if "requested" in message:  # the hint is a command that can be typed
        ((name, value),) = arguments.items()
        assert caught.value.hint.endswith(f"ditc build CHECKPOINT -o BUNDLE --{name} {value}")


@pytest.mark.parametrize("stage", [DENOISER, VAE_DECODER, CONDITIONER])
def test_a_bundle_without_a_needed_stage_is_refused(tiny_bundle: Path, stage: str) -> None:
    manifest = load_manifest(tiny_bundle)
    stages = {name: value for name, value in manifest.stages.items() if name != stage}
    with pytest.raises(BundleError, match=f"no {stage}"):
        choose(replace(manifest, stages=stages))


def test_bf16_on_the_cpu_provider_is_refused_before_the_file_is_read(tiny_bundle: Path) -> None:
    artifact = denoiser_of(tiny_bundle)
    with pytest.raises(SessionError, match="no bf16 kernels"):
        OnnxRuntimeSession(
            tiny_bundle / "missing.onnx",
            artifact.spec,
            precision=Precision.BF16,
            provider="CPUExecutionProvider",
        )


def test_feeds_that_do_not_fit_are_reported_with_stage_and_shapes(tiny_bundle: Path) -> None:
    artifact = load_manifest(tiny_bundle).stages[VAE_DECODER].artifacts[0]
    session = OnnxRuntimeSession(tiny_bundle / artifact.file.path, artifact.spec, threads=1)
    with pytest.raises(SessionError, match=r"vae_decoder: .*the inputs were \{\}"):
        session.run({})
    session.close()
    session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "npu"}, "provider 'npu' is unknown"),
        ({"provider": "cpu", "backend": "tensorrt"}, "provider cpu belongs to ONNX Runtime"),
    ],
)
def test_a_provider_that_is_unknown_or_of_another_backend_is_refused(
    tiny_bundle: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.load(tiny_bundle, **options)


def test_a_provider_that_is_not_installed_is_named_with_what_installs_it(tiny_bundle: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(SessionError, match="no CUDA provider"):
            Pipeline.load(tiny_bundle, provider="cuda")
    Pipeline.load(tiny_bundle, provider="cpu").close()


def test_a_bundle_that_is_refused_after_its_stages_were_opened_leaves_none_open(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that goes on with another bundle would else lack the memory of the one that it refused."""
    opened: list[OnnxRuntimeSession] = []

    def check_graph(session: OnnxRuntimeSession) -> None:
        opened.append(session)

    def refuse(*_: object) -> None:
        raise BundleError("refused", hint="")

    monkeypatch.setattr(OnnxRuntimeSession, "_check_graph", check_graph)
    monkeypatch.setattr(Certification, "why_uncertified", refuse)
    with pytest.raises(BundleError, match="refused"):
        Pipeline.load(tiny_bundle)
    assert opened and not any(hasattr(session, "_session") for session in opened)
