"""The areas ``svm`` and ``views`` of ``tools/bench.py`` at tiny sizes: what they compare, and what they say of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pirl_plugin.benchmarks.svm.problem import SVMSettings
from pirl_plugin.data.reading import read_image
from pirl_plugin.speed import svm, views
from pirl_plugin.speed.measuring import Settings

QUICK = Settings(quick=True, repeats=1)


def test_svm_rows_compare_the_same_protocol(monkeypatch):
    """The plain way's two classes stand for four, at its own speed: twice its seconds."""
    monkeypatch.setattr(svm, "QUICK", svm.Sizes(train=120, test=60, dims=20, classes=4, plain_classes=2))
    asked = []
    real = svm.run

    def counted(task, classes, settings):
        asked.append((settings.solver, list(classes)))
        return real(task, classes, settings)

    monkeypatch.setattr(svm, "run", counted)
    monkeypatch.setattr(svm, "seconds_of", lambda work: work() or 3.0)
    rows = list(svm.rows(QUICK))
    assert asked == [("newton", [0, 1, 2, 3]), ("liblinear", [0, 3])] * 2
    for row in rows:
        assert (row.ours, row.theirs, row.ratio) == (3.0, 6.0, 2.0)
        assert "same cost in 2, mAP apart by" in row.detail
        assert abs(float(row.detail.split("by ")[1].split()[0])) < 0.1


def test_spectra_decay_as_they_say():
    sizes = svm.Sizes(train=400, test=100, dims=30, classes=3, plain_classes=1)
    tasks = {name: svm.make_task(sizes, decay) for name, decay in svm.SPECTRA.items()}
    shares = {}
    for name, task in tasks.items():
        centred = task.train - task.train.mean(axis=0)
        variances = np.linalg.eigvalsh(centred.T @ centred)  # ascending
        shares[name] = variances[-3:].sum() / variances.sum()
        assert task.test.shape == (100, 30)
        assert set(task.train_labels.ravel()) == {1, -1}
    assert shares["quickly"] > 2 * shares["slowly"]


def test_views_rows_name_both_sides(monkeypatch):
    monkeypatch.setattr(views, "_MADE", 2)
    monkeypatch.setattr(views, "_BATCH", 2)
    views._made.cache_clear()
    core, loader, without_colours = views.rows(QUICK)
    assert core.wanted == 4.5
    assert loader.wanted == 4
    on_cpu = views._colours_on(QUICK.device, views._files(QUICK), QUICK)  # asked for where there is a GPU
    assert (without_colours.wanted, on_cpu.what) == (None, "colours of a batch of 16 images on cpu")
    for row in (core, loader, without_colours, on_cpu):
        assert row.unit == "images/s"
        assert row.ratio == pytest.approx(row.ours / row.theirs)
    views.to_profile(QUICK)()
    views._made.cache_clear()


def test_given_files_are_taken_and_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no JPEG file"):
        list(views.rows(Settings(quick=True, repeats=1, images=tmp_path)))
    (tmp_path / "deeper").mkdir()
    for name in ("b.JPEG", "deeper/a.jpg", "c.png"):
        Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / name)
    files = views._files(Settings(images=tmp_path))
    assert [file.name for file in files] == ["b.JPEG", "a.jpg"]
    dataset = views._dataset(files)
    assert [dataset[image_id][0].size for image_id in range(2)] == [(40, 30)] * 2


def test_made_files_are_about_as_large_as_imagenets(tmp_path: Path):
    path = views._make(tmp_path / "0.jpg", seed=0)
    assert read_image(path).size == (500, 375)
    assert 50_000 < path.stat().st_size < 200_000


def test_the_profiled_svms_are_ours(monkeypatch):
    asked = []
    monkeypatch.setattr(svm, "QUICK", svm.Sizes(train=60, test=20, dims=8, classes=2, plain_classes=1))
    monkeypatch.setattr(svm, "run", lambda task, classes, settings: asked.append(settings))
    svm.to_profile(QUICK)()
    assert asked == [SVMSettings("newton", device="cpu")]
