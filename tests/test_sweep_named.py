"""The named sweeps: what their headers say plans without a mistake, the paper's and the small version alike."""

from __future__ import annotations

import re
import shlex

import pytest

from pirl_plugin import config as configs
from pirl_plugin.commands import sweep as command
from pirl_plugin.sweep import Run, Sweep, plan


def commands(option: str) -> list[list[str]]:
    """The arguments of each command in a sweep's header, as a shell hands them on."""
    text = (configs.CONFIG_FOLDER / "sweep" / f"{option}.yaml").read_text()
    found = re.findall(r"python tools/sweep\.py ([^\n]*)", text)
    return [shlex.split(line) for line in found]


def planned(*arguments: str) -> list[Run]:
    return plan(Sweep(**configs.load("sweep", arguments, command.problems_of)), command.load)


@pytest.mark.parametrize("option", configs.groups()["sweep"])
def test_the_headers_commands_plan(option):
    lines = commands(option)
    assert lines, "no command in the header"
    for arguments in lines:
        assert f"sweep={option}" in arguments
        # composing takes long: of many methods, test_yamls.py plans all
        methods = configs.load("sweep", arguments, command.problems_of)["methods"][:3]
        assert planned(*arguments, f"methods=[{','.join(methods)}]")


def values(option: str, *keys: str) -> list[dict[str, str]]:
    """Of every pretraining, the last value of each key."""
    roots = [f"roots.{root}=DIR" for root in ("imagenet", "voc", "places205", "inaturalist2018", "photographs")]
    known = configs.load("sweep", [f"sweep={option}"], command.problems_of)["roots"]
    runs = planned(f"sweep={option}", "benchmarks=[]", *(root for root in roots if root[6:-4] in known))
    return [dict(text.split("=", 1) for text in run.overrides if text.split("=", 1)[0] in keys) for run in runs]


def test_the_analyses_have_the_papers_400_epochs_and_4096_negatives():
    paper = {"num_epochs": "400", "loss.num_negatives": "4096"}
    for option in ("lambda", "pretexts", "permutations"):
        assert all(found == paper for found in values(option, *paper)), option
    assert {found["num_epochs"] for found in values("negatives", "num_epochs")} == {"400"}


def test_lambda_and_negatives_span_their_figures():
    assert [float(found["loss.lam"]) for found in values("lambda", "loss.lam")] == [0, 0.25, 0.5, 0.75, 1]
    assert {"4096", "32000"} <= {found["loss.num_negatives"] for found in values("negatives", "loss.num_negatives")}
