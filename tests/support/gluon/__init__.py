"""Gluon kernels for Hopper on a CPU: the same source, the same answers, and their faults found."""

from support.gluon.launch import Stats, emulated, launch
from support.gluon.schedule import EmulationError

__all__ = ["EmulationError", "Stats", "emulated", "launch"]
