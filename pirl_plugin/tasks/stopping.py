"""What ends a training, or an epoch of it, from within."""

from __future__ import annotations


class StopRequested(Exception):
    """The run was told to stop; its checkpoint is written. ``reason`` names the signal."""

    orderly = True

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RollBack(Exception):
    """A step whose numbers are not finite: the run is to go back to its last checkpoint, and past this step."""

    def __init__(self, step: int, report: str) -> None:
        self.step, self.report = step, report
        super().__init__(report)
