"""Reading weights safely, writing them whole, and knowing whose they are."""

from pirl_plugin.weights.files import (
    LoadReport,
    load_trunk,
    read_weights,
    sha256_of_file,
    training_config,
    trunk_config,
    trunk_state,
    write_atomically,
)
from pirl_plugin.weights.finding import FoundTrunk, find_trunk
from pirl_plugin.weights.formats import FORMATS, NAMINGS, Naming, TrunkFormat
from pirl_plugin.weights.resnet_shape import infer_trunk

__all__ = [
    "FORMATS",
    "NAMINGS",
    "FoundTrunk",
    "LoadReport",
    "Naming",
    "TrunkFormat",
    "find_trunk",
    "infer_trunk",
    "load_trunk",
    "read_weights",
    "sha256_of_file",
    "training_config",
    "trunk_config",
    "trunk_state",
    "write_atomically",
]
