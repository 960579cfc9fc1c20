import torch

from src.config.compose import compose
from src.training.loss import cross_entropy
from tests.runs import last_checkpoint, record
from tests.stability.harnessed import START, figure, first_difference, runs


def dtypes_by_step(monkeypatch) -> list[torch.dtype]:
    seen = []

    def looked_at(logits, targets):
        if torch.is_grad_enabled():
            seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy(logits, targets)

    monkeypatch.setattr("src.training.loss.cross_entropy", looked_at)
    return seen


def test_stability_fp32_is_the_baseline_bitwise_before_the_switch_and_float32_after(
    tiny, monkeypatch
):
    seen = dtypes_by_step(monkeypatch)
    plain, treated = runs(tiny, "fp32")
    assert first_difference(plain, treated) == START + 1
    # The baseline may have been trained for an earlier test.
    seen = seen[-22:]
    assert seen == [(torch.bfloat16, True)] * START + [(torch.float32, False)] * (22 - START)
    active = figure(treated, "stability/fp32_active")
    assert [active[step] for step in (1, START, START + 1, 22)] == [0.0, 0.0, 1.0, 1.0]
    # The optimizer went on with its state: as many steps as the run has.
    states = last_checkpoint(treated)["optimizer_states"][0]["state"]
    assert {float(state["step"]) for state in states.values()} == {22.0}


def test_products_are_exact_after_the_switch_even_where_the_run_said_medium(tiny):
    precisions = []
    inner = torch.set_float32_matmul_precision

    def note(value):
        precisions.append(value)
        inner(value)

    torch.set_float32_matmul_precision = note
    try:
        runs(tiny, "fp32", "recipe.matmul_precision=medium")
    finally:
        torch.set_float32_matmul_precision = inner
    assert precisions[-2:] == ["medium", "highest"]


def test_on_a_float32_baseline_it_says_that_it_changes_nothing(tiny, capsys):
    plain, treated = runs(tiny, "fp32", "recipe.precision=32-true")
    assert first_difference(plain, treated) is None
    note = "stability=fp32 changes nothing here: recipe.precision is 32-true already"
    assert record(treated)["notes"] == [note]
    assert note in capsys.readouterr().err
    assert record(plain)["notes"] == []
    assert compose("train", ["stability=fp32"]).notes == []
