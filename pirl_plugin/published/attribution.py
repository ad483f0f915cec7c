"""Which published numbers were made under which of our protocols: a table of statements, each read in its source.

It is conservative. A number is attributed only where its source says how it was made, in the terms of one of our
protocols, and for the methods for which it says so. All others stay without a protocol: to be shown apart, never
beside a measured number. Left out on purpose, for example:

* MoCo's 60.6 in the PIRL paper's Table 2: the same number stands in MoCo's README, made with MoCo's own classifier.
* What a table quotes from elsewhere (other architectures and setups), and rows that their own source makes doubtful.
* The rotation trunk in the PIRL paper's Table 1: the paper gives no learning rate for it.
* Average-pooled features under "PIRL's settings" (Barlow Twins, VICReg): neither ours nor the paper's pooling.
* Numbers of OpenMMLab's toolboxes: their recipes resemble several of ours and are none of them, but for the detection
  that OpenSelfSup itself calls MoCo's setup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

BEST = "best"  # of all layers: the published tables' habit

_PIRL = "PIRL paper (arXiv 1912.01991)"
_LAYERS = {name: {"layer": name} for name in ("conv1", "res2", "res3", "res4", "res5")}
_OF_THE_BEST = {"layer": BEST}
_NOT_STATED = {"layer": "not stated"}


@dataclass(frozen=True)
class Attribution:
    """One statement: these rows of the table were made under that protocol.

    Attributes:
        protocol: ours.
        source: of the rows; ``*`` stands for anything.
        settings: the rows' ``layer_or_setting``, and what that is in our records' ``setting``.
        methods: only these; None: all.
        without: but for these.
        trunk: only trunks whose name begins so.
    """

    protocol: str
    source: str
    settings: Mapping[str, Mapping[str, Any]]
    methods: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    trunk: str = ""

    def holds(self, method: str, trunk: str, setting: str, source: str) -> bool:
        """Whether it speaks of a row."""
        return (
            setting in self.settings
            and fnmatchcase(source, self.source)
            and (self.methods is None or method in self.methods)
            and method not in self.without
            and trunk.startswith(self.trunk)
        )


def _pirl_tables(protocol: str) -> tuple[Attribution, ...]:
    """The PIRL paper's own evaluations of the best layer: Tables 2, 4 and 5."""
    analysis = {
        "400 ep analysis setting N=4096; linear best layer": _OF_THE_BEST,
        "N=4096 lambda=0.5 (shared point of Figs 5,6,8)": _OF_THE_BEST,
        "N=4096 |T|=9! (end point of Fig 7)": _OF_THE_BEST,
    }
    table_2 = {"best layer; setup of Goyal19": _OF_THE_BEST}
    return (
        Attribution(protocol, f"{_PIRL} Table 2", table_2, without=("MoCo v1",)),
        Attribution(protocol, f"{_PIRL} Table 4", {"best layer": _OF_THE_BEST}, trunk="R50"),
        Attribution(protocol, f"{_PIRL} Table 5*", analysis),
    )


_LINEAR_PAPER = (
    *_pirl_tables("paper"),
    Attribution("paper", "PIRL paper Sec 3.2 / Fig 2", {"best layer": _OF_THE_BEST}),  # the wider trunk
    Attribution("paper", f"{_PIRL} Table 7", _LAYERS, without=("Kolesnikov19 (other setup)", "NPID (other setup)")),
)
_DETECTRON2 = {"engine": "detectron2", "rule": "eleven_point"}  # what all of them were measured with
_FIXED_0712 = {"Faster R-CNN R50-C4 BN fixed 25k its": _DETECTRON2}
_FIXED_07 = {"VOC07 trainval; R50-C4 BN fixed 12.5k its": _DETECTRON2}
_LR_003, _LR_02 = ("PIRL", "NPID++"), ("Supervised", "Jigsaw (Goyal19)")
_AVERAGED = {"layer": "res5"}
_FINE_TUNED = ("Random init", "NPID", "Jigsaw (Goyal19)", "NPID++", "PIRL")  # the others are quoted


def _semi_supervised(percent: str) -> tuple[Attribution, ...]:
    drawn = "finetune; random 1% (~13k)" if percent == "1%" else "finetune; random 10%"
    simclr: dict[str, dict[str, Any]] = {"SimCLR class-balanced split": {}, "finetune": {}}
    return (
        Attribution("paper", f"{_PIRL} Table 3", {drawn: {}}, methods=_FINE_TUNED),
        Attribution("simclr", "SimCLR paper Table 7", simclr, methods=("SimCLR",)),
        Attribution("simclr", "SimCLR paper appendix (top-1 semi-sup)", simclr, methods=("SimCLR",)),
        Attribution("swav", "Barlow Twins paper Table 2", {"finetune": {}}, methods=("SwAV",)),
        Attribution("barlow_twins", "Barlow Twins paper Table 2", {"finetune": {}}, methods=("Barlow Twins",)),
    )


# by the table's name of the benchmark
ATTRIBUTIONS: dict[str, tuple[Attribution, ...]] = {
    "ImageNet linear": (
        *_LINEAR_PAPER,
        # the model zoo's configuration trains all layers for 28 epochs; which one a number is of, it does not say
        Attribution(
            "vissl",
            "VISSL MODEL_ZOO.md row (* / RN*)",
            {
                "eval_*_8gpu_transfer_in1k_linear; layer not stated": _NOT_STATED,
                "eval_resnet_8gpu_transfer_in1k_linear (layer not stated)": _NOT_STATED,
            },
        ),
        Attribution(
            "moco", "VISSL MODEL_ZOO.md row (MoCoV2 / RN50*)", {"linear, moco style (lr 30 wd 0 100 ep)": _AVERAGED}
        ),
        Attribution(
            "moco",
            "MoCo README (github facebookresearch/moco)",
            {"avgpool": _AVERAGED, "mean of 5 pretrainings": _AVERAGED},
        ),
        Attribution("moco", "MoCo paper (arXiv 1911.05722)", {"avgpool": _AVERAGED}),
        Attribution(
            "swav",
            "VISSL projects/SwAV/README.md (= facebookresearch/swav README)",
            {
                "bs 4096 2x224 + 6x96": _AVERAGED,
                "bs 256 2x224 + 6x96": _AVERAGED,
                "bs 4096 2x224": _AVERAGED,
                "bs 4096 2x160 + 4x96": _AVERAGED,
            },
        ),
        Attribution(
            "swav", "SwAV paper text (arXiv 2006.09882)", {"avgpool": _AVERAGED}, methods=("SwAV", "DeepCluster-v2")
        ),
    ),
    "Places205 linear": _LINEAR_PAPER,
    "iNat18 linear": _LINEAR_PAPER,
    # the paper says that it follows Goyal et al., and no more
    "VOC07 SVM": (
        *_pirl_tables("goyal19"),
        Attribution("swav", "Barlow Twins paper Table 3", {"2048-d avgpool": _AVERAGED}),
        Attribution(
            "swav", "barlowtwins GitHub issue #32 (VISSL SVM rerun)", {"2048-d avgpool resize256+crop": _AVERAGED}
        ),
    ),
    "VOC07+12 detection": (
        Attribution("paper", f"{_PIRL} Table 1", _FIXED_0712, methods=_LR_003),
        Attribution("paper_supervised", f"{_PIRL} Table 1", _FIXED_0712, methods=_LR_02),
        Attribution("moco", "MoCo detection/README", {"R50-C4 BN tuned 24k its, mean of 5": _DETECTRON2}),
        Attribution("moco", "OpenSelfSup docs/MODEL_ZOO.md*", {"R50-C4 24k MoCo setup": _DETECTRON2}),
    ),
    "VOC07 detection": (
        Attribution("paper", f"{_PIRL} Table 6", _FIXED_07, methods=("PIRL",)),
        Attribution("paper_supervised", f"{_PIRL} Table 6", _FIXED_07, methods=_LR_02),
        Attribution("moco", "MoCo paper (arXiv 1911.05722)*", {"C4 BN tuned 9k its": _DETECTRON2}),
    ),
    "ImageNet semi-sup 1%": _semi_supervised("1%"),
    "ImageNet semi-sup 10%": _semi_supervised("10%"),
    "ImageNet kNN": (
        Attribution(
            "weighted_knn",
            "NPID paper (Wu18, CVPR text)",
            {"k=200 tau=0.07 128-d": {"k": 200, "temperature": 0.07, "features": "embedding"}},
        ),
    ),
}


@dataclass(frozen=True)
class Conflict:
    """Where sources differ about one number: shown below any table that has it.

    Attributes:
        benchmarks: names in the table of numbers.
        methods: that it is about.
        text: what differs.
    """

    benchmarks: tuple[str, ...]
    methods: tuple[str, ...]
    text: str


_LINEAR = ("ImageNet linear", "Places205 linear", "iNat18 linear")
CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        _LINEAR,
        ("Supervised",),
        "Supervised ResNet-50: ImageNet 75.9 (PIRL Table 2), 75.5 (its Table 7, res5), 75.45 (VISSL); Places205 51.5 "
        "and iNat18 45.4 (PIRL) against 53.2 and 46.7 (Barlow Twins, VICReg).",
    ),
    Conflict(
        ("ImageNet linear",),
        ("PIRL",),
        "PIRL at 200 epochs: 62.55 and 62.9 (two pages of VISSL), 61.7 (PyContrast); at 800: 63.6 (paper), 64.29 "
        "(VISSL).",
    ),
    Conflict(
        ("ImageNet linear",),
        ("NPID", "NPID (other setup)", "InstDis (NPID)"),
        "NPID's ResNet-50 has numbers from 42.5 (its own text) to 59.5 (PyContrast), depending on who trained and "
        "probed it.",
    ),
    Conflict(
        ("ImageNet linear",),
        ("Jigsaw", "Jigsaw (Goyal19)"),
        "Jigsaw in VISSL's model zoo: 100 permutations above 10K above 2K, against Goyal et al.'s trend; all files' "
        "names say 2K.",
    ),
    Conflict(
        ("ImageNet linear", "Places205 linear"),
        ("Rotation (Kolesnikov19 row [33])",),
        "The PIRL paper's row of [33] repeats NPID's 54.0 and 45.5; SimCLR prints 55.4 for it.",
    ),
    Conflict(
        ("VOC07+12 detection",),
        ("MoCo v1",),
        "MoCo v1 on VOC07+12: 55.2 / 81.4 / 61.2 (its first version, quoted by PIRL), 55.9 / 81.5 / 62.6 (its README).",
    ),
    Conflict(
        ("VOC07+12 detection", "VOC07 detection"),
        ("Supervised",),
        "Supervised detection differs with batch norm: VOC07+12 52.6 / 81.1 / 57.4 fixed, 53.5 / 81.3 / 58.8 tuned.",
    ),
    Conflict(
        ("ImageNet semi-sup 1%", "ImageNet semi-sup 10%"),
        ("Supervised baseline", "Supervised", "Random init"),
        "Baselines: 48.4 / 80.4 (SimCLR, supervised on the labelled part) and 22.0 / 59.0 (PIRL, random) are of other "
        "splits and tuning.",
    ),
    Conflict(
        ("ImageNet linear", "VOC07 SVM"),
        ("Barlow Twins",),
        "Barlow Twins: ImageNet 73.2 (paper), 71.80 (VISSL); VOC07 86.2 (paper), 86.83 (rerun of the same weights).",
    ),
    Conflict(
        ("ImageNet linear",),
        ("SimCLR", "SwAV"),
        "VISSL's model zoo: SimCLR at 1000 epochs (68.8) below 800 (69.68); SwAV w5 is given 300 epochs there, 400 by "
        "its README.",
    ),
)
