import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nonfinite.lightning import ActivationWatch
from tests.builders import ATTENTION_CASES, transformer
from tests.training.harness import Harness, logged_by, recipe_config


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


class Foreign(pl.LightningModule):
    """Its largest child is none that makes logits; its parts give out what is no tensor."""

    def __init__(self, given_by_name: bool = False) -> None:
        super().__init__()
        self.table, self.given_by_name = nn.Embedding(50, 8), given_by_name
        self.layers = nn.ModuleList([Mixture()])
        self.head = nn.Linear(8, 5)

    def training_step(self, batch, batch_idx):
        x, _ = self.layers[0](self.table(batch))
        x = F.scaled_dot_product_attention(query=x[:, None], key=x[:, None], value=x[:, None])
        logits = self.head(x.squeeze(1)).flatten(0, 1) * 10
        self.seen = logits.detach()
        targets = torch.zeros(len(logits), dtype=torch.long)
        if self.given_by_name:
            loss = F.cross_entropy(input=logits, target=targets)
        else:
            loss = nn.CrossEntropyLoss()(logits, targets)
        # Another loss, after that of the output.
        return loss + F.cross_entropy(self.table.weight, torch.zeros(50, dtype=torch.long))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.shared = Routed(), nn.Linear(8, 8)

    def forward(self, x):
        return self.experts(x)[0] + self.shared(x), None


class Routed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x):
        return super().forward(x), {"load": 1.0}


def lines_of(task: pl.LightningModule) -> dict[int, dict[str, float]]:
    return logged_by(ActivationWatch(every=1), task, torch.randint(50, (4, 6)))


@pytest.mark.parametrize("given_by_name", [False, True])
def test_the_logsumexp_is_that_of_what_the_loss_is_taken_of(given_by_name):
    task = Foreign(given_by_name)
    line = lines_of(task)[2]
    expected = task.seen.logsumexp(-1).mean().item()
    assert line["output/logsumexp"] == pytest.approx(expected, rel=1e-6)


def test_without_cross_entropy_there_is_no_logsumexp():
    task = Foreign()
    task.training_step = lambda batch, batch_idx: task.layers[0](task.table(batch))[0].mean()
    assert "output/logsumexp" not in lines_of(task)[1]


def test_of_parts_that_give_out_several_things_the_first_is_measured():
    line = lines_of(Foreign())[1]
    names = {"act/layer_0/rms", "act/layer_0/experts_rms", "act/layer_0/shared_rms"}
    assert names | {"attention/layer_0/entropy"} <= line.keys()
