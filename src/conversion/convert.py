"""Converts a model layer by layer, and measures what each step lost.

Both models go through the text together, one layer at a time: a layer's inputs are the source's
own, so that its figures are of that layer alone.

Axes: B windows, T tokens, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.conversion.latent import InputMetric, to_latent
from src.conversion.plan import Plan
from src.conversion.texts import Texts
from src.conversion.upcycle import to_experts
from src.model import Transformer
from src.model.rope import RotaryTable
from src.model.transformer import Block
from src.run.restore import PREFIX, empty_model
from src.streams import generator


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Cross-entropy on the held-out text, nats a token."""

    source: float
    converted: float
    max_logit_difference: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model and what it cost."""

    model: Transformer
    layers: list[dict[str, float]]
    """For each layer, by step: |output - source's| / |source's| after it, on held-out text."""
    loss: Loss | None
    """None where no text was given."""


@torch.no_grad()
def convert(
    source: Transformer,
    plan: Plan,
    texts: Texts | None,
    *,
    fit: bool,
    seed: int,
    on_layer: Callable[[int], None],
) -> Converted:
    """The target of a plan.

    Args:
        source: a model of the plan's source.
        plan: what is to become of it.
        texts: None: measures nothing.
        fit: whether factors are the nearest for the inputs of the text, not for all inputs alike.
        seed: of the routers.
        on_layer: told the number of layers that are done.
    """
    weights = {n: w for n, w in source.state_dict().items() if not _changes(n, plan)}
    streams = _Streams(source, texts)
    layers = []
    for number, block in enumerate(source.blocks()):
        made, lost = _layer(block, plan, streams, fit=fit, seed=seed, number=number)
        weights |= {f"layers.{number}.{name}": weight for name, weight in made.items()}
        layers.append(lost)
        on_layer(number + 1)
    model = empty_model(plan.target, {f"{PREFIX}{name}": w for name, w in weights.items()})
    model.load_state_dict(weights)
    loss = None if texts is None else _loss(source, model.eval(), texts.held_out_BT)
    return Converted(model=model.eval(), layers=layers, loss=loss)


def _changes(name: str, plan: Plan) -> bool:
    attention, ffn = plan.latent is not None, plan.experts is not None
    return (attention and ".attention." in name) or (ffn and ".ffn." in name)


class _Streams:
    """The residual streams of the source on the text, moved on layer by layer."""

    def __init__(self, source: Transformer, texts: Texts | None) -> None:
        self.rope = source.rope
        self._fit = None if texts is None else source.embedding(texts.fit_BT)
        self._held_out = None if texts is None else source.embedding(texts.held_out_BT)

    def moments(self, block: Block) -> Tensor | None:
        """Second moments (D, D) of the attention's inputs, float64."""
        if self._fit is None:
            return None
        x_SD = block.attention_norm(self._fit).flatten(0, 1).double()
        return x_SD.T @ x_SD / len(x_SD)

    def attention_input(self, block: Block) -> Tensor | None:
        """Of the held-out text, (B, T, D)."""
        return None if self._held_out is None else block.attention_norm(self._held_out)

    def ffn_input(self, block: Block) -> Tensor | None:
        """Of the held-out text, (B, T, D)."""
        x_BTD = self.attention_input(block)
        if x_BTD is None or self._held_out is None:
            return None
        y_BTD = block.attention(x_BTD, self.rope(x_BTD.shape[1]))
        return block.ffn_norm(self._held_out + y_BTD)

    def advance(self, block: Block) -> None:
        """Through the layer."""
        if self._fit is not None:
            self._fit = block(self._fit, self.rope(self._fit.shape[1]))
        if self._held_out is not None:
            self._held_out = block(self._held_out, self.rope(self._held_out.shape[1]))


def _layer(
    block: Block, plan: Plan, streams: _Streams, *, fit: bool, seed: int, number: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """New weights of one layer by name, and what each step lost."""
    weights: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    dims, target = plan.source.model.dims(), plan.target
    if plan.latent is not None:
        before, _ = plan.latent
        moments = streams.moments(block) if fit else None
        even = InputMetric.even(dims.hidden_dim)
        metric = even if moments is None else InputMetric.of(moments)
        x_BTD = streams.attention_input(block)
        made: Mapping[str, Tensor] = {}
        for step, config in plan.attention_steps():
            made = to_latent(
                block.attention.state_dict(),
                source=before,
                target=config,
                dims=dims,
                rope_stride=plan.rope_stride,
                metric=metric,
            )
            if x_BTD is not None:
                table = RotaryTable(
                    rope_dim=config.rope_dim,
                    max_seq_len=x_BTD.shape[1],
                    theta=target.model.rope_theta,
                )
                after = _filled(config.build(dims), made)(x_BTD, table(x_BTD.shape[1]))
                y_BTD = block.attention(x_BTD, streams.rope(x_BTD.shape[1]))
                lost[f"attention: {step}"] = _distance(after, y_BTD)
        weights |= {f"attention.{name}": weight for name, weight in made.items()}
    if plan.experts is not None:
        model = target.model
        made = to_experts(
            block.ffn.state_dict(),
            target=plan.experts,
            init_std=model.router_init_std or model.init_std,
            generator=generator(seed, "init", f"layers.{number}.ffn.router.weight"),
        )
        x_BTD = streams.ffn_input(block)
        if x_BTD is not None:
            after = _filled(plan.experts.build(dims), made)(x_BTD)
            lost["ffn: experts"] = _distance(after, block.ffn(x_BTD))
        weights |= {f"ffn.{name}": weight for name, weight in made.items()}
    streams.advance(block)
    return weights, lost


def _filled(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module.eval()


def _distance(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def _loss(source: Transformer, converted: Transformer, tokens_BT: Tensor) -> Loss:
    total, other, difference, count = 0.0, 0.0, 0.0, 0
    # One window after the other: the logits of a large vocabulary are wide.
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
