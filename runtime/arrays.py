"""Arrays that a caller gives, of whatever library: to finite float32 on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from ditc.runtime.errors import UsageError
from ditc.runtime.session import Array, DeviceTensor


def given_array(name: str, value: Any, *, hint: str, finite: bool = True) -> Array:
    """The values as float32 on the host. They are shared with the caller's array if that is float32 already.

    Args:
        name: what the caller calls the array, for messages.
        value: an array, nested lists of numbers, or a tensor of torch, which may have a gradient, lie on a device and
            be of a type that numpy does not know, such as bf16.
        hint: what to pass instead.
        finite: whether NaN and Inf are refused.

    Raises:
        UsageError: this is no array of real numbers, or, with `finite`, it has values that are NaN or Inf.
    """
    try:
        array = np.asarray(_on_host(value))
        if array.dtype.kind == "c":
            raise TypeError("its values are complex")
        with np.errstate(over="ignore"):  # a value beyond float32 becomes Inf, which is refused below
            array = np.asarray(array, np.float32)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UsageError(f"{name}: not an array of numbers ({e})", hint=hint) from e
    if finite and not np.isfinite(array).all():
        raise UsageError(
            f"{name}: {np.count_nonzero(~np.isfinite(array))} values are NaN or Inf",
            hint="check where it was computed: text encoders, for example, may overflow in fp16",
        )
    return array


def _on_host(value: Any) -> Any:
    if hasattr(value, "detach"):  # torch: its numpy() takes neither gradients nor devices nor bf16
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return value.numpy() if isinstance(value, DeviceTensor) else value
