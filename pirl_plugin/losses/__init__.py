"""Losses, one file each; lightly's in one."""

from pirl_plugin.losses.cross_entropy import PretextCrossEntropy, SupervisedCrossEntropy
from pirl_plugin.losses.lightly_losses import BarlowTwinsLoss, BYOLLoss, NTXentLoss, SimSiamLoss, VICRegLoss
from pirl_plugin.losses.moco import MoCoLoss
from pirl_plugin.losses.pirl_nce import PIRLNCELoss

__all__ = [
    "BYOLLoss",
    "BarlowTwinsLoss",
    "MoCoLoss",
    "NTXentLoss",
    "PIRLNCELoss",
    "PretextCrossEntropy",
    "SimSiamLoss",
    "SupervisedCrossEntropy",
    "VICRegLoss",
]
