"""`ditc serve BUNDLE`: draws for clients over HTTP."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from ditc.runtime.errors import MissingExtra, UsageError
from ditc.runtime.load_options import add_load_arguments, load_options
from ditc.runtime.serving.request_limits import add_limit_arguments, request_limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the bundles, how they are loaded, and where the server listens."""
    parser.add_argument(
        "bundles",
        nargs="+",
        type=Path,
        metavar="BUNDLE",
        help="The directories of the bundles. Each is served under the name of its directory.",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="The address to listen on (default: %(default)s, which only this machine reaches).",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="PORT",
        help="The TCP port to listen on; 0 takes one that is free (default: %(default)s).",
    )
    parser.add_argument(
        "--ui",
        action="store_true",
        help="Also serve a page for browsers at /ui (needs the extra ui).",
    )
    add_limit_arguments(parser)
    add_load_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the server."""
    from ditc.runtime.serving.admission import Admission, Bounds
    from ditc.runtime.serving.app import create_app
    from ditc.runtime.serving.models import Models
    from ditc.runtime.serving.server import ServerOptions, listen, serve, url_of

    if arguments.ui:
        try:
            from ditc.runtime.serving.ui.page import add_page
        except ModuleNotFoundError as e:
            raise MissingExtra("gradio", "ui") from e
    options = ServerOptions(host=arguments.host, port=arguments.port)
    bundles = {}
    for path in arguments.bundles:
        if path.resolve().name in bundles:
            raise UsageError(f"two bundles are named {path.resolve().name}", hint="rename one of them")
        bundles[path.resolve().name] = path
    models = Models(bundles, admission=Admission(Bounds()), load=load_options(arguments))
    with listen(options) as listener:
        url = url_of(listener)

        def started() -> None:
            def load() -> None:
                with models.using():
                    sys.stdout.write(f"serving {', '.join(models.names)} at {url}\n")
                    sys.stdout.flush()

            threading.Thread(target=load, daemon=True).start()

        limits = request_limits(arguments)
        app = create_app(models, limits=limits)
        if arguments.ui:
            add_page(app, models, limits=limits)
        serve(app, listener, started=started)
    models.close()
    return 0
