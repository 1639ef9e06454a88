"""Tensors that are passed between the host, the device and other libraries: which can be read, and for how long."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import SessionError
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.dlpack import to_capsule
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import VAE_DECODER, DType


def _decoder(bundle: Path, cuda: FakeCuda) -> TensorRTSession:
    manifest = load_manifest(bundle)
    artifact = manifest.stages[VAE_DECODER].artifacts[0]
    scale = manifest.latents.scale_factor
    engine = FakeEngine(cuda, bundle / artifact.file.path, artifact.spec, scale=scale)
    return TensorRTSession(engine, artifact.spec, Device(cuda))


def _latents(session: TensorRTSession) -> np.ndarray:
    ranges = session.spec.profile
    shape = [d if isinstance(d, int) else ranges[d].min for d in session.spec.inputs[0].shape]
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_tensor_of_another_library_in_host_memory_is_copied_to_the_gpu(tiny_bundle: Path) -> None:
    import torch

    session = _decoder(tiny_bundle, FakeCuda(dlpack_device=(2, 0)))
    latents = _latents(session)
    given = torch.from_numpy(latents.copy())
    (ours,) = session.run({"latents": given}).values()
    given += 1
    (expected,) = session.run({"latents": latents}).values()
    assert np.array_equal(to_numpy(ours), to_numpy(expected))
    session.close()


def test_a_tensor_outlives_its_session_and_the_stream(tiny_bundle: Path) -> None:
    session = _decoder(tiny_bundle, FakeCuda())
    latents = _latents(session)
    (ours,) = session.run({"latents": latents}).values()
    expected = to_numpy(ours)
    session.close()
    assert np.array_equal(to_numpy(ours), expected)


class Foreigner:
    """A tensor of another library on the device."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, *, stream: int | None = None) -> object:
        return to_capsule(self, self.array.ctypes.data, self.array.shape, DType.FLOAT32, (1, 0))


def test_dropping_a_tensor_of_another_library_waits_for_no_lock_and_for_no_work(tiny_bundle: Path) -> None:
    """The garbage collector drops it in any thread, also in one that holds what the device's user waits for."""
    session = _decoder(tiny_bundle, FakeCuda())
    device, given = session._device, Foreigner(_latents(session))
    imported, memory = session._imported("latents", given), weakref.ref(given)
    busy, done = threading.Event(), threading.Event()

    def use_the_device() -> None:
        with device.lock:
            busy.set()
            assert done.wait(60), "the finalizer waited for the device"

    user = threading.Thread(target=use_the_device)
    user.start()
    busy.wait()
    calls = list(device.cuda.calls)
    del given, imported
    done.set()
    user.join()
    assert device.cuda.calls == calls
    assert memory() is not None, "work that reads it may still be in the stream"
    device.synchronize()
    assert memory() is None
    session.close()


def test_a_tensor_of_another_library_that_outlives_the_sessions_is_released_at_once(
    tiny_bundle: Path,
) -> None:
    session = _decoder(tiny_bundle, FakeCuda())
    given = Foreigner(_latents(session))
    imported, memory = session._imported("latents", given), weakref.ref(given)
    session.close()
    del given, imported
    assert memory() is None


def test_an_array_that_changes_after_the_call_changes_no_result(tiny_bundle: Path) -> None:
    """The copy to the device may be made after the call has returned."""
    session = _decoder(tiny_bundle, FakeCuda())
    latents = _latents(session)
    (expected,) = (to_numpy(tensor) for tensor in session.run({"latents": latents}).values())
    (ours,) = session.run({"latents": latents}).values()
    latents += 1
    assert np.array_equal(to_numpy(ours), expected)
    session.close()


def test_a_tensor_on_another_device_that_numpy_cannot_read_is_refused_with_a_hint(tiny_bundle: Path) -> None:
    import torch

    session = _decoder(tiny_bundle, FakeCuda(dlpack_device=(2, 0)))
    latents = torch.from_numpy(_latents(session)).to(torch.bfloat16)
    with pytest.raises(
        SessionError, match=r"vae_decoder: latents, on DLPack's device \(1, 0\), cannot"
    ) as caught:
        session.run({"latents": latents})
    assert "uint16" in str(caught.value.hint)
    session.close()
