"""Instruments, guard and recorder: Lightning callbacks for any LightningModule; see README.md here.

Instruments read and never change what they watch.
"""

from src.training.guard import StepGuard
from src.training.recipe import GuardConfig
from src.watch.activations import ActivationWatch
from src.watch.early import EarlyWarning, Thresholds
from src.watch.exposed import expose_router
from src.watch.gradients import GradientWatch
from src.watch.incident import IncidentRecorder
from src.watch.router import RouterWatch
from src.watch.spikes import SpikeWatch
from src.watch.trace import Finding, trace

__all__ = [
    "ActivationWatch",
    "EarlyWarning",
    "Finding",
    "GradientWatch",
    "GuardConfig",
    "IncidentRecorder",
    "RouterWatch",
    "SpikeWatch",
    "StepGuard",
    "Thresholds",
    "expose_router",
    "trace",
]
