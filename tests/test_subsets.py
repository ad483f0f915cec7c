"""Which images keep their labels: properties of the samples, and lists of names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pirl_plugin.benchmarks.finetuning.subsets import balanced_ids, listed_ids, random_ids, write_names
from pirl_plugin.data.generated_scenes import GeneratedScenes

LABELS = np.repeat(np.arange(4), (50, 5, 100, 45))[np.random.default_rng(0).permutation(200)]


def counts(ids: np.ndarray, labels: np.ndarray = LABELS) -> list[int]:
    return np.bincount(labels[ids], minlength=labels.max() + 1).tolist()


def is_a_set_of_ids(ids: np.ndarray, total: int = 200) -> bool:
    return ids.dtype == np.int64 and ids.tolist() == sorted(set(ids.tolist())) and 0 <= ids.min() <= ids.max() < total


@pytest.mark.parametrize(("fraction", "number"), [(0.01, 2), (0.1, 20), (0.124, 25), (1.0, 200), (0.001, 1)])
def test_random_takes_the_fraction_whatever_the_classes(fraction, number):
    ids = random_ids(200, fraction, seed=0)
    assert is_a_set_of_ids(ids)
    assert len(ids) == number


def test_random_is_uniform_seeded_and_nested():
    assert random_ids(200, 0.1, 3).tolist() == random_ids(200, 0.1, 3).tolist() != random_ids(200, 0.1, 4).tolist()
    assert set(random_ids(200, 0.1, 3)) < set(random_ids(200, 0.2, 3))
    drawn = np.bincount(np.concatenate([random_ids(10, 0.3, seed) for seed in range(2000)]), minlength=10)
    assert drawn == pytest.approx(np.full(10, 600), abs=100)


def test_balanced_by_hand():
    """Classes of 50, 5, 100 and 45 images. 20 images: 5 each. 60: the class of 5 gives all, 55 are left for three."""
    assert counts(balanced_ids(LABELS, 20 / 200, 0)) == [5, 5, 5, 5]
    sixty = counts(balanced_ids(LABELS, 60 / 200, 0))
    assert sixty[1] == 5
    assert sorted(sixty) == [5, 18, 18, 19]
    assert counts(balanced_ids(LABELS, 1.0, 0)) == [50, 5, 100, 45]


@pytest.mark.parametrize("fraction", [0.005, 0.03, 0.1, 0.13, 0.5, 0.77])
def test_balanced_numbers_differ_by_one_but_for_classes_that_have_no_more(fraction):
    for seed in range(5):
        ids = balanced_ids(LABELS, fraction, seed)
        found = counts(ids)
        assert is_a_set_of_ids(ids)
        assert len(ids) == max(4, round(fraction * 200))
        assert all(
            most - mine <= 1 or mine == whole
            for mine, whole in zip(found, (50, 5, 100, 45), strict=True)
            for most in [max(found)]
        )


def test_every_class_has_an_image_however_small_the_fraction():
    assert counts(balanced_ids(LABELS, 0.001, 0)) == [1, 1, 1, 1]
    gap = np.array([0, 0, 3, 3, 3])  # classes 1 and 2 have no images at all
    assert counts(balanced_ids(gap, 0.01, 0), gap) == [1, 0, 0, 1]


def test_balanced_is_seeded_nested_and_prefers_no_class():
    assert set(balanced_ids(LABELS, 0.05, 1)) < set(balanced_ids(LABELS, 0.3, 1))
    assert balanced_ids(LABELS, 0.1, 1).tolist() != balanced_ids(LABELS, 0.1, 2).tolist()
    extra = np.array([counts(balanced_ids(LABELS, 6 / 200, seed)) for seed in range(1500)]) - 1
    assert set(extra.ravel()) == {0, 1}
    assert extra.sum(axis=0) == pytest.approx(np.full(4, 750), abs=100)  # 2 of 4 classes have one more
    images = np.concatenate([balanced_ids(LABELS, 4 / 200, seed) for seed in range(1500)])
    of_class = np.bincount(images, minlength=200)[LABELS == 1]
    assert of_class == pytest.approx(np.full(5, 300), abs=80)


NAMES = ["train/n01/n01_1.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_1.JPEG", "train/n02/other name.JPEG"]


def listed(folder: Path, text: str, names: list[str] = NAMES) -> tuple[list[int], list[str]]:
    file = folder / "list.txt"
    file.write_text(text, encoding="utf-8")
    ids, unknown = listed_ids(file, names)
    return ids.tolist(), unknown


@pytest.mark.parametrize(
    ("line", "image_id"),
    [
        ("n01_2.JPEG", 1),  # SimCLR's lists
        ("n02/n02_1.JPEG", 2),
        ("train/n01/n01_1.JPEG", 0),
        ("/place/imagenet/train/n01/n01_1.JPEG", 0),
        ("n01\\n01_1.JPEG", 0),
        ("other name.JPEG", 3),
        ("n01_2.JPEG\t17", 1),
    ],
)
def test_a_name_matches_where_the_shorter_is_the_end_of_the_longer(tmp_path, line, image_id):
    assert listed(tmp_path, f"\ufeff{line}\n") == ([image_id], [])


def test_lists_are_sets_and_unknown_names_are_told(tmp_path, caplog):
    found = listed(tmp_path, "n02_1.JPEG\r\n\nn01_1.JPEG\nn02_1.JPEG\nn09_1.JPEG\nn02/n01_1.JPEG\n")
    assert found == ([0, 2], ["n09_1.JPEG", "n02/n01_1.JPEG"])
    assert "2 names" in caplog.text


def test_a_list_that_does_not_fit_gives_examples_of_both(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 1 names.*'cat.png'.*'train/n01/n01_1.JPEG'"):
        listed(tmp_path, "cat.png")
    with pytest.raises(ValueError, match="lists no images"):
        listed(tmp_path, "\n\n")
    with pytest.raises(ValueError, match=r"'1.png' may be 'a/1.png' or 'b/1.png'"):
        listed(tmp_path, "1.png", ["a/1.png", "b/1.png"])
    with pytest.raises(FileNotFoundError, match="no list"):
        listed_ids(tmp_path / "nothing.txt", NAMES)


def test_what_is_written_is_read_again(tmp_path):
    scenes = GeneratedScenes(num_images=30, size=32)
    ids = random_ids(30, 0.3, seed=0)
    write_names(scenes, ids, tmp_path / "new" / "list.txt")
    again, unknown = listed_ids(tmp_path / "new" / "list.txt", [scenes.file_name(i) for i in range(30)])
    assert (again.tolist(), unknown) == (ids.tolist(), [])
