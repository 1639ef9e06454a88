"""One contestant of benchmarks/cpu_peers.py: a process that loads one model once, and then answers commands.

    python -P peer_worker.py SETTINGS     SETTINGS is JSON: {"kind": "ditc", "model": PATH, "threads": 2, ...}

Commands are lines of JSON on stdin, answers are lines of JSON on stdout; arrays are files. It answers once when its
model is loaded, then once per command, and a failure is {"error": TEXT}. What libraries print goes to stderr. This file
runs in the environment of its library, which may have neither ditc nor this package: it imports only what it measures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter

STARTED = perf_counter()

import json  # noqa: E402  # the time of every import counts
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from typing import Any  # noqa: E402

PACKAGES = (
    *("torch", "diffusers", "transformers", "optimum", "optimum-intel", "openvino", "nncf", "onnxruntime"),
    *("numpy", "tokenizers"),
)


def main() -> None:
    """Load the model that argv names, and answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    contestant: Contestant | None = None

    def load() -> dict[str, Any]:
        nonlocal contestant
        contestant = KINDS[settings["kind"]](settings)
        return {
            "import_s": contestant.imported - STARTED,
            "load_s": perf_counter() - contestant.imported,
            "memory": memory(),
            "versions": dict(versions()),
        }

    def reply(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer = work()
        except (
            Exception
        ) as e:  # every library has classes of its own; the race goes on without this contestant
            answer = {"error": f"{type(e).__name__}: {e}".strip()[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        return "error" not in answer

    if reply(load) and contestant is not None:
        for line in sys.stdin:
            reply(lambda line=line, to=contestant: obey(to, json.loads(line)))  # type: ignore[misc]
    os._exit(0)  # some libraries take seconds to end their threads


def obey(contestant: Contestant, command: dict[str, Any]) -> dict[str, Any]:
    """Do what the command says, and write its array to command["save"] if that is given.

    {"do": "draw", "latents": FILE, "prompt": ..., "num_inference_steps": ..., ...}     a picture, (1,H,W,3) in [0,1]
    {"do": "step", ...}       the same without decoding: the latents after the first step; seconds are per later step
    {"do": "decode", "latents": FILE}     a decoded picture, (1,H,W,3) in [0,1]
    """
    import numpy as np

    command = dict(command)
    do, save, latents = command.pop("do"), command.pop("save", None), np.load(command.pop("latents"))
    if do == "decode":
        begun = perf_counter()
        result = contestant.decode(latents)
        seconds = perf_counter() - begun
    else:
        ends: list[float] = []
        first: list[Any] = []

        def note(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(perf_counter())
            if do == "step" and not first:
                first.append(np.array(tensors["latents"]))
            return tensors

        begun = perf_counter()
        result = contestant.draw(
            latents=latents,
            output_type="latent" if do == "step" else "np",
            callback_on_step_end=note,
            **command,
        )
        seconds = perf_counter() - begun
        if do == "step":  # the first step also waits for the text
            result, seconds = first[0], (ends[-1] - ends[0]) / (len(ends) - 1)
    if save:
        np.save(save, np.asarray(result, np.float32))
    return {"seconds": seconds, "memory": memory()}


class Contestant(ABC):
    """What each library does in its own way. `imported` is when its imports were done."""

    imported: float

    @abstractmethod
    def draw(self, *, latents: Any, output_type: str, **arguments: Any) -> Any:
        """A picture (1,H,W,3) in [0,1], or latents, for arguments of diffusers' pipelines."""

    @abstractmethod
    def decode(self, latents: Any) -> Any:
        """A picture (1,H,W,3) in [0,1] from finished latents."""


class Diffusers(Contestant):
    """diffusers' pipeline, eager or with its large networks compiled by torch.compile."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from diffusers import SanaPipeline

        self.imported = perf_counter()
        torch.set_num_threads(settings["threads"])
        pipe = SanaPipeline.from_pretrained(settings["model"], torch_dtype=getattr(torch, settings["dtype"]))
        if settings.get("compile"):
            pipe.transformer.compile()
            pipe.vae.decoder.compile()
        self._set(pipe)

    def _set(self, pipe: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe

    def draw(self, *, latents: Any, output_type: str, **arguments: Any) -> Any:
        import torch

        return self.pipe(
            latents=torch.from_numpy(latents),
            output_type=output_type,
            use_resolution_binning=False,
            complex_human_instruction=None,
            **arguments,
        ).images

    def decode(self, latents: Any) -> Any:
        import torch

        with torch.no_grad():
            scaled = torch.from_numpy(latents).to(self._dtype()) / self.pipe.vae.config.scaling_factor
            image = self.pipe.vae.decode(scaled, return_dict=False)[0]
            return self.pipe.image_processor.postprocess(torch.as_tensor(image), output_type="np")

    def _dtype(self) -> Any:
        return self.pipe.vae.dtype


class Optimum(Diffusers):
    """optimum-intel's pipeline over OpenVINO, from a folder that it has exported."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from optimum.intel.openvino import OVSanaPipeline

        self.imported = perf_counter()
        hints = {"INFERENCE_PRECISION_HINT": settings["hint"], "INFERENCE_NUM_THREADS": settings["threads"]}
        pipe = OVSanaPipeline.from_pretrained(settings["model"], compile=False, ov_config=hints)
        if settings.get("static"):
            pipe.reshape(1, settings["height"], settings["width"], 1)
        pipe.compile()
        self._set(pipe)

    def _dtype(self) -> Any:
        import torch

        return torch.float32


class Ditc(Contestant):
    """ditc's pipeline over one of its backends."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from ditc.runtime.pipeline import Pipeline

        self.imported = perf_counter()
        keys = ("backend", "precision", "stage_precision", "threads")
        options = {key: settings[key] for key in keys if key in settings}
        self.pipe = Pipeline.load(settings["model"], **options)

    def draw(self, *, latents: Any, output_type: str, **arguments: Any) -> Any:
        return self.pipe(
            latents=latents,
            output_type=output_type,
            use_resolution_binning=False,
            complex_human_instruction=None,
            allow_uniform=True,
            **arguments,
        ).images

    def decode(self, latents: Any) -> Any:
        from ditc.runtime.images import to_unit_range
        from ditc.runtime.session import to_numpy

        session = self.pipe.sessions["vae_decoder"]
        (image,) = session.run({session.spec.inputs[0].name: latents}).values()
        return to_unit_range(to_numpy(image))


KINDS: dict[str, Callable[[dict[str, Any]], Contestant]] = {
    "diffusers": Diffusers,
    "optimum": Optimum,
    "ditc": Ditc,
}


def memory() -> dict[str, float]:
    """This process's resident memory in MB: the peak, and now in anonymous pages and in mapped files."""
    names = {"VmHWM": "peak_mb", "RssAnon": "anonymous_mb", "RssFile": "files_mb"}
    with open("/proc/self/status", encoding="utf-8") as status:  # noqa: PTH123  # pathlib would be one import more
        lines = dict(line.split(":", 1) for line in status)
    return {name: int(lines[key].split()[0]) / 1024 for key, name in names.items() if key in lines}


def versions() -> Iterator[tuple[str, str]]:
    """The versions of the installed packages that matter."""
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()
