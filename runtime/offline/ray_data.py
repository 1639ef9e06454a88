"""Draws lines with Ray Data: its actors hold the bundle, on one machine or on a cluster.

Ray moves spans of the input file, which are a few numbers each, and results. Every actor reads its lines from the file
and writes its pictures itself, so all machines must see bundle, input and output under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.offline.input_file import RawLine, lines_of_span
from ditc.runtime.offline.lines import parse_line
from ditc.runtime.offline.result import VideoFiles
from ditc.runtime.sessions.registry import device_names

# Lines that an actor draws before it hands on their results. Lines of one shape among them can share runs.
SPAN = 32
# With few lines, spans are shorter, so that all actors end at about the same time.
SPANS_PER_ACTOR = 4


def draw_with_ray(
    lines: Iterator[RawLine], asked: Sequence[Mapping[str, Any]], source: Path
) -> Iterator[dict[str, Any]]:
    """The results of the lines, in the order in which they are there.

    Args:
        lines: checked lines.
        asked: for every actor, what it loads; see worker.py. All get the first one's.
        source: the file that the lines are in.

    Raises:
        ray.exceptions.RayError: the cluster cannot be reached, or an actor fails again and again.
    """
    length = max(1, min(SPAN, asked[0]["lines"] // SPANS_PER_ACTOR))
    spans = list(_spans(lines, source, length))
    if not spans:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # a Ray that is started here answers nobody else
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    threads = asked[0]["options"]["threads"]
    if not ray.is_initialized():
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",  # else Ray joins another one that it finds on this machine
                num_cpus=threads * len(asked),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
            )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # importing ray.data sets it to INFO
    gpus = 1 if asks_for_gpu(asked[0]["options"]) else 0
    drawn = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
        _Actor,
        fn_constructor_args=(dict(asked[0]),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=len(asked)),
        num_cpus=threads,
        num_gpus=gpus,
        zero_copy_batch=True,
    )
    for row in drawn.iter_rows():
        yield json.loads(row["result"])


class _Actor:
    """What Ray runs: a bundle with a scheduler."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        from ditc.runtime.offline.draw import Drawer

        options = LoadOptions(**asked["options"])
        self._drawer = Drawer(
            Path(asked["bundle"]),
            options,
            Path(asked["folder"]),
            inputs=Path(asked["inputs"]),
            max_batch=asked["max_batch"],
            lines=asked["lines"],
            videos=asked["videos"] and VideoFiles(**asked["videos"]),
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Draw a span. Its results as JSON."""
        span = json.loads(batch["span"][0])
        lines = lines_of_span(Path(span["source"]), span["offset"], span["numbers"])
        results: list[str] = []
        at = 0
        for raw in lines:
            while at >= self._drawer.window:
                results.append(json.dumps(self._drawer.take()))
                at -= 1
            self._drawer.submit(parse_line(raw.content, raw.number))
            at += 1
        results += [json.dumps(self._drawer.take()) for _ in range(at)]
        return {"result": results}


def _spans(lines: Iterator[RawLine], source: Path, length: int) -> Iterator[dict[str, str]]:
    """The lines as spans of the file: where each begins, and the numbers of its lines, which may have gaps."""
    numbers: list[int] = []
    offset = 0
    for raw in lines:
        if numbers and (len(numbers) == length or raw.number - numbers[0] >= 2 * length):
            yield {"span": json.dumps({"source": str(source), "offset": offset, "numbers": numbers})}
            numbers = []
        if not numbers:
            offset = raw.offset
        numbers.append(raw.number)
    if numbers:
        yield {"span": json.dumps({"source": str(source), "offset": offset, "numbers": numbers})}


def asks_for_gpu(options: Mapping[str, Any]) -> bool:
    """Whether an actor needs an NVIDIA GPU, of which Ray gives every one its own."""
    backend, provider = options["backend"], options["provider"]
    return (
        backend.startswith("tensorrt")
        or provider == "cuda"
        or bool(options["device"] and options["device"].upper() not in device_names())
    )
