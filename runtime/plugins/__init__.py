"""Plugins that an engine may contain. They must be registered before the library reads the engine."""

from __future__ import annotations

from typing import Any

_registered: dict[str, list[Any]] = {}  # module name -> creators; the library does not keep creators alive


def register(trt: Any) -> None:
    """Register all plugins of ditc with `tensorrt_rtx`, once per process."""
    if trt.__name__ in _registered:
        return
    from ditc.runtime.plugins.linear_attention import NAMES, make_creator

    creators = [make_creator(trt, op) for op in NAMES]
    for creator in creators:
        trt.get_plugin_registry().register_creator(creator, creator.plugin_namespace)
    _registered[trt.__name__] = creators
