"""Which experts see a token, with what weight, and how their load is kept even.

The default is DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16 and section 2.1.2) with the update
of the selection bias from arXiv 2408.15664, algorithm 1. The other values of the config are the
single differences by which a published router can depart from it.

Axes: S tokens of a batch, D hidden, E experts, K experts picked for a token.
"""

from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

CHOICES = {
    "balance": ("bias", "aux", "none"),
    "bias_use": ("select", "multiply", "add"),
    "bias_target": ("mean_load", "one_over_experts"),
    "bias_rule": ("sign", "proportional"),
    "update_on": ("step", "batch"),
    "dtype": ("float32", "autocast"),
}


TINY_SUM = 1e-12
"""Sums of picked scores below it are about to become 0."""


@dataclass(kw_only=True)
class RouterConfig:
    """How tokens are sent to experts."""

    balance: str
    """bias: a bias per expert follows its load; aux: a loss term; none: nothing."""
    bias_use: str
    """select: picks experts only; multiply, add: changes the logits, and so the weights too."""
    bias_target: str
    """The load to steer to: mean_load (top_k / E, the true mean) or one_over_experts (1 / E)."""
    bias_rule: str
    """sign: steps of bias_rate; proportional: bias_rate times the distance from the target."""
    bias_rate: float | None
    """Size of a bias update; at least 0; null: 0.1 * (11000 / max_steps) * (E / 7), with which a
    shorter run ends with the mean bias of the write-up's 11,000 steps and 7 experts."""
    bias_center: bool
    """Subtract the mean bias after each update."""
    bias_trainable: bool
    """Let the optimizer train the bias too, as a parameter."""
    update_on: str
    """step: after applied optimizer steps; batch: after every batch, skipped ones too."""
    norm_eps: float
    """Added to the sum by which picked scores are divided; at least 0."""
    dtype: str
    """float32: logits and scores in float32 whatever the precision; autocast: as the rest."""
    aux_weight: float
    """Weight of the balance loss where balance=aux; at least 0."""
    z_loss_weight: float
    """Weight of the squared log-partition of the gate logits (arXiv 2202.08906, eq. 5); 0: none."""

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


class Router(nn.Module):
    """Sigmoid scores, the top k of them, weights that sum to one.

    While training it counts the tokens of each expert until `finish_step` or `finish_batch`
    closes the count and moves the bias.
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
        # Read at each use, so that an option can change them in the middle of a run.
        self.norm_eps = config.norm_eps
        self._bias_frozen = False
        self.is_again = False

    @property
    def bias_frozen(self) -> bool:
        """Whether the bias stays as it is, whoever would move it."""
        return self._bias_frozen

    @bias_frozen.setter
    def bias_frozen(self, frozen: bool) -> None:
        self._bias_frozen = frozen
        if isinstance(self.bias_E, nn.Parameter):
            self.bias_E.requires_grad_(not frozen)

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (S, K), float32 unless dtype=autocast, and expert numbers (S, K)."""
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
        # A comparison rather than bincount: no host sync, and deterministic on every device.
        counts_E = (picked_SK.reshape(-1, 1) == experts_E).sum(dim=0)
        extra: dict[str, Tensor] = {}
        if self.config.balance == "aux":
            extra["router_balance"] = self._balance_loss(scores_SE, counts_E)
        if self.config.z_loss_weight:
            partition_S = logits_SE.logsumexp(dim=-1)
            extra["router_z_loss"] = self.config.z_loss_weight * partition_S.square().mean()
        # What is computed again for the backward pass has been counted in the forward pass.
        if not self.is_again:
            self.counts_E += counts_E
            self._last = (logits_SE.detach(), picked_SK)
            self._extra |= extra

    def _balance_loss(self, scores_SE: Tensor, counts_E: Tensor) -> Tensor:
        """arXiv 2412.19437, eq. 17-20, over the batch instead of each sequence.

        Of several processes each takes its own batch: no collective may stand in a forward pass
        that one of them runs again alone.
        """
        load_E = counts_E * (self.num_experts / counts_E.sum())
        share_E = (scores_SE / (scores_SE.sum(-1, keepdim=True) + 1e-20)).mean(dim=0)
        return self.config.aux_weight * (load_E * share_E).sum()

    def take_extra_losses(self) -> dict[str, Tensor]:
        """The weighted losses of the last forward pass, once."""
        losses, self._extra = self._extra, {}
        return losses

    @torch.no_grad()
    def finish_batch(self) -> None:
        """To be called after each (micro-)batch, whatever became of it."""
        if self.config.update_on == "batch":
            self._close_count(update=True)

    @torch.no_grad()
    def finish_step(self, *, applied: bool) -> None:
        """To be called after each optimizer step; a skipped one leaves the bias as it was."""
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
        # target - load, times num_experts * total / uniform: in integers, so that the sign of an
        # expert that is exactly on target is 0 and not that of a rounding error.
        total = counts_E.sum()
        uniform = {"mean_load": self.top_k, "one_over_experts": 1}[self.config.bias_target]
        shortfall_E = total - counts_E * (self.num_experts * self.top_k // uniform)
        if self.config.bias_rule == "sign":
            move_E = shortfall_E.sign().float()
        else:
            move_E = shortfall_E * (uniform / (self.num_experts * total))
        assert self.config.bias_rate is not None, "resolved before a router is built"
        self.bias_E += self.config.bias_rate * move_E
        if self.config.bias_center:
            self.bias_E -= self.bias_E.mean()

    @torch.no_grad()
    def router_stats(self) -> dict[str, float]:
        """Figures of the last closed count and the last forward pass in training.

        The protocol by which instruments read a router: any module with a method of this name
        that returns finite or non-finite floats by metric name.
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
