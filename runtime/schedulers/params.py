"""Parameters of a schedule: the settings of the checkpoint's scheduler that a bundle keeps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class SchedulerKind(StrEnum):
    """The solvers, as manifests name them."""

    DPMSOLVER = "flow_dpmsolver_multistep"
    EULER = "flow_match_euler"
    HEUN = "flow_match_heun"
    SCM = "trigflow_scm"
    UNIPC = "flow_unipc_multistep"


class SolverType(StrEnum):
    """How a multistep solver weights the differences between its predictions.

    Attributes:
        MIDPOINT, HEUN: DPM-Solver++ of second order.
        BH1, BH2: UniPC, whose B(h) is -h or exp(-h) - 1.
    """

    MIDPOINT = "midpoint"
    HEUN = "heun"
    BH1 = "bh1"
    BH2 = "bh2"


class FinalSigmas(StrEnum):
    """The last noise level: zero, or a small one that depends on the solver."""

    ZERO = "zero"
    SIGMA_MIN = "sigma_min"


class Spacing(StrEnum):
    """How the noise levels of the steps lie between the largest and the smallest."""

    UNIFORM = "uniform"
    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    BETA = "beta"


class TimeShift(StrEnum):
    """How mu shifts the noise levels: multiplied into the odds of the level, as exp(mu) or as it is."""

    EXPONENTIAL = "exponential"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerParams:
    """All settings that decide the numbers of a schedule, as JSON scalars. Names are those of diffusers, if it has one.

    Attributes:
        kind: the solver.
        num_train_timesteps: the timestep at sigma 1.
        shift: diffusers' flow_shift (DPM-Solver++, UniPC) or shift (Euler, Heun).
        timestep_scale: factor from timesteps to what the network sees, from the transformer's config.
        sigma_min: for DPM-Solver++, the last sigma if final_sigmas_type is "sigma_min". For Euler and Heun, the
            smallest training sigma after the first shift: diffusers shifts in __init__ and again in set_timesteps, and
            the bundle keeps the values between the two shifts.
        sigma_max: for Euler and Heun, the largest training sigma after the first shift.
        solver_order, solver_type, final_sigmas_type, lower_order_final: for DPM-Solver++ and UniPC only.
        euler_at_final: for DPM-Solver++ only.
        disable_corrector: for UniPC only, the steps after which the latents are not corrected.
        stochastic: whether every step adds fresh noise: diffusers' stochastic_sampling, FlowMatchLCMScheduler, and the
            algorithm "sde-dpmsolver++".
        use_dynamic_shifting: whether mu, which depends on the size of the picture, decides the shift.
        time_shift_type: how it does.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: mu at two numbers of patches.
        shift_terminal: the smallest level, to which the others are stretched; None leaves them.
        spacing: for Euler, all four; for UniPC, uniform or Karras.
        spacing_min, spacing_max: the ends of the spacing; None takes those of the schedule.
        invert_sigmas: whether time runs from 0 to 1 (Euler).
        sigma_data: for SCM only, the standard deviation of its latents.
        max_timesteps, intermediate_timesteps: for SCM only, the defaults of the first angle, and of the second of three
            in a schedule of two steps; None spaces those evenly.
    """

    kind: SchedulerKind
    num_train_timesteps: int = 1000
    shift: float = 1.0
    timestep_scale: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    solver_order: int = 2
    solver_type: SolverType = SolverType.MIDPOINT
    final_sigmas_type: FinalSigmas = FinalSigmas.ZERO
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()
    stochastic: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: TimeShift = TimeShift.EXPONENTIAL
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: float = 256.0
    max_image_seq_len: float = 4096.0
    shift_terminal: float | None = None
    spacing: Spacing = Spacing.UNIFORM
    spacing_min: float | None = None
    spacing_max: float | None = None
    invert_sigmas: bool = False
    sigma_data: float = 0.5
    max_timesteps: float = 1.57080
    intermediate_timesteps: float | None = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps that a request asks for.

    Attributes:
        number: how many. diffusers calls it num_inference_steps, also where Heun runs the network twice in a step.
        begin_index: the first step that is done; the ones before it are left out.
        timesteps, sigmas: the caller's own, of which at most one is given; then there are `number` of them, and one
            more where the solver's timesteps have an end.
        mu: the exponent of dynamic shifting; None without it.
        max_timesteps, intermediate_timesteps: for SCM, None for the defaults; False spaces two steps evenly.
    """

    number: int
    begin_index: int = 0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | Literal[False] | None = None
