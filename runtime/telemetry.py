"""Libraries that report their use to their makers are told not to, before they are imported.

They read these variables when they are imported, so every package of ditc imports `ditc.runtime` first. A variable that
the user has set stays as it is: ORT_DISABLE_TELEMETRY=0 turns ONNX Runtime's reports on again.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

OFF = {
    # onnxruntime's wheel connects to mobile.events.data.microsoft.com while a session is open, and keeps a device id
    # and a database in ~/.cache/Microsoft (1.32). Its disable_telemetry_events() comes too late for the files.
    "ORT_DISABLE_TELEMETRY": "1",
    # huggingface_hub, and with it diffusers and transformers: what goes into the user agent of downloads.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",  # gradio compares with "True"
    "RAY_USAGE_STATS_ENABLED": "0",
}


def turn_off(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that are not set. Programs that this process starts inherit them."""
    for name, value in OFF.items():
        environment.setdefault(name, value)
