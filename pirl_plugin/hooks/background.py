"""Writing beside the training: what is to be written is copied first, then a thread writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class BackgroundWriter:
    """One piece of work at a time in a thread of its own; its errors are raised where the training is."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the previous piece, then begins this one and returns.

        Raises:
            Exception: whatever the previous piece raised.
        """
        self.wait()
        # no daemon: a program that ends for whatever reason still finishes what it was writing
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until everything is written, or for some seconds.

        Raises:
            Exception: whatever the work raised.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        self.raise_error()

    def raise_error(self) -> None:
        """Raises what the work has raised, if it has; costs nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


def host_copy(tree: Any) -> Any:
    """A copy of nested containers, every tensor in memory of its own on the host."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: host_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(host_copy(value) for value in tree)
    return tree
