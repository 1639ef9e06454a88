"""What decides a schedule's numbers: the settings that a bundle keeps of its checkpoint's scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SchedulerKind(StrEnum):
    """The solvers."""

    DPMSOLVER = "flow_dpmsolver_multistep"
    EULER = "flow_match_euler"


class SolverType(StrEnum):
    """How DPM-Solver++ 2M weighs the difference of two predictions."""

    MIDPOINT = "midpoint"
    HEUN = "heun"


class FinalSigmas(StrEnum):
    """Where DPM-Solver++ ends: without noise, or at the smallest noise level of the training betas."""

    ZERO = "zero"
    SIGMA_MIN = "sigma_min"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerParams:
    """Everything that decides a schedule's numbers; JSON scalars only. Names are diffusers' where it has one.

    Attributes:
        kind: the solver.
        num_train_timesteps: the timestep that stands for sigma 1.
        shift: diffusers' flow_shift (DPM-Solver++) or shift (Euler).
        timestep_scale: factor on the timesteps that the network sees, from the transformer's config.
        sigma_min: DPM-Solver++: the last sigma when final_sigmas_type is "sigma_min". Euler: the smallest
            training sigma after the first shift. diffusers shifts in __init__ and again in set_timesteps: the
            values between the two freeze that into the bundle.
        sigma_max: Euler: the largest training sigma after the first shift.
        solver_order, solver_type, final_sigmas_type, lower_order_final, euler_at_final: DPM-Solver++ only.
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
