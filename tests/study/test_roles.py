"""Reports know remedies by role, so a user's own are judged like the built-in ones."""

import json

from src.stability import REMEDIES
from src.study.analysis.analyse import analyse
from tests.runs import train
from tests.study import synthetic
from tests.study.remedies import arm
from tests.study.synthetic import Arm


def roles(name, **own):
    usual = {"role": "remedy", "evaluated_as": None, "ends_early": False, "keeps_average": False}
    return {"roles": {name: usual | own}}


def analysis_of(name, own, *, failing=6):
    arms = {"none": Arm(num_failing=failing), name: own}
    return analyse(synthetic.in_memory(arms))


def test_an_average_of_ones_own_is_judged_by_its_own_loss():
    own = Arm(acts_from=440, record=roles("swa", evaluated_as="swa", keeps_average=True))
    assert arm(analysis_of("swa", own), "swa").loss_metric == "val_swa/loss"
    assert arm(analysis_of("swa", Arm(acts_from=440, record=roles("swa"))), "swa").loss_metric == (
        "val/loss"
    )


def test_a_remedy_of_ones_own_that_stops_is_compared_up_to_its_end():
    ends = Arm(acts_from=280, steps=280, record=roles("plateau", ends_early=True))
    found = arm(analysis_of("plateau", ends, failing=0), "plateau")
    assert found.censored_at == 280
    verdict = found.comparisons["loss"].verdict
    assert verdict.endswith("up to step 280, its last, the arm is identical to its baseline")
    # Without the role an early end is no reason to compare less.
    other = Arm(acts_from=280, steps=280, record=roles("plateau"))
    assert arm(analysis_of("plateau", other, failing=0), "plateau").censored_at is None


def test_a_control_of_ones_own_shows_what_chance_does():
    own = Arm(num_failing=5, record=roles("jitter", role="aa_control"))
    found = analysis_of("jitter", own)
    assert arm(found, "jitter").is_aa_control
    assert not any("no A/A control" in warning for warning in found.warnings)


def test_a_study_ranks_only_if_a_positive_control_of_ones_own_is_found():
    control = roles("fixed_gate", role="positive_control")
    assert analysis_of("fixed_gate", Arm(record=control)).can_rank
    assert not analysis_of("fixed_gate", Arm(num_failing=6, record=control)).can_rank
    assert analysis_of("fixed_gate", Arm(num_failing=6, record=roles("fixed_gate"))).can_rank


def test_the_record_holds_the_roles_of_its_remedies(tiny):
    folder = train([*tiny, "stability=[ema,shaken]"])
    record = json.loads((folder / "record.json").read_text())
    assert record["roles"] == {name: REMEDIES[name].roles() for name in ("ema", "shaken")}
    assert record["roles"]["ema"]["evaluated_as"] == "ema"
    assert record["roles"]["shaken"]["role"] == "aa_control"
