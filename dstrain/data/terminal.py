"""A bar on the terminal for work that takes minutes."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Iterable[T], what: str) -> Iterable[T]:
    """The items, counted on the terminal as they are taken; where there is none, nothing is shown."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
