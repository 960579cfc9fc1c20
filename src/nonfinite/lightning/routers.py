"""Load and gate statistics of every router."""

from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.distributed import ReduceOp

from nonfinite.config import check_interval
from nonfinite.lightning.step_callback import StepCallback, is_log_step, log

UNLOGGED = ("num_zero_sums", "num_tokens", "top_k")
"""Statistics that an incident's line needs, but that are not logged."""

OVER_RANKS = {
    "topk_sum_min": ReduceOp.MIN,
    "picked_logit_min": ReduceOp.MIN,
    "tiny_sum_frac": "mean",
    "saturated_frac": "mean",
}
"""How statistics of the last forward pass are reduced over processes with different tokens."""


class RouterWatch(StepCallback):
    """Logs `router_stats()` of every module that has this method, as `moe/layer_<i>/<name>`.

    The method returns floats by name; layers are numbered in the order of the modules. Statistics
    that are not in OVER_RANKS, such as summed counts, are the same in all processes, or are logged
    as the first process has them.
    """

    def __init__(self, *, every: int) -> None:
        check_interval(every)
        self.every = every
        self._bias: dict[int, tuple[int, float]] = {}

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs the statistics on logged steps."""
        if not is_log_step(trainer, step, every=self.every):
            return
        routers = [module for module in pl_module.modules() if hasattr(module, "router_stats")]
        for layer, router in enumerate(routers):
            stats: dict[str, float] = cast(Any, router).router_stats()
            if trainer.world_size > 1:
                stats |= _over_ranks(trainer, pl_module, stats)
            logged = {f"moe/layer_{layer}/{k}": v for k, v in stats.items() if k not in UNLOGGED}
            if "bias_mean" in stats:
                before, mean = self._bias.get(layer, (0, 0.0))
                drift = (stats["bias_mean"] - mean) / (step - before) if step > before else 0.0
                logged[f"moe/layer_{layer}/bias_drift"] = drift
                self._bias[layer] = (step, stats["bias_mean"])
            log(trainer, logged, step=step)

    def state_dict(self) -> dict[str, Any]:
        """The last mean bias of each router."""
        return {"bias": self._bias}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bias = dict(state_dict["bias"])


def _over_ranks(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stats: dict[str, float]
) -> dict[str, float]:
    """The statistics in OVER_RANKS, over the tokens of all processes."""
    return {
        name: trainer.strategy.reduce(
            torch.tensor(stats[name], device=pl_module.device),
            reduce_op=how,  # type: ignore[arg-type]
        ).item()
        for name, how in OVER_RANKS.items()
        if name in stats
    }
