"""The router: which experts process a token, with what weights, and how load is balanced.

The default is DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16 and section 2.1.2), whose selection
bias is updated by algorithm 1 of arXiv 2408.15664. Each other value in the config is one difference
between a published router and this default.

Axes: S tokens of a batch, D hidden, E experts, K experts picked for a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.bounds import SoftCap, check_bound

CHOICES = {
    "balance": ("bias", "aux", "none"),
    "bias_use": ("select", "multiply", "add"),
    "bias_target": ("mean_load", "one_over_experts"),
    "bias_rule": ("sign", "proportional"),
    "update_on": ("step", "batch"),
    "dtype": ("float32", "autocast"),
}


LARGEST_EXPONENT = 88.7
"""The exponential of a larger number overflows float32: the sigmoid of its negative is 0."""

TINY_SUM = 1e-12
"""A sum of picked scores below this value is close to underflow."""


@dataclass(kw_only=True)
class RouterConfig:
    """How tokens are sent to experts."""

    balance: str
    """bias: a bias for each expert follows its load; aux: a balance loss; none: no balancing."""
    bias_use: str
    """select: the bias only decides which experts are picked; multiply, add: it changes logits."""
    bias_target: str
    """The target load: mean_load (top_k / E, the true mean) or one_over_experts (1 / E)."""
    bias_rule: str
    """sign: steps of size bias_rate; proportional: bias_rate times the distance from the target."""
    bias_rate: float | None
    """Size of a bias update; at least 0; null: 0.1 * (11000 / max_steps) * (E / 7), which takes the
    mean bias of a shorter run as far as the write-up's 11,000 steps with 7 experts did."""
    bias_center: bool
    """Subtract the mean bias after each update."""
    bias_trainable: bool
    """Let the optimizer train the bias too, as a parameter."""
    update_on: str
    """step: update after applied optimizer steps; batch: after every batch, even a skipped one."""
    norm_eps: float
    """Added to the sum that normalises the picked scores; at least 0."""
    dtype: str
    """float32: logits and scores in float32 at any precision; autocast: as in the other layers."""
    aux_weight: float
    """Weight of the balance loss with balance=aux; at least 0."""
    z_loss_weight: float
    """Weight of the router's z-loss (arXiv 2202.08906, eq. 5); 0: none."""
    softcap: float | None = None
    """Bound of a soft-cap on the logits that enter the sigmoid; above 0 and below 88.7; null:
    none."""

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"router.{field}={value}: must be one of {', '.join(allowed)}")
        if self.balance != "bias" and self.bias_use != "select":
            raise ValueError(f"router.bias_use={self.bias_use}: needs router.balance=bias")
        for field in ("bias_rate", "norm_eps", "aux_weight", "z_loss_weight"):
            value = getattr(self, field)
            if value is not None and not value >= 0:
                raise ValueError(f"router.{field}={getattr(self, field)}: must be at least 0")
        check_bound("router.softcap", self.softcap, below=LARGEST_EXPONENT)


class Router(nn.Module):
    """Picks the top k of the sigmoid scores and normalises them to weights that sum to one.

    In training it counts the tokens of each expert; `finish_step` or `finish_batch` ends the count
    and updates the bias.
    """

    weight: Tensor
    bias_E: Tensor
    counts_E: Tensor
    last_counts_E: Tensor

    def __init__(
        self, config: RouterConfig, *, hidden_dim: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k = config, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_dim))
        if config.bias_trainable:
            self.bias_E = nn.Parameter(torch.zeros(num_experts))
        else:
            self.register_buffer("bias_E", torch.zeros(num_experts))
        counts = torch.zeros(num_experts, dtype=torch.long)
        self.register_buffer("counts_E", counts, persistent=False)
        self.register_buffer("last_counts_E", counts.clone(), persistent=False)
        self._last: tuple[Tensor, Tensor] | None = None
        self._extra: dict[str, Tensor] = {}
        self.softcap = None if config.softcap is None else SoftCap(config.softcap)
        # Read at each use, so that a remedy can change them during a run.
        self.norm_eps = config.norm_eps
        self._bias_frozen = False
        self.bias_step: Callable[[Tensor], Tensor] | None = None
        """A rule that a remedy puts in place of bias_rule and bias_target: takes the counts (E,),
        and returns what is added to the bias."""
        self.removed_mean: Tensor | None = None
        """What bias_center took from the bias after the last update."""
        self.is_recomputing = False

    @property
    def bias_frozen(self) -> bool:
        """Whether neither balancing nor the optimizer may change the bias."""
        return self._bias_frozen

    @bias_frozen.setter
    def bias_frozen(self, frozen: bool) -> None:
        self._bias_frozen = frozen
        if isinstance(self.bias_E, nn.Parameter):
            self.bias_E.requires_grad_(not frozen)

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (S, K), in float32 unless dtype=autocast, and the picked experts (S, K)."""
        if self.config.dtype == "float32":
            # F.linear(x.float(), w.float()) alone would still run in bfloat16 under autocast.
            with torch.autocast(x_SD.device.type, enabled=False):
                return self._route(F.linear(x_SD.float(), self.weight.float()))
        return self._route(F.linear(x_SD, self.weight))

    def _route(self, logits_SE: Tensor) -> tuple[Tensor, Tensor]:
        use = self.config.bias_use if self.config.balance == "bias" else "select"
        if use == "multiply":
            logits_SE = logits_SE * self.bias_E
        elif use == "add":
            logits_SE = logits_SE + self.bias_E
        # After the bias, which moves the logits too: the sigmoid must not underflow.
        if self.softcap is not None:
            logits_SE = self.softcap(logits_SE)
        scores_SE = logits_SE.sigmoid()
        preference_SE = scores_SE + self.bias_E if use == "select" else scores_SE
        picked_SK = preference_SE.topk(self.top_k, dim=-1).indices
        picked_scores_SK = scores_SE.gather(-1, picked_SK)
        sums_S1 = picked_scores_SK.sum(dim=-1, keepdim=True)
        weights_SK = picked_scores_SK / (sums_S1 + self.norm_eps)
        if self.training:
            self._observe(logits_SE, scores_SE, picked_SK)
        return weights_SK, picked_SK

    def _observe(self, logits_SE: Tensor, scores_SE: Tensor, picked_SK: Tensor) -> None:
        experts_E = torch.arange(self.num_experts, device=picked_SK.device)
        # Not bincount, which syncs with the host and is not deterministic on GPUs.
        counts_E = (picked_SK.reshape(-1, 1) == experts_E).sum(dim=0)
        extra: dict[str, Tensor] = {}
        if self.config.balance == "aux":
            extra["router_balance"] = self._balance_loss(scores_SE, counts_E)
        if self.config.z_loss_weight:
            partition_S = logits_SE.logsumexp(dim=-1)
            extra["router_z_loss"] = self.config.z_loss_weight * partition_S.square().mean()
        # Activation checkpointing repeats a forward pass that has been counted already.
        if not self.is_recomputing:
            self.counts_E += counts_E
            self._last = (logits_SE.detach(), picked_SK)
            self._extra |= extra

    def _balance_loss(self, scores_SE: Tensor, counts_E: Tensor) -> Tensor:
        """arXiv 2412.19437, eq. 17-20, over the batch instead of each sequence.

        With several processes, each uses its own batch: a forward pass must not contain a
        collective, because one process may rerun it alone.
        """
        load_E = counts_E * (self.num_experts / counts_E.sum())
        share_E = (scores_SE / (scores_SE.sum(-1, keepdim=True) + 1e-20)).mean(dim=0)
        return self.config.aux_weight * (load_E * share_E).sum()

    def take_extra_losses(self) -> dict[str, Tensor]:
        """Returns the weighted losses of the last forward pass and forgets them."""
        losses, self._extra = self._extra, {}
        return losses

    @torch.no_grad()
    def finish_batch(self) -> None:
        """Must be called after each (micro-)batch, even a skipped one."""
        if self.config.update_on == "batch":
            self._close_count(update=True)

    @torch.no_grad()
    def finish_step(self, *, applied: bool) -> None:
        """Must be called after each optimizer step; a skipped one does not change the bias."""
        if self.config.update_on == "step":
            self._close_count(update=applied)

    def _close_count(self, *, update: bool) -> None:
        counts_E = self.counts_E.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_E)
        self.counts_E.zero_()
        self.last_counts_E.copy_(counts_E)
        if not update or self.bias_frozen or self.config.balance != "bias":
            return
        rule = self._bias_move if self.bias_step is None else self.bias_step
        self.bias_E += rule(counts_E)
        if self.config.bias_center:
            self.removed_mean = self.bias_E.mean()
            self.bias_E -= self.removed_mean

    def _bias_move(self, counts_E: Tensor) -> Tensor:
        """What one update adds to the bias."""
        # (target - load) * num_experts * total / uniform, in integers: the sign is exactly 0 for an
        # expert whose load is on target, which a rounding error would make positive or negative.
        total = counts_E.sum()
        uniform = {"mean_load": self.top_k, "one_over_experts": 1}[self.config.bias_target]
        shortfall_E = total - counts_E * (self.num_experts * self.top_k // uniform)
        if self.config.bias_rule == "sign":
            move_E = shortfall_E.sign().float()
        else:
            move_E = shortfall_E * (uniform / (self.num_experts * total))
        assert self.config.bias_rate is not None, "resolved before a router is built"
        return self.config.bias_rate * move_E

    @torch.no_grad()
    def router_stats(self) -> dict[str, float]:
        """Statistics of the last finished count and the last forward pass in training.

        Instruments read every module that has a method of this name, which returns floats, finite
        or not, by metric name.
        """
        if self._last is None:
            return {}
        counts_E = self.last_counts_E.float()
        mean = counts_E.mean()
        logits_SE, picked_SK = self._last
        picked_logits_SK = logits_SE.gather(-1, picked_SK)
        sums_S = picked_logits_SK.sigmoid().sum(dim=-1)
        stats = {
            "max_violation": (counts_E.max() - mean) / mean,
            "load_min": counts_E.min() / mean * self.top_k / self.num_experts,
            "load_max": counts_E.max() / mean * self.top_k / self.num_experts,
            "load_expected": torch.tensor(self.top_k / self.num_experts, device=mean.device),
            "bias_mean": self.bias_E.mean(),
            "bias_absmax": self.bias_E.abs().max(),
            "topk_sum_min": sums_S.min(),
            "picked_logit_min": picked_logits_SK.min(),
        }
        share_E = (counts_E / counts_E.sum()).clamp(min=1e-30)
        scores_SE = logits_SE.sigmoid()
        stats["load_entropy"] = -(share_E * share_E.log()).sum()
        stats["dead_experts"] = (counts_E == 0).sum()
        stats["tiny_sum_frac"] = (sums_S < TINY_SUM).float().mean()
        stats["saturated_frac"] = ((scores_SE < TINY_SUM) | (scores_SE == 1)).float().mean()
        stats["num_zero_sums"] = (sums_S == 0).sum()
        stats["num_tokens"] = torch.tensor(len(sums_S), device=sums_S.device)
        stats["top_k"] = torch.tensor(self.top_k, device=sums_S.device)
        values = torch.stack([value.float() for value in stats.values()]).tolist()
        return dict(zip(stats, values, strict=True))
