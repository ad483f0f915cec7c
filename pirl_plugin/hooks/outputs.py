"""What the model gave for the last batch, by name."""

from __future__ import annotations

from classy_vision.tasks import ClassyTask
from torch import Tensor


def output_of(task: ClassyTask, view: str, hook: str) -> Tensor:
    """The last batch's embeddings of one view, without a gradient.

    Args:
        task: what is trained.
        view: name of the embedding.
        hook: registered name of the hook that asks, for the message.

    Raises:
        ValueError: the model gives no such embedding.
    """
    output = task.last_batch.output
    if view not in output:
        raise ValueError(f"hooks: {hook}.view must be an output of the model ({', '.join(output)}), got {view!r}.")
    return output[view].detach()
