"""The process that draws lines for `ditc batch`.

    python -m ditc.runtime.offline.worker        JSON lines in, JSON lines out

The first input says what to load. It is answered by {"window": how many lines to send before the first result,
"uncertified": why parity has not certified the bundle here}, and each further one, a line of the file, by
{"result": ...}. Results come when they are there, in any order. An answer with "error" ends the batch: the bundle
cannot be loaded, or a picture cannot be written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import IO

from ditc.runtime.child_process import error_answer, own_stdout
from ditc.runtime.errors import DitcError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.offline.draw import Drawer
from ditc.runtime.offline.lines import parse_line
from ditc.runtime.offline.result import VideoFiles


def main() -> int:
    """Draw lines until there are no more."""
    answers = own_stdout()
    asked = json.loads(sys.stdin.readline() or "null")
    if asked is None:
        return 0
    try:
        drawer = Drawer(
            Path(asked["bundle"]),
            LoadOptions(**asked["options"]),
            Path(asked["folder"]),
            inputs=Path(asked["inputs"]),
            max_batch=asked["max_batch"],
            lines=asked["lines"],
            videos=asked["videos"] and VideoFiles(**asked["videos"]),
        )
    except DitcError as error:
        _answer(answers, error_answer(error))
        return 1
    _answer(answers, {"window": drawer.window, "uncertified": drawer.pipeline.uncertified})
    threading.Thread(target=_take, args=(drawer, answers), daemon=True).start()
    for message in sys.stdin:
        line = json.loads(message)
        drawer.submit(parse_line(line["content"].encode(), line["number"]))
    os._exit(0)  # the parent has what it wants, or has gone; the bundle's threads may be in a step


def _take(drawer: Drawer, answers: IO[str]) -> None:
    """Answer with the results."""
    try:
        while True:
            _answer(answers, {"result": drawer.take()})
    except DitcError as error:
        _answer(answers, error_answer(error))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def _answer(answers: IO[str], answer: object) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # ctrl-C reaches all processes of the terminal; the parent ends this one
    sys.exit(main())
