"""A progress bar on stderr for a parity run. Its length is an estimate of the work that the levels will do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ditc.parity.cases import Settings
from ditc.parity.edits import STEPS
from ditc.runtime.console import SafeConsole
from ditc.runtime.tolerances import Level

# Work besides steps, such as loading and the cases of the stage level. An estimate is good enough for a bar.
OTHER_UNITS = 70
SIDES = {Level.STEP: 2, Level.TRAJECTORY: 2, Level.PICTURE: 2, Level.STAGE: 1, Level.MODULE: 1}


@contextmanager
def progress_bar(settings: Settings, levels: Sequence[Level]) -> Iterator[Callable[[str], None]]:
    """Show a bar. Each call of the yielded function counts one unit of work as done; its text describes the work."""
    steps = sum(STEPS if case.edit else settings.num_inference_steps for case in settings.cases)
    total = OTHER_UNITS + steps * max((SIDES.get(level, 0) for level in levels), default=0) * 2
    columns = (TextColumn("{task.description:<48.48}", markup=False), BarColumn(), TimeElapsedColumn())
    console = SafeConsole()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("opening both sides", total=total)

        def tick(text: str) -> None:
            progress.update(task, description=text)
            done = progress.tasks[0].completed
            progress.update(task, completed=min(done + 1, total - 1))

        yield tick
