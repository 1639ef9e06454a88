"""Loads and launches PTX kernels through the CUDA driver. No other module launches kernels by itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ditc.runtime.errors import MissingExtra, SessionError


class PtxKernel:
    """One kernel, which is loaded into the current context at its first launch.

    Args:
        name: the kernel's name in the module.
        ptx: the text of the module.
        threads: number of threads per block.
        shared_bytes: dynamic shared memory per block.
    """

    def __init__(self, *, name: str, ptx: str, threads: int, shared_bytes: int) -> None:
        self.name, self.ptx, self.threads, self.shared_bytes = name, ptx, threads, shared_bytes
        self._function: Any = None

    def launch(self, grid: tuple[int, int], arguments: Sequence[int | float], stream: int) -> None:
        """Launch the kernel in the stream.

        Args:
            arguments: addresses as Pointer, integers as int (passed as i32), floats as float (passed as fp32).

        Raises:
            MissingExtra: cuda-python is not installed.
            SessionError: the driver refuses the kernel.
        """
        driver = _driver()
        if self._function is None:
            self._function = self._load(driver)
        values = tuple(arguments)
        kinds = tuple(_kind(value) for value in values)
        size = (*grid, 1, self.threads, 1, 1, self.shared_bytes)
        _check(driver, driver.cuLaunchKernel(self._function, *size, stream, (values, kinds), 0), self.name)

    def _load(self, driver: Any) -> Any:
        (module,) = _check(driver, driver.cuModuleLoadData(self.ptx.encode() + b"\0"), self.name)
        (function,) = _check(driver, driver.cuModuleGetFunction(module, self.name.encode()), self.name)
        if self.shared_bytes > 48 * 1024:  # more must be requested (CUDA programming guide)
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver, driver.cuFuncSetAttribute(function, limit, self.shared_bytes), self.name)
        return function


class Pointer(int):
    """An address. The type distinguishes it from an integer argument."""


def _kind(value: object) -> Any:
    if isinstance(value, Pointer):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(value, float) else ctypes.c_int32


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise MissingExtra("cuda-python", "rtx") from e
    return driver


def _check(driver: Any, answer: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    error, *values = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        raise SessionError(
            f"kernel {name}: {text.decode() if text else error}",
            hint="build without the plugin: --linear-attention decomposed",
        )
    return tuple(values)
