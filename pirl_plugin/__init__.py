"""PIRL and the standard self-supervised benchmark as named components of classy-vision's registries.

``import pirl_plugin`` registers every component of the package; see ``python tools/list.py`` for the names.
"""

import warnings

with (
    warnings.catch_warnings()
):  # classy-vision 0.7 imports torchvision and torch modules that have since been deprecated
    warnings.filterwarnings("ignore", message=".*_(functional|transforms)_video' module is deprecated.*")
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated.*")
    import classy_vision.tasks  # noqa: F401

from pirl_plugin import benchmarks, data, hooks, losses, memory, models, optim, sweep, tasks

__version__ = "0.1.0"
__all__ = ["benchmarks", "data", "hooks", "losses", "memory", "models", "optim", "sweep", "tasks"]
