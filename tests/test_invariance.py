"""Distances of same-image and different-image pairs: by hand, against a slow reference, planted, and end to end."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from pirl_plugin import config as configs
from pirl_plugin.benchmarks import BenchmarkContext, Invariance, run_benchmark
from pirl_plugin.benchmarks.invariance import fingerprint, jigsaw_at, transform_for, transformed_views
from pirl_plugin.benchmarks.paired_features import IMAGE_ITSELF, collect
from pirl_plugin.data.datasets import ImageFolder
from pirl_plugin.data.generated_scenes import GeneratedScenes
from pirl_plugin.functional.invariance import pair_distances
from pirl_plugin.registry import build, completed
from pirl_plugin.report.invariance_figure import draw_invariance, read_panels

VIEW = {"name": "eval_view", "resize": 24, "crop": 24}
TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
HEADS = {"image": {"name": "linear", "dim": 8}, "patches": {"name": "jigsaw", "patch_dim": 4, "dim": 8}}
JIGSAW = {"name": "image_and_jigsaw_patches", "image_size": 24, "jigsaw_size": 27, "patch_size": 8}


# -- the equations -----------------------------------------------------------------------------------------------------


def at(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_two_images_by_hand():
    """Images at 0 and 90 degrees, their views at 60 and 180: the chord of an angle a is 2 sin(a / 2).

    Same image: 1 and sqrt 2. Different: 30 degrees and 180, 2 sin 15 and 2. Of the four comparisons two are won. The
    first view has the other image nearest to it, the second its own.
    """
    near = 2 * math.sin(math.radians(15))
    found = pair_distances(5 * at(0, 90), at(60, 180) / 3, bins=4)  # lengths do not count
    assert found.same.tolist() == pytest.approx([1, math.sqrt(2)], abs=1e-6)
    assert found.same_mean == pytest.approx((1 + math.sqrt(2)) / 2, abs=1e-6)
    assert found.different_mean == pytest.approx((near + 2) / 2, abs=1e-6)
    assert found.different_std == pytest.approx((2 - near) / 2, abs=1e-6)
    assert found.same_cosine == pytest.approx((0.5 + 0) / 2, abs=1e-6)
    assert found.different_cosine == pytest.approx((math.cos(math.radians(30)) - 1) / 2, abs=1e-6)
    assert (found.auc, found.retrieval) == (0.5, 0.5)
    assert found.edges.tolist() == [0, 0.5, 1, 1.5, 2]
    assert found.same_histogram.tolist() == [0, 0, 1, 0]
    assert found.different_histogram.tolist() == [0, 0.5, 0, 0.5]


def test_views_that_change_nothing_have_distance_0_and_auc_1():
    images = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = pair_distances(images, images * 2)
    assert found.same.tolist() == [0.0] * 50
    assert (found.same_mean, found.same_cosine, found.auc, found.retrieval) == (0, 1, 1, 1)
    assert found.same_histogram[0] == 1


def test_unrelated_embeddings_have_auc_one_half():
    g = torch.Generator().manual_seed(0)
    found = pair_distances(torch.randn(1500, 16, generator=g), torch.randn(1500, 16, generator=g))
    assert found.auc == pytest.approx(0.5, abs=0.02)
    assert found.retrieval < 0.005
    assert found.different_mean == pytest.approx(found.same_mean, abs=0.02)


def test_a_collapsed_network_gains_nothing_from_rounding():
    """All embeddings equal up to their last bit: every pair is a tie."""
    one = torch.randn(1, 33, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    found = pair_distances(one, one * torch.linspace(0.1, 9, 40)[:, None])
    assert (found.auc, found.retrieval) == (0.5, pytest.approx(1 / 40))


def test_opposite_views_have_auc_0():
    assert pair_distances(at(0, 10), -at(0, 10)).auc == 0


@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 22])
def test_agrees_with_a_slow_reference(chunk_elements):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(23, 5, generator=g)
    views = images + torch.randn(23, 5, generator=g)
    found = pair_distances(images, views, bins=10, chunk_elements=chunk_elements)

    a, b = images.double().numpy(), views.double().numpy()
    table = [[np.linalg.norm(v / np.linalg.norm(v) - i / np.linalg.norm(i)) for i in a] for v in b]
    same = [table[k][k] for k in range(23)]
    other = [table[r][c] for r in range(23) for c in range(23) if r != c]
    assert found.same.tolist() == pytest.approx(same, abs=1e-6)
    assert found.different_mean == pytest.approx(np.mean(other), abs=1e-6)
    assert found.different_std == pytest.approx(np.std(other), abs=1e-6)
    assert found.different_cosine == pytest.approx(np.mean([1 - d**2 / 2 for d in other]), abs=1e-6)
    assert found.auc == pytest.approx(np.mean([s < d for s in same for d in other]), abs=1e-12)
    assert found.retrieval == pytest.approx(np.mean([int(np.argmin(row)) == k for k, row in enumerate(table)]))
    for ours, theirs in ((found.same_histogram, same), (found.different_histogram, other)):
        assert ours.tolist() == pytest.approx((np.histogram(theirs, 10, (0, 2))[0] / len(theirs)).tolist())


@pytest.mark.parametrize(
    ("images", "views", "message"),
    [
        (torch.ones(1, 3), torch.ones(1, 3), "at least two"),
        (torch.ones(3, 3), torch.ones(3, 2), "at least two"),
        (torch.ones(3, 3), torch.full((3, 3), math.nan), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(images, views, message):
    with pytest.raises(ValueError, match=message):
        pair_distances(images, views)


# -- the benchmark -----------------------------------------------------------------------------------------------------


def context(pirl: bool = True, **changes: Any) -> BenchmarkContext:
    torch.manual_seed(0)
    model = build("model", {"name": "ssl_model", "trunk": TRUNK, "heads": HEADS}).requires_grad_(False)
    with torch.no_grad():  # running statistics that are not those of a new network
        model.train()
        model({"image": torch.rand(8, 3, 24, 24), "patches": 2 * torch.rand(8, 9, 3, 8, 8)})
    scenes = {split: GeneratedScenes(num_images=12, size=32, split=split) for split in ("train", "test")}
    made = BenchmarkContext(
        model.eval().trunk,
        scenes["train"],
        scenes["test"],
        build("transform", VIEW),
        view=VIEW,
        image_size=24,
        model=model if pirl else None,
        pretraining={"transform": JIGSAW} if pirl else {},
        batch_size=5,
    )
    return dataclasses.replace(made, **changes)


def by_metric(results: list[Any], features: str) -> dict[str, float]:
    return {result.metric: result.value for result in results if result.setting["features"] == features}


def test_features_are_those_of_the_model_itself():
    one = context()
    found = collect(one, one.test, JIGSAW, ["patches"], ["embedding", "trunk"], own_statistics=False)
    transform = build("transform", JIGSAW)
    for image_id in range(12):
        image = one.test[image_id][0]
        patches = transform(image, np.random.default_rng(np.random.SeedSequence([0, 0, image_id])))["patches"]
        views = {"image": one.transform(image)["image"][None], "patches": patches[None]}
        expected = one.model(views)
        torch.testing.assert_close(found["embedding", IMAGE_ITSELF][image_id], expected["image"][0])
        torch.testing.assert_close(found["embedding", "patches"][image_id], expected["patches"][0])
        pooled = one.trunk(one.model.normalize(patches)).mean(dim=0)
        torch.testing.assert_close(found["trunk", "patches"][image_id], pooled)


def test_the_seed_decides_about_the_views_and_workers_do_not():
    one = context()
    first, again, other = (
        collect(changed, one.test, JIGSAW, ["patches"], ["trunk"], own_statistics=False)
        for changed in (one, dataclasses.replace(one, num_workers=1, batch_size=3), dataclasses.replace(one, seed=1))
    )
    for view in (IMAGE_ITSELF, "patches"):
        torch.testing.assert_close(first["trunk", view], again["trunk", view], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first["trunk", IMAGE_ITSELF], other["trunk", IMAGE_ITSELF])
    assert not torch.allclose(first["trunk", "patches"], other["trunk", "patches"], rtol=1e-2)


class OnlyNorm(nn.Module):
    """Its pooled output has mean 0 over the images that its statistics were taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).mean(dim=(2, 3))


def test_each_view_has_statistics_of_its_own_and_the_weights_keep_theirs():
    trunk = OnlyNorm().eval()
    before = copy.deepcopy(trunk.state_dict())
    # two whole batches; a third with a single image would weigh as much as they do
    one = context(pirl=False, trunk=trunk, batch_size=6, test=GeneratedScenes(num_images=13, size=32, split="test"))
    found = collect(one, one.test, JIGSAW, ["patches"], ["trunk"], own_statistics=True)
    for view in (IMAGE_ITSELF, "patches"):
        torch.testing.assert_close(found["trunk", view][:12].mean(dim=0), torch.zeros(3), rtol=0, atol=1e-5)
    with_running = collect(one, one.test, JIGSAW, ["patches"], ["trunk"], own_statistics=False)
    assert with_running["trunk", "patches"][:12].mean(dim=0).abs().max() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert not trunk.norm.training


def plain_images(folder: Path, count: int = 6) -> Path:
    """Images of one colour each: no crop changes them."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 3))
    for index, colour in enumerate(colours.tolist()):
        for split in ("train", "test"):
            path = folder / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 40), tuple(colour)).save(path)
    return folder


def test_a_planted_invariance_is_found(tmp_path):
    folder = ImageFolder(str(plain_images(tmp_path)), split="test")
    crops = {"name": "image_view", "image_size": 24, "jitter_probability": 0.0, "photometric_probability": 0.0}
    one = context(test=folder)
    same = {**crops, "grayscale_probability": 0.0}
    results = list(Invariance(transform=same, features="embedding", batch_norm="running").run(one))
    values = by_metric(results, "embedding")
    assert values["distance_same"] == pytest.approx(0, abs=1e-3)
    assert (values["auc"], values["own_image_top1"]) == (100, 100)
    assert {result.setting["view"] for result in results} == {"image"}
    grey = {**crops, "grayscale_probability": 1.0}
    values = by_metric(
        list(Invariance(transform=grey, features="embedding", batch_norm="running").run(one)), "embedding"
    )
    assert values["auc"] < 100
    assert values["distance_same"] > 0.01


def test_results_one_headline_and_both_kinds_of_features():
    one = context()
    results = list(Invariance().run(one))
    headlines = [result for result in results if result.headline]
    assert [(r.metric, r.setting["features"], r.protocol) for r in headlines] == [("auc", "trunk", "view_statistics")]
    found = collect(one, one.test, completed("transform", JIGSAW), ["patches"], ["embedding", "trunk"], True)
    for features in ("embedding", "trunk"):
        values = by_metric(results, features)
        expected = pair_distances(found[features, IMAGE_ITSELF], found[features, "patches"])
        assert values["auc"] == pytest.approx(100 * expected.auc)
        assert values["distance_gap"] == pytest.approx(expected.different_mean - expected.same_mean)
        assert values["distance_same"] ** 2 <= 2 - 2 * values["cosine_same"] + 1e-6  # Jensen
    assert len({json.dumps([r.setting, r.metric], sort_keys=True) for r in results}) == len(results) == 14


def test_a_sample_of_the_images_and_the_other_split():
    one = context()
    sampled = list(Invariance(num_images=7, split="train").run(one))
    assert {(r.setting["num_images"], r.setting["split"]) for r in sampled} == {(7, "train")}
    assert sampled[0].extra["num_images"] == 7
    assert by_metric(sampled, "trunk") != by_metric(list(Invariance(num_images=8, split="train").run(one)), "trunk")


def without_place(transform: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration, but for where the colours are made, which changes no pixel."""
    return {key: value for key, value in completed("transform", transform).items() if key != "colours"}


def test_weights_without_heads_are_measured_on_the_trunk():
    results = list(Invariance().run(context(pirl=False)))
    assert {result.setting["features"] for result in results} == {"trunk"}
    assert results[0].extra["transformed_by"] == without_place(jigsaw_at(24))
    with pytest.raises(ValueError, match=r"needs a head for each of image, patches, these weights have none"):
        list(Invariance(features="embedding").run(context(pirl=False)))


def test_an_unreadable_image_is_left_out(tmp_path):
    folder = plain_images(tmp_path)
    (folder / "test" / "class0" / "2.png").write_bytes(b"nothing")
    results = list(Invariance().run(context(test=ImageFolder(str(folder), split="test"))))
    assert {(result.extra["num_images"], result.extra["unreadable"]) for result in results} == {(5, 1)}


def test_the_transform_is_the_given_one_else_the_pretrainings_else_pirls():
    one = context()
    given = {"name": "image_and_jigsaw_patches", "patch_size": 9}
    assert transform_for(one, given) == without_place(given)
    assert transform_for(one, {**given, "colours": "device"}) == without_place(given)
    assert transform_for(one) == without_place(JIGSAW)
    npid = dataclasses.replace(one, pretraining={"transform": {"name": "image_view"}}, image_size=32)
    assert transform_for(npid) == without_place(jigsaw_at(32))
    assert fingerprint(transform_for(npid)) == fingerprint(without_place(jigsaw_at(32)))
    assert fingerprint(transform_for(one)) != fingerprint(transform_for(npid))
    assert transformed_views({"name": "image_view"}) == ["image"]


@pytest.mark.parametrize(("method", "views"), [("jigsaw_32", ["patches"]), ("rotation_32", ["image"])])
def test_the_answers_of_a_pretext_are_no_views(method, views):
    """Jigsaw's transform also gives the order, RotNet's the rotation."""
    config = configs.load("train", [f"method={method}", "dataset=generated_scenes"])["transform"]
    assert transformed_views(config) == views


@pytest.mark.parametrize(("method", "size"), [("pirl", 224), ("pirl_64", 64), ("pirl_32", 32)])
def test_the_default_transform_is_that_of_the_recipes(method, size):
    recipe = configs.load("train", [f"method={method}", "dataset=generated_scenes"])["transform"]
    assert completed("transform", jigsaw_at(size)) == completed("transform", recipe)


# -- files and figure --------------------------------------------------------------------------------------------------


def configuration(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "benchmark": {"name": "invariance", "num_images": 20},
        "dataset": {"name": "generated_scenes", "num_images": 24, "size": 32},
        "weights": "random",
        "trunk": TRUNK,
        "image_size": 32,
        "batch_size": 16,
        "run_dir": str(tmp_path / "run"),
        **changes,
    }


def test_random_and_supervised_rows_and_their_files(tmp_path):
    record = run_benchmark(configuration(tmp_path))[0]
    assert (record.method, record.metric, record.benchmark) == ("random", "auc", "invariance")
    content = json.loads((tmp_path / "run" / "invariance.json").read_text())
    (panel,) = content["panels"]
    assert 100 * panel["auc"] == pytest.approx(record.value)
    for name in ("same", "different"):
        assert sum(panel[f"{name}_histogram"]) == pytest.approx(1, abs=1e-6)
        middle = [(a + b) / 2 for a, b in zip(panel["edges"], panel["edges"][1:], strict=False)]
        mean = sum(m * p for m, p in zip(middle, panel[f"{name}_histogram"], strict=True))
        assert mean == pytest.approx(panel[f"{name}_mean"], abs=0.02)
    with Image.open(tmp_path / "run" / "invariance.png") as picture:
        assert picture.width > 500
        assert picture.height > 300
    assert (tmp_path / "run" / "invariance.svg").read_text().startswith("<?xml")

    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    supervised = configuration(tmp_path, weights=str(tmp_path / "resnet18.pth"), trunk={**TRUNK, "width": 1.0})
    supervised["trunk"]["stem"] = "imagenet"
    record = run_benchmark({**supervised, "method": "supervised"})[0]
    assert (record.method, record.setting["features"]) == ("supervised", "trunk")


def panels() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    images = torch.randn(60, 6, generator=g)
    found = pair_distances(images, images + torch.randn(60, 6, generator=g), bins=50)
    one = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in vars(found).items()}
    return [{**one, "features": "embedding", "view": "patches"}, {**one, "title": "NPID, trunk", "features": "trunk"}]


def test_figure_has_a_panel_each_with_its_title_and_labels(tmp_path):
    draw_invariance(panels()[:1], tmp_path / "one.png")
    draw_invariance(panels(), tmp_path / "two.png", title="all")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width == 2 * one.width
        corner = two.convert("RGB").getpixel((2, 2))
    assert corner == (255, 255, 255)
    draw_invariance(panels(), tmp_path / "two.svg")
    text = (tmp_path / "two.svg").read_text()
    for words in ("views of the same image", "views of different", "NPID, trunk", "l2 distance", "AUC"):
        assert f"<!-- {words}" in text
    with pytest.raises(ValueError, match="at least one panel"):
        draw_invariance([], tmp_path / "none.png")


def test_panels_are_read_back(tmp_path):
    list(Invariance(num_images=5).run(context(run_dir=tmp_path / "run")))
    assert [panel["features"] for panel in read_panels(tmp_path / "run")] == ["embedding", "trunk"]
    with pytest.raises(FileNotFoundError, match="run the benchmark invariance first"):
        read_panels(tmp_path)
