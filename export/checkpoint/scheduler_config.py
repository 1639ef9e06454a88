"""Convert diffusers' scheduler_config.json to SchedulerParams; settings that ditc does not compute are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ditc.export.checkpoint.training_sigmas import training_sigmas
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.schedulers import (
    FinalSigmas,
    SchedulerKind,
    SchedulerParams,
    SolverType,
    Spacing,
    TimeShift,
    coefficient_table,
)

# Where the config is in a checkpoint, for messages.
SCHEDULER_FILE = "scheduler/scheduler_config.json"

_DPMSOLVER_CLASS = "DPMSolverMultistepScheduler"
_EULER_CLASS = "FlowMatchEulerDiscreteScheduler"
_HEUN_CLASS = "FlowMatchHeunDiscreteScheduler"
_LCM_CLASS = "FlowMatchLCMScheduler"
_SCM_CLASS = "SCMScheduler"
_UNIPC_CLASS = "UniPCMultistepScheduler"

_FLAG = (False, True, None)
_OFF = (False, None)

# Settings that several classes have: setting -> (the default in diffusers 0.42.1, the values that ditc computes).
_FLOW_SOLVER: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "use_flow_sigmas": (False, (True,)),
    "solver_order": (2, (1, 2, 3)),
    # Each class replaces the other's solver types by its default, so that a config can be moved between them.
    "solver_type": ("", ("midpoint", "heun", "logrho", "bh1", "bh2")),
    "final_sigmas_type": ("zero", ("zero", "sigma_min")),
    "timestep_spacing": ("linspace", ("linspace", "leading", "trailing")),
    "thresholding": (False, (False,)),
    "use_exponential_sigmas": (False, _OFF),
    "use_beta_sigmas": (False, _OFF),
    "use_lu_lambdas": (False, _OFF),
    "use_dynamic_shifting": (False, _FLAG),
}
_FLOW_MATCH: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "use_dynamic_shifting": (False, _FLAG),
    "time_shift_type": ("exponential", ("exponential", "linear")),
    "invert_sigmas": (False, _FLAG),
    "use_karras_sigmas": (False, _FLAG),
    "use_exponential_sigmas": (False, _FLAG),
    "use_beta_sigmas": (False, _FLAG),
}

# For each scheduler class, the settings that decide whether ditc's formulas are the right ones.
_SERVED: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    _DPMSOLVER_CLASS: {
        **_FLOW_SOLVER,
        "solver_type": ("midpoint", _FLOW_SOLVER["solver_type"][1]),
        "algorithm_type": ("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis")),
        "use_karras_sigmas": (False, _OFF),
    },
    _EULER_CLASS: {**_FLOW_MATCH, "stochastic_sampling": (False, _FLAG)},
    _HEUN_CLASS: {"use_dynamic_shifting": (False, _OFF)},
    _LCM_CLASS: {**_FLOW_MATCH, "scale_factors": (None, (None, []))},
    _SCM_CLASS: {"prediction_type": ("trigflow", ("trigflow",))},
    _UNIPC_CLASS: {
        **_FLOW_SOLVER,
        "solver_type": ("bh2", _FLOW_SOLVER["solver_type"][1]),
        "time_shift_type": ("exponential", ("exponential", "linear")),
        "predict_x0": (True, (True,)),
        "solver_p": (None, (None,)),
        "use_karras_sigmas": (False, _FLAG),
    },
}

# The other settings of these classes. They are read below, or they have no effect: with flow sigmas the betas matter
# only through their ends, and the timesteps follow from the sigmas. A file may hold settings of another class, because
# from_config of diffusers keeps them when it makes one scheduler from another's config.
_OTHERS = {
    *("num_train_timesteps", "flow_shift", "shift", "lower_order_final", "euler_at_final"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lambda_min_clipped", "variance_type"),
    *("steps_offset", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    *("shift_terminal", "disable_corrector", "sigma_min", "sigma_max", "upscale_mode", "sigma_data"),
}

_SPACINGS = {
    "use_karras_sigmas": Spacing.KARRAS,
    "use_exponential_sigmas": Spacing.EXPONENTIAL,
    "use_beta_sigmas": Spacing.BETA,
}
_DAMAGED = "scheduler/scheduler_config.json is damaged or was edited: fetch it again"


def scheduler_params(
    config: Mapping[str, Any],
    *,
    timestep_scale: float = 1.0,
    passes_mu: bool = False,
    trigflow: bool = False,
) -> SchedulerParams:
    """The parameters with which ditc computes the same schedule as diffusers does from `config`.

    Args:
        config: the contents of a scheduler_config.json; a missing setting takes diffusers' default.
        timestep_scale: from the transformer's config, because the scheduler's config does not have it.
        passes_mu: whether the model's pipeline in diffusers gives its scheduler a mu, as dynamic shifting needs.
        trigflow: whether that pipeline turns the network's velocity into TrigFlow's prediction, as SCM needs.

    Raises:
        CheckpointError: ditc does not compute this scheduler, or one of its settings.
    """
    name = config.get("_class_name")
    if name not in _SERVED:
        raise CheckpointError(
            f"the scheduler is {name}, but ditc computes only {', '.join(_SERVED)}",
            hint="another scheduler draws other pictures than this model's own: save the pipeline with one of these "
            "only if the model was trained to be sampled with it",
        )
    if trigflow is not (name == _SCM_CLASS):
        raise CheckpointError(
            f"the scheduler is {name}, but this model's pipeline "
            + (f"needs {_SCM_CLASS}" if trigflow else "makes no prediction that it could use"),
            hint="take the scheduler/ folder that the model was released with",
        )
    _check_settings(name, config)
    read = _READERS[name](config, passes_mu)
    params = SchedulerParams(
        num_train_timesteps=_train_timesteps(config), timestep_scale=timestep_scale, **read
    )
    _check_finite(name, params)
    return params


def _check_settings(name: str, config: Mapping[str, Any]) -> None:
    served = _SERVED[name]
    for setting, (default, values) in served.items():
        value = config.get(setting, default)
        # Types are compared too, because 1 == True: a flag must be a bool, and an order a number.
        if not any(value == allowed and type(value) is type(allowed) for allowed in values):
            raise CheckpointError(
                f"{name} has {setting} = {value!r}, but ditc computes only "
                f"{' or '.join(repr(v) for v in values)}",
                hint=f"another value of {setting} draws other pictures: change it in scheduler_config.json only if "
                "the model was trained to be sampled so",
            )
    known = _OTHERS.union(*_SERVED.values())
    for setting, value in config.items():
        if not setting.startswith("_") and setting not in known and value not in (None, False):
            raise CheckpointError(
                f"{name} has {setting} = {value!r}, a setting that ditc does not know",
                hint="remove it from scheduler_config.json only if the scheduler does not read it",
            )


def _check_finite(name: str, params: SchedulerParams) -> None:
    """Refuse settings with which diffusers' own scheduler computes NaN, such as UniPC's bh1 with a last sigma of 0."""
    try:
        coefficient_table(params, 8, image_seq_len=1024)
    except UsageError as e:
        raise CheckpointError(
            f"{name} computes NaN with these settings, in diffusers too: {e}",
            hint="the scheduler_config.json is not the one that the model is sampled with: fetch it again",
        ) from e


def _read_flow_match(config: Mapping[str, Any], passes_mu: bool) -> dict[str, Any]:
    """FlowMatchEulerDiscreteScheduler, and FlowMatchLCMScheduler, which is the same with fresh noise in every step."""
    shift, dynamic = _number(config, "shift", 1.0), bool(config.get("use_dynamic_shifting"))
    if dynamic:
        _check_mu(config["_class_name"], passes_mu)
    sigma_min, sigma_max = _sigma_range(_train_timesteps(config), 1.0 if dynamic else shift)
    return {
        "kind": SchedulerKind.EULER,
        "shift": shift,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "stochastic": config["_class_name"] == _LCM_CLASS or bool(config.get("stochastic_sampling")),
        "invert_sigmas": bool(config.get("invert_sigmas")),
        **_dynamic_shift(config, dynamic, max_shift=1.15),
        **_spacing(config),
    }


def _read_heun(config: Mapping[str, Any], passes_mu: bool) -> dict[str, Any]:
    shift = _number(config, "shift", 1.0)
    sigma_min, sigma_max = _sigma_range(_train_timesteps(config), shift)
    return {"kind": SchedulerKind.HEUN, "shift": shift, "sigma_min": sigma_min, "sigma_max": sigma_max}


def _read_scm(config: Mapping[str, Any], passes_mu: bool) -> dict[str, Any]:
    return {"kind": SchedulerKind.SCM, "sigma_data": _number(config, "sigma_data", 0.5)}


def _read_dpmsolver(config: Mapping[str, Any], passes_mu: bool) -> dict[str, Any]:
    # Without a mu, diffusers' DPM-Solver takes its fixed shift, whatever use_dynamic_shifting says.
    dynamic = passes_mu and bool(config.get("use_dynamic_shifting"))
    if dynamic and config.get("time_shift_type", "exponential") != "exponential":
        raise CheckpointError(
            f"{_DPMSOLVER_CLASS} has time_shift_type = {config['time_shift_type']!r}, which diffusers refuses too",
            hint=_DAMAGED,
        )
    final = FinalSigmas(config.get("final_sigmas_type", "zero"))
    return {
        "kind": SchedulerKind.DPMSOLVER,
        **_multistep(config, (SolverType.MIDPOINT, SolverType.HEUN)),
        "sigma_min": training_sigmas(config)[0] if final is FinalSigmas.SIGMA_MIN else 0.0,
        "euler_at_final": bool(config.get("euler_at_final", False)),
        "stochastic": config.get("algorithm_type") == "sde-dpmsolver++",
        **_dynamic_shift({**config, "shift_terminal": None}, dynamic, max_shift=1.16),
    }


def _read_unipc(config: Mapping[str, Any], passes_mu: bool) -> dict[str, Any]:
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic:
        _check_mu(_UNIPC_CLASS, passes_mu)
    spacing = _spacing(config)
    if spacing["spacing"] is Spacing.KARRAS:
        low, high = training_sigmas(config)
        given = spacing["spacing_min"], spacing["spacing_max"]
        spacing["spacing_min"], spacing["spacing_max"] = given[0] or low, given[1] or high
    disabled = config.get("disable_corrector") or ()
    if not isinstance(disabled, list | tuple) or not all(type(step) is int for step in disabled):
        raise CheckpointError(
            f"disable_corrector is {disabled!r}, but must be a list of steps", hint=_DAMAGED
        )
    return {
        "kind": SchedulerKind.UNIPC,
        **_multistep(config, (SolverType.BH2, SolverType.BH1)),
        "disable_corrector": tuple(disabled),
        **_dynamic_shift(config, dynamic, max_shift=1.16),
        **spacing,
    }


_READERS: dict[str, Callable[[Mapping[str, Any], bool], dict[str, Any]]] = {
    _DPMSOLVER_CLASS: _read_dpmsolver,
    _EULER_CLASS: _read_flow_match,
    _HEUN_CLASS: _read_heun,
    _LCM_CLASS: _read_flow_match,
    _SCM_CLASS: _read_scm,
    _UNIPC_CLASS: _read_unipc,
}


def _multistep(config: Mapping[str, Any], types: tuple[SolverType, SolverType]) -> dict[str, Any]:
    """What DPM-Solver++ and UniPC share. A solver type that is not one of `types` becomes the first of them."""
    solver_type = config.get("solver_type", types[0])
    return {
        "shift": _number(config, "flow_shift", 1.0),
        "solver_order": config.get("solver_order", 2),
        "solver_type": SolverType(solver_type) if solver_type in types else types[0],
        "final_sigmas_type": FinalSigmas(config.get("final_sigmas_type", "zero")),
        "lower_order_final": bool(config.get("lower_order_final", True)),
    }


def _dynamic_shift(config: Mapping[str, Any], dynamic: bool, *, max_shift: float) -> dict[str, Any]:
    """The dynamic shift.

    Args:
        max_shift: the default; StableDiffusion3Pipeline has another one for schedulers without this setting.
    """
    terminal = config.get("shift_terminal")
    read: dict[str, Any] = {
        "shift_terminal": _number(config, "shift_terminal", 0.0) if terminal else None,
    }
    if dynamic:
        read |= {
            "use_dynamic_shifting": True,
            "time_shift_type": TimeShift(config.get("time_shift_type", "exponential")),
            "base_shift": _number(config, "base_shift", 0.5),
            "max_shift": _number(config, "max_shift", max_shift),
            "base_image_seq_len": _number(config, "base_image_seq_len", 256),
            "max_image_seq_len": _number(config, "max_image_seq_len", 4096),
        }
    return read


def _check_mu(name: str, passes_mu: bool) -> None:
    if not passes_mu:
        raise CheckpointError(
            f"{name} has use_dynamic_shifting, but this model's pipeline gives its scheduler no mu: diffusers "
            "refuses it too",
            hint="take the scheduler_config.json that the model was released with",
        )


def _spacing(config: Mapping[str, Any]) -> dict[str, Any]:
    chosen = [spacing for setting, spacing in _SPACINGS.items() if config.get(setting)]
    if len(chosen) > 1:
        raise CheckpointError(
            f"{config['_class_name']} has {' and '.join(chosen)} sigmas, which diffusers refuses too",
            hint="take the scheduler_config.json that the model was released with",
        )
    if not chosen:
        return {"spacing": Spacing.UNIFORM}
    ends = {name: config.get(f"sigma_{name}") for name in ("min", "max")}
    return {
        "spacing": chosen[0],
        **{
            f"spacing_{name}": None if end is None else _number(config, f"sigma_{name}", 0.0)
            for name, end in ends.items()
        },
    }


def _train_timesteps(config: Mapping[str, Any]) -> int:
    return int(_number(config, "num_train_timesteps", 1000))


def _number(config: Mapping[str, Any], setting: str, default: float) -> float:
    value = config.get(setting, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{setting} is {value!r}, but it must be a positive number", hint=_DAMAGED)
    return float(value)


def _sigma_range(train: int, shift: float) -> tuple[float, float]:
    """Smallest and largest sigma after the shift, in float32 as in FlowMatchEulerDiscreteScheduler.__init__."""
    sigmas = np.array([1, train], np.float32) / np.float32(train)
    shifted = np.float32(shift) * sigmas / (np.float32(1) + np.float32(shift - 1) * sigmas)
    return float(shifted[0]), float(shifted[1])
