import pytest

from src.lab.book.page_words import Measures
from src.lab.book.select_arms import UndecidedError
from src.study.analysis.analyse import analyse
from tests.lab.book.folders import study_folder
from tests.study.synthetic import Arm


def measures(tmp_path, arms=None):
    folder = study_folder(tmp_path) if arms is None else study_folder(tmp_path, arms)
    return Measures(folder, others={}.__getitem__)


def test_failures_are_counted_from_where_an_arm_acts(tmp_path):
    m = measures(tmp_path)
    assert (m.failing("none"), m.failing("router_eps"), m.failing("shaken")) == (6, 0, 5)
    assert m.sum_failing() == 17 and m.least_failing() == 0
    assert m.seeds("none") == m.seeds_at_risk("router_eps") == 6
    assert m.first("none") == [300] * 6 and m.median_first("none") == 300
    assert m.batches("none") == [20] * 6 and m.mean_batches("router_eps") == 0


def test_significant_differences_and_their_p_values(tmp_path):
    m = measures(tmp_path)
    assert m.detected("router_eps") == 1 and m.detected("warmdown") == 0
    assert m.fewer_detected() == 1 and m.fewer_detected(except_for=["router_eps"]) == 0
    # The baseline loses 20 batches of each seed, the A/A control as many of five and none of one.
    assert m.difference("router_eps", "nonfinite_batches") == pytest.approx(-55 / 3)
    assert m.failing_untreated("router_eps") == 11 and m.untreated_at_risk("router_eps") == 12
    assert m.num_compared() == 2 and m.num_detected("nonfinite") == 1
    assert m.num_detected_over_study("nonfinite") == 1
    assert 0 < m.detectable("router_eps") <= 1
    assert m.p_value("router_eps") < 0.05 < m.p_value("warmdown")


@pytest.mark.parametrize(
    ("arms", "can_rank"),
    [
        ({"none": Arm(num_failing=6), "router_eps": Arm(acts_from=240)}, True),
        ({"none": Arm(num_failing=6), "router_eps": Arm(num_failing=5, acts_from=240)}, False),
        ({"none": Arm(num_failing=2), "router_eps": Arm(acts_from=240)}, False),
        ({"none": Arm(num_failing=6), "warmdown": Arm(num_failing=6)}, True),
    ],
)
def test_a_study_ranks_remedies_only_if_it_found_its_positive_control(tmp_path, arms, can_rank):
    m = measures(tmp_path, arms)
    assert m.can_rank() == analyse(m.folder.study).can_rank == can_rank


def test_arms_are_chosen_by_what_their_names_say(tmp_path):
    arms = {
        "none": Arm(num_failing=2),
        "ema": Arm(num_failing=3),
        "wide": Arm(stability=["ema"], num_failing=4, fields="@horizon_frac-0.1"),
    }
    m = measures(tmp_path, arms)
    assert m.failing("ema") == 7
    assert m.failing("ema", horizon_frac=None) == 3
    assert m.failing(horizon_frac="0.1") == 4
    assert m.one("ema").variant == m.one("ema", horizon_frac=None).variant
    with pytest.raises(UndecidedError, match="no arm of one has"):
        m.failing("clip03")


def test_of_several_that_fit_alike_none_is_taken(tmp_path):
    arms = {"none": Arm(), "ema": Arm(), "warmdown": Arm(stability=["ema"], attention="gqa")}
    with pytest.raises(ValueError, match="matches several arms"):
        measures(tmp_path, arms).mean_loss("ema")


def test_what_no_run_shows_is_undecided(tmp_path):
    m = measures(tmp_path, {"none": Arm(), "router_eps": Arm()})
    for asked in (
        lambda: m.median_first("none"),
        lambda: m.null_width("router_eps"),
        lambda: m.lost_after_first(ffn="moe_writeup_add"),
        lambda: m.sensitivity("none"),
        lambda: m.difference("none", "loss"),
    ):
        with pytest.raises(UndecidedError):
            asked()


def test_the_first_failure_beside_a_step_known_beforehand(tmp_path):
    m = measures(tmp_path, {"none": Arm(num_failing=6, first=311, batches=44), "ema": Arm()})
    assert m.greatest_miss(310.5, stability="none") == 0.5
    # Every third step of 130.
    assert m.lost_after_first(stability="none") == pytest.approx(44 / 130)


def test_counts_of_an_arm_that_acts_late_leave_out_what_came_before_and_runs_that_have_not_ended(
    tmp_path,
):
    early, late = [100, 101], [300]
    arms = {
        "none": Arm(nonfinite=[early, late, late, [], [], []]),
        "shaken": Arm(
            nonfinite=[early, early, late, [], [250, 251], [], [], [], [], [], [], []],
            acts_from=240,
            repeats=2,
        ),
        "ema": Arm(nonfinite=[late], status="killed", seeds=[0], acts_from=240),
    }
    m = measures(tmp_path, arms)
    # Runs of seeds 1 to 5; of each the batches after step 240.
    assert m.batches("shaken") == [1, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    assert m.mean_batches("shaken") == pytest.approx((0.5 + 1) / 5)
    assert m.first("shaken") == [100, 100, 300, 250]
    assert m.failed_by(250, "shaken") == 3 and m.failed_by(99, "shaken") == 0
    assert m.first("ema") == [] and m.num_runs_of("none") == 6
    assert m.shares_lost("none", after=99, until=299) == [0, 0, 2 / 200]
    assert m.shares_lost("none", after=100, until=300) == [1 / 200] * 3


def test_the_range_of_single_runs_of_the_aa_control(tmp_path):
    counts = [(10, 14), (20, 11), (5, 9), (7, 7), (0, 2), (3, 1)]
    arms = {
        "none": Arm(nonfinite=[range(300, 300 + n) for n, _ in counts]),
        "shaken_full": Arm(nonfinite=[range(300, 300 + n) for _, n in counts]),
    }
    m = measures(tmp_path, arms)
    assert m.null_width("shaken_full") == 13 and m.greatest_shift("shaken_full") == 9


def test_spikes_before_failures_and_damage_that_validation_alone_sees(tmp_path):
    arms = {
        "none": Arm(num_failing=4, spikes=[[290], [305], [], [10, 400], [20], []]),
        "warmdown": Arm(nonfinite_frac=0.1),
        "router_eps": Arm(acts_from=240),
    }
    m = measures(tmp_path, arms)
    assert m.spiked_before("none") == 2
    assert m.failing_or_marked("none") == 4 and m.failing_or_marked("router_eps") == 0
    assert m.failing_or_marked("warmdown") == 6
    assert m.mean_nonfinite_frac("none") == pytest.approx(4 * 0.5 / 6)
    assert m.mean_nonfinite_frac("warmdown") == pytest.approx(0.1)


@pytest.mark.parametrize(("peak", "before"), [(299, 4), (300, 0), (None, 0)])
def test_the_largest_norm_of_a_failing_run_comes_before_its_failure_or_not(tmp_path, peak, before):
    spikes = {"grad_norm_max": 9.0, "grad_norm_max_step": peak, "steps": []}
    m = measures(tmp_path, {"none": Arm(num_failing=4, record={"spikes": spikes}), "ema": Arm()})
    assert m.peaked_before("none") == before


def test_the_spread_of_the_aa_control_and_the_effect_that_seeds_can_detect(tmp_path):
    losses = (2.0, 2.1, 2.2, 2.3, 2.4, 2.5)
    shaken = tuple(loss + shift for loss, shift in zip(losses, (0, 1, 0, 1, 0, 1), strict=True))
    m = measures(tmp_path, {"none": Arm(loss=losses), "shaken": Arm(loss=shaken)})
    assert m.null_spread("shaken", "loss") == pytest.approx((6 * 0.25 / 5) ** 0.5)
    six, forty = (m.visible("shaken", "loss", num_seeds=n) for n in (6, 40))
    # The standardized effect that a paired t test finds 8 times of 10, of any table of power.
    assert forty == pytest.approx(0.454 * m.null_spread("shaken", "loss"), rel=0.08)
    # Of six pairs, only equal signs give a p below 0.05: more than the 1.435 of a t test.
    assert six > 1.435 * m.null_spread("shaken", "loss")


def test_more_seeds_and_fewer_arms_show_a_weaker_remedy(tmp_path):
    m = measures(tmp_path, {"none": Arm(num_failing=6), "zclip": Arm()})
    few, many, alone = (
        m.visible_prevention(num_seeds=seeds, num_arms=arms)
        for seeds, arms in ((6, 4), (12, 4), (6, 1))
    )
    assert many < few and alone < few
    with pytest.raises(UndecidedError, match="cannot detect any effect"):
        m.visible_prevention(num_seeds=2, num_arms=14)


def test_a_trend_over_a_field_exchanges_its_values_within_seeds(tmp_path):
    rates = {"none": 1e-4, "lower_lr": 1e-3, "clip03": 1e-2}
    arms = {
        name: Arm(num_failing=2 * place, config={"recipe.learning_rate": rate})
        for place, (name, rate) in enumerate(rates.items())
    }
    assert measures(tmp_path / "a", arms).trend_p("learning_rate") < 0.05
    level = {name: Arm(num_failing=3, config=arm.config) for name, arm in arms.items()}
    assert measures(tmp_path / "b", level).trend_p("learning_rate") > 0.5
