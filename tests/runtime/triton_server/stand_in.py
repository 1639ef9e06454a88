"""A stage for a Triton without ONNX Runtime's backend: the Python backend runs model.onnx with the package onnxruntime.

It is copied as model.py into a stage's version folder, so it imports nothing of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        outputs = self.session.run(None, feeds)
        names = [output.name for output in self.session.get_outputs()]
        tensors = [pb_utils.Tensor(name, array) for name, array in zip(names, outputs, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)
