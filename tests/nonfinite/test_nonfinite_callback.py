"""The one callback for Lightning: data, updates, buffers, iterators and spikes."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from nonfinite.lightning import Nonfinite

STEPS = 12
BAD = 7
"""The step that goes wrong."""


class Task(pl.LightningModule):
    """A classifier with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches() -> list:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)]
        for _ in range(STEPS)
    ]


def fit(task: pl.LightningModule, data: list, tmp_path, **options) -> Nonfinite:
    said: list[str] = []
    callback = Nonfinite(folder=tmp_path / "incidents", say=said.append, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(data, batch_size=None))
    callback.said = said
    return callback


def incident_of(tmp_path, step: int = BAD) -> dict:
    return json.loads((tmp_path / "incidents" / f"step-{step}" / "incident.json").read_text())


def test_a_sound_run_has_no_incident_and_the_same_weights(tmp_path):
    watched, plain = Task(), Task()
    assert fit(watched, batches(), tmp_path).incident is None
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(plain, DataLoader(batches(), batch_size=None))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_a_bad_batch_is_named_and_its_statistics_are_taken_back(tmp_path):
    data = batches()
    data[BAD - 1][0][2, 1] = math.nan
    task = Task()
    callback = fit(task, data, tmp_path)
    incident = incident_of(tmp_path)
    assert (incident["step"], incident["cause"], incident["phase"]) == (BAD, "bad batch", "batch")
    assert incident["explanation"] == (
        "batch[0] came in with 1 of 24 non-finite elements, the first in row 2."
    )
    assert incident["reproduced"] is True and incident["reruns"] == "bitwise"
    assert all(bool(buffer.isfinite().all()) for buffer in task.buffers())
    assert callback.summary()["skipped_steps"] == 1
    assert callback.said[0].startswith("step 7: batch[0]: 1 of 24 elements")
    assert callback.said[-2].startswith("  next: python -m src.diagnose")
    assert callback.said[-1] == "1 of 12 steps was not finite and was skipped: step 7"


def test_the_page_says_what_happened_before_the_details(tmp_path):
    data = batches()
    data[BAD - 1][1] = torch.full((6,), -100)
    fit(Task(), data, tmp_path)
    page = (tmp_path / "incidents" / f"step-{BAD}" / "incident.html").read_text()
    order = ["no valid label", "Every target is", "What usually helps", "F.cross_entropy(", "<svg"]
    order += ["Run it again", "Details"]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "color-scheme: light dark" in page and "width=device-width" in page
    assert "http" not in page.replace("http://www.w3.org", "")


class NoRate(Task):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: math.nan if step == BAD - 1 else 1.0
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_rate_that_is_nan_skips_the_step(tmp_path):
    task = NoRate()
    fit(task, batches(), tmp_path)
    assert incident_of(tmp_path)["cause"] == "learning rate not finite"
    assert incident_of(tmp_path)["phase"] == "update"
    assert all(bool(parameter.isfinite().all()) for parameter in task.parameters())


class OwnClipping(Task):
    def configure_gradient_clipping(self, optimizer, *_, **__):
        if self.global_step == BAD - 1:
            for parameter in self.model[0].parameters():
                parameter.grad *= 0.0
                parameter.grad /= parameter.grad.norm()


def test_clipping_that_divides_by_zero_is_found_in_its_step(tmp_path):
    fit(OwnClipping(), batches(), tmp_path)
    incident = incident_of(tmp_path)
    assert incident["cause"] == "gradient changed before the update"
    assert "model.0.weight" in incident["explanation"]


class Half(Task):
    """Weights in float16, with an epsilon that is 0 there, and a row without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(9, 4).half()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.rows.weight[0].float().sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_an_epsilon_that_is_zero_in_float16_is_the_update(tmp_path):
    fit(Half(), batches(), tmp_path)
    incident = incident_of(tmp_path, 1)
    assert incident["cause"] == "optimizer update"
    assert incident["figures"]["dtype"] == "float16"
    assert "eps 1e-08 is 0 in float16" in incident["explanation"]
    assert "rows.weight" in incident["explanation"]


class Normalised(torch.optim.Optimizer):
    """Divides each gradient by its norm, as LARS does."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad / parameter.grad.norm()
        return loss


class Lars(Task):
    def training_step(self, batch, batch_idx):
        unused = self.global_step == BAD - 1
        logits = self.model(batch[0].zero_() if unused else batch[0])
        return F.cross_entropy(logits * (0.0 if unused else 1.0), batch[1])

    def configure_optimizers(self):
        return Normalised(self.parameters())


def test_an_optimizer_that_divides_by_a_norm_of_zero_is_named(tmp_path):
    fit(Lars(), batches(), tmp_path)
    incident = incident_of(tmp_path)
    assert incident["cause"] == "optimizer update"
    assert incident["operation"] == "Normalised step"


class Draws(Task):
    """Draws its batches itself."""

    def __init__(self, data) -> None:
        super().__init__()
        self.drawn, self.own = [], iter(data)

    def training_step(self, batch, batch_idx):
        number, x, y = next(self.own)
        self.drawn.append(number)
        return F.cross_entropy(self.model(x), y)


def test_a_rerun_takes_nothing_from_an_iterator_and_says_so(tmp_path):
    data = [(number, *batch) for number, batch in enumerate(batches())]
    data[BAD - 1][1][0] = math.nan
    task = Draws(data)
    fit(task, list(range(STEPS)), tmp_path)
    assert task.drawn == list(range(STEPS))
    incident = incident_of(tmp_path)
    assert (incident["cause"], incident["reproduced"]) == ("not reproduced", None)
    assert "self.own" in incident["explanation"]


class Regression(Task):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.model(batch[0])[:, 0], batch[1].float())


def test_a_spike_names_the_row_that_made_it(tmp_path):
    data = batches()
    data[BAD - 1][0][4] *= 1e3
    callback = fit(Regression(), data, tmp_path)
    incident = incident_of(tmp_path)
    assert (incident["kind"], incident["cause"]) == ("spike", "spike")
    assert incident["figures"]["row"] == 4
    assert "Without row 4 of the batch the norm is" in incident["explanation"]
    assert next(iter(incident["largest_gradients"])) == "model.weight"
    assert callback.incident is None


@pytest.mark.parametrize("how", ["stop", "raise"])
def test_it_stops_or_raises(how, tmp_path):
    data = batches()
    data[BAD - 1][0][2, 1] = math.nan
    if how == "raise":
        with pytest.raises(FloatingPointError, match="step 7"):
            fit(Task(), data, tmp_path, on_nonfinite=how)
    else:
        assert fit(Task(), data, tmp_path, on_nonfinite=how).stopped
    assert incident_of(tmp_path)["cause"] == "bad batch"
