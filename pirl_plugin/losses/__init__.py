"""Losses, one file each."""

from pirl_plugin.losses.cross_entropy import PretextCrossEntropy, SupervisedCrossEntropy
from pirl_plugin.losses.pirl_nce import PIRLNCELoss

__all__ = ["PIRLNCELoss", "PretextCrossEntropy", "SupervisedCrossEntropy"]
