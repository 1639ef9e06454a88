"""Which compiled form of a stage serves which shapes: a few forms for fixed shapes, and one for all others.

A form for fixed shapes is faster, but each takes about half a second to compile and holds its own copy of the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Shapes = tuple[tuple[int, ...], ...]
Form = TypeVar("Form")

# A dynamic form is about a tenth slower (1152 channels, 512 px). Compiling another one then costs less than 4 % of
# what it serves, even if two shapes take each other's place for ever.
PAYS_AFTER_RUNS = 200
# All fixed forms of a stage may hold this much in copies of its weights, and there are at most so many.
MOST_BYTES, MOST_FORMS = 2 * 2**30, 8
REMEMBERED = 256


def most_forms(weight_bytes: int) -> int:
    """How many fixed forms a stage with so many bytes of weights may have."""
    return max(1, min(MOST_FORMS, MOST_BYTES // max(1, weight_bytes)))


class CompiledShapes(Generic[Form]):
    """The compiled forms of one stage. Not safe from several threads: the session locks.

    Args:
        compile: makes the form for fixed shapes, or the one for all shapes from None.
        most: how many forms for fixed shapes are kept.
    """

    def __init__(self, compile: Callable[[Shapes | None], Form], most: int) -> None:
        self._compile, self._most = compile, most
        self._fixed: OrderedDict[Shapes, Form] = OrderedDict()  # the one that was used last is at the end
        self._dynamic: Form | None = None
        self._runs: OrderedDict[Shapes, int] = OrderedDict()  # of all shapes that are remembered
        self._waited: dict[Shapes, int] = {}  # runs in the dynamic form

    def find(self, shapes: Shapes) -> Form:
        """The form that runs these shapes, compiled if need be.

        Where there is no room, a form that ran at most once gives way at once, as that of a self-test does. Others give
        way only to shapes that have run often in the dynamic form.
        """
        self._count(shapes)
        if shapes in self._fixed:
            self._fixed.move_to_end(shapes)
            return self._fixed[shapes]
        if len(self._fixed) == self._most and not self._makes_room(shapes):
            self._waited[shapes] = self._waited.get(shapes, 0) + 1
            if self._dynamic is None:
                self._dynamic = self._compile(None)
            return self._dynamic
        self._waited.pop(shapes, None)
        self._fixed[shapes] = self._compile(shapes)
        return self._fixed[shapes]

    def lacks(self, shapes: Shapes) -> bool:
        """Whether these shapes have no form of their own although there is room for it."""
        return shapes not in self._fixed and len(self._fixed) < self._most

    def prepare(self, shapes: Shapes) -> None:
        """Compile the form that `lacks` misses. This does not count as a run."""
        if self.lacks(shapes):
            self._fixed[shapes] = self._compile(shapes)

    def clear(self) -> None:
        """Forget all forms."""
        self._fixed.clear()
        self._dynamic = None

    def _makes_room(self, shapes: Shapes) -> bool:
        oldest = next(iter(self._fixed))
        once = next((known for known in self._fixed if self._runs.get(known, 0) <= 1), None)
        leaves = once or (oldest if self._waited.get(shapes, 0) >= PAYS_AFTER_RUNS else None)
        if leaves is None:
            return False
        del self._fixed[leaves]
        return True

    def _count(self, shapes: Shapes) -> None:
        self._runs[shapes] = self._runs.pop(shapes, 0) + 1
        if len(self._runs) > REMEMBERED:
            forgotten, _ = self._runs.popitem(last=False)
            self._waited.pop(forgotten, None)
