"""Values that are not finite and do no harm, in one tensor with values that do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nonfinite import mechanisms as how
from nonfinite.tracer import trace

EMPTY = torch.tensor([[1.0, 2, 3], [0, 0, 0], [1, 0, 4]])
"""Counts of three rows: the second has none, the third none of the second kind."""


def shares(x):
    return EMPTY / EMPTY.sum(1, keepdim=True) + 0 * x


def rows_that_are_masked(x):
    """0/0 in the second row, which is left out; log(0) in the third, which is not."""
    p = shares(x)
    entropy = -(p * torch.log(p)).sum(1)
    return torch.where(EMPTY.sum(1) > 0, entropy, 0.0)


def rows_that_are_selected(x):
    p = shares(x)
    return torch.log(p).mean(1)[EMPTY.sum(1) > 0]


def rows_that_are_cut_off(x):
    p = torch.cat([shares(x), shares(x)])
    return torch.log(p.view(2, 3, 3)[:, 2:])


def marked_rows(x):
    """A marker of NaN, and a division by 0 beside it."""
    marked = torch.where(torch.tensor([True, False, False])[:, None], math.nan, x)
    divided = marked / torch.tensor([1.0, 1.0, 0.0])
    return torch.where(marked.isnan(), 0.0, divided)


@pytest.mark.parametrize(
    ("function", "mechanism", "code"),
    [
        (rows_that_are_masked, how.LOG, "torch.log(p)"),
        (rows_that_are_selected, how.LOG, "torch.log(p)"),
        (rows_that_are_cut_off, how.LOG, "torch.log(p.view"),
        (marked_rows, how.ZERO, "marked / "),
    ],
)
def test_the_values_that_reach_the_loss_are_the_finding(function, mechanism, code):
    x = torch.ones(3, 3)
    finding = trace(nn.Identity(), lambda: function(x.requires_grad_()).sum())
    assert finding.mechanism == mechanism
    assert code in finding.source.code
    shown = finding.num_nonfinite
    assert shown < finding.num_elements
    assert f"{shown} of {finding.num_elements}" in finding.detail


def test_without_the_masked_rows_the_division_is_the_finding():
    finding = trace(nn.Identity(), lambda: shares(torch.ones(3, 3).requires_grad_()).sum())
    assert finding.mechanism == how.ZERO


def test_where_infinities_cancel_it_is_said_who_wrote_them():
    hidden = torch.ones(2, 3, dtype=torch.bool)

    def loss():
        rows = torch.zeros(2, 3).masked_fill(hidden, -math.inf)
        return F.linear(rows, torch.tensor([[1.0, -1, 1]]).requires_grad_()).sum()

    finding = trace(nn.Identity(), loss)
    assert finding.mechanism == how.INF_INF
    assert "; the infinity was written at tests/nonfinite/test_mixed_origins.py:" in finding.detail


def test_an_infinity_from_an_earlier_step_is_said_to_be_older():
    state = torch.full((2, 3), math.inf)

    def loss():
        return F.linear(state * 2, torch.tensor([[1.0, -1, 1]]).requires_grad_()).sum()

    finding = trace(nn.Identity(), loss)
    assert finding.mechanism == how.INF_INF
    assert "; the infinity is older than this step, which reads it at" in finding.detail


def test_a_nan_that_no_operation_made_is_a_value_from_outside():
    target = torch.tensor([1.0, math.nan])
    finding = trace(nn.Identity(), lambda: F.mse_loss(torch.ones(2).requires_grad_(), target))
    assert finding.operation.startswith("input of")
    assert finding.num_nonfinite == 1


def test_a_mask_and_a_bad_sample_of_one_batch_are_told_apart():
    mask = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    for batch in ({"mask": mask, "x": None}, {"x": None, "mask": mask}):
        batch["x"] = torch.tensor([[1.0, 2.0], [math.nan, 1.0]])
        scale = torch.ones(()).requires_grad_()

        def loss(batch=batch, scale=scale):
            return ((batch["x"] * scale + batch["mask"]).exp()).sum()

        finding = trace(nn.Identity(), loss, batch=batch)
        assert finding.phase == "batch"
        assert finding.operation == "batch['x']"
