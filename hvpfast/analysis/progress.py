"""A progress bar, where one is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A progress bar around a computation; ``with`` gives the function that moves it by a count.

    Args:
        shown: whether there is a bar.
        total: what it counts up to.
        unit: what it counts.
        initial: what is done already.
        desc: text in front of the bar.
    """

    def __init__(
        self, shown: bool, total: int, unit: str, initial: int = 0, desc: str | None = None
    ) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit=unit, desc=desc)

    def __enter__(self) -> Callable[[int], object]:
        return (lambda count: None) if self._bar is None else self._bar.update

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
