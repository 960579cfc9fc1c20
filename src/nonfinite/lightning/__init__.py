"""Guard, recorder and instruments as Lightning callbacks; see README.md in the folder above.

Instruments read and never change what they watch.
"""

from nonfinite.config import GuardConfig
from nonfinite.lightning.activations import ActivationWatch
from nonfinite.lightning.early_warning import EarlyWarning, Thresholds
from nonfinite.lightning.gradients import GradientWatch
from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.nonfinite_callback import Nonfinite
from nonfinite.lightning.recorder import IncidentRecorder
from nonfinite.lightning.routers import RouterWatch
from nonfinite.lightning.spikes import SpikeWatch

__all__ = [
    "ActivationWatch",
    "EarlyWarning",
    "GradientWatch",
    "GuardConfig",
    "IncidentRecorder",
    "Nonfinite",
    "RouterWatch",
    "SpikeWatch",
    "StepGuard",
    "Thresholds",
]
