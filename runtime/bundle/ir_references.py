"""What an OpenVINO IR file refers to: ranges of bytes in the file of its weights, which has its name but ends in .bin.

The file is XML. OpenVINO's reader knows no document types, so a file that has one is refused, not interpreted.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from ditc.runtime.bundle.references import Reference
from ditc.runtime.errors import BundleError


def ir_references(model: Path) -> list[Reference]:
    """Every reference of an .xml file, in the order of the file.

    Raises:
        BundleError: the file is not an IR file, or one of its references cannot be read.
    """
    reader = _Reader(model.with_suffix(".bin").name)
    try:
        reader.parser.Parse(model.read_bytes(), True)
    except (expat.ExpatError, ValueError) as e:
        raise BundleError(
            f"{model} is not an IR file that ditc opens: {e}", hint="do not use this bundle"
        ) from e
    return reader.found


class _Reader:
    """Collects the constants, of subgraphs too: the element `data` of a layer whose type is Const."""

    def __init__(self, location: str) -> None:
        self.found: list[Reference] = []
        self._location, self._depth = location, 0
        self._layers: list[dict[str, str]] = []  # those around the current element
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.StartDoctypeDeclHandler = self._refuse_document_type

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._depth == 0 and name != "net":
            raise ValueError(f"its outermost element is {name[:40]!r}, not 'net'")
        self._depth += 1
        if name == "layer":
            self._layers.append(attributes)
        elif (
            name == "data"
            and self._layers
            and (self._layers[-1].get("type") == "Const" or {"offset", "size"} <= attributes.keys())
        ):
            self.found.append(
                Reference(
                    owner=f"the constant {self._layers[-1].get('name', '')[:200]!r}",
                    location=self._location,
                    offset=_number(attributes, "offset"),
                    length=_number(attributes, "size"),
                )
            )

    def _end(self, name: str) -> None:
        self._depth -= 1
        if name == "layer":
            self._layers.pop()

    def _refuse_document_type(self, *what: object) -> NoReturn:
        raise ValueError("it has a document type")


def _number(attributes: dict[str, str], key: str) -> int:
    text = attributes.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{key} {text[:40]!r} is not a number of bytes")
    return int(text)
