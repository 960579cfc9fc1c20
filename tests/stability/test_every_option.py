"""What holds for every stability option; an option file without a test fails here."""

from pathlib import Path

import pytest

from src.config import CONF, compose
from src.stability import REMEDIES
from tests.runs import ROOT

OPTIONS = sorted(file.stem for file in (CONF / "stability").glob("*.yaml"))


def test_every_option_file_is_registered_and_the_other_way_round():
    assert set(OPTIONS) == {*REMEDIES, "none"}


@pytest.mark.parametrize("option", sorted(REMEDIES))
def test_every_option_has_a_test_file(option):
    module = REMEDIES[option].__module__.rpartition(".")[2]
    file = ROOT / "tests" / "stability" / f"test_{module}.py"
    assert file.is_file()
    assert f"stability={option}" in file.read_text()


@pytest.mark.parametrize("option", sorted(REMEDIES))
def test_an_option_file_writes_below_its_own_name_only(option):
    text = (CONF / "stability" / f"{option}.yaml").read_text()
    keys = [line for line in text.splitlines() if line and line[0] not in "# "]
    assert keys == [f"{option}:"]


@pytest.mark.parametrize("option", sorted(REMEDIES))
def test_an_option_is_on_where_it_is_chosen_and_absent_elsewhere(option):
    config = compose("train", [f"stability={option}"])
    assert list(config.remedies) == [option]
    assert config.variant.stability == option
    assert compose("train", []).remedies == {}
    assert compose("train", ["stability=none"]).variant.stability == "none"


def test_all_options_together_all_take_effect():
    config = compose("train", [f"stability=[{','.join(REMEDIES)}]"])
    assert set(config.remedies) == set(REMEDIES)
    assert config.variant.stability == "-".join(sorted(REMEDIES))
    assert config.folder == Path(f"runs/single/mlha+moe+{config.variant.stability}/seed-0")
