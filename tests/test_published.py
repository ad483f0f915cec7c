"""Published numbers: as their sources have them, never an unverified one, never under another protocol."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from pirl_plugin import published
from pirl_plugin.commands.published import main
from pirl_plugin.published import BENCHMARKS, Published, available, beside, listed, matching, related, results, rows
from pirl_plugin.published.attribution import ATTRIBUTIONS, CONFLICTS
from pirl_plugin.records import Record
from pirl_plugin.registry import REGISTRIES
from pirl_plugin.schema import parameters

TABLE = Path(published.__file__).with_name("published_results.csv")
PIRL = "PIRL paper (arXiv 1912.01991)"
DETECTRON2 = {"engine": "detectron2", "rule": "eleven_point", "train_set": "voc07+12"}


def record(benchmark: str, protocol: str, dataset: str, metric: str, value: float, **more: typing.Any) -> Record:
    setting = more.pop("setting", {"layer": "res5"})
    method = more.pop("method", "pirl")
    trunk = {"trunk": {"name": "resnet_trunk", "depth": 50}}
    return Record(method, benchmark, protocol, dataset, setting, metric, value, "%", 0, extra=trunk, **more)


def value(found: list[Published], method: str, source: str, **setting: object) -> float:
    (row,) = (
        row
        for row in found
        if (row.method, row.source) == (method, f"{PIRL} {source}")
        and row.trunk == "R50"
        and row.pretrain_data == "ImageNet-1K"
        and all(row.setting.get(key) == wanted for key, wanted in setting.items())
    )
    return row.value


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_row_is_verified_and_has_a_source() -> None:
    with open(TABLE, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("method", "trunk", "pretrain_data", "epochs", "benchmark", "layer_or_setting", "metric", "value"),
        *("source", "verified"),
    ]
    assert len(lines) == 1319 == len(rows())
    assert {line["verified"] for line in lines} == {"yes"}
    assert all(line["source"].strip() and line["method"].strip() for line in lines)
    assert all(row.source and row.method for row in rows())


def test_what_was_only_remembered_is_not_there() -> None:
    """Goyal et al.'s VOC07 table by layers, MoCo's AP and AP75 on VOC07, NPID's 46.5: no text of theirs was found."""
    assert not [row for row in rows() if "recalled" in row.source]
    assert not [row for row in rows("voc07_svm") if row.layer_or_setting in ("conv1", "res2", "res3", "res4", "res5")]
    moco = [row for row in rows("detection_voc", "voc2007", "MoCo v1") if row.source.startswith("MoCo")]
    assert {(row.metric, row.value) for row in moco} == {("AP50", 75.6)}
    assert 46.5 not in {row.value for row in rows("knn", "imagenet", "NPID")}


def test_the_table_is_the_reference_without_its_unverified_rows() -> None:
    reference = Path(__file__).parents[1].parent / "shared" / "reference" / "published_results.csv"
    if not reference.is_file():
        pytest.skip("the reference table is not here: ../shared/reference does not exist")
    with open(reference, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    with open(TABLE, encoding="utf-8", newline="") as file:
        ours = list(csv.reader(file))
    assert len(lines) - len(ours) == 56
    assert ours == [line for line in lines if line[-1] in ("verified", "yes")]


@pytest.mark.parametrize(
    ("method", "ap", "ap50", "ap75"),
    [
        ("Supervised", 52.6, 81.1, 57.4),
        ("Jigsaw (Goyal19)", 48.9, 75.1, 52.9),
        ("NPID++", 52.3, 79.1, 56.9),
        ("PIRL", 54.0, 80.7, 59.7),
    ],
)
def test_pirl_table_1(method: str, ap: float, ap50: float, ap75: float) -> None:
    protocol = "paper" if method in ("PIRL", "NPID++") else "paper_supervised"  # their learning rates differ
    for metric, printed in (("AP", ap), ("AP50", ap50), ("AP75", ap75)):
        found = matching("detection_voc", protocol, "voc0712", metric, DETECTRON2)
        assert value(found, method, "Table 1") == printed
    assert method not in {row.method for row in matching("detection_voc", "vissl", "voc0712", "AP", DETECTRON2)}


@pytest.mark.parametrize(
    ("method", "imagenet", "voc07", "places205", "inaturalist2018"),
    [
        ("Supervised", 75.9, 87.5, 51.5, 45.4),
        ("Rotation", 48.9, 63.9, 41.4, 23.0),
        ("NPID++", 59.0, 76.6, 46.4, 32.4),
        ("Jigsaw (Goyal19)", 45.7, 64.5, 41.2, 21.3),
        ("PIRL", 63.6, 81.1, 49.8, 34.1),
    ],
)
def test_pirl_table_2(method: str, imagenet: float, voc07: float, places205: float, inaturalist2018: float) -> None:
    for dataset, printed in (("imagenet", imagenet), ("places205", places205), ("inaturalist2018", inaturalist2018)):
        assert value(matching("linear", "paper", dataset, "top1"), method, "Table 2", layer="best") == printed
    assert value(matching("voc07_svm", "goyal19", "voc2007", "mAP"), method, "Table 2", layer="best") == voc07


@pytest.mark.parametrize(
    ("method", "one", "ten"),
    [("NPID", 39.2, 77.4), ("Jigsaw (Goyal19)", 45.3, 79.3), ("NPID++", 52.6, 81.5), ("PIRL", 57.2, 83.8)],
)
def test_pirl_table_3(method: str, one: float, ten: float) -> None:
    for fraction, listed_in, printed in ((0.01, "1percent.txt", one), (0.1, "my10percent.txt", ten)):
        for setting in ({"fraction": fraction, "sampling": "random"}, {"sampling": "list", "list": listed_in}):
            found = matching("semi_supervised", "paper", "imagenet", "top5", setting)
            assert value(found, method, "Table 3") == printed
    assert matching("semi_supervised", "paper", "imagenet", "top5", {"sampling": "list", "list": "mine.txt"}) == []


def test_pirl_table_7_by_layers() -> None:
    layers = {"conv1": 6.2, "res2": 30.0, "res3": 40.1, "res4": 56.6, "res5": 63.6}
    for layer, printed in layers.items():
        found = matching("linear", "paper", "imagenet", "top1", {"layer": layer})
        assert value(found, "PIRL", "Table 7", layer=layer) == printed
        assert {row.setting["layer"] for row in found} == {layer, "best"}
    found = matching("linear", "paper", "imagenet", "top1", {"layer": "best_on_test"})
    assert {row.setting["layer"] for row in found} == {"best"}


# -- what may stand beside what ----------------------------------------------------------------------------------------

QUESTIONS = [
    (benchmark, dataset, metric)
    for benchmark, dataset in BENCHMARKS
    for metric in sorted({row.metric for row in rows(benchmark, dataset)})
]
PROTOCOLS = sorted({statement.protocol for statements in ATTRIBUTIONS.values() for statement in statements})


@pytest.mark.parametrize(("benchmark", "dataset", "metric"), QUESTIONS)
def test_a_number_has_one_protocol_at_most(benchmark: str, dataset: str, metric: str) -> None:
    seen: dict[Published, str] = {}
    for protocol in PROTOCOLS:
        same, other = (ask(benchmark, protocol, dataset, metric) for ask in (matching, related))
        assert not set(same) & set(other)
        assert {row.protocol for row in same} <= {protocol}
        assert protocol not in {row.protocol for row in other}
        assert {row.metric for row in same + other} <= {metric}
        assert all(row.benchmark in BENCHMARKS[benchmark, dataset] for row in same + other)
        for row in same:
            assert seen.setdefault(row, protocol) == protocol


@pytest.mark.parametrize(
    "protocol", ["", "small", "paper*", "paper*(num_epochs=2)", "custom", "Paper", "goyal19_cached"]
)
def test_nothing_is_published_under_a_changed_protocol(protocol: str) -> None:
    for benchmark, dataset, metric in QUESTIONS:
        assert matching(benchmark, protocol, dataset, metric) == []
    assert related("linear", protocol, "imagenet", "top1")


@pytest.mark.parametrize("dataset", ["imagenet-partial", "voc2007-partial", "generated_scenes", "caltech101_subset"])
def test_nothing_is_published_on_other_images(dataset: str) -> None:
    assert matching("linear", "paper", dataset, "top1") == related("linear", "paper", dataset, "top1") == []


def test_what_cannot_be_attributed_stands_apart() -> None:
    same = {(row.method, row.value) for row in matching("linear", "paper", "imagenet", "top1")}
    other = {(row.method, row.value) for row in related("linear", "paper", "imagenet", "top1")}
    for apart in [
        ("MoCo v1", 60.6),  # made with MoCo's own classifier
        ("AMDIM", 68.1),  # quoted
        ("NPID (other setup)", 54.0),
        ("PIRL", 64.29),  # VISSL's
        ("PIRL-ens", 65.7),
        ("DeepCluster", 34.1),  # another trunk, from another paper
    ]:
        assert apart in other - same
    assert ("PIRL", 63.6) in same
    assert not {method for method, _ in same | other if "delta" in method}


def test_other_protocols_of_linear() -> None:
    vissl = {(row.method, row.value) for row in matching("linear", "vissl", "imagenet", "top1")}
    assert {("PIRL", 64.29), ("PIRL", 62.55), ("NPID++", 56.68)} <= vissl
    assert not {method for method, _ in vissl} & {"MoCo-v2", "Barlow Twins", "SEER"}  # another recipe, or none stated
    moco = matching("linear", "moco", "imagenet", "top1", {"layer": "res5"})
    assert {("MoCo v1", 60.6), ("MoCo v2", 71.1), ("MoCo-v2", 66.4)} <= {(row.method, row.value) for row in moco}
    (spread,) = (row for row in moco if row.deviation and row.method == "MoCo v1")
    assert (spread.value, spread.deviation) == (60.8, 0.2)
    assert matching("linear", "moco", "imagenet", "top1", {"layer": "res4"}) == []
    assert ("SwAV", 75.3) in {(row.method, row.value) for row in matching("linear", "swav", "imagenet", "top1")}


def test_settings_must_agree() -> None:
    embedding = {"k": 200, "temperature": 0.07, "features": "embedding"}
    found = matching("knn", "weighted_knn", "imagenet", "top1", embedding)
    assert {(row.trunk, row.value) for row in found} >= {("R18", 40.5), ("R50", 42.5)}
    for change in ({"k": 20}, {"temperature": 0.1}, {"features": "trunk"}):
        assert matching("knn", "weighted_knn", "imagenet", "top1", {**embedding, **change}) == []
    shots = related("voc07_low_shot_svm", "vissl", "voc2007", "mAP", {"layer": "res5", "k": 16})
    assert {row.benchmark for row in shots} == {"VOC07 low-shot SVM k=16"}
    one = related("semi_supervised", "paper", "imagenet", "top5", {"fraction": 0.01})
    assert {row.benchmark for row in one} == {"ImageNet semi-sup 1%"}


def test_detection_by_another_engine_or_rule_stands_apart() -> None:
    for change in ({"engine": "torchvision"}, {"rule": "interpolated"}):
        setting = {**DETECTRON2, **change}
        assert matching("detection_voc", "paper", "voc0712", "AP50", setting) == []
        assert ("PIRL", 80.7) in {
            (row.method, row.value) for row in related("detection_voc", "paper", "voc0712", "AP50", setting)
        }


def test_a_number_of_two_tables_comes_once() -> None:
    found = [row for row in matching("linear", "paper", "imagenet", "top1") if row.method == "PIRL (Jigsaw)"]
    assert [row.value for row in found] == [62.2]
    apart = related("linear", "paper", "imagenet", "top1")
    assert not [row for row in apart if row.method == "PIRL (Jigsaw)"]


def test_every_statement_speaks_of_some_row() -> None:
    """All of its words are some row's: a misspelt one would silently attribute nothing."""
    statements = [statement for of_it in ATTRIBUTIONS.values() for statement in of_it]
    for statement in statements:
        held = {
            (row.method, row.layer_or_setting)
            for row in rows()
            if statement in ATTRIBUTIONS.get(row.benchmark, ())
            and statement.holds(row.method, row.trunk, row.layer_or_setting, row.source)
        }
        assert held, statement
        assert {method for method, _ in held} >= set(statement.methods or ()), statement
    everywhere = {row.layer_or_setting for row in rows()}
    assert {text for statement in statements for text in statement.settings} <= everywhere
    assert {method for statement in statements for method in statement.without} <= {row.method for row in rows()}


def test_every_protocol_is_one_of_the_benchmarks() -> None:
    named = {(benchmark, row.protocol) for benchmark, dataset in BENCHMARKS for row in rows(benchmark, dataset)}
    for benchmark, protocol in named:
        cls = REGISTRIES["benchmark"].get(benchmark)
        if protocol is None or cls is None or "protocol" not in parameters(cls):
            continue
        assert protocol in typing.get_args(parameters(cls)["protocol"][0]), (benchmark, protocol)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_measured_and_published_stand_in_one_table() -> None:
    text = beside([record("linear", "paper", "imagenet", "top1", 61.234)])
    lines = text.splitlines()
    assert lines[0] == "linear on imagenet, protocol paper"
    assert lines[1].split() == ["method", "trunk", "pretrained", "on", "epochs", "setting", "top1", "%", "source"]
    assert re.match(r"  measured +pirl +ResNet-50 +layer=res5 +61.23 +seed 0$", lines[2])
    apart = next(index for index, line in enumerate(lines) if line.startswith("NOT comparable"))
    shown = re.sub(" +", " ", "\n".join(lines[:apart]))
    assert f"published PIRL R50 ImageNet-1K 800 best layer; setup of Goyal19 63.6 {PIRL} Table 2" in shown
    assert f"published NPID++ R50 ImageNet-1K 800 res5 59.0 {PIRL} Table 7" in shown
    assert "64.29" not in shown
    assert "64.29" in "\n".join(lines[apart:])
    column = lines[2].index("61.23")
    assert lines[3][column : column + 4] == "63.6"  # the same method first, its number below the measured one
    assert "more: python tools/published.py benchmark=linear dataset=imagenet metric=top1" in text
    assert "Where sources differ:\n  - Supervised ResNet-50: ImageNet 75.9" in text


def test_a_changed_protocol_is_told_that_it_has_no_equal() -> None:
    text = beside([record("linear", "paper*(num_epochs=2)", "imagenet", "top1", 10.0)])
    assert "none under protocol paper*(num_epochs=2)" in text
    assert text.index("NOT comparable") < text.index("63.6")


def test_several_layers_of_a_run_share_a_table() -> None:
    found = [
        record("linear", "paper", "places205", "top1", 40.0, setting={"layer": layer}) for layer in ("res4", "res5")
    ]
    text = beside(found)
    assert text.count("linear on places205") == 1
    assert text.count("  measured ") == 2
    printed = [line.split() for line in text.splitlines() if "  published  PIRL " in line and "Table 7" in line]
    assert [line[4] for line in printed] == ["800", "800"]
    assert [line[5:7] for line in printed] == [["res4", "45.3"], ["res5", "49.8"]]


def test_another_rule_of_the_same_run_does_not_share_the_published_numbers() -> None:
    settings = [{**DETECTRON2, "rule": rule} for rule in ("eleven_point", "interpolated")]
    text = beside([record("detection_voc", "paper", "voc0712", "AP50", 80.0, setting=setting) for setting in settings])
    first, second = text.split("\n\n")
    assert first.index("80.7") < first.index("NOT comparable")
    assert first.count("80.7") == 1
    assert second.index("none under protocol paper") < second.index("NOT comparable") < second.index("80.7")


def test_nothing_published() -> None:
    text = beside([record("linear", "small", "generated_scenes", "top1", 50.0), record("rankme", "", "x", "rank", 9.0)])
    assert text == "No published numbers for linear on generated_scenes, rankme on x."
    failed = Record("pirl", "linear", "paper", "imagenet", {}, "", None, "", 0, status="failed", reason="x")
    assert beside([failed]) == "No published numbers for linear on imagenet."
    assert beside([]) == "No published numbers for no results."


def test_listed_by_protocol_with_sources() -> None:
    text = listed("linear", "imagenet", "pirl")
    heads = [line for line in text.splitlines() if not line.startswith(" ") and line]
    assert heads == [
        "protocol paper",
        "protocol vissl",
        "under none of our protocols, as far as their sources say",
        "Where sources differ:",
    ]
    assert text.count(f"{PIRL} Table 7") == 5
    assert "MoCo" not in text
    assert listed("linear", "imagenet", "nobody") == "No published numbers for this choice."


def test_numbers_in_the_remarks_stand_in_the_table() -> None:
    for conflict in CONFLICTS:
        values = {row.value for row in rows() if row.benchmark in conflict.benchmarks}
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", conflict.text)]
        assert set(numbers) <= values, conflict.text
        methods = {row.method for row in rows() if row.benchmark in conflict.benchmarks}
        assert methods >= set(conflict.methods), conflict.methods


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark=linear", "dataset=imagenet", "method=PIRL"]) == 0
    assert capsys.readouterr().out.strip() == listed("linear", "imagenet", "PIRL")
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert f"benchmark=voc07_svm dataset=voc2007: {available()['voc07_svm', 'voc2007']}" in shown
    assert main(["benchmark=knn", "dataset=places205", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["method"], row["value"], row["setting"]) == ("NPID", 38.7, {"k": 200})
    assert main(["benchmark=detection_voc", "protocol=moco", "metric=AP75"]) == 0
    shown = capsys.readouterr().out
    assert "63.6" in shown
    assert "protocol paper" not in shown
    assert "AP50" not in shown


def test_the_overview_counts_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset=places205", "method=npid"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(":")[0].split() for line in lines] == [
        ["benchmark=linear", "dataset=places205"],
        ["benchmark=knn", "dataset=places205"],
    ]
    assert lines[0].endswith(f": {len(results('linear', 'places205', 'npid'))}")
    assert main(["metric=AP75", "protocol=moco"]) == 0
    assert all("detection_voc" in line for line in capsys.readouterr().out.splitlines()[1:])
    assert main(["method=nobody"]) == 0
    assert capsys.readouterr().out == "No published numbers for this choice.\n"


def test_text_and_json_show_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Gains over other rows and chosen constants are no results."""
    assert main(["--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert len(everything) == 1306 == sum(row.is_result for row in rows())
    for (benchmark, dataset), count in available().items():
        assert main([f"benchmark={benchmark}", f"dataset={dataset}", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == count


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("benchmrk=linear", "benchmrk: unknown key. Did you mean 'benchmark'?"),
        ("linear", "linear: unknown key."),
        ("benchmark=liner", "nothing is published for 'liner' here. Did you mean 'linear'?"),
        ("dataset=imagenet1k", "Did you mean 'imagenet'? Available: imagenet, inaturalist2018,"),
    ],
)
def test_a_wrong_choice(choice: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([choice]) == 2
    assert said in capsys.readouterr().err


def test_it_needs_no_torch(repository_root: Path) -> None:
    code = (
        "import sys, types; package = types.ModuleType('pirl_plugin'); package.__path__ = [sys.argv[1]];"
        "sys.modules['pirl_plugin'] = package; import pirl_plugin.published as p;"
        "assert len(p.rows()) == 1319; print([m for m in ('torch', 'numpy', 'classy_vision') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(repository_root / "pirl_plugin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
