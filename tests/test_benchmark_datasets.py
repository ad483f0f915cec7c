"""The benchmark's own datasets: official layouts are read as they lie, wrong ones are explained."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classy_vision.dataset import build_dataset
from PIL import Image

from pirl_plugin import published
from pirl_plugin.benchmarks import run_benchmark
from pirl_plugin.benchmarks.runner import dataset_name
from pirl_plugin.data import benchmark_datasets, scanning
from pirl_plugin.data.benchmark_datasets import INATURALIST2018, PLACES205, evenly_spaced
from pirl_plugin.data.dataset_layouts import Official, WrongLayoutError
from pirl_plugin.data.dataset_names import PackedNames
from pirl_plugin.data.imagenet_dataset import IMAGENET
from pirl_plugin.data.voc import VOC_CLASSES
from pirl_plugin.data.voc_datasets import VOC0712_OFFICIAL, VOC2007_OFFICIAL, VOC2012_OFFICIAL
from pirl_plugin.registry import check, lookup
from pirl_plugin.schema import ConfigError

NAMES = ("imagenet", "places205", "inaturalist2018", "voc2007", "voc2012", "voc0712")


def paint(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path, format="PNG")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def build(name: str, root: Path, **arguments: object) -> Any:
    return build_dataset({"name": name, "root": str(root), **arguments})


def shown(dataset: Any) -> list[tuple[int, str]]:
    """Grey value and class of each image: the pixels of an id belong to its label."""
    return [
        (dataset[i][0].getpixel((0, 0))[0], dataset.class_names[label])
        for i, label in enumerate(dataset.labels.tolist())
    ]


def refusal(name: str, root: Path, **arguments: object) -> str:
    with pytest.raises(WrongLayoutError) as caught:
        build(name, root, **arguments)
    return str(caught.value)


# -- what all of them share --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_root_gets_the_layout_what_was_found_and_the_source(name: str, tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    (tmp_path / "images.tar").write_text("")
    said = refusal(name, tmp_path)
    assert f"Expected in {tmp_path}:\n  " in said
    assert "Found there: the folder something and 1 file, e.g. images.tar." in said
    assert "Unpack the archives first: images.tar." in said
    official = lookup("dataset", name).official  # type: ignore[attr-defined]
    assert said.endswith(f"Official source of {official.title}: {official.source}")
    with pytest.raises(FileNotFoundError, match="has no 'missing'"):
        build(name, tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("imagenet", "train val"),
        ("places205", "train val"),
        ("inaturalist2018", "train val"),
        ("voc2007", "trainval test"),
        ("voc2012", "train val"),
        ("voc0712", "trainval test"),
        ("voc", "trainval test"),
    ],
)
def test_benchmark_splits(name: str, splits: str) -> None:
    assert lookup("dataset", name).benchmark_splits == tuple(splits.split())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_a_split_that_there_is_not(name: str) -> None:
    problems = check("dataset", {"name": name, "root": "anywhere", "split": "valid"})
    assert [problem.path for problem in problems] == ["split"]
    assert "'val'" in problems[0].message
    with pytest.raises(ConfigError):
        build(name, Path("anywhere"), split="tset")


def test_official_counts_add_up() -> None:
    images = VOC2007_OFFICIAL.images
    assert images["train"] + images["val"] == images["trainval"] == 5011
    images = VOC2012_OFFICIAL.images
    assert images["train"] + images["val"] == images["trainval"] == 11540
    assert VOC0712_OFFICIAL.images["trainval"] == 5011 + 11540
    assert IMAGENET.images == {"train": 1_281_167, "val": 50_000}
    assert PLACES205.images["val"] == 205 * 100
    assert INATURALIST2018.images["val"] == 3 * 8142


# -- names of very many files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[], ["a"], [""], ["b/ä.jpg", "", "c d", "\udcff.png"]])
def test_packed_names_are_the_names(names: list[str]) -> None:
    packed = pickle.loads(pickle.dumps(PackedNames(iter(names))))
    assert list(packed) == names == [packed[i] for i in range(len(packed))]
    assert packed[-2:] == names[-2:]
    assert [packed[-1 - i] for i in range(len(names))] == names[::-1]
    with pytest.raises(IndexError):
        packed[len(names)]


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        PackedNames(["a\0b"])


def test_evenly_spaced_ids_hold_both_ends() -> None:
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(3, 10) == [0, 1, 2]
    assert evenly_spaced(0, 10) == []


# -- ImageNet ----------------------------------------------------------------------------------------------------------

WNIDS = ("n01440764", "n01443537", "n02084071")


def imagenet(base: Path, splits: Iterable[str] = ("train", "val")) -> Path:
    for split in splits:
        for value, wnid in enumerate(WNIDS):
            paint(base / split / wnid / f"{wnid}_1.JPEG", value)
    return base


def devkit_of_imagenet(root: Path, truth: Iterable[int]) -> None:
    """Numbers of the devkit are not in the order of the WordNet ids: 1 is the third, 2 the first, 3 the second."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [
        (1, WNIDS[2], "dog", 0),
        (2, WNIDS[0], "tench", 0),
        (3, WNIDS[1], "goldfish", 0),
        (1001, "n00001740", "x", 2),
    ]
    scipy_io.savemat(str(folder / "meta.mat"), {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))


class TestImageNet:
    @pytest.mark.parametrize("below", ["", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"])
    def test_class_folders(self, tmp_path: Path, below: str) -> None:
        imagenet(tmp_path / below)
        for split in ("train", "val"):
            dataset = build("imagenet", tmp_path, split=split)
            assert dataset.class_names == list(WNIDS)
            assert shown(dataset) == list(enumerate(WNIDS))
            assert dataset.labels.dtype == np.int64
        assert build("imagenet", tmp_path).file_name(1) == "n01443537/n01443537_1.JPEG"

    def test_the_training_folders_number_the_classes_of_both_splits(self, tmp_path: Path) -> None:
        imagenet(tmp_path)
        for file in (tmp_path / "val" / WNIDS[0]).iterdir():
            file.unlink()
        (tmp_path / "val" / WNIDS[0]).rmdir()
        val = build("imagenet", tmp_path, split="val")
        assert val.class_names == list(WNIDS)
        assert val.labels.tolist() == [1, 2]
        paint(tmp_path / "val" / "n09999999" / "1.JPEG")
        assert "1 class folders that" in refusal("imagenet", tmp_path, split="val")

    def test_validation_images_in_one_folder_are_explained(self, tmp_path: Path) -> None:
        imagenet(tmp_path, ["train"])
        for number in (1, 2, 3):
            paint(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
        said = refusal("imagenet", tmp_path, split="val")
        assert "holds 3 images, not in class folders" in said
        assert "ILSVRC2012_devkit_t12" in said
        assert "LOC_val_solution.csv" in said
        assert len(build("imagenet", tmp_path)) == 3  # training is not concerned

    def test_validation_images_in_one_folder_are_read_with_the_devkit(self, tmp_path: Path) -> None:
        imagenet(tmp_path, ["train"])
        devkit_of_imagenet(tmp_path, truth=[3, 1, 2, 1])
        for number in (4, 2, 1, 3):
            paint(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
        expected = [(1, WNIDS[1]), (2, WNIDS[2]), (3, WNIDS[0]), (4, WNIDS[2])]
        assert shown(build("imagenet", tmp_path, split="val")) == expected
        paint(tmp_path / "val" / "ILSVRC2012_val_00000005.JPEG")
        assert "e.g. ILSVRC2012_val_00000005.JPEG" in refusal("imagenet", tmp_path, split="val")

    def test_validation_images_in_one_folder_are_read_with_kaggles_solution(self, tmp_path: Path) -> None:
        base = tmp_path / "ILSVRC/Data/CLS-LOC"
        imagenet(base, ["train"])
        for number in (1, 2):
            paint(base / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
        rows = [f"ILSVRC2012_val_00000002,{WNIDS[0]} 85 1 499 272 ", f"ILSVRC2012_val_00000001,{WNIDS[2]} 1 2 3 4 "]
        write(tmp_path / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]) + "\n")
        dataset = build("imagenet", tmp_path, split="val")
        assert shown(dataset) == [(1, WNIDS[2]), (2, WNIDS[0])]
        assert dataset.class_names == list(WNIDS)
        for name in os.listdir(base / "train" / WNIDS[2]):
            os.unlink(base / "train" / WNIDS[2] / name)
        (base / "train" / WNIDS[2]).rmdir()
        assert "They show 1 classes that" in refusal("imagenet", tmp_path, split="val")

    def test_root_is_a_split(self, tmp_path: Path) -> None:
        imagenet(tmp_path)
        assert f"set root to {tmp_path}." in refusal("imagenet", tmp_path / "train")

    def test_classes_that_were_not_unpacked(self, tmp_path: Path) -> None:
        for wnid in WNIDS:
            write(tmp_path / "train" / f"{wnid}.tar", "")
        said = refusal("imagenet", tmp_path)
        assert "holds no images" in said
        assert "3 files, e.g. n01440764.tar. Unpack each archive into a folder of its own name." in said

    def test_training_images_in_one_folder(self, tmp_path: Path) -> None:
        paint(tmp_path / "train" / "n01440764_1.JPEG")
        assert "Unpack each class's archive" in refusal("imagenet", tmp_path)

    def test_folders_that_are_no_wordnet_ids(self, tmp_path: Path) -> None:
        paint(tmp_path / "train" / "train" / WNIDS[0] / "1.JPEG")
        assert "no WordNet ids: train." in refusal("imagenet", tmp_path)

    def test_a_part_of_it_says_so_and_has_another_name(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        dataset = build("imagenet", imagenet(tmp_path))
        assert "found 3 images of 3 classes, officially it has 1,281,167 of 1,000" in caplog.text
        assert dataset.record_name == "imagenet-partial"
        assert IMAGENET.record_name("val", 50_000, 1_000) == "imagenet"

    def test_records_name_the_dataset_and_not_its_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = {
            "benchmark": {"name": "knn", "k": [1]},
            "weights": "random",
            "trunk": {"name": "resnet_trunk", "depth": 18, "width": 0.125},
            "image_size": 32,
            "dataset": {"name": "imagenet", "root": str(imagenet(tmp_path))},
            "device": "cpu",
        }
        assert {record.dataset for record in run_benchmark(config)} == {"imagenet-partial"}
        monkeypatch.setattr(Official, "is_whole", lambda self, split, images, classes: split == "val")
        assert run_benchmark(config)[0].dataset == "imagenet-partial"  # the training split is a part
        monkeypatch.setattr(Official, "is_whole", lambda *arguments: True)
        assert run_benchmark(config)[0].dataset == "imagenet"
        assert run_benchmark({**config, "dataset_name": "mine"})[0].dataset == "mine"
        seen = run_benchmark({**config, "test_split": "train"})
        assert {record.dataset for record in seen} == {"imagenet (train to train)"}
        assert not [row for record in seen for row in published.matching("knn", "weighted_knn", record.dataset, "top1")]

    @pytest.mark.parametrize(
        ("folder", "recorded"),
        [("imagenet", "imagenet-folder"), ("voc2007", "voc2007-folder"), ("caltech", "caltech"), ("voc", "voc")],
    )
    def test_a_folder_of_the_same_name_does_not_pass_as_the_dataset(self, folder: str, recorded: str) -> None:
        for name in ("image_folder", "voc", "file_list"):
            assert dataset_name({"dataset": {"name": name, "root": f"photos/{folder}"}}) == recorded
        assert dataset_name({"dataset": {"name": "imagenet", "root": f"photos/{folder}"}}) == "imagenet"

    def test_workers_get_the_names_and_scan_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = build("imagenet", imagenet(tmp_path))
        packed = pickle.dumps(dataset)
        monkeypatch.setattr(os, "scandir", None)
        monkeypatch.setattr(scanning, "find_images", None)
        copy = pickle.loads(packed)
        assert copy[2][1] == 2
        assert shown(copy) == shown(dataset)
        assert copy.fingerprint == dataset.fingerprint

    def test_fingerprint_is_of_all_names_and_some_sizes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(benchmark_datasets, "_SAMPLED", 2)  # of three: the first and the last

        def fingerprint() -> str:
            return build("imagenet", tmp_path).fingerprint

        def grow(wnid: str) -> None:
            path = tmp_path / "train" / wnid / f"{wnid}_1.JPEG"
            path.write_bytes(path.read_bytes() + b"more")

        imagenet(tmp_path)
        first = fingerprint()
        assert first == build("imagenet", imagenet(tmp_path / "copy")).fingerprint
        grow(WNIDS[1])
        assert fingerprint() == first
        grow(WNIDS[2])
        assert fingerprint() != first
        second, folder = fingerprint(), tmp_path / "train" / WNIDS[1]
        os.rename(folder / f"{WNIDS[1]}_1.JPEG", folder / f"{WNIDS[1]}_2.JPEG")
        assert fingerprint() not in (first, second)


# -- Places205 and iNaturalist 2018 ------------------------------------------------------------------------------------


def places(root: Path, images: str = "data/vision/torralba/deeplearning/images256") -> Path:
    names = ["a/abbey/x.jpg", "b/bar/y.jpg", "a/apartment_building/outdoor/z.jpg"]
    for value, name in enumerate(names):
        paint(root / images / name, value)
    write(root / "trainvalsplit_places205/train_places205.csv", f"{names[2]} 1\n{names[0]} 0\n{names[1]} 2\n")
    write(root / "trainvalsplit_places205/val_places205.csv", f"{names[1]} 2\n")
    return root


class TestPlaces205:
    @pytest.mark.parametrize("images", ["data/vision/torralba/deeplearning/images256", "images256"])
    def test_as_downloaded(self, tmp_path: Path, images: str) -> None:
        dataset = build("places205", places(tmp_path, images))
        assert dataset.class_names == ["abbey", "apartment_building/outdoor", "bar"]
        assert shown(dataset) == [(2, "apartment_building/outdoor"), (0, "abbey"), (1, "bar")]
        assert build("places205", tmp_path, split="val").labels.tolist() == [2]

    def test_class_folders(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            paint(tmp_path / split / "bar" / "1.jpg", 1)
            paint(tmp_path / split / "abbey" / "1.jpg", 2)
        assert shown(build("places205", tmp_path, split="val")) == [(2, "abbey"), (1, "bar")]

    def test_letters_are_no_classes(self, tmp_path: Path) -> None:
        paint(tmp_path / "train" / "a" / "abbey" / "1.jpg")
        assert "are letters, not classes" in refusal("places205", tmp_path)

    def test_listed_images_that_are_not_there(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        places(tmp_path, "images256")
        os.unlink(tmp_path / "images256/b/bar/y.jpg")
        assert len(build("places205", tmp_path)) == 3
        assert "1 of 3 images listed in" in caplog.text
        said = refusal("places205", tmp_path, split="val")
        assert "None of 1 images listed in" in said
        assert "b/bar/y.jpg is missing" in said

    @pytest.mark.parametrize(("text", "message"), [("a/abbey/x.jpg\n", "line 1: expected"), ("\n", "is empty")])
    def test_damaged_lists(self, tmp_path: Path, text: str, message: str) -> None:
        places(tmp_path, "images256")
        write(tmp_path / "trainvalsplit_places205/train_places205.csv", text)
        with pytest.raises(ValueError, match=message):
            build("places205", tmp_path)


def inaturalist(root: Path) -> Path:
    """Two categories; the order of images, annotations and categories is not the same."""
    names = {7: "train_val2018/Aves/10/a.jpg", 3: "train_val2018/Fungi/9/b.jpg", 5: "train_val2018/Aves/10/c.jpg"}
    for value, name in names.items():
        paint(root / name, value)
    categories = [{"id": 10, "name": "a bird"}, {"id": 9, "name": "a mushroom"}]
    for split, ids in (("train", [7, 3]), ("val", [5])):
        images = [{"id": i, "file_name": names[i]} for i in ids]
        annotations = [{"id": i, "image_id": i, "category_id": 9 if i == 3 else 10} for i in sorted(ids)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / f"{split}2018.json", json.dumps(content))
    return root


class TestINaturalist2018:
    def test_as_downloaded(self, tmp_path: Path) -> None:
        dataset = build("inaturalist2018", inaturalist(tmp_path))
        assert dataset.class_names == ["a mushroom", "a bird"]  # by number
        assert shown(dataset) == [(7, "a bird"), (3, "a mushroom")]
        assert shown(build("inaturalist2018", tmp_path, split="val")) == [(5, "a bird")]

    def test_names_that_do_not_tell_categories_apart_give_way_to_their_numbers(self, tmp_path: Path) -> None:
        file = inaturalist(tmp_path) / "val2018.json"
        file.write_text(file.read_text().replace("a mushroom", "a bird"))
        assert build("inaturalist2018", tmp_path, split="val").class_names == ["9", "10"]

    def test_images_without_annotations(self, tmp_path: Path) -> None:
        os.unlink(inaturalist(tmp_path) / "val2018.json")
        said = refusal("inaturalist2018", tmp_path, split="val")
        assert "download and unpack val2018.json" in said

    def test_annotations_without_images(self, tmp_path: Path) -> None:
        inaturalist(tmp_path)
        os.rename(tmp_path / "train_val2018", tmp_path / "images")
        assert "a.jpg is missing" in refusal("inaturalist2018", tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "is damaged: "), ('{"images": []}', "no entry 'categories'"), ("[]", "is damaged")],
    )
    def test_damaged_annotations(self, tmp_path: Path, text: str, message: str) -> None:
        write(inaturalist(tmp_path) / "train2018.json", text)
        with pytest.raises(ValueError, match=message):
            build("inaturalist2018", tmp_path)

    def test_an_image_without_a_category(self, tmp_path: Path) -> None:
        file = inaturalist(tmp_path) / "train2018.json"
        file.write_text(file.read_text().replace('"image_id": 7', '"image_id": 8'))
        with pytest.raises(ValueError, match="no entry 7"):
            build("inaturalist2018", tmp_path)


# -- PASCAL VOC --------------------------------------------------------------------------------------------------------


def devkit(root: Path, year: str, splits: dict[str, list[str]], value: int = 0) -> Path:
    """A devkit of which every image shows a dog, the whole image; the class lists say that it is difficult."""
    home = root / "VOCdevkit" / year
    for offset, key in enumerate(sorted({key for keys in splits.values() for key in keys})):
        paint(home / "JPEGImages" / f"{key}.jpg", value + offset)
        box = f"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{3 + offset}</xmax><ymax>4</ymax></bndbox>"
        write(home / "Annotations" / f"{key}.xml", f"<annotation><object><name>dog</name>{box}</object></annotation>")
    for split, keys in splits.items():
        write(home / "ImageSets/Main" / f"{split}.txt", "".join(f"{key}\n" for key in keys))
        for name in VOC_CLASSES:
            label = 0 if name == "dog" else -1
            write(home / "ImageSets/Main" / f"{name}_{split}.txt", "".join(f"{key} {label}\n" for key in keys))
    return root


@pytest.fixture
def both(tmp_path: Path) -> Path:
    devkit(tmp_path, "VOC2007", {"trainval": ["000001", "000003"], "train": ["000001"], "test": ["000002"]}, 10)
    return devkit(tmp_path, "VOC2012", {"trainval": ["2008_1"], "train": ["2008_1"], "val": ["2008_1"]}, 20)


class TestVOC:
    def test_each_year_picks_its_own_devkit(self, both: Path) -> None:
        for root in (both, both / "VOCdevkit"):
            assert [build("voc2007", root).file_name(i) for i in range(2)] == [
                "JPEGImages/000001.jpg",
                "JPEGImages/000003.jpg",
            ]
            assert build("voc2012", root).file_name(0) == "JPEGImages/2008_1.jpg"
            with pytest.raises(ValueError, match="several VOC datasets.*or use dataset=voc2007"):
                build("voc", root)
        assert len(build("voc2007", both / "VOCdevkit" / "VOC2007", split="test")) == 1
        assert build("voc2007", both).record_name == "voc2007-partial"

    def test_the_other_years_devkit_alone(self, both: Path) -> None:
        said = refusal("voc2007", both / "VOCdevkit" / "VOC2012")
        assert "There is VOC2012: dataset=voc reads any devkit." in said

    def test_a_split_whose_archive_is_missing(self, both: Path) -> None:
        os.unlink(both / "VOCdevkit/VOC2007/ImageSets/Main/test.txt")
        assert "unpack the archive that holds this split, too" in refusal("voc2007", both, split="test")
        assert "unpack the archive that holds this split, too" in refusal("voc0712", both, split="test")

    def test_the_same_year_twice(self, both: Path) -> None:
        devkit(both / "copy", "VOC2007", {"test": ["000002"]})
        os.rename(both / "VOCdevkit", both / "first")
        os.rename(both / "copy" / "VOCdevkit", both / "second")
        assert len(build("voc2007", both)) == 2  # one of them has the split
        assert "test split 2 times" in refusal("voc2007", both, split="test")

    def test_both_years_as_one(self, both: Path) -> None:
        dataset = build("voc0712", both)
        names = ["VOC2007/JPEGImages/000001.jpg", "VOC2007/JPEGImages/000003.jpg", "VOC2012/JPEGImages/2008_1.jpg"]
        assert [dataset.file_name(i) for i in range(3)] == [f"VOCdevkit/{name}" for name in names]
        assert [dataset[i][0].getpixel((0, 0))[0] for i in range(3)] == [10, 12, 20]
        dog = VOC_CLASSES.index("dog")
        assert dataset.class_names == VOC_CLASSES
        assert dataset.multi_labels.shape == (3, 20)
        assert dataset.multi_labels[:, dog].tolist() == [0, 0, 0]
        assert (dataset.multi_labels != -1).sum() == 3
        assert [dataset.boxes(i)["boxes"][0, 2] for i in range(3)] == [3, 5, 3]
        with pytest.raises(IndexError):
            dataset.boxes(3)
        test = build("voc0712", both / "VOCdevkit", split="test")
        assert [test.file_name(i) for i in range(len(test))] == ["VOC2007/JPEGImages/000002.jpg"]
        assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint != test.fingerprint

    def test_both_years_need_both(self, both: Path) -> None:
        os.rename(both / "VOCdevkit" / "VOC2012", both / "elsewhere")
        assert "no folder VOC2012" in refusal("voc0712", both)

    def test_the_real_subset_is_a_part_of_voc2007(self, real_data: Path, tmp_path: Path) -> None:
        archive = real_data / "voc2007_subset.zip"
        if not archive.is_file():
            pytest.skip("needs voc2007_subset.zip in PIRL_REAL_DATA")
        root = unpacked(archive, tmp_path)
        train, test = build("voc2007", root), build("voc2007", root, split="test")
        assert (len(train), len(test), train.record_name) == (240, 120, "voc2007-partial")
        assert (train.multi_labels == 0).sum() == 26
        assert sum(len(train.boxes(i)["boxes"]) for i in range(len(train))) == 777
        with pytest.raises(WrongLayoutError, match="no folder VOC2012"):
            build("voc0712", root)


def unpacked(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder
