"""Fine-tuning of the whole network on few labels; importing this registers ``semi_supervised``."""

from pirl_plugin.benchmarks.finetuning.semi_supervised import SemiSupervised

__all__ = ["SemiSupervised"]
