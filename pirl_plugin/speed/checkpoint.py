"""Checkpoints of a run: how long the step waits for one, and how many bytes it has."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from pirl_plugin.hooks.checkpoint import RunCheckpointHook, checkpoint_folder
from pirl_plugin.speed.measuring import Row, Settings, Work, seconds_of
from pirl_plugin.speed.tasks import running
from pirl_plugin.tasks import SSLPretrainingTask


def rows(settings: Settings) -> Iterator[Row]:
    """Steps with and without a checkpoint, in turns; then what lies in the folder."""
    images = 100_000 if settings.quick else 1_281_167
    with running(settings, images, ["+loss.memory_bank.dtype=bfloat16", "trunk=resnet18"]) as task:
        hook = RunCheckpointHook(every_epochs=None)
        hook.on_start(task)
        with_one, without = _steps(task, hook, settings)
        assert task.run_dir is not None
        size = max(path.stat().st_size for path in checkpoint_folder(task.run_dir).iterdir())
    yield Row(
        f"two steps, R18, n {images:,}, one with a checkpoint", "two steps without", with_one, without, "s",
        with_one / without, None if settings.quick else 1.05, at_most=True,
        detail="copied to the host, written beside the next steps",
    )  # fmt: skip
    weights = 11_176_512 * 4
    yield Row(
        f"bytes of a checkpoint, R18, n {images:,}, bfloat16 bank", "a float32 bank", size, size + images * 128 * 2,
        "bytes", size / 1e6, None if settings.quick else 420, at_most=True,
        detail=f"the ratio is MB; floor: {(images * 128 * 2 + 2 * weights) / 1e6:.0f} MB of rows, weights, momentum",
    )  # fmt: skip


def _steps(task: SSLPretrainingTask, hook: RunCheckpointHook, settings: Settings) -> tuple[float, float]:
    """Median seconds of two steps, the first with a checkpoint and without.

    Two, because the writing goes on beside the second one.
    """

    def saving() -> None:
        task.step()
        hook.every_steps = 1
        hook.on_step(task)
        hook.every_steps = None
        task.step()

    def plain() -> None:
        task.step()
        task.step()

    seconds: dict[str, list[float]] = {"saving": [], "plain": []}
    plain()
    for _ in range(settings.repeats):
        seconds["saving"].append(seconds_of(saving, settings.device))
        hook.finish()
        seconds["plain"].append(seconds_of(plain, settings.device))
    return statistics.median(seconds["saving"]), statistics.median(seconds["plain"])


def to_profile(settings: Settings) -> Work:
    """A step with a checkpoint."""

    def step() -> None:
        with running(settings, 100_000, ["trunk=resnet18"]) as task:
            hook = RunCheckpointHook(every_epochs=None, every_steps=1)
            hook.on_start(task)
            task.step()
            hook.on_step(task)
            hook.finish()

    return step
