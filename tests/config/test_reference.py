"""docs/configuration.md says what the dataclasses and the files in conf/ say."""

import re

import pytest

from src.cli.name_checks import SWEEP_FIELDS
from src.config.compose import compose
from src.config.hydra_compose import compose_plain
from src.lab.docs.configuration_page import COMMANDS, configuration_page
from src.lab.docs.find_ranges import range_of
from src.lab.docs.write_docs import PAGE
from src.sweep.settings import SweepSettings
from src.training.recipe import RecipeConfig
from tests.runs import ROOT

NOT_COMMANDS = ("base", "train", "sweep", "describe")


@pytest.fixture(scope="module")
def page():
    return configuration_page()


def documented(page):
    """The fields that the page has a row for."""
    return set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))


def test_the_page_is_up_to_date(page):
    assert PAGE.read_text() == page, "type make docs, or python -m src.lab docs"


@pytest.mark.parametrize("stability", ["ema", "[noise,zclip]"])
def test_every_field_of_a_run_is_on_the_page(page, stability):
    plain = compose("train", [f"stability={stability}"]).plain()
    recorded_only = ("choices", "kinds", "arguments")

    def names(values, above=""):
        for name, value in values.items():
            if above or name not in recorded_only:
                if isinstance(value, dict) and name != "observe":
                    yield from names(value, f"{above}{name}.")
                else:
                    yield f"{above}{name}"

    assert set(names(plain)) <= documented(page)


def test_every_command_with_fields_is_on_the_page(page):
    files = {file.stem for file in (ROOT / "conf").glob("*.yaml")}
    assert files == {*COMMANDS, *NOT_COMMANDS}
    for name in COMMANDS:
        assert set(compose_plain(name, None)) <= {f.split(".")[0] for f in documented(page)}
    assert {*SWEEP_FIELDS} <= documented(page)
    assert {"n_jobs", "plan"} <= set(SweepSettings.__dataclass_fields__)


def test_every_option_is_on_the_page(page):
    for file in (ROOT / "conf").glob("*/*.yaml"):
        group = file.parent.name
        if group == "stability":
            assert f"`{file.stem}`" in page or file.stem == "none"
        elif group != "experiment":
            assert f"`{group}={file.stem}`" in page


def test_no_field_lacks_a_meaning(page):
    tables = re.findall(r"^\| field .* meaning \|\n(?:\|.*\n)+", page, re.MULTILINE)
    assert len(tables) > 20
    for table in tables:
        assert not re.search(r"\| +\|$", table, re.MULTILINE), table


SAID_IN_WORDS = {"data.path", "data.val_path", "init", "resume", "fork", "observe"}
"""Fields that hold a path, an address or a configuration: their meaning says what they take."""


def test_no_field_lacks_a_range(page):
    tables = re.findall(r"^\| field \| default \| values .*\n(?:\|.*\n)+", page, re.MULTILINE)
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]* \| +\|", "".join(tables), re.MULTILINE)
    assert len(tables) > 10 and {*rows} == SAID_IN_WORDS


def test_a_range_is_that_of_the_check():
    recipe = compose("train", []).recipe
    assert range_of(recipe, "log_every", int) == "integer, at least 1"
    assert range_of(recipe, "schedule", str) == "constant, linear, cosine, wsd"
    assert range_of(recipe, "fused", bool) == "true or false"
    assert range_of(recipe, "val_windows", RecipeConfig.__annotations__["val_windows"]) == (
        "integer, at least 1, or null"
    )
