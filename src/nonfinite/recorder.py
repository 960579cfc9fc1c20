"""The incident recorder: reruns a non-finite step under the tracer, and saves what it finds."""

import json
import logging
import math
import shlex
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from nonfinite.causes import LOOKED_AT, UNKNOWN, Evidence, cause, describe, supporting_values
from nonfinite.guard import StepGuard
from nonfinite.incident_files import json_safe, unreadable_type, with_plain_values, write_page
from nonfinite.rerun import (
    Routers,
    rerun_loss,
    router_state,
    router_stats_at,
    routers_of,
    undisturbed,
)
from nonfinite.snapshot import host_states
from nonfinite.step_callback import StepCallback
from nonfinite.tracer import Finding, trace

logger = logging.getLogger(__name__)

OVERRIDABLE = ("norm_eps", "bias_frozen")
"""Attributes of routers that remedies set during a run."""

RING = 256
"""Number of last steps whose metrics are kept for the page."""
SPIKE_NORM, SPIKE_RATIO, SPIKE_WINDOW = 100.0, 5.0, 128
"""A large spike exceeds an absolute gradient norm, and a multiple of the running median."""


class IncidentRecorder(StepCallback):
    """Records the first non-finite step of a run with the operation that caused it, and one spike.

    Reruns the step's batches with the weights, router biases and random state that they had, and
    restores everything afterwards, so that training continues bitwise as without the recorder.
    Needs a StepGuard among the trainer's callbacks.

    Args:
        folder: incidents are saved to <folder>/step-<n>/. Batches are saved as tensors and plain
            values: mappings become dicts, arrays become tensors.
        say: shows one line to the user.
        extras: plain values to add to the saved state, such as the configuration.
        repeat: the command that reruns the step, with `{folder}` for the incident's folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        say: Callable[[str], None] = print,
        extras: Mapping[str, Any] | None = None,
        repeat: str = "python -m src.diagnose checkpoint={folder} target=<package.module:callable>",
    ) -> None:
        self.folder, self.say, self.extras = Path(folder), say, extras or {}
        self.repeat = repeat
        self.latest: dict[str, float] = {}
        self.incident: dict[str, Any] | None = None
        self.spike_step: int | None = None
        self.ring: deque[dict[str, float]] = deque(maxlen=RING)
        self._batches: list[dict[str, Any]] = []
        self._routers: Routers = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Registers with the guard, to be called before it drops a step."""
        guard = StepGuard.of(trainer)
        if guard is None:
            raise ValueError("the incident recorder needs a StepGuard among the callbacks")
        guard.add_observer(self._observe)
        self._routers = routers_of(pl_module)

    def read_metrics(self, trainer: pl.Trainer, metrics: Mapping[str, float], *, step: int) -> None:
        """Keeps the last finite value of each metric that the rules for causes use."""
        for name in LOOKED_AT:
            value = metrics.get(name, math.nan)
            if math.isfinite(value):
                self.latest[name] = value

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the inputs of this batch's forward pass, which may change afterwards."""
        if self.incident is None or self.spike_step is None:
            cuda = torch.cuda.is_initialized()
            self._batches.append(
                {
                    "batch": batch,
                    "batch_idx": batch_idx,
                    "rng": torch.get_rng_state(),
                    "host_rng": host_states(),
                    "cuda_rng": torch.cuda.get_rng_state() if cuda else None,
                    "router_state": router_state(self._routers),
                }
            )

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Adds the step to the ring."""
        guard = StepGuard.of(trainer)
        assert guard is not None
        assert guard.loss is not None
        assert guard.grad_norm is not None
        loss, norm = torch.stack((guard.loss, guard.grad_norm)).tolist()
        self.ring.append(
            {"step": step, "loss": loss, "grad_norm": norm, **_router_means(self._routers)}
        )
        self._batches.clear()

    def _observe(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        finite: bool,
    ) -> None:
        step = trainer.global_step + 1
        if not finite and self.incident is None:
            self.incident = self._try_record(trainer, pl_module, optimizer, step, "non-finite")
        elif finite and self.spike_step is None and self._is_spike(_grad_norm(trainer)):
            self.spike_step = step
            self._try_record(trainer, pl_module, optimizer, step, "spike")

    def _try_record(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        step: int,
        kind: str,
    ) -> dict[str, Any] | None:
        """Records an incident; an error in the recorder is reported and never stops the run.

        With several processes, each reruns its own batches, and the first one that finds something
        saves the incident. All processes return it, or None if there is nothing to record.
        """
        found: Exception | tuple[Finding | None, dict[str, float]]
        try:
            found = self._rerun(trainer, task)
        except Exception as error:
            found = error
        has_finding = isinstance(found, tuple) and found[0] is not None
        writer = _first_rank_with_finding(trainer, has_finding)
        incident = None
        if trainer.global_rank == writer:
            try:
                if isinstance(found, Exception):
                    raise found
                incident = self._record(trainer, task, optimizer, step, kind, *found)
            except Exception as error:
                logger.exception("the incident could not be recorded")
                incident = _unrecorded(step, kind, error)
        if trainer.world_size > 1:
            incident = trainer.strategy.broadcast(incident, src=writer)
        if incident is None:
            return None
        lines = [incident["line"], *incident.pop("remarks", ())]
        if trainer.is_global_zero:
            for line in lines:
                self.say(line)
        return incident

    def _is_spike(self, norm: float) -> bool:
        norms = sorted(e["grad_norm"] for e in list(self.ring)[-SPIKE_WINDOW:])
        norms = [value for value in norms if math.isfinite(value)]
        if norm <= SPIKE_NORM or len(norms) < SPIKE_WINDOW // 2:
            return False
        return norm > SPIKE_RATIO * norms[len(norms) // 2]

    def _rerun(
        self, trainer: pl.Trainer, task: pl.LightningModule
    ) -> tuple[Finding | None, dict[str, float]]:
        """The finding of the step, and the router's statistics if its module is a router."""
        finding: Finding | None = None
        router: dict[str, float] = {}
        precision = trainer.precision_plugin.train_step_context
        with undisturbed(task):
            for entry in self._batches:
                loss_of = rerun_loss(task, entry, precision, accumulate=len(self._batches))
                finding = trace(task, loss_of, batch=entry["batch"])
                if finding is not None:
                    if finding.phase == "forward":
                        router = router_stats_at(task, finding.module)
                    break
        return finding, router

    def _record(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        step: int,
        kind: str,
        finding: Finding | None,
        router: dict[str, float],
    ) -> dict[str, Any] | None:
        if kind == "non-finite" and finding is None and _scales_loss(trainer):
            return None
        guard = StepGuard.of(trainer)
        assert guard is not None
        assert guard.loss is not None
        evidence = Evidence(
            finding=finding,
            loss_finite=bool(guard.loss.isfinite()),
            router=router,
            second_moment_finite=_second_moment_finite(optimizer),
            weight_absmax=weight_absmax(task),
            last=self.latest,
        )
        line = describe(finding, router, self._drift(task, finding))
        if kind == "spike":
            line = f"gradient norm {_grad_norm(trainer):.1f} is a large spike"
        incident: dict[str, Any] = {
            "step": step,
            "kind": kind,
            "module": finding.module if finding is not None else None,
            "cause": cause(evidence) if kind == "non-finite" else "spike",
            "line": f"step {step}: {line}",
            "finding": None if finding is None else asdict(finding),
            "figures": supporting_values(finding, router),
            "largest_gradients": _largest_gradients(task),
        }
        return {**incident, "remarks": self._save(trainer, task, incident)}

    def _save(
        self, trainer: pl.Trainer, task: pl.LightningModule, incident: dict[str, Any]
    ) -> list[str]:
        """Saves the incident; returns a line for each file that could not be saved.

        Errors are only reported, because the finding goes into the run's record in any case.
        """
        step, folder = incident["step"], self.folder / f"step-{incident['step']}"
        try:
            unsafe = self._write(trainer, task, incident, folder)
        except Exception as error:
            logger.exception("the incident could not be saved")
            return [
                f"step {step}: cannot be rerun later: its state could not be saved"
                f" ({type(error).__name__}: {error})"
            ]
        remarks = []
        if unsafe is not None:
            remarks = [
                f"step {step}: cannot be rerun later: its state holds a {unsafe}, and only tensors"
                " and plain values can be read back"
            ]
        repeat = None
        if unsafe is None:
            repeat = self.repeat.replace("{folder}", shlex.quote(str(folder)))
        try:
            write_page(folder / "incident.html", incident, list(self.ring), repeat=repeat)
        except Exception as error:
            logger.exception("the page of the incident could not be written")
            remarks.append(
                f"step {step}: the page could not be written ({type(error).__name__}: {error})"
            )
        return remarks

    def _drift(self, task: pl.LightningModule, finding: Finding | None) -> float | None:
        """Change of the mean bias per step of the finding's router, over the last steps."""
        if finding is None or len(self.ring) < 2:
            return None
        key = f"bias_mean/{finding.module}"
        series = [(e["step"], e[key]) for e in self.ring if key in e]
        if len(series) < 2:
            return None
        (first, start), (last, end) = series[max(0, len(series) - 32)], series[-1]
        return (end - start) / (last - first)

    def _write(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        incident: dict[str, Any],
        folder: Path,
    ) -> str | None:
        """Saves the incident and its state; returns the type that cannot be read back, if any."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json_safe(incident), indent=2, allow_nan=False)
        (folder / "incident.part").write_text(text + "\n", encoding="utf-8")
        (folder / "incident.part").rename(folder / "incident.json")
        state = {
            **self.extras,
            "incident": json_safe(incident),
            "state_dict": task.state_dict(),
            "batches": [{**e, "batch": with_plain_values(e["batch"])} for e in self._batches],
            "precision": str(trainer.precision_plugin.precision),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
            "device": trainer.strategy.root_device.type,
            # Values that a remedy may have set during the run.
            "router_values": {
                path: {
                    field: getattr(router, field) for field in OVERRIDABLE if hasattr(router, field)
                }
                for path, router in self._routers
            },
        }
        torch.save(state, folder / "state.part")
        unsafe = unreadable_type(folder / "state.part")
        (folder / "state.part").rename(folder / "state.pt")
        return unsafe

    def state_dict(self) -> dict[str, Any]:
        """What has been recorded, and the metrics of the last steps."""
        return {
            "incident": None if self.incident is None else json_safe(self.incident),
            "spike_step": self.spike_step,
            "ring": list(self.ring),
            "latest": dict(self.latest),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.incident, self.spike_step = state_dict["incident"], state_dict["spike_step"]
        self.ring = deque(state_dict["ring"], maxlen=RING)
        self.latest = dict(state_dict["latest"])


def _unrecorded(step: int, kind: str, error: Exception) -> dict[str, Any]:
    """An incident that could not be recorded."""
    line = f"step {step}: {kind}; it could not be recorded ({type(error).__name__}: {error})"
    return {"step": step, "kind": kind, "module": None, "cause": UNKNOWN, "line": line}


def _first_rank_with_finding(trainer: pl.Trainer, has_finding: bool) -> int:
    """The lowest rank with a finding; 0 if no rank has one."""
    if trainer.world_size == 1:
        return 0
    answers: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(answers, has_finding)
    return answers.index(True) if True in answers else 0


def _scales_loss(trainer: pl.Trainer) -> bool:
    """Whether a GradScaler scales the loss; it finds its factor by letting gradients overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _router_means(routers: Routers) -> dict[str, float]:
    """The mean bias of each router that has biases."""
    biases = {path: getattr(router, "bias_E", None) for path, router in routers}
    known = {path: bias.detach().mean() for path, bias in biases.items() if bias is not None}
    if not known:
        return {}
    values = torch.stack(tuple(known.values())).tolist()
    return {f"bias_mean/{path}": v for path, v in zip(known, values, strict=True)}


def _second_moment_finite(optimizer: torch.optim.Optimizer) -> bool:
    moments = [s["exp_avg_sq"] for s in optimizer.state.values() if "exp_avg_sq" in s]
    return all(bool(moment.isfinite().all()) for moment in moments)


def weight_absmax(task: nn.Module) -> float:
    """The largest finite absolute value of all weights; 0 if there is none."""
    sizes = [parameter.detach().abs() for parameter in task.parameters()]
    largest = [torch.where(size.isfinite(), size, 0.0).max() for size in sizes if size.numel()]
    return torch.stack(largest).max().item() if largest else 0.0


def _largest_gradients(task: nn.Module) -> dict[str, float | None]:
    """The five parameters with the largest gradient norms; non-finite norms come first."""
    norms = {n: p.grad.norm().item() for n, p in task.named_parameters() if p.grad is not None}
    ranked = sorted(norms, key=lambda n: norms[n] if math.isfinite(norms[n]) else math.inf)
    return {name: norms[name] for name in ranked[::-1][:5]}


def _grad_norm(trainer: pl.Trainer) -> float:
    """The gradient norm that the guard computed."""
    guard = StepGuard.of(trainer)
    assert guard is not None
    assert guard.grad_norm is not None
    return guard.grad_norm.item()
