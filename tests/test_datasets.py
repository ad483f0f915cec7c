"""Datasets from files: which images, under which ids, with which labels; and what an error tells its reader."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from classy_vision.dataset import build_dataset
from PIL import Image

import pirl_plugin.data  # noqa: F401
from pirl_plugin.schema import ConfigError


def paint(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path, format="PNG")


def grey(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def folder(root: Path, **arguments: object):
    return build_dataset({"name": "image_folder", "root": str(root), **arguments})


class TestImageFolder:
    def test_ids_follow_the_sorted_paths_and_classes_the_first_folders(self, tmp_path):
        for value, name in enumerate(["b/2.png", "a/x/1.PNG", "b/10.JPeG", "a-b/3.Webp", "c/4.tif"]):
            paint(tmp_path / name, value)
        for name in ("a/notes.txt", "LICENSE", "a/.hidden.png", ".git/5.png"):
            paint(tmp_path / name)
        dataset = folder(tmp_path)
        names = [dataset.file_name(i) for i in range(len(dataset))]
        assert names == ["a-b/3.Webp", "a/x/1.PNG", "b/10.JPeG", "b/2.png", "c/4.tif"]
        assert dataset.class_names == ["a", "a-b", "b", "c"]
        assert dataset.labels.tolist() == [1, 0, 2, 2, 3]
        assert dataset.labels.dtype == np.int64
        assert dataset.ignored_files == 3
        assert [(grey(image), image_id) for image, image_id in map(dataset.__getitem__, range(5))] == [
            (3, 0), (1, 1), (2, 2), (0, 3), (4, 4),
        ]  # fmt: skip

    def test_a_plain_folder_has_no_labels(self, tmp_path):
        paint(tmp_path / "1.png")
        paint(tmp_path / "sub" / "2.png")
        dataset = folder(tmp_path)
        assert len(dataset) == 2
        assert dataset.labels is None
        assert dataset.class_names == []
        with pytest.raises(ValueError, match="no boxes"):
            dataset.boxes(0)

    def test_split(self, tmp_path):
        paint(tmp_path / "train" / "cat" / "1.png", 1)
        paint(tmp_path / "test" / "dog" / "1.png", 2)
        assert folder(tmp_path, split="test").class_names == ["dog"]
        assert folder(tmp_path, split="test").file_name(0) == "dog/1.png"
        assert folder(tmp_path, split="train").fingerprint != folder(tmp_path, split="test").fingerprint

    def test_all_splits_at_once_keep_their_classes_and_warn(self, tmp_path, caplog):
        for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png"):
            paint(tmp_path / name)
        dataset = folder(tmp_path)
        assert dataset.class_names == ["cat", "dog"]
        assert dataset.labels.tolist() == [0, 0, 1]
        assert "name one with split=" in caplog.text

    def test_links_are_followed_and_loops_end(self, tmp_path):
        paint(tmp_path / "elsewhere" / "2.png", 2)
        paint(tmp_path / "root" / "a" / "1.png", 1)
        (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root", target_is_directory=True)
        (tmp_path / "root" / "a" / "dangling.png").symlink_to(tmp_path / "nothing.png")
        dataset = folder(tmp_path / "root")
        assert [dataset.file_name(i) for i in range(len(dataset))] == ["a/1.png", "b/2.png"]
        assert dataset.labels.tolist() == [0, 1]

    def test_fingerprint_is_of_names_and_sizes_not_of_the_place(self, tmp_path):
        for root in ("one", "two"):
            paint(tmp_path / root / "a" / "1.png", 1)
        one, two = (folder(tmp_path / root).fingerprint for root in ("one", "two"))
        assert one == two
        assert len(one) == 64
        os.rename(tmp_path / "two/a/1.png", tmp_path / "two/a/2.png")
        assert folder(tmp_path / "two").fingerprint != one
        with open(tmp_path / "one/a/1.png", "ab") as file:
            file.write(b"more")
        assert folder(tmp_path / "one").fingerprint != one

    def test_cache_keeps_pixels_and_does_not_travel(self, tmp_path):
        paint(tmp_path / "1.png", 7)
        dataset = folder(tmp_path, cache_in_memory=True)
        assert grey(dataset[0][0]) == 7
        dataset[0][0].putpixel((0, 0), (0, 0, 0))  # whoever changes an image changes a copy
        copy = pickle.loads(pickle.dumps(dataset))
        (tmp_path / "1.png").unlink()
        assert grey(dataset[0][0]) == 7
        with pytest.raises(ValueError, match="None of the 1 images"):
            copy[0]

    @pytest.mark.parametrize("image_id", [-1, 3])
    def test_ids_outside(self, tmp_path, image_id):
        for name in "123":
            paint(tmp_path / f"{name}.png")
        with pytest.raises(IndexError, match=f"{image_id} is outside the dataset .3 images, valid 0..2."):
            folder(tmp_path)[image_id]


class TestUnreadable:
    def test_the_next_readable_image_stands_in_under_its_own_id(self, tmp_path, caplog):
        for value in range(5):
            paint(tmp_path / f"{value}.png", value)
        for broken in (1, 2, 4):
            (tmp_path / f"{broken}.png").write_bytes(b"broken")
        dataset = folder(tmp_path)
        got = [(grey(image), image_id) for image, image_id in map(dataset.__getitem__, range(5))]
        assert got == [(0, 0), (3, 3), (3, 3), (3, 3), (0, 0)]
        assert sorted(dataset.unreadable) == [1, 2, 4]
        assert "not an image" in dataset.unreadable[2]
        assert caplog.text.count("2.png") == 1  # told once, not at every visit

    def test_a_known_unreadable_image_is_not_opened_again(self, tmp_path):
        for value in range(2):
            paint(tmp_path / f"{value}.png", value)
        dataset = folder(tmp_path)
        good = (tmp_path / "0.png").read_bytes()
        (tmp_path / "0.png").write_bytes(b"")
        assert dataset[0][1] == 1
        (tmp_path / "0.png").write_bytes(good)
        assert dataset[0][1] == 1

    def test_all_unreadable(self, tmp_path):
        for name in "123":
            (tmp_path / f"{name}.jpg").write_bytes(b"")
        with pytest.raises(ValueError, match=r"None of the 3 images of ImageFolder can be read.*2.jpg.*empty"):
            folder(tmp_path)[1]


class TestErrors:
    def test_missing_root_suggests_the_near_name(self, tmp_path):
        (tmp_path / "images").mkdir()
        with pytest.raises(FileNotFoundError, match="has no 'imagse'. Did you mean 'images'?"):
            folder(tmp_path / "imagse" / "train")

    def test_empty_folder_says_what_there_is(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(ValueError, match=r"No images under .*found 0 files of type jpg.*\(1 other files, e.g. no"):
            folder(tmp_path)

    def test_root_is_a_file(self, tmp_path):
        (tmp_path / "data.zip").write_text("x")
        with pytest.raises(ValueError, match="data.zip is a file: give its folder"):
            folder(tmp_path / "data.zip")

    def test_missing_split_lists_the_folders(self, tmp_path):
        paint(tmp_path / "train" / "1.png")
        paint(tmp_path / "val" / "1.png")
        with pytest.raises(FileNotFoundError, match="No split 'test'.*Folders in .*: train, val"):
            folder(tmp_path, split="test")
        with pytest.raises(FileNotFoundError, match="has one: set root to that"):
            folder(tmp_path / "train", split="val")

    def test_wrong_arguments_are_refused_together(self):
        with pytest.raises(ConfigError) as caught:
            build_dataset({"name": "image_folder", "rot": "/x", "cache_in_memory": "yes"})
        assert {problem.path for problem in caught.value.problems} == {"rot", "root", "cache_in_memory"}


class TestFileList:
    def test_paths_are_relative_to_the_list_or_to_the_root(self, tmp_path):
        paint(tmp_path / "images" / "# 1.png", 1)
        paint(tmp_path / "images" / "b.png", 2)
        (tmp_path / "images" / "list.txt").write_text("b.png\n\n# 1.png\n")
        (tmp_path / "list.txt").write_text("b.png\r\n# 1.png\r\n")
        inside = build_dataset({"name": "file_list", "path": str(tmp_path / "images/list.txt")})
        outside = build_dataset(
            {"name": "file_list", "path": str(tmp_path / "list.txt"), "root": str(tmp_path / "images")}
        )
        for dataset in (inside, outside):
            assert [grey(dataset[i][0]) for i in range(len(dataset))] == [2, 1]
            assert dataset.labels is None
        assert inside.fingerprint == outside.fingerprint

    def test_labels_and_splits(self, tmp_path):
        for name in ("a b.png", "c.png", "d.png"):
            paint(tmp_path / name)
        (tmp_path / "train.txt").write_text("a b.png\t10\nc.png\t9\nd.png\t10\n")
        dataset = build_dataset({"name": "file_list", "path": str(tmp_path / "{split}.txt"), "split": "train"})
        assert dataset.class_names == ["9", "10"]
        assert dataset.labels.tolist() == [1, 0, 1]
        with pytest.raises(FileNotFoundError, match=r"test.txt"):
            build_dataset({"name": "file_list", "path": str(tmp_path / "{split}.txt"), "split": "test"})
        with pytest.raises(ValueError, match="split='test'"):
            build_dataset({"name": "file_list", "path": str(tmp_path / "train.txt"), "split": "test"})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.png\tcat\na.png\n", "line 2: some lines have a label"),
            ("a.png\na.png\tcat\n", "line 2: some lines have a label"),
            ("\n\n", "lists no images"),
            ("x.png\ny.png\n", "None of the first 2 images"),
        ],
    )
    def test_wrong_lists(self, tmp_path, text, message):
        paint(tmp_path / "a.png")
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build_dataset({"name": "file_list", "path": str(tmp_path / "list.txt")})


def annotation(*objects: tuple) -> str:
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
        for name, difficult, x0, y0, x1, y1 in objects
    )
    return f"<annotation>{items}</annotation>"


@pytest.fixture
def devkit(tmp_path):
    """Three images; the third has no object but a difficult dog."""
    home = tmp_path / "VOCdevkit" / "VOC2007"
    for directory in ("Annotations", "ImageSets/Main"):
        (home / directory).mkdir(parents=True)
    for value, key in enumerate(("000001", "000002", "000003")):
        paint(home / "JPEGImages" / f"{key}.png", value)
    contents = [
        annotation(("dog", 0, 1, 1, 4, 4), ("dog", 1, 2, 3, 4, 4), ("cat", 0, 1.5, 2, 3, 4)),
        annotation(),
        annotation(("dog", 1, 1, 1, 2, 2)),
    ]
    for key, content in zip(("000001", "000002", "000003"), contents, strict=True):
        (home / "Annotations" / f"{key}.xml").write_text(content)
    (home / "ImageSets/Main/train.txt").write_text("000003\n000001\n")
    (home / "ImageSets/Main/cat_train.txt").write_text("000003 -1\n000001  1\n")
    return tmp_path


def voc(root: Path, **arguments: object):
    return build_dataset({"name": "voc", "root": str(root), **arguments})


class TestVOC:
    @pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
    def test_root_may_be_above(self, devkit, below):
        assert len(voc(devkit / below)) == 3

    def test_split_gives_the_order(self, devkit):
        dataset = voc(devkit, split="train")
        assert [grey(dataset[i][0]) for i in range(2)] == [2, 0]
        assert dataset.file_name(0) == "JPEGImages/000003.png"
        with pytest.raises(FileNotFoundError, match="No split 'test'.*Splits in .*: train\\."):
            voc(devkit, split="test")

    def test_multi_labels_from_annotations(self, devkit):
        dataset = voc(devkit)
        assert len(dataset.class_names) == 20
        cat, dog = dataset.class_names.index("cat"), dataset.class_names.index("dog")
        assert dataset.multi_labels[:, cat].tolist() == [1, -1, -1]
        assert dataset.multi_labels[:, dog].tolist() == [1, -1, 0]
        assert dataset.multi_labels.dtype == np.int8
        assert (dataset.multi_labels != -1).sum() == 3

    def test_the_devkits_lists_win_over_the_annotations(self, devkit):
        main = devkit / "VOCdevkit/VOC2007/ImageSets/Main"
        for name in voc(devkit).class_names:
            (main / f"{name}_train.txt").write_text("000001 -1\n000003 0\n")
        dataset = voc(devkit, split="train")
        assert dataset.multi_labels.tolist() == [[0] * 20, [-1] * 20]
        (main / "dog_train.txt").write_text("000001 -1\n")
        with pytest.raises(ValueError, match="dog_train.txt has no label for 1 images.*000003"):
            voc(devkit, split="train").multi_labels  # noqa: B018
        (main / "dog_train.txt").write_text("000001 yes\n")
        with pytest.raises(ValueError, match="dog_train.txt, line 1"):
            voc(devkit, split="train").multi_labels  # noqa: B018

    def test_boxes_count_from_zero(self, devkit):
        objects = voc(devkit).boxes(0)
        assert objects["boxes"].tolist() == [[0, 0, 4, 4], [1, 2, 4, 4], [0.5, 1, 3, 4]]
        assert objects["boxes"].dtype == np.float32
        assert [voc(devkit).class_names[label] for label in objects["labels"]] == ["dog", "dog", "cat"]
        assert objects["difficult"].tolist() == [False, True, False]
        assert voc(devkit).boxes(1)["boxes"].shape == (0, 4)

    def test_other_classes_than_vocs(self, devkit):
        home = devkit / "VOCdevkit/VOC2007/Annotations"
        (home / "000002.xml").write_text(annotation(("WBC", 0, 1, 1, 2, 2)))
        assert voc(devkit).class_names == ["WBC", "cat", "dog"]
        assert voc(devkit, split="train").class_names == ["WBC", "cat", "dog"]  # the same in all splits

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("<annotation>", "Damaged annotation"),
            (annotation(("dog", 0, "x", 1, 2, 2)), "<bndbox/xmin> must be a number, got 'x'"),
            ("<annotation><object><name>dog</name></object></annotation>", "no <bndbox/xmin>"),
        ],
    )
    def test_damaged_annotations(self, devkit, content, message):
        (devkit / "VOCdevkit/VOC2007/Annotations/000001.xml").write_text(content)
        with pytest.raises(ValueError, match=message):
            voc(devkit).boxes(0)

    def test_a_box_of_one_pixel_is_a_box_and_a_reversed_one_is_not(self, devkit):
        home = devkit / "VOCdevkit/VOC2007/Annotations"
        (home / "000001.xml").write_text(annotation(("dog", 0, 2, 3, 2, 3)))
        assert voc(devkit).boxes(0)["boxes"].tolist() == [[1, 2, 2, 3]]
        (home / "000001.xml").write_text(annotation(("dog", 0, 1, 1, 2, 2), ("dog", 0, 3, 1, 2, 2)))
        with pytest.raises(ValueError, match=r"000001.xml: a box ends before it begins, .* = \[3.0, 1.0, 2.0, 2.0\]"):
            voc(devkit).boxes(0)

    def test_a_class_that_the_devkits_lists_do_not_know(self, devkit):
        main = devkit / "VOCdevkit/VOC2007/ImageSets/Main"
        for name in voc(devkit).class_names:
            (main / f"{name}_train.txt").write_text("000001 -1\n000003 0\n")
        (devkit / "VOCdevkit/VOC2007/Annotations/000001.xml").write_text(annotation(("wolf", 0, 1, 1, 2, 2)))
        with pytest.raises(ValueError, match="000001.xml: class 'wolf' is none of aeroplane, .*tvmonitor"):
            voc(devkit, split="train").boxes(1)

    def test_a_split_whose_images_are_not_there(self, devkit, caplog):
        home = devkit / "VOCdevkit/VOC2007"
        (home / "ImageSets/Main/test.txt").write_text("000008\n000009\n")
        with pytest.raises(ValueError, match="2 of the 2 images of split test are not in .*e.g. 000008"):
            voc(devkit, split="test")
        (home / "ImageSets/Main/test.txt").write_text("000008\n000001\n")
        assert voc(devkit, split="test")[0][1] == 1
        assert "1 of the 2 images of split test are not in" in caplog.text

    def test_blood_cells(self, real_data, tmp_path):
        """BCCD: classes of its own, no class lists, and two boxes whose corners are one and the same pixel."""
        archive = real_data / "bccd_voc.zip"
        if not archive.is_file():
            pytest.skip("needs bccd_voc.zip in PIRL_REAL_DATA")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path, [name for name in packed.namelist() if "JPEGImages" not in name])
            for name in packed.namelist():
                if "JPEGImages/Blood" in name:
                    paint(tmp_path / name)
        trainval, test = voc(tmp_path, split="trainval"), voc(tmp_path, split="test")
        assert trainval.class_names == test.class_names == ["Platelets", "RBC", "WBC"]
        assert (len(trainval), len(test)) == (292, 72)
        objects = [part.boxes(i) for part in (trainval, test) for i in range(len(part))]
        counts = np.bincount(np.concatenate([found["labels"] for found in objects]))
        assert counts.tolist() == [361, 4155, 372]
        boxes = np.concatenate([found["boxes"] for found in objects])
        assert ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) == 1).sum() == 2
        assert trainval.multi_labels.shape == (292, 3)
        assert set(np.unique(trainval.multi_labels)) == {-1, 1}

    def test_no_devkit_and_two_devkits(self, devkit):
        with pytest.raises(FileNotFoundError, match="expected JPEGImages, Annotations and ImageSets"):
            voc(devkit / "VOCdevkit/VOC2007/ImageSets")
        paint(devkit / "VOCdevkit/VOC2012/JPEGImages/1.png")
        with pytest.raises(ValueError, match=r"several VOC datasets.*VOC2007.*VOC2012"):
            voc(devkit)

    def test_real_annotations_agree_with_the_devkits_own_lists(self, real_data, tmp_path):
        """VOC2007: the per-class lists and the annotations are two statements of the same thing."""
        archive = real_data / "voc2007_subset.zip"
        if not archive.is_file():
            pytest.skip("needs voc2007_subset.zip in PIRL_REAL_DATA")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path)
        listed = voc(tmp_path, split="test")
        annotated = voc(tmp_path, split="test")
        annotated._class_lists = lambda classes: []
        assert (listed.multi_labels == 0).sum() == 13
        np.testing.assert_array_equal(listed.multi_labels, annotated.multi_labels)
