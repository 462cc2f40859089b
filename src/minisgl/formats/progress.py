"""The progress bar of loading and converting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(title: str, total: int | None = None, *, enabled: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr that goes away when done; gives `advance(steps, total=None)`, which may tell the total."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not enabled) as bar:
        task = bar.add_task(title, total=total, visible=total is not None)

        def advance(steps: int, total: int | None = None) -> None:
            bar.update(task, advance=steps, total=total)
            bar.update(task, visible=not bar.finished)

        yield advance
