"""Every method at 32 pixels: it learns, all of it, and a run that goes on ends in the same bits.

A new ``method/X_32.yaml`` is tried by itself; what it needs to be small or calm is said in ``SETTINGS``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_method import assert_learns_and_resumes

from pirl_plugin.listing import methods

METHODS = {info.name: info.needs for info in methods() if info.name.endswith("_32") and info.name != "random_32"}
NARROW = ["heads.image.hidden_dim=32", "heads.image.dim=16"]
SETTINGS: dict[str, list[str]] = {
    "barlow_twins_32": NARROW,
    "byol_32": NARROW,
    "simsiam_32": NARROW,
    "vicreg_32": NARROW,
    "moco_v1_32": ["loss.memory_bank.size=20", "model.batch_norm_groups=2"],
    "moco_v2_32": ["loss.memory_bank.size=20", "model.batch_norm_groups=2"],
    "swav_32": ["loss.num_prototypes=8"],
    "deepcluster_v2_32": ["loss.num_clusters=[4,4]"],
    "jigsaw_32": ["transform.num_permutations=4", "heads.patches.patch_dim=16", "optimizer.lr=0.1"],
    "rotation_32": [
        "transform.rotations=all",
        "transform.image_scale=[1.0,1.0]",
        "transform.flip_probability=0.0",
        "optimizer.lr=0.05",
    ],
}
# losses that rise while a queue fills with real keys, or that are mostly noise with eight images: that they fall is
# tested in test_contrastive_methods.py
FALLS_ELSEWHERE = ("barlow_twins_32", "moco_v1_32", "moco_v2_32", "vicreg_32")


@pytest.mark.filterwarnings("ignore:num_negatives")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_goes_on_where_it_stopped(method: str, tmp_path: Path) -> None:
    if "lightly" in METHODS[method]:
        pytest.importorskip("lightly")
    assert_learns_and_resumes(method, SETTINGS.get(method, []), tmp_path, method not in FALLS_ELSEWHERE)
