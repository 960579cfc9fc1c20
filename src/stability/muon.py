"""Muon for the matrices of hidden layers, in place of AdamW.

Axes: N matrices of a stack, A rows, B columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.effect_metric import EffectMetric
from src.stability.remedy_callback import refuse_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the Newton-Schulz iteration, from Keller Jordan's post, section "Newton-Schulz"."""

SMALLEST_NORM = 1e-7
"""A matrix with a smaller norm is divided by this."""

NOT_HIDDEN = frozenset(
    {"classifier", "embed", "embed_out", "embed_tokens", "embedding", "head", "lm_head"}
    | {"output", "pos_embed", "score", "unembed", "wpe", "wte"}
)
"""Parts of a parameter's name that mark an embedding or an output layer."""


@dataclass(kw_only=True)
class MuonConfig(RemedyConfig):
    """Muon (Jordan 2024; Liu et al., arXiv 2502.16982, section 2) in place of AdamW.

    For the weight W of a hidden layer, with A rows, B columns and gradient G:

        M <- momentum M + (1 - momentum) G
        O  = orthogonalised((1 - momentum) G + momentum M)
        W <- W - rate (update_rms sqrt(max(A, B)) O + weight_decay W)

    The factor makes the root mean square of an update about that of AdamW's, 0.2 (section 2.2), so
    that the recipe's rate and weight decay serve both. `orthogonalised` sets all singular values
    near 1 by steps of a Newton-Schulz iteration in bfloat16, as torch.optim.Muon does; it does
    not depend on the scale of its input, which is why (1 - momentum) does not matter.

    AdamW keeps its settings for all else: vectors, embeddings, the output layer and convolutions. A
    tensor with three axes, as of a bank of experts, is a stack of matrices: each expert's is
    orthogonalised by itself, and A and B are its last two axes. (torch.optim.Muon accepts matrices
    only.) A router's matrix is one of a hidden layer, as by the names in the authors' example.
    Embeddings and output layers are recognised by class (nn.Embedding) and by name (NOT_HIDDEN).

    No departure in the rule for matrices. Clipping of the gradient norm stays on.
    """

    replaces_optimizer: ClassVar[bool] = True

    momentum: float
    """Weight of the past in the momentum; from 0 to below 1."""
    num_iterations: int
    """Steps of the Newton-Schulz iteration; from 1 to 20."""
    update_rms: float
    """Root mean square of an update, in units of the learning rate; above 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be at least 0 and below 1")
        if not 1 <= self.num_iterations <= 20:
            raise ValueError(f"num_iterations={self.num_iterations}: must be from 1 to 20")
        check_positive("update_rms", self.update_rms)

    def replace_optimizer(
        self, optimizer: torch.optim.Optimizer, module: nn.Module
    ) -> torch.optim.Optimizer:
        return MuonAndAdamW(optimizer, module, self)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [MuonShare("muon_params_frac", _share_of_muon, run)]


class MuonShare(EffectMetric):
    """Logs the share of the trained entries that Muon has updated, read from its momenta."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses parts of matrices, and a loop that does not use the remedy's optimizer."""
        super().on_train_start(trainer, pl_module)
        refuse_sharded(trainer, "muon")
        if not isinstance(trainer.optimizers[0], MuonAndAdamW):
            raise ValueError(
                f"optimizer={type(trainer.optimizers[0]).__name__}: return"
                " muon.replace_optimizer(AdamW(...), self) from configure_optimizers"
            )


def _share_of_muon(trainer: pl.Trainer, module: pl.LightningModule) -> float:
    optimizer = trainer.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    updated = sum(p.numel() for p in params if "momentum_buffer" in optimizer.state.get(p, {}))
    return updated / sum(p.numel() for p in params)


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer with two rules, so that one schedule, guard and checkpoint serve both.

    Each group of AdamW is divided in two, with its rate and weight decay: first come the groups
    that AdamW updates, then Muon's, so that every parameter stays in exactly one group.

    Args:
        adamw: torch's AdamW with all parameters; it makes the steps of its groups.
        module: the module that names the parameters.
        config: the settings of Muon.

    Raises:
        ValueError: the optimizer is not AdamW, or no parameter is a matrix of a hidden layer.
    """

    def __init__(self, adamw: torch.optim.Optimizer, module: nn.Module, config: MuonConfig) -> None:
        if not isinstance(adamw, torch.optim.AdamW):
            raise ValueError(
                f"optimizer={type(adamw).__name__}: muon needs torch.optim.AdamW for the rest"
            )
        hidden = set(map(id, hidden_matrices(module).values()))
        groups: list[dict[str, Any]] = []
        for group in adamw.param_groups:
            rest = [p for p in group["params"] if id(p) not in hidden]
            if rest:
                groups.append({**group, "params": rest, "rule": "adamw"})
        num_adamw = len(groups)
        for group in adamw.param_groups:
            matrices = [p for p in group["params"] if id(p) in hidden]
            if matrices:
                kept = {name: group[name] for name in ("lr", "weight_decay")}
                kept |= {"momentum": config.momentum}
                groups.append({**kept, "params": matrices, "rule": "muon"})
        if len(groups) == num_adamw:
            raise ValueError(
                f"optimizer=muon: {type(module).__name__} has no trainable matrix in a hidden layer"
            )
        super().__init__(groups, {})
        self.config, self._adamw = config, adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Linked at every step, because loading a checkpoint replaces both.
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if g["rule"] == "adamw"]
        self._adamw.step()
        for group in self.param_groups:
            if group["rule"] == "muon":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = cast(Tensor, parameter.grad), self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalised(
            gradient.lerp(momentum, group["momentum"]), num_iterations=self.config.num_iterations
        )
        rate = group["lr"]
        scale = self.config.update_rms * math.sqrt(max(parameter.shape[-2:]))
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * scale)


def hidden_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices of hidden layers, and stacks of them, by name."""
    others: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.modules.conv._ConvNd):
            others |= set(map(id, part.parameters(recurse=False)))
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and parameter.dim() in (2, 3)
        and id(parameter) not in others
        and NOT_HIDDEN.isdisjoint(name.split("."))
    }


def orthogonalised(update: Tensor, *, num_iterations: int) -> Tensor:
    """A matrix (A, B), or each of a stack (N, A, B), with all singular values near 1, in bfloat16.

    The iteration is the quintic a X + b (X X^T) X + c (X X^T)^2 X. Its coefficients make small
    singular values grow fast; the large ones end between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    # In bfloat16 as in torch.optim.Muon, for speed; errors of rounding do not accumulate.
    x_NAB = (update if update.dim() == 3 else update[None]).bfloat16()
    is_tall = x_NAB.size(-2) > x_NAB.size(-1)
    if is_tall:
        x_NAB = x_NAB.mT
    norm_N11 = x_NAB.flatten(1).norm(dim=1)[:, None, None]
    x_NAB = x_NAB / norm_N11.clamp(min=SMALLEST_NORM)
    for _ in range(num_iterations):
        gram_NAA = x_NAB @ x_NAB.mT
        change_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, change_NAA, x_NAB, beta=a)
    return (x_NAB.mT if is_tall else x_NAB).reshape(update.shape)
