"""Load and gate figures of every router."""

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl

from src.training.steps import StepCallback, is_log_step, log

ALARM_LOGIT = -40.0
"""A hundred steps before the first 0/0 of the published router its lowest picked logit is there."""

UNDERFLOW_LOGIT = -88.72
"""Where float32's sigmoid becomes exactly 0."""

UNLOGGED = ("num_zero_sums", "num_tokens", "top_k")
"""What an incident's line needs and no curve."""


class RouterWatch(StepCallback):
    """Logs `router_stats()` of every module that has such a method, as `moe/layer_<i>/<figure>`.

    The method returns floats by name; layers are numbered in the order of the modules. Warns once
    when a gate logit falls below -40.
    """

    def __init__(self, *, every: int, say: Callable[[str], None] | None = None) -> None:
        self.every, self.say = every, say
        self.alarmed = False
        self._bias: dict[int, tuple[int, float]] = {}

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Reads the routers on logged steps."""
        if not is_log_step(trainer, step, every=self.every):
            return
        routers = [module for module in pl_module.modules() if hasattr(module, "router_stats")]
        for layer, router in enumerate(routers):
            stats: dict[str, float] = cast(Any, router).router_stats()
            logged = {f"moe/layer_{layer}/{k}": v for k, v in stats.items() if k not in UNLOGGED}
            if "bias_mean" in stats:
                before, mean = self._bias.get(layer, (0, 0.0))
                drift = (stats["bias_mean"] - mean) / (step - before) if step > before else 0.0
                logged[f"moe/layer_{layer}/bias_drift"] = drift
                self._bias[layer] = (step, stats["bias_mean"])
            log(trainer, logged, step=step)
            self._alarm(step, layer, stats.get("picked_logit_min", 0.0))

    def _alarm(self, step: int, layer: int, lowest: float) -> None:
        """Says once that a gate is on its way to underflow."""
        if lowest < ALARM_LOGIT and not self.alarmed:
            self.alarmed = True
            if self.say is not None:
                self.say(
                    f"step {step}: layer {layer}: lowest picked gate logit {lowest:.1f};"
                    f" scores are exactly 0 below {UNDERFLOW_LOGIT}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Whether it has warned, and the last mean biases."""
        return {"alarmed": self.alarmed, "bias": self._bias}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.alarmed, self._bias = state_dict["alarmed"], dict(state_dict["bias"])
