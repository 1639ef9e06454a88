"""Several runs of an engine as one launch: a CUDA graph of the whole loop, results fed back on the device.

    step 0: latents A -> next B     step 1: latents B -> next A     ...     (an output must not alias its input)
    what differs by step (timestep, coefficients, weights, noise) is a table on the device, one row a step;
    what every step leaves behind (stats) is a table too, so that a NaN can be told by its step afterwards.

The addresses are fixed when the loop is captured and the contents written before each launch: a graph serves every
request of its shapes, whatever its prompt, guidance and schedule.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.session import Array
from ditc.runtime.sessions.buffers import size_of
from ditc.runtime.sessions.device import Device, aligned
from ditc.runtime.sessions.engine import Context, Shape
from ditc.runtime.spec import DType

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """What makes two loops the same: equal plans share one graph.

    Attributes:
        count: steps. inputs, outputs: shape and type by name. per_step: inputs that differ by step.
        carry: (output, input) pairs; the output is the next step's input. keep: outputs wanted of every step.
    """

    count: int
    inputs: tuple[tuple[str, Shape, DType], ...]
    outputs: tuple[tuple[str, Shape, DType], ...]
    per_step: tuple[str, ...]
    carry: tuple[tuple[str, str], ...]
    keep: tuple[str, ...]


class Loop:
    """The buffers of one plan, and its graph once captured.

    The first launch runs the steps one by one, the second captures. What cannot be captured goes on being run one by
    one, with the same buffers.
    """

    def __init__(
        self,
        device: Device,
        context: Context,
        plan: LoopPlan,
        constants: Mapping[str, int],
        last_error: Callable[[], str],
    ) -> None:
        self.plan = plan
        self.graph: Any = None
        self.uncapturable = ""  # why, if so
        self.launches = 0
        self.context = context  # nobody else's, its shapes set; the caller sets its workspace before a launch
        self.workspace_bytes = context.workspace_bytes()
        self._last_error = last_error  # of the library
        self._device, self._constants = device, dict(constants)
        sizes = {name: size_of(shape, dtype) for name, shape, dtype in (*plan.inputs, *plan.outputs)}
        self._carried = {inp: out for out, inp in plan.carry}
        self._offsets, self.row_bytes = _row(plan.per_step, sizes)
        self._blocks: list[tuple[int, int]] = []
        self._table = self._allocate(self.row_bytes * plan.count)
        self._slots = {inp: (self._allocate(sizes[inp]), self._allocate(sizes[inp])) for inp in self._carried}
        self._kept = {name: self._allocate(aligned(sizes[name]) * plan.count) for name in plan.keep}
        fed_back = set(self._carried.values())
        self._last = {
            name: self._allocate(sizes[name])
            for name, _, _ in plan.outputs
            if name not in fed_back and name not in plan.keep
        }
        self._sizes = sizes
        self._captured_with = (0, 0)

    def start(self, name: str) -> int:
        """Where the first value of a carried input is to be written."""
        return self._slots[name][0]

    def result(self, name: str) -> tuple[int, int]:
        """Where an output lies after a launch, and the bytes from step to step of one that is kept (else 0)."""
        if name in self._kept:
            return self._kept[name], aligned(self._sizes[name])
        for out, inp in self.plan.carry:
            if out == name:
                return self._slots[inp][self.plan.count % 2], 0
        return self._last[name], 0

    def launch(self, per_step: Sequence[Mapping[str, Array]]) -> None:
        """Write the table and run all steps. Raises SessionError when the engine does not run."""
        device, workspace = self._device, self._device.workspace
        device.upload(self._table, self._packed(per_step))
        if self.graph is not None and self._captured_with != workspace:
            self._drop_graph()
        if self.graph is None and self.launches and not self.uncapturable:
            self._capture()
        if self.graph is not None:
            device.cuda.launch(self.graph, device.stream)
        else:
            self._enqueue_all()
        self.launches += 1

    def close(self) -> None:
        """Free graph and buffers; waits for the stream, which may still use them."""
        self._device.synchronize()
        self._drop_graph()
        while self._blocks:
            self._device.free(*self._blocks.pop())

    def _capture(self) -> None:
        device = self._device
        if not self.context.capturable(device.stream):
            self.uncapturable = "the library says that this engine cannot be captured"
            log.info("no CUDA graph: %s", self.uncapturable)
            return
        # The first enqueue after a change of shapes or workspace updates TensorRT's state and must not be captured
        # (developer guide, "CUDA Graphs"); the workspace may have moved. Step 0 leaves its inputs as they are.
        self._enqueue(0)
        problem = ""
        with _no_finalisers():
            device.cuda.begin_capture(device.stream)
            try:
                self._enqueue_all()
            except SessionError as e:
                problem = f"{e}: {self._last_error()}"
            try:  # in every case: the stream must leave its capturing state
                graph = device.cuda.end_capture(device.stream)
            except SessionError as e:
                problem = problem or str(e)
                graph = None
        if not problem:
            self.graph, self._captured_with = graph, device.workspace
            return
        if graph is not None:
            device.cuda.destroy_graph(graph)
        self.uncapturable = problem
        log.warning("no CUDA graph for %d steps: %s; they run one by one", self.plan.count, problem)

    def _enqueue_all(self) -> None:
        for step in range(self.plan.count):
            self._enqueue(step)

    def _enqueue(self, step: int) -> None:
        context = self.context
        if step == 0:  # what no step changes
            for name, pointer in (*self._constants.items(), *self._last.items()):
                context.set_address(name, pointer)
        for name, offset in self._offsets.items():
            context.set_address(name, self._table + step * self.row_bytes + offset)
        for name, pointer in self._kept.items():
            context.set_address(name, pointer + step * aligned(self._sizes[name]))
        for inp, out in self._carried.items():
            context.set_address(inp, self._slots[inp][step % 2])
            context.set_address(out, self._slots[inp][(step + 1) % 2])
        if not context.enqueue(self._device.stream):
            raise SessionError(f"the engine refused step {step} of {self.plan.count}")

    def _packed(self, per_step: Sequence[Mapping[str, Array]]) -> Array:
        table = np.zeros((self.plan.count, self.row_bytes), np.uint8)
        for name, offset in self._offsets.items():
            column = np.stack([feeds[name] for feeds in per_step])
            table[:, offset : offset + self._sizes[name]] = column.view(np.uint8).reshape(self.plan.count, -1)
        return table

    def _allocate(self, size_bytes: int) -> int:
        pointer = self._device.allocate(size_bytes)
        self._blocks.append((pointer, size_bytes))
        return pointer

    def _drop_graph(self) -> None:
        if self.graph is not None:
            self._device.cuda.destroy_graph(self.graph)
            self.graph = None


@contextmanager
def _no_finalisers() -> Iterator[None]:
    """The garbage collector waits: tensors that it frees free memory or wait for the stream, which breaks a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_steps(per_step: Sequence[Mapping[str, Array]]) -> None:
    """Raises SessionError: no step, or steps that differ in their feeds, shapes or element types."""
    facts = [{name: (feed.shape, feed.dtype) for name, feed in step.items()} for step in per_step]
    if not facts or any(other != facts[0] for other in facts):
        raise SessionError(
            f"a loop of {len(facts)} steps needs the same feeds in every step, and one at least"
        )


def loop_plan(
    inputs: Mapping[str, tuple[Shape, DType]],
    outputs: Mapping[str, tuple[Shape, DType]],
    per_step: Sequence[Mapping[str, Array]],
    *,
    carry: Mapping[str, str],
    keep: Collection[str],
) -> LoopPlan:
    """The plan of a loop.

    Raises:
        SessionError: a result that does not fit where it is fed back.
    """
    for out, inp in carry.items():
        if outputs[out] != inputs[inp]:
            raise SessionError(f"{out} {outputs[out]} cannot be fed back as {inp} {inputs[inp]}")
    return LoopPlan(
        count=len(per_step),
        inputs=tuple((name, *facts) for name, facts in sorted(inputs.items())),
        outputs=tuple((name, *facts) for name, facts in sorted(outputs.items())),
        per_step=tuple(sorted(per_step[0])),
        carry=tuple(sorted(carry.items())),
        keep=tuple(sorted(keep)),
    )


def _row(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each tensor lies in a row of the table, and the row's bytes."""
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += aligned(sizes[name])
    return offsets, end
