from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from classy_vision.dataset.transforms import build_transform
from PIL import Image
from torchvision import transforms as tv

from pirl_plugin.data import jigsaw_views, views
from pirl_plugin.data.crops import central_crop, crop_resize, draw_crop_box, draw_resized_crop_box
from pirl_plugin.data.jigsaw_views import ImageAndJigsawPatches, JigsawPuzzle
from pirl_plugin.data.multi_views import ImageViews
from pirl_plugin.data.rotation_views import ImageAndRotation, RotatedImage
from pirl_plugin.data.views import EvalView, ImageView
from pirl_plugin.registry import build
from pirl_plugin.schema import ConfigError

PLAIN = {"jitter_probability": 0.0, "photometric_probability": 0.0, "grayscale_probability": 0.0}
ONLY_CROP = {"image_ratio": (1.0, 1.0), **PLAIN}
WHOLE = {"jigsaw_scale": (1.0, 1.0), "image_ratio": (1.0, 1.0)}


def picture(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def coordinates(size: int) -> Image.Image:
    """Channel 0 is y, channel 1 is x."""
    y, x = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([y, x, np.zeros_like(x)], axis=2).astype(np.uint8))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("sizes", "image_shape", "patch_shape"),
    [
        ({}, (3, 224, 224), (9, 3, 64, 64)),
        ({"image_size": 96, "jigsaw_size": 96, "patch_size": 24}, (3, 96, 96), (9, 3, 24, 24)),
        ({"image_size": 64, "jigsaw_size": 66, "patch_size": 20}, (3, 64, 64), (9, 3, 20, 20)),
        ({"image_size": 32, "jigsaw_size": 36, "patch_size": 12}, (3, 32, 32), (9, 3, 12, 12)),
        ({"image_size": 32, "jigsaw_size": 32, "patch_size": 14, "grid": 2}, (3, 32, 32), (4, 3, 14, 14)),
    ],
)
@pytest.mark.parametrize("size", [(500, 375), (32, 32), (7, 5), (1, 1), (300, 4)])
def test_shapes_for_images_of_any_size(sizes, image_shape, patch_shape, size):
    views = ImageAndJigsawPatches(**sizes)(picture(*size), generator())
    assert {name: tuple(view.shape) for name, view in views.items()} == {"image": image_shape, "patches": patch_shape}
    for view in views.values():
        assert view.dtype == torch.uint8
        assert view.is_contiguous()


@pytest.mark.parametrize("patch_flip", ["patch", "crop", "none"])
def test_a_view_is_a_pure_function_of_image_and_generator(patch_flip):
    transform = ImageAndJigsawPatches(image_size=32, jigsaw_size=36, patch_size=10, patch_flip=patch_flip)
    first, again, other = (transform(picture(), generator(seed)) for seed in (1, 1, 2))
    copy = pickle.loads(pickle.dumps(transform))(picture(), generator(1))
    for name in ("image", "patches"):
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], copy[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("same_resize", [True, False])
def test_fast_and_plain_views_agree(same_resize, monkeypatch):
    """All but the resize pixel by pixel; that is rarely off by one level, of which posterize and solarize make more."""
    if same_resize:
        for module in (views, jigsaw_views):
            monkeypatch.setattr(module, "crop_resize", lambda image, box, size, fast: crop_resize(image, box, size))
    sizes = {"image_size": 32, "jigsaw_size": 36, "patch_size": 10}
    fast, plain = ImageAndJigsawPatches(**sizes), ImageAndJigsawPatches(**sizes, fast=False)
    apart = []
    for seed in range(50):
        ours, reference = fast(picture(seed=seed), generator(seed)), plain(picture(seed=seed), generator(seed))
        apart += [(ours[name].int() - reference[name].int()).abs().flatten() for name in ("image", "patches")]
    every = torch.cat(apart).double()
    assert every.mean() <= (0 if same_resize else 0.1)  # grey levels
    assert (every > 0).double().mean() < 0.03


def test_patches_lie_where_the_geometry_says():
    """With a crop that is the whole picture, a pixel's colour is its place: cell by cell, offsets 0 to 2."""
    transform = ImageAndJigsawPatches(
        jigsaw_size=36, patch_size=10, shuffle_patches=False, patch_flip="none", **PLAIN, **WHOLE
    )
    for seed in range(20):
        patches = transform(coordinates(36), generator(seed))["patches"]
        for place, patch in enumerate(patches):
            top, left = patch[0, 0, 0].item(), patch[1, 0, 0].item()
            row, column = divmod(place, 3)
            assert 12 * row <= top <= 12 * row + 2
            assert 12 * column <= left <= 12 * column + 2
            assert patch[0, :, 4].tolist() == list(range(top, top + 10))
            assert patch[1, 4].tolist() == list(range(left, left + 10))


def test_shuffling_permutes_the_patches_and_nothing_else():
    settings = {"jigsaw_size": 36, "patch_size": 10, "patch_flip": "none", **PLAIN, **WHOLE}
    in_order = ImageAndJigsawPatches(**settings, shuffle_patches=False)
    shuffled = ImageAndJigsawPatches(**settings)
    places = np.zeros((9, 9))
    for seed in range(450):
        views, expected = shuffled(coordinates(36), generator(seed)), in_order(coordinates(36), generator(seed))
        order = [int(patch[0, 0, 0]) // 12 * 3 + int(patch[1, 0, 0]) // 12 for patch in views["patches"]]
        assert sorted(order) == list(range(9))
        assert torch.equal(views["patches"], expected["patches"][order])
        places[np.arange(9), order] += 1
    assert ((places - 50) ** 2 / 50).sum() < 104.7  # chi-square, 64 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("patch_flip", "mixed", "share"), [("patch", True, 0.5), ("crop", False, 0.5), ("none", False, 0.0)]
)
def test_where_the_flip_happens(patch_flip, mixed, share):
    """x grows to the right in an unflipped patch; a crop flipped as a whole flips all nine."""
    transform = ImageAndJigsawPatches(jigsaw_size=36, patch_size=10, patch_flip=patch_flip, **PLAIN, **WHOLE)
    flips = []
    for seed in range(200):
        patches = transform(coordinates(36), generator(seed))["patches"].int()
        flips.append((patches[:, 1, 0, 0] > patches[:, 1, 0, -1]).tolist())
    flips = np.array(flips)
    assert (flips.any(axis=1) != flips.all(axis=1)).any() == mixed
    assert flips.mean() == pytest.approx(share, abs=0.12)


def test_every_patch_has_its_own_colours():
    flat = Image.new("RGB", (40, 40), (200, 100, 50))
    transform = ImageAndJigsawPatches(jigsaw_size=36, patch_size=10, grayscale_probability=0.0)
    colours = transform(flat, generator(3))["patches"][:, :, 0, 0]
    assert len({tuple(colour.tolist()) for colour in colours}) >= 8
    plain = ImageAndJigsawPatches(jigsaw_size=36, patch_size=10, patch_photometric=False)
    views = plain(flat, generator(3))
    assert (views["patches"].permute(0, 2, 3, 1) == torch.tensor([200, 100, 50])).all()
    assert not (views["image"].permute(1, 2, 0) == torch.tensor([200, 100, 50])).all()


def test_image_view_alone_is_the_jigsaw_transforms_image():
    both = ImageAndJigsawPatches(image_size=32)(picture(), generator(5))
    assert list(ImageView(image_size=32)(picture(), generator(5))) == ["image"]
    assert torch.equal(ImageView(image_size=32)(picture(), generator(5))["image"], both["image"])


def test_a_rotated_crop_is_cut_after_it_was_turned():
    """Of a crop that is the whole picture, by 0, 90, 180 or 270 degrees anticlockwise, each as often."""
    settings = {"jigsaw_size": 36, "patch_size": 12, "shuffle_patches": False, "patch_flip": "none", **PLAIN, **WHOLE}
    transform, turns = ImageAndJigsawPatches(**settings, rotate_crop=True), []
    pixels = np.asarray(coordinates(36))
    for seed in range(200):
        patches = transform(coordinates(36), generator(seed))["patches"].permute(0, 2, 3, 1).numpy()
        whole = np.vstack([np.hstack(patches[row : row + 3]) for row in (0, 3, 6)])
        turns += [turn for turn in range(4) if np.array_equal(whole, np.rot90(pixels, turn))]
    assert len(turns) == 200
    assert ((np.bincount(turns, minlength=4) - 50) ** 2 / 50).sum() < 16.3  # chi-square, p = 0.001
    without = ImageAndJigsawPatches(**settings)(coordinates(36), generator(0))
    assert torch.equal(
        without["image"], ImageAndJigsawPatches(**settings, rotate_crop=True)(coordinates(36), generator(0))["image"]
    )


def test_several_views_of_one_image():
    views = ImageViews(image_size=32, num_views=3, num_crops=5, crop_size=12)(picture(), generator())
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "image": (3, 3, 32, 32),
        "crops": (5, 3, 12, 12),
    }
    assert len({view.numpy().tobytes() for view in views["image"]}) == 3
    first = ImageView(image_size=32)(picture(), generator())["image"]
    assert torch.equal(views["image"][0], first)
    named = ImageViews(image_size=32, view_names=["image", "key"])(picture(), generator())
    assert list(named) == ["image", "key"]
    assert torch.equal(torch.stack(list(named.values())), views["image"][:2])
    assert list(ImageViews(image_size=32)(picture(), generator())) == ["image"]


def test_small_crops_show_small_parts():
    """A pixel's colour is its place: the largest distance inside a crop bounds its area."""
    transform = ImageViews(
        image_size=32, num_crops=2, crop_size=12, crop_scale=(0.05, 0.1), image_ratio=(1, 1), **PLAIN
    )
    for seed in range(20):
        crops = transform(coordinates(100), generator(seed))["crops"].int()
        extent = crops[:, :2].amax(dim=(2, 3)) - crops[:, :2].amin(dim=(2, 3))
        assert (extent <= 32).all()  # sqrt(0.1) of 100 pixels
        assert (extent >= 17).all()  # sqrt(0.05) of 100, less what the filter takes


def test_the_second_view_can_differ():
    """White stays white but for solarisation, which comes at the second view alone."""
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    settings = {**PLAIN, "second_view": {"solarize_probability": 1.0, "grayscale_probability": 0.0}}
    views = build("transform", {"name": "image_views", "image_size": 16, "num_views": 3, **settings})(
        white, generator()
    )
    assert [view.float().mean().item() for view in views["image"]] == [255, 0, 255]


# -- rotation ----------------------------------------------------------------------------------------------------------


def test_a_rotated_view_says_how_it_was_turned():
    """Of a crop that is the whole picture: pixels and answer go together, and all four come as often."""
    transform, pixels = (
        RotatedImage(image_size=36, image_scale=(1, 1), flip_probability=0, **ONLY_CROP),
        coordinates(36),
    )
    answers = []
    for seed in range(200):
        views = transform(pixels, generator(seed))
        answers.append(views["rotation"].item())
        expected = np.rot90(np.asarray(pixels), answers[-1]).transpose(2, 0, 1)
        np.testing.assert_array_equal(views["image"].numpy(), expected)
    assert ((np.bincount(answers, minlength=4) - 50) ** 2 / 50).sum() < 16.3  # chi-square, p = 0.001


def test_all_rotations_are_of_one_crop():
    views = RotatedImage(image_size=16, rotations="all")(picture(), generator())
    assert views["rotation"].tolist() == [0, 1, 2, 3]
    for turns, view in enumerate(views["image"]):
        assert torch.equal(view.rot90(-turns, dims=(1, 2)), views["image"][0])
    assert torch.equal(views["image"][0], ImageView(image_size=16)(picture(), generator())["image"])


def test_image_and_rotation_are_independent_crops():
    """Turned back, the second is what a second draw of the image view gives."""
    transform = ImageAndRotation(image_size=16)
    for seed in range(8):
        views, rng = transform(picture(), generator(seed)), generator(seed)
        first, second = (transform.image_view(picture(), rng)["image"] for _ in range(2))
        assert torch.equal(views["image"], first)
        assert torch.equal(views["rotated"].rot90(-views["rotation"].item(), dims=(1, 2)), second)
        assert not torch.equal(first, second)


# -- the puzzle --------------------------------------------------------------------------------------------------------

PUZZLE = {"num_permutations": 20, "jigsaw_size": 36, "patch_size": 10}


@pytest.mark.parametrize("colours_of", ["crop", "patch"])
def test_a_puzzle_says_in_which_order_its_patches_are(colours_of):
    """With a crop that is the whole picture, a pixel's colour is its place."""
    settings = {**PUZZLE, "colours_of": colours_of, "resize": 36, "flip_probability": 0.0, **PLAIN}
    transform, seen = JigsawPuzzle(**settings), set()
    for seed in range(200):
        views = transform(coordinates(36), generator(seed))
        order = [int(patch[0, 0, 0]) // 12 * 3 + int(patch[1, 0, 0]) // 12 for patch in views["patches"]]
        assert order == transform.permutations[views["permutation"]].tolist()
        seen.add(views["permutation"].item())
    assert seen == set(range(20))
    assert views["patches"].shape == (9, 3, 10, 10)


def test_colours_of_the_crop_or_of_each_patch():
    flat = Image.new("RGB", (40, 40), (200, 100, 50))
    settings = {**PUZZLE, "resize": 40, "grayscale_probability": 0.0}
    whole = JigsawPuzzle(**settings)(flat, generator(3))["patches"]
    assert (whole == whole[0, :, :1, :1]).all()
    each = JigsawPuzzle(**settings, colours_of="patch")(flat, generator(3))["patches"][:, :, 0, 0]
    assert len({tuple(colour.tolist()) for colour in each}) >= 8


def test_resize_and_random_crop_have_torchvisions_distribution():
    """Of a 200 x 100 picture resized to 50: a crop of 40 there is one of 80 here, from 0..120 and 0..20."""
    rng = generator()
    boxes = np.array([draw_resized_crop_box(200, 100, 50, 40, rng) for _ in range(4000)])
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], 80)
    for values, largest in ((boxes[:, 0], 120), (boxes[:, 1], 20)):
        assert values.min() >= 0
        assert values.max() <= largest
        assert np.abs(np.sort(values) - np.linspace(0, largest, 4000)).max() < 1.95 * largest / np.sqrt(4000)
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.06


def test_a_puzzle_from_a_random_resized_crop():
    """sqrt(0.25) of 100 pixels: the patches cover places that are at most 50 apart."""
    settings = {**PUZZLE, "jigsaw_scale": (0.25, 0.25), "jigsaw_ratio": (1.0, 1.0), "flip_probability": 0.0, **PLAIN}
    for seed in range(10):
        patches = JigsawPuzzle(**settings)(coordinates(100), generator(seed))["patches"].int()
        extent = patches[:, :2].amax(dim=(0, 2, 3)) - patches[:, :2].amin(dim=(0, 2, 3))
        assert (extent <= 50).all()
        assert (extent > 40).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jigsaw_size": 300}, "jigsaw_size must be <= resize = 256, got 300"),
        ({"patch_size": 86}, "patch_size must be <="),
        ({"num_permutations": 25, "grid": 2}, "24 orders, 25 were asked for"),
        ({"grid": 4, "patch_size": 20}, r"num_patches must be in 1\.\.9"),
        ({"permutation_rule": "max_mean"}, "permutation_rule"),
    ],
)
def test_bad_puzzles_are_refused(settings, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        build("transform", {"name": "jigsaw_puzzle", **settings})


def test_without_a_generator_torchs_seed_decides():
    transform = ImageView(image_size=32)
    torch.manual_seed(1)
    first = transform(picture())["image"]
    second = transform(picture())["image"]
    torch.manual_seed(1)
    assert torch.equal(transform(picture())["image"], first)
    assert not torch.equal(first, second)


def test_greyscale_pictures_are_taken_as_colour():
    assert ImageView(image_size=32, **PLAIN)(picture().convert("L"), generator())["image"].unique(dim=0).shape[0] == 1


def test_crop_boxes_have_torchvisions_distribution():
    torch.manual_seed(0)
    size, scale, ratio = (500, 375), (0.2, 1.0), (3 / 4, 4 / 3)
    rng = generator()
    ours = np.array([draw_crop_box(*size, scale, ratio, rng) for _ in range(4000)])
    tensor = torch.zeros(3, size[1], size[0])
    theirs = np.array([tv.RandomResizedCrop.get_params(tensor, scale, ratio) for _ in range(4000)])  # top, left, h, w
    theirs = np.stack([theirs[:, 1], theirs[:, 0], theirs[:, 1] + theirs[:, 3], theirs[:, 0] + theirs[:, 2]], axis=1)
    assert ours.min() >= 0
    assert (ours[:, 2:] <= size).all()
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] - b[:, 0], lambda b: b[:, 3] - b[:, 1]):
        a, b = np.sort(measure(ours)), np.sort(measure(theirs))
        both = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / 4000
        assert distance < 1.95 * np.sqrt(2 / 4000)  # two-sample Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 9), (44, 0, 56, 9)), ((9, 100), (0, 44, 9, 56)), ((1, 1), (0, 0, 1, 1))],
)
def test_crop_falls_back_to_the_centre(size, expected):
    """100 x 9 has no crop of its whole area with width / height <= 4/3: the central 12 x 9 is taken."""
    assert draw_crop_box(*size, (1.0, 1.0), (3 / 4, 4 / 3), generator()) == expected


@pytest.mark.parametrize("box", [(20, 30, 170, 130), (0, 0, 200, 150), (5, 7, 9, 10), (60, 40, 61, 41)])
@pytest.mark.parametrize("size", [32, 9, 224])
def test_crop_resize_is_cut_and_antialiased_resize(box, size):
    """As torchvision's ``RandomResizedCrop``, which cuts first; a box may be enlarged, or a single pixel."""
    image = picture(200, 150)
    expected = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(crop_resize(image, box, size, fast=False), expected)
    ours = crop_resize(image, box, size)
    assert (ours.shape, ours.dtype) == ((3, size, size), np.uint8)
    apart = np.abs(ours.astype(int) - expected)
    assert apart.max() <= 1
    assert apart.mean() < 0.05


@pytest.mark.parametrize("fast", [True, False])
def test_a_box_between_pixels_is_resized_in_the_image(fast):
    image, box = picture(200, 150), (20.5, 30.25, 150.5, 140.25)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, box=box))
    np.testing.assert_array_equal(crop_resize(image, box, 32, fast), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 250), (256, 256), (32, 32), (20, 31)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (32, 32), (37, 32), (36, 31)])
def test_eval_view_is_torchvisions(size, resize, crop):
    image = picture(*size)
    expected = np.asarray(tv.Compose([tv.Resize(resize), tv.CenterCrop(crop)])(image))
    np.testing.assert_array_equal(central_crop(image, resize, crop), expected)
    view = EvalView(resize=resize, crop=crop)(image)["image"]
    assert torch.equal(view, torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert view.is_contiguous()


@pytest.mark.parametrize("name", ["image_view", "image_and_jigsaw_patches", "eval_view"])
def test_built_by_name_as_a_host_program_does(name):
    views = build_transform({"name": name})(picture())
    assert views["image"].shape == (3, 224, 224)
    assert build("transform", {"name": name})(picture(), generator())["image"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 96}, r"patch_size must be <= jigsaw_size // grid = 85, got 96\."),
        ({"image_scale": [1.0, 0.5]}, "image_scale must be a range, low end first"),
        ({"image_scale": [0.5, 1.5]}, r"image_scale\[1\]"),
        ({"jigsaw_scale": [0.6]}, "jigsaw_scale"),
        ({"patch_flip": "crops"}, "Did you mean 'crop'"),
        ({"hue": 0.7}, "hue"),
        ({"flip_probability": -0.1}, "flip_probability"),
        ({"patchsize": 10}, "Did you mean 'patch_size'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        build("transform", {"name": "image_and_jigsaw_patches", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view_names": ["image"]}, "view_names must name 2 views"),
        ({"view_names": ["image", "image"]}, "view_names must name 2 views"),
        ({"num_views": 1, "second_view": {"hue": 0.1}}, "num_views=1 does not make"),
        ({"second_view": {"hue": 0.9}}, r"second_view\.hue"),
        ({"second_view": {"blur_probabillity": 0.9}}, "Did you mean 'blur_probability'"),
        ({"second_view": {"blur_sigma": [2.0, 0.1]}}, "low end first"),
        ({"crop_scale": [0.2, 0.1]}, "crop_scale must be a range"),
    ],
)
def test_bad_settings_of_several_views_are_refused(settings, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        build("transform", {"name": "image_views", **settings})


def test_an_eval_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="crop must be <= resize = 32, got 64"):
        EvalView(resize=32, crop=64)


def test_views_can_be_written_to_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches = [ImageAndJigsawPatches(fast=fast, rotate_crop=fast) for fast in (True, False)]
        others = [ImageViews(view_names=["a", "b"], num_crops=1), RotatedImage(), RotatedImage(rotations="all")]
        puzzles = [JigsawPuzzle(num_permutations=3, colours_of=colours) for colours in ("crop", "patch")]
        for transform in (*patches, EvalView(), *others, ImageAndRotation(), *puzzles):
            for name, view in transform(picture(), generator()).items():
                before = view.clone()
                view.add_(1)
                assert torch.equal(view, before + 1), name
