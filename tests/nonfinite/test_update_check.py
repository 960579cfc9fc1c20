"""Which updates of an optimizer are looked at, and what is said of those that break a weight."""

import pytest
import torch
from torch import nn

from nonfinite.update_check import CHANGED, UPDATE, UpdateCheck


def updated(dtype, gradient, **options):
    """The fault of one update of a weight of two elements, of which one has the gradient 0."""
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = torch.optim.Adam([weight], lr=1e-3, **options)
    weight.grad = torch.tensor([gradient, 1.0], dtype=dtype)
    optimizer.step()
    check = UpdateCheck(optimizer, {id(weight): "weight"})
    return check.applied_fault(gradients=False)


@pytest.mark.parametrize("eps", [0, 0.0])
def test_an_epsilon_of_zero_is_found_whatever_its_type(eps):
    fault = updated(torch.float32, 0.0, eps=eps)
    assert fault.cause == UPDATE and fault.parameter == "weight"
    assert fault.figures["eps"] == 0.0
    assert "Its eps 0 is 0 in float32" in fault.explanation


def test_a_gradient_whose_square_is_0_is_divided_by_0_too():
    fault = updated(torch.float16, 1e-5)
    assert "divides by 0 where its average of squared gradients is 0" in fault.explanation


def test_an_update_that_cannot_divide_by_0_has_no_fault():
    assert updated(torch.float32, 0.0) is None


def test_a_gradient_that_was_not_remembered_counts_as_changed():
    weight = nn.Parameter(torch.ones(2))
    check = UpdateCheck(torch.optim.SGD([weight], lr=1.0), {})
    assert not check.gradients_changed()
    weight.grad = torch.tensor([1.0, torch.nan])
    assert check.gradients_changed()
    fault = check.applied_fault(gradients=True)
    assert fault.cause == CHANGED
    check.remember_gradients()
    assert not check.gradients_changed()
    weight.grad /= 0.0
    assert check.gradients_changed()
