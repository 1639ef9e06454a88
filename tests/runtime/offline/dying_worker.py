"""Speaks as the process of runtime/offline/worker.py, and ends itself at lines whose prompt says so."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def answer(content: object) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    if "error" in asked:
        answer({"error": "BundleError", "message": asked["error"], "hint": "mend it"})
        return
    answer({"window": 3, "uncertified": ""})
    for message in sys.stdin:
        line = json.loads(message)
        prompt, before = json.loads(line["content"])["prompt"], Path(asked["folder"]) / "died"
        if prompt == "always" or (prompt == "once" and not before.exists()):
            before.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        answer({"result": {"line": line["number"], "status": "done", "pictures": []}})


if __name__ == "__main__":
    main()
