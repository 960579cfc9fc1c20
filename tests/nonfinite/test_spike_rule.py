"""When a norm is a spike, and which row made it."""

import math

import pytest
import torch

from nonfinite.spike_rule import guilty_row, is_spike, num_rows, with_rows


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
