"""Finding the GPUs: what is read from CUDA's driver, and which one is used."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from ditc.runtime import gpu as module
from ditc.runtime.cli import main
from ditc.runtime.cuda_driver import VISIBLE, CudaAnswer, CudaGpu, ask
from ditc.runtime.errors import SessionError, UsageError
from ditc.runtime.gpu import Gpu, check_device, driver_version, find_gpu, find_gpus, no_gpu, select_gpu
from ditc.runtime.machine import this_machine

# In CUDA's order, the fastest first. nvidia-smi lists them by their slots.
FAST = CudaGpu(
    name="NVIDIA GeForce RTX 5090",
    sm="sm120",
    uuid=f"GPU-{uuid.UUID(int=0xAA << 120)}",
    memory_bytes=32 << 30,
)
SLOW = CudaGpu(
    name="NVIDIA L40S MIG 1g", sm="sm89", uuid=f"MIG-{uuid.UUID(int=0xBB << 120)}", memory_bytes=6 << 30
)


class Driver:
    """The functions of libcuda over two GPUs, of which CUDA_VISIBLE_DEVICES may hide some."""

    def __init__(self, visible: str | None = None, error: int = 0) -> None:
        entries = ["0", "1"] if visible is None else [entry for entry in visible.split(",") if entry]
        found = [
            next((g for i, g in enumerate((FAST, SLOW)) if e in (str(i), g.uuid)), None) for e in entries
        ]
        self.gpus = [gpu for gpu in found if gpu is not None]
        self.error = error or (0 if self.gpus else 100)

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}.get(code)
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:
        name.value = self.gpus[device].name.encode()
        return 0

    def cuDeviceGetUuid_v2(self, identity: Any, device: int) -> int:
        identity.raw = uuid.UUID(self.gpus[device].uuid[4:]).bytes
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: int) -> int:
        memory._obj.value = self.gpus[device].memory_bytes
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: int) -> int:
        capability = self.gpus[device].sm[2:]
        value._obj.value = int(capability[:-1] if which == 75 else capability[-1])
        return 0


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A machine with two GPUs, where nothing has asked CUDA yet. The result stands for the environment."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(module, "ask", lambda: ask(Driver(environment.get(VISIBLE))))
    monkeypatch.setattr(module, "_selected", "")
    module.cuda.cache_clear()
    yield environment
    module.cuda.cache_clear()


def test_everything_about_the_gpus_is_read_from_the_driver() -> None:
    assert ask(Driver()) == CudaAnswer(gpus=(FAST, SLOW), version="13.1")


def test_a_driver_of_before_cuda_11_4_has_the_first_form_of_uuids() -> None:
    class Old(Driver):
        cuDeviceGetUuid = Driver.cuDeviceGetUuid_v2
        cuDeviceGetUuid_v2 = None

    assert ask(Old()).gpus == (FAST, SLOW)


@pytest.mark.parametrize(
    ("driver", "lack"),
    [
        (Driver(error=100), "cuInit: CUDA_ERROR_NO_DEVICE, with CUDA_VISIBLE_DEVICES='7'"),
        (Driver(error=803), "cuInit: CUDA error 803, with CUDA_VISIBLE_DEVICES='7'"),
    ],
)
def test_a_driver_without_a_gpu_says_why(driver: Driver, lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "7")
    assert ask(driver) == CudaAnswer(lack=lack)


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not ask().gpus and "cannot be opened" in ask().lack


@pytest.mark.usefixtures("two_gpus")
def test_the_gpu_is_the_first_in_cudas_order_even_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_gpu() == Gpu(FAST.name, FAST.sm) and find_gpus() == (FAST, SLOW)
    assert driver_version() and [gpu.split(",")[0] for gpu in this_machine().gpus] == [FAST.name, SLOW.name]


@pytest.mark.parametrize(
    ("device", "before", "after", "gpu"),
    [
        ("0", None, "0", FAST),
        ("1", None, "1", SLOW),
        ("1", "1,0", "0", FAST),
        (SLOW.uuid, None, SLOW.uuid, SLOW),
        (SLOW.uuid, "0", SLOW.uuid, SLOW),
    ],
)
def test_one_gpu_is_selected_by_number_or_uuid_as_often_as_asked(
    device: str, before: str | None, after: str, gpu: CudaGpu, two_gpus: dict[str, str]
) -> None:
    if before is not None:
        two_gpus[VISIBLE] = before
    for _ in range(2):
        select_gpu(device, two_gpus)
        assert two_gpus == {VISIBLE: after} and find_gpus() == (gpu,)
    with pytest.raises(SessionError, match="CUDA has already started in this process"):
        select_gpu("0" if device == "1" else "1", two_gpus)


@pytest.mark.parametrize(("device", "before"), [("7", None), ("2", "1,0"), ("GPU-1234", None)])
def test_a_gpu_that_is_not_there_is_refused(
    device: str, before: str | None, two_gpus: dict[str, str]
) -> None:
    if before is not None:
        two_gpus[VISIBLE] = before
    with pytest.raises(UsageError, match=f"there is no GPU {device} here"):
        select_gpu(device, two_gpus)


def test_once_cuda_has_started_only_its_first_gpu_can_be_named(two_gpus: dict[str, str]) -> None:
    assert find_gpu() is not None
    for device in ("0", FAST.uuid[:8], ""):
        select_gpu(device, two_gpus)
    with pytest.raises(SessionError, match="its first GPU is NVIDIA GeForce RTX 5090") as caught:
        select_gpu("1", two_gpus)
    assert VISIBLE in str(caught.value.hint) and two_gpus == {}


@pytest.mark.parametrize("device", ["cuda:1", "-1", "one", "GPU-", "1,2"])
def test_what_is_neither_a_number_nor_a_uuid_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="neither a number nor a UUID"):
        check_device(device)


@pytest.mark.usefixtures("two_gpus")
def test_doctor_lists_the_gpus_with_what_device_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    out = capsys.readouterr().out
    assert f"gpu 0       {FAST.name}, sm120, 34 GB, {FAST.uuid}" in out
    assert f"gpu 1       {SLOW.name}, sm89, 6 GB, {SLOW.uuid}" in out


def test_the_reason_why_there_is_no_gpu_is_in_the_message(two_gpus: dict[str, str]) -> None:
    two_gpus[VISIBLE] = ""
    assert find_gpu() is None and "CUDA_ERROR_NO_DEVICE" in no_gpu()
    assert driver_version() == ""
