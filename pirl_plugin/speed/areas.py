"""The areas of ``tools/bench.py`` by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pirl_plugin.speed import bank, checkpoint, loss, negatives, step, svm, views
from pirl_plugin.speed.measuring import Row, Settings, Work


@dataclass(frozen=True)
class Area:
    """One area.

    Attributes:
        about: one line for the help.
        rows: measures, row by row.
        to_profile: sets up the work whose trace is worth seeing, ours alone; None: nothing is.
    """

    about: str
    rows: Callable[[Settings], Iterator[Row]]
    to_profile: Callable[[Settings], Work] | None = None


AREAS: dict[str, Area] = {
    # first: a loader's workers are fresh processes, and a tenth slower where gigabytes were allocated and freed before
    "views": Area("the views of an image, by core and by loader", views.rows, views.to_profile),
    "loss": Area("the loss, forward and backward: time and memory", loss.rows, loss.to_profile),
    "bank": Area("the memory bank: update, start, growth", bank.rows, bank.to_profile),
    "negatives": Area("drawing a step's negatives", negatives.rows, negatives.to_profile),
    "checkpoint": Area("checkpoints: what a step waits for one, and its bytes", checkpoint.rows, checkpoint.to_profile),
    "step": Area("a training step, the start of a run, two processes", step.rows, step.to_profile),
    "svm": Area("the VOC07 SVMs at all costs", svm.rows, svm.to_profile),
}
