"""What happens around a training step: one event, one hook."""

from pirl_plugin.hooks.checkpoint import RunCheckpointHook
from pirl_plugin.hooks.cluster_assignment import ClusterAssignmentHook
from pirl_plugin.hooks.health import HealthHook, RankMeHook
from pirl_plugin.hooks.memory_bank_update import MemoryBankUpdateHook
from pirl_plugin.hooks.metrics import MetricsJsonlHook
from pirl_plugin.hooks.momentum_update import MomentumUpdateHook
from pirl_plugin.hooks.progress import ProgressHook
from pirl_plugin.hooks.scalars import collect_scalars
from pirl_plugin.hooks.tensorboard import TensorboardScalarsHook
from pirl_plugin.hooks.unreadable import UnreadableImagesHook
from pirl_plugin.hooks.wandb import WandbScalarsHook

__all__ = [
    "ClusterAssignmentHook",
    "HealthHook",
    "MemoryBankUpdateHook",
    "MetricsJsonlHook",
    "MomentumUpdateHook",
    "ProgressHook",
    "RankMeHook",
    "RunCheckpointHook",
    "TensorboardScalarsHook",
    "UnreadableImagesHook",
    "WandbScalarsHook",
    "collect_scalars",
]
