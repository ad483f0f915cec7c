"""Sweeps: a plan of runs, where they are made, and what became of them. Importing this registers the launchers."""

from pirl_plugin.sweep.jobs import Job, perform
from pirl_plugin.sweep.launchers import InlineLauncher, Launcher, LocalLauncher, TorchrunLauncher
from pirl_plugin.sweep.plan import Run, plan
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.settings import Sweep
from pirl_plugin.sweep.submitit_launcher import SubmititLauncher

__all__ = [
    "Execution",
    "InlineLauncher",
    "Job",
    "Launcher",
    "LocalLauncher",
    "Run",
    "SubmititLauncher",
    "Sweep",
    "TorchrunLauncher",
    "perform",
    "plan",
]
