"""The tables of benchmarks/cpu_peers.py: which contestants there are, and which cases they run.

Another contestant is one more row of CONTESTANTS, and another case one more row of `cases`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.full_size import DC_AE, GEMMA, SANA_1600M, transformer

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
REFERENCE = "diffusers eager fp32"
BASELINE = "diffusers eager bf16"
FULL_DEPTH = 28  # layers of Sana-0.6B's transformer
# The released decoder beside a narrow encoder, which no case runs; and a VAE for cases that decode nothing.
DECODER = {
    **DC_AE,
    **{"encoder_block_out_channels": [32] * 6, "encoder_layers_per_block": [1] * 6},
}
# Put after the demo's prompts of three words, so that a text has at least 41 tokens of the demo's tokenizer: more than
# most prompts have (calib/prompts/general.txt: half of them at most 18, nine of ten at most 39).
IN_DETAIL = (
    ", an old oil painting in warm evening light, with fine brush strokes, on a wooden table beside a window"
)
NARROW_VAE = {**DECODER, "decoder_block_out_channels": [32] * 6, "decoder_layers_per_block": [1] * 6}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to draw with a checkpoint.

    Attributes:
        kind: which class of peer_worker.py runs it; "optimum" needs the environment of peer_requirements.txt.
        settings: for that class, without the model, threads and size.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]

    @property
    def build(self) -> str:
        """The form of the checkpoint that it loads: a folder of the prepared model, "" for the checkpoint itself.

        ditc has one bundle per backend: OpenVINO's INT8 graphs are bf16 elsewhere, and ONNX Runtime's fp32.
        """
        which = {"optimum": "weights", "ditc": "backend"}.get(self.kind)
        return f"{self.kind}-{self.settings[which]}" if which else ""


def _ditc(backend: str, precision: str, decoder: str = "") -> Contestant:
    """ditc. `decoder` is an 8-bit precision of the VAE's decoder, which by itself stays high."""
    settings = {"backend": backend, "precision": precision}
    if not decoder:
        return Contestant(f"ditc {backend} {precision}", "ditc", settings)
    name = f"ditc {backend} {precision}, decoder {decoder}"
    return Contestant(name, "ditc", {**settings, "stage_precision": f"vae_decoder={decoder}"})


def _optimum(name: str, weights: str, hint: str, *, static: bool = True) -> Contestant:
    return Contestant(
        f"optimum-intel {name}", "optimum", {"weights": weights, "hint": hint, "static": static}
    )


# optimum-intel runs with fixed shapes (its `reshape`), which is faster, and once as it is by default. Its INT8 is INT8
# weights, which OpenVINO multiplies with activations that it quantizes at run time.
CONTESTANTS = (
    Contestant(REFERENCE, "diffusers", {"dtype": "float32"}),
    Contestant(BASELINE, "diffusers", {"dtype": "bfloat16"}),
    Contestant("torch.compile bf16", "diffusers", {"dtype": "bfloat16", "compile": True}),
    _optimum("bf16, dynamic shapes", "f32", "bf16", static=False),
    _optimum("f32", "f32", "f32"),
    _optimum("bf16", "f32", "bf16"),
    _optimum("int8 + f32", "int8", "f32"),
    _optimum("int8 + bf16", "int8", "bf16"),
    _ditc("onnxruntime", "fp32"),
    _ditc("onnxruntime", "int8"),
    _ditc("onnxruntime", "int8-dynamic"),
    _ditc("openvino", "fp32"),
    _ditc("openvino", "bf16"),
    _ditc("openvino", "int8"),
    _ditc("openvino", "int8", decoder="int8"),
    _ditc("openvino", "int8-dynamic"),
)
ALL = tuple(c.name for c in CONTESTANTS)
# For cases that take long: those with a chance.
FASTER = tuple(name for name in ALL if not name.endswith((" fp32", " f32")) and "dynamic shapes" not in name)
INT8_DECODER = "ditc openvino int8, decoder int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint to prepare: the demo, or random weights in the widths of a release.

    Attributes:
        transformer: config of the random transformer; None for the checkpoint at `source`.
        calibration: prompts and steps that the ranges of the INT8 builds are measured with.
    """

    name: str
    source: Path | None = None
    transformer: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_encoder: Mapping[str, Any] = field(default_factory=dict)
    calibration: tuple[int, int] = (2, 4)
    pixels_per_cell: int = 32
    latent_channels: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is raced.

    Attributes:
        operations: name -> command of peer_worker.py; "prompt": None is filled with a prompt that is new in each round.
        pixels: side of the square picture.
        contestants: the names of those that take part.
        suffix: what is put after each new prompt.
        compared: how many rounds are compared with the reference, which must draw each of them; None for all.
        warm_up, warm_up_changes: how often each operation runs before the first round, and what is different then.
    """

    name: str
    title: str
    model: Model
    pixels: int
    operations: Mapping[str, Mapping[str, Any]]
    contestants: Sequence[str] = ALL
    suffix: str = ""
    compared: int | None = None
    warm_up: int = 2
    warm_up_changes: Mapping[str, Any] = field(default_factory=dict)


def cases(layers: int, text_layers: int) -> dict[str, Case]:
    """All cases by name, in the order in which they run.

    Args:
        layers: of the transformers whose single step is timed.
        text_layers: of the whole picture's random text encoder, which has the width of Gemma-2-2b.
    """

    def wide(name: str, config: Mapping[str, Any], depth: int, vae: Mapping[str, Any], text: int) -> Model:
        return Model(
            name=f"{name}-{depth}-layers-{text}-of-text",
            transformer={**config, "num_layers": depth, "sample_size": 16},
            vae=vae,
            text_encoder={**GEMMA, "vocab_size": 4096, "num_hidden_layers": text},
        )

    sana_600m = transformer(FULL_DEPTH, 36, 16, qk_norm=False)
    small = wide("sana-0.6b", sana_600m, layers, NARROW_VAE, 1)
    large = wide("sana-1.6b", SANA_1600M, layers, NARROW_VAE, 1)
    decoder = wide("dc-ae", sana_600m, 1, DECODER, 1)
    whole = wide("sana-0.6b", sana_600m, FULL_DEPTH, DECODER, text_layers)
    demo = {"num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": 32}
    wide_call = {"guidance_scale": 4.5, "max_sequence_length": 300}
    step = {"do": "step", "prompt": f"a red heart{IN_DETAIL}", "num_inference_steps": 3, **wide_call}
    rows = [
        Case(
            name="demo",
            title="Demo checkpoint, one picture of 128 px, 20 steps",
            model=Model(name="demo", source=DEMO, calibration=(34, 20), pixels_per_cell=16),
            pixels=128,
            operations={
                "new prompt": {"do": "draw", "prompt": None, **demo},
                "same prompt": {"do": "draw", "prompt": "a red heart, flat style", **demo},
            },
        )
    ]
    for model, title in ((small, "Sana-0.6B"), (large, "Sana-1.6B")):
        for pixels in (512, 1024):
            rows.append(
                Case(
                    name=f"step-{title[-4:].lower()}-{pixels}",
                    title=f"{title}'s width, {layers} layers, {pixels} px: one guided step",
                    model=model,
                    pixels=pixels,
                    operations={"step": step},
                    contestants=[n for n in (ALL if pixels == 512 else FASTER) if n != INT8_DECODER],
                )
            )
    rows += [
        Case(
            name=f"decoder-{pixels}",
            title=f"DC-AE f32c32 decoder, one picture of {pixels} px",
            model=decoder,
            pixels=pixels,
            operations={"decode": {"do": "decode"}},
            contestants=ALL if pixels == 512 else FASTER,
        )
        for pixels in (512, 1024)
    ]
    picture = {"do": "draw", "prompt": None, "num_inference_steps": 20, **wide_call}
    rows.append(
        Case(
            name="picture-0.6b-512",
            title=f"Sana-0.6B, {FULL_DEPTH} layers, 512 px, 20 guided steps: the whole picture",
            model=whole,
            pixels=512,
            operations={"picture": picture},
            suffix=IN_DETAIL,
            # The others would take minutes per round, or have no place in memory beside these.
            contestants=(
                *(BASELINE, "optimum-intel bf16", "optimum-intel int8 + bf16"),
                *("ditc openvino bf16", "ditc openvino int8", INT8_DECODER),
            ),
            compared=1,
            warm_up=1,
            warm_up_changes={"num_inference_steps": 2},
        )
    )
    return {case.name: case for case in rows}
