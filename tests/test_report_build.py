"""The report as files: what is in it, that nothing from a configuration is markup, that it opens by itself."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pirl_plugin.records import Record, write_record, write_records
from pirl_plugin.report.build import write_report
from pirl_plugin.report.sources import Planned, find, links, read

EVIL = "<img src=x onerror=alert(1)> & \"q\" 'p' $x$"
COMMAND = "python tools/benchmark.py benchmark=linear 'name=<b>&'"
HASH = "0123456789ab"


def record(method: str, value: float | None, seed: int = 0, **changes: Any) -> Record:
    facts: dict[str, Any] = {
        "benchmark": "linear",
        "protocol": "goyal19",
        "dataset": "imagenet",
        "setting": {"layer": "res5"},
        "metric": "top1",
        "unit": "%",
        "config_sha256": f"{method}{seed}",
        "seconds": 12.0,
        "hardware": "2 cores",
    } | changes
    if value is None:
        facts |= {"status": "failed", "reason": "<script>alert(2)</script>"}
    return Record(method=method, value=value, seed=seed, **facts)


def run_folder(store: Path, name: str, records: list[Record], task: str = "linear", command: str = COMMAND) -> Path:
    """Folders as a sweep leaves them."""
    pretraining = store / f"{name}-seed{records[0].seed}-{HASH}"
    folder = pretraining / "benchmarks" / f"{task}-{HASH}"
    folder.mkdir(parents=True)
    (pretraining / "metrics.jsonl").write_text(
        "".join(json.dumps({"images_seen": n, "loss": 9 - n, "seconds": n, "rankme": n + 1}) + "\n" for n in (1, 2, 3))
    )
    write_record(records[0], folder / "result.json")
    write_records(records, folder / "results.jsonl")
    (folder / "config.yaml").write_text("name: linear\n")
    (folder / "log.txt").write_text("log\n")
    (folder / "outcome.json").write_text(json.dumps({"id": HASH, "state": "finished", "command": command}))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store with space"
    layers = [record(EVIL, 50.0 - n, setting={"layer": f"res{n}"}) for n in (5, 4, 3)]
    run_folder(store, "evil", layers)
    run_folder(store, "npid", [record("npid", 40.0, 1), record("npid", 30.0, 1, setting={"layer": "res4"})])
    run_folder(store, "moco", [record("moco", None)])
    return store


class Page(html.parser.HTMLParser):
    """Tags with attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(store: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write_report(find([store]), out, f"Title {EVIL}")
    return out


def test_names_are_text_never_markup(report: Path) -> None:
    page = Page((report / "report.html").read_text())
    assert page.all("img") == []
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) > 3
    assert "<script>alert(2)</script>" in page.text
    assert COMMAND in page.text
    assert "<img" not in (report / "report.md").read_text()


def test_every_link_leads_somewhere(report: Path, store: Path) -> None:
    page = Page((report / "report.html").read_text())
    targets = {str(a["href"]) for a in page.all("a")}
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for target in targets:
        assert target[1:] in ids if target.startswith("#") else (report / target.replace("%20", " ")).exists(), target
    assert sum(target.endswith("config.yaml") for target in targets) == 3


def test_the_page_needs_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert [tag for tag, attributes in page.tags if "src" in attributes] == []
    assert [str(link["href"]) for link in page.all("link")] == ["data:,"]
    assert not re.search(r"@import|url\((?!#)", text)


def test_tables_and_figures_can_be_read_aloud(report: Path) -> None:
    page = Page((report / "report.html").read_text())
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert {head.get("scope") for head in page.all("th")} == {"row", "col"}
    figures = [box for box in page.all("div") if box.get("role") == "img"]
    assert len(figures) == len(page.all("svg")) == len(page.all("figure")) == 2
    assert all("Line chart of" in str(box["aria-label"]) for box in figures)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_published_numbers_stand_beside_ours_only_under_the_same_protocol(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_folder(store, "pirl", [record("pirl", 60.0, protocol="goyal19*")])
    write_report(find([store]), tmp_path / "a")
    text = (tmp_path / "a" / "report.html").read_text()
    assert "No published number was measured under the protocol" in text
    assert "not comparable" in text


def test_a_skipped_run_of_a_plan_is_told_with_its_reason(store: Path, tmp_path: Path) -> None:
    skipped = store / "byol" / "benchmarks" / f"linear-{HASH}"
    skipped.mkdir(parents=True)
    (skipped / "outcome.json").write_text(json.dumps({"state": "skipped", "reason": "byol, seed 0 failed"}))
    npid = store / f"npid-seed1-{HASH}" / "benchmarks" / f"linear-{HASH}"
    waiting = store / "nothing"
    plan = [Planned(npid, "npid", "linear", 1), Planned(skipped, "byol", "linear", 0), Planned(waiting, "x", "knn", 0)]
    sources = read(plan)
    assert [source.folder for source in sources] == [npid, skipped]
    table = write_report(sources, tmp_path / "out")
    assert [table.cell(row, table.columns[0]).text for row in table.rows] == ["40.0", "failed"]
    assert "skipped: byol, seed 0 failed" in (tmp_path / "out" / "report.html").read_text()
    assert "skipped: byol, seed 0 failed" in (tmp_path / "out" / "report.md").read_text()


def test_a_pretraining_goes_by_what_was_measured_at_its_end(tmp_path: Path) -> None:
    """The file names sort otherwise: the checkpoint of 3 images comes first."""
    for task, seen in (("a", 3), ("b", 1)):
        folder = tmp_path / "npid" / "benchmarks" / task
        folder.mkdir(parents=True)
        write_record(record("npid", 40.0, extra={"images_seen": seen}), folder / "result.json")
    (tmp_path / "npid" / "metrics.jsonl").write_text('{"images_seen": 3, "loss": 1.0, "seconds": 7.5}\n')
    write_report(find([tmp_path]), tmp_path / "out")
    assert "npid, 3 images seen (npid)" in (tmp_path / "out" / "report.html").read_text()


def test_a_broken_record_is_a_failure_not_the_end(store: Path, tmp_path: Path) -> None:
    broken = run_folder(store, "simclr", [record("simclr", 1.0)])
    (broken / "results.jsonl").write_text("{")
    table = write_report(find([store]), tmp_path / "out")
    found = {row.method: table.cell(row, table.headlines[0]) for row in table.rows}
    assert found["simclr"].text == "failed"
    assert "not a result record" in str(found["simclr"].failures[0].record.reason)


def test_a_folder_given_twice_counts_once(store: Path) -> None:
    assert len(find([store, store / ".." / store.name])) == len(find([store])) == 3
    assert set(links(find([store])[0].folder)) == {"folder", "config", "log"}


def test_what_differs_from_the_protocol_is_told_in_words(tmp_path: Path) -> None:
    changed = {"num_epochs": [28, 2], "transform": [{"size": 224}, {"size": 32}], EVIL: [None, [1, 2]]}
    run_folder(tmp_path, "pirl", [record("pirl", 1.0, protocol="paper*", extra={"changed": changed, "num_test": 9})])
    write_report(find([tmp_path]), tmp_path / "out")
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    for line in ("num_epochs: 2, not 28", "transform: size 32, not size 224", f"{EVIL}: 1, 2, not none published"):
        assert line in text
    assert "but for: 4 items" in text


def test_settings_that_all_columns_share_stand_once(tmp_path: Path) -> None:
    found = [record("pirl", 1.0, setting={"layer": layer, "k": 20}) for layer in ("res5", "res4")]
    run_folder(tmp_path, "pirl", found)
    write_report(find([tmp_path]), tmp_path / "out")
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "mean ± standard deviation over seeds; k 20" in text
    assert "top1, layer res5 (%)" in text
    assert "layer res5, k 20" not in text


def test_the_invariance_figure_has_the_ink_of_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "pirl", [record("pirl", 1.0)])
    panel: dict[str, Any] = {"edges": [0.0, 1.0, 2.0], "same_histogram": [1.0, 0.0], "different_histogram": [0.5, 0.5]}
    panel |= {"same_mean": 0.5, "different_mean": 1.0, "auc": 0.75, "features": "trunk", "view": "patches"}
    (folder / "invariance.json").write_text(json.dumps({"panels": [panel, panel]}))
    write_report(find([tmp_path]), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    figure = text[text.index('<figure class="panels-2"', text.index('id="invariance"')) :].partition("</figure>")[0]
    assert "currentColor" in figure
    assert not re.search("#22272e|#68707c|#ffffff|#000000", figure)
    assert "AUC 75.0 %" in figure


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictured(store: Path) -> Path:
    """The store with nearest neighbours of one run, and the views of its pretraining."""
    place = store / f"npid-seed1-{HASH}"
    run = place / "benchmarks" / f"linear-{HASH}"
    for path, size in ((run / "neighbours.png", (70, 30)), (place / "views.png", (40, 20))):
        Image.new("RGB", size, (200, 30, 30)).save(path)
    queries = [{"id": 1, "class": EVIL, "neighbours": [{"id": 2, "class": "star", "cosine": 0.9}]}]
    (run / "neighbours.json").write_text(json.dumps({"features": "res5", "queries": queries}))
    views = ["original, as it is stored", f"{EVIL}, 32 × 32 pixels"]
    (place / "views.json").write_text(json.dumps({"method": "npid", "views": views, "of": 10}))
    return store


def test_pictures_are_inside_the_page_with_sizes_and_words(pictured: Path, tmp_path: Path) -> None:
    write_report(find([pictured]), tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    neighbours, views = page.all("img")
    assert (neighbours["width"], neighbours["height"], views["width"], views["height"]) == ("70", "30", "40", "20")
    assert all(str(picture["src"]).startswith("data:image/jpeg;base64,") for picture in (neighbours, views))
    assert f"{EVIL}: star." in str(neighbours["alt"])
    assert f"that npid is trained on: original, as it is stored; {EVIL}, 32 × 32 pixels." in str(views["alt"])
    for name, run in (("neighbours-0", "benchmarks/linear-" + HASH + "/neighbours.png"), ("views-0", "views.png")):
        copy = tmp_path / "out" / "figures" / f"{name}.png"
        assert copy.read_bytes() == (pictured / f"npid-seed1-{HASH}" / run).read_bytes()


def test_half_of_a_picture_is_none(pictured: Path, tmp_path: Path) -> None:
    (pictured / f"npid-seed1-{HASH}" / "views.png").unlink()
    (pictured / f"npid-seed1-{HASH}" / "benchmarks" / f"linear-{HASH}" / "neighbours.json").unlink()
    write_report(find([pictured]), tmp_path / "out")
    assert Page((tmp_path / "out" / "report.html").read_text()).all("img") == []


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const errors = [], wait = (f) => addEventListener("load", f);
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
wait(() => {
  const table = document.querySelector("table.sortable"), button = table.tHead.rows[0].cells[1].querySelector("button");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].dataset.value);
  button.click(); const down = column(); button.click(); const up = column();
  const pictures = [...document.querySelectorAll("figure svg, figure img")];
  const empty = pictures.filter((picture) => picture.getBoundingClientRect().height < 20);
  const resources = performance.getEntriesByType("resource").map((entry) => entry.name);
  const wide = document.documentElement.scrollWidth > innerWidth;
  const found = { errors, down, up, empty: empty.length, resources, wide };
  document.body.textContent = "RESULT" + JSON.stringify(found) + "END";
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the report in")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_it_opens_in_a_browser(pictured: Path, report: Path, tmp_path: Path, size: str) -> None:
    text = (report / "report.html").read_text()
    probed = report / "probed.html"
    probed.write_text(text.replace("<head>", "<head>" + PROBE, 1))
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *switches, f"--window-size={size}", "--dump-dom", probed.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r"<body>RESULT(.*)END</body>", shown)
    assert match, shown[-2000:]
    found = json.loads(match[1])
    assert found == {
        "errors": [],
        "down": ["45.0", "40.0", ""],
        "up": ["40.0", "45.0", ""],
        "empty": 0,
        "resources": [],
        "wide": False,
    }


def test_seconds_of_two_protocols_are_not_averaged(tmp_path: Path) -> None:
    """A linear evaluation takes days under one protocol and minutes under another."""
    for name, seconds in (("small", 10.0), ("paper", 5000.0)):
        run_folder(tmp_path / "store", f"pirl-{name}", [record("pirl", 50.0, protocol=name, seconds=seconds)])
    write_report(find([tmp_path / "store"]), tmp_path / "out", "Two protocols")
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    seconds_table = text[text.index("Benchmarks: seconds") :]
    assert "linear on imagenet (small)" in seconds_table
    assert "linear on imagenet (paper)" in seconds_table
    assert "2,505" not in seconds_table
