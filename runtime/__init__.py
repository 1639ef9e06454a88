"""The names that programs import: `from ditc.runtime import Pipeline`.

Each name's module is imported when the name is first used. `import ditc.runtime` and `ditc --help` therefore load
neither numpy nor ONNX Runtime. What the import does is to turn off the telemetry of libraries that are imported later.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ditc.runtime.telemetry import turn_off

if TYPE_CHECKING:
    from ditc.runtime.errors import DitcError
    from ditc.runtime.output import Output
    from ditc.runtime.pipeline import Pipeline, Step
    from ditc.runtime.request import Request
    from ditc.runtime.rng import Generator
    from ditc.runtime.version import __version__

__all__ = ["__version__", "DitcError", "Generator", "Output", "Pipeline", "Request", "Step"]

_MODULES = {
    "__version__": "version",
    "DitcError": "errors",
    "Generator": "rng",
    "Output": "output",
    "Pipeline": "pipeline",
    "Request": "request",
    "Step": "pipeline",
}

turn_off()

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every misspelt name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # later accesses find it without __getattr__
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
