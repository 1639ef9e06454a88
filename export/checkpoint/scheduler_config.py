"""Convert diffusers' scheduler_config.json to SchedulerParams; settings that ditc does not compute are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ditc.runtime.errors import CheckpointError
from ditc.runtime.schedulers import FinalSigmas, SchedulerKind, SchedulerParams, SolverType

# Where the config is in a checkpoint, for messages.
SCHEDULER_FILE = "scheduler/scheduler_config.json"

_DPMSOLVER_CLASS = "DPMSolverMultistepScheduler"
_EULER_CLASS = "FlowMatchEulerDiscreteScheduler"

# For each scheduler class, the settings that decide whether ditc's formulas are the right ones:
# setting -> (the default in diffusers 0.42.1, the values that ditc computes).
_SERVED: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    _DPMSOLVER_CLASS: {
        "prediction_type": ("epsilon", ("flow_prediction",)),
        "use_flow_sigmas": (False, (True,)),
        "solver_order": (2, (1, 2)),
        "solver_type": ("midpoint", ("midpoint", "heun")),
        "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
        "final_sigmas_type": ("zero", ("zero", "sigma_min")),
        "thresholding": (False, (False,)),
        "use_karras_sigmas": (False, (False, None)),
        "use_exponential_sigmas": (False, (False, None)),
        "use_beta_sigmas": (False, (False, None)),
        "use_lu_lambdas": (False, (False, None)),
        "use_dynamic_shifting": (False, (False, None)),
    },
    _EULER_CLASS: {
        "use_dynamic_shifting": (False, (False, None)),
        "invert_sigmas": (False, (False, None)),
        "shift_terminal": (None, (None, 0)),
        "use_karras_sigmas": (False, (False, None)),
        "use_exponential_sigmas": (False, (False, None)),
        "use_beta_sigmas": (False, (False, None)),
        "stochastic_sampling": (False, (False, None)),
    },
}

# The other settings of the two classes. They are read below, or they have no effect: with flow sigmas the betas
# matter only through sigma_min, and the timesteps follow from the sigmas. A file may hold settings of the other
# class, because from_config of diffusers keeps them when it makes one scheduler from another's config.
_OTHERS = {
    *("num_train_timesteps", "flow_shift", "shift", "lower_order_final", "euler_at_final"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lambda_min_clipped", "variance_type"),
    *("timestep_spacing", "steps_offset", "time_shift_type", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len"),
}


def scheduler_params(config: Mapping[str, Any], *, timestep_scale: float = 1.0) -> SchedulerParams:
    """The parameters with which ditc computes the same schedule as diffusers does from `config`.

    Args:
        config: the contents of a scheduler_config.json; a missing setting takes diffusers' default.
        timestep_scale: from the transformer's config, because the scheduler's config does not have it.

    Raises:
        CheckpointError: ditc does not compute this scheduler, or one of its settings.
    """
    name = config.get("_class_name")
    if name not in _SERVED:
        raise CheckpointError(
            f"the scheduler is {name}, but ditc computes only {' and '.join(_SERVED)}",
            hint="save the pipeline with one of them: Scheduler.from_config(pipe.scheduler.config, ...)",
        )
    _check_settings(name, config)
    train = int(_number(config, "num_train_timesteps", 1000))
    if name == _EULER_CLASS:
        shift = _number(config, "shift", 1.0)
        sigma_min, sigma_max = _euler_sigma_range(train, shift)
        return SchedulerParams(
            kind=SchedulerKind.EULER,
            num_train_timesteps=train,
            shift=shift,
            timestep_scale=timestep_scale,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
        )
    final = FinalSigmas(config.get("final_sigmas_type", "zero"))
    return SchedulerParams(
        kind=SchedulerKind.DPMSOLVER,
        num_train_timesteps=train,
        shift=_number(config, "flow_shift", 1.0),
        timestep_scale=timestep_scale,
        sigma_min=_vp_sigma_min(config) if final is FinalSigmas.SIGMA_MIN else 0.0,
        solver_order=config.get("solver_order", 2),
        solver_type=SolverType(config.get("solver_type", "midpoint")),
        final_sigmas_type=final,
        lower_order_final=bool(config.get("lower_order_final", True)),
        euler_at_final=bool(config.get("euler_at_final", False)),
    )


def _check_settings(name: str, config: Mapping[str, Any]) -> None:
    served = _SERVED[name]
    for setting, (default, values) in served.items():
        value = config.get(setting, default)
        # Types are compared too, because 1 == True: a flag must be a bool, and an order a number.
        if not any(value == allowed and type(value) is type(allowed) for allowed in values):
            raise CheckpointError(
                f"{name} has {setting} = {value!r}, but ditc computes only "
                f"{' or '.join(repr(v) for v in values)}",
                hint=f"set {setting} to such a value in scheduler_config.json, if the model is meant for it",
            )
    known = _OTHERS.union(*_SERVED.values())
    for setting, value in config.items():
        if not setting.startswith("_") and setting not in known and value not in (None, False):
            raise CheckpointError(
                f"{name} has {setting} = {value!r}, a setting that ditc does not know",
                hint="if it does not change the schedule, remove it from scheduler_config.json",
            )


def _number(config: Mapping[str, Any], setting: str, default: float) -> float:
    value = config.get(setting, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(
            f"{setting} is {value!r}, but it must be a positive number",
            hint="scheduler/scheduler_config.json is damaged or was edited: fetch it again",
        )
    return float(value)


def _euler_sigma_range(train: int, shift: float) -> tuple[float, float]:
    """Smallest and largest sigma after the shift, in float32 as in FlowMatchEulerDiscreteScheduler.__init__."""
    sigmas = np.array([1, train], np.float32) / np.float32(train)
    shifted = np.float32(shift) * sigmas / (np.float32(1) + np.float32(shift - 1) * sigmas)
    return float(shifted[0]), float(shifted[1])


def _vp_sigma_min(config: Mapping[str, Any]) -> float:
    """The last sigma for final_sigmas_type "sigma_min": the first sigma of the variance-preserving schedule.

    diffusers takes it from the betas, although all other sigmas are those of a flow (set_timesteps).
    """
    for setting in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(setting):
            raise CheckpointError(
                f'ditc does not compute {setting} with final_sigmas_type = "sigma_min"',
                hint='set final_sigmas_type to "zero"',
            )
    start = _number(config, "beta_start", 0.0001)
    beta = np.float32(start)
    schedule = config.get("beta_schedule", "linear")
    if schedule == "scaled_linear":
        beta = np.square(np.float32(start**0.5))
    elif schedule != "linear":
        raise CheckpointError(
            f'ditc does not compute beta_schedule = {schedule!r} with final_sigmas_type = "sigma_min"',
            hint='set final_sigmas_type to "zero", or beta_schedule to "linear"',
        )
    alpha = np.float32(1) - beta
    return float(np.sqrt((np.float32(1) - alpha) / alpha))
