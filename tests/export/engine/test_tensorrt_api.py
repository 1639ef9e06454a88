"""The installed TensorRT libraries have all names and parameters of the API that ditc uses."""

from __future__ import annotations

import importlib

import pytest
from tensorrt_api import API, RTX_ONLY, TENSORRT_ONLY, differences

from ditc.runtime.sessions.engine import Context, Engine
from ditc.runtime.sessions.tensorrt_engine import TensorRTContext, TensorRTEngine


@pytest.mark.parametrize(("name", "own"), [("tensorrt_rtx", RTX_ONLY), ("tensorrt", TENSORRT_ONLY)])
def test_the_library_has_every_name_and_parameter_that_is_used(
    name: str, own: dict[str, tuple[str, ...]]
) -> None:
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "tensorrt":
        importlib.import_module("tensorrt.plugin")
    assert not differences(module, {**API, **own})


def test_a_missing_name_and_a_changed_parameter_are_reported() -> None:
    class Other:
        class Runtime:
            """A library of another version."""

            def deserialize_cuda_engine(self) -> None:
                """deserialize_cuda_engine(self, data: bytes) -> ICudaEngine"""

    told = differences(Other, {k: API[k] for k in ("Runtime.deserialize_cuda_engine", "ILogger.ERROR")})
    assert (
        len(told) == 2
        and "does not take serialized_engine" in told[0]
        and "ILogger.ERROR is missing" in told[1]
    )


def test_the_engine_of_tensorrt_has_what_sessions_ask_of_an_engine() -> None:
    for promised, real in ((Engine, TensorRTEngine), (Context, TensorRTContext)):
        names = {name for name in vars(promised) if not name.startswith("_")}
        assert names <= set(vars(real)), names - set(vars(real))
