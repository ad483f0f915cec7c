"""The drawn dataset: the same everywhere, well labelled, and with no shortcut to the class in colours or pixels."""

import pickle

import numpy as np
import pytest
from classy_vision.dataset import build_dataset
from sklearn.neighbors import KNeighborsClassifier

import pirl_plugin.data  # noqa: F401
from pirl_plugin.data.scenes_drawing import SceneObject, _fill, _typical_textures, plan_scene
from pirl_plugin.data.scenes_shapes import SHAPES
from pirl_plugin.schema import ConfigError


def scenes(**arguments: object):
    return build_dataset({"name": "generated_scenes", **arguments})


def pictures(dataset, total: int) -> np.ndarray:
    return np.stack([np.asarray(dataset[image_id][0]) for image_id in range(total)])


def test_images_have_the_size_and_their_id():
    image, image_id = scenes(num_images=10, size=96)[7]
    assert (image.size, image.mode, image_id) == ((96, 96), "RGB", 7)


def test_an_image_depends_on_seed_split_and_id_alone():
    few, many = scenes(num_images=5, cache_in_memory=False), scenes(num_images=500)
    np.testing.assert_array_equal(pictures(few, 5), pictures(many, 5))
    np.testing.assert_array_equal(pictures(few, 5), pictures(pickle.loads(pickle.dumps(many)), 5))
    np.testing.assert_array_equal(few.labels, many.labels[:5])
    for other in ({"seed": 1}, {"split": "test"}, {"split": "val"}):
        changed = scenes(num_images=5, **other)
        differing = (pictures(changed, 5) != pictures(few, 5)).any(axis=3).mean(axis=(1, 2))
        assert (differing > 0.9).all()  # backgrounds are drawn anew, too
        assert changed.fingerprint != scenes(num_images=5).fingerprint
    assert scenes(num_images=5).fingerprint == few.fingerprint == scenes(num_images=5, split="train").fingerprint


def test_no_image_comes_twice_within_or_across_splits():
    everything = [image.tobytes() for split in ("train", "test", "val") for image in pictures(scenes(split=split), 200)]
    assert len(set(everything)) == 600


def test_classes_are_balanced_and_their_order_is_no_pattern():
    labels = scenes(num_images=800).labels
    assert np.bincount(labels).tolist() == [100] * 8
    assert len({tuple(block) for block in labels.reshape(-1, 8)}) > 90
    assert scenes(num_images=83).labels.shape == (83,)
    assert [scenes()._label(image_id) for image_id in range(83)] == labels[:83].tolist()


def test_multi_labels_are_those_of_the_boxes_and_hold_the_label():
    dataset = scenes(num_images=300)
    for image_id in range(300):
        objects = dataset.boxes(image_id)
        assert objects["labels"][0] == dataset.labels[image_id]
        assert not objects["difficult"][0]
        clear = set(objects["labels"][~objects["difficult"]].tolist())
        unclear = set(objects["labels"][objects["difficult"]].tolist()) - clear
        expected = [1 if c in clear else 0 if c in unclear else -1 for c in range(8)]
        assert dataset.multi_labels[image_id].tolist() == expected
    counts = (dataset.multi_labels == 1).sum(axis=1)
    assert set(counts) == {1, 2, 3}
    assert (dataset.multi_labels == 0).any()


def test_boxes_fit_the_pixels_of_the_objects():
    """Each object painted alone, white on black: its pixels reach to the four sides of its box, and not beyond."""
    dataset = scenes(num_images=100)
    for image_id in range(100):
        boxes = dataset.boxes(image_id)["boxes"]
        assert boxes.dtype == np.float32
        for box, item in zip(boxes, dataset._scene(image_id)[0], strict=True):
            canvas = np.zeros((64, 64, 3), dtype=np.float32)
            _fill(canvas, item.outline, np.ones(3, dtype=np.float32))
            rows, columns = np.nonzero(canvas[..., 0] > 0.02)
            reach = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(reach, box, atol=1.8)  # thin tips fade out before they end


def test_pixels_are_covered_by_the_share_that_lies_inside():
    """A square of 8 pixels that begins at 2.53: about half of its first and last columns, up to a sub-pixel (1/4)."""
    corners = np.array([(2.53, 2.1), (10.53, 2.1), (10.53, 10.1), (2.53, 10.1)]) / 16
    canvas = np.zeros((16, 16, 3), dtype=np.float32)
    _fill(canvas, [corners], np.ones(3, dtype=np.float32))
    expected = np.zeros((16, 16))
    expected[2:10, 3:10] = 1
    expected[2:10, [2, 10]] = 0.5
    np.testing.assert_allclose(canvas[..., 0], expected, atol=0.26)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fill_the_unit_circle(name):
    for seed in range(20):
        body = SHAPES[name](np.random.default_rng(seed))[0]
        assert np.linalg.norm(body, axis=1).max() <= 1.35
        assert (np.ptp(body, axis=0) > 0.9).all()
        assert np.abs(body.min(axis=0) + body.max(axis=0)).max() < 0.65


def test_an_object_cut_off_by_the_frame_is_difficult():
    """A square of side 0.2: with 0.14 of its width inside it is whole enough (70%), with 0.1 (50%) it is not."""
    square = np.array([(0, 0), (0.2, 0), (0.2, 0.2), (0, 0.2)])
    inside, half = (SceneObject(0, [square + np.array(corner)]) for corner in ((0.86, 0.5), (0.9, 0.5)))
    assert not inside.difficult
    assert half.difficult
    np.testing.assert_allclose(half.box, [0.9, 0.5, 1.0, 0.7])


def test_the_geometry_of_a_scene_does_not_depend_on_its_class():
    """Where things are must not tell what they are: size of the boxes apart, the distribution is the same."""
    shapes = list(SHAPES.values())[:1] * 2
    centres = [
        [plan_scene(np.random.default_rng(seed), label, shapes)[0].box.reshape(2, 2).mean(axis=0) for seed in range(50)]
        for label in (0, 1)
    ]
    np.testing.assert_array_equal(*centres)


def neighbours(train: np.ndarray, test: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> float:
    flat = [values.reshape(len(values), -1).astype(np.float32) for values in (train, test)]
    return KNeighborsClassifier(20).fit(flat[0], labels).score(flat[1], truth)


def test_colour_and_background_do_not_tell_the_class():
    """Chance is 12.5% +- 1.2% (one standard deviation for 800 images); pixels as they are do better than that."""
    train, test = scenes(num_images=2000), scenes(num_images=800, split="test")
    images, others = pictures(train, 2000), pictures(test, 800)
    truth = (train.labels, test.labels)
    assert neighbours(images.mean(axis=(1, 2)), others.mean(axis=(1, 2)), *truth) < 0.165
    assert neighbours(images[:, :4, ::4], others[:, :4, ::4], *truth) < 0.165
    assert 0.165 < neighbours(images[:, ::4, ::4], others[:, ::4, ::4], *truth) < 0.5


def test_typical_textures_tell_no_two_classes_alike_and_typicality_brings_them_in():
    """At typicality 1 the textures of classes 0 and 2, plain and stripes, show in how rough the top rows are."""
    assert len({_typical_textures(label) for label in range(25)}) == 25
    ratios = []
    for typicality in (0.0, 1.0):
        dataset = scenes(num_images=160, typicality=typicality)
        rows = pictures(dataset, 160)[:, :4].astype(float).mean(axis=(1, 3))  # the mean over rows takes the noise out
        rough = np.abs(np.diff(rows[:, ::2], axis=1)).mean(axis=1)
        plain, striped = (np.median(rough[dataset.labels == label]) for label in (0, 2))
        ratios.append(striped / plain)
    assert ratios[1] > 1.15 * ratios[0]


@pytest.mark.parametrize(
    ("arguments", "path"), [({"size": 4}, "size"), ({"split": "tset"}, "split"), ({"num_classes": 13}, "num_classes")]
)
def test_wrong_arguments(arguments, path):
    with pytest.raises(ConfigError) as caught:
        scenes(**arguments)
    assert [problem.path for problem in caught.value.problems] == [path]
