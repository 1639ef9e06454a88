"""The options of `ditc serve`, and the names under which bundles are served."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ditc.runtime.commands.bundle_argument import announce
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import add_load_arguments
from ditc.runtime.lora.choice import LoraChoice, parse_lora
from ditc.runtime.serving.api.request_limits import add_limit_arguments
from ditc.runtime.serving.http.transport_limits import add_transport_arguments
from ditc.runtime.serving.replicas.options import add_replica_arguments
from ditc.runtime.serving.settings import Bounds, SchedulerOptions, ServerOptions

# A name stands in JSON, in metrics and on the command line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Folders that say what they hold, and not which one it is. The folder around them names the bundle.
_NAMELESS = {"bundle", "build", "out", "output"}


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options. Their defaults are those of the dataclasses that they fill."""
    parser.add_argument(
        "bundles",
        nargs="*",
        type=Path,
        metavar="BUNDLE",
        help="Directories of bundles, or their ids on the Hugging Face hub. Each is served under the name of its "
        "directory, and requests that name no model get the first.",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME=BUNDLE",
        dest="named",
        help="Serve a bundle under this name; may be given several times (default: the name of its directory, or of "
        "the one around it if it is only called bundle or build).",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="NAME=FILE[:SCALE]",
        help="Also serve every bundle that this LoRA fits with it, as MODEL@NAME; may be given several times. Bundles "
        "of ditc build --lora-inputs are opened once for all of their LoRAs, others once more for each. Clients can "
        "name no files (default: none).",
    )
    _add_models(parser)
    _add_bounds(parser)
    add_limit_arguments(parser)
    _add_server(parser)
    add_transport_arguments(parser)
    add_replica_arguments(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the URL and the models as JSON when the server is ready (default: as text).",
    )
    add_load_arguments(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preload",
        choices=("first", "all", "none"),
        default="first",
        help="Bundles to open at the start, without which the server is not ready; the others are opened when they are "
        "asked for (default: %(default)s).",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="Memory that all opened bundles may take together, such as 12GB or 8GiB. The least recently used one that "
        "is not in use is closed to make room for another (default: 80%% of the memory of the GPU or, without one, of "
        "what this process may use).",
    )
    parser.add_argument(
        "--max-loras",
        type=int,
        default=SchedulerOptions().max_loras,
        metavar="LORAS",
        help="Most LoRAs whose matrices are kept in memory, of one bundle of ditc build --lora-inputs; the least "
        "recently used one is forgotten, and read again when it is asked for (default: %(default)s).",
    )
    parser.add_argument(
        "--warm-up-seconds",
        type=float,
        default=ServerOptions().warm_up_seconds,
        metavar="SECONDS",
        help="Time in seconds after which no larger batch is tried before a bundle is served (default: %(default)g).",
    )


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    bounds, scheduled = Bounds(), SchedulerOptions()
    parser.add_argument(
        "--max-batch",
        type=int,
        default=scheduled.max_batch,
        metavar="PICTURES",
        help="Most pictures that are drawn together; 0 takes as many pictures as the bundle allows. Fewer are drawn "
        "together where that is faster by what was measured (default: %(default)s).",
    )
    parser.add_argument(
        "--batch-window-ms",
        type=float,
        default=1000 * scheduled.window,
        metavar="MILLISECONDS",
        help="How many milliseconds a first step waits for company while nothing else runs (default: %(default)g).",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=bounds.requests,
        metavar="REQUESTS",
        help="Most requests that may wait or be drawn at one time; more are refused with 429 (default: %(default)s).",
    )
    parser.add_argument(
        "--max-pixel-steps",
        type=int,
        default=bounds.pixel_steps,
        metavar="PIXEL_STEPS",
        help="Most work of these requests together, in pixel-steps: width x height x steps x pictures, or x frames of "
        "videos (default: %(default)s).",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    server = ServerOptions()
    parser.add_argument(
        "--host",
        default=server.host,
        metavar="ADDRESS",
        help="The address to listen on (default: %(default)s, which only this machine reaches).",
    )
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="JSON file of the keys that clients must send, with their names and limits. An address that other "
        "machines reach needs one (default: no keys, and only programs on this machine are answered).",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=server.port,
        metavar="PORT",
        help="The TCP port to listen on; 0 takes one that is free (default: %(default)s).",
    )
    parser.add_argument(
        "--ui",
        action="store_true",
        help="Also serve a page for browsers at /ui; needs the extra ui (default: no page).",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=server.drain_seconds,
        metavar="SECONDS",
        help="Time in seconds within which the server ends after SIGTERM: what is in flight is answered, and what "
        "takes longer is ended (default: %(default)g).",
    )


def named_bundles(arguments: argparse.Namespace) -> dict[str, Path]:
    """The directory of each bundle by its name. Bundles on the hub are fetched.

    Raises:
        UsageError: there is none, or a name is wrong or given twice.
        DitcError: as `local_bundle`.
    """
    from ditc.runtime.bundle.fetch import local_bundle

    typed: list[tuple[str, Path]] = [(default_name(path), path) for path in arguments.bundles]
    for text in arguments.named:
        name, separator, path = text.partition("=")
        if not separator or not path:
            raise UsageError(f"--name {text!r:.80} names no bundle", hint="write --name NAME=BUNDLE")
        typed.append((name, Path(path)))
    if not typed:
        raise UsageError("no bundle is given", hint="ditc serve BUNDLE")
    names: dict[str, Path] = {}
    for name, path in typed:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r:.80} cannot be the name of a model: it takes up to 64 letters, digits, dots, dashes and "
                "underscores",
                hint=f"write --name NAME={path}",
            )
        if name in names:
            raise UsageError(
                f"two bundles are named {name}: {names[name]} and {path}",
                hint=f"give one of them another name: --name NAME={path}",
            )
        names[name] = path
    return {name: local_bundle(path, announce=announce) for name, path in names.items()}


def named_loras(arguments: argparse.Namespace) -> dict[str, LoraChoice]:
    """The file and the scale of each LoRA by its name.

    Raises:
        UsageError: a name is wrong or given twice, or a scale is not finite.
    """
    found: dict[str, LoraChoice] = {}
    for text in arguments.lora or ():
        name, separator, choice = text.partition("=")
        if not separator or not choice or not _NAME.fullmatch(name):
            raise UsageError(
                f"--lora {text!r:.80} names no LoRA", hint="write --lora NAME=FILE or NAME=FILE:SCALE"
            )
        if name in found:
            raise UsageError(f"two LoRAs are named {name}", hint="give one of them another name")
        found[name] = parse_lora(choice)
    return found


def default_name(path: Path) -> str:
    """The name of a bundle that is given without one.

    default_name(Path("build/demo/bundle"))  # "demo"
    """
    parts = [part for part in path.absolute().parts[1:] if part not in ("..", ".")]
    if parts and parts[-1].lower() in _NAMELESS:
        parts = [part for part in parts if part.lower() not in _NAMELESS] or parts
    return parts[-1].partition("@")[0] if parts else ""
