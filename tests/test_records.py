"""Result records: what they refuse, reading them back, and facts about the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pirl_plugin import records
from pirl_plugin.records import Record

OK = Record("pirl", "linear", "small", "cifar10", {"layer": "res5"}, "top1", 43.25, "%", 0, extra={"l2": 0.01})


def test_design_keys_and_round_trip(tmp_path):
    records.write_record(OK, tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert set(content) == {
        *(
            "method",
            "benchmark",
            "protocol",
            "dataset",
            "setting",
            "metric",
            "value",
            "unit",
            "seed",
            "status",
            "reason",
        ),
        *("config_sha256", "weights_sha256", "commit", "seconds", "hardware", "extra"),
    }
    assert content["setting"] == {"layer": "res5"}
    assert records.read_records(tmp_path) == [OK]


def test_all_settings_of_a_run_are_read_once(tmp_path):
    other = Record(**{**OK.__dict__, "setting": {"layer": "res4"}})
    run, failed = tmp_path / "b" / "run", tmp_path / "a"
    run.mkdir(parents=True)
    failed.mkdir()
    records.write_record(OK, run / "result.json")
    records.write_records([OK, other], run / "results.jsonl")
    failure = Record(**{**OK.__dict__, "value": None, "status": "failed", "reason": "no images"})
    records.write_record(failure, failed / "result.json")
    assert records.read_records(tmp_path) == [failure, OK, other]


@pytest.mark.parametrize(
    "change",
    [
        {"value": None},
        {"value": float("nan")},
        {"status": "failed"},
        {"status": "failed", "value": None},
        {"status": "failed", "reason": "x"},
        {"status": "skipped"},
    ],
)
def test_no_fake_numbers(change):
    with pytest.raises(ValueError, match="status|finite|failure"):
        Record(**{**OK.__dict__, **change})


def test_broken_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "result.json"
    for text in ("{", "[1]", '{"method": "pirl"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="result.json.*not a result record"):
            records.read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        records.read_records(tmp_path / "nowhere")


def test_keys_of_a_later_version_are_kept_in_extra(tmp_path):
    records.write_record(OK, tmp_path / "result.json")
    content = {**json.loads((tmp_path / "result.json").read_text()), "energy_kwh": 2}
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert records.read_records(tmp_path)[0].extra == {"l2": 0.01, "energy_kwh": 2}


def test_config_hash_ignores_order_and_output_folder_only():
    digest = records.config_sha256({"a": 1, "b": {"c": [1, 2]}, "run_dir": "x"})
    assert digest == records.config_sha256({"b": {"c": [1, 2]}, "a": 1, "run_dir": "y"})
    assert digest != records.config_sha256({"a": 1, "b": {"c": [2, 1]}})


def test_environment_is_json_and_names_the_machine():
    facts = json.loads(json.dumps(records.environment()))
    assert facts["hardware"]["cores"] >= 1
    assert facts["versions"]["classy-vision"].startswith("0.7")
    assert "cores of" in records.hardware_name() or " x " in records.hardware_name()


def test_records_do_not_import_torch():
    """The report reads records; it must start fast and run where torch is not installed."""
    source = records.__file__
    code = (
        "import sys, types; package = types.ModuleType('pirl_plugin'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['pirl_plugin'] = package; import pirl_plugin.records as r; r.environment(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, source.rpartition("/")[0]], check=True)
