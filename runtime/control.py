"""ControlNet (arXiv 2302.05543): a network that reads a control picture and adds to the tokens of the denoiser.

It is a stage of its own, `controlnet`. Its outputs, the residuals, are inputs of the denoiser. `ControlledDenoiser`
runs both as one session, so code that steps requests need not know about it: to a step, control is two more inputs per
sample, the encoded control picture and its scale. Samples without control have a scale of 0, and get residuals of 0.
"""

# B samples, C latent channels, H/W latent size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from ditc.runtime.errors import UsageError
from ditc.runtime.request import Request
from ditc.runtime.session import (
    Array,
    ComputeDevice,
    DeviceSession,
    DeviceTensor,
    Session,
    Tensor,
    to_numpy,
    zeros,
)
from ditc.runtime.spec import CONTROLNET, DENOISER, DType, StageSpec
from ditc.runtime.step_contract import CONTROL_LATENTS, CONTROL_RESIDUAL, CONTROL_SCALE, ROW_OF


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """How strongly a control picture acts, and when. The defaults are those of diffusers' ControlNet pipelines.

    Attributes:
        scale: what the residuals are multiplied by.
        start, end: the fractions of all steps between which the control picture acts.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def scales(self, runs: int) -> list[float]:
        """The scale of each run of the network, as `controlnet_keep` of diffusers' pipelines (0.42.1)."""
        return [
            0.0 if i / runs < self.start or (i + 1) / runs > self.end else self.scale for i in range(runs)
        ]


def decide_control(request: Request, *, has_controlnet: bool) -> Control | None:
    """How the request's control picture acts; None without one.

    Raises:
        UsageError: the bundle has no ControlNet.
    """
    if request.control_image is None:
        return None
    if not has_controlnet:
        raise UsageError(
            "control_image is given, but this bundle has no ControlNet",
            hint="leave control_image out, or build with one: ditc build CHECKPOINT -o BUNDLE --controlnet DIR",
        )
    given = {
        "scale": request.controlnet_conditioning_scale,
        "start": request.control_guidance_start,
        "end": request.control_guidance_end,
    }
    return Control(**{name: value for name, value in given.items() if value is not None})


def control_feeds(control: Control | None, latents: Array, runs: int) -> list[dict[str, Array]]:
    """The inputs for control, for each run of the network.

    Args:
        latents: (B,C,H,W) fp32, the encoded control pictures; zeros without control.
    """
    scales = [0.0] * runs if control is None else control.scales(runs)
    batch = latents.shape[0]
    return [{CONTROL_LATENTS: latents, CONTROL_SCALE: np.full(batch, scale, np.float32)} for scale in scales]


def example_picture() -> Image.Image:
    """A control picture for measurements and comparisons: white rings on black, like edges."""
    picture = Image.new("RGB", (256, 256))
    pen = ImageDraw.Draw(picture)
    for radius in range(24, 128, 24):
        pen.ellipse((128 - radius, 110 - radius, 128 + radius, 110 + radius), outline="white", width=5)
    return picture


def step_session(sessions: Mapping[str, Session]) -> Session:
    """What computes a step: the denoiser, with the ControlNet before it if there is one."""
    denoiser = sessions[DENOISER]
    if CONTROLNET not in sessions:
        return denoiser
    on_device = isinstance(denoiser, DeviceSession)
    return (_OnDevice if on_device else ControlledDenoiser)(sessions[CONTROLNET], denoiser)


def has_control(step: StageSpec) -> bool:
    """Whether the spec of a step has the inputs for control."""
    return any(tensor.name == CONTROL_SCALE for tensor in step.inputs)


class ControlledDenoiser:
    """The ControlNet and the denoiser behind it as one session, which computes one step.

    Its inputs are those of both without the residuals. It does not own the two sessions.

    A loop of several steps in one launch is not offered: the residuals of a step depend on the latents after the one
    before it.
    """

    def __init__(self, controlnet: Session, denoiser: Session) -> None:
        self._controlnet, self._denoiser = controlnet, denoiser
        self.spec: StageSpec = _joined_spec(controlnet.spec, denoiser.spec)
        self.device: ComputeDevice = denoiser.device
        self._zeros: dict[tuple[int, ...], dict[str, Array]] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the ControlNet, unless the scale of every sample is 0, and then the denoiser.

        Raises:
            SessionError: an input is missing, or its element type or shape does not fit the spec.
        """
        residuals = (
            self._residuals(feeds) if to_numpy(feeds[CONTROL_SCALE]).any() else self._no_residuals(feeds)
        )
        return self._denoiser.run({**_needed(feeds, self._denoiser.spec), **residuals})

    def close(self) -> None:
        """Do nothing: the two sessions belong to the pipeline."""

    def _residuals(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._controlnet.run(_needed(feeds, self._controlnet.spec))

    def _no_residuals(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Residuals of 0. They stay the same arrays while the shapes do, so they are sent to a device only once."""
        rows, (height, width) = feeds[ROW_OF].shape[0], feeds[CONTROL_LATENTS].shape[2:]
        key = (rows, height, width)
        if key not in self._zeros:
            made = {
                tensor.name: zeros((*key, int(tensor.shape[3])), tensor.dtype)
                for tensor in self._controlnet.spec.outputs
            }
            for array in made.values():
                array.flags.writeable = False
            self._zeros = {key: made}
        return self._zeros[key]


class _OnDevice(ControlledDenoiser):
    """The same where tensors are in the denoiser's memory."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        """A tensor with undefined content. Raises SessionError if the memory does not suffice."""
        assert isinstance(self._denoiser, DeviceSession)
        return self._denoiser.empty(shape, dtype)


def _joined_spec(controlnet: StageSpec, denoiser: StageSpec) -> StageSpec:
    own = [tensor for tensor in denoiser.inputs if not tensor.name.startswith(CONTROL_RESIDUAL)]
    known = {tensor.name for tensor in own}
    more = [tensor for tensor in controlnet.inputs if tensor.name not in known]
    return replace(denoiser, inputs=(*own, *more))


def _needed(feeds: Mapping[str, Tensor], spec: StageSpec) -> dict[str, Tensor]:
    """The feeds that the stage takes. One that is missing is left to its session, whose error names it."""
    return {tensor.name: feeds[tensor.name] for tensor in spec.inputs if tensor.name in feeds}
