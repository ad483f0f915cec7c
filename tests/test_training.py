"""What the training benchmarks share: batches, parts of datasets, gradients over processes, predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.training import LabelledBatches, Part, augmented_view, average_gradients, predict
from pirl_plugin.data.views import EvalView
from pirl_plugin.registry import build

VIEW = {**augmented_view(4), "image_scale": [1.0, 1.0], "image_ratio": [1.0, 1.0], "flip_probability": 0.0}


class Levels:
    """Image i is a square of grey level 10 * i; an unreadable one gives the next readable one, under its own id."""

    fingerprint = "levels"
    class_names = ("a", "b")

    def __init__(self, size: int, unreadable: tuple[int, ...] = ()) -> None:
        self.size, self.unreadable = size, unreadable
        self.labels = np.arange(size) % 2
        self.multi_labels = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
        while image_id in self.unreadable:
            image_id = (image_id + 1) % self.size
        return Image.new("RGB", (8, 8), (10 * image_id,) * 3), image_id

    def file_name(self, image_id: int) -> str:
        return f"{image_id}.png"


def context(batch_size: int = 4, num_workers: int = 0) -> BenchmarkContext:
    return BenchmarkContext(
        trunk=torch.nn.Identity(),
        train=None,
        test=None,
        transform=EvalView(4, 4),
        batch_size=batch_size,
        num_workers=num_workers,
    )


def levels(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] // 10).tolist()


def test_batches_hold_each_image_once_with_its_own_target():
    batches = LabelledBatches(context(), Levels(10), torch.arange(10) * 7, VIEW, batch_size=3, seed=5)
    assert batches.steps_per_epoch == 3
    first, again, second = ([(levels(x), y.tolist()) for x, y in batches.epoch(epoch)] for epoch in (0, 0, 1))
    assert first == again
    assert first != second
    for epoch in (first, second):
        seen = [level for images, _ in epoch for level in images]
        assert len(set(seen)) == 9
        assert [target for _, targets in epoch for target in targets] == [7 * level for level in seen]


def test_targets_of_rows_that_were_replaced_are_those_of_the_replacement():
    """2 cannot be read, 3 stands in for it: its target must be 3's."""
    targets = torch.eye(4)
    batches = LabelledBatches(context(), Levels(4, unreadable=(2,)), targets, VIEW, batch_size=4)
    ((images, found),) = list(batches.epoch(0))
    assert sorted(levels(images)) == [0, 1, 3, 3]
    assert torch.equal(found, targets[levels(images)])


def test_one_target_for_each_image():
    with pytest.raises(ValueError, match=r"each of the 4 images.*got 3"):
        LabelledBatches(context(), Levels(4), torch.zeros(3), VIEW, 2)


def test_the_augmented_view_crops_and_flips_and_leaves_the_colours():
    """Left half dark, right half bright: what a crop or a flip makes of it holds no third colour but edge mixtures."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = (200, 100, 50)
    view = build("transform", augmented_view(16))
    views = [view(Image.fromarray(pixels), np.random.default_rng(seed))["image"] for seed in range(60)]
    corners = torch.stack([x[:, 0, [0, -1]] for x in views])
    known = (torch.tensor([0, 0, 0]), torch.tensor([200, 100, 50]))
    pure = torch.stack([(corners == colour[None, :, None]).all(dim=1) for colour in known]).any(dim=0)
    assert pure.float().mean() > 0.9
    ratio = torch.stack(views).float()
    torch.testing.assert_close(ratio[:, 0], 2 * ratio[:, 1], atol=2, rtol=0)
    darker_left = corners[:, 0, 0] < corners[:, 0, 1]
    darker_right = corners[:, 0, 0] > corners[:, 0, 1]
    assert min(int(darker_left.sum()), int(darker_right.sum())) > 5


def test_a_part_has_ids_of_its_own_and_never_shows_an_image_from_outside():
    """Of 0..9 the part 8, 4, 1. 4 cannot be read: 1 replaces it, not the whole dataset's 5."""
    part = Part(Levels(10, unreadable=(4,)), np.array([8, 4, 1]))
    found = [(image.getpixel((0, 0))[0] // 10, own) for image, own in (part[i] for i in range(3))]
    assert found == [(8, 0), (1, 2), (1, 2)]
    assert part.labels.tolist() == [0, 0, 1]
    assert part.multi_labels is None
    assert part.class_names == ("a", "b")
    assert part.file_name(1) == "4.png"
    same, other = Part(Levels(10), np.array([8, 4, 1])), Part(Levels(10), np.array([8, 4, 2]))
    assert part.fingerprint == same.fingerprint != other.fingerprint
    with pytest.raises(IndexError, match=r"3 is outside"):
        part[3]
    with pytest.raises(ValueError, match="at least one image"):
        Part(Levels(3), np.array([], dtype=int))
    with pytest.raises(ValueError, match="None of the 2"):
        Part(Levels(4, unreadable=(1, 2)), np.array([1, 2]))[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_predictions_are_of_the_readable_images_in_order(num_workers):
    dataset = Levels(9, unreadable=(3, 8))
    scores, ids = predict(context(num_workers=num_workers), dataset, lambda x: x.float().mean(dim=(2, 3)), "test")
    assert ids.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert scores.tolist() == [[10.0 * i] * 3 for i in ids]


def test_gradients_of_one_process_stay_as_they_are():
    weight = torch.ones(3, requires_grad=True)
    idle = torch.ones(1, requires_grad=True)
    (weight * torch.arange(3)).sum().backward()
    average_gradients([weight, idle])
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 1, 2]
    assert idle.grad is None
