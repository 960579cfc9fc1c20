"""Load and gate figures of every router."""

from typing import Any, cast

import lightning.pytorch as pl

from src.training.steps import StepCallback, is_log_step, log

UNLOGGED = ("num_zero_sums", "num_tokens", "top_k")
"""What an incident's line needs and no curve."""


class RouterWatch(StepCallback):
    """Logs `router_stats()` of every module that has such a method, as `moe/layer_<i>/<figure>`.

    The method returns floats by name; layers are numbered in the order of the modules.
    """

    def __init__(self, *, max_steps: int, every: int) -> None:
        self.max_steps, self.every = max_steps, every

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Reads the routers on logged steps."""
        if not is_log_step(trainer, step, every=self.every):
            return
        routers = [module for module in pl_module.modules() if hasattr(module, "router_stats")]
        for layer, router in enumerate(routers):
            stats: dict[str, float] = cast(Any, router).router_stats()
            logged = {f"moe/layer_{layer}/{k}": v for k, v in stats.items() if k not in UNLOGGED}
            log(trainer, logged, step=step)
