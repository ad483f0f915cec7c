"""Memory banks: one row for each image of the dataset, or a queue of recent ones."""

from pirl_plugin.memory.ema_bank import EMAMemoryBank

__all__ = ["EMAMemoryBank"]
