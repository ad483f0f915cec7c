"""Benchmarks of frozen weights; importing this registers them."""

from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.detection import DetectionVOC
from pirl_plugin.benchmarks.features import Features, LabelledFeatures, extract
from pirl_plugin.benchmarks.finetuning import SemiSupervised
from pirl_plugin.benchmarks.invariance import Invariance
from pirl_plugin.benchmarks.knn import KNN
from pirl_plugin.benchmarks.linear import Linear
from pirl_plugin.benchmarks.neighbours import Neighbours
from pirl_plugin.benchmarks.rankme import RankMe
from pirl_plugin.benchmarks.runner import run_benchmark
from pirl_plugin.benchmarks.svm import VOC07SVM, VOC07LowShotSVM
from pirl_plugin.benchmarks.top_k import top_k_accuracy

__all__ = [
    "KNN",
    "VOC07SVM",
    "Benchmark",
    "BenchmarkContext",
    "DetectionVOC",
    "Features",
    "Invariance",
    "LabelledFeatures",
    "Linear",
    "Neighbours",
    "RankMe",
    "Result",
    "SemiSupervised",
    "VOC07LowShotSVM",
    "extract",
    "run_benchmark",
    "top_k_accuracy",
]
