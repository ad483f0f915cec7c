"""Extracted features: what is kept between benchmarks, and several processes against one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pirl_plugin.benchmarks import KNN, BenchmarkContext, extract
from pirl_plugin.benchmarks.features import pooled_features
from pirl_plugin.commands.benchmark import benchmark
from pirl_plugin.data.generated_scenes import GeneratedScenes
from pirl_plugin.data.reading import UnreadableImageError
from pirl_plugin.records import read_records
from pirl_plugin.registry import build

VIEW = {"name": "eval_view", "resize": 24, "crop": 24}


class Counted(torch.nn.Module):
    """A trunk that counts the images it has seen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = build("model", {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}).eval()
        self.seen = 0

    def features(self, x: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
        self.seen += len(x)
        return self.inner.features(x, layers)


def context(folder: Path | None) -> BenchmarkContext:
    scenes = GeneratedScenes(num_images=13, size=32, split="train")
    one = BenchmarkContext(Counted(), scenes, scenes, build("transform", VIEW), view=VIEW, batch_size=5)
    return dataclasses.replace(one, cache_dir=folder)


def test_what_is_kept_is_read_and_only_the_missing_layer_is_extracted(tmp_path):
    one = context(tmp_path)
    first = extract(one, one.train, ["res2"], "avg", "train")
    assert one.trunk.seen == 13
    again = extract(context(tmp_path), one.train, ["res2"], "avg", "train")
    torch.testing.assert_close(again.of["res2"], first.of["res2"], rtol=0, atol=0)
    assert again.ids.tolist() == list(range(13))
    two = context(tmp_path)
    both = extract(two, two.train, ["res2", "res5"], "avg", "train")
    assert two.trunk.seen == 13  # for res5 alone
    direct = context(None)
    expected = extract(direct, direct.train, ["res2", "res5"], "avg", "train")
    for name in ("res2", "res5"):
        torch.testing.assert_close(both.of[name], expected.of[name], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_layers_and_the_embedding_take_one_pass(precision):
    """Each image goes through the trunk once, and what comes out is what the whole model gives."""
    one = context(None)
    heads = {"image": {"name": "linear", "dim": 16}}
    trunk = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
    model = build("model", {"name": "ssl_model", "trunk": trunk, "heads": heads}).eval()
    one.trunk.inner = model.trunk
    one = dataclasses.replace(one, model=model, precision=precision)
    images = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = {"embedding": model({"image": images})["image"].float(), "res5": model.trunk(images).float()}
    tolerance = {"rtol": 0.05, "atol": 0.05} if precision == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    for names in (["embedding"], ["res5", "embedding"], ["embedding", "res3", "res5"]):
        before = one.trunk.seen
        found = pooled_features(one, images, names, "avg")
        assert one.trunk.seen == before + 5
        assert set(found) == set(names)
        for name in expected.keys() & found:
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], expected[name], **tolerance)
    with pytest.raises(ValueError, match="no image head"):
        pooled_features(dataclasses.replace(one, model=None), images, ["embedding"], "avg")


@pytest.mark.parametrize(
    "change",
    [
        lambda one: dataclasses.replace(one, trunk=Counted(seed=1)),
        lambda one: dataclasses.replace(one, view={**VIEW, "resize": 26}),
        lambda one: dataclasses.replace(one, precision="bf16"),
        lambda one: dataclasses.replace(one, train=GeneratedScenes(num_images=13, size=32, seed=5, split="train")),
    ],
    ids=["weights", "view", "precision", "images"],
)
def test_features_of_anything_else_are_not_taken(tmp_path, change):
    one = context(tmp_path)
    extract(one, one.train, ["res2"], "avg", "train")
    other = change(context(tmp_path))
    extract(other, other.train, ["res2"], "avg", "train")
    assert other.trunk.seen == 13
    extract(other, other.train, ["res2"], "grid", "train")
    assert other.trunk.seen == 26


def test_a_damaged_file_is_extracted_again(tmp_path, caplog):
    one = context(tmp_path)
    first = extract(one, one.train, ["res2"], "avg", "train")
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = extract(one, one.train, ["res2"], "avg", "train")
    assert one.trunk.seen == 26
    assert "extracting again" in caplog.text
    torch.testing.assert_close(again.of["res2"], first.of["res2"], rtol=0, atol=0)
    assert file.stat().st_size > 100


class Damaged(GeneratedScenes):
    """Some of its images cannot be read, though the files look as before."""

    def __init__(self, *broken: int) -> None:
        super().__init__(num_images=13, size=32, split="train")
        self.broken = broken

    def read(self, image_id: int) -> Image.Image:
        if image_id in self.broken:
            raise UnreadableImageError(str(image_id), "no answer")
        return super().read(image_id)


def damaged(folder: Path | None, *broken: int) -> BenchmarkContext:
    return dataclasses.replace(context(folder), train=Damaged(*broken))


@pytest.mark.parametrize(("before", "after"), [((3,), (7,)), ((), (7,)), ((3,), ())])
def test_layers_of_other_images_are_not_put_side_by_side(tmp_path, before, after):
    """An image that could be read when the first layer was extracted cannot any more, or the other way round."""
    one, two, direct = damaged(tmp_path, *before), damaged(tmp_path, *after), damaged(None, *after)
    extract(one, one.train, ["res2"], "avg", "train")
    both = extract(two, two.train, ["res2", "res5"], "avg", "train")
    expected = extract(direct, direct.train, ["res2", "res5"], "avg", "train")
    assert both.ids.tolist() == [image_id for image_id in range(13) if image_id not in after]
    for name in ("res2", "res5"):
        torch.testing.assert_close(both.of[name], expected.of[name], rtol=0, atol=0)
    extract(two, two.train, ["res2", "res5"], "avg", "train")
    assert two.trunk.seen <= 26  # what was kept last is of the same images


def test_two_kept_layers_of_other_images_are_not_put_side_by_side(tmp_path):
    for name, broken in (("res2", 3), ("res5", 7)):
        one = damaged(tmp_path, broken)
        extract(one, one.train, [name], "avg", "train")
    two = damaged(tmp_path, 7)
    both = extract(two, two.train, ["res5", "res2"], "avg", "train")
    assert 3 in both.ids.tolist()
    assert len(both.of["res2"]) == len(both.of["res5"]) == len(both.ids) == 12


def test_images_that_are_broken_for_good_do_not_keep_features_from_being_read(tmp_path):
    one = damaged(tmp_path, 3, 7)
    extract(one, one.train, ["res2"], "avg", "train")
    seen = one.trunk.seen
    assert extract(one, one.train, ["res2"], "avg", "train").unreadable == 2
    assert one.trunk.seen == seen


def test_an_image_that_can_be_read_again_counts(tmp_path):
    one, two = damaged(tmp_path, 3), damaged(tmp_path)
    assert extract(one, one.train, ["res2"], "avg", "train").unreadable == 1
    assert extract(two, two.train, ["res2"], "avg", "train").unreadable == 0


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = context(None)
    extract(one, one.train, ["res2"], "avg", "train")
    extract(one, one.train, ["res2"], "avg", "train")
    assert one.trunk.seen == 26
    assert not list(tmp_path.iterdir())


def test_two_processes_measure_what_one_does(tmp_path):
    """31 and 37 images: the processes' parts differ in size."""
    overrides = ["benchmark=knn", "benchmark.k=[3]", "weights=random", "trunk=resnet18_narrow", "image_size=32"]
    overrides += ["dataset=generated_scenes", "dataset.num_images=31", "dataset.size=32", "device=cpu"]
    one = benchmark([*overrides, f"run_dir={tmp_path / 'one' / 'run'}"], quiet=True)
    root = Path(__file__).resolve().parent.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(root / "tools" / "benchmark.py"), *overrides, f"run_dir={tmp_path / 'two' / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("top1") == 1  # one process speaks
    two = read_records(tmp_path / "two" / "run")
    assert [(r.setting, r.metric, r.value) for r in two] == [(r.setting, r.metric, r.value) for r in one]
    assert len(list((tmp_path / "two" / "features").iterdir())) == 2  # the train and the test features


def test_a_benchmark_for_one_process_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(KNN, "multi_process", False)
    with pytest.raises(ValueError, match="knn runs in one process: start it without torchrun"):
        benchmark(["benchmark=knn", "weights=random", "trunk=resnet18_narrow", "image_size=32", f"run_dir={tmp_path}"])
