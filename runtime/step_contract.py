"""The contract of a denoising step: the names of a denoiser's inputs and outputs, and what its coefficients mean.

A denoiser computes one whole solver step. The exporter builds it to this contract, the manifest states its guidance
mode, and all code that prepares, runs or checks a step takes the names from here.

    pred  = sum_r guidance_weights[b,r] * network(c_in * latents[row_of[r]], timestep, [guidance], row r)
    x0    = a * latents + b * pred
    next  = cx * latents + c0 * x0 + sum_k h_k * history_k + [cn * noise]

history_k is the x0 of k steps ago. A solver is a table with one row per step and one column per coefficient.

A step of a video may hold some of its latent frames, as image-to-video does with the first one: the network sees them
with the timestep 0, which is that of a frame without noise, and  x0 = next = latents  there.
"""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, P history length

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ditc.runtime.spec import DType, StageSpec, TensorSpec

# Inputs. Those in brackets above exist only in denoisers that need them.
LATENTS = "latents"  # (B,C,H,W) fp32
ROW_OF = "row_of"  # (R,) int64: the sample to which each row of the network belongs
TIMESTEP = "timestep"  # (B,) fp32, after timestep_scale, as the network sees it
GUIDANCE_WEIGHTS = "guidance_weights"  # (B,R) fp32
COEFFICIENTS = "coefficients"  # (B,K) fp32
HISTORY = "history"  # (B,P,C,H,W) fp32, newest x0 first, zeros at the start
NOISE = "noise"  # (B,C,H,W) fp32, new in every step
GUIDANCE = "guidance"  # (B,) fp32: guidance_scale, for networks that embed it
# (R,) fp32: 1 for gated rows, which skip a part of the network: whole layers (skip-layer guidance), or the
# self-attention of layers (perturbed-attention guidance). Which part it is, is fixed in the graph.
SKIP_GATE = "skip_gate"
HELD = "held"  # (B,F) fp32: 1 for latent frames of a video that are held, else 0

# Inputs of a ControlNet, besides some of those above and the conditioning (Zhang et al., arXiv 2302.05543).
CONTROL_LATENTS = "control_latents"  # (B,C,H,W) fp32: the control picture, as the VAE encodes it
CONTROL_SCALE = "control_scale"  # (B,) fp32: controlnet_conditioning_scale; 0 turns control off
# Outputs of a ControlNet and inputs of its denoiser, "control_residual_0" and so on: what is added to the tokens
# between two blocks. The tokens (R,N,D) are written as (R,H,W,D/p^2), which are the same values in the same order.
CONTROL_RESIDUAL = "control_residual_"

# Outputs, all fp32.
NEXT_LATENTS = "next_latents"
X0 = "x0"
NEXT_HISTORY = "next_history"
STATS = "stats"  # (B,2): how many values of x0 are not finite, and the largest finite magnitude
STATS_SIZE = 2

# An output of encoders whose posterior is sampled: its standard deviation, in the scale of the latents.
LATENTS_STD = "latents_std"

# Outputs of one step, and the inputs that they become in the next step.
CARRY = {NEXT_LATENTS: LATENTS, NEXT_HISTORY: HISTORY}

# Inputs with one value per row of the network; the other small inputs have one value per sample.
PER_ROW = frozenset({ROW_OF, SKIP_GATE})

# What a decoder of videos hands on from one latent frame to the next: outputs "kept_0" and so on of the stage that
# decodes the first one. The stage for all others takes them, and returns "next_kept_0" and so on, which it takes again.
# A tensor (B,D,T,s*H,s*W) is written as (B,D,T,H,s,W,s), which are the same values in the same order.
KEPT = "kept_"
NEXT_KEPT = "next_kept_"

# The output of the network alone, without the step around it.
PREDICTION = "prediction"

# Names of dimensions, including those of the stages before and after the denoiser.
BATCH = "batch"
ROWS = "rows"
HEIGHT = "height"  # in latent cells
WIDTH = "width"
FRAMES = "frames"  # of the latents of a video
VIDEO_FRAMES = "video_frames"  # of the video itself, where it is decoded as a whole
IMAGE_HEIGHT = "image_height"  # in pixels
IMAGE_WIDTH = "image_width"
SIDES = (HEIGHT, WIDTH, IMAGE_HEIGHT, IMAGE_WIDTH)
TEXT_LENGTH = "text_length"  # tokens that reach the denoiser

# The axes of latents after batch and channels. Where this file says (H,W), a video has (F,H,W).
PICTURE_AXES: tuple[str, ...] = (HEIGHT, WIDTH)
VIDEO_AXES: tuple[str, ...] = (FRAMES, HEIGHT, WIDTH)

# Names of coefficient columns.
C_IN, A, B, CX, C0, CN = "c_in", "a", "b", "cx", "c0", "cn"


class GuidanceMode(StrEnum):
    """How guidance_scale reaches a denoiser.

    Attributes:
        CFG: classifier-free guidance (arXiv 2207.12598). guidance_scale sets the weights of unconditional and
            conditional rows, and a negative prompt has an effect.
        EMBEDDED: guidance_scale is an input of the network, which was distilled with it. There is one row per sample.
        NONE: the denoiser does not use guidance_scale. There is one row per sample.
    """

    CFG = "cfg"
    EMBEDDED = "embedded"
    NONE = "none"


def history_column(steps_ago: int) -> str:
    """The name of the coefficient for the x0 of `steps_ago` steps ago, which is 1 or more."""
    return f"h{steps_ago}"


def coefficient_columns(history_length: int, noise: bool) -> tuple[str, ...]:
    """The names of the K columns, in the order in which a denoiser takes them."""
    history = tuple(history_column(k + 1) for k in range(history_length))
    return (C_IN, A, B, CX, C0, *history, *((CN,) if noise else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContract:
    """What distinguishes one denoiser's step from another's.

    Attributes:
        history_length: P, how many earlier x0 the update reads.
        noise: whether the update adds fresh noise, as stochastic samplers do.
        guidance: how guidance_scale reaches the network.
        skip_gate: whether rows may be gated, as skip-layer and perturbed-attention guidance need.
        holds_frames: whether latent frames may be held, as image-to-video needs. Then the network takes one timestep
            per frame. One graph draws videos with and without held frames, so their requests can share a run.
    """

    history_length: int = 1
    noise: bool = False
    guidance: GuidanceMode = GuidanceMode.CFG
    skip_gate: bool = False
    holds_frames: bool = False

    @classmethod
    def of(cls, spec: StageSpec, guidance: GuidanceMode) -> StepContract:
        """The contract of a denoiser, from its spec and from the guidance mode in its manifest."""
        names = {tensor.name for tensor in spec.inputs}
        length = spec.input(HISTORY).shape[1] if HISTORY in names else 0
        assert isinstance(length, int)
        return cls(
            history_length=length,
            noise=NOISE in names,
            guidance=guidance,
            skip_gate=SKIP_GATE in names,
            holds_frames=HELD in names,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the coefficient columns, in order."""
        return coefficient_columns(self.history_length, self.noise)

    def inputs(
        self, channels: int, conditioning: tuple[TensorSpec, ...], axes: tuple[str, ...] = PICTURE_AXES
    ) -> tuple[TensorSpec, ...]:
        """The inputs of the whole step, in the order in which the exported module takes them.

        Args:
            channels: C.
            conditioning: the outputs of the conditioner, each of shape (R, ...).
            axes: those of the latents, as LatentSpec.axes says.
        """
        image: tuple[int | str, ...] = (BATCH, channels, *axes)
        return (
            TensorSpec(LATENTS, DType.FLOAT32, image),
            TensorSpec(ROW_OF, DType.INT64, (ROWS,)),
            TensorSpec(TIMESTEP, DType.FLOAT32, (BATCH,)),
            TensorSpec(GUIDANCE_WEIGHTS, DType.FLOAT32, (BATCH, ROWS)),
            TensorSpec(COEFFICIENTS, DType.FLOAT32, (BATCH, len(self.columns))),
            TensorSpec(HISTORY, DType.FLOAT32, (BATCH, self.history_length, *image[1:])),
            *((TensorSpec(NOISE, DType.FLOAT32, image),) if self.noise else ()),
            *((TensorSpec(GUIDANCE, DType.FLOAT32, (BATCH,)),) if self.embeds_guidance else ()),
            *((TensorSpec(HELD, DType.FLOAT32, (BATCH, FRAMES)),) if self.holds_frames else ()),
            *conditioning,
            *((TensorSpec(SKIP_GATE, DType.FLOAT32, (ROWS,)),) if self.skip_gate else ()),
        )

    def network_inputs(self, conditioning: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """The inputs that the network itself takes after its latents. Each has one entry per row."""
        timesteps: tuple[int | str, ...] = (ROWS, FRAMES) if self.holds_frames else (ROWS,)
        return (
            TensorSpec(TIMESTEP, DType.FLOAT32, timesteps),
            *((TensorSpec(GUIDANCE, DType.FLOAT32, (ROWS,)),) if self.embeds_guidance else ()),
            *conditioning,
            *((TensorSpec(SKIP_GATE, DType.FLOAT32, (ROWS,)),) if self.skip_gate else ()),
        )

    def outputs(self, channels: int, axes: tuple[str, ...] = PICTURE_AXES) -> tuple[TensorSpec, ...]:
        """The outputs of the whole step, in the order in which the exported module returns them."""
        image: tuple[int | str, ...] = (BATCH, channels, *axes)
        return (
            TensorSpec(NEXT_LATENTS, DType.FLOAT32, image),
            TensorSpec(X0, DType.FLOAT32, image),
            TensorSpec(NEXT_HISTORY, DType.FLOAT32, (BATCH, self.history_length, *image[1:])),
            TensorSpec(STATS, DType.FLOAT32, (BATCH, STATS_SIZE)),
        )

    @property
    def rows_per_sample(self) -> int:
        """The largest number of rows per sample: unconditional, conditional, and conditional and gated."""
        return (2 if self.guidance is GuidanceMode.CFG else 1) + self.skip_gate

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance_scale is an input of the network."""
        return self.guidance is GuidanceMode.EMBEDDED
