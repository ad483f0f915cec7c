"""Object detection on PASCAL VOC with a pretrained trunk; importing this registers ``detection_voc``."""

from pirl_plugin.benchmarks.detection.benchmark import DetectionVOC

__all__ = ["DetectionVOC"]
