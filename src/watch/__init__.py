"""Instruments: Lightning callbacks that read and never change what they watch."""

from src.watch.incident import IncidentRecorder
from src.watch.router import RouterWatch
from src.watch.spikes import SpikeWatch

__all__ = ["IncidentRecorder", "RouterWatch", "SpikeWatch"]
