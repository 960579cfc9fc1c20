from dataclasses import replace

import pandas as pd
import pytest

from src.lab.book.compare import compare
from tests.lab.book.folders import ARMS, study_folder
from tests.study.synthetic import Arm


@pytest.fixture
def runs(tmp_path):
    return study_folder(tmp_path).results


def test_the_same_runs_are_bitwise_equal_whatever_their_seconds(runs):
    again = runs.assign(seconds=1.0, code="another")
    found = compare("one", runs, again)
    assert found.num_equal == found.num_runs == 24
    assert found.agrees and not found.differing and not found.different_arms


def test_a_figure_that_differs_is_named_and_alone_tells_no_arm_apart(runs):
    again = runs.copy()
    again.loc[0, "loss"] = 2.0000001
    found = compare("one", runs, again)
    assert (found.num_equal, found.differing) == (23, ["loss"])
    assert found.agrees


def test_an_arm_that_has_become_another_is_named(runs, tmp_path):
    arms = {**ARMS, "router_eps": Arm(num_failing=6, acts_from=240)}
    found = compare("one", runs, study_folder(tmp_path / "other", arms).results)
    assert found.different_arms == ["router_eps (failing seeds)"] and not found.agrees
    worse = {**ARMS, "router_eps": replace(ARMS["router_eps"], loss=(3.1, 3.0, 3.2))}
    found = compare("one", runs, study_folder(tmp_path / "worse", worse).results)
    assert found.different_arms == ["router_eps (loss)"]


def test_runs_that_have_not_ended_are_missing(runs):
    again = runs.copy()
    again.loc[0, "status"] = "killed"
    assert len(compare("one", runs, again).missing) == 1


def test_runs_of_further_seeds_are_no_part_of_it(runs):
    more = runs.assign(seed=runs["seed"] + 50, loss=9.0)
    found = compare("one", runs, pd.concat([runs, more]).assign(varied="x=1"))
    assert found.agrees and found.num_equal == found.num_runs == 24


def test_runs_that_are_not_there_are_missing(runs):
    found = compare("one", runs, runs[1:])
    assert found.missing == ["/".join((runs["variant"][0], "0", "0"))]
    assert not found.agrees
