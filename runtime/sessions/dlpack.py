"""DLPack capsules through ctypes: device memory is shared with torch, cupy and jax without a copy.

The structures are those of dlpack.h, version 0.x. Every library reads the unversioned capsule of that version.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ditc.runtime.errors import SessionError
from ditc.runtime.spec import DType


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))

_NAME, _USED = b"dltensor", b"used_dltensor"
# DLDataTypeCode and bits of each element type.
_CODES = {
    DType.FLOAT32: (2, 32),
    DType.FLOAT16: (2, 16),
    DType.BFLOAT16: (4, 16),
    DType.INT64: (0, 64),
    DType.BOOL: (6, 8),
}

_Destructor = ctypes.CFUNCTYPE(None, ctypes.py_object)
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)

# The objects that must stay in memory until the consumer calls the deleter, by the address of the capsule's structure.
_alive: dict[int, tuple[Any, ...]] = {}


def to_capsule(
    owner: object,
    pointer: int,
    shape: tuple[int, ...],
    dtype: DType,
    device: tuple[int, int],
    *,
    bool_as_uint8: bool = False,
) -> Any:
    """Make a capsule over contiguous memory.

    Args:
        owner: the object that owns the memory. It is kept until the consumer has released the capsule; if nobody
            consumes the capsule, it is kept for ever.
        bool_as_uint8: for consumers that do not know the type code of bool, which DLPack has only since version 0.6.
    """
    code, bits = (1, 8) if bool_as_uint8 and dtype is DType.BOOL else _CODES[dtype]
    dims = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(pointer, _Device(*device), len(shape), _DataType(code, bits, 1), dims, None, 0)
    managed.deleter = _delete
    address = ctypes.addressof(managed)
    _alive[address] = (managed, dims, owner)
    return _new(address, _NAME, None)


@_Deleter  # type: ignore[untyped-decorator]
def _delete(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


class Foreign:
    """The pointer, shape and element type of another library's tensor. They are valid while this object exists.

    Args:
        producer: any object with `__dlpack__` and `__dlpack_device__`.
        stream: our stream. The producer makes it wait for the work that computes the tensor. None on a CPU.

    Raises:
        SessionError: no stage takes the tensor's element type, or its memory is not contiguous.
    """

    def __init__(self, producer: Any, stream: int | None) -> None:
        capsule = producer.__dlpack__(stream=stream) if stream is not None else producer.__dlpack__()
        address = _pointer(capsule, _NAME)
        managed = ctypes.cast(address, ctypes.POINTER(_Managed))
        tensor = managed.contents.tensor
        self.shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        kinds = {value: key for key, value in _CODES.items()}
        kind = (tensor.dtype.code, tensor.dtype.bits)
        if kind not in kinds or tensor.dtype.lanes != 1:
            raise SessionError(
                f"a DLPack tensor has element type {kind}, which no stage takes",
                hint="pass a tensor of an element type that the stage's spec names",
            )
        if tensor.strides and not _contiguous(self.shape, [tensor.strides[i] for i in range(tensor.ndim)]):
            raise SessionError("a DLPack tensor is not contiguous", hint="pass tensor.contiguous()")
        self.dtype = kinds[kind]
        self.pointer = int(tensor.data or 0) + int(tensor.byte_offset)
        _rename(capsule, _USED)
        self._managed = managed

    def __del__(self) -> None:
        managed = getattr(self, "_managed", None)
        if managed is not None and managed.contents.deleter:
            managed.contents.deleter(managed)


def _contiguous(shape: tuple[int, ...], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
