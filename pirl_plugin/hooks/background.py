"""Writing beside the training: what is to be written is copied first, then a thread writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
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


class HostCopies:
    """Copies of nested containers on the host, one after another in the same memory.

    Fresh memory has to be found page by page, which takes longer than to copy, and page-locked memory, to which a GPU
    copies several times as fast, is worth its price only when it is used again.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, tree: Any, place: tuple[Any, ...] = ()) -> Any:
        """A copy; it is overwritten by the next one.

        Args:
            tree: dictionaries, lists and tuples of anything; only tensors are copied.
            place: keys that lead to the tree, where it is a part of another.
        """
        if isinstance(tree, Tensor):
            return self._at(place, tree.detach()).copy_(tree.detach())
        if isinstance(tree, dict):
            return {key: self.copy(value, (*place, key)) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self.copy(value, (*place, number)) for number, value in enumerate(tree))
        return tree

    def _at(self, place: tuple[Any, ...], like: Tensor) -> Tensor:
        memory = self._memory.get(place)
        if memory is None or memory.shape != like.shape or memory.dtype != like.dtype:
            memory = torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)
            self._memory[place] = memory
        return memory
