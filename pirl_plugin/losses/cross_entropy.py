"""Cross entropy for pretexts whose answer is a class (jigsaw, rotation), and for labels, the reference with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor

from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PROVIDED, checked


class CrossEntropy(Configurable, ClassyLoss):
    """Base of the losses that compare class scores with one right class each.

    Args:
        view: name of the scores in the model's output.

    Attributes:
        last_statistics: ``accuracy`` of the last call, a 0-dim tensor, for logging.
    """

    def __init__(self, view: str) -> None:
        super().__init__()
        self.view = view
        self.last_statistics: dict[str, Tensor] = {}

    @property
    def views(self) -> list[str]:
        """Views whose scores enter the loss."""
        return [self.view]

    def cross_entropy(self, output: Mapping[str, Tensor], classes: Tensor) -> Tensor:
        """Mean over all scores, in nats.

        Args:
            output: the model's, with scores ``(B, C)`` or ``(B, V, C)`` of the view.
            classes: the right ones, ``(B,)`` or ``(B, V)``.

        Raises:
            KeyError: there are no such scores.
            ValueError: not a class for each of them.
        """
        if self.view not in output:
            raise KeyError(f"The loss needs scores of the view {self.view!r}; the model gave {sorted(output)}.")
        scores = output[self.view]
        if scores.shape[:-1] != classes.shape:
            raise ValueError(
                f"There must be one class for each row of scores, got {tuple(classes.shape)} classes for scores "
                f"{tuple(scores.shape)} of the view {self.view!r}."
            )
        with torch.autocast(scores.device.type, enabled=False):
            scores, classes = scores.flatten(0, -2).float(), classes.flatten()
            self.last_statistics = {"accuracy": (scores.detach().argmax(dim=1) == classes).float().mean()}
            return F.cross_entropy(scores, classes)


@register_loss("pretext_cross_entropy")
@checked
class PretextCrossEntropy(CrossEntropy):
    """Cross entropy of a view's class scores; the class is what the transform put beside the view.

    Args:
        view: name of the scores in the model's output.
        answer: name of the classes there, such as ``rotation`` or ``permutation``.
    """

    def __init__(self, view: str = "image", answer: str = "rotation") -> None:
        super().__init__(view)
        self.answer = answer

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; ``target``, the image ids, is not needed.

        Raises:
            KeyError: scores or answers are not in the output.
        """
        if self.answer not in output:
            raise KeyError(
                f"The loss needs {self.answer!r} beside the views; transform and model gave {sorted(output)}."
            )
        return self.cross_entropy(output, output[self.answer])


@register_loss("supervised_cross_entropy")
@checked
class SupervisedCrossEntropy(CrossEntropy):
    """Cross entropy of a view's class scores with the dataset's labels: what training with labels reaches.

    Args:
        labels: class of each image id, ``(N,)`` int64; the task takes them from the dataset.
        view: name of the scores in the model's output.
    """

    labels: Tensor

    def __init__(self, labels: Annotated[Tensor, PROVIDED], view: str = "image") -> None:
        super().__init__(view)
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch of image ids ``(B,)``; several crops of an image share its label.

        Raises:
            KeyError: no scores of the view.
        """
        classes = self.labels[target]
        scores = output.get(self.view)
        if scores is not None and scores.ndim == 3:
            classes = classes.unsqueeze(1).expand(scores.shape[:2])
        return self.cross_entropy(output, classes)
