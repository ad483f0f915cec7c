"""Trunks, heads and the model that joins them; importing this registers all of them."""

from pirl_plugin.models.heads import ClassifierHead, JigsawClassifierHead, JigsawHead, LinearHead, MLPHead
from pirl_plugin.models.lightly_heads import BarlowTwinsHead, BYOLHead, SimCLRHead, SimSiamHead
from pirl_plugin.models.momentum import MomentumSSLModel
from pirl_plugin.models.normalize import Normalize
from pirl_plugin.models.ssl_model import SSLModel
from pirl_plugin.models.trunks import LAYERS, ResNetTrunk, bfloat16_hazards

__all__ = [
    "LAYERS",
    "BYOLHead",
    "BarlowTwinsHead",
    "ClassifierHead",
    "JigsawClassifierHead",
    "JigsawHead",
    "LinearHead",
    "MLPHead",
    "MomentumSSLModel",
    "Normalize",
    "ResNetTrunk",
    "SSLModel",
    "SimCLRHead",
    "SimSiamHead",
    "bfloat16_hazards",
]
