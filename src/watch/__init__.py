"""Instruments: Lightning callbacks that read and never change what they watch."""

from src.watch.activations import ActivationWatch
from src.watch.early import EarlyWarning
from src.watch.exposed import expose_router
from src.watch.gradients import GradientWatch
from src.watch.incident import IncidentRecorder
from src.watch.router import RouterWatch
from src.watch.spikes import SpikeWatch

__all__ = [
    "ActivationWatch",
    "EarlyWarning",
    "GradientWatch",
    "IncidentRecorder",
    "RouterWatch",
    "SpikeWatch",
    "expose_router",
]
