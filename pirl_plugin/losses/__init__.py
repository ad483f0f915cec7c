"""Losses, one file each."""

from pirl_plugin.losses.pirl_nce import PIRLNCELoss

__all__ = ["PIRLNCELoss"]
