"""Nearest neighbours: by hand, against a slow search, and the benchmark with its data and picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pirl_plugin.benchmarks import neighbours as module
from pirl_plugin.benchmarks.neighbours import nearest
from pirl_plugin.benchmarks.runner import run_benchmark
from pirl_plugin.report.neighbours_figure import draw_neighbours, in_words, read_neighbours

SCENES = {"name": "generated_scenes", "num_images": 24, "num_classes": 3}
CONFIG = {
    "benchmark": {"name": "neighbours", "k": 4, "queries": 5},
    "weights": "random",
    "trunk": {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"},
    "image_size": 32,
    "dataset": SCENES,
    "device": "cpu",
}


def test_the_nearest_by_hand():
    """Query (2, 0): cosines 0, 1, 0.6 and -1, whatever the lengths."""
    rows, cosines = nearest(
        torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0], [9.0, 0.0], [0.6, 0.8], [-1.0, 0]]), 3
    )
    assert rows.tolist() == [[1, 2, 0]]
    assert cosines.tolist()[0] == pytest.approx([1, 0.6, 0])


def test_agrees_with_a_slow_search(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 40)  # two queries at a time
    queries, others = torch.randn(7, 5), torch.randn(20, 5)
    rows, cosines = nearest(queries, others, 20)
    for query, found, values in zip(queries.double(), rows.tolist(), cosines.tolist(), strict=True):
        exact = [float(query @ other / (query.norm() * other.norm())) for other in others.double()]
        assert found == sorted(range(20), key=lambda index, exact=exact: -exact[index])
        assert values == pytest.approx(sorted(exact, reverse=True), abs=1e-6)


def test_number_data_and_picture_of_a_run(tmp_path: Path):
    (record,) = run_benchmark({**CONFIG, "run_dir": str(tmp_path)})
    assert (record.metric, record.protocol, record.setting["k"]) == ("same_class", "cosine", 4)
    found = read_neighbours(tmp_path)["queries"]
    assert [query["id"] for query in found] == [0, 5, 11, 17, 23]
    assert all(len(query["neighbours"]) == 4 for query in found)
    for query in found:
        cosines = [one["cosine"] for one in query["neighbours"]]
        assert cosines == sorted(cosines, reverse=True)
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert picture.width > 500
        assert picture.height > 500


def test_images_find_themselves(tmp_path: Path):
    """With the test images to learn from, too, each one's nearest is itself, of its class, at cosine 1."""
    (record,) = run_benchmark(
        {**CONFIG, "benchmark": {"name": "neighbours", "k": 1}, "train_split": "test", "run_dir": str(tmp_path)}
    )
    assert record.value == 100
    for query in read_neighbours(tmp_path)["queries"]:
        assert query["neighbours"] == [{"id": query["id"], "class": query["class"], "cosine": 1.0}]


def test_k_is_cut_to_the_training_images():
    (record,) = run_benchmark({**CONFIG, "benchmark": {"name": "neighbours", "k": 999}})
    assert record.setting["k"] == 24
    assert record.value == pytest.approx(100 / 3)  # all of three balanced classes


def test_the_picture_holds_each_image_where_it_belongs(tmp_path: Path):
    """A red query, its green and its blue neighbour: from left to right."""
    colours = {("test", 0): (255, 0, 0), ("train", 0): (0, 255, 0), ("train", 1): (0, 0, 255)}
    pictures = {key: Image.new("RGB", (20, 30), colour) for key, colour in colours.items()}
    others = [
        {"id": 0, "class": "a $x$ name that is far too long", "cosine": 0.9},
        {"id": 1, "class": "b", "cosine": 0.1},
    ]
    draw_neighbours([{"id": 0, "class": "b", "neighbours": others}], pictures, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    middles = [np.argwhere((pixels == colour).all(axis=2)).mean(axis=0)[1] for colour in colours.values()]
    assert middles == sorted(middles)
    assert in_words([{"class": "b", "neighbours": others[1:]}]) == "b: b."


def test_nothing_to_show_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="run the benchmark neighbours first"):
        read_neighbours(tmp_path)
    with pytest.raises(ValueError, match="at least one query"):
        draw_neighbours([], {}, tmp_path / "x.png")
