"""The roles that a run recorded are believed; an early record has those of today's remedies."""

from src.config.remedy_roles import AA_CONTROL, all_have, loss_metric, roles_of


def test_an_early_record_has_the_roles_of_the_remedies_by_name():
    roles = roles_of({}, ["clip03", "ema", "gone_since"])
    assert loss_metric(roles) == "val_ema/loss"
    assert roles["gone_since"]["role"] == "remedy"
    assert loss_metric(roles_of({}, ["clip03"])) == "val/loss"
    assert all_have(roles_of({}, ["shaken"]), AA_CONTROL)


def test_a_recorded_role_comes_before_todays():
    recorded = {"ema": {"role": "aa_control", "evaluated_as": None}}
    roles = roles_of({"roles": recorded}, ["ema"])
    assert loss_metric(roles) == "val/loss" and all_have(roles, AA_CONTROL)


def test_a_run_without_remedies_has_no_role():
    assert not all_have(roles_of({}, []), AA_CONTROL)
    assert loss_metric({}) == "val/loss"
