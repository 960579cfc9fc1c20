"""Remedies on the optimizer's side in a LightningModule and trainer that are not the project's."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nonfinite.lightning.guard import StepGuard
from src.stability import (
    AdaGCConfig,
    MuonConfig,
    RemedyConfig,
    RewindConfig,
    RunFacts,
    SpamConfig,
    StableAdamWConfig,
)
from tests.training.harness import Recorder, guard_config

STEPS, FAILS = 12, 9
FACTS = RunFacts(max_steps=STEPS, log_every=1, seed=0, repeat=0, clip_norm=1.0)
REMEDIES: dict[str, tuple[RemedyConfig, str]] = {
    "adagc": (AdaGCConfig(max_norm=1.0, ratio=1.05, beta=0.98, warmup_steps=3), "clipped"),
    "muon": (MuonConfig(momentum=0.95, num_iterations=5, update_rms=0.2), "params_frac"),
    "rewind": (RewindConfig(sigmas=6.0, back_steps=3, every=2, max_rewinds=2), "rewinds"),
    "spam": (
        SpamConfig(theta=2.0, reset_every=6, warmup_steps=2, clip_after=2),
        "clipped_frac",
    ),
    "stable_adamw": (StableAdamWConfig(max_rms=1.0), "scaled"),
}


class Yours(pl.LightningModule):
    """With batch normalisation, a buffer that forward passes change."""

    def __init__(self, remedy: RemedyConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.remedy = remedy
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.GELU(), torch.nn.Linear(8, 3)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.layers(x), y)
        return loss * (math.nan if self.global_step + 1 == FAILS else 1.0)

    def configure_optimizers(self):
        adamw = torch.optim.AdamW(self.parameters(), lr=1e-2)
        optimizer = self.remedy.replace_optimizer(adamw, self)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.remedy.lr_factor(step, STEPS)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(*remedies: RemedyConfig) -> tuple[Yours, Recorder]:
    recorder, task = Recorder(), Yours(remedies[-1] if remedies else RemedyConfig())
    draw = torch.Generator().manual_seed(0)
    rows = TensorDataset(
        torch.randn(80, 6, generator=draw), torch.randint(3, (80,), generator=draw)
    )
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[
            StepGuard(guard_config(), max_steps=STEPS, log_every=1),
            *(callback for remedy in remedies for callback in remedy.callbacks(FACTS)),
        ],
        gradient_clip_val=1.0,
        logger=recorder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(rows, batch_size=8))
    return task, recorder


@pytest.mark.parametrize("name", REMEDIES)
def test_it_acts_says_so_and_leaves_finite_weights(name):
    remedy, figure = REMEDIES[name]
    (plain, _), (treated, recorder) = fit(), fit(remedy)
    one, two = plain.state_dict(), treated.state_dict()
    assert any(not torch.equal(one[key], two[key]) for key in one)
    assert all(value.isfinite().all() for value in two.values())
    assert recorder.lines[STEPS][f"stability/{name}_{figure}"] > 0


def test_all_of_them_go_together():
    task, recorder = fit(*(remedy for name, (remedy, _) in REMEDIES.items() if name != "muon"))
    assert all(value.isfinite().all() for value in task.state_dict().values())
    assert recorder.lines[STEPS]["stability/rewind_rewinds"] == 1
