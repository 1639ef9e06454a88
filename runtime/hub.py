"""Ids of repositories on the Hugging Face hub, and its refusals in words. Needs huggingface_hub (extra `hub`)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.runtime.errors import BundleError, MissingExtra

# org/name or org/name@revision, as huggingface_hub validates them. A Path has made hf:/ of hf://.
HUB_ID = re.compile(r"(?P<scheme>hf:/{1,2})?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the hub, and a branch, tag or commit of it; None is the main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision can never mean something else."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def find_hub_id(source: str | Path) -> HubId | None:
    """The hub id that a user has typed in the place of a path; None if it is a path.

    A relative path whose first folder exists is taken for a misspelt path, and nothing is asked of the hub. The form
    hf://org/name is always an id.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    match = HUB_ID.fullmatch(text)
    if match is None:
        return None
    if match["scheme"] is None and (os.path.lexists(text) or os.path.lexists(text.split("/")[0])):
        return None
    return HubId(match["repo"], match["revision"])


def check_library() -> None:
    """Raise MissingExtra if huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as e:
        raise MissingExtra("huggingface-hub", "hub") from e


def unreachable() -> tuple[type[Exception], ...]:
    """The errors of a hub that cannot be reached, or that answers with an error of its own."""
    from huggingface_hub.errors import HfHubHTTPError

    # OSError and the errors of the HTTP library, which is httpx or httpx2 depending on huggingface_hub's version.
    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


@contextmanager
def refusals(hub_id: HubId) -> Iterator[None]:
    """Say in words that the hub has no such repository, revision or file, or refuses access.

    Raises:
        BundleError: it does. Errors of the connection pass through.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "check the id; if it is private, run `hf auth login`"
    try:
        yield
    except GatedRepoError as e:
        hint = "accept its licence on the hub and run `hf auth login`"
        raise BundleError(f"{hub_id.repo} is gated", hint=hint) from e
    except RepositoryNotFoundError as e:
        message = f"there is no path {hub_id.repo} here, and the hub has no model of that name"
        raise BundleError(message, hint=login) from e
    except RevisionNotFoundError as e:
        message = f"{hub_id.repo} has no revision {hub_id.revision}"
        raise BundleError(message, hint="name a branch, tag or commit of it") from e
    except LocalEntryNotFoundError:
        raise
    except (EntryNotFoundError, HFValidationError) as e:
        raise BundleError(f"{hub_id}: {str(e).splitlines()[0]}", hint=login) from e


@contextmanager
def progress_bars() -> Iterator[None]:
    """Let huggingface_hub show its progress on a terminal, and nothing elsewhere."""
    from huggingface_hub import utils

    bars: Any = utils  # its type information does not name these functions
    silence = not sys.stderr.isatty() and not bars.are_progress_bars_disabled()
    if silence:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            bars.enable_progress_bars()
