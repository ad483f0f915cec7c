"""Reading weights safely, writing them whole, and knowing whose they are."""

from pirl_plugin.weights.files import (
    FORMATS,
    FoundTrunk,
    LoadReport,
    TrunkFormat,
    find_trunk,
    load_trunk,
    read_weights,
    sha256_of_file,
    training_config,
    trunk_config,
    trunk_state,
    write_atomically,
)

__all__ = [
    "FORMATS",
    "FoundTrunk",
    "LoadReport",
    "TrunkFormat",
    "find_trunk",
    "load_trunk",
    "read_weights",
    "sha256_of_file",
    "training_config",
    "trunk_config",
    "trunk_state",
    "write_atomically",
]
