"""The benchmark of the detector: faults strike as they say, verdicts and scores count rightly."""

import csv
import json
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nonfinite.causes import RULES
from nonfinite.lightning.early_warning import Thresholds
from src.common.override_grammar import quote_free_text
from src.config.compose import compose
from src.lab.detector import run_detector
from src.lab.detector.cases import CASES, QUICK, STEPS
from src.lab.detector.faults import FAULTS, build
from src.lab.detector.score import misses, score
from src.lab.detector.thresholds import grid, try_all
from src.lab.detector.verdict import Verdict, first_alarm, judge
from tests.runs import lab, metrics, record, train

GROWING = [name for name, (_, grows_by) in FAULTS.items() if grows_by]
SUDDEN = ["infinite_gradient", "nan_weight", "masked_row"]


def test_the_benchmark_is_as_large_as_it_says():
    kinds = Counter(case.kind for case in CASES)
    assert kinds["healthy"] * 6 >= 50
    assert (kinds["drift"] + kinds["sudden"]) * 6 >= 50
    assert kinds["drift"] + kinds["sudden"] >= 8
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.cause for case in CASES} - {""} <= {name for name, _ in RULES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_composes_and_is_short(case):
    arguments = [quote_free_text(a) for a in (*case.arguments, *QUICK, "seed=1")]
    config = compose("train", arguments)
    assert config.recipe.max_steps == STEPS
    assert config.watch.float_max == case.float_max


def first_failure(fault: str, *, seed: int) -> int | None:
    """The first step whose loss or gradient norm is not finite, found without the guard."""
    torch.manual_seed(seed)
    model = build(vocab_size=16, max_seq_len=8, fault=fault, steps=40)
    tokens = torch.randint(16, (2, 9))
    for step in range(1, 41):
        model.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.stack((loss, norm)).isfinite().all():
            return step
        model.finish_step(applied=True)
    return None


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fault", [*GROWING, *SUDDEN])
def test_a_fault_strikes_within_the_run_and_not_at_its_beginning(fault, seed):
    step = first_failure(fault, seed=seed)
    assert step is not None
    assert step > 8


def test_without_a_fault_nothing_happens():
    assert first_failure("none", seed=0) is None


def test_its_time_hangs_on_the_seed():
    assert len({first_failure("nan_weight", seed=seed) for seed in range(5)}) > 2


V = Verdict(
    case="c",
    kind="drift",
    is_planted=True,
    half="unseen",
    seed=0,
    first_nonfinite=60,
    alarm_step=34,
    alarm_in_run=34,
    alarm_metric="m",
    alarm_crossing=61,
    place="a: b",
    place_right=True,
    cause="bad gradient",
    cause_right=True,
)


def test_a_score_counts_what_it_says():
    verdicts = [
        V,
        replace(V, alarm_step=None),
        replace(V, alarm_step=60),  # with the failure is not before it
        replace(V, alarm_step=21, cause="unknown", cause_right=False, is_planted=False),
        replace(V, first_nonfinite=None, place_right=None, cause_right=None),
        replace(V, kind="sudden", alarm_step=None, place_right=False),
        replace(V, kind="sudden", cause="router underflow", cause_right=False, place_right=None),
        # Not noticed by the recorder.
        replace(V, kind="sudden", place=None, place_right=False, cause=None, cause_right=False),
        replace(V, kind="healthy", first_nonfinite=None),
        replace(V, kind="healthy", first_nonfinite=None, alarm_step=None),
    ]
    found = score(verdicts)
    assert (found.drifting, found.warned, found.sudden, found.sudden_warned) == (4, 2, 3, 2)
    assert found.median_lead == pytest.approx((26 / STEPS) / 2)
    assert (found.healthy, found.false_alarms, found.healthy_incidents) == (2, 1, 0)
    assert (found.placed, found.place_right) == (6, 4)
    assert (found.natural, found.natural_warned) == (1, 1)
    assert found.natural_lead == pytest.approx(39 / STEPS)
    assert (found.incidents, found.cause_right, found.cause_unknown) == (7, 4, 2)
    assert (found.cause_wrong, found.did_not_fail) == (1, 1)
    lines = misses(verdicts)
    assert sum("no warning" in line for line in lines) == 2
    assert sum("false alarm" in line for line in lines) == 1
    assert sum("did not fail" in line for line in lines) == 1
    assert sum("cause" in line for line in lines) == 2
    assert sum("named a: b" in line for line in lines) == 1
    assert sum("no operation" in line for line in lines) == 1
    assert sum("no incident" in line for line in lines) == 1


def test_thresholds_are_ranked_by_false_alarms_then_warnings_then_lead():
    name = "moe/layer_0/picked_logit_min"
    drift = [{"step": step, name: -0.8 * step} for step in range(1, 61)]
    flat = [{"step": step, name: -1.0} for step in range(1, 61)]
    early = [{"step": step, name: -0.8 * min(step, 18)} for step in range(1, 61)]
    healthy = replace(V, kind="healthy", first_nonfinite=None)
    outcomes = try_all([(V, drift, None), (healthy, flat, None), (healthy, early, None)])
    assert len(outcomes) == len(list(grid()))
    best = outcomes[0]
    assert (best.false_alarms, best.warned, best.drifting) == (0, 1, 1)
    # A drift that stops at -14.4 has gone 15 % of the way, and is believed by whoever asks less.
    assert best.thresholds.way_frac >= 0.15
    assert [o.rank for o in outcomes] == sorted((o.rank for o in outcomes), reverse=True)


def test_going_over_the_metrics_again_gives_the_warnings_of_the_run(tiny):
    folder = train(
        [*tiny, "ffn=moe_writeup_add", "ffn.router.bias_rate=20", "recipe.max_steps=60"],
        "recipe.log_every=2",
        "recipe.precision=32-true",
    )
    alarm = record(folder)["alarms"][0]
    again = first_alarm(metrics(folder), Thresholds(), float_max=None)
    assert again is not None
    # The benchmark's runs are longer, which is all that it knows otherwise.
    assert (again["step"], again["metric"]) == (alarm["step"], alarm["metric"])
    verdict = judge(CASES[1], folder, half="set", seed=0)
    assert verdict.alarm_step == alarm["step"]
    assert verdict.alarm_in_run == alarm["step"]
    assert verdict.place_right and verdict.cause_right
    assert verdict.failed and not verdict.is_planted
    # A failure that nobody wrote down is no success.
    made = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**made, "incident": None}))
    verdict = judge(CASES[1], folder, half="set", seed=0)
    assert verdict.place_right is False and verdict.cause_right is False


class Here:
    """In place of a pool: its process would import all that is imported here."""

    def __init__(self, *_, **__) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def submit(self, function, *args, **kwargs) -> Future:
        done = Future()
        done.set_result(function(*args, **kwargs))
        return done


@pytest.mark.slow
def test_the_command_trains_judges_and_lists(tmp_path, monkeypatch, capsys, shared_cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_detector, "ProcessPoolExecutor", Here)
    few = [case for case in CASES if case.name in ("an MLP", "attention growth")]
    monkeypatch.setattr(run_detector, "CASES", few)
    given = ["seeds=[1]", "unseen=[2]", "n_jobs=1", f"paths.cache={shared_cache}", "out=book"]
    given.append("only=planted")
    assert lab("detect")(given) == 0
    said = capsys.readouterr().out
    assert "1 of 1 (100%)" in said
    assert "thresholds in use" in said
    with open("book/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["half"]) for row in rows] == [
        (case.name, half) for case in few for half in ("set", "unseen")
    ]
    assert all(row["place_right"] == "True" for row in rows if row["kind"] != "healthy")
    # Again: nothing is trained, and the same is said.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("record.json")}
    assert lab("detect")(given) == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("record.json")} == before
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("seeds=3", "seeds=3"),
        ("seeds=[]", "seeds=[]"),
        ("seeds=[-1]", "seeds=[-1]"),
        ("n_jobs=0", "n_jobs=0"),
        ("only=both", "only=both"),
        ("seeds=[1] unseen=[1]", "unseen=[1]"),
        ("sead=1", "unknown field"),
    ],
)
def test_bad_input_gets_one_line(case, part, capsys):
    assert lab("detect")(case.split(" ")) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
