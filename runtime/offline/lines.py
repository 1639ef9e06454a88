"""One line of an input file: a request as a JSON object, checked as far as that needs no bundle.

    {"prompt": "a red heart", "seed": 3, "width": 512, "height": 768}
    {"id": "tree-1", "prompt": "a green tree", "size": "512x768", "steps": 10}
    {"prompt": "a green tree", "control_image": "edges/tree.png", "controlnet_conditioning_scale": 0.8}

The fields are those of `Request` that JSON can hold. `image`, `mask_image` and `control_image` are paths of pictures,
relative to the folder of the input file (line_images.py). `id` names the line in the results. `size` stands for width
and height, and `steps` for num_inference_steps. A field that is null counts as left out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from ditc.runtime.errors import UsageError
from ditc.runtime.offline import line_images
from ditc.runtime.request import INTEGERS, NUMBERS, Request
from ditc.runtime.request_checks import checked

# Long prompts take some KB. A file that is not a list of requests often has no line ends at all.
MAX_LINE_BYTES = 2**20
MAX_ID_LENGTH = 256
# The pictures of a line are in memory together. More can be asked for with more lines.
MAX_PICTURES_OF_LINE = 64

# Fields of Request that JSON cannot hold, or that need one of these.
_ARRAYS = ("latents", "prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
_NEGATIVE_ARRAYS = (
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
    "negative_pooled_prompt_embeds",
)
_OBJECTS = ("generator", *_ARRAYS, *_NEGATIVE_ARRAYS)
# How pictures are returned, and what happens to the other pictures of a request, is decided by the batch.
_OF_THE_BATCH = ("output_type", "strict")
FIELDS = tuple(f.name for f in fields(Request) if f.name not in (*_OBJECTS, *_OF_THE_BATCH))
SHORT_FORMS = {"size": ("width", "height"), "steps": ("num_inference_steps",)}
ID = "id"

_TEXTS = tuple(name for name in FIELDS if "prompt" in name and name not in INTEGERS)
_BOOLEANS = ("use_resolution_binning", "allow_uniform")
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A checked line.

    Attributes:
        number: its number in the file, from 1.
        id: what the user calls it; None without a name.
        asked: the fields of `Request` that it gives, with the paths of pictures in place of the pictures.
        seed: the one that it gives, or one that is derived from its number and fields.
    """

    number: int
    id: str | None
    asked: dict[str, Any]
    seed: int

    def request(self, folder: Path) -> Request:
        """The request that the line asks for, with its pictures.

        Args:
            folder: that of the input file.

        Raises:
            UsageError: a picture cannot be read.
        """
        return Request(**{**line_images.with_pictures(self.asked, folder), "seed": self.seed})

    def check_files(self, folder: Path) -> None:
        """Check the files that the line names, without decoding them. Raises UsageError, which names the line."""
        try:
            line_images.check_files(self.asked, folder)
        except UsageError as e:
            raise UsageError(f"line {self.number}: {e}", hint=e.hint) from e


def parse_line(raw: bytes, number: int) -> Line:
    """Read a line. No file that it names is touched.

    Raises:
        UsageError: the line does not hold a request. The message begins with the line's number.
    """
    try:
        given = _parsed(raw)
        name = given.pop(ID, None)
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_ID_LENGTH):
            raise UsageError(
                f"id is {name!r:.80}, not a text of 1 to {MAX_ID_LENGTH} characters",
                hint="choose another one, or leave it out",
            )
        asked = _with_long_names(given)
        _check_fields(asked)
        _check_types(asked)
        line_images.check_paths(asked)
        checked(Request(**line_images.without_pictures(asked)))
    except UsageError as e:
        raise UsageError(f"line {number}: {e}", hint=e.hint) from e
    seed = asked.pop("seed", None)
    return Line(
        number=number, id=name, asked=asked, seed=derived_seed(number, asked) if seed is None else seed
    )


def derived_seed(number: int, asked: dict[str, Any]) -> int:
    """The seed of a line without one: the first 4 bytes of the SHA-256 of its number and its fields.

    It does not depend on the line's id, nor on the order and the short forms of its fields.
    """
    content = f"{number}\n{json.dumps(asked, sort_keys=True, ensure_ascii=True, separators=(',', ':'))}"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big")


def _parsed(raw: bytes) -> dict[str, Any]:
    """The object in a line, without the fields that are null."""
    if len(raw) > MAX_LINE_BYTES:
        raise UsageError(
            f"it has more than {MAX_LINE_BYTES} bytes",
            hint="write one JSON object per line, and shorter texts",
        )
    if not raw.strip():
        raise UsageError("it is empty", hint="remove the empty line")
    try:
        given = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair has no encoding
    except UnicodeDecodeError as e:
        raise UsageError(f"it is not UTF-8 at byte {e.start}", hint="save the file as UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"it is not JSON: {e}", hint='write for example {"prompt": "a red heart"}') from e
    if not isinstance(given, dict):
        raise UsageError(
            f"it is {given!r:.80}, not a JSON object", hint='write for example {"prompt": "a red heart"}'
        )
    return {name: value for name, value in given.items() if value is not None}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _with_long_names(given: dict[str, Any]) -> dict[str, Any]:
    """The fields with `size` and `steps` replaced by what they stand for."""
    for short, names in SHORT_FORMS.items():
        if short in given and (both := [name for name in names if name in given]):
            raise UsageError(f"{short} and {both[0]} are both given", hint="give only one of them")
    asked = dict(given)
    if "steps" in asked:
        asked["num_inference_steps"] = asked.pop("steps")
    if "size" in asked:
        size = asked.pop("size")
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None:
            raise UsageError(
                f"size is {size!r:.80}, not width x height in pixels", hint='write it as "512x768"'
            )
        asked["width"], asked["height"] = int(match[1]), int(match[2])
    return asked


def _check_fields(asked: dict[str, Any]) -> None:
    for name in asked:
        if name in FIELDS:
            continue
        if name in _OBJECTS:
            hint = "leave it out: draw such requests in Python, with Pipeline"
            raise UsageError(f"{name} cannot be given in a line", hint=hint)
        if name in _OF_THE_BATCH:
            raise UsageError(f"{name} cannot be chosen by a line", hint="leave it out")
        near = difflib.get_close_matches(name, [ID, *SHORT_FORMS, *FIELDS], n=1)
        hint = f"did you mean {near[0]}?" if near else "use the arguments of Pipeline, and id"
        raise UsageError(f"a request has no field {name!r:.80}", hint=hint)
    if "prompt" not in asked:
        raise UsageError("it has no prompt", hint="give a prompt; it may be empty")


def _check_types(asked: dict[str, Any]) -> None:
    """Check what `Request` takes more of: lists of prompts, and True as a number."""
    for name in _TEXTS:
        if name in asked and not isinstance(asked[name], str):
            raise UsageError(
                f"{name} is {asked[name]!r:.80}, not one text", hint="write a line for every prompt"
            )
    for name in (*INTEGERS, *NUMBERS):
        value = asked.get(name)
        if isinstance(value, bool) and not (name == "intermediate_timesteps" and value is False):
            raise UsageError(f"{name} is {json.dumps(value)}, not a number", hint="pass a number")
    for name in _BOOLEANS:
        if name in asked and not isinstance(asked[name], bool):
            raise UsageError(f"{name} is {asked[name]!r:.80}, not true or false", hint="pass true or false")
    count = asked.get("num_images_per_prompt", 1)
    if isinstance(count, int) and count > MAX_PICTURES_OF_LINE:
        raise UsageError(
            f"num_images_per_prompt is {count}, and a line has at most {MAX_PICTURES_OF_LINE}",
            hint="write more lines for more pictures",
        )
