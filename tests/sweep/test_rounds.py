"""The rounds of a sequential sweep, without training: results are made up between them."""

import dataclasses
import json

import pytest

from src.common.errors import InputError
from src.study.read.collect import collect
from src.sweep import rounds as rounds_module
from src.sweep.manifest import Manifest
from src.sweep.plan import arms_by_baseline, make_plan
from src.sweep.rounds import check_looks, rounds
from tests.conftest import TINY
from tests.study import synthetic
from tests.study.synthetic import Arm

ARMS = ("router_eps", "clip03", "noise", "zclip")


@pytest.fixture(scope="module")
def planned():
    stability = f"stability={','.join(ARMS)}"
    more = ["recipe.max_steps=22", "study=looked", "seed=range(12)", "sequential=true"]
    return make_plan("train", [*TINY, *more, stability])


def option(cell) -> str:
    return cell.config.variant.stability


def names(cells) -> set[str]:
    return {option(cell) for cell in cells}


def seeds(cells, name) -> list[int]:
    return sorted(cell.config.seed for cell in cells if option(cell) == name)


@pytest.fixture
def results(planned, monkeypatch):
    """What every look sees: the seeds that have been run, and which of them fail in each arm."""
    failing = dict.fromkeys(("none", "shaken_full", *ARMS), 12) | {"router_eps": 0, "noise": 4}
    variants = {option(cell): cell.config.variant_name for cell in planned.cells}
    done: list = []

    def study(*_):
        arms = {
            name: Arm(num_failing=failing[name], seeds=seeds(done, name))
            for name in dict.fromkeys(map(option, planned.cells))
            if seeds(done, name)
        }
        found = synthetic.in_memory(arms, seeds=12)
        runs = [
            dataclasses.replace(
                run,
                variant=variants[run.axes["stability"]],
                baseline=run.baseline and variants["none"],
            )
            for run in found.runs
        ]
        return dataclasses.replace(
            found, runs=runs, looks=dict.fromkeys(variants.values(), planned.looks)
        )

    monkeypatch.setattr(rounds_module, "collect", study)
    return failing, done


def run_all(planned, manifest, done):
    each = []
    for cells in rounds(planned, manifest):
        each.append(cells)
        done += cells
        for cell in cells:
            manifest.set(cell, "finished", "")
    return each


def fresh(planned):
    return Manifest(planned, dict.fromkeys((c.folder for c in planned.cells), False), command="")


def test_only_undecided_arms_and_what_they_are_compared_with_get_more_seeds(
    planned, results, capsys
):
    _, done = results
    manifest = fresh(planned)
    first, second, third = run_all(planned, manifest, done)

    assert names(first) == {"none", "shaken_full", *ARMS}
    assert seeds(first, "clip03") == [0, 1, 2]
    # Three of three could be a chance if it halved the failures; six of six could not.
    assert names(second) == {"none", "shaken_full", *ARMS}
    assert names(third) == {"none", "shaken_full", "noise"}
    assert seeds(third, "noise") == list(range(6, 12))
    said = capsys.readouterr().out
    assert "look 2 of 3, after 6 seeds:\n" in said
    assert ": 0 of 6 fail, significantly different (p = 0.025)" in said
    assert ": 6 of 6 fail, too many for a remedy that prevents half" in said
    assert ": 4 of 6 fail, undecided; gets more seeds" in said

    left_out = [cell for cell in planned.cells if manifest.state(cell) == "not needed"]
    assert names(left_out) == {"router_eps", "clip03", "zclip"}
    assert {manifest.reason(cell) for cell in left_out} == {"decided after 6 seeds"}
    assert all(map(manifest.is_done, planned.cells))


def test_when_all_are_decided_no_run_is_left(planned, results):
    failing, done = results
    failing["noise"] = 12
    manifest = fresh(planned)
    assert len(run_all(planned, manifest, done)) == 2
    assert {manifest.state(cell) for cell in planned.cells} == {"finished", "not needed"}
    reasons = {option(c): manifest.reason(c) for c in planned.cells if c.config.seed == 11}
    untreated = dict.fromkeys(("none", "shaken_full"), "fewer arms are undecided")
    assert reasons == untreated | dict.fromkeys(ARMS, "decided after 6 seeds")


def test_a_run_of_a_later_look_says_after_how_many_seeds_its_arm_was_decided(planned, results):
    failing, done = results
    failing.update(dict.fromkeys(failing, 0))
    manifest = fresh(planned)
    assert len(run_all(planned, manifest, done)) == 1
    left_out = [cell for cell in planned.cells if option(cell) == "clip03"][3:]
    assert {manifest.reason(cell) for cell in left_out} == {"decided after 3 seeds"}


def test_fewer_arms_need_fewer_untreated_runs(planned):
    """Four arms have two untreated runs a seed, and so has one: at least one A/A run stays."""
    cells = [cell for cell in planned.cells if option(cell) == "shaken_full"]
    assert {cell.config.repeat for cell in cells} == {0}
    many = make_plan(
        "train",
        [
            *TINY,
            "seed=range(12)",
            "sequential=true",
            "stability=clip03,clip05,zclip,ema,noise,warmdown,lower_lr,router_eps,clip_value,fp32",
        ],
    )
    shaken = [cell for cell in many.cells if option(cell) == "shaken_full"]
    assert {cell.config.repeat for cell in shaken} == {0, 1}
    ((baseline, arms),) = arms_by_baseline(many.cells).items()
    assert len(arms) == 10
    two = {baseline: arms[:2]}
    assert {c.config.repeat for c in shaken if rounds_module._is_needed(c, two)} == {0}
    assert not any(rounds_module._is_needed(c, {baseline: []}) for c in shaken)


def test_a_sweep_without_looks_has_one_round(planned):
    plain = dataclasses.replace(planned, looks=[])
    assert list(rounds(plain, fresh(plain))) == [plain.cells]


def test_looks_cannot_be_planned_anew_when_results_are_known(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_looks(planned)  # Nothing has been run.
    manifest = fresh(planned)
    folder = planned.folder / ".sweeps"
    folder.mkdir(parents=True)
    manifest.write(folder)
    check_looks(planned)  # The same command continues.
    other = dataclasses.replace(planned, looks=[[0, 1], [0, 1, 2, 3], list(range(8))])
    with pytest.raises(InputError, match="looks after 3, 6, 12 of the seeds 0-11,"):
        check_looks(other)
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text())["looks"] == planned.looks


def test_the_report_knows_the_looks_of_the_sweep(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(num_failing=6), "clip03": Arm()}, seeds=12)
    (file,) = (study.folder / ".sweeps").glob("*.json")
    sweep = json.loads(file.read_text())
    planned_looks = [[0, 1, 2], list(range(6)), list(range(12))]
    file.write_text(json.dumps(sweep | {"looks": planned_looks}))
    again = collect(study.folder.parent, study.name)
    assert dict(again.looks) == dict.fromkeys(study.variants, planned_looks)


def test_a_study_stays_with_the_endpoint_that_its_first_sweep_has_named(
    planned, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    about_loss = dataclasses.replace(
        planned, settings=dataclasses.replace(planned.settings, primary="loss")
    )
    folder = planned.folder / ".sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "before.json"
    file.write_text(json.dumps({"cells": [], "primary": "failures"}))
    check_looks(planned)
    with pytest.raises(
        InputError, match="primary=loss: the first sweep of looked set primary=failures"
    ):
        check_looks(about_loss)
    file.unlink()
    check_looks(about_loss)


def test_the_endpoint_is_one_of_two_and_another_one_is_another_sweep(planned):
    assert planned.settings.primary == "failures"
    more = ["recipe.max_steps=22", "seed=range(12)", "stability=clip03"]
    one, two = (make_plan("train", [*TINY, *more, *p]) for p in ([], ["primary=loss"]))
    assert one.sweep_id != two.sweep_id
    with pytest.raises(InputError, match="primary=time: must be one of failures, loss"):
        make_plan("train", [*TINY, *more, "primary=time"])
