"""Semi-supervised classification: everything is fine-tuned on the few labelled images of a large training set."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.changes import changed_views, changes, noted, recorded_name
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import class_labels, number_of_classes
from pirl_plugin.benchmarks.finetuning.recipes import Recipe, changed_numbers, changed_recipe, published_recipe
from pirl_plugin.benchmarks.finetuning.subsets import Ids, balanced_ids, listed_ids, random_ids, write_names
from pirl_plugin.benchmarks.finetuning.training import FineTuning
from pirl_plugin.benchmarks.top_k import top_k_accuracy
from pirl_plugin.benchmarks.training import LabelledBatches, Part, augmented_view, predict
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import NonNegativeFloat, PositiveFloat, PositiveInt, checked

LIST_NAME, STATE_NAME = "labelled_images.txt", "finetuning.pt"

log = logging.getLogger(__name__)


@register_benchmark("semi_supervised")
@checked
class SemiSupervised(Benchmark):
    """Fine-tunes trunk and classifier on a part of the labels, usually 1 % or 10 %: top-1 and top-5 of a single crop.

    The accuracy is that of the last epoch, never of the best one. Training sees random resized crops and flips; batch
    norms train too. The names of the labelled images are written to ``labelled_images.txt`` in the run's folder. A run
    that was interrupted goes on after its last whole epoch when the same command is started again.

    Protocols (epochs, batch size, learning rate of the trunk and of the classifier, schedule; no weight decay):

    * ``paper``: PIRL, random images; 70, 256, 0.01, a tenth from epochs 30 and 60 on. Headline top-5, as in the paper.
    * ``vissl``: balanced; 70, 256, 0.05, a tenth from epoch 30 on. ``vissl_pirl``: 0.01, random, headline top-5.
    * ``simclr``: balanced; 60 (1 %) or 30 (10 %), 4096, 0.8, cosine.
    * ``swav``: balanced; 20, 256, 0.02 and 5 (1 %) or 0.01 and 0.2 (10 %), a fifth from epochs 12 and 16 on.
    * ``barlow_twins``: balanced; 20, 256, 0.002 and 0.5, cosine.

    A star after the name in the records means that something differs, and ``extra.changed`` says what: a number changed
    below, another fraction than 1 or 10 %, another way of sampling, another size of image than 224, another view of the
    test images, or too few images for a batch.

    Args:
        protocol: see above.
        fraction: part of the training images whose labels are used.
        sampling: ``random``, or ``balanced``: the same number of each class. Default: the protocol's.
        list_file: text file with the names of the labelled images, one a line, such as SimCLR's 1percent.txt; replaces
            ``fraction`` and ``sampling``, and passes for any protocol's list.
        num_epochs: default: the protocol's, as all that follows.
        batch_size: of one step, over all processes. Rates given per 256 images (``vissl``, ``simclr``) grow with it.
        trunk_lr: learning rate of the trunk in the first epoch; for ``vissl`` and ``simclr`` per 256 images.
        head_lr: likewise of the classifier.
        milestones: epochs from which the rates are multiplied by the protocol's factor; the protocol's keep their place
            in a run of another length.
        weight_decay: of all weights but batch norms' and biases.
    """

    multi_process: ClassVar[bool] = True

    def __init__(
        self,
        protocol: Literal["paper", "vissl", "vissl_pirl", "simclr", "swav", "barlow_twins"] = "paper",
        fraction: Annotated[float, Interval(gt=0, le=1)] = 0.01,
        sampling: Literal["random", "balanced"] | None = None,
        list_file: str | None = None,
        num_epochs: PositiveInt | None = None,
        batch_size: PositiveInt | None = None,
        trunk_lr: PositiveFloat | None = None,
        head_lr: PositiveFloat | None = None,
        milestones: Sequence[PositiveInt] | None = None,
        weight_decay: NonNegativeFloat | None = None,
    ) -> None:
        self.protocol, self.fraction, self.list_file = protocol, fraction, list_file
        self.sampling = sampling or published_recipe(protocol, fraction).sampling
        self.changes: dict[str, Any] = {
            "num_epochs": num_epochs,
            "batch_size": batch_size,
            "trunk_lr": trunk_lr,
            "head_lr": head_lr,
            "milestones": None if milestones is None else tuple(milestones),
            "weight_decay": weight_decay,
        }
        self.recipe(fraction)  # raises where the changes do not fit the protocol

    def recipe(self, fraction: float) -> Recipe:
        """The numbers of the protocol for a fraction of the labels, with what the configuration changes."""
        return changed_recipe(published_recipe(self.protocol, fraction), **self.changes)

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields top-1 and, for more than five classes, top-5, in percent of the readable test images.

        Raises:
            ValueError: splits without class labels or with different classes, a list that does not fit, a batch that
                the processes cannot share, or a fine-tuning that diverges.
        """
        classes = number_of_classes(context)
        labels = class_labels(context.train, "train")
        ids, unknown = self._labelled(context, labels)
        if context.run_dir is not None and distributed.is_primary():
            write_names(context.train, ids, context.run_dir / LIST_NAME)
        fraction = self.fraction if self.list_file is None else len(ids) / len(labels)
        recipe = fitting_batch(self.recipe(fraction), len(ids), distributed.world_size())
        part = Part(context.train, ids)
        view = augmented_view(context.image_size)
        per_process = recipe.batch_size // distributed.world_size()
        batches = LabelledBatches(context, part, torch.from_numpy(labels[ids]), view, per_process, context.seed)
        training = FineTuning(context, batches, recipe, classes)
        facts = {
            "images": hashlib.sha256(part.fingerprint.encode()).hexdigest(),
            "view": view,
            "seed": context.seed,
            "precision": context.precision,
        }
        network = training.run(context.run_dir / STATE_NAME if context.run_dir is not None else None, facts)
        extra = {
            "num_train": len(ids),
            "classes_without_images": classes - len(np.unique(labels[ids])),
            "listed_but_unknown": len(unknown),
            "recipe": {**vars(recipe), "milestones": list(recipe.milestones)},
            "last_loss": training.losses[-1],
        }
        changed = changed_numbers(recipe, self.protocol, fraction)
        sampling = recipe.sampling if self.list_file is not None else self.sampling
        changed |= changes({"sampling": (recipe.sampling, sampling), "listed_but_unknown": (0, len(unknown))})
        changed |= changed_views(context, self.evaluation_view(context.image_size))
        extra |= noted(changed)
        protocol = recorded_name(self.protocol, changed)
        yield from self._results(context, network, classes, recipe.top, protocol, extra)

    def _labelled(self, context: BenchmarkContext, labels: Ids) -> tuple[Ids, list[str]]:
        """Ids of the images whose labels are used, and the listed names that are no images."""
        if self.list_file is not None:
            names = [context.train.file_name(image_id) for image_id in range(len(context.train))]
            return listed_ids(self.list_file, names)
        if self.sampling == "balanced":
            return balanced_ids(labels, self.fraction, context.seed), []
        return random_ids(len(labels), self.fraction, context.seed), []

    def _results(
        self,
        context: BenchmarkContext,
        network: torch.nn.Module,
        classes: int,
        headline: int,
        protocol: str,
        extra: dict[str, Any],
    ) -> Iterator[Result]:
        def forward(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=context.precision == "bf16"):
                return network(images).float()

        scores, ids = predict(context, context.test, forward, "test")
        right = torch.from_numpy(class_labels(context.test, "test"))[ids]
        more = {"num_test": len(ids), "unreadable_test": len(context.test) - len(ids), "num_classes": classes}
        tops = (1, 5) if classes > 5 else (1,)
        for top in tops:
            yield Result(
                self._setting(),
                f"top{top}",
                top_k_accuracy(scores, right, top),
                protocol,
                headline=top == (headline if headline in tops else 1),
                extra={**extra, **more},
            )

    def _setting(self) -> dict[str, Any]:
        if self.list_file is not None:
            return {"sampling": "list", "list": Path(self.list_file).name}
        return {"fraction": self.fraction, "sampling": self.sampling}


def fitting_batch(recipe: Recipe, num_images: int, processes: int) -> Recipe:
    """The recipe with a batch that the processes can share and the images can fill.

    Raises:
        ValueError: a batch that is no multiple of the processes, or fewer than two images for each of them.
    """
    if recipe.batch_size % processes:
        raise ValueError(f"batch_size={recipe.batch_size} is no multiple of the {processes} processes.")
    batch_size = min(recipe.batch_size, num_images // processes * processes)
    if batch_size < 2 * processes:
        raise ValueError(
            f"{num_images} labelled images and batch_size={recipe.batch_size} are too few for batch norm on "
            f"{processes} process(es): two images on each are the least. Use a larger fraction."
        )
    if batch_size < recipe.batch_size:
        log.info("%d labelled images fill no batch of %d: using %d.", num_images, recipe.batch_size, batch_size)
    return changed_recipe(recipe, batch_size=batch_size)
