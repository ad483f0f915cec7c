"""Examples from devkits with all that real ones have, and the batches made of them."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detection_worlds import devkit, scenes

from pirl_plugin.benchmarks.detection.batches import (
    EvaluationImages,
    TrainingImages,
    loader,
    resized_size,
    scaled_boxes,
)
from pirl_plugin.benchmarks.detection.presets import published
from pirl_plugin.benchmarks.detection.schedule import scaled_to_images
from pirl_plugin.benchmarks.detection.voc import Examples, same_classes
from pirl_plugin.registry import build

SMALL = scaled_to_images(published("paper", "voc07"), 32)
PLAIN = replace(SMALL, flip=0.0, train_min_sizes=(40,), train_max_size=1000)  # the devkits' images are 50 x 40
CELLS = {
    "a": [("RBC", (1, 1, 50, 40), False), ("WBC", (11, 11, 20, 30), True)],
    "b": [("RBC", (7, 7, 7, 7), False), ("RBC", (3, 3, 9, 9), False)],  # the first has no area
    "c": [],
    "d": [("WBC", (5, 8, 5, 8), False)],  # nothing is left of this image
}


def cells(root: Path, split: str = "trainval") -> Examples:
    return Examples(build("dataset", {"name": "voc", "root": devkit(root, CELLS, split), "split": split}))


def test_objects_of_a_devkit_without_class_lists(tmp_path: Path) -> None:
    """VOC's files count pixels from 1 and include both ends: 1..50 is 0..50 from the corner."""
    examples = cells(tmp_path)
    assert examples.class_names == ["RBC", "WBC"]
    np.testing.assert_array_equal(examples[0].boxes, [[0, 0, 50, 40], [10, 10, 20, 30]])
    assert examples[0].labels.tolist() == [0, 1]
    assert examples[0].difficult.tolist() == [False, True]
    assert [example.name for example in examples] == [f"JPEGImages/{name}.jpg" for name in "abcd"]


def test_boxes_without_an_area_are_left_out_and_counted(tmp_path: Path) -> None:
    examples = cells(tmp_path)
    np.testing.assert_array_equal(examples[1].boxes, [[2, 2, 9, 9]])
    assert [example.empty_boxes for example in examples] == [0, 1, 0, 1]
    assert examples.empty_boxes == 2
    assert [len(example.boxes) for example in examples] == [2, 1, 0, 0]


@pytest.mark.real_data
def test_the_two_empty_boxes_of_bccd(real_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data / "bccd_voc.zip") as archive:
        archive.extractall(tmp_path)
    examples = Examples(build("dataset", {"name": "voc", "root": str(tmp_path), "split": "trainval"}))
    assert examples.class_names == ["Platelets", "RBC", "WBC"]
    assert (len(examples), examples.empty_boxes, len(examples.with_objects())) == (292, 2, 292)


def test_images_without_objects_are_not_trained_on(tmp_path: Path) -> None:
    examples = cells(tmp_path)
    assert examples.with_objects() == [0, 1]
    shown = {tuple(TrainingImages(examples, PLAIN, 0)[place].target["boxes"].shape) for place in range(8)}
    assert shown == {(2, 4), (1, 4)}


def test_several_datasets_are_one_after_the_other(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    parts = [build("dataset", {"name": "voc", "root": devkit(root, CELLS), "split": None}) for root in (first, second)]
    both = pickle.loads(pickle.dumps(Examples(*parts)))
    assert len(both) == 8
    assert len({example.name for example in both}) == 8
    image, index = both.image(5)
    assert index == 5
    assert image.size == (50, 40)


def test_an_unreadable_image_is_replaced_with_the_others_objects(tmp_path: Path) -> None:
    root = devkit(tmp_path, CELLS)
    (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    examples = Examples(build("dataset", {"name": "voc", "root": root, "split": "trainval"}))
    assert examples.image(0)[1] == 1
    samples = [TrainingImages(examples, PLAIN, 0)[place] for place in range(2)]
    assert sorted(sample.unreadable for sample in samples) == [False, True]
    for sample in samples:  # both show b with b's object
        assert sample.target["labels"].tolist() == [1]
    tests = EvaluationImages(examples, SMALL)
    assert tests[0].image is None
    assert tests[1].image is not None


def test_what_has_no_boxes_or_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different classes, for example"):
        same_classes((scenes(num_classes=2), scenes(num_classes=3)))
    voc = build("dataset", {"name": "voc", "root": devkit(tmp_path, CELLS), "split": None})
    folder = build("dataset", {"name": "image_folder", "root": str(voc.root / "JPEGImages")})
    with pytest.raises(ValueError, match="named classes: use dataset=voc or generated_scenes"):
        Examples(folder)
    empty = Examples(
        build("dataset", {"name": "voc", "root": devkit(tmp_path / "x", {"c": [], "d": []}), "split": None})
    )
    with pytest.raises(ValueError, match="none of the 2 training images has an object"):
        TrainingImages(empty, SMALL, 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((500, 375), (1067, 800)), ((375, 500), (800, 1067)), ((1000, 200), (1333, 267)), ((3, 3000), (1, 1333))],
)
def test_resizing_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 800, 1333) == expected


def test_boxes_are_scaled_and_cut_at_the_edge() -> None:
    boxes = scaled_boxes(np.array([[-2, 5, 60, 20]], dtype=np.float32), (50, 40), (100, 120))
    np.testing.assert_allclose(boxes, [[0, 15, 100, 60]])


def test_a_flip_takes_the_boxes_along(tmp_path: Path) -> None:
    """What is under each box stays under it: the mirrored picture, and 50 - x."""
    examples = cells(tmp_path)
    plain, flipped = (TrainingImages(examples, replace(PLAIN, flip=flip), 0)[0] for flip in (0.0, 1.0))
    torch.testing.assert_close(flipped.image, plain.image.flip(-1))
    for box, mirrored in zip(plain.target["boxes"].tolist(), flipped.target["boxes"].tolist(), strict=True):
        assert mirrored == pytest.approx([50 - box[2], box[1], 50 - box[0], box[3]])


def test_labels_begin_after_the_background_and_difficult_objects_are_learnt(tmp_path: Path) -> None:
    samples = [TrainingImages(cells(tmp_path), PLAIN, 0)[place] for place in range(2)]
    assert sorted(sample.target["labels"].tolist() for sample in samples) == [[1], [1, 2]]


def test_the_order_is_endless_seeded_and_takes_each_image_once_a_turn() -> None:
    examples = Examples(scenes(7))
    images = TrainingImages(examples, replace(PLAIN, train_min_sizes=(32,)), 3)
    original = {np.array(examples.image(i)[0]).tobytes(): i for i in range(7)}

    def shown(place: int) -> int:
        return original[images[place].image.permute(1, 2, 0).contiguous().numpy().tobytes()]

    turns = [[shown(7 * turn + i) for i in range(7)] for turn in range(3)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert turns[0] != turns[1]
    assert turns[0] == [shown(i) for i in range(7)]
    other = TrainingImages(examples, SMALL, 4)
    assert [other[i].image.shape for i in range(20)] != [
        TrainingImages(examples, SMALL, 3)[i].image.shape for i in range(20)
    ]


def test_all_sizes_and_both_sides_are_drawn() -> None:
    images = TrainingImages(Examples(scenes(3)), SMALL, 0)
    assert {images[place].image.shape[1] for place in range(150)} == set(SMALL.train_min_sizes)
    wide = replace(PLAIN, train_min_sizes=(32,))
    drawn = TrainingImages(Examples(scenes(1)), replace(wide, flip=0.5), 0)
    upright = TrainingImages(Examples(scenes(1)), wide, 0)[0].image
    flips = [not torch.equal(drawn[place].image, upright) for place in range(200)]
    assert 70 < sum(flips) < 130


def test_batches_do_not_depend_on_the_workers() -> None:
    images = TrainingImages(Examples(scenes(4)), SMALL, 0)
    alone, helped = ([batch for batch in loader(images, [[0, 1], [2, 3]], workers)] for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.image, y.image)
            assert torch.equal(x.target["boxes"], y.target["boxes"])


def test_evaluation_images_are_resized_and_know_their_size(tmp_path: Path) -> None:
    sample = EvaluationImages(cells(tmp_path), SMALL)[2]
    assert sample.image is not None
    assert sample.image.shape == (3, 32, 40)
    assert (sample.index, sample.size) == (2, (50, 40))
