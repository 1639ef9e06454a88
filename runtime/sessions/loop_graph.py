"""Several runs of an engine in one launch: a CUDA graph of the whole loop, with results fed back on the device.

    step 0: latents in buffer A -> next latents in buffer B
    step 1: latents in buffer B -> next latents in buffer A     ...

There are two buffers because an output must not overlap its input. The inputs that differ by step (timestep,
coefficients, guidance weights, noise) are a table on the device with one row per step. The outputs that are wanted from
every step (statistics) are a table too, so that a NaN can be traced to its step after the launch.

A graph contains the addresses of these buffers, and their contents are written before each launch. So one graph serves
all requests with the same shapes, whatever their prompt, guidance and schedule.
"""

from __future__ import annotations

import gc
import logging
import threading
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

_ONE_CAPTURE = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """Everything that the graph of a loop depends on. Loops with equal plans share one graph.

    Attributes:
        count: the number of steps.
        inputs, outputs: name, shape and element type of each.
        per_step: the names of the inputs that differ by step.
        carry: pairs of an output and the input that it becomes in the next step.
        keep: the names of the outputs that are wanted from every step.
    """

    count: int
    inputs: tuple[tuple[str, Shape, DType], ...]
    outputs: tuple[tuple[str, Shape, DType], ...]
    per_step: tuple[str, ...]
    carry: tuple[tuple[str, str], ...]
    keep: tuple[str, ...]


class Loop:
    """The buffers of one plan and, once it is captured, its graph.

    The first launch runs the steps one by one, and the second captures them. If they cannot be captured, all launches
    run them one by one, in the same buffers.

    Args:
        context: an execution context that only this loop uses, with its shapes set. The caller sets its workspace
            before every launch.
        constants: the addresses of the inputs that are the same in all steps.
        last_error: returns the library's last error message.

    Attributes:
        uncapturable: why the loop cannot be captured; "" as long as no reason is known.
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
        self.uncapturable = ""
        self.launches = 0
        self.context = context
        self.workspace_bytes = context.workspace_bytes()
        self._last_error = last_error
        self._device, self._constants = device, dict(constants)
        sizes = {name: size_of(shape, dtype) for name, shape, dtype in (*plan.inputs, *plan.outputs)}
        self._carried = {inp: out for out, inp in plan.carry}
        self._offsets, self.row_bytes = _row(plan.per_step, sizes)
        self._sizes = sizes
        self._blocks: list[int] = []
        try:
            self._allocate_all()
        except BaseException:
            self.close()
            raise
        self._captured_with = (0, 0)

    def start(self, name: str) -> int:
        """The address to which the first value of a carried input must be written."""
        return self._slots[name][0]

    def result(self, name: str) -> tuple[int, int]:
        """The address of an output after a launch, and the bytes from each step to the next (0 if not in `keep`)."""
        if name in self._kept:
            return self._kept[name], aligned(self._sizes[name])
        for out, inp in self.plan.carry:
            if out == name:
                return self._slots[inp][self.plan.count % 2], 0
        return self._last[name], 0

    def launch(self, per_step: Sequence[Mapping[str, Array]]) -> None:
        """Write the table of inputs and run all steps. Raises SessionError if the engine does not run."""
        device, workspace = self._device, self._device.workspace
        device.upload(self._table, self._pack(per_step))
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
        """Free the graph and the buffers, after waiting for the stream, which may still use them."""
        self._device.synchronize()
        self._drop_graph()
        while self._blocks:
            self._device.free(self._blocks.pop())

    def _capture(self) -> None:
        device = self._device
        if not self.context.capturable(device.stream):
            self.uncapturable = "the library says that this engine cannot be captured"
            log.info("no CUDA graph: %s", self.uncapturable)
            return
        # The first enqueue after a change of shapes or workspace updates TensorRT's state and must not be captured
        # (developer guide, "CUDA Graphs"). The workspace may have changed, so one step runs outside of the graph. This
        # is step 0, which does not change its own inputs.
        self._enqueue(0)
        problem = ""
        with _no_garbage_collection():
            device.cuda.begin_capture(device.stream)
            try:
                self._enqueue_all()
            except SessionError as e:
                problem = f"{e}: {self._last_error()}"
            try:  # even after an error, so that the stream stops capturing
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
        log.warning("no CUDA graph for %d steps, so they run one by one: %s", self.plan.count, problem)

    def _enqueue_all(self) -> None:
        for step in range(self.plan.count):
            self._enqueue(step)

    def _enqueue(self, step: int) -> None:
        context = self.context
        if step == 0:  # these addresses are the same in all steps
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
            raise SessionError(
                f"the engine refused step {step} of {self.plan.count}",
                hint="run with --backend onnxruntime, or build the engine again on this machine",
            )

    def _pack(self, per_step: Sequence[Mapping[str, Array]]) -> Array:
        """The table of inputs that differ by step, as bytes: (steps, row_bytes)."""
        table = np.zeros((self.plan.count, self.row_bytes), np.uint8)
        for name, offset in self._offsets.items():
            column = np.stack([feeds[name] for feeds in per_step])
            table[:, offset : offset + self._sizes[name]] = column.view(np.uint8).reshape(self.plan.count, -1)
        return table

    def _allocate_all(self) -> None:
        plan, sizes = self.plan, self._sizes
        self._table = self._allocate(self.row_bytes * plan.count)
        self._slots = {inp: (self._allocate(sizes[inp]), self._allocate(sizes[inp])) for inp in self._carried}
        self._kept = {name: self._allocate(aligned(sizes[name]) * plan.count) for name in plan.keep}
        others = [
            name for name, _, _ in plan.outputs if name not in dict(plan.carry) and name not in plan.keep
        ]
        self._last = {name: self._allocate(sizes[name]) for name in others}

    def _allocate(self, size_bytes: int) -> int:
        pointer = self._device.allocate(size_bytes)
        self._blocks.append(pointer)
        return pointer

    def _drop_graph(self) -> None:
        if self.graph is not None:
            self._device.cuda.destroy_graph(self.graph)
            self.graph = None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn the garbage collector off. It deletes tensors, which may free memory or wait; either breaks a capture.

    The collector is one for all threads, so captures on other devices wait: else the first to end would turn it on.
    """
    with _ONE_CAPTURE:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def check_steps(per_step: Sequence[Mapping[str, Array]]) -> None:
    """Raise SessionError if there is no step, or if steps differ in the names, shapes or element types of inputs."""
    facts = [{name: (feed.shape, feed.dtype) for name, feed in step.items()} for step in per_step]
    if not facts or any(other != facts[0] for other in facts):
        raise SessionError(
            f"a loop has {len(facts)} steps: it needs at least one step, and all steps need the same feeds",
            hint="give every step the same names, shapes and element types",
        )


def loop_plan(
    inputs: Mapping[str, tuple[Shape, DType]],
    outputs: Mapping[str, tuple[Shape, DType]],
    per_step: Sequence[Mapping[str, Array]],
    *,
    carry: Mapping[str, str],
    keep: Collection[str],
) -> LoopPlan:
    """Make the plan of a loop.

    Raises:
        SessionError: an output differs in shape or element type from the input that it is fed back to.
    """
    for out, inp in carry.items():
        if outputs[out] != inputs[inp]:
            raise SessionError(
                f"{out} {outputs[out]} cannot be fed back as {inp} {inputs[inp]}",
                hint="carry an output to an input of its shape and element type",
            )
    return LoopPlan(
        count=len(per_step),
        inputs=tuple((name, *facts) for name, facts in sorted(inputs.items())),
        outputs=tuple((name, *facts) for name, facts in sorted(outputs.items())),
        per_step=tuple(sorted(per_step[0])),
        carry=tuple(sorted(carry.items())),
        keep=tuple(sorted(keep)),
    )


def _row(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """The offset of each tensor in a row of the table, and the size of the row, in bytes."""
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += aligned(sizes[name])
    return offsets, end
