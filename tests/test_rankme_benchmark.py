"""The benchmark ``rankme``: against an independent float64 version, which features, which images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pirl_plugin.benchmarks import BenchmarkContext, RankMe, run_benchmark
from pirl_plugin.benchmarks.rankme import sample
from pirl_plugin.data.datasets import ImageFolder
from pirl_plugin.data.generated_scenes import GeneratedScenes
from pirl_plugin.registry import build

VIEW = {"name": "eval_view", "resize": 24, "crop": 24}
TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}


def context(heads: bool = True, **changes: Any) -> BenchmarkContext:
    torch.manual_seed(0)
    config = {"name": "ssl_model", "trunk": TRUNK, "heads": {"image": {"name": "linear", "dim": 8}}}
    model = build("model", config).requires_grad_(False).eval()
    scenes = {split: GeneratedScenes(num_images=40, size=32, split=split) for split in ("train", "test")}
    made = BenchmarkContext(
        model.trunk,
        scenes["train"],
        scenes["test"],
        build("transform", VIEW),
        model=model if heads else None,
        batch_size=7,
    )
    return dataclasses.replace(made, **changes)


def effective_rank(rows: np.ndarray) -> float:
    """Eq. 1 and 2 of Garrido et al., from the eigenvalues of the Gram matrix."""
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(rows.T @ rows), 0, None))
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def test_agrees_with_an_independent_version_in_float64():
    one = context()
    results = {result.setting["features"]: result for result in RankMe().run(one)}
    images = torch.stack([one.transform(one.train[i][0])["image"] for i in range(40)])
    expected = {
        "embedding": one.model({"image": images})["image"],
        "trunk": one.trunk.features(one.model.normalize(images), ["res5"])["res5"].mean(dim=(2, 3)),
    }
    for name, rows in expected.items():
        assert results[name].value == pytest.approx(effective_rank(rows.double().numpy()), rel=1e-4)
        assert (results[name].extra["N"], results[name].extra["D"]) == tuple(rows.shape)
    assert results["embedding"].extra["bound"] == 8
    assert results["trunk"].extra["bound"] == 40  # fewer images than the 64 channels
    assert 1 < results["embedding"].value < 8
    assert [r.headline for r in results.values()] == [True, False]
    assert {(r.metric, r.unit) for r in results.values()} == {("rankme", "")}


def test_a_dataset_without_labels_will_do(tmp_path):
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    folder = ImageFolder(str(tmp_path))
    assert folder.labels is None
    (result,) = RankMe(features=["res5"]).run(context(train=folder))
    assert result.extra["N"] == 5


def test_a_seeded_sample_of_the_chosen_split():
    one = context()

    def values(context: BenchmarkContext = one, **arguments: Any) -> list[float]:
        return [result.value for result in RankMe(features=["res2"], **arguments).run(context)]

    assert values(num_images=10) == values(num_images=10)
    assert values(num_images=10) != values(dataclasses.replace(one, seed=1), num_images=10)
    assert values(num_images=40) == values(num_images=10_000) == values()
    assert values() != values(split="test")
    (result,) = RankMe(features=["res2"], num_images=10).run(one)
    assert (result.setting["num_images"], result.extra["N"], result.protocol) == (10, 10, "garrido23*")


def test_the_sample_holds_each_id_once():
    ids = sample(100, 30, seed=3)
    assert len(set(ids.tolist())) == 30
    assert ids.tolist() == sorted(ids.tolist())
    assert 0 <= ids.min() <= ids.max() < 100
    counts = np.bincount(np.concatenate([sample(10, 3, seed=seed) for seed in range(2000)]), minlength=10)
    assert counts == pytest.approx(np.full(10, 600), abs=100)


def test_weights_without_a_head_are_measured_on_the_trunk():
    (result,) = RankMe().run(context(heads=False))
    assert result.headline
    assert result.setting == {"features": "trunk", "layer": "res5", "split": "train", "num_images": 40}
    with pytest.raises(ValueError, match="no image head"):
        list(RankMe(features=["embedding"]).run(context(heads=False)))


def test_random_and_supervised_rows(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    common = {"benchmark": {"name": "rankme"}, "dataset": {"name": "generated_scenes", "num_images": 20, "size": 32}}
    trunk = {"name": "resnet_trunk", "depth": 18}
    random = run_benchmark({**common, "weights": "random", "trunk": trunk, "image_size": 32})
    file = str(tmp_path / "resnet18.pth")
    given = run_benchmark({**common, "weights": file, "trunk": trunk, "image_size": 32, "method": "supervised"})
    assert [record.method for record in random + given] == ["random", "supervised"]
    assert random[0].value != given[0].value
    assert all(1 <= record.value <= 20.01 for record in random + given)
