"""Instruments, guard and recorder: Lightning callbacks for any LightningModule; see README.md here.

Instruments read and never change what they watch.
"""

from nonfinite.activations import ActivationWatch
from nonfinite.config import GuardConfig
from nonfinite.early_warning import EarlyWarning, Thresholds
from nonfinite.expose_router import expose_router
from nonfinite.gradients import GradientWatch
from nonfinite.guard import StepGuard
from nonfinite.recorder import IncidentRecorder
from nonfinite.routers import RouterWatch
from nonfinite.spikes import SpikeWatch
from nonfinite.tracer import Finding, trace

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
