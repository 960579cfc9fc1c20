"""Early warning: says in advance that a metric will reach its limit before the run ends."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch

from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.step_callback import StepCallback
from nonfinite.limits import Limit, limit_of


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a drift raises an alarm; tuned on half of experiments/detector, tested on the rest."""

    window: int = 6
    """Number of latest values through which the drift is fitted."""
    sigmas: float = 3.0
    """Smallest distance of the drift from 0, in its standard errors."""
    way_frac: float = 0.3
    """Smallest share of the way from the first value to the limit that is already covered."""
    horizon_frac: float = 1.0
    """The limit must be reached within this share of the run, and before its end."""

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 3:
            raise ValueError(f"window={self.window}: must be an integer, at least 3")
        if not self.sigmas >= 0:
            raise ValueError(f"sigmas={self.sigmas}: must be at least 0")
        if not 0 <= self.way_frac < 1:
            raise ValueError(f"way_frac={self.way_frac}: must be at least 0 and below 1")
        if not self.horizon_frac > 0:
            raise ValueError(f"horizon_frac={self.horizon_frac}: must be above 0")


@dataclass
class Series:
    """One metric that drifts towards its limit."""

    limit: Limit
    bound: float
    then: str
    """What happens at the limit."""
    subject: str
    """The metric in words, and where it is measured."""
    first: float | None = None
    """The first value, scaled by `Limit.scaled` like `values`."""
    steps: deque[int] = field(default_factory=deque)
    values: deque[float] = field(default_factory=deque)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A straight line through the latest values."""

    per_step: float
    sigmas: float
    """The slope's distance from 0 in standard errors; infinite if all values lie on the line."""


def drift_of(steps: list[int], values: list[float]) -> Drift:
    """Fits a line by least squares.

    Args:
        steps: at least three, not all equal.
        values: one for each step.
    """
    n = len(steps)
    x_mean, y_mean = math.fsum(steps) / n, math.fsum(values) / n
    spread = math.fsum((x - x_mean) ** 2 for x in steps)
    slope = (
        math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(steps, values, strict=True)) / spread
    )
    residual = math.fsum(
        (y - y_mean - slope * (x - x_mean)) ** 2 for x, y in zip(steps, values, strict=True)
    )
    error = math.sqrt(residual / (n - 2) / spread)
    return Drift(per_step=slope, sigmas=abs(slope) / error if error > 0 else math.inf)


class EarlyWarning(StepCallback):
    """Follows the instruments' metrics; warns once per kind that one will reach its limit.

    Must come after the instruments and before the callback that saves checkpoints.

    Args:
        say: shows one line to the user.
        save: keeps the state after the given step; called after the first alarm if the guard has
            `on_alarm=checkpoint`.
        float_max: largest finite number; None: that of the trainer's precision.
        max_steps: optimizer steps of the run; -1: unlimited; None: as many as the trainer plans.
        thresholds: when a drift raises an alarm.

    Attributes:
        alarms: each with its step, metric, value, drift, limit, crossing step and line.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None] = print,
        save: Callable[[int], None] | None = None,
        float_max: float | None = None,
        max_steps: int | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        if float_max is not None and not 0 < float_max < math.inf:
            raise ValueError(f"float_max={float_max}: must be above 0 and finite, or None")
        if max_steps is not None and max_steps < 1 and max_steps != -1:
            raise ValueError(f"max_steps={max_steps}: must be at least 1, -1 or None")
        self.say, self.save, self.max_steps = say, save, max_steps
        self.float_max, self.thresholds = float_max, thresholds or Thresholds()
        self.alarms: list[dict[str, Any]] = []
        self._series: dict[str, Series | None] = {}
        self._restored: dict[str, Any] = {}
        self._num_announced = 0
        self._on_alarm = "none"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the largest finite number from the trainer's precision, if it is not given.

        Raises:
            ValueError: the guard has on_alarm=checkpoint, but `save` is None.
        """
        guard = StepGuard.of(trainer)
        self._on_alarm = "none" if guard is None else guard.config.on_alarm
        if self._on_alarm == "checkpoint" and self.save is None:
            raise ValueError("on_alarm=checkpoint: EarlyWarning needs the argument save")
        if self.float_max is None:
            half = str(trainer.precision).startswith("16")
            self.float_max = torch.finfo(torch.float16 if half else torch.float32).max

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the length of the run from the trainer, if it is not given."""
        super().on_train_start(trainer, pl_module)
        if self.max_steps is None:
            planned = trainer.estimated_stepping_batches
            self.max_steps = int(planned) if math.isfinite(planned) else -1

    def read_metrics(self, trainer: pl.Trainer, metrics: Mapping[str, float], *, step: int) -> None:
        """Adds the metrics that are logged for a step."""
        assert self.max_steps is not None
        for name, value in metrics.items():
            if name not in self._series:
                self._series[name] = self._new_series(name)
            series = self._series[name]
            if series is not None and math.isfinite(value):
                self._add(name, series, float(value), step, self.max_steps)

    def _new_series(self, name: str) -> Series | None:
        found = limit_of(name)
        if found is None:
            return None
        limit, subject = found
        assert self.float_max is not None
        size = self.thresholds.window
        known = self._restored.get(name, {"first": None, "steps": [], "values": []})
        return Series(
            limit=limit,
            bound=limit.bound_for(self.float_max),
            then=limit.then_for(self.float_max),
            subject=subject,
            first=known["first"],
            steps=deque(known["steps"], maxlen=size),
            values=deque(known["values"], maxlen=size),
        )

    def _add(self, name: str, series: Series, value: float, step: int, max_steps: int) -> None:
        scaled = series.limit.scaled(value)
        if scaled is None or (series.steps and step <= series.steps[-1]):
            return
        if series.first is None:
            series.first = scaled
        series.steps.append(step)
        series.values.append(scaled)
        if any(alarm["what"] == series.limit.what for alarm in self.alarms):
            return
        crossing = self._crossing(series, max_steps)
        if crossing is not None:
            self.alarms.append(_alarm(name, series, value, step, *crossing))

    def _crossing(self, series: Series, max_steps: int) -> tuple[Drift, float] | None:
        """The drift and the crossing step if they raise an alarm; else None."""
        rules = self.thresholds
        bound = series.limit.scaled(series.bound)
        assert bound is not None and series.first is not None
        now, way = series.values[-1], bound - series.first
        if len(series.steps) < rules.window or (now - series.first) / way < rules.way_frac:
            return None
        drift = drift_of(list(series.steps), list(series.values))
        if drift.per_step * way <= 0 or drift.sigmas < rules.sigmas:
            return None
        step = series.steps[-1]
        crossing = step + (bound - now) / drift.per_step
        # Without a last step, the horizon is as long as the run so far.
        end = max_steps if max_steps > 0 else 2 * step
        if crossing > min(step + rules.horizon_frac * end, end):
            return None
        return drift, crossing

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Announces new alarms, and carries out the guard's `on_alarm` for the first."""
        if len(self.alarms) == self._num_announced:
            return
        is_first = self._num_announced == 0
        for alarm in self.alarms[self._num_announced :]:
            self.say(alarm["line"])
        self._num_announced = len(self.alarms)
        if not is_first:
            return
        if self._on_alarm == "checkpoint":
            assert self.save is not None
            self.save(step)
        elif self._on_alarm == "stop":
            guard = StepGuard.of(trainer)
            assert guard is not None
            guard.stopped = True
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Alarms, and the latest values of every metric."""
        known = {name: series for name, series in self._series.items() if series is not None}
        series = {
            name: {"first": s.first, "steps": list(s.steps), "values": list(s.values)}
            for name, s in known.items()
        }
        return {"alarms": [dict(a) for a in self.alarms], "series": {**self._restored, **series}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alarms = [dict(alarm) for alarm in state_dict["alarms"]]
        self._num_announced = len(self.alarms)
        self._restored, self._series = dict(state_dict["series"]), {}


def _alarm(
    name: str, series: Series, value: float, step: int, drift: Drift, crossing: float
) -> dict[str, Any]:
    limit = series.limit
    if limit.grows:
        factor = math.exp(drift.per_step)
        moving = f"changing {factor:.3g}-fold a step"
    else:
        way = "falling" if drift.per_step < 0 else "rising"
        moving = f"{way} {abs(drift.per_step):.2g} a step"
    return {
        "step": step,
        "metric": name,
        "what": limit.what,
        "value": value,
        "drift": math.exp(drift.per_step) if limit.grows else drift.per_step,
        "drift_is": "a factor a step" if limit.grows else "an amount a step",
        "limit": series.bound,
        "crossing_step": round(crossing),
        "line": f"step {step}: {series.subject} {value:.3g}, {moving}: {series.then} in"
        f" about {max(1, round(crossing - step))} steps",
    }
