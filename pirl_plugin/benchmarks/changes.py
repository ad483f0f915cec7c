"""The one rule for all benchmarks by which a number that is not the protocol's shows in the record.

The protocol's name gets a ``*``, and ``extra["changed"]`` says what differs: ``{what: [the protocol's, here]}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pirl_plugin.benchmarks.context import BenchmarkContext

PUBLISHED_SIZE = 224  # pixels: side of the evaluation views of every protocol with published numbers

Changes = dict[str, list[Any]]
"""``{what: [the protocol's, here]}``."""


def changes(pairs: Mapping[str, tuple[Any, Any]]) -> Changes:
    """The pairs ``what: (the protocol's, here)`` that differ, as plain lists.

    >>> changes({"num_epochs": (28, 2), "lr": (0.1, 0.1)})
    {'num_epochs': [28, 2]}
    """
    plain = {what: [_plain(value) for value in pair] for what, pair in pairs.items()}
    return {what: pair for what, pair in plain.items() if pair[0] != pair[1]}


def changed_views(context: BenchmarkContext, view: Mapping[str, Any]) -> Changes:
    """How the images that a run measures on are seen otherwise than its protocol sees them.

    Args:
        context: of the run.
        view: the protocol's at the run's size of image.
    """
    size = (PUBLISHED_SIZE, context.image_size)
    return changes({"image_size": size, "transform": (dict(view), dict(context.view or view))})


def recorded_name(protocol: str, changed: Mapping[str, Any]) -> str:
    """The protocol's name, with a star where anything is changed: such numbers compare with each other only."""
    return f"{protocol}*" if changed else protocol


def noted(changed: Changes) -> dict[str, Any]:
    """What to add to a result's ``extra``."""
    return {"changed": changed} if changed else {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
