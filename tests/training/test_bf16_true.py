"""Training with weights, gradients and moments in bfloat16."""

import pytest
import torch

from src.train import main
from tests.runs import assert_same_run, last_checkpoint, made, stop_after, train, weights

BF16 = "recipe.precision=bf16-true"


@pytest.mark.parametrize("ffn", ["mlp", "moe", "moe_writeup"])
def test_weights_and_moments_are_bfloat16(tiny, ffn):
    folder = made(tiny, f"ffn={ffn}", BF16)
    assert {w.dtype for w in weights(folder).values() if w.is_floating_point()} == {torch.bfloat16}
    (optimizer,) = last_checkpoint(folder)["optimizer_states"]
    moments = [state["exp_avg_sq"] for state in optimizer["state"].values()]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}


def test_a_small_update_of_a_large_weight_is_lost(tiny):
    """Norm gains are 1: the next bfloat16 number is 0.0039 below, and a step is 0.0001."""
    gain = "model.final_norm.weight"
    given = ["ffn=mlp", "recipe.learning_rate=1e-4", "recipe.weight_decay=0"]
    coarse, fine = train(tiny, BF16, *given), train(tiny, *given, "recipe.precision=32-true")
    assert torch.equal(weights(coarse)[gain], torch.ones_like(weights(coarse)[gain]))
    assert (weights(fine)[gain] != 1).all()


def test_a_run_stopped_and_resumed_equals_one_that_was_not(tiny, monkeypatch):
    whole = made(tiny, "ffn=moe", BF16, "study=whole")
    arguments = [*tiny, "ffn=moe", BF16, "study=stopped"]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(arguments) == 143
    assert main(arguments) == 0
    assert_same_run(whole, whole.parents[2] / "stopped" / whole.parents[0].name / "seed-0")


@pytest.mark.parametrize("remedy", ["ema", "fp32"])
def test_remedies_that_need_float32_weights_are_refused(tiny, remedy, capsys):
    assert main([*tiny, BF16, f"stability={remedy}"]) == 2
    assert "bf16-mixed" in capsys.readouterr().err
