"""Runs a stage with a TensorRT or TensorRT-RTX engine.

input      on the host: copied into a buffer that is made once; on the device: read where it is, without a copy
output     in a buffer from a pool, as large as the profiles allow or a half, a quarter ... of that; passed on without
           a copy
workspace  one for all stages of the device, because they run one after the other
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.session import Array, ComputeDevice, Tensor, closed
from ditc.runtime.sessions.buffers import DeviceArray, Lease, Pool, Pools, size_of
from ditc.runtime.sessions.cuda import DLPACK_CPU
from ditc.runtime.sessions.device import ALIGNMENT, Device
from ditc.runtime.sessions.dlpack import Foreign
from ditc.runtime.sessions.engine import Context, Engine, Shape
from ditc.runtime.sessions.loop_graph import Loop, LoopPlan, check_steps, loop_plan
from ditc.runtime.sessions.shapes import check_feeds, choose_profile
from ditc.runtime.spec import DType, StageSpec

log = logging.getLogger(__name__)

# How many loops of several steps keep their buffers and graphs. Each size and number of steps is a loop.
MAX_LOOPS = 8
# The same for single steps, with which a server runs its batches: 4 batch sizes x 2 forms of guidance x 4 sizes of
# pictures. A graph of one step is small. With latents of 1 MiB (16 channels of 128x128) and a history of one step, the
# buffers of one loop take 6 MiB per sample, so those of all take at most 720 MiB with batches of 1, 2, 4 and 8.
MAX_SINGLE_STEPS = 32


class TensorRTSession:
    """One stage that runs as an engine.

    Args:
        engine: a deserialised engine. The session closes it.
        spec: the spec of the stage. The engine must have the same inputs and outputs.
        device: the device, which other stages may share.
        name: the backend's name, for messages.

    Raises:
        SessionError: the engine does not fit the spec, or cannot be run by ditc.
    """

    def __init__(self, engine: Engine, spec: StageSpec, device: Device, *, name: str = "tensorrt") -> None:
        self.spec = spec
        self.device = ComputeDevice(kind="cuda", name=name)
        self._engine, self._device = engine, device
        self._profiles = engine.profiles
        self._dtypes = {binding.name: binding.dtype for binding in engine.bindings}
        self._check_bindings()
        self._contexts: dict[int, Context] = {}
        self._shapes: dict[int, dict[str, Shape]] = {}
        self._workspace_bytes: dict[int, int] = {}  # what each profile's context needs for its current shapes
        self._pools = {name: Pools(device, size) for name, size in self._largest_outputs().items()}
        self._tables: dict[int, Pool] = {}  # by size in bytes: for outputs that a loop keeps from every step
        self._inputs: dict[str, int] = {}  # pointers
        self._written: dict[str, weakref.ref[Any]] = {}  # what each input's buffer holds
        self._loops: OrderedDict[Any, Loop] = OrderedDict()
        self._closed = False
        device.enter()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once. Returns before it has finished; the results are on the device.

        Raises:
            SessionError: an input is missing, or its type or shape does not fit the spec or the engine's profiles.
        """
        given = {name: self._imported(name, feed) for name, feed in feeds.items()}
        check_feeds(self.spec, given)
        with self._device.lock:
            profile = self._choose_profile({name: tuple(feed.shape) for name, feed in given.items()})
            context = self._contexts[profile]
            addresses = {name: self._place(name, feed) for name, feed in given.items()}
            results: dict[str, Tensor] = {}
            for tensor in self.spec.outputs:
                shape = context.shape(tensor.name)
                lease = self._pools[tensor.name].take(size_of(shape, tensor.dtype))
                addresses[tensor.name] = lease.pointer
                results[tensor.name] = self._array(lease, tensor.name, shape)
            with self._details_in_errors():
                for name, pointer in addresses.items():
                    context.set_address(name, pointer)
                if not context.enqueue(self._device.stream):
                    raise SessionError(
                        f"{self.device.name} did not run",
                        hint="run with --backend onnxruntime, or build the engine again on this machine",
                    )
        return results

    def run_loop(
        self,
        feeds: Mapping[str, Tensor],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> dict[str, Tensor]:
        """Run several steps in one launch, as `LoopSession` specifies.

        The second launch with the same shapes captures a CUDA graph, which all later launches replay.
        """
        given = {name: self._imported(name, feed) for name, feed in feeds.items()}
        check_steps(per_step)
        inputs = {**given, **per_step[0]}
        check_feeds(self.spec, inputs)
        with self._device.lock:
            profile = self._choose_profile({name: tuple(feed.shape) for name, feed in inputs.items()})
            loop = self._loop(profile, given, per_step, carry=carry, keep=keep)
            loop.context.set_workspace(*self._device.reserve(loop.workspace_bytes))
            for name in carry.values():
                self._copy_in(loop.start(name), given[name])
            with self._details_in_errors():
                loop.launch(per_step)
            return {tensor.name: self._copy_out(loop, tensor.name) for tensor in self.spec.outputs}

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """A tensor on the device with undefined content. Its memory is freed when nothing holds the tensor any more."""
        with self._device.lock:
            lease = Lease(self._device.allocate(size_of(shape, dtype)))
        weakref.finalize(lease, self._device.free, lease.pointer).atexit = False
        return DeviceArray(self._device, lease, shape, dtype)

    def close(self) -> None:
        """Free the contexts, buffers, graphs and the engine. Tensors that are still held stay valid."""
        with self._device.lock:
            if self._closed:
                return
            self._closed = True
            self._device.synchronize()
            self._close_loops()
            pools: tuple[Pool | Pools, ...] = (*self._pools.values(), *self._tables.values())
            for pool in pools:
                pool.close()
            for pointer in self._inputs.values():
                self._device.free(pointer)
            self._contexts.clear()
            self._engine.close()
            self._device.leave()

    @contextmanager
    def _details_in_errors(self) -> Iterator[None]:
        """Add the stage's name and the library's last error message to errors."""
        try:
            yield
        except SessionError as e:
            raise SessionError(f"{self.spec.name}: {e}: {self._engine.last_error()}", hint=e.hint) from e

    def _check_bindings(self) -> None:
        found = {(b.name, b.dtype, b.is_input) for b in self._engine.bindings}
        wanted = {(t.name, t.dtype, True) for t in self.spec.inputs} | {
            (t.name, t.dtype, False) for t in self.spec.outputs
        }
        if found != wanted:
            differing = ", ".join(f"{name} {dtype.value}" for name, dtype, _ in sorted(found ^ wanted))
            raise SessionError(
                f"{self.spec.name}: the engine and the manifest differ in {differing}",
                hint="the bundle is inconsistent: build it again",
            )
        on_host = [binding.name for binding in self._engine.bindings if binding.on_host]
        if on_host:
            raise SessionError(
                f"{self.spec.name}: the engine reads {', '.join(on_host)} from host memory",
                hint="export the stage so that no shape depends on the values of an input",
            )

    def _largest_outputs(self) -> dict[str, int]:
        """The bytes of each output with the largest shapes of all profiles."""
        sizes = {tensor.name: 0 for tensor in self.spec.outputs}
        for index, profile in enumerate(self._profiles):
            context = self._context(index, {name: range_.max for name, range_ in profile.items()})
            for name in sizes:
                sizes[name] = max(sizes[name], size_of(self._output_shape(context, name), self._dtypes[name]))
        return sizes

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Choose the profile for these shapes, and set its context to the shapes and the workspace."""
        if self._closed:
            raise closed(self.spec)
        profile = choose_profile(self.spec, self._profiles, shapes)
        context = self._context(profile, shapes)
        context.set_workspace(*self._device.reserve(self._workspace_bytes[profile]))
        return profile

    def _context(self, profile: int, shapes: Mapping[str, Shape]) -> Context:
        """The context of a profile, with its shapes set."""
        if profile not in self._contexts:
            self._contexts[profile] = self._engine.context(profile, self._device.stream)
        context, known = self._contexts[profile], self._shapes.setdefault(profile, {})
        changed = {name: shape for name, shape in shapes.items() if known.get(name) != shape}
        for name in changed:
            known.pop(name, None)
        self._set_shapes(context, changed)
        known.update(changed)
        if changed:
            self._workspace_bytes[profile] = context.workspace_bytes()
        return context

    def _set_shapes(self, context: Context, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if not context.set_shape(name, shape):
                raise SessionError(
                    f"{self.spec.name}: the engine refuses {name} {shape}: {self._engine.last_error()}",
                    hint="ask for sizes within the engine's profile, or run with --backend onnxruntime",
                )

    def _output_shape(self, context: Context, name: str) -> Shape:
        shape = context.shape(name)
        if any(size < 0 for size in shape):
            raise SessionError(
                f"{self.spec.name}: the shape of {name} is {shape}: it depends on values of the inputs",
                hint="export the stage so that all sizes follow from the shapes of its inputs",
            )
        return shape

    def _imported(self, name: str, feed: Tensor) -> Any:
        """The input as a numpy array or a DeviceArray. Another library's tensor on our device is not copied."""
        if isinstance(feed, (np.ndarray, DeviceArray)):
            return feed
        if not hasattr(feed, "__dlpack__"):
            return feed.numpy()
        producer: Any = feed
        device, where = self._device, tuple(map(int, producer.__dlpack_device__()))
        if where != device.cuda.dlpack_device:
            try:
                return np.array(np.from_dlpack(producer))
            except (BufferError, RuntimeError, TypeError) as e:  # different libraries raise different ones
                raise SessionError(
                    f"{self.spec.name}: {name}, on DLPack's device {where}, cannot be read: {e}",
                    hint="pass it on the engine's GPU, or as a numpy array (bfloat16 as uint16 bits)",
                ) from e
        foreign = Foreign(feed, device.stream if where[0] != DLPACK_CPU else None)
        lease = Lease(foreign.pointer)
        array = DeviceArray(device, lease, foreign.shape, foreign.dtype)
        # The producer's allocator does not know our stream, so the tensor is kept until the stream is done with it.
        weakref.finalize(lease, device.keep_until_done, foreign).atexit = False
        return array

    def _place(self, name: str, feed: Any) -> int:
        """The address where the engine reads an input: the tensor's own if possible, else the input's buffer."""
        if isinstance(feed, DeviceArray) and feed.device is self._device and feed.pointer % ALIGNMENT == 0:
            return feed.pointer
        return self._write(name, feed)

    def _write(self, name: str, feed: Any) -> int:
        """Copy an input into its buffer, unless the buffer holds it already and it cannot have changed since."""
        if name not in self._inputs:
            largest = max(size_of(p[name].max, self._dtypes[name]) for p in self._profiles)
            self._inputs[name] = self._device.allocate(largest)
        pointer = self._inputs[name]
        last = self._written.pop(name, None)
        if last is None or last() is not feed:
            self._copy_in(pointer, feed)
        if isinstance(feed, DeviceArray) or not feed.flags.writeable:
            self._written[name] = weakref.ref(feed)
        return pointer

    def _copy_in(self, pointer: int, feed: Any) -> None:
        device = self._device
        if isinstance(feed, DeviceArray) and feed.device is device:
            device.cuda.copy(pointer, feed.pointer, feed.size_bytes, device.stream)
        else:
            device.upload(pointer, feed if isinstance(feed, np.ndarray) else feed.numpy())

    def _array(self, lease: Lease, name: str, shape: Shape) -> DeviceArray:
        return DeviceArray(self._device, lease, shape, self._dtypes[name])

    def _loop(
        self,
        profile: int,
        given: Mapping[str, Any],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> Loop:
        context = self._contexts[profile]
        inputs = {n: (tuple(f.shape), self._dtypes[n]) for n, f in {**given, **per_step[0]}.items()}
        outputs = {t.name: (context.shape(t.name), t.dtype) for t in self.spec.outputs}
        plan = loop_plan(inputs, outputs, per_step, carry=carry, keep=keep)
        constants = {
            name: self._write(name, feed) for name, feed in given.items() if name not in carry.values()
        }
        if plan not in self._loops:
            self._make_room(single=plan.count == 1)
            try:
                self._loops[plan] = self._new_loop(profile, plan, constants)
            except SessionError as e:
                if not self._loops:
                    raise
                log.info(
                    "%s: all loops are closed, as there may be no memory for another: %s", self.spec.name, e
                )
                self._close_loops()
                self._loops[plan] = self._new_loop(profile, plan, constants)
        self._loops.move_to_end(plan)
        return self._loops[plan]

    def _new_loop(self, profile: int, plan: LoopPlan, constants: Mapping[str, int]) -> Loop:
        # A graph is replayed with the state of its context, which other shapes would change. So every loop has its own
        # context (TensorRT, best practices, "CUDA Graphs": one execution context for each captured graph).
        own = self._engine.context(profile, self._device.stream)
        self._set_shapes(own, {name: shape for name, shape, _ in plan.inputs})
        return Loop(self._device, own, plan, constants, self._engine.last_error)

    def _close_loops(self) -> None:
        while self._loops:
            self._loops.popitem()[1].close()

    def _make_room(self, *, single: bool) -> None:
        """Close the loops of this kind that were used longest ago, so that one more may be opened."""
        kept = [plan for plan in self._loops if (plan.count == 1) == single]
        for plan in kept[: max(0, len(kept) + 1 - (MAX_SINGLE_STEPS if single else MAX_LOOPS))]:
            self._loops.pop(plan).close()

    def _copy_out(self, loop: Loop, name: str) -> DeviceArray:
        """A copy of a loop's result, because the next launch overwrites the result."""
        pointer, pitch = loop.result(name)
        shape, dtype = next((s, d) for n, s, d in loop.plan.outputs if n == name)
        device, count = self._device, loop.plan.count
        if not pitch:
            lease = self._pools[name].take(size_of(shape, dtype))
            device.cuda.copy(lease.pointer, pointer, size_of(shape, dtype), device.stream)
            return self._array(lease, name, shape)
        size_bytes = pitch * count
        if size_bytes not in self._tables:
            self._tables[size_bytes] = Pool(device, size_bytes)
        lease = self._tables[size_bytes].take()
        device.cuda.copy(lease.pointer, pointer, size_bytes, device.stream)
        return DeviceArray(device, lease, (count, *shape), dtype, pitch=pitch)
