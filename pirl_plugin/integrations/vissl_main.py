"""``python -m pirl_plugin.integrations.vissl_main config=...``: VISSL's trainer with our components registered."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pirl_plugin.integrations import vissl


def main(overrides: Sequence[str]) -> None:
    """Runs VISSL as its ``tools/run_distributed_engines.py`` does.

    Args:
        overrides: of VISSL's configuration, in Hydra's syntax: ``config=pretrain/pirl/my_pirl``, ...

    Raises:
        ImportError: VISSL is not there.
    """
    if not vissl.REGISTERED:
        raise ImportError("VISSL is not installed: see https://github.com/facebookresearch/vissl for how to.")
    configs = importlib.import_module("vissl.utils.hydra_config")
    launcher = importlib.import_module("vissl.utils.distributed_launcher")
    args, config = configs.convert_to_attrdict(configs.compose_hydra_configuration(list(overrides)))
    # the processes that are started import this package with the hook generator, and so have its components too
    launcher.launch_distributed(config, args.node_id, args.engine_name, vissl.hook_generator)


if __name__ == "__main__":
    main(sys.argv[1:])
