import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from nonfinite.lightning import GradientWatch
from nonfinite.lightning.gradients import group_of
from tests.runs import metrics, train
from tests.training.harness import Harness, Poison, logged_by, recipe_config


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embedding.weight", "embedding"),
        ("model.head.weight", "head"),
        ("model.layers.0.attention.o_proj.weight", "attention"),
        ("model.layers.0.attention.kv_down.weight", "latents"),
        ("model.layers.0.ffn.router.weight", "router"),
        ("model.layers.0.ffn.experts.up_proj", "experts"),
        ("llama.model.layers.1.self_attn.q_proj.weight", "attention"),
        ("llama.lm_head.weight", "head"),
        ("encoder.blocks.3.mixer.weight", "mixer"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


def fitted(**recipe) -> tuple[Harness, dict[int, dict[str, float]]]:
    run = Harness(recipe=recipe_config(**recipe), callbacks=[GradientWatch(every=1)])
    return run, run.fit().recorder.lines


def test_the_norms_of_the_groups_add_up_to_the_norm_of_all():
    _, lines = fitted(max_steps=2)
    for line in lines.values():
        names = [k for k in line if k.startswith("grad/") and k.endswith("/norm")]
        norms = [line[k] for k in names if k != "grad/norm"]
        assert len(norms) >= 5
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(line["grad/norm"], rel=1e-4)
        assert line["grad/nonfinite_tensors"] == 0


def test_clipped_norms_are_those_after_clipping():
    _, lines = fitted(max_steps=1, clip_norm=1e-3)
    norms = [v for k, v in lines[1].items() if k.endswith("/clipped_norm")]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def test_the_update_ratio_is_that_of_the_weights():
    run = Harness(recipe=recipe_config(max_steps=1), callbacks=[GradientWatch(every=1)])
    before = run.task.model.embedding.weight.detach().clone()
    line = run.fit().recorder.lines[1]
    after = run.task.model.embedding.weight.detach()
    expected = (after - before).norm() / before.norm()
    assert line["update/embedding/ratio"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_adams_rms_is_one_in_the_first_step_whatever_its_decay(beta2):
    _, lines = fitted(max_steps=1, eps=1e-12, betas=[0.9, beta2])
    # After one step v = (1 - beta2) g^2, whose bias towards 0 is taken out.
    assert lines[1]["adam/attention/rms"] == pytest.approx(1.0, rel=1e-3)
    assert lines[1]["adam/attention/small_frac"] == 0.0
    _, coarse = fitted(max_steps=1, eps=0.5)
    assert coarse[1]["adam/attention/small_frac"] == 1.0


def test_gradients_that_the_guard_drops_are_counted():
    run = Harness(
        recipe=recipe_config(max_steps=4),
        callbacks=[Poison({2}, what="gradient"), GradientWatch(every=1)],
    )
    lines = run.fit().recorder.lines
    assert [lines[step]["grad/nonfinite_tensors"] for step in (1, 3, 4)] == [0, 1, 1]


def test_it_is_logged_at_its_interval(tiny):
    folder = train(tiny, "watch.gradients_every=8", "recipe.log_every=4")
    steps = [line["step"] for line in metrics(folder) if "grad/attention/norm" in line]
    assert steps == [1, 8, 12]
    assert torch.is_grad_enabled()


def test_of_a_large_tensor_a_sample_gives_the_ratio(monkeypatch):
    _, whole = fitted(max_steps=2)
    monkeypatch.setattr("nonfinite.lightning.gradients.MAX_SAMPLED", 16)
    _, sampled = fitted(max_steps=2)
    for name in ("update/attention/ratio", "update/embedding/ratio"):
        assert sampled[2][name] != whole[2][name]
        assert sampled[2][name] == pytest.approx(whole[2][name], rel=0.5)


class Foreign(pl.LightningModule):
    """Has a parameter without an entry, as an adapter of rank 0 has."""

    def __init__(self, optimizer) -> None:
        super().__init__()
        self.inner, self.optimizer = nn.Linear(4, 4), optimizer
        self.inner.adapter = nn.Parameter(torch.zeros(0, 4))

    def training_step(self, batch, batch_idx):
        low = batch @ self.inner.adapter.T @ self.inner.adapter
        return (self.inner(batch) + low).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2)


def adafactor(parameters, lr):
    return Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, adafactor])
def test_of_optimizers_that_are_not_adam_the_moments_are_left_out(optimizer):
    line = logged_by(GradientWatch(every=1), Foreign(optimizer), torch.randn(4, 4))[2]
    assert line["grad/inner/norm"] > 0 and line["update/inner/ratio"] > 0
    assert ("adam/inner/rms" in line) == (optimizer is torch.optim.AdamW)
