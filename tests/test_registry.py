from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pytest
from classy_vision.hooks import build_hook
from classy_vision.losses import ClassyLoss, build_loss, register_loss

from pirl_plugin.registry import REGISTRIES, Configurable, build, check, lookup, ours, register_collator, summary
from pirl_plugin.schema import PROVIDED, Component, ConfigError, PositiveFloat, PositiveInt, checked


@checked
class Bank(Configurable):
    """A bank for these tests.

    More about it.
    """

    def __init__(self, num_rows: Annotated[PositiveInt, PROVIDED], momentum: PositiveFloat = 0.5) -> None:
        self.num_rows, self.momentum = num_rows, momentum


@checked
class Outer(Configurable):
    def __init__(
        self,
        size: PositiveInt,
        bank: Annotated[dict[str, Any], Component("memory_bank")],
        banks: list[Annotated[dict[str, Any], Component("memory_bank")]] | None = None,
        heads: dict[str, Annotated[dict[str, Any], Component("memory_bank")]] | None = None,
    ) -> None:
        self.bank = build("memory_bank", bank, num_rows=size)


class Parser:
    """A component of the host's kind: it parses its configuration itself."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Parser:
        return cls(config)


@pytest.fixture(autouse=True)
def _components(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name, cls in (
        ("memory_bank", "test_bank", Bank),
        ("collator", "test_outer", Outer),
        ("collator", "test_parser", Parser),
    ):
        monkeypatch.setitem(REGISTRIES[kind], name, cls)


def problems(kind: str, config: Any) -> list[str]:
    return [str(problem) for problem in check(kind, config, "c")]


def test_an_unknown_name_lists_the_names_and_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown memory_bank 'test_bnk'\. .*test_bank.* Did you mean 'test_bank'\?"):
        lookup("memory_bank", "test_bnk")
    (problem,) = problems("memory_bank", {"name": "test_bnk"})
    assert problem.startswith("c.name: Unknown memory_bank 'test_bnk'. Available: ")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("test_bank", "c: must be a memory_bank configuration with a 'name', got 'test_bank'."),
        (None, "c: must be a memory_bank configuration with a 'name', got None."),
        ({"momentum": 0.5}, "c.name: missing; it must name a memory_bank: "),
        ({"name": None}, "c.name: must be the name of a memory_bank, got None."),
        ({"name": ["test_bank"]}, "c.name: must be the name of a memory_bank, got ['test_bank']."),
    ],
)
def test_what_is_no_component_configuration(config: Any, message: str) -> None:
    (problem,) = problems("memory_bank", config)
    assert problem.startswith(message)


def test_problems_of_all_depths_at_once() -> None:
    config = {
        "name": "test_outer",
        "size": 0,
        "sise": 1,
        "bank": {"name": "test_bank", "momentum": "x"},
        "banks": [{"name": "test_bank"}, {"name": "test_bank", "momentun": 1.0}],
        "heads": {"image": {"name": "nobody"}},
    }
    assert [problem.partition(":")[0] for problem in problems("collator", config)] == [
        "c.sise",
        "c.size",
        "c.bank.momentum",
        "c.banks[1].momentun",
        "c.heads.image.name",
    ]


def test_build_passes_what_is_provided() -> None:
    bank = build("memory_bank", {"name": "test_bank", "momentum": 1}, num_rows=7)
    assert (type(bank), bank.num_rows, bank.momentum) == (Bank, 7, 1)
    assert build("collator", {"name": "test_outer", "size": 3, "bank": {"name": "test_bank"}}).bank.num_rows == 3


def test_null_gives_way_to_the_provided_value_and_anything_else_wins() -> None:
    assert build("memory_bank", {"name": "test_bank", "num_rows": None}, num_rows=7).num_rows == 7
    assert build("memory_bank", {"name": "test_bank", "num_rows": 3}, num_rows=7).num_rows == 3


def test_null_for_what_is_not_provided_is_refused() -> None:
    with pytest.raises(ConfigError, match="momentum: must be a number, got None"):
        build("memory_bank", {"name": "test_bank", "momentum": None}, num_rows=7)


@pytest.mark.parametrize("config", [{"name": "test_bank"}, {"name": "test_bank", "num_rows": None}])
def test_nobody_provided_it(config: dict[str, Any]) -> None:
    assert check("memory_bank", config) == []  # somebody may, later
    with pytest.raises(ConfigError, match="num_rows: missing"):
        build("memory_bank", config)
    with pytest.raises(ConfigError, match="num_rows: missing"):
        Bank.from_config(config)


@pytest.mark.parametrize("config", ["test_bank", None, {}, {"name": "nobody"}])
def test_build_refuses_what_check_refuses(config: Any) -> None:
    with pytest.raises(ConfigError):
        build("memory_bank", config)


def test_build_leaves_the_configuration_as_it_was() -> None:
    config = {"name": "test_bank", "num_rows": None}
    build("memory_bank", config, num_rows=7)
    assert config == {"name": "test_bank", "num_rows": None}


def test_a_component_with_a_parser_of_its_own_checks_itself() -> None:
    config = {"name": "test_parser", "anything": 1}
    assert check("collator", config) == []
    assert build("collator", config, given=2).config == {"name": "test_parser", "anything": 1, "given": 2}


def test_the_hosts_hooks_take_keywords_and_are_checked() -> None:
    (problem,) = problems("hook", {"name": "loss_lr_meter_logging", "log_frq": 1})
    assert problem.startswith("c.log_frq: unknown key. Did you mean 'log_freq'?")
    assert build("hook", {"name": "loss_lr_meter_logging", "log_freq": 5}).log_freq == 5
    assert build_hook({"name": "loss_lr_meter_logging"}).log_freq is None


def test_the_hosts_losses_are_built_through_their_own_parser() -> None:
    built = build("loss", {"name": "label_smoothing_cross_entropy", "smoothing_param": 0.1, "ignore_index": -1})
    assert type(built).__module__.startswith("classy_vision")


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="collator 'test_parser' is registered already, by .*Parser"):
        register_collator("test_parser")(Outer)
    assert REGISTRIES["collator"]["test_parser"] is Parser


def test_classy_vision_builds_a_configurable_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    @checked
    class LossOfTheRegistryTest(Configurable, ClassyLoss):
        def __init__(self, weight: PositiveFloat = 1.0) -> None:
            super().__init__()
            self.weight = weight

    register_loss("loss_of_the_registry_test")(LossOfTheRegistryTest)
    try:
        assert build_loss({"name": "loss_of_the_registry_test", "weight": 2.0}).weight == 2.0
        with pytest.raises(ConfigError, match="wieght: unknown key. Did you mean 'weight'"):
            build_loss({"name": "loss_of_the_registry_test", "wieght": 2.0})
        assert "loss_of_the_registry_test" in ours("loss")
    finally:
        del REGISTRIES["loss"]["loss_of_the_registry_test"]


def test_ours_leaves_the_hosts_out() -> None:
    assert "label_smoothing_cross_entropy" in REGISTRIES["loss"]
    assert "label_smoothing_cross_entropy" not in ours("loss")


def test_summary_is_the_first_line() -> None:
    assert summary(Bank) == "A bank for these tests."
