"""Try assignments of formats to a VAE decoder's layers, on the latents that prompts lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ditc.calib.trial import Trial, open_journal, relative_squares, trial_request
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.simulate import quantized
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.metrics import psnr
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import VAE_DECODER

RANKED = 4  # latents that rank the layers; all of them are decoded to judge an assignment


class DecoderTrial(Trial):
    """Latents of a reference run, to be decoded with some layers of the decoder in 8 bits.

    Errors are those of the decoder's own result, in the place of a step's x0 and of the final latents.
    """

    def __init__(
        self, reference: TorchModel, prompts: Sequence[str], *, seed: int, journal: Path | None = None
    ) -> None:
        stage = reference.load(VAE_DECODER)
        self.family = reference.adapter.family
        component = reference.plan.stages[VAE_DECODER].components[0]
        self.network = reference.checkpoint.component(component).class_name
        self.layers = quantizable_layers(stage)
        self.journal = open_journal(journal, reference, VAE_DECODER, prompts, seed)
        self._decoder = TorchSession(stage.module, stage.spec)
        self._input, self._output = stage.spec.inputs[0].name, stage.spec.outputs[0].name
        self._pipeline = reference.pipeline.with_sessions({VAE_DECODER: self._decoder})
        self._plan = self._pipeline.plan(trial_request(reference, prompts, seed))
        self._states = list(self._pipeline.start(self._plan))
        for step in self._pipeline.run(self._states):
            self._states[step.chunk] = step.state
        latents = np.concatenate([to_numpy(state.latents) for state in self._states])[:RANKED]
        self._some = [(one[None], self._decode(one[None])) for one in latents]
        self._drawn = self._pipeline.decode(self._states, self._plan)

    def _step_error(self, plans: Mapping[str, LayerPlan]) -> list[float]:
        with quantized(self.layers, plans):
            squares = [relative_squares(self._decode(one), exact) for one, exact in self._some]
        return [float(np.sqrt(np.mean(squares)))]

    def _fidelity(self, plans: Mapping[str, LayerPlan]) -> list[float]:
        with quantized(self.layers, plans):
            pictures = self._pipeline.decode(self._states, self._plan)
        each = [psnr(a, b) for a, b in zip(pictures, self._drawn, strict=True)]
        rel_l2 = float(np.sqrt(relative_squares(np.stack(pictures), np.stack(self._drawn))))
        return [float(np.mean(each)), float(np.min(each)), rel_l2]

    def _decode(self, latents: Array) -> Array:
        return to_numpy(self._decoder.run({self._input: latents})[self._output])
