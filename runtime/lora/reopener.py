"""Opens the stages of a bundle again, with LoRAs in their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.bundle.private_copy import private_copy
from ditc.runtime.bundle.references import check_references
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.inputs import lora_feeds, why_no_inputs
from ditc.runtime.lora.lora import Change, Lora, ScaledLora, changes_of
from ditc.runtime.lora.lora_file import LoraFile
from ditc.runtime.lora.names import TRANSFORMER, KnownWeights, resolved
from ditc.runtime.lora.stage_weights import StoredWeights, changed_initializers
from ditc.runtime.session import Array, Session
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.opening import open_session
from ditc.runtime.sessions.registry import is_graph, row_of
from ditc.runtime.spec import CONDITIONER, DENOISER, EIGHT_BITS, Precision
from ditc.runtime.weight_map import NativeName, Weight, read_weight_map

FOLD = "build the bundle with the LoRA: ditc build CHECKPOINT -o BUNDLE --lora FILE"
# Where the values of a weight in 8 bits are read before it was quantized, the most exact first.
ORIGINALS = tuple(precision for precision in Precision if precision not in EIGHT_BITS)


@dataclass(frozen=True, slots=True)
class Reopener:
    """Opens stages of a bundle again, with LoRAs in their weights. It holds no session.

    Attributes:
        artifacts: the artifact that each stage runs.
        options: how the bundle was loaded.
        device: the GPU that the bundle's engines share; None without engines.
    """

    bundle: Path
    manifest: Manifest
    artifacts: Mapping[str, Artifact]
    options: LoadOptions
    device: Device | None = None
    _checked: set[str] = field(
        default_factory=set, init=False
    )  # files that were hashed after the bundle was loaded

    def resolved(self, file: LoraFile) -> Lora:
        """The LoRA under the names of the checkpoint's tensors.

        Raises:
            UsageError: it does not fit the bundle.
            BundleError: a weight map is missing or damaged.
        """
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        native: dict[str, NativeName] = {}
        for stage, weights in self._weight_maps().items():
            shapes.setdefault(self.component(stage), {}).update({w.checkpoint: w.shape for w in weights})
            native.update({w.checkpoint: w.native for w in weights if w.native is not None})
        return resolved(file, KnownWeights(shapes, native))

    def stages_of(self, loras: Iterable[ScaledLora]) -> dict[str, dict[str, list[Change]]]:
        """The changes of every stage whose weights change, by the checkpoint's names.

        Raises:
            UsageError: a stage's weights cannot be changed.
            BundleError: a weight map is missing or damaged.
        """
        loras, found = tuple(loras), {}
        for stage, weights in self._weight_maps().items():
            all_changes = changes_of(loras, self.component(stage))
            changes = {
                w.checkpoint: all_changes[w.checkpoint] for w in weights if w.checkpoint in all_changes
            }
            if changes:
                self._check_changeable(stage)
                found[stage] = changes
        return found

    def open(self, stage: str, changes: Mapping[str, Sequence[Change]]) -> Session:
        """A session of the stage with the changes; without any, it is the bundle's.

        Raises:
            SessionError: the library cannot open it. BundleError: a file is damaged.
        """
        artifact = self.artifacts[stage]
        if not self.options.private_copy:
            return self._open(self.bundle, artifact, stage, changes)
        read = (artifact, *self.graphs(stage)) if changes else (artifact,)
        files = {ref.path: ref for one in read for ref in (one.file, *one.data)}
        with private_copy(self.bundle, tuple(files.values())) as folder:
            return self._open(folder, artifact, stage, changes)

    def feeds(
        self, stage: str, session: Session, changes: Mapping[str, Sequence[Change]]
    ) -> dict[str, Array] | None:
        """The inputs with which a session of the bundle's own weights computes with the changes; None without such."""
        return lora_feeds(session, self._weights(stage), changes)

    def why_no_inputs(self, loras: Iterable[ScaledLora]) -> str:
        """Why the LoRAs cannot be inputs of the stages that they change, as the bundle was loaded; "" if they can.

        Raises:
            UsageError, BundleError: as `stages_of`.
        """
        for stage, changes in self.stages_of(loras).items():
            artifact = self.artifacts[stage]
            if why := why_no_inputs(self._weights(stage), changes):
                return why
            row = row_of(artifact.backend)
            if row.takes_loras is None or not row.takes_loras(self.options):
                return f"{row.title} takes no LoRAs as inputs of the {stage} here"
        return ""

    def _open(
        self, folder: Path, artifact: Artifact, stage: str, changes: Mapping[str, Sequence[Change]]
    ) -> Session:
        if not changes:
            return open_session(folder / artifact.file.path, artifact, self.options, self.device)
        graphs = self.graphs(stage)
        if folder == self.bundle:
            self._check(graphs)
        stored = [self._stored(folder, graph) for graph in graphs]
        weights = dict(changed_initializers(stored[0], changes, *stored[1:]))
        return open_session(folder / artifact.file.path, artifact, self.options, self.device, weights=weights)

    def _check(self, graphs: Iterable[Artifact]) -> None:
        """Compare files that were not opened with the bundle with the manifest, each once."""
        new = [graph for graph in graphs if graph not in self.artifacts.values()]
        refs = [ref for graph in new for ref in graph.files if ref.path not in self._checked]
        check_files(self.bundle, refs)
        self._checked.update(ref.path for ref in refs)

    def _stored(self, folder: Path, graph: Artifact) -> StoredWeights:
        check_references(folder / graph.file.path, graph)
        return StoredWeights(folder / graph.file.path, self._map_of(graph))

    def graphs(self, stage: str) -> tuple[Artifact, ...]:
        """The graphs from which the weights of a stage are read: its own, and for one in 8 bits one with more bits."""
        own = self._graph(stage)
        others = [a for a in self.manifest.stages[stage].artifacts if is_graph(a) and a.weights is not None]
        exact = (a for precision in ORIGINALS for a in others if a.precision is precision)
        original = next(exact, None) if own.precision in EIGHT_BITS else None
        return (own,) if original is None else (own, original)

    def _check_changeable(self, stage: str) -> None:
        artifact = self.artifacts[stage]
        row = row_of(artifact.backend)
        if row.open_changed is None:
            raise UsageError(
                f"the {stage} runs in {row.title}, which keeps its weights",
                hint=f"{FOLD}; or run another --backend",
            )
        if row.needs_refit and not artifact.refit:
            raise UsageError(
                f"the {stage} runs in {row.title}, and its engine was built to keep its weights",
                hint=f"build with --refit, or {FOLD}; or run another --backend",
            )

    def component(self, stage: str) -> str:
        """The component of the checkpoint that a stage was made from."""
        return TRANSFORMER if stage in (CONDITIONER, DENOISER) else stage

    def _weight_maps(self) -> dict[str, tuple[Weight, ...]]:
        """The weights of the stages that LoRAs may change: text encoders, the conditioner and the denoiser."""
        stages = (*(spec.stage for spec in self.manifest.text), CONDITIONER, DENOISER)
        return {stage: self._weights(stage) for stage in stages}

    def _weights(self, stage: str) -> tuple[Weight, ...]:
        return self._map_of(self._graph(stage))

    def _map_of(self, graph: Artifact) -> tuple[Weight, ...]:
        if graph.weights is None:
            raise BundleError(
                f"the bundle has no weight map of {graph.file.path}", hint="build the bundle again"
            )
        return read_weight_map(self.bundle / graph.weights.path)

    def _graph(self, stage: str) -> Artifact:
        """The graph that the stage's artifact is or was made from."""
        artifact = self.artifacts[stage]
        graphs = [a for a in (artifact, *self.manifest.stages[stage].artifacts) if is_graph(a)]
        found = next((a for a in graphs if a.precision is artifact.precision), None)
        if found is None:
            raise BundleError(
                f"the bundle has no {artifact.precision.value} graph of the {stage}, from which its weights are read",
                hint="build it again",
            )
        return found
