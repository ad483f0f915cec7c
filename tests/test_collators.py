from __future__ import annotations

import pytest
import torch

from pirl_plugin.registry import build


def sample(image_id: int, patch_size: int = 10, **more: torch.Tensor):
    image = torch.full((3, 32, 32), image_id, dtype=torch.uint8)
    patches = torch.full((9, 3, patch_size, patch_size), image_id, dtype=torch.uint8)
    return {"image": image, "patches": patches, **more}, image_id


@pytest.fixture(params=["jigsaw_collator", "view_collator"])
def collator(request):
    return build("collator", {"name": request.param})


def test_batch_first_and_ids_in_order(collator):
    batch = collator([sample(7), sample(3), sample(7)])
    assert set(batch) == {"input", "target"}
    assert batch["target"].tolist() == [7, 3, 7]
    assert batch["target"].dtype == torch.int64
    shapes = {name: tuple(view.shape) for name, view in batch["input"].items()}
    assert shapes == {"image": (3, 3, 32, 32), "patches": (3, 9, 3, 10, 10)}
    for view in batch["input"].values():
        assert view.dtype == torch.uint8
        assert view.flatten(1)[:, 0].tolist() == [7, 3, 7]


def test_large_ids_survive(collator):
    views, _ = sample(0)
    assert collator([(views, 2**40)])["target"].item() == 2**40


def test_empty_batch_is_refused(collator):
    with pytest.raises(ValueError, match="at least one sample, got none"):
        collator([])


def test_missing_view_is_refused(collator):
    broken = ({"image": sample(5)[0]["image"]}, 5)
    with pytest.raises(ValueError, match=r"Image 5 has no view 'patches' \(its views: image\)"):
        collator([sample(3), broken])


def test_differing_sizes_are_refused(collator):
    with pytest.raises(ValueError, match=r"'patches' must have one shape.* 10\) for image 3.* 12\) for image 4"):
        collator([sample(3), sample(4, patch_size=12)])


def test_jigsaw_collator_checks_rank_and_channels():
    collator = build("collator", {"name": "jigsaw_collator"})
    views, image_id = sample(1)
    with pytest.raises(ValueError, match=r"'patches' must have the shape \(P, 3, h, w\), got \(3, 10, 10\)"):
        collator([({**views, "patches": views["patches"][0]}, image_id)])
    with pytest.raises(ValueError, match=r"'image' must have the shape \(3, H, W\), got \(1, 32, 32\)"):
        collator([({**views, "image": views["image"][:1]}, image_id)])


def test_jigsaw_collator_leaves_other_views_out_and_view_collator_keeps_them():
    more = {"rotation": torch.tensor(2)}
    samples = [sample(1, **more), sample(2, **more)]
    assert set(build("collator", {"name": "jigsaw_collator"})(samples)["input"]) == {"image", "patches"}
    kept = build("collator", {"name": "view_collator"})(samples)["input"]
    assert list(kept) == ["image", "patches", "rotation"]
    assert kept["rotation"].tolist() == [2, 2]


def test_view_collator_takes_a_single_view():
    collator = build("collator", {"name": "view_collator"})
    assert set(collator([({"image": sample(1)[0]["image"]}, 1)])["input"]) == {"image"}


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="unknown key"):
        build("collator", {"name": "jigsaw_collator", "patch_size": 3})
