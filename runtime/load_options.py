"""How a bundle is loaded: one dataclass for the API and the command line. Its values are checked when it is made."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from ditc.runtime.cores import most_threads
from ditc.runtime.errors import UsageError
from ditc.runtime.gpu import check_device
from ditc.runtime.sessions.registry import AUTO, backend_names, device_names, provider_names, row_of, rows
from ditc.runtime.spec import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The choices of a program or person that loads a bundle.

    Attributes:
        backend: the library that runs the stages. "auto" takes the first backend in the order of preference that can
            run on this machine and that the bundle has a denoiser for, and logs the reason.
        precision: the denoiser's precision. None takes the highest that the bundle holds for the backend.
        stage_precision: precisions of other stages than the denoiser, as STAGE=PRECISION separated by commas, such as
            "vae_decoder=int8". A stage that is not named takes the denoiser's precision or else the highest that the
            bundle holds, but never 8 bits.
        threads: the number of CPU threads that each stage computes with. 0 takes one per core that this process may
            use. More than the CPUs that it may use are never faster, so they are cut to that number, with a warning.
        provider: what ONNX Runtime computes with: "cpu" or "cuda". "auto" takes CUDA if it works here, else the CPU.
        device: CUDA's number of the GPU, or its UUID or the beginning of that. "" takes CUDA's first, which is usually
            the fastest one. The process then sees only this GPU, so it must be named before CUDA starts. Or what
            OpenVINO computes on: "CPU", its default, "GPU" (Intel's) or "NPU".
        low_vram: keep only one stage at a time in GPU memory, and stream its weights if its engine was built for that.
        private_copy: copy the files of each stage into a private temporary folder, hash the copies and open those. Then
            nothing that is written into the bundle afterwards reaches an open pipeline. Not on Windows.
        require_signature: file with the ed25519 public key (PEM) whose owner must have signed the bundle.
        require_certificate: refuse artifacts that parity has not proven for this machine. Together with
            require_signature, only results count that the owner of that key has signed.
        self_test: run every stage on its golden inputs before its first use on this machine, unless builds run their
            graphs on such a device.

    Raises:
        UsageError: the backend, provider, device or precision is unknown, the provider or the device belongs to another
            backend, or threads is negative.
    """

    backend: str = AUTO
    precision: str | None = None
    stage_precision: str = ""
    threads: int = 0
    provider: str = AUTO
    device: str = ""
    low_vram: bool = False
    private_copy: bool = False
    require_signature: str | Path | None = None
    require_certificate: bool = False
    self_test: bool = True

    def __post_init__(self) -> None:
        if self.backend != AUTO:
            row_of(self.backend)
        if self.precision is not None and self.precision not in set(Precision):
            raise UsageError(
                f"precision {self.precision!r} is unknown", hint=f"choose one of {', '.join(Precision)}"
            )
        _ = self.stage_precisions  # raises UsageError
        self._bound_threads()
        self._check_device()
        if self.provider not in provider_names():
            raise UsageError(
                f"provider {self.provider!r} is unknown", hint=f"choose one of {', '.join(provider_names())}"
            )
        if self.named_backend != AUTO and self.provider not in (AUTO, *row_of(self.named_backend).providers):
            raise UsageError(
                f"provider {self.provider} belongs to {_owners(self.provider)}, not to backend {self.backend}",
                hint="leave out either the provider or the backend",
            )

    def _check_device(self) -> None:
        check_device(self.gpu)
        if not self.device or self.backend == AUTO:
            return
        devices = row_of(self.backend).devices
        if self.device.upper() not in devices if devices else not self.gpu:
            takes = ", ".join(devices) or "the number or UUID of a GPU, which ditc doctor lists"
            raise UsageError(
                f"device {self.device} does not belong to backend {self.backend}",
                hint=f"{self.backend} takes {takes}; or leave out either the device or the backend",
            )

    def _bound_threads(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 0:
            raise UsageError(
                f"threads is {self.threads!r}, which is not a number of threads",
                hint="choose 1 or more, or 0 for one per core that this process may use",
            )
        most = most_threads()
        if self.threads > most:
            log.warning(
                "threads is %d, but this process may use %d CPU(s), so %d are used", self.threads, most, most
            )
            object.__setattr__(self, "threads", most)

    @property
    def stage_precisions(self) -> dict[str, Precision]:
        """`stage_precision` by stage.

        Raises:
            UsageError: a part is not STAGE=PRECISION.
        """
        found = {}
        for part in filter(None, self.stage_precision.split(",")):
            stage, _, name = (text.strip() for text in part.partition("="))
            if not stage or name not in set(Precision):
                raise UsageError(
                    f"stage precision {part!r} is not STAGE=PRECISION",
                    hint=f"use for example vae_decoder=int8; the precisions are {', '.join(Precision)}",
                )
            found[stage] = Precision(name)
        return found

    @property
    def named_backend(self) -> str:
        """The backend that these options ask for, directly or through its provider or device; "auto" for none."""
        if self.backend != AUTO:
            return self.backend
        if self.provider != AUTO:
            return next(row.name for row in rows() if self.provider in row.providers)
        return next((row.name for row in rows() if self.device.upper() in row.devices), AUTO)

    @property
    def gpu(self) -> str:
        """The NVIDIA GPU that these options name; "" if they name none."""
        return "" if self.device.upper() in device_names() else self.device


class LoadKeywords(TypedDict, total=False):
    """The fields of LoadOptions as keyword arguments."""

    backend: str
    precision: str | None
    stage_precision: str
    threads: int
    provider: str
    device: str
    low_vram: bool
    private_copy: bool
    require_signature: str | Path | None
    require_certificate: bool
    self_test: bool


DEFAULTS = LoadOptions()


def add_load_arguments(parser: argparse.ArgumentParser, *names: str, when: str = "") -> None:
    """Add the options of the command line that `load_options` reads.

    Args:
        names: the fields of LoadOptions that the verb has options for; all fields if none is named.
        when: a sentence in front of every help text, for a verb that loads a bundle only under a condition.
    """
    for name, settings in _arguments().items():
        if not names or name in names:
            flag = "--" + ("no-" if settings.get("action") == "store_false" else "") + name.replace("_", "-")
            settings["help"] = f"{when} {settings['help']}".strip()
            parser.add_argument(flag, dest=name, default=getattr(DEFAULTS, name), **settings)


def load_options(arguments: argparse.Namespace) -> LoadOptions:
    """The options that were parsed. Raises UsageError as LoadOptions does."""
    return LoadOptions(**{name: vars(arguments)[name] for name in given_names(arguments)})


def as_json(options: LoadOptions) -> dict[str, Any]:
    """The options as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def given_names(arguments: argparse.Namespace) -> list[str]:
    """The fields of LoadOptions that the command line sets to a value that is not the default."""
    parsed = vars(arguments)
    names = [field.name for field in fields(LoadOptions) if field.name in parsed]
    return [name for name in names if parsed[name] != getattr(DEFAULTS, name)]


def _arguments() -> dict[str, dict[str, Any]]:
    """The settings of each field's option for argparse. Made at every call, because backends may be registered."""
    return {
        "backend": {
            "metavar": "NAME",
            "help": f"Library that runs the stages: {_either(backend_names())}. auto takes the first of "
            f"{', '.join(row.name for row in rows())} that can run on this machine and that the bundle has a denoiser "
            "for; on a CPU, a higher precision comes first (default: %(default)s).",
        },
        "precision": {
            "metavar": "NAME",
            "help": f"Precision of the denoiser, if the bundle holds several: {_either(tuple(Precision))} "
            "(default: the highest that the bundle holds for the backend).",
        },
        "stage_precision": {
            "metavar": "STAGE=NAME,...",
            "help": "Precision of other stages, such as vae_decoder=int8. Unless named here, none but the denoiser "
            "runs in 8 bits (default: the denoiser's precision, or the highest that the bundle holds).",
        },
        "threads": {
            "type": int,
            "metavar": "THREADS",
            "help": "Number of CPU threads that each stage computes with; 0 takes one per core that this process may "
            "use (default: %(default)s).",
        },
        "provider": {
            "metavar": "NAME",
            "help": f"What {_owners()} computes with: {_either(provider_names())}. auto takes CUDA if it works on this "
            "machine, else the CPU (default: %(default)s).",
        },
        "device": {
            "metavar": "DEVICE",
            "help": "The NVIDIA GPU to use, by CUDA's number or by its UUID, as ditc doctor lists them; or, with "
            f"OpenVINO, {_either(device_names())} (default: CUDA's first GPU, which is usually the fastest; OpenVINO's "
            "CPU).",
        },
        "low_vram": {
            "action": "store_true",
            "help": "Keep only one stage at a time in GPU memory, and stream the weights of engines that were built "
            "with --weight-streaming. ONNX Runtime ignores this (default: all stages stay loaded).",
        },
        "private_copy": {
            "action": "store_true",
            "help": "Open copies of the files, in a private temporary folder (TMPDIR) that is removed at once, so that "
            "what is written into the bundle later has no effect (default: the bundle's files are mapped).",
        },
        "require_signature": {
            "type": Path,
            "metavar": "PUB.pem",
            "help": "Refuse a bundle that the owner of this ed25519 public key has not signed "
            "(default: no signature is required).",
        },
        "require_certificate": {
            "action": "store_true",
            "help": "Refuse artifacts that parity has not proven for this machine. With --require-signature, only "
            "results count that the owner of that key has signed (default: only warn).",
        },
        "self_test": {
            "action": "store_false",
            "help": "Do not run the self-test on the golden inputs before stages compute on a GPU for the first time "
            "(default: it runs once per machine and set of artifacts).",
        },
    }


def _owners(provider: str | None = None) -> str:
    """The titles of the libraries that have this provider, or of all that have providers."""
    return " or ".join(row.title for row in rows() if row.providers and provider in (None, *row.providers))


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
