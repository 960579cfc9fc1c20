import pytest

from src.study.analysis.endpoints import Window, clean_loss, loss_at, nonfinite_tokens, total
from src.study.read.collect import Run
from tests.study import synthetic
from tests.study.synthetic import Arm


def run_of(arm: Arm, key: str = "none") -> Run:
    (run,) = synthetic.in_memory({key: arm}, seeds=1).runs
    return run


def test_a_window_holds_its_end_and_not_its_start():
    window = Window(start=240, end=280)

    assert window.of([239, 240, 241, 280, 281]) == [241, 280]
    assert not window.is_empty and Window(start=280, end=280).is_empty


def test_a_run_is_at_risk_until_its_first_non_finite_step():
    window = Window(start=240, end=440)

    assert not window.is_at_risk(run_of(Arm(nonfinite=[[240, 300]])))
    assert window.is_at_risk(run_of(Arm(nonfinite=[[241]])))


def test_steps_until_the_first_failure_are_those_that_went_well():
    window = Window(start=240, end=440)

    assert window.steps_until_nonfinite(run_of(Arm(nonfinite=[[241]]))) == 0
    assert window.steps_until_nonfinite(run_of(Arm(nonfinite=[[440]]))) == 199
    assert window.steps_until_nonfinite(run_of(Arm())) == 200


def test_loss_at_half_the_cost_is_that_of_half_the_steps():
    run = run_of(Arm())
    at_step = dict(run.curve("val/loss"))

    for axis in ("steps", "tokens", "active_flops", "seconds"):
        whole = total(run, axis)
        assert loss_at(run, whole * 200 / 440, axis) == pytest.approx(at_step[200])
        assert loss_at(run, whole * 220 / 440, axis) == pytest.approx(
            (at_step[200] + at_step[240]) / 2
        )
        assert loss_at(run, whole, axis) == at_step[440]


def test_loss_outside_the_curve_is_not_known():
    run = run_of(Arm())

    assert loss_at(run, 440.001, "steps") is None
    assert loss_at(run, 39.9, "steps") is None
    assert loss_at(run, 40, "steps") is not None
    assert loss_at(run_of(Arm(record={"active_flops": None})), 1e9, "active_flops") is None
    assert loss_at(run_of(Arm(status="unfinished")), 40, "steps") is None


def test_a_total_that_is_no_round_number_still_reaches_the_last_step():
    # A number of seconds of which 440 parts of a 440th are more than the whole.
    seconds = next(x / 7 for x in range(1, 10_000) if x / 7 * 440 / (x / 7) > 440)
    run = run_of(Arm(record={"wall_seconds": seconds}))

    assert loss_at(run, seconds, "seconds") == dict(run.curve("val/loss"))[440]


def test_loss_of_averaged_weights_has_its_own_curve():
    run = run_of(Arm(), "ema")

    assert loss_at(run, 440, "steps") == pytest.approx(dict(run.curve("val/loss"))[440] - 0.02)


@pytest.mark.parametrize(
    "arm",
    [
        Arm(nonfinite=[[430]], nonfinite_frac=0.0),
        Arm(outcome="collapsed"),
        Arm(nonfinite_frac=0.1),
        Arm(nonfinite_frac=1.0),
        Arm(record={"final": {"val/loss": float("nan"), "val/nonfinite_frac": 0.0}}),
    ],
)
def test_a_run_that_was_not_finite_throughout_has_no_clean_loss(arm):
    assert clean_loss(run_of(arm), step=440) is None


def test_a_run_that_fails_later_is_clean_until_then():
    run = run_of(Arm(nonfinite=[[300]]))

    assert clean_loss(run, step=280) == dict(run.curve("val/loss"))[280]
    assert clean_loss(run, step=300) is None
    # No validation there: no number is made up.
    assert clean_loss(run, step=250) is None


def test_the_share_of_tokens_is_that_of_the_last_validation_up_to_a_step():
    run = run_of(Arm(nonfinite=[[300]], nonfinite_frac=0.2))

    assert nonfinite_tokens(run, step=440) == 0.1
    assert nonfinite_tokens(run, step=330) == 0.25
    assert nonfinite_tokens(run, step=299) == 0
    # Before the first validation nothing is known, nor in runs that did not count.
    assert nonfinite_tokens(run, step=10) is None
    assert nonfinite_tokens(run_of(Arm(counts_tokens=False)), step=440) is None
