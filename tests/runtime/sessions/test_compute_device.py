"""Where a session says that it computes, and who reads it: rounding that does not show, and the first use."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpu import FakeCuda, FakeEngine

from ditc.export.graph.torch_session import TorchSession
from ditc.runtime.bundle import selftest
from ditc.runtime.bundle.certificate import load_certificate
from ditc.runtime.bundle.golden import Golden, GoldenInfo, self_test
from ditc.runtime.bundle.manifest import Artifact, load_manifest
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import ComputeDevice, Session, samples, to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime import CUDA, DEVICES, OnnxRuntimeSession
from ditc.runtime.sessions.onnxruntime_device import OnnxRuntimeDeviceSession, OrtTensor
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER, Precision

SIXTEEN, OTHERS = {Precision.FP16, Precision.BF16}, {Precision.FP32, Precision.TF32, Precision.INT8}


def artifact_of(bundle: Path, stage: str) -> Artifact:
    return load_manifest(bundle).stages[stage].artifacts[0]


@pytest.fixture
def sessions(tiny_bundle: Path) -> dict[str, Session]:
    artifact = artifact_of(tiny_bundle, VAE_DECODER)
    model, spec, cuda = tiny_bundle / artifact.file.path, artifact.spec, FakeCuda()
    scale = load_manifest(tiny_bundle).latents.scale_factor
    engine = TensorRTSession(
        FakeEngine(cuda, model, spec, scale=scale), spec, Device(cuda), name="tensorrt-rtx"
    )
    return {
        "onnxruntime": OnnxRuntimeSession(model, spec, threads=1),
        "bound": OnnxRuntimeDeviceSession(model, spec, device="cpu", threads=1),
        "engine": engine,
        "on demand": OnDemandSession(spec, lambda: engine, Residency(), device=engine.device),
        "torch": TorchSession(torch.nn.Identity(), spec),
    }


def test_every_session_says_where_it_computes(sessions: dict[str, Session]) -> None:
    kinds = {name: session.device.kind for name, session in sessions.items()}
    assert kinds == {
        "onnxruntime": "cpu",
        "bound": "cpu",
        "engine": "cuda",
        "on demand": "cuda",
        "torch": "cpu",
    }
    assert DEVICES[CUDA].kind == "cuda"


def test_only_onnx_runtimes_cpu_provider_computes_16_bits_in_a_wider_type(
    sessions: dict[str, Session],
) -> None:
    wide = {n for n, session in sessions.items() if all(map(session.device.widens, SIXTEEN))}
    assert wide == {"onnxruntime", "bound"}
    devices = [*DEVICES.values(), *(session.device for session in sessions.values())]
    assert not any(device.widens(precision) for device in devices for precision in OTHERS)
    assert not any(DEVICES[CUDA].widens(p) for p in SIXTEEN)


def test_builds_have_tried_no_device_but_onnx_runtimes_cpu_provider(sessions: dict[str, Session]) -> None:
    assert {n for n, session in sessions.items() if session.device.tried_at_build} == {"onnxruntime", "bound"}
    assert not DEVICES[CUDA].tried_at_build


class Elsewhere(OnnxRuntimeSession):
    """A session that says that it computes on another device."""

    def on(self, device: ComputeDevice) -> Elsewhere:
        self.device = device
        return self


@pytest.mark.parametrize(("device", "passed"), [("CPUExecutionProvider", None), (CUDA, True)])
def test_the_self_test_of_16_bits_proves_nothing_where_they_are_computed_in_fp32(
    tiny_bundle: Path, device: str, passed: bool | None
) -> None:
    artifact = artifact_of(tiny_bundle, CONDITIONER)
    session = Elsewhere(tiny_bundle / artifact.file.path, artifact.spec, threads=1).on(DEVICES[device])
    feeds = {
        t.name: np.ones([1 if isinstance(d, str) else d for d in t.shape], t.dtype.value)
        for t in artifact.spec.inputs
    }
    outputs = {name: to_numpy(value) for name, value in session.run(feeds).items()}
    info = GoldenInfo(
        inputs={name: value.shape for name, value in feeds.items()},
        outputs={name: value.shape for name, value in outputs.items()},
        strides=dict.fromkeys(outputs, 1),
        losses={"fp16": 1e-3},
    )
    golden = Golden(info, feeds, {name: value.ravel() for name, value in outputs.items()})
    line = self_test(CONDITIONER, session, replace(artifact, precision=Precision.FP16), golden)
    assert line.passed is passed
    assert ("ONNX Runtime's CPU provider computes fp16 in fp32" in line.detail) is (passed is None)


def test_the_first_use_of_a_device_that_no_build_tried_is_tested_once(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    runs: list[Path] = []
    real = selftest.run_self_test
    monkeypatch.setattr(selftest, "run_self_test", lambda b, *rest: (runs.append(b), real(b, *rest))[1])
    Pipeline.load(bundle, threads=1).close()
    assert not runs and not load_certificate(bundle, load_manifest(bundle)).entries
    monkeypatch.setitem(DEVICES, "CPUExecutionProvider", ComputeDevice(kind="cuda", name="a GPU"))
    for wanted in (False, True, True):
        Pipeline.load(bundle, threads=1, self_test=wanted).close()
    assert runs == [bundle]


def test_samples_of_a_tensor_are_its_entries_wherever_it_is(sessions: dict[str, Session]) -> None:
    spec = sessions["onnxruntime"].spec
    shape = [
        3 if d == "batch" else d if isinstance(d, int) else spec.profile[d].min for d in spec.inputs[0].shape
    ]
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    results = {n: s.run({spec.inputs[0].name: latents}) for n, s in sessions.items() if n != "torch"}
    (expected,) = results["onnxruntime"].values()
    assert isinstance(next(iter(results["bound"].values())), OrtTensor)
    for name, result in results.items():
        (image,) = result.values()
        entries = [to_numpy(entry) for entry in samples(image)]
        assert len(entries) == 3, name
        for i, entry in enumerate(entries):
            np.testing.assert_array_equal(entry, to_numpy(expected)[i : i + 1], err_msg=name)


def test_a_decoded_batch_on_the_device_is_the_plain_one(tiny_bundle: Path, pipeline: Pipeline) -> None:
    """The latents that ONNX Runtime keeps on its device are decoded picture by picture."""
    artifact = artifact_of(tiny_bundle, DENOISER)
    bound = OnnxRuntimeDeviceSession(tiny_bundle / artifact.file.path, artifact.spec, device="cpu", threads=1)
    other = Pipeline(pipeline.manifest, {**pipeline.sessions, DENOISER: bound}, pipeline.conditioning)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 3, "output_type": "np"}
    ours = other("red cat", num_images_per_prompt=2, **settings).images
    np.testing.assert_array_equal(ours, pipeline("red cat", num_images_per_prompt=2, **settings).images)
    bound.close()
