"""Export of one stage: the graph serves every size, a wrong graph is refused, and a failure leaves no files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from torch import Tensor, nn

from ditc.export.contract import StageModule
from ditc.export.engine.memory import PeakMemory
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.graph.onnx import check_export, to_onnx, trace
from ditc.export.graph.torch_session import TorchSession, from_torch, to_torch
from ditc.runtime.errors import BuildError, SessionError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import DType, Precision, Range, StageSpec, TensorSpec


class Mixer(nn.Module):
    """A convolution over pictures of any size, and a sum over any number of rows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(6, 4)

    def forward(self, image: Tensor, rows: Tensor) -> Tensor:
        return self.conv(image) + self.linear(rows).sum(dim=0)[None, :, None, None]


SPEC = StageSpec(
    "vae_decoder",
    inputs=(
        TensorSpec("image", DType.FLOAT32, ("batch", 4, "height", "width")),
        TensorSpec("rows", DType.FLOAT32, ("rows", 6)),
    ),
    outputs=(TensorSpec("out", DType.FLOAT32, ("batch", 4, "height", "width")),),
    profile={
        "batch": Range(1, 1, 4),
        "height": Range(4, 8, 16, 2),
        "width": Range(4, 8, 16, 2),
        "rows": Range(1, 2, 8),
    },
)


def stage(module: nn.Module | None = None, spec: StageSpec = SPEC) -> StageModule:
    return StageModule(spec=spec, precision=Precision.FP32, module=(module or Mixer()).eval(), weights=())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(stage(), tmp_path_factory.mktemp("onnx") / "stage.onnx").model


def test_one_graph_serves_every_size_of_the_profile(exported: Path) -> None:
    module, session = TorchSession(Mixer(), SPEC), OnnxRuntimeSession(exported, SPEC, provider=CPU, threads=1)
    for sizes in ((1, 4, 4, 1), (4, 16, 6, 3), (2, 10, 14, 8)):
        feeds = example_feeds(SPEC, dict(zip(("batch", "height", "width", "rows"), sizes, strict=True)))
        assert relative_l2(np.asarray(session.run(feeds)["out"]), np.asarray(module.run(feeds)["out"])) < 1e-6


def test_parameters_keep_their_names_and_weights_lie_beside_the_graph(exported: Path) -> None:
    model = onnx.load(exported, load_external_data=False)
    names = {initializer.name for initializer in model.graph.initializer}
    assert {"conv.weight", "linear.weight"} <= names
    assert sorted(path.name for path in exported.parent.iterdir()) in (
        ["stage.onnx"],
        ["stage.onnx", "stage.onnx.data"],
    )


def test_a_profile_that_ends_at_one_still_exports(tmp_path: Path) -> None:
    """torch.export freezes a size that it sees as 1, so the example is larger than the profile."""
    narrow = replace(SPEC, profile={**SPEC.profile, "batch": Range(1, 1, 1), "rows": Range(1, 1, 1)})
    files = to_onnx(stage(spec=narrow), tmp_path / "stage.onnx")
    session = OnnxRuntimeSession(files.model, narrow, provider=CPU, threads=1)
    out = session.run(example_feeds(narrow, {"batch": 1, "height": 4, "width": 6, "rows": 1}))["out"]
    assert out.shape == (1, 4, 4, 6)


def test_a_size_of_one_value_exports(tmp_path: Path) -> None:
    fixed = replace(SPEC, profile={**SPEC.profile, "height": Range(8, 8, 8, 2)})
    assert to_onnx(stage(spec=fixed), tmp_path / "stage.onnx").model.is_file()


def test_what_is_traced_takes_no_memory_for_its_inputs() -> None:
    """1 GiB: what the decoder of later frames keeps at 480x832 pixels is 3.8 GB, and drawing it took 6 GB."""
    rows = 2**28 // 6
    wide = replace(SPEC, profile={**SPEC.profile, "rows": Range(1, rows, rows)})
    before = psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        trace(stage(spec=wide))
    assert memory.peak_bytes - before < 2**29


class Freezes(Mixer):
    """A network that reads a size as a number, so that its graph would be right for one size only."""

    def forward(self, image: Tensor, rows: Tensor) -> Tensor:
        return super().forward(image, rows) * (1.0 if int(image.shape[2]) == 8 else 2.0)


def test_a_network_that_freezes_a_size_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="vae_decoder") as caught:
        to_onnx(stage(Freezes()), tmp_path / "stage.onnx")
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_refused(exported: Path) -> None:
    assert check_export(stage(), exported) < 1e-6
    with pytest.raises(BuildError, match=r"output out .* differs from PyTorch .* relative L2"):
        check_export(stage(Mixer(seed=1)), exported)


def test_a_failed_check_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "stage.onnx"
    path.write_text("earlier")
    with pytest.raises(BuildError):
        to_onnx(stage(Freezes()), path)
    assert path.read_text() == "earlier" and [p.name for p in tmp_path.iterdir()] == ["stage.onnx"]


def test_a_graph_without_a_promised_output_is_refused_on_loading(exported: Path) -> None:
    other = replace(SPEC, outputs=(replace(SPEC.outputs[0], name="other"),))
    with pytest.raises(SessionError, match="the manifest promises"):
        OnnxRuntimeSession(exported, other, provider=CPU)


def test_example_sizes_differ_and_never_are_zero_or_one() -> None:
    first, second = example_sizes(SPEC), example_sizes(SPEC, second=True)
    for sizes in (first, second):
        assert min(sizes.values()) >= 2 and sizes["rows"] != sizes["batch"]
        assert sizes["height"] % 2 == sizes["width"] % 2 == 0
    assert all(first[name] != second[name] for name in first)
    assert second["height"] != second["width"], "a transposed graph must not pass"


def test_example_sizes_are_as_small_as_asked_if_the_range_allows_it() -> None:
    ranges = {"height": Range(1, 256, 512, 2), "width": Range(64, 256, 512), "rows": Range(1, 2, 8)}
    spec = replace(SPEC, profile={**SPEC.profile, **ranges})
    first, second = (example_sizes(spec, second=second, max_multiple=8) for second in (False, True))
    assert (first["height"], first["width"]) == (16, 64)
    assert second["height"] != first["height"] and 64 < second["width"] < 72


def test_onnx_runtime_loads_a_bf16_graph(tmp_path: Path) -> None:
    """Conv takes no bf16 before opset 22 (INVALID_GRAPH on every provider). On a CPU only the kernels are missing."""
    tensors = {"inputs": SPEC.inputs, "outputs": SPEC.outputs}
    bf16 = replace(
        SPEC, **{k: tuple(replace(t, dtype=DType.BFLOAT16) for t in ts) for k, ts in tensors.items()}
    )
    made = replace(stage(Mixer().to(torch.bfloat16), bf16), precision=Precision.BF16)
    model = to_onnx(made, tmp_path / "stage.onnx").model
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def test_bf16_tensors_and_arrays_convert_by_their_bits() -> None:
    values = torch.tensor([1.0, -2.5, 3.140625]).bfloat16()
    bits = from_torch(values)
    assert bits.dtype == np.uint16
    torch.testing.assert_close(to_torch(bits, DType.BFLOAT16), values, rtol=0, atol=0)
