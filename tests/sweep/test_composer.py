"""Cells of a sweep are composed once for all seeds, and are what each alone would be."""

import pytest

from src.cli import command_line
from src.common.errors import InputError
from src.sweep.composer import Composer
from tests.conftest import TINY
from tests.runs import ROOT


@pytest.fixture
def composed(monkeypatch):
    """What is really composed."""
    calls = []

    def counted(name, arguments):
        calls.append(list(arguments))
        return whole(name, arguments)

    whole = command_line.checked
    monkeypatch.setattr(command_line, "checked", counted)
    return calls


CELLS = [
    [*TINY, *option, f"seed={seed}", *repeat]
    for option in (["stability=none"], ["stability=[noise,ema]"], ["preset=stress", "seed=7"])
    for seed in (0, 3, 1000)
    for repeat in ([], ["repeat=2"])
]


def test_a_cell_is_what_it_would_be_alone(composed):
    composer = Composer("train")
    found = [composer.config(cell) for cell in CELLS]
    # Once for each option with and without a repeat; where a seed is typed twice, each.
    assert len(composed) == 2 * 2 + 6
    for cell, config in zip(CELLS, found, strict=True):
        alone = command_line.checked("train", cell)
        assert config == alone
        assert config.plain() == alone.plain()
        assert config.folder == alone.folder


@pytest.mark.parametrize("bad", ["seed=-1", "seed=x", "seed=1.5", "seed=", "repeat=-2"])
def test_a_bad_seed_is_refused_though_others_were_good(bad):
    composer = Composer("train")
    key = bad.partition("=")[0]
    composer.config([*TINY, f"{key}=1"])
    with pytest.raises(InputError, match=key):
        composer.config([*TINY, bad])


def test_nothing_in_conf_is_made_of_a_seed():
    for file in (ROOT / "conf").rglob("*.yaml"):
        text = file.read_text()
        assert "${seed" not in text and "${repeat" not in text, file
