"""What a long training of linear classifiers leaves after each epoch, so that the same command goes on from there."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.training import sha256_of
from pirl_plugin.weights import read_weights, write_atomically

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True)
class SavedState:
    """One file in the run folder, which counts only for the very same training.

    Attributes:
        path: the file; None keeps nothing.
        facts: all that the training depends on, as JSON.
    """

    path: Path | None
    facts: str

    @classmethod
    def of(cls, context: BenchmarkContext, plan: Any, targets: Tensor) -> SavedState:
        """That of a plan (a dataclass) on the context's weights and images, for any number of processes.

        Args:
            context: weights and images.
            plan: what is trained.
            targets: of the training images, ``(N, ...)``.
        """
        facts = {
            "format": _FORMAT,
            "plan": dataclasses.asdict(plan),
            "weights": context.weights_sha256,
            "trunk": dict(context.trunk_config),
            "images": getattr(context.train, "fingerprint", None),
            "targets": sha256_of(targets),
            "view": dict(context.view),
            "image_size": context.image_size,
            "precision": context.precision,
            "seed": context.seed,
        }
        path = context.run_dir / "linear_state.pt" if context.run_dir is not None else None
        return cls(path, json.dumps(facts, sort_keys=True, default=str))

    def read(self) -> dict[str, Any] | None:
        """``stage``, ``epoch``, ``probes``, ``notes`` and ``unreadable`` as ``write`` left them; None without any.

        All processes get the same, or none gets any.
        """
        found = self._read() if self.path is not None else None
        where = distributed.gather_objects((found["stage"], found["epoch"]) if found is not None else None)
        return found if all(other == where[0] for other in where) else None

    def write(
        self, stage: str, epoch: int, probes: Mapping[str, Any], notes: Mapping[str, Any], unreadable: Iterable[int]
    ) -> None:
        """Replaces the file, whole or not at all; done by the first process."""
        if self.path is None or not distributed.is_primary():
            return
        content = {
            "facts": self.facts,
            "stage": stage,
            "epoch": epoch,
            "probes": dict(probes),
            "notes": dict(notes),
            "unreadable": sorted(unreadable),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(content, self.path)

    def remove(self) -> None:
        """Removes the file of a training that has ended."""
        distributed.barrier()
        if self.path is not None and distributed.is_primary():
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        assert self.path is not None
        if not self.path.is_file():
            return None
        try:
            content = read_weights(self.path)
        except (ValueError, OSError) as error:
            log.warning("%s cannot be read (%s): starting anew.", self.path, error)
            return None
        if content.get("facts") != self.facts:
            log.warning("%s is of other settings, weights, images or labels: starting anew.", self.path)
            return None
        return content
