import pytest
import torch

from src.watch import ActivationWatch
from tests.builders import ATTENTION_CASES, transformer
from tests.training.harness import Harness, recipe_config


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_the_figures_are_those_of_the_forward_pass(attention):
    config = ATTENTION_CASES[attention]
    run = Harness(
        recipe=recipe_config(max_steps=1),
        callbacks=[ActivationWatch(every=1)],
        model=transformer(attention=config, max_seq_len=8),
    )
    seen = []
    run.task.on_train_batch_start = lambda batch, batch_idx: seen.append(batch[0])
    line = run.fit().recorder.lines[1]
    fresh = transformer(attention=config, max_seq_len=8)
    outputs = []
    for module in (fresh.layers[1], fresh.layers[1].ffn.experts, fresh.layers[1].ffn.shared):
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = fresh(seen[0])
    assert line["output/logsumexp"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)
    assert line["act/layer_1/absmax"] == pytest.approx(outputs[-1].abs().max().item())
    experts, shared, block = (output.square().mean().sqrt().item() for output in outputs)
    assert line["act/layer_1/experts_rms"] == pytest.approx(experts)
    assert line["act/layer_1/shared_rms"] == pytest.approx(shared)
    assert line["act/layer_1/rms"] == pytest.approx(block)
    for layer in (0, 1):
        # Entropies lie between 0 and that of an even spread over 1 to 8 positions.
        even = sum(torch.log(torch.tensor(float(n))).item() for n in range(1, 9)) / 8
        assert 0 < line[f"attention/layer_{layer}/entropy"] <= even + 1e-5
        assert abs(line[f"attention/layer_{layer}/max_logit"]) < 100


def test_nothing_is_left_behind_when_a_run_fails():
    run = Harness(recipe=recipe_config(max_steps=1), callbacks=[ActivationWatch(every=1)])

    def broken(batch, batch_idx):
        raise RuntimeError("no")

    run.task.training_step = broken
    with pytest.raises(RuntimeError, match="no"):
        run.fit()
    assert not run.task.model._forward_hooks
    assert torch.overrides._get_current_function_mode_stack() == []
