"""Parameters of a schedule: the settings of the checkpoint's scheduler that a bundle keeps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SchedulerKind(StrEnum):
    """The solvers, as manifests name them."""

    DPMSOLVER = "flow_dpmsolver_multistep"
    EULER = "flow_match_euler"


class SolverType(StrEnum):
    """How DPM-Solver++ 2M weights the difference between two predictions."""

    MIDPOINT = "midpoint"
    HEUN = "heun"


class FinalSigmas(StrEnum):
    """The last noise level of DPM-Solver++: zero, or the smallest level of the training betas."""

    ZERO = "zero"
    SIGMA_MIN = "sigma_min"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerParams:
    """All settings that decide the numbers of a schedule, as JSON scalars. Names are those of diffusers, if it has one.

    Attributes:
        kind: the solver.
        num_train_timesteps: the timestep at sigma 1.
        shift: diffusers' flow_shift (DPM-Solver++) or shift (Euler).
        timestep_scale: factor from timesteps to what the network sees, from the transformer's config.
        sigma_min: for DPM-Solver++, the last sigma if final_sigmas_type is "sigma_min". For Euler, the smallest
            training sigma after the first shift: diffusers shifts in __init__ and again in set_timesteps, and the
            bundle keeps the values between the two shifts.
        sigma_max: for Euler, the largest training sigma after the first shift.
        solver_order, solver_type, final_sigmas_type, lower_order_final, euler_at_final: for DPM-Solver++ only.
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
