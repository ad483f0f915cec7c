"""What a plan will take, on hand-worked numbers."""

from __future__ import annotations

import json

import pytest
import yaml

from pirl_plugin.commands.sweep import load
from pirl_plugin.sweep.estimate import Estimate, estimate, table
from pirl_plugin.sweep.plan import Run

RUN = Run("a", "train", (), "a", "pirl_32", "", 0)
SETTINGS = ["method=pirl_32", "dataset=generated_scenes", "dataset.num_images=1000", "trunk=resnet18_narrow"]


def test_time_comes_from_finished_runs_disk_and_memory_from_the_shapes(tmp_path):
    config = load("train", [*SETTINGS, "num_epochs=36"])
    unknown = estimate(RUN, config, tmp_path)
    assert unknown.seconds is None
    bank = 1000 * config["loss"]["dim"] * 4
    assert unknown.disk is not None
    assert unknown.memory is not None
    parameters = (unknown.memory - bank) / 12
    assert parameters == int(parameters) > 100_000
    assert unknown.disk == config["checkpoint"]["keep"] * (8 * parameters + bank)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(yaml.safe_dump({"method": "pirl_32", "trunk": config["trunk"]}))
    (tmp_path / "x" / "metrics.jsonl").write_text(json.dumps({"images_per_second": 10.0}) + "\n")
    assert estimate(RUN, config, tmp_path).seconds == pytest.approx(3600)


def test_the_table_sums_what_is_known():
    lines = table([RUN, RUN], [Estimate(3600, 2e9, 1e9), Estimate()]).splitlines()
    assert lines[1].split()[-3:] == ["1.00", "2.00", "1.00"]
    assert lines[2].split()[-3:] == ["?", "?", "?"]
    assert lines[3].split()[-3:] == ["1.00", "2.00", "?"]
