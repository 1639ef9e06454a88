"""What a file of a checkpoint really is, by its first bytes, where it is not what its name says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.errors import CheckpointError

PULL = "run `git lfs pull` in the checkpoint's directory, or fetch the file with `hf download`"
FETCH = "what the server answered was saved in the file's place: check its address, log in if needed, fetch it again"
RENAME = "if it is a native checkpoint, name it .pth and run `ditc convert` on it; else fetch the safetensors"


@dataclass(frozen=True, slots=True)
class Content:
    """A kind of file.

    Attributes:
        begins: the first bytes of such a file, in small letters.
        is_torch: whether torch.save writes such files.
    """

    begins: bytes
    what: str
    hint: str
    is_torch: bool = False


CONTENTS = (
    Content(b"version https://git-lfs", "a Git LFS pointer, not the file itself", PULL),
    Content(b"<!doctype html", "an HTML page", FETCH),
    Content(b"<html", "an HTML page", FETCH),
    Content(b"<?xml", "an XML page", FETCH),
    Content(b"entry not found", "the hub's message that it has no such file", FETCH),
    Content(b"access to model", "the hub's message that access is restricted", FETCH),
    Content(b"invalid username or password", "the hub's message that access is restricted", FETCH),
    Content(b"gguf", "a GGUF file, which holds quantized weights", "fetch the safetensors in bf16 or fp16"),
    Content(b"pk\x03\x04", "a file of torch.save", RENAME, is_torch=True),
    Content(b"\x80\x02", "a file of torch.save", RENAME, is_torch=True),
)
LONGEST = max(len(content.begins) for content in CONTENTS)


def content_of(path: Path) -> Content | None:
    """The kind of file that the first bytes show; None for all kinds that are not in CONTENTS."""
    try:
        with path.open("rb") as file:
            first = file.read(LONGEST).lower()
    except OSError:
        return None  # whoever reads the file says why it cannot be read
    return next((content for content in CONTENTS if first.startswith(content.begins)), None)


def check_content(path: Path, *, torch_is_right: bool = False) -> None:
    """Raise CheckpointError, which says what the file is, if it is of a kind that cannot be right.

    Args:
        torch_is_right: whether the file may be one of torch.save.
    """
    content = content_of(path)
    if content is not None and not (torch_is_right and content.is_torch):
        raise CheckpointError(f"{path} is {content.what}", hint=content.hint)


def check_contents(directory: Path) -> None:
    """check_content for every file in the folder."""
    for path in sorted(directory.iterdir()):
        if path.is_file():
            check_content(path)
