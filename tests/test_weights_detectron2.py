"""A torchvision file that the converter wrote for detectron2, loaded by detectron2 itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from run_command import run

from pirl_plugin.commands.convert import main

pytest.importorskip("detectron2", reason="detectron2 is not installed")

RES4 = {"layer1": "res2", "layer2": "res3", "layer3": "res4"}


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A file as torchvision gives it, classifier and all; batch norms with statistics of their own."""
    generator = torch.Generator().manual_seed(0)
    model = torchvision.models.resnet50().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(model.state_dict(), path)
    return path, model


def detector() -> Any:
    """detectron2's Faster R-CNN R50-C4, random, with strides where torchvision has them."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.MASK_ON", False])
    return build_model(config).eval()


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_res4_and_res5_give_torchvisions_features(resnet50, tmp_path, suffix):
    from detectron2.checkpoint import DetectionCheckpointer

    path, theirs = resnet50
    out = tmp_path / f"d2{suffix}"
    assert run(main, [str(path), "--to", "detectron2", "--out", str(out)]).code == 0
    model = detector()
    DetectionCheckpointer(model).load(str(out))

    image = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for layer in RES4:
            x = getattr(theirs, layer)(x)
        ours = model.backbone(image)["res4"]
        assert x.abs().mean() > 0.01
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.roi_heads.res5(ours), theirs.layer4(x), rtol=1e-4, atol=1e-4)


def test_no_entry_of_the_trunk_is_left_over_on_either_side(resnet50, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    out = tmp_path / "d2.pth"
    assert run(main, [str(resnet50[0]), "--to", "detectron2", "--out", str(out)]).code == 0
    model = detector()
    checkpointer = DetectionCheckpointer(model)
    content = torch.load(out, weights_only=True)
    incompatible = checkpointer._load_model({**content, "model": dict(content["model"])})
    trunk = [key for key in incompatible.missing_keys if key.startswith(("backbone.", "roi_heads.res5."))]
    assert trunk == []
    # detectron2's frozen batch norm has no counters
    assert [key for key in incompatible.unexpected_keys if not key.endswith("num_batches_tracked")] == []
