"""The text rows of a batch, stacked in one tensor per name. The rows of a request are copied once, when it joins.

A row of a large model's conditioning takes 54 to 161 MB, so the rows of requests that stay must not be copied when
others join or leave. A request that joins is written into the gap of one that left, or after the last one. If a gap
remains and the last request has as many rows, that request is moved into it; otherwise the requests after the gap are
rewritten. The order of the rows does not matter to the denoiser, because `row_of` says to which sample each row
belongs.

Where padding has no effect, texts of different lengths share a stack: shorter ones are filled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditc.runtime.errors import UsageError
from ditc.runtime.session import Session, Tensor, assign, empty_like, narrow
from ditc.runtime.state import Rows
from ditc.runtime.step_contract import ROWS


@dataclass(slots=True)
class _Member:
    rows: Rows
    start: int

    @property
    def count(self) -> int:
        return len(self.rows.row_of)

    @property
    def stop(self) -> int:
        return self.start + self.count


class RowStack:
    """The conditioning rows of several requests, in the session's memory.

    Attributes:
        tensors: by name, (R, ...) with R = size. When requests join or leave, they become other objects, so that a
            session that compares objects sees the change.
        size: the number of rows, with those that pad.
    """

    def __init__(self, session: Session) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.size = 0
        self._session = session
        self._members: list[_Member] = []
        self._buffers: dict[str, Tensor] = {}
        self._capacity = 0
        self._filled = 0  # how many rows of the buffers hold anything

    def place(self, wanted: Sequence[Rows], size: int = 0) -> list[int]:
        """Make the stack hold exactly these rows, and return the index at which each of them starts.

        Args:
            size: at least how many rows the tensors have. Those after the wanted ones hold texts of others, or of
                requests that left.

        Raises:
            UsageError: the rows do not fit in one tensor, for example because texts differ in length, or a request is
                given twice.
        """
        wanted = self._of_one_length(wanted)
        known = {member.rows: member for member in self._members}
        changed = len(known) != len(wanted) or any(rows not in known for rows in wanted)
        if changed or self.size != max(size, sum(member.count for member in self._members)):
            try:
                self._change(wanted, size)
            except BaseException:
                self.__init__(self._session)  # type: ignore[misc]  # a half-changed stack must not be kept
                raise
            known = {member.rows: member for member in self._members}
        return [known[rows].start for rows in wanted]

    def _of_one_length(self, wanted: Sequence[Rows]) -> list[Rows]:
        """The rows, all as long as the longest; or as those of the stack, while one of them stays and is not copied."""
        longest = max((rows.text_length for rows in wanted), default=0)
        held = {member.rows for member in self._members}
        length = next((rows.text_length for rows in held), 0)
        if length > longest and any(rows.made_before(length) in held for rows in wanted):
            longest = length
        return [rows.with_length(longest) if rows.text_length else rows for rows in wanted]

    def _change(self, wanted: Sequence[Rows], size: int) -> None:
        unique = dict.fromkeys(wanted)
        if len(unique) != len(wanted):
            raise UsageError("the same request is in the batch twice", hint="step each state once")
        _check_shapes(wanted)
        members = [member for member in self._members if member.rows in unique]
        holes = _holes(members)
        new = [_Member(rows, -1) for rows in unique if all(rows is not m.rows for m in members)]
        for member in new:  # take the gap of a request that left
            hole = next((hole for hole in holes if hole[1] == member.count), None)
            if hole is not None:
                holes.remove(hole)
                member.start = hole[0]
        end = max((m.stop for m in (*members, *new) if m.start >= 0), default=0)
        for member in new:
            if member.start < 0:
                member.start, end = end, end + member.count
        self._grow(members, max(end, size), wanted[0])
        for member in new:
            self._write(member.start, member.rows)
        self._members = sorted((*members, *new), key=lambda m: m.start)
        self._close_gaps()
        self.size = max(self._members[-1].stop, size)
        self._fill()
        self.tensors = {name: narrow(buffer, 0, self.size) for name, buffer in self._buffers.items()}

    def _grow(self, kept: Sequence[_Member], needed: int, example: Rows) -> None:
        """Make room for at least `needed` rows. The rows that are kept stay at their places."""
        if needed <= self._capacity and _fits(self._buffers, example):
            return
        most = self._session.spec.profile[ROWS].max if ROWS in self._session.spec.profile else needed
        capacity = max(needed, min(2 * self._capacity, most)) if kept else needed
        used = max((member.stop for member in kept), default=0)
        if not used:  # free the old memory before the new one is allocated
            self._buffers, self.tensors = {}, {}
        for name, tensor in example.conditioning.items():
            buffer = empty_like(tensor, capacity, name, self._session)
            if used:
                assign(buffer, 0, narrow(self._buffers[name], 0, used))
            self._buffers[name] = buffer
        self._capacity, self._filled = capacity, used

    def _write(self, start: int, rows: Rows) -> None:
        for name, tensor in rows.conditioning.items():
            assign(self._buffers[name], start, tensor)
        self._filled = max(self._filled, start + len(rows.row_of))

    def _fill(self) -> None:
        """Copy the first row to those that pad and hold nothing yet, as new memory may hold NaN."""
        while self._filled < self.size:
            for buffer in self._buffers.values():
                assign(buffer, self._filled, narrow(buffer, 0, 1))
            self._filled += 1

    def _close_gaps(self) -> None:
        """Move the last member into each gap. If its size differs, rewrite all members after the gap instead."""
        while holes := _holes(self._members):
            start, count = holes[0]
            last = self._members[-1]
            if last.count == count:
                for buffer in self._buffers.values():
                    assign(buffer, start, narrow(buffer, last.start, last.stop))
                last.start = start
            else:
                for member in self._members:
                    if member.start > start:
                        member.start, start = start, start + member.count
                        self._write(member.start, member.rows)
            self._members.sort(key=lambda m: m.start)


def _holes(members: Sequence[_Member]) -> list[tuple[int, int]]:
    """(start, count) of the gaps before and between members, which are sorted by their starts."""
    holes, end = [], 0
    for member in members:
        if member.start > end:
            holes.append((end, member.start - end))
        end = member.stop
    return holes


def _fits(buffers: dict[str, Tensor], example: Rows) -> bool:
    return all(
        name in buffers and buffers[name].shape[1:] == tensor.shape[1:]
        for name, tensor in example.conditioning.items()
    )


def _check_shapes(rows: Sequence[Rows]) -> None:
    for name, tensor in rows[0].conditioning.items():
        for index, other in enumerate(rows):
            shape = tuple(other.conditioning[name].shape[1:])
            if shape != tuple(tensor.shape[1:]):
                raise UsageError(
                    f"requests whose {name} differ in size cannot be stepped together: "
                    f"request 0 has {tuple(tensor.shape[1:])} per row, request {index} {shape}",
                    hint="pad their texts to the same number of tokens, or step them in separate batches",
                )
