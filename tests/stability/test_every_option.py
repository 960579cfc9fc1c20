"""What holds for every stability option; an option file without a test fails here."""

import itertools
import re
from pathlib import Path

import pytest

from src.common.errors import InputError
from src.config.compose import compose
from src.config.hydra_compose import CONF
from src.stability import REMEDIES
from src.train import main
from tests.runs import ROOT, assert_same_run, stop_after, train
from tests.stability.harnessed import PACE

OPTIONS = sorted(file.stem for file in (CONF / "stability").glob("*.yaml"))


def test_every_option_file_is_registered_and_the_other_way_round():
    assert set(OPTIONS) == {*REMEDIES, "none"}


@pytest.mark.parametrize("option", sorted(REMEDIES))
def test_every_option_has_a_test_file(option):
    module = REMEDIES[option].__module__.rpartition(".")[2]
    file = ROOT / "tests" / "stability" / f"test_{module}.py"
    assert file.is_file()
    assert option in file.read_text()


@pytest.mark.parametrize("option", sorted(REMEDIES))
def test_an_option_file_writes_below_its_own_name_only(option):
    text = (CONF / "stability" / f"{option}.yaml").read_text()
    keys = [line for line in text.splitlines() if line and line[0] not in "# "]
    assert [key.partition(":")[0] for key in keys] == [option]


@pytest.mark.parametrize("option", sorted(REMEDIES))
def test_an_option_is_on_where_it_is_chosen_and_absent_elsewhere(option):
    config = compose("train", [f"stability={option}"])
    assert list(config.remedies) == [option]
    assert config.variant.stability == option
    assert compose("train", []).remedies == {}
    assert compose("train", ["stability=none"]).variant.stability == "none"


SPARSE = ("recipe.log_every=2",)
"""Instruments look at every second step alone; the state of the end is compared bit by bit."""

RIVALS = {
    "recipe.clip_norm": ["clip03", "clip05", "zclip", "adagc"],
    "ffn.router.norm_eps": ["router_eps", "router_eps20"],
    "attention.qk_norm": ["qk_norm", "qk_clip"],
}
"""Options that set the same field, or that need another value of it."""
ALL_RIVALS = {option for options in RIVALS.values() for option in options}


@pytest.mark.parametrize("rival", sorted(ALL_RIVALS))
def test_all_options_that_go_together_all_take_effect(rival):
    picked = {rival if rival in options else options[0] for options in RIVALS.values()}
    chosen = sorted({*REMEDIES} - ALL_RIVALS | picked)
    config = compose("train", [f"stability=[{','.join(chosen)}]"])
    assert set(config.remedies) == set(chosen)
    assert config.variant.stability == "-".join(chosen)


@pytest.mark.parametrize(
    ("field", "pair"),
    [(f, pair) for f, options in RIVALS.items() for pair in itertools.combinations(options, 2)],
)
def test_two_options_that_claim_one_field_are_an_error_that_names_both(field, pair):
    with pytest.raises(InputError, match=re.escape(field)) as raised:
        compose("train", [f"stability=[{pair[0]},{pair[1]}]"])
    assert all(option in str(raised.value) for option in pair)


LATE = {"ema", "fp32", "noise", "router_eps", "router_freeze", "shaken", "warmdown"}
AT_ONCE = {*REMEDIES} - LATE - ALL_RIVALS - {"early_stop", "shaken_full"}
TOGETHER = [
    sorted(AT_ONCE | {"zclip", "qk_norm"}),
    sorted(LATE | {"clip05"}),
    ["adagc"],
    ["clip03", "early_stop", "router_eps20"],
    ["qk_clip", "shaken_full"],
]
"""Every option in one of a few runs; in `make test-all` each has a run of its own as well."""
ALONE = [
    pytest.param([option], marks=pytest.mark.slow)
    for option in sorted(REMEDIES)
    if [option] not in TOGETHER
]


def test_the_runs_of_several_options_have_all_of_them():
    assert sorted(option for options in TOGETHER for option in options) == sorted(REMEDIES)


@pytest.mark.parametrize("options", [*TOGETHER, *ALONE], ids="+".join)
def test_an_option_survives_an_interruption_and_works_under_accumulation(
    options, tiny, monkeypatch
):
    """Stopped after its start, and before it too, and resumed: bitwise the uninterrupted run."""
    arguments = [*tiny, *PACE, *SPARSE, "recipe.accumulate=2"]
    arguments.append(f"stability=[{','.join(options)}]")
    whole = train(arguments, "study=whole")
    # early_stop ends after 14 of the 22 steps.
    is_late = compose("train", arguments).default_start_step > 0
    for stop_at in (7, 16) if is_late and "early_stop" not in options else (7,):
        with monkeypatch.context() as patch:
            stop_after(patch, stop_at)
            assert main([*arguments, "study=stopped"]) == 143
    assert main([*arguments, "study=stopped"]) == 0
    (folder,) = Path("runs/stopped").glob("*/seed-0")
    assert_same_run(whole, folder)
