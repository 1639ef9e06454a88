"""Plugins that an engine may hold, known to the library before the engine is read."""

from __future__ import annotations

from typing import Any

_registered: dict[str, Any] = {}  # module name -> creators, which the library does not keep alive


def register(trt: Any) -> None:
    """Register every plugin of ditc with `tensorrt_rtx`, once a process."""
    if trt.__name__ in _registered:
        return
    from ditc.runtime.plugins.relu_linear_attention import make_creator

    creator = make_creator(trt)
    trt.get_plugin_registry().register_creator(creator, creator.plugin_namespace)
    _registered[trt.__name__] = creator
