"""The tolerance table: how far results may differ, and why. Every check of ditc takes its bound from here.

The form of a row says how its number becomes a bound:

    absolute      the number is the bound
    x PyTorch     the number times the error of PyTorch itself in that precision against fp32, on the same input; in 16
                  bits, more for an output of few values (`few_values`)
    dB below      a picture's PSNR may be this many dB below that of PyTorch in that precision

For 8 bits, "PyTorch in that precision" is PyTorch with the quantized weights and the scales that calibration decided,
which the bundle records.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from enum import StrEnum

from ditc.runtime.spec import Precision


class Level(StrEnum):
    """The levels of parity, from the smallest part that is compared to the largest."""

    GRAPH = "graph"
    OP = "op"
    MODULE = "module"
    STAGE = "stage"
    STEP = "step"
    TRAJECTORY = "trajectory"
    PICTURE = "picture"


class Metric(StrEnum):
    """What is measured. PSNR and SSIM must reach their bound; the others must not exceed it."""

    RELATIVE_L2 = "relative L2"
    COUNT = "count"
    PSNR = "PSNR dB"
    SSIM = "SSIM"
    LPIPS = "LPIPS"

    @property
    def at_least(self) -> bool:
        """Whether the bound is a minimum, not a maximum."""
        return self in (Metric.PSNR, Metric.SSIM)


class Form(StrEnum):
    """How a row's number becomes a bound."""

    ABSOLUTE = "absolute"
    TIMES_PYTORCH = "x PyTorch's own error"
    BELOW_PYTORCH = "dB below PyTorch's own"


EXACT = (Precision.FP32,)
SIXTEEN = (Precision.FP16, Precision.BF16, Precision.TF32)
EIGHT = (Precision.INT8_DYNAMIC, Precision.INT8, Precision.FP8)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """One row of the table."""

    level: Level
    metric: Metric
    precisions: tuple[Precision, ...]
    number: float
    form: Form
    reason: str


_SIXTEEN_BIT_ROUNDING = (
    "two correct programs round differently: 1.5 leaves room for another order of summation, while a lost fp32 island "
    "or an overflow costs a factor of 3 or more. An output of n values gets 1 + 3 / sqrt(n) times that: PyTorch's own "
    "error on it is one draw of its rounding"
)

_QUANTIZED = (
    "on the same input, PyTorch with the recorded quantized weights and scales has the same error as a correct graph, "
    "for any prompt; measured 0.95 to 1.05 of it. Small defects are found at the module level"
)
_DYNAMIC = (
    "as for int8, but the scales themselves are not recorded: a library may take one for every 128 channels of a "
    "token, so its rounding is another sample of the same error; measured 0.6 to 1.53 of it on a text encoder with one "
    "prompt"
)
_QUANTIZED_MODULE = (
    "the reference is PyTorch with the recorded quantized weights and scales. Results are equal until a differently "
    "rounded sum moves a value to the neighbouring quantization level, from where the difference grows; measured up to "
    "0.33 of the quantization error on three pictures of the demo. A scale that is "
    "wrong by a factor of 12 costs 0.6 to 12, in one channel alone 0.26 to 3; the graph level finds those exactly"
)

TABLE: tuple[Tolerance, ...] = (
    Tolerance(
        Level.GRAPH,
        Metric.COUNT,
        tuple(Precision),
        0,
        Form.ABSOLUTE,
        "weights, scheduler numbers and the types of fp32 islands are either equal or wrong",
    ),
    Tolerance(
        Level.OP,
        Metric.RELATIVE_L2,
        EXACT,
        2e-6,
        Form.ABSOLUTE,
        "one fp32 op against fp64: two dependent sums of up to 16384 terms, summed pairwise; measured 1e-7 to 6e-7",
    ),
    Tolerance(
        Level.OP,
        Metric.RELATIVE_L2,
        (Precision.FP16,),
        5e-4,
        Form.ABSOLUTE,
        "the op computes in fp32, so only its output is rounded: half an ulp of fp16 is 2**-11 = 4.9e-4",
    ),
    Tolerance(
        Level.OP,
        Metric.RELATIVE_L2,
        (Precision.BF16,),
        4e-3,
        Form.ABSOLUTE,
        "the op computes in fp32, so only its output is rounded: half an ulp of bf16 is 2**-8 = 3.9e-3",
    ),
    Tolerance(
        Level.MODULE,
        Metric.RELATIVE_L2,
        EXACT,
        1e-5,
        Form.ABSOLUTE,
        "the same fp32 arithmetic in another order, from the same input; measured 1e-7 to 4e-6 at the deepest module",
    ),
    Tolerance(
        Level.STAGE,
        Metric.RELATIVE_L2,
        EXACT,
        1e-5,
        Form.ABSOLUTE,
        "a few hundred dependent fp32 GEMMs in other kernels; measured 1e-7 to 4e-6. A wrong graph gives 1e-3 or more",
    ),
    Tolerance(
        Level.STEP,
        Metric.RELATIVE_L2,
        EXACT,
        1e-5,
        Form.ABSOLUTE,
        "one stage, guidance and the solver's update, all in fp32, from the latents of the reference",
    ),
    Tolerance(
        Level.TRAJECTORY,
        Metric.RELATIVE_L2,
        EXACT,
        1e-4,
        Form.ABSOLUTE,
        "the bound of a step, compounded over 20 steps: errors of random sign grow with the root, of one sign tenfold",
    ),
    Tolerance(
        Level.PICTURE,
        Metric.PSNR,
        EXACT,
        45.0,
        Form.ABSOLUTE,
        "45 dB is an error of 1.4 of 255 grey levels, which is invisible; fp32 parity measures 90 dB or more",
    ),
    Tolerance(
        Level.PICTURE,
        Metric.SSIM,
        EXACT,
        0.99,
        Form.ABSOLUTE,
        "at 45 dB and above, structure is preserved; SSIM catches a local defect that the mean error hides",
    ),
    Tolerance(
        Level.PICTURE,
        Metric.LPIPS,
        EXACT,
        0.001,
        Form.ABSOLUTE,
        "a tenth of what JPEG at quality 95 costs; fp32 parity is far below it",
    ),
    *(
        Tolerance(level, Metric.RELATIVE_L2, SIXTEEN, 1.5, Form.TIMES_PYTORCH, _SIXTEEN_BIT_ROUNDING)
        for level in (Level.MODULE, Level.STAGE, Level.STEP, Level.TRAJECTORY)
    ),
    Tolerance(
        Level.PICTURE,
        Metric.PSNR,
        SIXTEEN,
        3.5,
        Form.BELOW_PYTORCH,
        "1.5 times the error is 20*log10(1.5) = 3.5 dB",
    ),
    *(
        Tolerance(level, Metric.RELATIVE_L2, precisions, number, Form.TIMES_PYTORCH, reason)
        for level in (Level.STAGE, Level.STEP, Level.TRAJECTORY)
        for precisions, number, reason in (
            ((Precision.INT8, Precision.FP8), 1.5, _QUANTIZED),
            ((Precision.INT8_DYNAMIC,), 2.0, _DYNAMIC),
        )
    ),
    Tolerance(
        Level.MODULE,
        Metric.RELATIVE_L2,
        (Precision.INT8, Precision.FP8),
        0.5,
        Form.TIMES_PYTORCH,
        _QUANTIZED_MODULE,
    ),
    Tolerance(
        Level.MODULE,
        Metric.RELATIVE_L2,
        (Precision.INT8_DYNAMIC,),
        1.0,
        Form.TIMES_PYTORCH,
        "as for int8, but a moved value also moves the scale of its token in the next layer; measured up to 0.53 of "
        "the quantization error on five pictures of the demo. The graph level finds wrong scales exactly",
    ),
    Tolerance(
        Level.PICTURE,
        Metric.PSNR,
        EIGHT,
        3.5,
        Form.BELOW_PYTORCH,
        "1.5 times the error is 20*log10(1.5) = 3.5 dB",
    ),
)


# Standard deviations by which the errors of two correct programs may differ where an output has few values.
FEW_VALUES_DEVIATIONS = 3.0


def few_values(values: float) -> float:
    """The factor of a bound whose error was measured on so many values; it tends to 1 for many.

    The L2 norm of n independent errors has the relative standard deviation 1 / sqrt(2n) (chi distribution), and the
    ratio of two such norms 1 / sqrt(n). An example is the pooled output of a tiny CLIP for one prompt, 12 values: over
    300 prompts, PyTorch in bf16 was 3.7e-3 to 4.3e-2 from fp32, and PyTorch in fp32 with weights rounded to bf16, which
    should lose less, had up to 1.6 times the error of PyTorch in bf16. OpenVINO in bf16 had 2.2 times that on one.
    CLIPs of the released models have 768 and 1280 values: a factor of 1.11 and 1.08.
    """
    return 1 + FEW_VALUES_DEVIATIONS / math.sqrt(values)


def table_digest() -> str:
    """A hash of all numbers of the table. A result that was judged by another table proves something else."""
    rows = sorted([t.level, t.metric, t.number, t.form, *sorted(t.precisions)] for t in TABLE)
    return hashlib.sha256(json.dumps([*rows, FEW_VALUES_DEVIATIONS]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Limit:
    """The bound for one comparison, and the reason for its value."""

    bound: float
    reason: str


def tolerance(level: Level, metric: Metric, precision: Precision) -> Tolerance | None:
    """The row of the table, or None if nothing is promised for this precision."""
    for row in TABLE:
        if row.level is level and row.metric is metric and precision in row.precisions:
            return row
    return None


def limit(
    level: Level,
    metric: Metric,
    precision: Precision,
    *,
    pytorch: float | None = None,
    values: float = math.inf,
    budget: float | None = None,
) -> Limit | None:
    """The bound for one comparison. For precisions below fp32 it is never tighter than the bound for fp32.

    Args:
        pytorch: the metric of PyTorch itself in this precision against fp32, on the same input.
        values: on how many values that was measured. In 16 bits, few of them widen the bound. In 8 bits they do not:
            there, PyTorch rounds to the same levels as a correct graph.
        budget: for int8 and fp8, a relative L2 that replaces the bound of stages, steps and trajectories.

    Returns:
        None if the bound is not known. The comparison is then reported as "not checked", never as passed.
    """
    takes_budget = level in (Level.STAGE, Level.STEP, Level.TRAJECTORY) and metric is Metric.RELATIVE_L2
    if precision in EIGHT and takes_budget and budget is not None:
        return Limit(budget, "the budget that was given for 8 bits")
    row = tolerance(level, metric, precision)
    if row is None:
        return None
    if row.form is Form.ABSOLUTE:
        return Limit(row.number, row.reason)
    if pytorch is None or pytorch != pytorch:
        return None
    if row.form is Form.BELOW_PYTORCH:
        return Limit(pytorch - row.number, row.reason)
    exact = tolerance(level, metric, Precision.FP32)
    floor = exact.number if exact is not None else 0.0
    number = row.number * (few_values(values) if precision in SIXTEEN else 1)
    return Limit(max(number * pytorch, floor), row.reason)
