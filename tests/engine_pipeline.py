"""A pipeline whose stages are engine sessions on a fake GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from fake_gpu import FakeCuda, FakeEngine

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import load_parts
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import DENOISER

SETTINGS = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64, "seed": 3}


class Gpu:
    """A pipeline whose stages are engine sessions on one fake device."""

    def __init__(self, bundle: Path, cuda: FakeCuda | None = None, **engine: Any) -> None:
        self.cuda = cuda or FakeCuda()
        self.device = Device(self.cuda)
        parts = load_parts(bundle, LoadOptions(backend="onnxruntime", threads=1))
        for session in parts.sessions.values():
            session.close()
        scale = parts.manifest.latents.scale_factor
        self.engines = {
            name: FakeEngine(self.cuda, bundle / artifact.file.path, artifact.spec, scale=scale, **engine)
            for name, artifact in parts.artifacts.items()
        }
        sessions = {n: TensorRTSession(e, e.spec, self.device) for n, e in self.engines.items()}
        for encoder in parts.conditioning.encoders:
            object.__setattr__(encoder, "session", sessions[encoder.spec.stage])
        parts.conditioning.conditioner = sessions["conditioner"]
        self.pipeline = Pipeline(parts.manifest, sessions, parts.conditioning)

    @property
    def denoiser(self) -> TensorRTSession:
        session = self.pipeline.sessions[DENOISER]
        assert isinstance(session, TensorRTSession)
        return session

    def draw(self, prompt: str = "red cat", **changes: Any) -> np.ndarray:
        return np.asarray(
            self.pipeline.draw(Request(prompt=prompt, output_type="np", **{**SETTINGS, **changes})).images
        )
