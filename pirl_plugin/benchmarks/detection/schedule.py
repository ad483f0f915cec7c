"""Learning rate over the iterations, and protocols scaled to other batches, lengths and image sizes by stated rules."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from pirl_plugin.benchmarks.changes import Changes, changes
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol, published


def learning_rate(protocol: DetectionProtocol, iteration: int) -> float:
    """Learning rate of an iteration, counted from 0.

    In the warm-up it rises by the same amount each step, from ``warmup_factor`` times the learning rate to the value
    that the schedule has where the warm-up ends; then it is multiplied by ``gamma`` at each drop.
    """

    def dropped(at: int) -> float:
        return protocol.lr * protocol.gamma ** bisect_right(protocol.drops, at)

    if iteration >= protocol.warmup_iterations:
        return dropped(iteration)
    first, last = protocol.warmup_factor * protocol.lr, dropped(protocol.warmup_iterations)
    return first + (last - first) * iteration / protocol.warmup_iterations


def scaled_to_batch(protocol: DetectionProtocol, batch_size: int) -> DetectionProtocol:
    """The protocol for another global batch: as many images in all, at a learning rate that follows the batch.

    With s = ``batch_size`` / the protocol's: learning rate times s; iterations, warm-up and drops divided by s and
    rounded (the linear rule of Goyal et al. 2017, applied as detectron2's ``REFERENCE_WORLD_SIZE`` does). For 2 images
    a step instead of 16, a learning rate of 0.02 becomes 0.0025 and 24,000 iterations 192,000.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1 image a step, got {batch_size}.")
    scale = batch_size / protocol.batch_size
    stretched = _stretched(protocol, round(protocol.iterations / scale), 1 / scale)
    return replace(stretched, batch_size=batch_size, lr=protocol.lr * scale)


def scaled_to_iterations(protocol: DetectionProtocol, iterations: int) -> DetectionProtocol:
    """The protocol made shorter or longer: the drops and the warm-up keep their place as fractions of the whole.

    Batch norm's statistics at the end are taken from no more batches than there were to train on.

    Raises:
        ValueError: ``iterations`` is below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}.")
    stretched = _stretched(protocol, iterations, iterations / protocol.iterations)
    return replace(stretched, precise_bn=min(protocol.precise_bn, iterations))


def scaled_to_images(protocol: DetectionProtocol, min_size: int) -> DetectionProtocol:
    """The protocol for smaller (or larger) images: all lengths in pixels, anchors too, times ``min_size`` / the test's.

    Raises:
        ValueError: ``min_size`` is below 1.
    """
    if min_size < 1:
        raise ValueError(f"min_size must be >= 1 pixel, got {min_size}.")
    scale = min_size / protocol.test_min_size
    return replace(
        protocol,
        train_min_sizes=tuple(dict.fromkeys(max(1, round(size * scale)) for size in protocol.train_min_sizes)),
        train_max_size=round(protocol.train_max_size * scale),
        test_min_size=min_size,
        test_max_size=round(protocol.test_max_size * scale),
        anchor_sizes=tuple(size * scale for size in protocol.anchor_sizes),
    )


def scaled_to_proposals(protocol: DetectionProtocol, proposals: int) -> DetectionProtocol:
    """The protocol with fewer (or more) proposals: ``proposals`` at test after NMS, the other three in proportion.

    Raises:
        ValueError: ``proposals`` is below 1.
    """
    if proposals < 1:
        raise ValueError(f"proposals must be >= 1 of an image, got {proposals}.")
    scale = proposals / protocol.rpn_post_nms_test
    return replace(
        protocol,
        rpn_pre_nms_train=max(1, round(protocol.rpn_pre_nms_train * scale)),
        rpn_post_nms_train=max(1, round(protocol.rpn_post_nms_train * scale)),
        rpn_pre_nms_test=max(1, round(protocol.rpn_pre_nms_test * scale)),
        rpn_post_nms_test=proposals,
    )


def with_overrides(
    protocol: DetectionProtocol,
    batch_size: int | None = None,
    iterations: int | None = None,
    lr: float | None = None,
    min_size: int | None = None,
    anchor_sizes: Sequence[float] | None = None,
    proposals: int | None = None,
    **others: Any,
) -> DetectionProtocol:
    """The protocol with changes in the order of the arguments.

    Null leaves the protocol's number (or the one that the scaling above it gives). A changed protocol has a ``*`` after
    its name, so that its results never pass as the published one's.

    Args:
        protocol: a published one.
        batch_size: see ``scaled_to_batch``.
        iterations: see ``scaled_to_iterations``; what is asked for is what is run, whatever the batch.
        lr: learning rate after the warm-up, instead of what the batch's scaling gives.
        min_size: see ``scaled_to_images``.
        anchor_sizes: instead of what the image's scaling gives, pixels.
        proposals: see ``scaled_to_proposals``.
        **others: any other field of the protocol.
    """
    changed = protocol
    if batch_size is not None:
        changed = scaled_to_batch(changed, batch_size)
    if iterations is not None:
        changed = scaled_to_iterations(changed, iterations)
    if lr is not None:
        changed = replace(changed, lr=lr)
    if min_size is not None:
        changed = scaled_to_images(changed, min_size)
    if anchor_sizes is not None:
        changed = replace(changed, anchor_sizes=tuple(float(size) for size in anchor_sizes))
    if proposals is not None:
        changed = scaled_to_proposals(changed, proposals)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in others.items() if v is not None}
    changed = replace(changed, **given)
    return changed if changed == protocol else replace(changed, name=f"{protocol.name}*")


def changed_numbers(protocol: DetectionProtocol) -> Changes:
    """Every number that differs from the published protocol's."""
    original = published(protocol.name.removesuffix("*"), protocol.train_set)
    pairs = {field.name: (getattr(original, field.name), getattr(protocol, field.name)) for field in fields(protocol)}
    return changes({key: pair for key, pair in pairs.items() if key != "name"})


def _stretched(protocol: DetectionProtocol, iterations: int, factor: float) -> DetectionProtocol:
    return replace(
        protocol,
        iterations=max(1, iterations),
        drops=tuple(round(drop * factor) for drop in protocol.drops),
        warmup_iterations=round(protocol.warmup_iterations * factor),
    )
