"""What an audit proves of an operation, and what it must not prove."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nonfinite.auditing import audit
from nonfinite.auditing.audit_collector import Collector
from nonfinite.auditing.audited_passes import Passes
from nonfinite.auditing.reach import Reach, weight_ranges
from nonfinite.auditing.value_ranges import INF
from src.lab.audit.survey_models import small_model

DTYPES = ("float32", "bfloat16", "float16")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


SLOW_FAMILIES = ("deepseek_v3", "gemma2", "gpt_oss")


class Expression(nn.Module):
    """An expression of one linear layer's output y and its weight."""

    def __init__(self, expression):
        super().__init__()
        self.layer, self.expression = nn.Linear(8, 6), expression

    def forward(self, x):
        return self.expression(self.layer(x))


def reasons(expression, limit, *, phase="forward", inputs=X):
    """What is proved of the operations with a limit, by dtype; without any search."""
    torch.manual_seed(0)
    found = audit(Expression(expression), inputs, seconds=0, folder=None)
    sites = [site for site in found.sites if site.limit == limit and site.phase == phase]
    assert sites, [(site.limit, site.operation) for site in found.sites]
    return {d: all(site.reasons.get(d) is not None for site in sites) for d in DTYPES}


def normed(p, eps):
    return p / (p.sum(dim=-1, keepdim=True) + eps)


GUARDED = {
    "epsilon": lambda y: normed(y.float().sigmoid(), 1e-20),
    "clamp": lambda y: y / y.abs().sum(-1, keepdim=True).clamp(min=1e-3),
    "softmax": lambda y: (p := y.softmax(-1).topk(2, dim=-1)[0]) / p.sum(-1, keepdim=True),
    "maximum": lambda y: 1 / torch.maximum(y.abs(), torch.full_like(y, 0.5)),
    "exp of a difference to the maximum": lambda y: (
        (e := (y - y.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True)
    ),
    "where": lambda y: 1 / torch.where((z := y.abs()) < 0.1, 0.1, z),
    "where a comparison holds": lambda y: 1 / torch.where((z := y.abs()) > 0.1, z, 0.1),
    "one plus a square": lambda y: 1 / (1 + y * y),
    "mean square": lambda y: y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(),
}
BARE = {
    "sigmoids": lambda y: normed(y.sigmoid(), 0.0),
    "negative epsilon": lambda y: normed(y.sigmoid(), -1e-20),
    "difference": lambda y: 1 / (y - y.mean(-1, keepdim=True)),
    "epsilon after a sum of signed values": lambda y: 1 / (y.sum(-1) + 1e-6),
    "clamp from above": lambda y: 1 / y.abs().clamp(max=1.0),
    "sum of another dimension": lambda y: (p := y.softmax(0)) / p[:, :2].sum(-1, keepdim=True),
    "softmax summed over rows": lambda y: 1 / y.softmax(-1).sum(0),
    "where for the wrong side": lambda y: 1 / torch.where((z := y.abs()) > 0.1, 0.1, z),
    "smallest of a softmax": lambda y: (
        (p := y.softmax(-1).topk(2, dim=-1, largest=False)[0]) / p.sum(-1, keepdim=True)
    ),
    "square": lambda y: 1 / (y * y),
    "product of two layers": lambda y: 1 / (y * y.flip(-1) + 1e-3),
    "a number read from the values": lambda y: 1 / (y.abs() + y.abs().max().item()),
    "written over in place": lambda y: 1 / torch.ones_like(y).copy_(y.abs()),
    "written over in part": lambda y: 1 / (z := torch.ones_like(y), z[:, :1].copy_(y[:, :1]))[0],
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_guarded_divisor_is_proved(name):
    assert all(reasons(GUARDED[name], "division by zero").values())


@pytest.mark.parametrize("name", BARE)
def test_a_divisor_that_may_be_zero_is_not_proved(name):
    assert not any(reasons(BARE[name], "division by zero").values())


def test_an_epsilon_that_is_zero_in_a_dtype_is_no_guard():
    found = reasons(lambda y: normed(y.sigmoid(), 1e-8), "division by zero")
    assert found == {"float32": True, "bfloat16": True, "float16": False}


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_the_epsilon_of_a_norm_must_have_a_root_in_the_dtype(eps):
    found = reasons(lambda y: F.layer_norm(y, (6,), eps=eps), "division by zero")
    assert found == {"float32": True, "bfloat16": True, "float16": eps == 1e-5}


def test_the_slope_of_a_root_at_zero_is_a_limit_of_the_backward_pass():
    edge = "infinite slope at the edge of the domain"
    assert not any(reasons(lambda y: y.relu().sqrt(), edge, phase="backward").values())
    bounded = reasons(lambda y: (y.relu() + 1e-4).sqrt(), edge, phase="backward")
    assert all(bounded.values())


def test_a_slope_that_is_too_steep_for_a_dtype_is_not_proved():
    edge = "infinite slope at the edge of the domain"
    found = reasons(lambda y: (y.tanh().abs() + 1e-6).log(), edge, phase="backward")
    assert found == {"float32": True, "bfloat16": True, "float16": False}


@pytest.mark.parametrize(
    ("expression", "limit", "is_safe"),
    [
        (lambda y: y.sigmoid().log(), "log of zero", False),
        (lambda y: (y.sigmoid() + 0.01).log(), "log of zero", True),
        (lambda y: y.exp(), "exp overflow", False),
        (lambda y: y.clamp(max=8).exp(), "exp overflow", True),
        (lambda y: (y - y.amax(-1, keepdim=True)).exp(), "exp overflow", True),
        (lambda y: y.tanh().acos(), "outside the domain", True),
        (lambda y: y.acos(), "outside the domain", False),
        (lambda y: y.abs().sqrt(), "outside the domain", True),
        (lambda y: F.softmax(y, -1), "fully masked row", True),
        (lambda y: F.softmax(y.masked_fill(y < 0, -INF), -1), "fully masked row", False),
        (lambda y: y[y > 0].mean(), "mean of an empty tensor", False),
        (lambda y: (y * 1e3).mul(y.flip(0) * 1e3), "overflow", True),
    ],
)
def test_each_limit_is_proved_where_it_cannot_be_reached(expression, limit, is_safe):
    assert reasons(expression, limit)["float32"] == is_safe


class Checked(Collector):
    """Compares what it knows of each result with the result."""

    def _bounds(self, step, place, operands):
        known, raw = super()._bounds(step, place, operands)
        tensor = step.result.detach()
        if known.low <= known.high and tensor.numel() and not tensor.is_complex():
            values = tensor.double()
            finite = values[values.isfinite()]
            # After an overflow, which is a limit of its own, nothing is claimed.
            if finite.numel() == values.numel() and not self.overflowed:
                assert known.low <= float(finite.min()), (step.name, known)
                assert float(finite.max()) <= known.high, (step.name, known)
                if known.peak is not None and values.dim():
                    assert float(values.amax(-1).min()) >= known.peak, step.name
            self.overflowed |= finite.numel() != values.numel()
        return known, raw


RELATIONS = (
    lambda y: (p := y.sigmoid()) / (p.sum(-1, keepdim=True) + -2.9).clamp(min=1e-3),
    lambda y: (p := y.sigmoid()) / p.sum(0, keepdim=True).flip(-1).clamp(min=1e-3),
    lambda y: y / (y.pow(2).sum(-1, keepdim=True) * 1e-4 + 1e-6).sqrt(),
    lambda y: y * torch.rsqrt(y.flip(-1).pow(2)[:, :1] + 1e-6),
    lambda y: (p := y.softmax(-1)).exp().sum(-1) - p.sum(-1),
    lambda y: (y - y.amax(0, keepdim=True)).exp().sum(-1),
)
"""Expressions that look like guards but guard nothing."""


@pytest.mark.parametrize("expression", RELATIONS)
def test_a_relation_ends_where_it_does_not_hold(expression):
    torch.manual_seed(0)
    passes = Passes(Expression(expression), torch.float32)
    checked = Checked(passes.model, weight_ranges(passes.model, Reach()))
    checked.overflowed = False
    passes.traced({}, X, checked)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_FAMILIES)],
)
@pytest.mark.parametrize("size", [0.02, 8.0])
def test_no_value_is_outside_its_bounds(family, size):
    model, inputs = small_model(family)
    for dtype in (torch.float32, torch.float16):
        passes = Passes(model, dtype)
        generator = torch.Generator().manual_seed(1)
        values = {
            name: (2 * torch.rand(p.shape, generator=generator) - 1) * size
            for name, p in passes.model.named_parameters()
        }
        checked = Checked(passes.model, weight_ranges(passes.model, Reach()))
        checked.overflowed = False
        passes.traced(values, inputs, checked)
        assert checked.seen
