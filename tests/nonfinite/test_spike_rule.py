"""When a norm is a spike, and which row made it."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nonfinite import watch
from nonfinite.spike_rule import RecentNorms, guilty_row, is_spike, num_rows, with_rows


@pytest.mark.parametrize(
    ("norm", "earlier", "spike"),
    [
        (100.0, [], False),
        (100.0, [1.0] * 4, False),
        (21.0, [1.0] * 5, True),
        (19.0, [1.0] * 5, False),
        (19.0, [1.0] * 64, True),
        (7.9, [1.0] * 64, False),
        (math.inf, [1.0] * 64, False),
        (21.0, [1.0] * 5 + [math.nan] * 9, True),
        # Only the last 128 steps count.
        (100.0, [1.0] * 200 + [90.0] * 128, False),
    ],
)
def test_with_few_earlier_steps_more_is_asked_of_a_spike(norm, earlier, spike):
    assert is_spike(norm, earlier) is spike


def test_the_row_is_found_whose_absence_ends_the_spike():
    sizes = [1.0, 1.0, 500.0, 1.0, 2.0]
    found = guilty_row(5, lambda rows: sum(sizes[row] for row in rows) / max(len(rows), 1))
    assert found["row"] == 2
    assert found["norm_without"] < found["norm"]


def test_of_rows_that_are_alike_none_is_named():
    assert guilty_row(4, lambda rows: 7.0) is None


def test_rows_are_taken_out_of_tensors_that_have_them():
    batch = {"x": torch.arange(12).view(4, 3), "scale": torch.tensor(2.0), "name": "a"}
    assert num_rows(batch) == 4
    some = with_rows(batch, [0, 3], 4)
    assert some["x"].tolist() == [[0, 1, 2], [9, 10, 11]]
    assert some["scale"] is batch["scale"]
    assert num_rows([torch.tensor(1.0)]) is None


class Regression(nn.Module):
    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.flat = flat

    def forward(self, x_BD):
        y_BD = self.inner(x_BD)
        return y_BD.flatten() if self.flat else y_BD


def spike_of(model, folder, rows):
    """Trains ten steps of eight rows; in the eighth some rows are large. The spike's incident."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = watch(model, optimizer, folder=folder, say=lambda line: None)
    draw = torch.Generator().manual_seed(1)
    for step in range(10):
        x_BD = torch.randn(8, 4, generator=draw)
        if step == 7:
            x_BD[rows] *= 300.0
        optimizer.zero_grad()
        output = model(x_BD)
        F.mse_loss(output, torch.zeros_like(output)).backward()
        optimizer.step()
    (incident,) = handle.incidents
    return incident


def test_watch_names_the_row_that_made_a_spike(tmp_path):
    torch.manual_seed(0)
    incident = spike_of(Regression(flat=False), tmp_path, [5])
    assert (incident["kind"], incident["step"]) == ("spike", 8)
    assert incident["figures"]["row"] == 5
    assert "Without row 5 of the batch the norm is" in incident["explanation"]


@pytest.mark.parametrize(
    ("flat", "rows"),
    [
        # No single row made it.
        (False, [1, 2, 3, 4, 5]),
        # Elements of the output are not those of a row.
        (True, [5]),
    ],
)
def test_watch_names_no_row_where_none_is_to_blame(tmp_path, flat, rows):
    torch.manual_seed(0)
    incident = spike_of(Regression(flat=flat), tmp_path, rows)
    assert incident["kind"] == "spike"
    assert "row" not in incident["figures"]


def test_the_recent_norms_find_the_spikes_that_the_rule_finds():
    draws, recent, earlier, found = random.Random(0), RecentNorms(), [], []
    for number in range(600):
        # Norms that fall for long, so that the smallest of the window is not the smallest of all.
        norm = draws.lognormvariate(-number / 200 if number < 300 else number / 300, 1.2)
        norm *= draws.choice([1.0] * 40 + [30.0])
        found.append(is_spike(norm, earlier))
        assert recent.is_spike(norm) == found[-1]
        earlier.append(norm)
    assert 2 < sum(found) < 60
