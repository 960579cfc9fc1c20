"""Sequential looks: which seeds they see, what they find, and when an arm needs no more seeds."""

import dataclasses
import itertools

import numpy as np
import pytest

from src.study.analysis.analyse import analyse
from src.study.analysis.looks import (
    ERROR_SHARES,
    LOSS,
    chance_if_halved,
    decision,
    last_bound,
    num_untreated,
    reached,
    seeds_by_look,
    sequential,
)
from src.study.analysis.multiple_testing import adjusted, means, shares
from src.study.analysis.permutation import Pair, Permuted, permute
from src.study.analysis.results import Proportion
from tests.study import synthetic
from tests.study.remedies import arm
from tests.study.synthetic import Arm

LOOKS = ((0, 1, 2), (0, 1, 2, 3, 4, 5), tuple(range(12)))


def pairs(failing, seeds=12, controls=3):
    """The arm fails on the first so many seeds, the untreated runs on all."""
    return {s: Pair(arm=(float(s < failing),), baseline=(1.0,) * controls) for s in range(seeds)}


def test_looks_double_and_end_with_all_seeds():
    seeds = list(range(1000, 1020))
    assert [len(look) for look in seeds_by_look(seeds)] == [5, 10, 20]
    assert seeds_by_look(seeds)[0] == seeds[:5] and seeds_by_look(seeds)[2] == seeds
    assert [len(look) for look in seeds_by_look(seeds[:13])] == [4, 7, 13]
    assert sum(ERROR_SHARES) == pytest.approx(1.0)


@pytest.mark.parametrize(("arms", "untreated"), [(1, 2), (4, 2), (6, 2), (7, 3), (10, 3), (16, 4)])
def test_the_untreated_runs_are_the_square_root_of_the_arms(arms, untreated):
    assert num_untreated(arms) == untreated


def test_an_arm_has_reached_the_looks_that_added_seeds_for_it():
    assert reached(range(3), LOOKS) == [LOOKS[0]]
    assert reached(range(6), LOOKS) == list(LOOKS[:2])
    # A run that failed to train takes no look away.
    assert reached([0, 2, 4, 7], LOOKS) == list(LOOKS)
    assert reached([20, 21], LOOKS) == []


def least(pairs, looks):
    """The smallest p over the looks, each divided by its share of the error."""
    each = [permute({seed: pairs[seed] for seed in look}).p_value for look in looks]
    return min(p / error for p, error in zip(each, ERROR_SHARES, strict=False))


def relabelled(pairs):
    """The same runs with each choice of the arm's runs."""
    for chosen in itertools.product(range(3), repeat=len(pairs)):
        again = {}
        for (seed, pair), one in zip(pairs.items(), chosen, strict=True):
            runs = [*pair.arm, *pair.baseline]
            again[seed] = Pair(arm=(runs.pop(one),), baseline=tuple(runs))
        yield again


@pytest.mark.parametrize("num_looks", [1, 2, 3])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_p_is_the_share_of_labellings_that_are_as_remarkable_at_any_look(num_looks, failing):
    looks = ((0, 1, 2, 3), (0, 1, 2, 3, 4), tuple(range(6)))[:num_looks]
    own = pairs(failing, seeds=len(looks[-1]), controls=2)
    values = [least(each, looks) for each in relabelled(own)]
    share = np.mean([value <= least(own, looks) * (1 + 1e-9) for value in values])
    to_come = least(own, looks) * (1 - sum(ERROR_SHARES[:num_looks]))

    found = sequential(own, looks, permute)

    assert found.p_value == pytest.approx(min(1.0, share + to_come))
    assert found.p_value <= min(1.0, least(own, looks)) + 1e-12
    assert found.smallest_p <= found.p_value + 1e-12


def test_looks_of_too_many_labellings_share_the_error():
    random = np.random.default_rng(0)
    values = random.normal(size=(12, 4))
    values[:, 0] -= 1.0
    own = {seed: Pair(arm=(v[0],), baseline=tuple(v[1:])) for seed, v in enumerate(values)}
    found = sequential(own, LOOKS, permute)
    assert found.num_exact == 2 and 0 < found.p_value < 0.05
    assert found.p_value == pytest.approx(least(own, LOOKS), rel=0.4)
    assert found.p_value <= least(own, LOOKS)


@pytest.mark.parametrize("bound", [0.05, 0.005])
@pytest.mark.parametrize("num_looks", [2, 3])
def test_what_the_last_look_must_show(bound, num_looks):
    """Among all numbers of failing runs: significant exactly where p at the last look allows it."""
    looks = seeds_by_look(range(20))[:num_looks]
    size, half = len(looks[-1]), len(looks[-1]) // 4
    decided = set()
    for failing in range(half, size + 1):
        # The seeds before show hardly anything.
        own = {s: Pair(arm=(1.0,), baseline=(1.0, 1.0, float(s > 0))) for s in range(half)}
        own |= {s: Pair(arm=(float(s < failing),), baseline=(1.0,) * 3) for s in range(half, size)}
        found, p_value = sequential(own, looks, permute), permute(own).p_value
        limit = last_bound(bound, own, looks, found.num_exact)
        assert ERROR_SHARES[num_looks - 1] * bound <= limit <= bound
        # The limit is searched in steps of 5 %.
        if not limit < p_value < limit * 1.06:
            assert (found.p_value <= bound) == (p_value <= limit)
        decided.add(found.p_value <= bound)
    assert decided == {True, False}


@pytest.mark.parametrize("compared", [[], [3], [15]])
def test_one_seed_or_none_shows_nothing_at_any_look(compared):
    """Of the others the baseline may have failed before the arm could act."""
    own = {seed: Pair(arm=(0.0,), baseline=(1.0, 1.0)) for seed in compared}
    found = sequential(own, LOOKS, permute)
    assert found.p_value == found.smallest_p == 1.0
    assert last_bound(0.05, own, LOOKS, found.num_exact) <= 0.05


def test_a_value_of_another_size_changes_no_look_before_it():
    own = pairs(0)
    own[11] = Pair(arm=(0.0,), baseline=(1e9, 1.0, 1.0))
    assert least(own, LOOKS[:2]) / 100 < sequential(own, LOOKS, permute).p_value < 0.05


def test_a_look_of_too_many_labellings_leaves_the_others_exact():
    random = np.random.default_rng(0)
    values = random.normal(size=(12, 4))
    values[:6, 0] -= 3.0
    own = {seed: Pair(arm=(v[0],), baseline=tuple(v[1:])) for seed, v in enumerate(values)}
    found = [sequential(own, LOOKS[:number], permute) for number in (2, 3)]
    assert [each.num_exact for each in found] == [2, 2]
    assert found[1].p_value <= found[0].p_value


def test_an_arm_that_was_given_up_stays_in_the_family():
    """It has few runs because of what they showed, so that leaving it out would favour the rest."""
    few = Permuted(p_value=1.0, smallest_p=0.2)
    good = Permuted(p_value=0.03, smallest_p=0.001)
    planned = {"given up": few, "good": good}
    for looks, p_value in (
        ({}, 0.03),
        (dict.fromkeys(planned, ()), 0.03),
        ({"given up": LOOKS}, 0.06),
    ):
        assert adjusted(planned, looks)["good"].p_value == pytest.approx(p_value)


def test_seeds_that_no_look_planned_change_nothing():
    more = pairs(3) | {s: Pair(arm=(0.0,), baseline=(1.0,) * 3) for s in range(50, 90)}
    assert sequential(more, LOOKS, permute) == sequential(pairs(3), LOOKS, permute)


def test_a_later_look_never_takes_a_finding_back():
    good_start = {s: Pair(arm=(float(s > 5),), baseline=(1.0,) * 3) for s in range(12)}
    before = sequential(good_start, LOOKS[:2], permute)
    assert sequential(good_start, LOOKS, permute).p_value <= before.p_value


def test_looks_keep_the_error_where_no_arm_has_an_effect():
    """Stopping at whichever look finds something, over a family of four arms."""
    random = np.random.default_rng(3)
    found = 0
    for _ in range(300):
        control = random.binomial(1, 0.6, (12, 2)).astype(float)
        values = {f"arm {n}": random.binomial(1, 0.6, 12).astype(float) for n in range(4)}
        each = {
            name: {s: Pair(arm=(own[s],), baseline=tuple(control[s])) for s in range(12)}
            for name, own in values.items()
        }
        untreated = {
            name: Proportion(events=int(control.sum()), total=control.size) for name in each
        }
        tested = shares(each, untreated, looks=dict.fromkeys(each, LOOKS))
        found += any(one.detected for one in tested.values())
    assert found <= 300 * 0.05


def test_a_halving_is_ruled_out_by_many_failures():
    def chance(events, total, untreated=(15, 15)):
        return chance_if_halved(
            Proportion(events=events, total=total),
            Proportion(events=untreated[0], total=untreated[1]),
        )

    # Close to the binomial probability of 5 in 5 at one half, a little below: 15 of 15 may be 97 %.
    assert 0.02 < chance(5, 5) < 0.5**5
    assert chance(10, 10) < 0.002
    assert chance(2, 5) > 0.5
    assert chance(0, 5) == pytest.approx(1.0)
    # With few untreated runs less is known about their share.
    assert chance(5, 5, untreated=(2, 2)) < chance(5, 5)
    # Runs of a seed that fail alike are fewer than they look.
    three = Proportion(events=15, total=15)
    alone = chance_if_halved(three, three, num_seeds=5)
    alike = chance_if_halved(three, three, num_seeds=5, within_seed=1.0)
    assert alone < 1e-4 and alike == pytest.approx(chance(5, 5, untreated=(5, 5)))
    assert chance(0, 0) == 1.0 and chance(3, 3, untreated=(0, 9)) == 1.0


def sequential_study(arms, seeds=12):
    study = synthetic.in_memory(arms, seeds=seeds)
    return dataclasses.replace(study, looks=dict.fromkeys(study.variants, LOOKS))


ALL = range(12)
STUDY = {
    "none": Arm(num_failing=12),
    "shaken_full": Arm(num_failing=12, first=310),
    "router_eps": Arm(seeds=range(6)),
    "clip03": Arm(num_failing=6, seeds=range(6)),
    "noise": Arm(num_failing=6, seeds=range(6)),
    "zclip": Arm(num_failing=6, seeds=range(6)),
    "clip_value": Arm(num_failing=9),
}


def test_an_arm_that_is_decided_early_is_compared_on_its_own_seeds():
    found = analyse(sequential_study(STUDY))

    eps, clip, value = (arm(found, name) for name in ("router_eps", "clip03", "clip_value"))
    assert (eps.num_looks, clip.num_looks, value.num_looks) == (2, 2, 3)
    assert eps.untreated_nonfinite == Proportion(events=12, total=12)
    assert eps.comparisons["nonfinite"].detected and "significantly" in decision(eps)
    assert "too many for a remedy that prevents half" in decision(clip)
    assert decision(value) is None
    said = "\n".join(found.answer)
    assert "Looked at after 3, 6 and 12 seeds; p accounts for all 3 looks." in said
    assert "not trained further: router_eps, clip03, noise and zclip after 6 seeds." in said
    assert not any("missing" in warning for warning in found.warnings)


def test_the_same_runs_are_worth_less_after_looks():
    plain = analyse(synthetic.in_memory(STUDY, seeds=12))
    looked = analyse(sequential_study(STUDY))
    for name in ("router_eps", "clip_value"):
        one, two = (arm(each, name).comparisons["nonfinite"] for each in (plain, looked))
        # Where no labelling of the first looks shows anything, they have cost nothing.
        assert (one.p_value < two.p_value) if name == "router_eps" else one.p_value == two.p_value
    assert any("missing" in warning for warning in plain.warnings)


def test_where_nothing_fails_no_seed_is_added():
    arms = {"none": Arm(), "shaken_full": Arm(), "clip03": Arm()}
    found = arm(analyse(sequential_study(arms)), "clip03")
    assert decision(found) == "none of 24 untreated runs fails, so nothing can be prevented"


def test_an_arm_that_could_not_act_yet_stays_open():
    arms = {
        "none": Arm(num_failing=12, first=200),
        "shaken_full": Arm(num_failing=12, first=200),
        "warmdown": Arm(num_failing=12, first=200, acts_from=240),
        "ema": Arm(acts_from=440),
        "early_stop": Arm(acts_from=150, steps=150),
    }
    found = analyse(sequential_study(arms))
    assert decision(arm(found, "warmdown")) is None
    ends = "it ends at step 150 and changes none before, so nothing is compared"
    assert decision(arm(found, "early_stop")) == ends
    assert decision(arm(found, "ema")) == "it trains as its baseline does"


def test_runs_that_are_meant_to_stop_are_said_once():
    stop = {"guard.on_nonfinite": "stop"}
    arms = {
        name: Arm(num_failing=6, batches=1, outcome="stopped", config=stop)
        for name in ("none", "clip03", "zclip")
    }
    said = [w for w in analyse(synthetic.in_memory(arms)).warnings if "first non-finite step" in w]
    assert len(said) == 1 and "guard.on_nonfinite=stop" in said[0]


def wave(mean, sway):
    return tuple(mean + sway * (-1) ** k for k in range(12))


OF_LOSSES = {
    "none": Arm(loss=wave(3.0, 0.01)),
    "shaken_full": Arm(loss=wave(3.0, -0.01)),
    "qk_norm": Arm(loss=wave(2.8, 0.01), seeds=range(6)),
    "clip03": Arm(loss=wave(3.0, 0.005), seeds=range(6)),
    "noise": Arm(loss=(2.5, 3.4) * 6),
}


def test_of_a_study_about_the_loss_the_loss_decides():
    study = dataclasses.replace(sequential_study(OF_LOSSES), primary=LOSS)
    found = analyse(study)
    better, same, open_still = (arm(found, name) for name in ("qk_norm", "clip03", "noise"))
    assert "significantly different" in decision(better, LOSS)
    assert decision(same, LOSS).endswith("lowers the loss by less than 0.02 nats")
    assert decision(open_still, LOSS) is None
    # No run fails, so that failures would decide every arm at once.
    assert all("none of" in decision(each) for each in (better, same, open_still))
    said = "\n".join(found.answer)
    assert "Looked at by their loss after 3, 6 and 12 seeds" in said
    assert "not trained further: qk_norm and clip03 after 6 seeds" in said


def test_a_study_about_the_loss_begins_with_it_where_runs_fail():
    arms = {**OF_LOSSES, "zclip": Arm(num_failing=6, loss=wave(3.0, 0.01))}
    plain = synthetic.in_memory(arms, seeds=12)
    about_loss = dataclasses.replace(plain, primary=LOSS)
    first, usual = (analyse(study).answer[0] for study in (about_loss, plain))
    assert first.startswith("Significantly lower loss than the baseline: qk_norm")
    assert "runs go non-finite" in usual


@pytest.mark.slow
def test_seeds_by_look_losses_keep_the_error():
    """Ten arms without an effect, looked at three times, many times over."""
    random = np.random.default_rng(5)
    called = 0
    for _ in range(150):
        values = random.normal(size=(12, 13))
        each = {
            f"arm{n}": {
                seed: Pair(arm=[values[seed, n]], baseline=list(values[seed, 10:]))
                for seed in range(12)
            }
            for n in range(10)
        }
        tested = means(each, looks=dict.fromkeys(each, LOOKS))
        called += any(arm.detected for arm in tested.values())
    # At most 5 %. With each look at the whole error it would be 12 of these 150.
    assert called <= 7
