"""The tolerance table: what may differ, by how much, and why. Every check of ditc takes its bound from here.

A row says how its bound is meant:

    absolute      the bound itself
    x PyTorch     bound times what PyTorch itself loses in that precision against fp32, on the same input
    dB below      a picture's PSNR may be that many dB below PyTorch's own in that precision

For 8 bits, "in that precision" is PyTorch with the codes and scales that calibration decided, which the bundle records.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ditc.runtime.spec import Precision


class Level(StrEnum):
    """The levels of parity, from the smallest thing compared to the largest."""

    GRAPH = "graph"
    OP = "op"
    MODULE = "module"
    STAGE = "stage"
    STEP = "step"
    TRAJECTORY = "trajectory"
    PICTURE = "picture"


class Metric(StrEnum):
    """What is measured. psnr and ssim must reach their bound, the others must not exceed it."""

    RELATIVE_L2 = "relative L2"
    COUNT = "count"
    PSNR = "PSNR dB"
    SSIM = "SSIM"
    LPIPS = "LPIPS"

    @property
    def at_least(self) -> bool:
        return self in (Metric.PSNR, Metric.SSIM)


class Form(StrEnum):
    """How a row's number becomes a bound."""

    ABSOLUTE = "absolute"
    TIMES_PYTORCH = "x PyTorch's own loss"
    BELOW_PYTORCH = "dB below PyTorch's own"


EXACT = (Precision.FP32,)
SIXTEEN = (Precision.FP16, Precision.BF16, Precision.TF32)
EIGHT = (Precision.INT8, Precision.FP8)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """One row."""

    level: Level
    metric: Metric
    precisions: tuple[Precision, ...]
    number: float
    form: Form
    reason: str


_ROUNDING = (
    "two correct programs round differently: 1.5 leaves room for another order of summation, and a lost fp32 island "
    "or an overflow costs a factor of 3 and more"
)

_CODES = (
    "PyTorch with the recorded codes and scales, on the same input, loses as much as a right graph does, whatever the "
    "prompt; measured 0.95 to 1.05. Small defects show at the module level"
)
_EDGES = (
    "the reference is PyTorch with the recorded codes: equal, until a sum that is rounded otherwise puts a value on "
    "the edge of two codes into the other one; measured up to 0.13 of what the codes cost there. A scale that is wrong "
    "by 12 costs 0.6 to 12, in one channel alone 0.26 to 3"
)

TABLE: tuple[Tolerance, ...] = (
    Tolerance(
        Level.GRAPH,
        Metric.COUNT,
        tuple(Precision),
        0,
        Form.ABSOLUTE,
        "weights, scheduler numbers and the types of fp32 islands are facts: they agree or they do not",
    ),
    Tolerance(
        Level.OP,
        Metric.RELATIVE_L2,
        EXACT,
        2e-6,
        Form.ABSOLUTE,
        "one fp32 op against fp64: two dependent sums of up to 16384 terms, rounded pairwise; measured 1e-7 to 6e-7",
    ),
    Tolerance(
        Level.OP,
        Metric.RELATIVE_L2,
        (Precision.FP16,),
        5e-4,
        Form.ABSOLUTE,
        "fp32 inside, so only the output is rounded: half an ulp of fp16 is 2**-11 = 4.9e-4",
    ),
    Tolerance(
        Level.OP,
        Metric.RELATIVE_L2,
        (Precision.BF16,),
        4e-3,
        Form.ABSOLUTE,
        "fp32 inside, so only the output is rounded: half an ulp of bf16 is 2**-8 = 3.9e-3",
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
        "a few hundred dependent fp32 GEMMs in other kernels; measured 1e-7 to 4e-6, a wrong graph gives 1e-3 and more",
    ),
    Tolerance(
        Level.STEP,
        Metric.RELATIVE_L2,
        EXACT,
        1e-5,
        Form.ABSOLUTE,
        "one stage plus guidance and the solver's update, all fp32, from the reference's own latents",
    ),
    Tolerance(
        Level.TRAJECTORY,
        Metric.RELATIVE_L2,
        EXACT,
        1e-4,
        Form.ABSOLUTE,
        "the bound of a step, compounded over 20: errors of random sign grow with the root, of one sign tenfold",
    ),
    Tolerance(
        Level.PICTURE,
        Metric.PSNR,
        EXACT,
        45.0,
        Form.ABSOLUTE,
        "45 dB is an error of 1.4 of 255 grey levels, which no eye sees; fp32 parity measures 90 dB and more",
    ),
    Tolerance(
        Level.PICTURE,
        Metric.SSIM,
        EXACT,
        0.99,
        Form.ABSOLUTE,
        "at 45 dB and above structure is untouched; SSIM catches a local defect that the mean error hides",
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
        Tolerance(level, Metric.RELATIVE_L2, SIXTEEN, 1.5, Form.TIMES_PYTORCH, _ROUNDING)
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
        Tolerance(level, Metric.RELATIVE_L2, EIGHT, 1.5, Form.TIMES_PYTORCH, _CODES)
        for level in (Level.STAGE, Level.STEP, Level.TRAJECTORY)
    ),
    Tolerance(Level.MODULE, Metric.RELATIVE_L2, EIGHT, 0.25, Form.TIMES_PYTORCH, _EDGES),
    Tolerance(
        Level.PICTURE,
        Metric.PSNR,
        EIGHT,
        3.5,
        Form.BELOW_PYTORCH,
        "1.5 times the error is 20*log10(1.5) = 3.5 dB",
    ),
)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound for one comparison, and why it is that."""

    bound: float
    reason: str


def tolerance(level: Level, metric: Metric, precision: Precision) -> Tolerance | None:
    """The table's row, or None where nothing is promised for that precision."""
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
    budget: float | None = None,
) -> Limit | None:
    """The bound for one comparison. A bound below fp32 is never tighter than fp32's own.

    Args:
        pytorch: what PyTorch itself measures in that precision against fp32, on the same input.
        budget: for int8 and fp8: the relative L2 that somebody allows a stage and a step instead.

    Returns:
        None where the bound cannot be told: the comparison is then "not checked", never passed.
    """
    judged_by_hand = level in (Level.STAGE, Level.STEP, Level.TRAJECTORY) and metric is Metric.RELATIVE_L2
    if precision in EIGHT and judged_by_hand and budget is not None:
        return Limit(budget, "the budget given for 8 bits")
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
    return Limit(max(row.number * pytorch, floor), row.reason)
