"""`ditc serve BUNDLE`: draws for clients over HTTP."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.commands.serve_arguments import add_serve_arguments, named_bundles, named_loras
from ditc.runtime.errors import DitcError, MissingExtra
from ditc.runtime.load_options import LoadOptions, load_options
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.serving.api.request_limits import request_limits
from ditc.runtime.serving.http.transport_limits import transport_limits
from ditc.runtime.serving.replicas.place import place

if TYPE_CHECKING:
    from ditc.runtime.serving.http.server import Server
    from ditc.runtime.serving.metrics import Metrics
    from ditc.runtime.serving.models import Models
    from ditc.runtime.serving.replicas.front import Front

log = logging.getLogger(__name__)

# Modules whose messages are always shown: when models are opened and closed, and how the server ends.
TOLD = ("models", "model", "lora_variants", "http.server", "http.access", "replicas")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the bundles, how they are loaded and shared, and where the server listens."""
    add_serve_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the server.

    Raises:
        DitcError: a bundle cannot be served, or the address cannot be used.
    """
    if arguments.ray and place() is None:
        from ditc.runtime.serving.replicas.supervisor import supervise

        _tell()
        return supervise(arguments)
    from ditc.runtime.serving.http.access import doorkeeper_for
    from ditc.runtime.serving.http.app import create_app
    from ditc.runtime.serving.http.open_files import with_open_files
    from ditc.runtime.serving.http.server import Server, end_at_once, listen, url_of
    from ditc.runtime.serving.http.traffic import Traffic
    from ditc.runtime.serving.metrics import Metrics
    from ditc.runtime.serving.replicas.front import Front
    from ditc.runtime.serving.settings import ServerOptions

    if arguments.ui:
        try:
            from ditc.runtime.serving.ui.page import add_page
        except ModuleNotFoundError as e:
            raise MissingExtra("gradio", "ui") from e
    _tell()
    options = ServerOptions(
        host=arguments.host,
        port=arguments.port,
        warm_up_seconds=arguments.warm_up_seconds,
        drain_seconds=arguments.drain_seconds,
    )
    load, limits = load_options(arguments), request_limits(arguments)
    doorkeeper = doorkeeper_for(options.host, arguments.api_keys, browsers=arguments.ui)
    transport = with_open_files(transport_limits(arguments))
    bundles = named_bundles(arguments)
    metrics, traffic = Metrics(), Traffic()
    front = Front(arguments, load, bundles) if arguments.ray else None
    models = _models(arguments, load, bundles, named_loras(arguments), metrics, front)
    with (
        nullcontext() if front is None else front,
        listen(options) if front is None else front.listener() as listener,
    ):
        metrics.watch(models)
        app = create_app(
            models,
            limits=limits,
            transport=transport,
            doorkeeper=doorkeeper,
            metrics=metrics,
            traffic=traffic,
        )
        if arguments.ui:
            add_page(app, models, limits=limits)
        server = Server(app, models, traffic, options, transport=transport, doorkeeper=doorkeeper)
        opening = _Opening(models, server, arguments, url_of(listener))
        opening.start()
        server.run(sockets=[listener])
    if opening.error is not None:
        raise opening.error
    if not (app.state.api.close() and server.closed):  # threads that still work would hold the process
        end_at_once(0)
    return 0


class _Opening(threading.Thread):
    """Opens the models that the server begins with, and says where it serves them."""

    def __init__(self, models: Models, server: Server, arguments: argparse.Namespace, url: str) -> None:
        super().__init__(name="ditc-opening", daemon=True)
        self.error: DitcError | None = None
        self._models, self._server, self._arguments, self._url = models, server, arguments, url

    def run(self) -> None:
        try:
            for name in self._models.awaited:
                self._models.open(name)
        except DitcError as error:
            if not self._models.closing:
                self.error = error
                self._server.end()
            return
        if (here := place()) is not None and here.again:
            return
        names = list(self._models.names)
        if self._arguments.json:
            sys.stdout.write(json.dumps({"url": self._url, "models": names}) + "\n")
        else:
            sys.stdout.write(f"serving {', '.join(names)} at {self._url}\n")
            if self._arguments.ui:
                sys.stdout.write(f"the page for browsers is {self._url}/ui/\n")
        sys.stdout.flush()


def _models(
    arguments: argparse.Namespace,
    load: LoadOptions,
    bundles: dict[str, Path],
    loras: dict[str, LoraChoice],
    metrics: Metrics,
    front: Front | None,
) -> Models:
    """The models, none of which is opened yet. What is wrong with a bundle's manifest is found here."""
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.serving.lora_variants import lora_variants
    from ditc.runtime.serving.memory import default_budget, gpu_bytes, parse_bytes
    from ditc.runtime.serving.models import Models
    from ditc.runtime.serving.scheduling.admission import Admission
    from ditc.runtime.serving.settings import Bounds, SchedulerOptions

    videos = [name for name, path in bundles.items() if load_manifest(path).latents.has_frames]
    if videos:
        _warn_without_mp4(videos)
    budget = parse_bytes(arguments.memory_budget) if arguments.memory_budget is not None else None
    default = default_budget(gpu_bytes(bundles, load)) if front is None else front.default_budget()
    variants = lora_variants(bundles, loras, load, share=front is None)
    bundles = bundles | {name: bundles[variant.bundle] for name, variant in variants.items()}
    names = list(bundles)
    return Models(
        bundles,
        loras={name: variant.choice for name, variant in variants.items() if not variant.shares},
        shared={name: (v.bundle, v.choice) for name, v in variants.items() if v.shares},
        admission=Admission(Bounds(requests=arguments.max_queue, pixel_steps=arguments.max_pixel_steps)),
        load=load,
        scheduled=SchedulerOptions(
            max_batch=arguments.max_batch,
            window=arguments.batch_window_ms / 1000,
            max_loras=arguments.max_loras,
        ),
        observe=metrics.observer,
        warm_up_seconds=arguments.warm_up_seconds,
        budget=default if budget is None else budget,
        awaited={"first": names[:1], "all": names, "none": []}[arguments.preload],
        opener=None if front is None else front.opener,
    )


def _warn_without_mp4(names: list[str]) -> None:
    from ditc.runtime.video_files import check_mp4

    try:
        check_mp4()
    except MissingExtra as e:
        log.warning(
            "%s: videos are sent as WebP alone, because PyAV is not installed; %s", ", ".join(names), e.hint
        )


def _tell() -> None:
    for name in TOLD:
        logger = logging.getLogger(f"ditc.runtime.serving.{name}")
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
