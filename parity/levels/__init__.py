"""The levels of parity, one file per level: `check(context) -> results`. Each level can run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ditc.parity.context import Context
from ditc.parity.levels import graph, module, op, picture, stage, step, trajectory
from ditc.parity.results import Result
from ditc.runtime.tolerances import Level

LEVELS: dict[Level, Callable[[Context], Iterable[Result]]] = {
    Level.GRAPH: graph.check,
    Level.OP: op.check,
    Level.MODULE: module.check,
    Level.STAGE: stage.check,
    Level.STEP: step.check,
    Level.TRAJECTORY: trajectory.check,
    Level.PICTURE: picture.check,
}
