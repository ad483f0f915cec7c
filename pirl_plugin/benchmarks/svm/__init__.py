"""Linear SVMs on frozen features; importing this registers ``voc07_svm`` and ``voc07_low_shot_svm``."""

from pirl_plugin.benchmarks.svm.voc07 import VOC07SVM
from pirl_plugin.benchmarks.svm.voc07_low_shot import VOC07LowShotSVM

__all__ = ["VOC07SVM", "VOC07LowShotSVM"]
