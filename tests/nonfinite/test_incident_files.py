"""Incidents on batches that are not made of tensors and plain containers."""

import collections
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nonfinite.incident_files import WIDTHS, _panels, with_plain_values
from src import diagnose
from tests.nonfinite.test_foreign_loop import diagnosed, fit, in_a_folder, recorded

__all__ = ["in_a_folder"]


@dataclass
class Rows:
    x: torch.Tensor


class Reads(pl.LightningModule):
    """Divides by 0, whatever the batch is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        x = batch.x if isinstance(batch, Rows) else batch["x"]
        return (self.inner(torch.as_tensor(x)) / 0).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


X = torch.ones(2, 4)
TARGET = "target=tests.nonfinite.test_incident_files:Reads"


@pytest.mark.parametrize(
    "batch",
    [collections.UserDict({"x": X, "rows": [np.int64(2)]}), {"x": X.numpy(), "name": "a"}],
    ids=["a mapping", "an array"],
)
def test_an_incident_on_mappings_and_arrays_is_run_again(batch, capsys):
    fit(Reads(), DataLoader([batch, batch], batch_size=None, collate_fn=lambda entry: entry))
    assert "cannot be rerun" not in capsys.readouterr().out
    assert diagnosed(capsys, TARGET)["finding"] == recorded()["finding"]
    assert "src.diagnose" in Path("incidents/step-1/incident.html").read_text()


def test_of_a_batch_that_cannot_be_read_again_the_recorder_says_so(capsys):
    batch = Rows(x=X)
    fit(Reads(), DataLoader([batch, batch], batch_size=None, collate_fn=lambda entry: entry))
    said = capsys.readouterr().out
    assert (
        "step 1: cannot be rerun later: its state holds a tests.nonfinite.test_incident_files.Rows"
        in said
    )
    assert recorded()["finding"]["operation"].endswith("div")
    assert "src.diagnose" not in Path("incidents/step-1/incident.html").read_text()
    assert diagnose.main(["checkpoint=incidents/step-1", TARGET]) == 2
    assert "holds a tests.nonfinite.test_incident_files.Rows" in capsys.readouterr().err


def test_arrays_keep_their_numbers_and_their_type():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1]
    made = with_plain_values({"a": (array, np.float64(0.5)), "b": np.array(["text"])})
    assert made["a"][0].dtype == torch.int16
    assert made["a"][0].tolist() == array.tolist()
    assert type(made["a"][1]) is float
    assert made["b"].tolist() == ["text"]


def test_the_curves_of_a_page_are_valid_charts():
    altair = pytest.importorskip("altair")
    ring = [{"step": n, "loss": 2.0, "grad_norm": 1.0, "bias_mean/0": -1.0 * n} for n in (1, 2, 3)]
    for width in WIDTHS.values():
        panels = _panels(altair, ring, width)
        assert len(panels) == 3
        altair.vconcat(*panels).to_dict(validate=True)
