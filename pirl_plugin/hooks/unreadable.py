"""Images that could not be read, counted and reported."""

from __future__ import annotations

import logging
from pathlib import Path

from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin.atomic import write_text
from pirl_plugin.distributed import gather_objects, is_primary
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import Fraction, checked
from pirl_plugin.text import printable

log = logging.getLogger(__name__)


class TooManyUnreadableError(ValueError, RuntimeError):
    """More images are unreadable than are tolerated."""


@register_hook("unreadable_images")
@checked
class UnreadableImagesHook(Configurable, ClassyHook):
    """Reports the images that could not be read, after each epoch: in the log and in ``run_dir/unreadable_images.txt``.

    The dataset puts another image in the place of each; the run goes on as long as few are concerned.

    Args:
        tolerated: fraction of the images that may be unreadable.

    Raises:
        TooManyUnreadableError: more are.
    """

    on_start = on_phase_start = on_end = ClassyHook._noop

    def __init__(self, tolerated: Fraction = 0.1) -> None:
        super().__init__()
        self.tolerated = tolerated
        self.state.image_ids = []

    def get_rank_state(self) -> list[int]:
        """The ids that this rank has met."""
        return list(self.state.image_ids)

    def set_rank_states(self, states: list[list[int]]) -> None:
        """Takes up what all ranks had met before the run was interrupted."""
        self.state.image_ids = sorted(set().union(*states))

    def on_step(self, task: ClassyTask) -> None:
        ids = task.last_batch.sample.get("unreadable")  # stays on the CPU, so reading it waits for nothing
        if ids is None or not len(ids) or not task.train:
            return
        self.state.image_ids = sorted({*self.state.image_ids, *ids.tolist()})
        self._raise_if_too_many(task)

    def on_phase_end(self, task: ClassyTask) -> None:
        everywhere: set[int] = set().union(*gather_objects(self.state.image_ids))
        self.state.image_ids = sorted(everywhere)
        if everywhere and is_primary():
            self._report(task)
        self._raise_if_too_many(task)

    def _report(self, task: ClassyTask) -> None:
        dataset = task.datasets["train"].dataset
        lines = [f"{image_id}\t{printable(dataset.file_name(image_id))}" for image_id in self.state.image_ids]
        where = ""
        if getattr(task, "run_dir", None):
            path = Path(task.run_dir) / "unreadable_images.txt"
            write_text("\n".join(lines) + "\n", path)
            where = f" (all of them: {path})"
        message = "%d of %d images could not be read and were replaced by others, such as %s%s."
        log.warning(message, len(lines), len(dataset), lines[0].partition("\t")[2], where)

    def _raise_if_too_many(self, task: ClassyTask) -> None:
        ids, dataset = self.state.image_ids, task.datasets["train"].dataset
        if len(ids) > self.tolerated * len(dataset):
            raise TooManyUnreadableError(
                f"{len(ids)} of {len(dataset)} images could not be read, more than the tolerated fraction "
                f"{self.tolerated}; one of them is {printable(dataset.file_name(ids[0]))}. Repair or remove them, or "
                "raise tolerated of the hook unreadable_images."
            )
