"""How fast this machine multiplies matrices and copies memory, measured with the libraries that run the stages.

A stage cannot take less time than its products at the first rate, or its weights at the second. The products are those
of 1024 rows with matrices of 2048 x 2048, two in a row, as large layers have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from ditc.runtime.bench.matmul_graph import matmul_graph
from ditc.runtime.cores import default_threads
from ditc.runtime.cpu_features import BF16, cpu_features, int8_products_saturate
from ditc.runtime.sessions.registry import missing
from ditc.runtime.spec import Backend, Precision

ROWS, WIDTH, LAYERS = 1024, 2048, 2
COPIED_BYTES = 256 * 2**20  # larger than the caches of today's CPUs
# Each rate is measured so often, or for so long if that is shorter.
REPEATS, SECONDS = 9, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The best rate that was reached, and with what."""

    per_second: float
    library: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What this machine reached.

    Attributes:
        gemm: operations per second by the precision of the products. Without an entry, none was measured.
        copy: bytes per second, each byte that is read and each that is written as one.
    """

    gemm: dict[str, Ceiling]
    copy: Ceiling

    def of(self, precision: Precision) -> Ceiling | None:
        """The ceiling of a stage in this precision: products that have no rate of their own are computed in fp32."""
        kind = precision.value
        if kind not in self.gemm:
            kind = Precision.INT8.value if kind.startswith("int8") else Precision.FP32.value
        return self.gemm.get(kind)


def measure_ceilings(threads: int = 0) -> Ceilings:
    """Measure all rates on the CPU. It takes a few seconds.

    Args:
        threads: the number of threads; 0 takes one per core that this process may use.
    """
    threads = threads or default_threads()
    gemm: dict[str, Ceiling] = {}
    for precision, library, call in _products(threads):
        rate = 2 * ROWS * WIDTH * WIDTH * LAYERS / _best_s(call)
        known = gemm.get(precision.value)
        if known is None or rate > known.per_second:
            gemm[precision.value] = Ceiling(per_second=rate, library=library)
    return Ceilings(gemm=gemm, copy=Ceiling(per_second=_copy_rate(threads), library="numpy"))


def _products(threads: int) -> Iterator[tuple[Precision, str, Callable[[], object]]]:
    """The products to measure, one after the other, so that only one library's memory is held at a time."""
    if not missing(Backend.ONNXRUNTIME):
        yield Precision.FP32, "onnxruntime", _onnxruntime(threads, integers=False)
        yield Precision.INT8, "onnxruntime", _onnxruntime(threads, integers=True)
    if not missing(Backend.OPENVINO):
        yield Precision.FP32, "openvino", _openvino(threads, Precision.FP32)
        yield Precision.INT8, "openvino", _openvino(threads, Precision.INT8)
        if BF16.intersection(cpu_features()):
            yield Precision.BF16, "openvino", _openvino(threads, Precision.BF16)


def _onnxruntime(threads: int, *, integers: bool) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if int8_products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")  # as the session of a stage
    graph = matmul_graph(ROWS, WIDTH, LAYERS, integers=integers)
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    values = np.random.default_rng(0).standard_normal((ROWS, WIDTH))
    feed = (values * 40 + 128).clip(0, 255).astype(np.uint8) if integers else values.astype(np.float32)
    return lambda: session.run(None, {"x": feed})


def _openvino(threads: int, precision: Precision) -> Callable[[], object]:
    from ditc.runtime.sessions.openvino import CPU, settings
    from ditc.runtime.sessions.openvino_library import core, load_openvino

    openvino = load_openvino()
    ops, rng = openvino.opset13, np.random.default_rng(0)
    x = value = ops.parameter([ROWS, WIDTH], np.float32, name="x")
    for _ in range(LAYERS):
        if precision is Precision.INT8:
            value = ops.fake_quantize(value, *(np.float32(n) for n in (0, 4, 0, 4)), 256)
            stored = ops.constant(rng.integers(-127, 128, (WIDTH, WIDTH), np.int8))
            weight = ops.multiply(ops.convert(stored, np.float32), np.full((1, WIDTH), 1 / 5000, np.float32))
        else:
            weight = ops.constant((rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32))
        value = ops.matmul(value, weight, transpose_a=False, transpose_b=False)
    model = openvino.Model([value], [x], "products")
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision is Precision.BF16 else "f32"}
    given = {k: v for k, v in settings(CPU, threads).items() if k != "EXECUTION_MODE_HINT"}
    request = core().compile_model(model, CPU, {**given, **hint}).create_infer_request()
    feed = abs(rng.standard_normal((ROWS, WIDTH))).astype(np.float32)
    return lambda: request.infer({0: feed}, share_inputs=True, share_outputs=True)


def _copy_rate(threads: int) -> float:
    source = np.zeros(COPIED_BYTES // 8)
    target = np.ones_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def copy(part: tuple[Any, Any]) -> None:
        np.copyto(part[1], part[0])

    with ThreadPoolExecutor(threads) as pool:
        return 2 * source.nbytes / _best_s(lambda: list(pool.map(copy, parts)))


def _best_s(call: Callable[[], object]) -> float:
    """The shortest of several runs: a ceiling is what the machine can do when nothing disturbs it."""
    call()
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)
