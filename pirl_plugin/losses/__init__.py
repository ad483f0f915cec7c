"""Losses, one file each; lightly's in one."""

from pirl_plugin.losses.cross_entropy import PretextCrossEntropy, SupervisedCrossEntropy
from pirl_plugin.losses.deepcluster_v2 import DeepClusterV2Loss
from pirl_plugin.losses.lightly_losses import BarlowTwinsLoss, BYOLLoss, NTXentLoss, SimSiamLoss, VICRegLoss
from pirl_plugin.losses.moco import MoCoLoss
from pirl_plugin.losses.pirl_nce import PIRLNCELoss
from pirl_plugin.losses.swav import SwAVLoss

__all__ = [
    "BYOLLoss",
    "BarlowTwinsLoss",
    "DeepClusterV2Loss",
    "MoCoLoss",
    "NTXentLoss",
    "PIRLNCELoss",
    "PretextCrossEntropy",
    "SimSiamLoss",
    "SupervisedCrossEntropy",
    "SwAVLoss",
    "VICRegLoss",
]
