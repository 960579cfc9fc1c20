"""What is written out for CPUs equals what PyTorch has, forward and backward.

Tolerances are a few units in the last place of float32 sums of some hundred terms.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from src.model.attention.causal import LONGEST, SHORTEST, scaled_dot_product_attention
from src.model.ffn.experts import Experts
from src.model.ffn.grouped import grouped_product
from src.model.norm import RMSNorm

ATOL = 2e-5


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients for the same gradient of it."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *x: Tensor) -> None:
    for mine, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=ATOL, atol=ATOL)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 8)])
def test_the_norm_is_rms_norm(shape: tuple[int, ...]) -> None:
    norm, weight = RMSNorm(shape[-1], eps=1e-3), random(shape[-1]) + 2

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, x)

    assert_same(ours, lambda x, w: F.rms_norm(x, w.shape, w, 1e-3), random(*shape), weight)


def test_the_norm_is_float32_under_autocast_and_with_weights_of_bfloat16() -> None:
    norm, x = RMSNorm(256, eps=1e-5), random(64, 256)
    exact = F.rms_norm(x, (256,), norm.weight, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    halves = norm.to(torch.bfloat16)(x.bfloat16())
    halves.sum().backward()
    torch.testing.assert_close(halves.float(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("is_compiling", [False, True])
@pytest.mark.parametrize("ends", [(3, 5, 9), (0, 9, 9), (0, 0, 9)])
def test_a_grouped_product_is_one_product_a_group(
    ends: tuple[int, ...], is_compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)

    def loop(rows: Tensor, weight: Tensor) -> Tensor:
        starts = (0, *ends)
        return torch.cat(
            [rows[a:b] @ w.T for a, b, w in zip(starts, ends, weight, strict=False)], dim=0
        )

    ends_E = torch.tensor(ends, dtype=torch.int32)
    assert_same(
        lambda rows, weight: grouped_product(rows, weight, ends_E),
        loop,
        random(9, 6),
        random(3, 5, 6),
    )


@pytest.mark.parametrize("time", [SHORTEST - 1, SHORTEST, 101, LONGEST, LONGEST + 1])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_in_blocks_is_causal_attention(time: int, num_kv_heads: int) -> None:
    keys = random(2, num_kv_heads, time, 8)
    assert_same(
        scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        random(2, 4, time, 8),
        keys,
        keys.flip(2),
    )


def test_attention_of_heads_that_lie_behind_times_in_memory_is_the_same() -> None:
    heads_first = [random(2, 3, 128, 8 + n)[..., :8] for n in range(3)]
    times_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads_first]
    ours, same = (results(scaled_dot_product_attention, x) for x in (heads_first, times_first))
    for one, other in zip(ours, same, strict=True):
        assert torch.equal(one, other)


def test_who_watches_functions_sees_attention_as_one() -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    inputs = [random(1, 2, 128, 4) for _ in range(3)]
    with Watch():
        watched = scaled_dot_product_attention(*inputs)
    assert seen == ["scaled_dot_product_attention"]
    assert torch.equal(watched, scaled_dot_product_attention(*inputs))


def test_grouped_experts_have_the_gradients_of_the_loop() -> None:
    experts = Experts(num_experts=3, hidden_dim=6, inner_dim=5, dispatch="grouped")
    picked = torch.tensor([[0, 2], [2, 0], [0, 1], [2, 1], [0, 2]])
    weights = {name: random(*p.shape) for name, p in experts.named_parameters()}

    def run(dispatch: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, scores: Tensor, *given: Tensor) -> Tensor:
            experts.dispatch = dispatch
            named = dict(zip(weights, given, strict=True))
            return torch.func.functional_call(experts, named, (x, scores, picked))

        return forward

    assert_same(run("grouped"), run("loop"), random(5, 6), random(5, 2), *weights.values())


def test_the_experts_of_one_token_are_those_of_many_under_autocast_too() -> None:
    experts = Experts(num_experts=4, hidden_dim=16, inner_dim=8, dispatch="grouped")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    x, scores = random(3, 16), random(3, 2).softmax(-1)
    picked = torch.tensor([[0, 2], [3, 1], [2, 3]])
    for is_autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            together = experts(x, scores, picked)
            single = [experts(x[i : i + 1], scores[i : i + 1], picked[i : i + 1]) for i in range(3)]
        assert single[0].dtype == together.dtype == torch.float32
        torch.testing.assert_close(torch.cat(single), together, rtol=1e-2, atol=1e-2 * 8)
