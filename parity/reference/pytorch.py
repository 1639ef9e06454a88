"""The reference: the same Pipeline as a bundle's, with PyTorch sessions over the adapter's networks.

Everything in it comes from the checkpoint and nothing from the bundle. So if the bundle has a wrong scheduler, text
recipe or latent scale, the two sides differ, instead of sharing the mistake.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ditc.export.build.default_request import golden_table
from ditc.export.checkpoint.controlnet import open_joined
from ditc.export.checkpoint.loras import read_choices, with_loras
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tokenizer import read_tokenizer
from ditc.export.contract import BuildOptions, ModelPlan, StageModule
from ditc.export.families import find_adapter, find_family
from ditc.export.graph.torch_session import TorchSession, compute_device
from ditc.runtime.bundle.integrity import sha256
from ditc.runtime.bundle.manifest import SCHEMA_VERSION, Manifest, Stage
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import ComputeDevice, Session, Tensor
from ditc.runtime.spec import CONDITIONER, CONTROL_CONDITIONER, DENOISER, StageSpec
from ditc.runtime.step_contract import BATCH
from ditc.runtime.text import Tokenizer
from ditc.runtime.text_encoder import TextEncoder

FP32 = BuildOptions()


class LazyTorchSession:
    """A stage in PyTorch that reads its weights on first use and can release them."""

    def __init__(self, model: TorchModel, stage: str) -> None:
        self.spec: StageSpec = model.plan.stages[stage].spec
        self.device: ComputeDevice = compute_device()
        self._model, self._stage = model, stage
        self._session: TorchSession | None = None
        self._loading = threading.Lock()

    @property
    def module(self) -> nn.Module:
        """The network, read from the checkpoint if it is not in memory."""
        return self._load().module

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once."""
        return self._load().run(feeds)

    def close(self) -> None:
        """Release the weights. The next run reads them again."""
        self._session = None

    def _load(self) -> TorchSession:
        with self._loading:
            if self._session is None:
                self._session = TorchSession(self._model.load(self._stage).module, self.spec)
            return self._session


class TorchModel:
    """A checkpoint as a pipeline of PyTorch sessions: the reference in fp32, the precision baseline in 16 bits.

    Args:
        source: a checkpoint that is open is taken as it is; one that is opened here gets the options' ControlNet and
            LoRAs.
        options: as for a build. The precision matters most.
        like: the manifest of the bundle to compare with. Its largest batch and its picture size are used.

    Raises:
        CheckpointError: no adapter knows the checkpoint, or its adapter refuses it.
        UsageError: a LoRA does not fit the checkpoint.

    Attributes:
        original: the checkpoint without LoRAs.
    """

    def __init__(
        self,
        source: str | Path | Checkpoint,
        *,
        options: BuildOptions = FP32,
        like: Manifest | None = None,
    ) -> None:
        if isinstance(source, Checkpoint):
            self.original = self.checkpoint = source
        else:
            self.original = open_joined(source, variant=options.variant, controlnet=options.controlnet)
            self.checkpoint = with_loras(self.original, scaled_loras(self.original, options.loras))
        self.adapter = find_adapter(self.checkpoint)
        self.options = options if like is None else _sized(options, like)
        self.plan: ModelPlan = self.adapter.plan(self.checkpoint, self.options)
        self.precision = self.options.precision
        self.sessions: dict[str, LazyTorchSession] = {
            name: LazyTorchSession(self, name) for name in self.plan.stages
        }
        self.pipeline = self._pipeline()

    def load(self, stage: str) -> StageModule:
        """Read the stage's network and its weights."""
        return self.adapter.load(self.checkpoint, self.plan, stage, self.options)

    def weights_digest(self) -> str:
        """One SHA-256 over the hashes of all weight files of the checkpoint, and its LoRAs with their scales.

        The files are read as streams.
        """
        files = [path for component in self.checkpoint.components.values() for path in component.files]
        loras = [f"{lora.sha256}:{lora.scale!r}" for lora in self.checkpoint.loras]
        return hashlib.sha256("".join([*map(sha256, sorted(files)), *loras]).encode()).hexdigest()

    def close(self) -> None:
        """Release the weights of all stages."""
        for session in self.sessions.values():
            session.close()

    def _pipeline(self) -> Pipeline:
        with tempfile.TemporaryDirectory() as folder:
            encoders = []
            for spec in self.plan.text:
                path = Path(folder) / "tokenizer.json"
                tokenizer = read_tokenizer(self.checkpoint, Path(spec.tokenizer).parent.name)
                path.write_text(tokenizer.json, encoding="utf-8")
                encoders.append(TextEncoder(spec, Tokenizer(path), self.sessions[spec.stage]))
        sessions: dict[str, Session] = dict(self.sessions)
        conditioning = Conditioning(
            encoders,
            sessions[CONDITIONER],
            key="reference",
            control_conditioner=sessions.get(CONTROL_CONDITIONER),
        )
        return Pipeline(self._manifest(), sessions, conditioning, chosen=f"PyTorch {self.precision.value}")

    def _manifest(self) -> Manifest:
        plan = self.plan
        return Manifest(
            schema_version=SCHEMA_VERSION,
            family=plan.family,
            checkpoint=self.checkpoint.path.name,
            stages={name: Stage(artifacts=()) for name in plan.stages},
            text=plan.text,
            scheduler=plan.scheduler,
            latents=plan.latents,
            defaults=plan.defaults,
            guidance=plan.step.guidance,
            golden_table=golden_table(plan),
            files=(),
            tools={},
        )


def scaled_loras(checkpoint: Checkpoint, choices: Sequence[LoraChoice]) -> tuple[ScaledLora, ...]:
    """The LoRAs of the files, under the names of the checkpoint's tensors.

    Raises:
        UsageError: a file is no LoRA, or does not fit the checkpoint.
    """
    return read_choices(choices, checkpoint, find_family(checkpoint).native_names(checkpoint))


def _sized(options: BuildOptions, like: Manifest) -> BuildOptions:
    """The options with the bundle's largest batch, and with its picture size if it has a single one."""
    batch = like.stages[DENOISER].artifacts[0].spec.profile[BATCH].max
    square = like.defaults.height == like.defaults.width and not like.defaults.bins
    return replace(options, max_batch=batch, resolution=like.defaults.height if square else None)
