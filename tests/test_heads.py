"""Heads against their equations written out."""

from __future__ import annotations

import pytest
import torch
from classy_vision.heads import ClassyHead, build_head

from pirl_plugin.models.heads import ClassifierHead, JigsawClassifierHead, JigsawHead, LinearHead, MLPHead
from pirl_plugin.registry import build, check
from pirl_plugin.schema import ConfigError


def test_classy_vision_builds_them_by_name():
    head = build_head({"name": "linear", "unique_id": "image", "in_dim": 512})
    assert isinstance(head, LinearHead)
    assert isinstance(head, ClassyHead)
    assert head.unique_id == "image"
    assert head(torch.randn(2, 512)).shape == (2, 128)
    assert build_head({"name": "jigsaw", "unique_id": "patches", "in_dim": 8}).num_patches == 9


def test_linear_is_one_affine_map():
    head = LinearHead(in_dim=3, dim=2)
    x = torch.randn(5, 3)
    torch.testing.assert_close(head(x), x @ head.linear.weight.T + head.linear.bias)
    assert LinearHead(in_dim=3, bias=False).linear.bias is None


def test_mlp_layers():
    head = MLPHead(in_dim=6, dim=2)
    x = torch.randn(5, 6)
    first, last = head.mlp[0], head.mlp[-1]
    assert first.out_features == 6
    torch.testing.assert_close(head(x), last(first(x).clamp(min=0)))
    with_norm = MLPHead(in_dim=6, hidden_dim=7, dim=2, batch_norm=True)
    assert [type(layer).__name__ for layer in with_norm.mlp] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert with_norm.mlp[0].out_features == 7


def test_leading_dimensions_stay_and_make_up_the_batch():
    """(B, V, C): batch statistics are over all crops of all images."""
    x = torch.randn(4, 3, 6)
    for head in (LinearHead(6, 2), MLPHead(6, 5, 2), MLPHead(6, 5, 2, batch_norm=True), ClassifierHead(6, 2)):
        assert head(x).shape == (4, 3, 2)
        torch.testing.assert_close(head(x).flatten(0, 1), head(x.flatten(0, 1)))


def test_jigsaw_head_with_hidden_layers():
    """VISSL's resnet50_mlphead: a ReLU after both layers of a patch, none after the joint one."""
    head = JigsawHead(in_dim=4, num_patches=3, patch_dim=2, dim=5, hidden_dim=7)
    x = torch.randn(6, 3, 4)
    first, last = head.patch[0], head.patch[2]
    patches = [last(first(x[:, i]).clamp(min=0)).clamp(min=0) for i in range(3)]
    torch.testing.assert_close(head(x), head.joint(torch.cat(patches, dim=1)))
    assert (head(x) < 0).any()
    assert first.out_features == 7
    assert sum(p.numel() for p in head.parameters()) == (4 + 1) * 7 + (7 + 1) * 2 + (6 + 1) * 5


def test_jigsaw_classifier_written_out():
    """Linear, batch norm over all patches of the batch, ReLU, concatenation, linear."""
    head = JigsawClassifierHead(in_dim=4, num_permutations=5, num_patches=3, patch_dim=2)
    x = torch.randn(6, 3, 4)
    linear = (x.double() @ head.patch[0].weight.double().T + head.patch[0].bias.double()).flatten(0, 1)
    normed = (linear - linear.mean(dim=0)) / (linear.var(dim=0, unbiased=False) + 1e-5).sqrt()
    rows = normed.clamp(min=0).reshape(6, 6)  # patch 0's two numbers, then patch 1's
    expected = rows @ head.joint.weight.double().T + head.joint.bias.double()
    torch.testing.assert_close(head(x), expected.float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'jigsaw_classifier' wants \(B, 3 patches, 4 channels\)"):
        head(torch.randn(6, 4, 4))


def test_jigsaw_classifier_is_the_released_size():
    """2048 -> 1000 with batch norm, 9000 -> 2000 (VISSL, jigsaw_8gpu_resnet)."""
    head = JigsawClassifierHead(in_dim=2048)
    assert sum(p.numel() for p in head.parameters()) == 2049 * 1000 + 2 * 1000 + 9001 * 2000


def test_jigsaw_head_written_out():
    head = JigsawHead(in_dim=4, num_patches=3, patch_dim=2, dim=5)
    x = torch.randn(6, 3, 4)
    patches = [x[:, i] @ head.patch.weight.T + head.patch.bias for i in range(3)]
    expected = torch.cat(patches, dim=1) @ head.joint.weight.T + head.joint.bias
    torch.testing.assert_close(head(x), expected)


def test_jigsaw_head_sees_the_order_of_the_patches_and_is_affine():
    head = JigsawHead(in_dim=4, num_patches=9)
    x, y = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    assert not torch.allclose(head(x), head(x.flip(1)))
    torch.testing.assert_close(head(x) + head(y) - head(torch.zeros_like(x)), head(x + y), atol=1e-5, rtol=1e-4)


def test_number_of_parameters_is_the_paper_s():
    """2048 -> 128 shared, 1152 -> 128 (PIRL, Sec. 3.1), with biases."""
    count = sum(p.numel() for p in JigsawHead(in_dim=2048).parameters())
    assert count == (2048 + 1) * 128 + (1152 + 1) * 128


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 4), (2, 9, 5)])
def test_wrong_patches_are_refused(shape):
    with pytest.raises(ValueError, match=r"jigsaw head 'patches' wants \(B, 9 patches, 4 channels\)"):
        JigsawHead(in_dim=4, unique_id="patches")(torch.randn(shape))


def test_in_dim_need_not_be_configured_and_bad_values_are_refused():
    assert check("head", {"name": "jigsaw", "dim": 64}) == []
    assert build("head", {"name": "mlp", "hidden_dim": None}, in_dim=10, unique_id="image").mlp[0].out_features == 10
    with pytest.raises(ConfigError, match="dim"):
        LinearHead(in_dim=4, dim=0)
