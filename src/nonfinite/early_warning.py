"""Early warning: a figure that will reach its limit before the run ends, said beforehand."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch

from nonfinite.guard import StepGuard
from nonfinite.limits import Limit, limit_of
from nonfinite.step_callback import StepCallback


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a drift is an alarm; set on one half of experiments/detector, tested on the other."""

    window: int = 6
    """Latest values by which the drift is judged."""
    sigmas: float = 3.0
    """The drift's distance from 0, in its own standard errors."""
    way_frac: float = 0.3
    """Share of the way from the first value to the limit that must lie behind it."""
    horizon_frac: float = 1.0
    """The limit must come within this share of the run, and before its end."""

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
    """One figure on its way."""

    limit: Limit
    bound: float
    then: str
    """What happens there."""
    subject: str
    """The figure in words, and where it is measured."""
    first: float | None = None
    """On the axis of the drift, like `values`."""
    steps: deque[int] = field(default_factory=deque)
    values: deque[float] = field(default_factory=deque)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A straight line through the latest values."""

    a_step: float
    sigmas: float
    """Its distance from 0 in standard errors; infinite where all lie on the line."""


def drift_of(steps: list[int], values: list[float]) -> Drift:
    """Least squares.

    Args:
        steps: at least three, not all alike.
        values: one a step.
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
    return Drift(a_step=slope, sigmas=abs(slope) / error if error > 0 else math.inf)


class EarlyWarning(StepCallback):
    """Follows what the instruments log; says once a kind of figure when it will reach its limit.

    To be placed after the instruments and before what saves checkpoints.

    Args:
        say: shows one line to the user.
        save: given the step, sees to it that the state after it is kept; the guard's
            `on_alarm=checkpoint` calls it after the first alarm, where `stop` ends the run.
        float_max: the largest number of the arithmetic; None: that of the trainer's precision.
        max_steps: of the run, optimizer steps; -1: it has no last one; None: as many as the
            trainer will make.
        thresholds: when a drift is an alarm.

    Attributes:
        alarms: each with its step, metric, value, drift, limit, the step of crossing, and a line.
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
        self._told = 0
        self._on_alarm = "none"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the largest number from the precision where it is not given.

        Raises:
            ValueError: the guard wants a checkpoint, and there is nothing that saves one.
        """
        guard = StepGuard.of(trainer)
        self._on_alarm = "none" if guard is None else guard.config.on_alarm
        if self._on_alarm == "checkpoint" and self.save is None:
            raise ValueError("on_alarm=checkpoint: EarlyWarning needs save")
        if self.float_max is None:
            half = str(trainer.precision).startswith("16")
            self.float_max = torch.finfo(torch.float16 if half else torch.float32).max

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the length of the run from the trainer where it is not given."""
        super().on_train_start(trainer, pl_module)
        if self.max_steps is None:
            planned = trainer.estimated_stepping_batches
            self.max_steps = int(planned) if math.isfinite(planned) else -1

    def read_metrics(self, trainer: pl.Trainer, metrics: Mapping[str, float], *, step: int) -> None:
        """Takes figures of a step as they are logged."""
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
        """The drift and the step of crossing, where they are an alarm."""
        rules = self.thresholds
        bound = series.limit.scaled(series.bound)
        assert bound is not None and series.first is not None
        now, way = series.values[-1], bound - series.first
        if len(series.steps) < rules.window or (now - series.first) / way < rules.way_frac:
            return None
        drift = drift_of(list(series.steps), list(series.values))
        if drift.a_step * way <= 0 or drift.sigmas < rules.sigmas:
            return None
        step = series.steps[-1]
        crossing = step + (bound - now) / drift.a_step
        # Of a trainer without a last step as much is asked as it has made.
        end = max_steps if max_steps > 0 else 2 * step
        if crossing > min(step + rules.horizon_frac * end, end):
            return None
        return drift, crossing

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Tells of new alarms, and does what is to be done about the first."""
        if len(self.alarms) == self._told:
            return
        is_first = self._told == 0
        for alarm in self.alarms[self._told :]:
            self.say(alarm["line"])
        self._told = len(self.alarms)
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
        """Alarms, and the latest values of every figure."""
        known = {name: series for name, series in self._series.items() if series is not None}
        series = {
            name: {"first": s.first, "steps": list(s.steps), "values": list(s.values)}
            for name, s in known.items()
        }
        return {"alarms": [dict(a) for a in self.alarms], "series": {**self._restored, **series}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.alarms = [dict(alarm) for alarm in state_dict["alarms"]]
        self._told = len(self.alarms)
        self._restored, self._series = dict(state_dict["series"]), {}


def _alarm(
    name: str, series: Series, value: float, step: int, drift: Drift, crossing: float
) -> dict[str, Any]:
    limit = series.limit
    if limit.grows:
        factor = math.exp(drift.a_step)
        moving = f"changing {factor:.3g}-fold a step"
    else:
        way = "falling" if drift.a_step < 0 else "rising"
        moving = f"{way} {abs(drift.a_step):.2g} a step"
    return {
        "step": step,
        "metric": name,
        "what": limit.what,
        "value": value,
        "drift": math.exp(drift.a_step) if limit.grows else drift.a_step,
        "drift_is": "a factor a step" if limit.grows else "an amount a step",
        "limit": series.bound,
        "crossing_step": round(crossing),
        "line": f"step {step}: {series.subject} {value:.3g}, {moving}: {series.then} in"
        f" about {max(1, round(crossing - step))} steps",
    }
