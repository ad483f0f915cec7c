"""Memory banks: one row for each image of the dataset, or a queue of recent ones."""

from pirl_plugin.memory.ema_bank import EMAMemoryBank
from pirl_plugin.memory.fifo_queue import FIFOQueue
from pirl_plugin.memory.sharded_bank import ShardedEMAMemoryBank

__all__ = ["EMAMemoryBank", "FIFOQueue", "ShardedEMAMemoryBank"]
