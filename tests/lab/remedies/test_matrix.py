"""The words of the matrix, on studies that no one has trained."""

import math
import re

import pytest
import yaml

from src.common.number_format import MINUS, NONE
from src.lab.book.files import StudyFolder
from src.lab.book.page_words import Measures
from src.lab.book.select_arms import UndecidedError
from src.lab.remedies.effect import FREE, HARMS, HELPS, HELPS_LITTLE, NO_HELP, UNKNOWN
from src.lab.remedies.matrix_chart import matrix_chart
from src.study.read.from_csv import write_frame
from tests.lab.book.folders import results_of
from tests.study.synthetic import Arm

ATTENTION = {"attention": "gqa", "ffn": "mlp", "preset": "attention_logits"}
UNDERFLOW = {"ffn": "moe_writeup", "preset": "crash"}
CALM = {"ffn": "moe", "preset": "calm"}


def losses(mean, *, sway=0.01):
    return tuple(mean + sway * (-1) ** k for k in range(6))


ARMS = {
    "none": Arm(**ATTENTION, loss=losses(3.0)),
    "shaken_full": Arm(**ATTENTION, loss=losses(3.0, sway=-0.01)),
    "qk_norm": Arm(**ATTENTION, loss=losses(2.6)),
    "clip03": Arm(**ATTENTION, loss=losses(2.99, sway=0.012)),
    "lower_lr": Arm(**ATTENTION, loss=(2.5, 3.2, 2.6, 3.2, 2.5, 3.2)),
    "noise": Arm(**ATTENTION, loss=losses(3.2)),
    "cured": Arm(
        **ATTENTION,
        stability=[],
        fields="@qk_norm-true",
        loss=losses(2.5),
        baseline=None,
        config={"attention.qk_norm": True},
    ),
}

FAILURES = {
    "attention_logits": {
        "shows_as": "loss",
        "arguments": ["preset=attention_logits"],
        "healthy": ["attention.qk_norm=true"],
    }
}


def measures(tmp_path, arms, failures):
    folder = tmp_path / "experiments" / "zoo"
    (folder / "failures").mkdir(parents=True)
    for name, content in failures.items():
        text = yaml.safe_dump({"says": "It fails.", "reports": "", **content})
        (folder / "failures" / f"{name}.yaml").write_text(text)
    plan = {"failures": list(failures), "seeds": "range(6)", "short": [], "family": "baseline"}
    untried = ("none", "shaken_full", "cured")
    plan["remedies"] = [name for name in arms if name not in untried and "again" not in name]
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    write_frame(results_of(arms), folder / "results.csv")
    return Measures(StudyFolder(folder=folder), others=None)


@pytest.fixture(scope="module")
def of_attention(tmp_path_factory):
    return measures(tmp_path_factory.mktemp("book"), ARMS, FAILURES)


def test_a_failure_is_what_ends_a_tenth_above_the_healthy_runs(of_attention):
    assert of_attention.failing_share("attention_logits") == 1
    assert of_attention.healthy_failing_share("attention_logits") == 0
    assert of_attention.admitted() == ["attention_logits"]
    assert of_attention.damage("attention_logits") == pytest.approx(0.5)


def test_the_share_undone_is_one_where_the_run_is_as_good_as_healthy(of_attention):
    undone = {e.remedy: e.undone for e in of_attention.effects("attention_logits")}
    assert undone["qk_norm"] == pytest.approx(0.8)
    assert undone["noise"] == pytest.approx(-0.4)
    assert list(undone) == ["qk_norm", "lower_lr", "clip03", "noise"]


def test_a_verdict_needs_significance_or_an_interval_that_rules_help_out(of_attention):
    verdicts = {e.remedy: e.verdict for e in of_attention.effects("attention_logits")}
    assert verdicts == {"qk_norm": HELPS, "lower_lr": UNKNOWN, "clip03": NO_HELP, "noise": HARMS}


def test_what_surely_undoes_less_than_a_quarter_helps_a_little_and_is_not_counted(tmp_path):
    found = measures(tmp_path, ARMS | {"z_loss": Arm(**ATTENTION, loss=losses(2.95))}, FAILURES)
    effect = found.effect("attention_logits", "z_loss")
    assert effect.is_significant and effect.verdict == HELPS_LITTLE
    assert found.num_helpful("qk_norm") == 1 and found.num_helpful("z_loss") == 0


def test_the_interval_lies_around_the_share_in_its_order(of_attention):
    effect = of_attention.effect("attention_logits", "qk_norm")
    assert effect.low < effect.undone < effect.high


def test_cells_are_per_cent_and_bold_where_they_are_significant(of_attention):
    assert of_attention.cell("attention_logits", "qk_norm") == "**80 %**"
    assert of_attention.cell("attention_logits", "noise") == f"**{MINUS}40 %**"
    assert of_attention.cell("attention_logits", "clip03") == "2 %"
    assert of_attention.cell("attention_logits", "router_eps") == NONE


def test_failures_with_fewer_seeds_than_planned_are_named(of_attention, monkeypatch):
    assert of_attention.seeds_to_come() == []
    plan = {**of_attention.folder.plan["of_failures"], "seeds": "range(7)"}
    monkeypatch.setitem(of_attention.folder.plan, "of_failures", plan)
    assert of_attention.seeds_to_come() == ["attention_logits"]


def test_ranks_are_compared_between_the_first_and_the_last_seeds(of_attention):
    # lower_lr is better than clip03 in three of six seeds, and in their mean in both halves.
    assert of_attention.rank_agreement("attention_logits") == pytest.approx(1)


def test_ranks_that_turn_over_are_said(tmp_path):
    arms = {
        "none": Arm(**ATTENTION, loss=losses(3.0)),
        "clip03": Arm(**ATTENTION, loss=(2.6, 2.6, 2.6, 2.8, 2.8, 2.8)),
        "qk_norm": Arm(**ATTENTION, loss=(2.8, 2.8, 2.8, 2.6, 2.6, 2.6)),
        "cured": ARMS["cured"],
    }
    assert measures(tmp_path, arms, FAILURES).rank_agreement("attention_logits") == -1


def test_a_run_that_went_non_finite_has_the_loss_of_a_guess(tmp_path):
    broken = {"nonfinite": [[3]], "nonfinite_frac": 1.0, "loss": (math.nan,)}
    arms = {**ARMS, "muon": Arm(**ATTENTION, **broken, outcome="collapsed")}
    found = measures(tmp_path, arms, FAILURES)
    vocab = found.untreated("attention_logits")["vocab_size"].iloc[0]
    worse = math.log(vocab) - 3.0
    assert found.undone("attention_logits", "muon") == pytest.approx(-worse / 0.5, rel=1e-3)


CURED = Arm(
    **UNDERFLOW,
    stability=[],
    fields="@norm_eps-1e-20",
    baseline=None,
    config={"ffn.router.norm_eps": 1e-20},
)
FAILING_RUNS = {
    "router_underflow": {
        "shows_as": "nonfinite",
        "arguments": ["preset=crash"],
        "healthy": ["ffn.router.norm_eps=1e-20"],
    }
}


def test_of_an_underflow_the_share_of_failing_runs_counts(tmp_path):
    arms = {
        "none": Arm(**UNDERFLOW, num_failing=6),
        "shaken_full": Arm(**UNDERFLOW, num_failing=6),
        "router_eps": Arm(**UNDERFLOW),
        "clip03": Arm(**UNDERFLOW, num_failing=5),
        "cured": CURED,
    }
    found = measures(tmp_path, arms, FAILING_RUNS)
    assert found.undone("router_underflow", "router_eps") == 1
    assert found.undone("router_underflow", "clip03") == pytest.approx(1 / 6)
    assert found.effect("router_underflow", "clip03").num_failing == 5
    assert found.cell("router_underflow", "router_eps") == "**100 %**"


def test_what_fails_before_a_remedy_acts_does_not_count_against_it(tmp_path):
    early, late = [200], [350]
    arms = {
        "none": Arm(**UNDERFLOW, nonfinite=[early, late, late, late, late, late]),
        "shaken_full": Arm(**UNDERFLOW, nonfinite=[early, late, late, late, late, late]),
        "router_eps": Arm(**UNDERFLOW, acts_from=240, nonfinite=[early, [], [], [], [], []]),
        "cured": CURED,
    }
    found = measures(tmp_path, arms, FAILING_RUNS)
    effect = found.effect("router_underflow", "router_eps")
    assert effect.undone == 1
    assert effect.low < effect.undone <= effect.high
    # The seed that failed early is left out of a part of the seeds as well.
    assert found.undone("router_underflow", "router_eps", seeds=[0, 1, 2]) == 1
    with pytest.raises(UndecidedError, match="with these seeds"):
        found.undone("router_underflow", "router_eps", seeds=[0])


def test_remedies_that_were_decided_early_have_no_rank_in_the_second_half(tmp_path):
    arms = {
        "none": Arm(**UNDERFLOW, num_failing=6),
        "router_eps": Arm(**UNDERFLOW, seeds=[0, 1, 2]),
        "clip03": Arm(**UNDERFLOW, nonfinite=[[3], [3], [], [3], [3], []]),
        "noise": Arm(**UNDERFLOW, num_failing=6),
        "cured": CURED,
    }
    found = measures(tmp_path, arms, FAILING_RUNS)
    assert found.num_ranked("router_underflow") == 2
    assert found.rank_agreement("router_underflow") == 1


def test_where_nothing_is_wrong_the_change_in_loss_is_the_cost(tmp_path):
    arms = {
        "none": Arm(**CALM, loss=losses(2.3)),
        "shaken_full": Arm(**CALM, loss=losses(2.3, sway=-0.01)),
        "lower_lr": Arm(**CALM, loss=losses(2.4)),
        "muon": Arm(**CALM, loss=losses(2.2)),
        "clip03": Arm(**CALM, loss=losses(2.301, sway=0.012)),
    }
    failures = {"calm": {"shows_as": "nothing", "arguments": ["preset=calm"], "healthy": []}}
    found = measures(tmp_path, arms, failures)
    assert found.failures() == []
    assert found.greatest_cost() == pytest.approx(0.1)
    assert found.cell("calm", "lower_lr") == "**+0.100**"
    # A lower loss is the better one here, unlike a share that is undone.
    verdicts = {effect.remedy: effect.verdict for effect in found.effects("calm")}
    assert verdicts == {"muon": HELPS, "clip03": FREE, "lower_lr": HARMS}
    assert list(verdicts) == ["muon", "clip03", "lower_lr"]


def test_where_no_failure_has_been_run_all_is_undecided(tmp_path):
    calm = {"calm": {"shows_as": "nothing", "arguments": ["preset=calm"], "healthy": []}}
    found = measures(tmp_path, {"none": Arm(**CALM)}, calm)
    for measure in (found.least_agreement, found.greatest_cost):
        with pytest.raises(UndecidedError):
            measure()


def test_an_unknown_failure_or_remedy_is_undecided(of_attention):
    with pytest.raises(UndecidedError, match="no failure"):
        of_attention.failure("attention_logit")
    with pytest.raises(UndecidedError, match="was not tried"):
        of_attention.effect("attention_logits", "muon")


def colours_of(drawn):
    return set(re.findall(r'fill="(rgb\([^"]*\)|#[0-9a-f]{6})"', drawn))


@pytest.mark.drawn
def test_the_chart_colours_what_is_significant(of_attention, tmp_path):
    drawn = matrix_chart(of_attention)
    for text in ("attention", "logits", "qk_norm", "noise", "80 %"):
        assert text in drawn
    unclear = {k: v for k, v in ARMS.items() if k not in ("qk_norm", "noise")}
    # The blue of qk_norm and the red of noise are missing where neither was tried.
    grey = colours_of(matrix_chart(measures(tmp_path, unclear, FAILURES)))
    assert len(colours_of(drawn) - grey) >= 2


def repeated(name, loss):
    """The arm of a remedy with the failure that repeats."""
    stability = [] if name == "none" else [name]
    baseline = "none again"
    arm = {**ATTENTION, "preset": "no_warmup", "stability": stability, "loss": losses(loss)}
    return {f"{name} again": Arm(**arm, baseline=baseline)}


def test_a_repeat_is_no_failure_of_its_own_and_is_ranked_beside_what_it_repeats(tmp_path):
    again = {
        **repeated("none", 2.0),
        **repeated("qk_norm", 1.9),
        **repeated("lower_lr", 1.8),
        **repeated("clip03", 1.99),
        **repeated("zclip", 1.7),
    }
    warm = {"recipe.warmup_frac": 0.1}
    again["cured again"] = Arm(
        **{**ATTENTION, "preset": "no_warmup"},
        stability=[],
        fields="@warmup_frac-0.1",
        loss=losses(1.5),
        baseline=None,
        config=warm,
    )
    wide = {
        "shows_as": "loss",
        "arguments": ["preset=no_warmup"],
        "healthy": ["recipe.warmup_frac=0.1"],
        "repeats": "attention_logits",
        "seeds": "range(6)",
    }
    found = measures(tmp_path, {**ARMS, **again}, {**FAILURES, "wide": wide})
    assert found.failures() == ["attention_logits"]
    assert found.repeats() == ["wide"]
    assert found.seeds_to_come() == []
    # As in what it repeats qk_norm, lower_lr, clip03: two of three pairs in the same order.
    assert found.repeated("wide") == ["qk_norm", "lower_lr", "clip03"]
    assert found.repeat_agreement("wide") == pytest.approx(1 / 3)
    with pytest.raises(UndecidedError, match="repeats no other"):
        found.repeat_agreement("attention_logits")
