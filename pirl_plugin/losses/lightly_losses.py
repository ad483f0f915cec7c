"""Losses of two views of each image, from lightly: what is here hands them the views, and the batch of all processes.

All of them are of the global batch: several processes with a part of it each have the loss and, once
``DistributedDataParallel`` has averaged them, the gradients of one process with all of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor

from pirl_plugin.distributed import is_distributed
from pirl_plugin.optional import optional
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import NonNegativeFloat, PositiveFloat, checked

Pair = tuple[Tensor, Tensor]


class TwoViewLoss(Configurable, ClassyLoss):
    """Base of the losses that compare two views of each image.

    Args:
        second_view: name of the second view in the model's output, the first being ``image``; null: ``image`` holds
            both, ``(B, 2, D)``.
        scale: factor of the loss.

    Attributes:
        last_statistics: of the last call, 0-dim tensors, for logging: ``positive_similarity``, the mean cosine of an
            image's two views, and ``embedding_std``, the spread of the unit-norm embeddings: 1 where they go in all
            directions, 0 where they are all the same (collapse).
    """

    def __init__(self, second_view: str | None, scale: float) -> None:
        super().__init__()
        self.second_view, self.scale = second_view, scale
        self.last_statistics: dict[str, Tensor] = {}

    @property
    def views(self) -> list[str]:
        """Outputs of the model that enter the loss."""
        return self.outputs()

    def outputs(self, before: str = "", after: str = "") -> list[str]:
        """Names of an output of the two views, such as ``["momentum/image", "momentum/key"]``."""
        views = ["image"] if self.second_view is None else ["image", self.second_view]
        return [f"{before}{view}{after}" for view in views]

    def pair(self, output: Mapping[str, Tensor], before: str = "", after: str = "") -> Pair:
        """The two views' embeddings of one kind, ``(B, D)`` each, float32 at least.

        Raises:
            KeyError: the model did not give them.
            ValueError: an output that is to hold both views does not, or the two differ in shape.
        """
        names = self.outputs(before, after)
        for name in names:
            if name not in output:
                raise KeyError(f"The loss needs the output {name!r}; the model gave {sorted(output)}.")
        found = [output[name] for name in names]
        if self.second_view is None and (found[0].ndim != 3 or found[0].shape[1] != 2):
            raise ValueError(
                f"The output {names[0]!r} must hold two views of each image, (B, 2, D), got {tuple(found[0].shape)}: "
                "use the transform image_views with num_views=2, or set loss.second_view."
            )
        first, second = found[0].unbind(1) if self.second_view is None else found
        if first.ndim != 2 or first.shape != second.shape:
            raise ValueError(
                f"The views must have embeddings (B, D) of the same shape, got {tuple(first.shape)} and "
                f"{tuple(second.shape)}."
            )
        dtype = torch.promote_types(first.dtype, torch.float32)
        return first.to(dtype), second.to(dtype)

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; ``target``, the image ids, is not needed.

        Raises:
            KeyError: the model did not give what the loss compares.
            ValueError: embeddings of another shape.
        """
        with torch.autocast(target.device.type, enabled=False):
            self._keep_statistics(*self.pair(output))
            return self.scale * self.compare(output)

    @abstractmethod
    def compare(self, output: Mapping[str, Tensor]) -> Tensor:
        """The loss, unscaled."""

    @torch.no_grad()
    def _keep_statistics(self, first: Tensor, second: Tensor) -> None:
        first, second = F.normalize(first.detach(), dim=1), F.normalize(second.detach(), dim=1)
        spread = torch.cat([first, second]).var(dim=0, unbiased=False).sum().sqrt()
        self.last_statistics = {
            "positive_similarity": (first * second).sum(dim=1).mean(),
            "embedding_std": spread,
        }


@register_loss("nt_xent")
@checked
class NTXentLoss(TwoViewLoss):
    """SimCLR: cross entropy of the own other view among all other views of the global batch (Chen et al. 2020, Eq. 1).

    Nats, mean over both views of the batch.

    Args:
        temperature: tau, dimensionless.
        second_view: name of the second view; null: ``image`` holds both.
        scale: factor of the loss.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(self, temperature: PositiveFloat = 0.1, second_view: str | None = None, scale: PositiveFloat = 1.0):
        super().__init__(second_view, scale)
        self.of_two = _lightly("nt_xent").NTXentLoss(temperature=temperature, gather_distributed=True)

    def compare(self, output: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        return self.of_two(*(view.contiguous() for view in self.pair(output)))


@register_loss("barlow_twins")
@checked
class BarlowTwinsLoss(TwoViewLoss):
    """Barlow Twins: squared distance of the views' cross-correlation matrix from the identity (Zbontar et al., Eq. 1).

    Batch statistics and correlations are those of the global batch.

    Args:
        lambda_param: weight of the entries off the diagonal.
        second_view: name of the second view; null: ``image`` holds both.
        scale: factor of the loss.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(
        self, lambda_param: NonNegativeFloat = 0.005, second_view: str | None = None, scale: PositiveFloat = 1.0
    ):
        super().__init__(second_view, scale)
        self.of_two = _lightly("barlow_twins").BarlowTwinsLoss(lambda_param=lambda_param)

    def compare(self, output: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        # lightly's own gather_distributed standardises each process's part by itself
        return self.of_two(*(_of_all_processes(view) for view in self.pair(output)))


@register_loss("vicreg")
@checked
class VICRegLoss(TwoViewLoss):
    """VICReg: invariance, variance and covariance terms (Bardes et al. 2022, Eq. 6), the last two of the global batch.

    Args:
        lambda_param: weight of the invariance: mean squared difference of the views.
        mu_param: weight of the variance: how far each dimension's standard deviation stays below 1, the mean of both
            views (the paper's formula has their sum, its code this).
        nu_param: weight of the covariance: squared entries off the diagonal, over the dimensions.
        second_view: name of the second view; null: ``image`` holds both.
        scale: factor of the loss.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(
        self,
        lambda_param: NonNegativeFloat = 25.0,
        mu_param: NonNegativeFloat = 25.0,
        nu_param: NonNegativeFloat = 1.0,
        second_view: str | None = None,
        scale: PositiveFloat = 1.0,
    ):
        super().__init__(second_view, scale)
        self.of_two = _lightly("vicreg").VICRegLoss(
            lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param, gather_distributed=True
        )

    def compare(self, output: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        return self.of_two(*(view.contiguous() for view in self.pair(output)))


@register_loss("simsiam")
@checked
class SimSiamLoss(TwoViewLoss):
    """SimSiam: minus the cosine of each view's prediction and the other view's projection (Chen & He 2021, Eq. 4).

    The mean of both directions. No gradient flows into the projections that are predicted.

    Args:
        second_view: name of the second view; null: ``image`` holds both.
        scale: factor of the loss.

    Raises:
        ImportError: lightly is not installed.
    """

    _name: ClassVar[str] = "simsiam"

    def __init__(self, second_view: str | None = None, scale: PositiveFloat = 1.0):
        super().__init__(second_view, scale)
        self.of_two = _lightly(self._name).NegativeCosineSimilarity()

    @property
    def views(self) -> list[str]:
        """Predictions and projections."""
        return self.outputs(after="/prediction") + self.outputs()

    def compare(self, output: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        return self.mean_of_both(output, self.pair(output))

    def mean_of_both(self, output: Mapping[str, Tensor], targets: Pair) -> Tensor:
        """Mean over both directions of minus the cosine of a view's prediction with the other view's target."""
        first, second = self.pair(output, after="/prediction")
        return (self.of_two(first, targets[1].detach()) + self.of_two(second, targets[0].detach())) / 2


@register_loss("byol")
@checked
class BYOLLoss(SimSiamLoss):
    """BYOL: squared distance of each view's unit-norm prediction from the momentum copy's projection of the other view.

    The sum of both directions, ``2 - 2 cos`` each, between 0 and 8 (Grill et al. 2020, Eq. 2 and after it).

    Args:
        second_view: name of the second view; null: ``image`` holds both.
        scale: factor of the loss; 0.25 gives the gradients of the mean of both directions' cosines.

    Raises:
        ImportError: lightly is not installed.
    """

    _name = "byol"

    @property
    def views(self) -> list[str]:
        """Predictions, and the momentum copy's projections."""
        return self.outputs(after="/prediction") + self.outputs("momentum/")

    def compare(self, output: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        return 4 + 4 * self.mean_of_both(output, self.pair(output, "momentum/"))


def _of_all_processes(embeddings: Tensor) -> Tensor:
    """Every process's rows, in the order of the processes, with gradient."""
    if not is_distributed():
        return embeddings
    return torch.cat(optional("lightly.utils.dist", "methods", "The loss").gather(embeddings.contiguous()))


def _lightly(loss: str) -> Any:
    return optional("lightly.loss", "methods", f"The loss {loss}")
