"""The model repository that `ditc export-triton` writes: Triton's own protobuf reads every configuration."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.cli import main
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.spec import DENOISER, VAE_DECODER, Backend, DType, Precision, Range, StageSpec, TensorSpec
from ditc.runtime.triton_server.config import stage_config
from ditc.runtime.triton_server.repository import (
    Choices,
    choose_artifacts,
    form_of,
    version_of,
    write_repository,
)


def parsed(text: str) -> Any:
    """The configuration as Triton's own protobuf reads it."""
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc], which ditc[dev] installs")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(tiny_bundle, out, Choices(name="tiny", instances=2, kind="CPU", threads=3))
    return out


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return load_manifest(tiny_bundle)


def test_every_model_has_its_version_folder_and_a_configuration(repository: Path, manifest: Manifest) -> None:
    version = version_of(manifest)
    assert version == int(manifest.digest[:8], 16)
    for folder in repository.iterdir():
        config = parsed((folder / "config.pbtxt").read_text())
        assert config.name == folder.name and list(config.version_policy.specific.versions) == [version]
        assert [path.name for path in folder.iterdir() if path.is_dir()] == [str(version)]
    assert {path.name for path in (repository / "tiny" / str(version)).iterdir()} == {"model.py", "bundle"}


def test_the_files_of_a_stage_are_those_of_the_bundle(
    repository: Path, manifest: Manifest, tiny_bundle: Path
) -> None:
    for stage, artifact in choose_artifacts(manifest, Choices(name="tiny")).items():
        place = repository / f"tiny_{stage}" / str(version_of(manifest))
        assert (place / "model.onnx").read_bytes() == (tiny_bundle / artifact.file.path).read_bytes()
        for ref in artifact.data:
            assert (place / Path(ref.path).name).read_bytes() == (tiny_bundle / ref.path).read_bytes()


def test_a_stage_whose_tensors_share_their_first_dimension_is_batched_by_triton(
    repository: Path, manifest: Manifest
) -> None:
    config = parsed((repository / f"tiny_{VAE_DECODER}" / "config.pbtxt").read_text())
    (artifact,) = manifest.stages[VAE_DECODER].artifacts
    assert config.backend == "onnxruntime"
    assert config.max_batch_size == artifact.spec.profile["batch"].max and config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [artifact.spec.inputs[0].shape[1], -1, -1]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, 2)  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "3"


def test_the_denoiser_is_batched_by_the_pipeline_alone(repository: Path, manifest: Manifest) -> None:
    config = parsed((repository / f"tiny_{DENOISER}" / "config.pbtxt").read_text())
    (artifact,) = manifest.stages[DENOISER].artifacts
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    for tensor, spec in zip(config.input, artifact.spec.inputs, strict=True):
        assert tensor.name == spec.name
        assert list(tensor.dims) == [dim if isinstance(dim, int) else -1 for dim in spec.shape]


def test_the_pipeline_names_its_stages_and_takes_the_arguments_of_a_request(
    repository: Path, manifest: Manifest
) -> None:
    config = parsed((repository / "tiny" / "config.pbtxt").read_text())
    assert config.backend == "python" and config.HasField("dynamic_batching")
    assert config.parameters["bundle_digest"].string_value == manifest.digest
    stages = json.loads(config.parameters["stages"].string_value)
    assert {about["model"] for about in stages.values()} == {
        path.name for path in repository.iterdir() if path.name != "tiny"
    }
    required = [tensor.name for tensor in config.input if not tensor.optional]
    assert required == ["prompt"]
    assert {"seed", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"} <= {
        tensor.name for tensor in config.input
    }


@pytest.mark.parametrize(
    ("backend", "file"), [(Backend.TENSORRT, "model.plan"), (Backend.OPENVINO, "model.xml")]
)
def test_other_backends_have_their_own_files_and_devices(
    tiny_bundle: Path, tmp_path: Path, backend: Backend, file: str
) -> None:
    """The files are those of ONNX graphs under another backend's name: no library opens them here."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = load_manifest(bundle)
    stages = {}
    for name, stage in manifest.stages.items():
        (artifact,) = stage.artifacts
        data = () if backend is Backend.TENSORRT else artifact.data
        stages[name] = replace(stage, artifacts=(replace(artifact, backend=backend, data=data),))
    changed = replace(manifest, stages=stages)
    config = parsed(
        stage_config(
            "x",
            changed.stages[DENOISER].artifacts[0].spec,
            form_of(backend),
            1,
            instances=1,
            kind="GPU",
            threads=1,
        )
    )
    assert config.backend == backend.value and not config.parameters
    from ditc.runtime.triton_server.repository import _copy_stage

    _copy_stage(bundle, changed.stages[DENOISER].artifacts[0], tmp_path / "place")
    names = {path.name for path in (tmp_path / "place").iterdir()}
    assert names == ({file} if backend is Backend.TENSORRT else {file, "model.bin"})


def test_tensors_that_the_python_backend_cannot_hold_are_refused() -> None:
    tensor = TensorSpec("latents", DType.BFLOAT16, ("batch", 4))
    spec = StageSpec(DENOISER, (tensor,), (tensor,), {"batch": Range(1, 1, 2)})
    with pytest.raises(UsageError, match="latents is bfloat16, which Triton's Python backend cannot hold"):
        stage_config("x", spec, form_of(Backend.ONNXRUNTIME), 1, instances=1, kind="CPU", threads=0)


def test_operators_that_only_ditc_knows_are_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditc.runtime.bundle import onnx_domains

    graph = next((tiny_bundle / "onnx").glob("denoiser-*.onnx"))
    assert onnx_domains.foreign_operators(graph) == []  # its functions define their own
    monkeypatch.setattr(onnx_domains, "FUNCTION_NAME", 99)  # as if the graph had no functions
    found = onnx_domains.foreign_operators(graph)
    assert found and all("::" in name for name in found)
    with pytest.raises(UsageError, match=f"has operators that Triton's backend does not know: .*{found[0]}"):
        write_repository(tiny_bundle, tmp_path / "out", Choices(name="tiny"))
    assert not (tmp_path / "out").exists()


def test_inputs_for_loras_can_be_left_out_of_graphs_alone(lora_inputs_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes LoRAs as inputs, which cannot be left out in OpenVINO"):
        write_repository(lora_inputs_bundle, tmp_path / "out", Choices(name="tiny", backend=Backend.OPENVINO))
    assert not (tmp_path / "out").exists()
    assert write_repository(lora_inputs_bundle, tmp_path / "out", Choices(name="tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "cannot be the name of a model"),
        ({"backend": Backend.TENSORRT_RTX}, "Triton has no backend for tensorrt-rtx"),
        ({"instances": 0}, "0 instances"),
        ({"threads": -1}, "-1 threads"),
    ],
)
def test_impossible_choices_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Choices(**{"name": "tiny", **changes})


def test_a_precision_or_backend_that_the_bundle_lacks_is_named(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="no denoiser for onnxruntime fp8, only: onnxruntime fp32"):
        choose_artifacts(manifest, Choices(name="tiny", precision=Precision.FP8))
    with pytest.raises(UsageError, match="no denoiser for tensorrt, only: onnxruntime fp32"):
        choose_artifacts(manifest, Choices(name="tiny", backend=Backend.TENSORRT))


def test_a_damaged_file_or_a_folder_that_exists_ends_the_export(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with next((bundle / "onnx").glob("vae_decoder-*.data")).open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(BundleError):
        write_repository(bundle, tmp_path / "out", Choices(name="tiny"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    assert main(["export-triton", str(tiny_bundle), "-o", str(tmp_path / "there")]) == 2
    assert "it exists already" in capsys.readouterr().err


def test_the_command_prints_the_models(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-triton", str(tiny_bundle), "-o", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"][0] == "ditc"
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(printed["models"])
