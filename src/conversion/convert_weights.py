"""Converts a model layer by layer, and measures the error of each step.

The text passes through the source one layer at a time. Each new layer gets the source layer's own
inputs, so that its measured error is that of this layer alone.

Axes: B windows, T tokens, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checkpoint.rebuild import restore_model
from src.common.random_streams import generator
from src.conversion.conversion_plan import Plan
from src.conversion.latent import Decomposition, InputMetric, decompose
from src.conversion.texts import Texts
from src.conversion.upcycle import to_experts
from src.model import Transformer
from src.model.rope import RotaryTable
from src.model.transformer import Block


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Cross-entropy on the held-out text, in nats per token."""

    source: float
    converted: float
    max_logit_difference: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A converted model and its errors."""

    model: Transformer
    layers: list[dict[str, float]]
    """For each layer, by step: |output - source's| / |source's|, on held-out text."""
    loss: Loss | None
    """None without a text."""


@torch.no_grad()
def convert(
    source: Transformer,
    plan: Plan,
    texts: Texts | None,
    *,
    seed: int,
    on_layer: Callable[[int], None],
) -> Converted:
    """Converts a model according to a plan.

    Args:
        source: a model of the plan's source.
        plan: the parts before and after.
        texts: texts for fitting the factors and for measuring losses; None: nothing is measured,
            and the factors are optimal if all directions of the inputs are equally likely.
        seed: seed of new routers.
        on_layer: called with the number of finished layers.
    """
    weights = {n: w for n, w in source.state_dict().items() if not _changes(n, plan)}
    fit_BTD, held_out_BTD = (
        (None, None)
        if texts is None
        else (source.embedding(texts.fit_BT), source.embedding(texts.held_out_BT))
    )
    layers = []
    for number, block in enumerate(source.blocks()):
        fit = None if fit_BTD is None else _through(block, fit_BTD, source.rope)
        held_out = None if held_out_BTD is None else _through(block, held_out_BTD, source.rope)
        lost: dict[str, float] = {}
        made: dict[str, Tensor] = {}
        if plan.latent is not None:
            made |= _attention(block, plan, fit, held_out, lost=lost)
        if plan.experts is not None:
            stream = generator(seed, "init", f"layers.{number}.ffn.router.weight")
            made |= _experts(block, plan, held_out, generator=stream, lost=lost)
        weights |= {f"layers.{number}.{name}": weight for name, weight in made.items()}
        layers.append(lost)
        fit_BTD = None if fit is None else fit.out_BTD
        held_out_BTD = None if held_out is None else held_out.out_BTD
        on_layer(number + 1)
    model = restore_model(plan.target, weights)
    loss = None if texts is None else _loss(source, model, texts.held_out_BT)
    return Converted(model=model, layers=layers, loss=loss)


def _changes(name: str, plan: Plan) -> bool:
    attention, ffn = plan.latent is not None, plan.experts is not None
    return (attention and ".attention." in name) or (ffn and ".ffn." in name)


@dataclass(frozen=True, kw_only=True)
class _LayerText:
    """Hidden states of a text in one layer of the source, (B, T, D) each."""

    attention_in_BTD: Tensor
    attention_out_BTD: Tensor
    ffn_in_BTD: Tensor
    ffn_out_BTD: Tensor
    out_BTD: Tensor
    """The residual stream after the layer."""


def _through(block: Block, x_BTD: Tensor, rope: RotaryTable) -> _LayerText:
    attention_in_BTD = block.attention_norm(x_BTD)
    attention_out_BTD = block.attention(attention_in_BTD, rope(x_BTD.shape[1]))
    x_BTD = x_BTD + attention_out_BTD
    ffn_in_BTD = block.ffn_norm(x_BTD)
    ffn_out_BTD = block.ffn(ffn_in_BTD)
    return _LayerText(
        attention_in_BTD=attention_in_BTD,
        attention_out_BTD=attention_out_BTD,
        ffn_in_BTD=ffn_in_BTD,
        ffn_out_BTD=ffn_out_BTD,
        out_BTD=x_BTD + ffn_out_BTD,
    )


def _attention(
    block: Block,
    plan: Plan,
    fit: _LayerText | None,
    held_out: _LayerText | None,
    *,
    lost: dict[str, float],
) -> dict[str, Tensor]:
    """New weights of a layer's attention, by name; stores the error of each step in `lost`."""
    assert plan.latent is not None
    dims = plan.source.model.dims()
    if fit is None:
        metric = InputMetric.identity(dims.hidden_dim)
    else:
        x_SD = fit.attention_in_BTD.flatten(0, 1).double()
        metric = InputMetric.of(x_SD.T @ x_SD / len(x_SD))
    weights: dict[str, Tensor] = {}
    found: dict[int, Decomposition] = {}
    steps = list(plan.attention_steps())
    # The steps before the last are computed only to measure their errors.
    for step, config in steps if held_out is not None else steps[-1:]:
        if config.num_rope_keys not in found:
            found[config.num_rope_keys] = decompose(
                block.attention.state_dict(),
                source=plan.latent[0],
                dims=dims,
                rope_dim=config.rope_dim,
                num_rope_keys=config.num_rope_keys,
                rope_stride=plan.rope_stride,
                metric=metric,
            )
        weights = found[config.num_rope_keys].weights(
            q_latent_dim=config.q_latent_dim, kv_latent_dim=config.kv_latent_dim
        )
        if held_out is not None:
            x_BTD = held_out.attention_in_BTD
            rope = RotaryTable(
                rope_dim=config.rope_dim,
                max_seq_len=x_BTD.shape[1],
                theta=plan.target.model.rope_theta,
            )
            y_BTD = _filled(config.build(dims), weights)(x_BTD, rope(x_BTD.shape[1]))
            lost[f"attention: {step}"] = _distance(y_BTD, held_out.attention_out_BTD)
    return {f"attention.{name}": weight for name, weight in weights.items()}


def _experts(
    block: Block,
    plan: Plan,
    held_out: _LayerText | None,
    *,
    generator: torch.Generator,
    lost: dict[str, float],
) -> dict[str, Tensor]:
    """New weights of its feed-forward part, by name; stores its error in `lost`."""
    assert plan.experts is not None
    model = plan.target.model
    weights = to_experts(
        block.ffn.state_dict(),
        target=plan.experts,
        init_std=model.router_init_std or model.init_std,
        generator=generator,
    )
    if held_out is not None:
        y_BTD = _filled(plan.experts.build(model.dims()), weights)(held_out.ffn_in_BTD)
        lost["ffn: experts"] = _distance(y_BTD, held_out.ffn_out_BTD)
    return {f"ffn.{name}": weight for name, weight in weights.items()}


def _filled(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module.eval()


def _distance(after: Tensor, before: Tensor) -> float:
    """Norm of the difference relative to `before`; absolute if `before` is 0."""
    size = float(before.norm())
    return float((after - before).norm()) / (size or 1.0)


def _loss(source: Transformer, converted: Transformer, tokens_BT: Tensor) -> Loss:
    total, other, difference, count = 0.0, 0.0, 0.0, 0
    # One window at a time, because the logits of a large vocabulary need much memory.
    for row_T in tokens_BT:
        logits_TV, other_TV = (model(row_T[None, :-1])[0] for model in (source, converted))
        total += float(F.cross_entropy(logits_TV, row_T[1:], reduction="sum"))
        other += float(F.cross_entropy(other_TV, row_T[1:], reduction="sum"))
        difference = max(difference, float((logits_TV - other_TV).abs().max()))
        count += len(row_T) - 1
    return Loss(
        source=total / count,
        converted=other / count,
        max_logit_difference=difference,
        num_tokens=count,
    )
