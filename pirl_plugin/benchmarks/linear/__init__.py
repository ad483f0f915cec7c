"""Linear classifiers on frozen features, layer by layer; importing this registers ``linear``."""

from pirl_plugin.benchmarks.linear.benchmark import Linear

__all__ = ["Linear"]
