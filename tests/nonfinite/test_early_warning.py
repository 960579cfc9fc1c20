"""Early warning: drifts that will reach a limit are said, others are not."""

import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from nonfinite.config import ON_ALARM
from nonfinite.lightning import EarlyWarning, StepGuard, Thresholds
from nonfinite.lightning.early_warning import drift_of
from nonfinite.lightning.step_callback import log
from nonfinite.limits import LIMITS, limit_of
from src.train import main
from tests.conftest import PACE
from tests.runs import assert_same_run, metrics, record, stop_after, train
from tests.training.harness import Harness, guard_config, recipe_config

GATE = "moe/layer_3/picked_logit_min"
RULES = Thresholds(window=5, sigmas=4.0, way_frac=0.2, horizon_frac=1.0)


def warned(values, *, name=GATE, max_steps=200, every=1, **arguments) -> EarlyWarning:
    """What comes of a series, one value a step."""
    early = EarlyWarning(
        say=lambda line: None,
        max_steps=max_steps,
        **{"float_max": 3.4e38, "thresholds": RULES} | arguments,
    )
    for index, value in enumerate(values, start=1):
        early.read_metrics(None, {name: value}, step=index * every)
    return early


def test_a_straight_drift_is_foretold_to_the_step():
    early = warned([-0.8 * step for step in range(60)])
    (alarm,) = early.alarms
    # A fifth of the way: 17.7 lies behind it after step 24; the first of them is step 1.
    assert alarm["step"] == 24
    assert alarm["value"] == pytest.approx(-18.4)
    assert alarm["drift"] == pytest.approx(-0.8)
    assert alarm["crossing_step"] == 112
    assert alarm["line"] == (
        "step 24: layers.3 lowest picked gate logit -18.4, falling 0.8 a step: underflow in about"
        " 88 steps"
    )


def test_without_a_last_step_the_limit_must_come_within_as_many_steps_again():
    series = [-0.8 * step for step in range(120)]
    assert warned(series, max_steps=-1).alarms[0]["step"] == 56
    assert warned([-0.1 * step for step in range(300)], max_steps=-1).alarms == []


def test_steps_between_values_are_counted():
    early = warned([-0.8 * step for step in range(60)], every=2, max_steps=400)
    assert early.alarms[0]["drift"] == pytest.approx(-0.4)
    assert early.alarms[0]["crossing_step"] == 224


def test_a_figure_that_multiplies_is_followed_on_its_logarithm():
    early = warned([2.0**step for step in range(100)], name="attention/layer_1/max_logit")
    (alarm,) = early.alarms
    assert alarm["drift"] == pytest.approx(2.0)
    assert alarm["crossing_step"] == 129
    assert "layers.1 largest attention logit" in alarm["line"]
    assert "2-fold a step: overflow in about" in alarm["line"]


def test_a_smaller_largest_number_brings_the_limit_nearer():
    series = [2.0**step for step in range(12)]
    name = "act/layer_0/absmax"
    assert warned(series, name=name).alarms == []
    (alarm,) = warned(series, name=name, float_max=65504.0).alarms
    assert alarm["limit"] == 65504.0
    assert ": overflow in about" in alarm["line"]
    assert alarm["crossing_step"] == 17


@pytest.mark.parametrize(
    "values",
    [
        [-20.0] * 60,  # stands still
        [-80.0 + step for step in range(60)],  # moves away
        [-0.02 * step for step in range(199)],  # too slow for this run
        [-0.8 * step for step in range(20)],  # a fifth of the way is still to come
        [-40.0 - 30.0 * (step % 2) for step in range(60)],  # noise
        [-0.5 * step - 30.0 * (step % 2) for step in range(60)],  # a drift below its noise
        # Too slow for this run, and on its way back.
        [-0.3 * step for step in range(100)] + [-30.0 + 0.3 * step for step in range(60)],
        [-0.8 * step for step in range(4)] + [math.nan, math.inf] * 9,  # nothing to go by
    ],
)
def test_whatever_is_no_drift_to_the_limit_is_no_alarm(values):
    assert warned(values).alarms == []


def test_a_figure_that_is_logged_twice_at_a_step_counts_once():
    early = EarlyWarning(say=lambda line: None, float_max=3.4e38, max_steps=200, thresholds=RULES)
    for step in range(1, 60):
        for value in (-0.8 * (step - 1), -80.0):
            early.read_metrics(None, {GATE: value}, step=step)
    (once,) = warned([-0.8 * step for step in range(60)]).alarms
    assert early.alarms == [once]


def test_alarms_that_were_told_before_a_resume_are_not_told_again():
    said: list[str] = []
    early = warned([-0.8 * step for step in range(60)])
    resumed = EarlyWarning(say=said.append, float_max=3.4e38, thresholds=RULES)
    resumed.load_state_dict(early.state_dict())
    resumed.on_step_end(SimpleNamespace(should_stop=False), None, 61)
    assert said == []
    early.say = said.append
    early.on_step_end(SimpleNamespace(should_stop=False), None, 61)
    assert said == [early.alarms[0]["line"]]


@pytest.mark.parametrize(
    ("precision", "largest"),
    [("16-mixed", 65504.0), ("16-true", 65504.0), ("bf16-mixed", 3.4e38), ("32-true", 3.4e38)],
)
def test_the_largest_number_is_that_of_the_trainers_precision(precision, largest):
    early = EarlyWarning()
    early.on_fit_start(SimpleNamespace(precision=precision, callbacks=[]), None)
    assert early.float_max == pytest.approx(largest, rel=0.01)
    given = EarlyWarning(float_max=7.0)
    given.on_fit_start(SimpleNamespace(precision=precision, callbacks=[]), None)
    assert given.float_max == 7.0


WHERE = {
    "grad/norm": "gradient norm 3.2",
    "grad/attention/norm": "gradient norm in group attention 3.2",
    "adam/0/moment_max": "largest second moment of AdamW in group 0 3.2",
    "output/logsumexp": "logsumexp of the output 3.2",
    "act/layer_2/absmax": "layers.2 largest activation 3.2",
}


@pytest.mark.parametrize("metric", WHERE)
def test_a_line_says_what_and_where(metric):
    (alarm,) = warned([1e9 ** (step / 10) for step in range(9)] + [3.2e8], name=metric).alarms
    said = alarm["line"].partition(": ")[2]
    assert said.startswith(WHERE[metric].removesuffix("3.2"))


def test_an_alarm_is_given_once_a_kind_of_figure_and_not_once_a_layer():
    early = EarlyWarning(say=lambda line: None, float_max=3.4e38, max_steps=200, thresholds=RULES)
    for step in range(1, 60):
        layers = {f"moe/layer_{i}/picked_logit_min": -0.8 * step for i in range(4)}
        early.read_metrics(None, {**layers, "grad/norm": 3.0**step}, step=step)
    whats = [alarm["what"] for alarm in early.alarms]
    assert sorted(whats) == ["gradient norm", "lowest picked gate logit"]


def test_a_drift_is_the_least_squares_line():
    steps, values = [1, 2, 4, 7], [1.0, 3.5, 6.0, 14.0]
    drift = drift_of(steps, values)
    # By hand: means 3.5 and 6.125, spread 21, products 44.25.
    assert drift.per_step == pytest.approx(44.25 / 21)
    residual = sum(
        (y - 6.125 - 44.25 / 21 * (x - 3.5)) ** 2 for x, y in zip(steps, values, strict=True)
    )
    assert drift.sigmas == pytest.approx(44.25 / 21 / math.sqrt(residual / 2 / 21))
    assert drift_of([1, 2, 3], [2.0, 4.0, 6.0]).sigmas == math.inf


def test_every_limit_is_of_a_metric_that_a_run_logs(tiny):
    folder = train(tiny, "watch.gradients_every=4", "watch.activations_every=4")
    logged = {name for line in metrics(folder) for name in line}
    met = {found[0].what for name in logged if (found := limit_of(name)) is not None}
    assert met == {limit.what for limit in LIMITS}
    assert limit_of("train/loss") is None


CRASH = (
    *PACE,
    "preset=crash",
    "ffn=moe_writeup_add",
    "recipe.max_steps=60",
    "model.num_layers=1",
    "recipe.log_every=2",
    # The bias falls by 2 a step: underflow at about step 44.
    "ffn.router.bias_rate=10",
    "data.max_chars=20000",
)


@pytest.fixture
def crash(tmp_path, monkeypatch, shared_cache):
    monkeypatch.chdir(tmp_path)
    return [a for a in CRASH if a != "preset=smoke"] + [f"paths.cache={shared_cache}"]


def test_a_run_is_warned_before_it_fails_and_its_record_tells(crash, capsys):
    folder = train(crash)
    made = record(folder)
    alarm, failed = made["alarms"][0], made["guard"]["first_nonfinite_step"]
    assert alarm["step"] < failed - 6
    assert alarm["crossing_step"] == pytest.approx(failed, abs=6)
    assert f"warning: {alarm['line']}" in " ".join(capsys.readouterr().err.split())
    assert made["outcome"] != "clean"


SOUND = "ffn.router.norm_eps=1e-20"
"""The gate drifts all the same, and nothing is NaN, which is not equal to itself."""


def test_on_alarm_changes_no_number_unless_it_stops(crash):
    plain = train(crash, SOUND)
    kept = train(crash, SOUND, "guard.on_alarm=checkpoint", "study=kept")
    assert_same_run(plain, kept)
    assert record(plain)["config_hash"] == record(kept)["config_hash"]
    step = record(kept)["alarms"][0]["step"]
    assert [f.name for f in (kept / "checkpoints").glob("state-*.ckpt")] == [f"state-{step}.ckpt"]
    assert not list((plain / "checkpoints").glob("state-*"))
    # The state kept there begins a counterfactual.
    fork = train(
        crash[-1:],
        "tracking=local",
        f"fork={kept}@{step}",
        "stability=router_eps",
        "stability.router_eps.start_frac=0",
    )
    assert record(fork)["outcome"] == "clean"


def test_on_alarm_stop_ends_the_run_there_in_order(crash):
    folder = train(crash, "guard.on_alarm=stop")
    made = record(folder)
    assert made["steps"] == made["alarms"][0]["step"]
    assert made["outcome"] == "stopped"
    assert made["guard"]["first_nonfinite_step"] is None


def test_interrupted_and_resumed_it_warns_as_uninterrupted(crash, monkeypatch):
    crash = [*crash, SOUND]
    whole = train(crash, "study=whole")
    step = record(whole)["alarms"][0]["step"]
    for name, stop in (("before", step - 3), ("after", step + 1)):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert main([*crash, f"study={name}"]) == 143
        assert main([*crash, f"study={name}"]) == 0
        parts = Path(str(whole).replace("whole", name))
        assert_same_run(whole, parts)
        assert record(parts)["alarms"] == record(whole)["alarms"]


def test_a_bad_on_alarm_is_refused(capsys):
    assert main(["guard.on_alarm=shout"]) == 2
    line = capsys.readouterr().err
    assert "guard.on_alarm=shout" in line and all(name in line for name in ON_ALARM)
    assert main(["watch.float_max=0"]) == 2
    guard = StepGuard(guard_config(on_alarm="checkpoint"), max_steps=1, log_every=1)
    trainer = SimpleNamespace(callbacks=[guard], precision="32-true")
    with pytest.raises(ValueError, match="needs the argument save"):
        EarlyWarning().on_fit_start(trainer, None)


def test_figures_reach_every_callback_that_reads_them():
    class Reads(pl.Callback):
        def __init__(self) -> None:
            self.seen: dict[int, set[str]] = {}

        def read_metrics(self, trainer, figures, *, step) -> None:
            self.seen.setdefault(step, set()).update(figures)

    reads = Reads()
    run = Harness(recipe=recipe_config(max_steps=2), callbacks=[reads]).fit()
    assert {"grad/norm", "guard/skipped"} <= reads.seen[1]
    log(run.trainer, {"a/b": 1.0}, step=9)
    assert reads.seen[9] == {"a/b"}
