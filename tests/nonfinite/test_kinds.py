"""Every mechanism, planted small: the operation's line and its cause, from the numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nonfinite import mechanisms as how
from nonfinite.causes import Evidence, cause
from nonfinite.tracer import trace


def zero_divisor(x):
    return x / (x - x).sum(-1, keepdim=True)


def zero_divisor_in_place(x):
    return (x * 1).div_((x - x).sum(-1, keepdim=True))


def integer_zero_divisor(x):
    return x.sum() / (x > 9).int().sum()


def zero_to_a_negative_power(x):
    return (x - x) ** -2


def zero_reciprocal(x):
    return (x - x).reciprocal()


def zero_rsqrt(x):
    return (x - x).square().mean(-1, keepdim=True).rsqrt()


def unused_quotient(x):
    return torch.where(x > 9, x / (x - x.detach()), x)


def log_of_zero(x):
    return (x - x).log()


def log1p_of_minus_one(x):
    return torch.log1p(x - x - 1)


def entropy_of_a_certain_choice(x):
    p = (x * 1e4).softmax(-1)
    return -(p * p.log()).sum()


def logit_of_one(x):
    return torch.logit(torch.ones_like(x) + 0 * x)


def unused_log(x):
    return torch.where(x > 9, (x - x.detach()).log(), x)


def log_of_a_negative_number(x):
    return (-x.abs() - 1).log()


def root_of_a_negative_number(x):
    return (-x.abs() - 1).sqrt()


def acos_above_one(x):
    return (x.abs() + 2).acos()


def fractional_power_of_a_negative_number(x):
    return (-x.abs() - 1) ** 0.5


def root_at_zero(x):
    return (x - x.detach()).square().sum(-1, keepdim=True).sqrt()


def power_at_zero(x):
    return (x - x.detach()).pow(0.3)


def acos_at_one(x):
    return (x - x.detach() + 1).acos()


def exp_of_a_large_number(x):
    return (x + 100).exp()


def unused_exp(x):
    return torch.where(x > 9, (x + 200).exp(), x)


def expm1_of_a_large_number(x):
    return torch.expm1(x + 100)


def zero_times_infinity(x):
    return x + torch.zeros(4) * float("-inf")


def zero_times_infinity_in_a_product(x):
    return F.linear(torch.full((3, 4), -math.inf), (x - x)[:, :1].expand(3, 4)).sum() + x


def row_without_neighbours(x):
    return F.linear(torch.full((3, 4), -math.inf), torch.tensor([[1.0, -1, 1, 1]])) + x


def row_without_neighbours_in_a_convolution(x):
    return F.conv1d(torch.full((1, 1, 4), -math.inf), torch.tensor([[[1.0, -1]]])).sum() + x


def two_masks(x):
    hidden = torch.full((4,), -math.inf)
    return x + (hidden - hidden)


def softmax_of_a_hidden_row(x):
    return x.masked_fill(torch.ones(4, dtype=torch.bool), -math.inf).softmax(-1)


def log_softmax_of_a_hidden_row(x):
    return x.masked_fill(torch.ones(4, dtype=torch.bool), -math.inf).log_softmax(-1)


def no_label(x):
    return F.cross_entropy(x, torch.full((3,), -100))


def no_label_with_smoothing(x):
    return F.cross_entropy(x, torch.full((3,), -100), label_smoothing=0.1)


def no_weight(x):
    return F.cross_entropy(x, torch.tensor([0, 0, 0]), weight=torch.tensor([0.0, 1, 1, 1]))


def labels_longer_than_the_input(x):
    rows = x.log_softmax(-1)[:, None]
    return F.ctc_loss(rows, torch.tensor([[1, 2, 3, 1]]), (3,), (4,))


def equal_labels_that_need_a_blank(x):
    rows = x.log_softmax(-1)[:, None]
    return F.ctc_loss(rows, torch.tensor([[1, 1, 1]]), (3,), (3,))


def mean_of_nothing(x):
    return x[x > 9].mean()


def std_of_one(x):
    return x[:1].std(0)


def half_product(x):
    return (x.half() * 300 * 300).float()


def half_cast(x):
    return (x * 1e5).half().float()


def large_square(x):
    return (x * 1e20).square()


def twelfth_power(x):
    return (x * 1e4) ** 12


def large_convolution(x):
    image = x.flatten()[:9].view(1, 1, 3, 3).half() * 0 + 30
    return F.conv2d(image.expand(1, 400, 3, 3), torch.ones(1, 400, 3, 3).half())


def bessel_function(x):
    return torch.special.i0(x + 800)


def weight_of_a_zero_direction(x):
    return torch._weight_norm(x - x, torch.ones(3, 1), 0)


def infinite_class_weight(x):
    weight = torch.tensor([1.0, 1, math.inf, 1])
    return F.cross_entropy(x, torch.tensor([0, 1, 2]), weight)


class Wrong(torch.autograd.Function):
    """A backward pass that divides by what is 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (x - x)


def own_backward(x):
    return Wrong.apply(x)


def normalised_in_half(x):
    return F.normalize((x * 0).half(), dim=-1).float()


def checkpointed(x):
    return checkpoint(root_at_zero, x, use_reentrant=False)


def checkpointed_reentrantly(x):
    return checkpoint(root_at_zero, x, use_reentrant=True)


def written(x):
    y = x.clone()
    y[0, 0] = math.nan
    return y


KINDS = [
    (zero_divisor, how.ZERO, "x / (x - x)"),
    (zero_divisor_in_place, how.ZERO, ".div_("),
    (integer_zero_divisor, how.ZERO, "x.sum() / "),
    (zero_to_a_negative_power, how.ZERO, "** -2"),
    (zero_reciprocal, how.ZERO, ".reciprocal()"),
    (zero_rsqrt, how.ZERO, ".rsqrt()"),
    (unused_quotient, how.ZERO, "x / (x - x.detach())"),
    (log_of_zero, how.LOG, ".log()"),
    (log1p_of_minus_one, how.LOG, "log1p"),
    (entropy_of_a_certain_choice, how.LOG, "p.log()"),
    (logit_of_one, how.LOG, "torch.logit"),
    (unused_log, how.LOG, ".log()"),
    (log_of_a_negative_number, how.DOMAIN, ".log()"),
    (root_of_a_negative_number, how.DOMAIN, ".sqrt()"),
    (acos_above_one, how.DOMAIN, ".acos()"),
    (fractional_power_of_a_negative_number, how.DOMAIN, "** 0.5"),
    (root_at_zero, how.EDGE, ".sqrt()"),
    (power_at_zero, how.EDGE, ".pow(0.3)"),
    (acos_at_one, how.EDGE, ".acos()"),
    (exp_of_a_large_number, how.EXP, ".exp()"),
    (unused_exp, how.EXP, ".exp()"),
    (expm1_of_a_large_number, how.EXP, "expm1"),
    (zero_times_infinity, how.ZERO_INF, 'float("-inf")'),
    (zero_times_infinity_in_a_product, how.ZERO_INF, "F.linear"),
    (row_without_neighbours, how.INF_INF, "F.linear"),
    (row_without_neighbours_in_a_convolution, how.INF_INF, "F.conv1d"),
    (two_masks, how.INF_INF, "hidden - hidden"),
    (softmax_of_a_hidden_row, how.MASKED, ".softmax(-1)"),
    (log_softmax_of_a_hidden_row, how.MASKED, ".log_softmax(-1)"),
    (no_label, how.NO_LABEL, "F.cross_entropy"),
    (no_label_with_smoothing, how.NO_LABEL, "F.cross_entropy"),
    (no_weight, how.NO_LABEL, "F.cross_entropy"),
    (labels_longer_than_the_input, how.CTC, "F.ctc_loss"),
    (equal_labels_that_need_a_blank, how.CTC, "F.ctc_loss"),
    (mean_of_nothing, how.EMPTY, ".mean()"),
    (std_of_one, how.ONE, ".std(0)"),
    (half_product, how.HALF, "300 * 300"),
    (half_cast, how.HALF, ".half()"),
    (large_square, how.OVERFLOW, ".square()"),
    (twelfth_power, how.OVERFLOW, "** 12"),
    (large_convolution, how.HALF, "F.conv2d"),
    (bessel_function, how.EXP, "torch.special.i0"),
    (weight_of_a_zero_direction, how.ZERO, "_weight_norm"),
    (infinite_class_weight, how.GIVEN, "F.cross_entropy"),
    (own_backward, how.ZERO, "gradient / (x - x)"),
    (normalised_in_half, how.ZERO, "F.normalize"),
    (checkpointed, how.EDGE, ".sqrt()"),
    (checkpointed_reentrantly, how.EDGE, ".sqrt()"),
    (written, how.WRITTEN, "y[0, 0] = math.nan"),
]


class Step(nn.Module):
    """A parameter of shape (3, 4), on which a function is computed."""

    def __init__(self, function) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.function = nn.Linear(4, 4), function
        with torch.no_grad():
            self.inner.weight.copy_(torch.rand(4, 4, generator=generator) * 0.1)
            self.inner.bias.fill_(0.5)
        self.x = torch.rand(3, 4, generator=generator)

    def loss(self):
        y = self.inner(self.x)
        return (y + self.function(y)).sum()


@pytest.mark.parametrize(
    ("function", "mechanism", "code"), KINDS, ids=[kind[0].__name__ for kind in KINDS]
)
def test_the_line_and_the_cause_are_those_of_the_mechanism(function, mechanism, code):
    model = Step(function)
    finding = trace(model, model.loss)
    assert finding is not None
    assert finding.mechanism == mechanism
    assert code in finding.source.code
    evidence = Evidence(
        finding=finding, router={}, second_moment_finite=True, weight_absmax=1.0, last={}
    )
    named = {"bad gradient": how.WRITTEN}.get(cause(evidence), cause(evidence))
    assert named == mechanism
    assert finding.detail
    assert code in str(finding)


HARMLESS = {
    "a mask that hides some keys": lambda x: x.masked_fill(
        torch.tensor([True, False, False, True]), -math.inf
    ).softmax(-1),
    "a logged logarithm": lambda x: x + (x - x).detach().log().nan_to_num() * 0,
    "the logarithm of a mask": lambda x: (x + torch.tensor([1.0, 0, 1, 1]).log()).softmax(-1),
    "attention with a causal mask": lambda x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], is_causal=True
    )[0, 0],
    "a maximum that starts at minus infinity": lambda x: torch.maximum(
        torch.full((4,), -math.inf), x
    ),
    "infinities that are replaced": lambda x: torch.nan_to_num((x - x).detach().reciprocal()) * 0,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_reach_the_loss_or_a_gradient_is_no_finding(name):
    model = Step(HARMLESS[name])
    assert trace(model, model.loss) is None


def rms_overflow(x):
    """The squares overflow, 1 / sqrt(inf) is 0, and the norm of zeros is divided by."""
    scaled = x * torch.rsqrt((x * 40).pow(2).mean(-1, keepdim=True))
    return F.normalize(scaled, dim=-1)


def clamped_overflow(x):
    """An overflow that is made finite again, and a zero that does not come of it."""
    guard = (x * 1e3).pow(2).clamp(max=1.0).mean()
    return x / (x - x) + guard


@pytest.mark.parametrize(
    ("function", "is_behind"), [(rms_overflow, True), (clamped_overflow, False)]
)
def test_an_overflow_that_became_finite_again_is_named_where_its_zeros_do_harm(function, is_behind):
    x = torch.full((2, 4), 30.0, dtype=torch.float16, requires_grad=True)
    finding = trace(nn.Identity(), lambda: function(x).sum())
    assert finding.mechanism == how.ZERO
    assert ("; before that, torch.Tensor.pow in the top-level" in finding.detail) == is_behind
    if is_behind:
        assert "overflowed at tests/nonfinite/test_kinds.py:" in finding.detail


def test_an_unknown_operation_has_no_cause_and_shows_its_operands():
    model = Step(lambda x: torch.special.zeta(x - x + 1, x))
    finding = trace(model, model.loss)
    assert finding.mechanism is None
    assert "special.zeta" in finding.operation
