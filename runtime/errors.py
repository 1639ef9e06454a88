"""The errors that ditc raises on purpose. Everything else that escapes is a bug.

DitcError                 the message says what happened, where and with which values; .hint says what to do
|-- UsageError            an argument or option that is wrong or not supported
|   `-- OutputError       a path to which a result cannot be written
|-- BundleError           a bundle that is missing, damaged, altered or too new
|-- CheckpointError       a checkpoint that cannot be read or does not fit its family
|-- BuildError            an export or an engine build that failed
|-- SessionError          a backend that cannot run a stage here
|-- NumericsError         a wrong result: NaN, Inf, or a picture of one colour
`-- MissingExtra          an optional dependency that is not installed
"""

from __future__ import annotations


class DitcError(Exception):
    """Base of all deliberate errors.

    Args:
        message: what happened and where, with the values. Its lines are joined, as messages of other libraries that it
            quotes may have several.
        hint: what the user can do about it. It is printed on a line of its own.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
        self.hint = hint


class UsageError(DitcError):
    """An argument or option that is wrong or not supported."""


class OutputError(UsageError):
    """A path to which a result cannot be written: no space, no permission, or something else is in its place."""


class BundleError(DitcError):
    """A bundle that is missing, damaged, altered, or written by a newer version of ditc."""


class CheckpointError(DitcError):
    """A checkpoint that cannot be read or does not fit its family."""


class BuildError(DitcError):
    """An export or an engine build that failed."""


class SessionError(DitcError):
    """A backend that cannot run a stage on this machine."""


class NumericsError(DitcError):
    """A wrong result: NaN or Inf in a stage, or a picture of one colour."""


class LoraError(DitcError):
    """The file of a LoRA in use that is gone, or has changed since it was loaded."""


class MissingExtra(DitcError):
    """An optional dependency that is not installed. The hint is the pip command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", hint=f'pip install "ditc[{extra}]"')
