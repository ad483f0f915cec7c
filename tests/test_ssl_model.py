"""The model that joins a trunk and the heads of the views, and the normalisation in front of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from classy_vision.heads import ClassyHead
from classy_vision.models import ClassyModel
from torchvision.transforms import functional as TF

from pirl_plugin.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from pirl_plugin.models.ssl_model import SSLModel, main_embedding
from pirl_plugin.registry import build, check

TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
HEADS = {"image": {"name": "linear", "dim": 6}, "patches": {"name": "jigsaw", "dim": 6, "patch_dim": 5}}
CONFIG = {"name": "ssl_model", "trunk": TRUNK, "heads": HEADS}


def model(seed: int = 0) -> SSLModel:
    torch.manual_seed(seed)
    return build("model", CONFIG)


def batch(size: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=g),
        "patches": torch.randint(0, 256, (size, 9, 3, 12, 12), dtype=torch.uint8, generator=g),
    }


def test_normalize_is_torchvision_s():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    expected = TF.normalize(TF.to_tensor(pixels), list(IMAGENET_MEAN), list(IMAGENET_STD))
    found = Normalize()(torch.from_numpy(pixels).permute(2, 0, 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32


def test_normalize_leaves_floats_and_state_dicts_alone():
    x = torch.randn(2, 3, 4, 4)
    assert Normalize()(x) is x
    assert dict(Normalize().state_dict()) == {}
    with pytest.raises(TypeError, match="uint8"):
        Normalize()(torch.zeros(2, 3, 4, 4, dtype=torch.int64))
    channels_last = torch.zeros(2, 3, 4, 4, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert Normalize()(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_shapes_and_the_host_s_type():
    found = model()(batch())
    assert isinstance(model(), ClassyModel)
    assert {view: tuple(x.shape) for view, x in found.items()} == {"image": (3, 6), "patches": (3, 6)}


def test_patches_of_an_image_stay_together():
    """In evaluation mode the embedding of image i depends on its own patches alone, in their order."""
    net, views = model().eval(), batch()
    whole = net(views)["patches"]
    for i in range(3):
        features = torch.stack([net.trunk(net.normalize(views["patches"][i, p : p + 1]))[0] for p in range(9)])
        torch.testing.assert_close(whole[i], net.heads["patches"](features[None])[0], atol=1e-5, rtol=1e-4)


def test_crops_of_an_image_keep_their_dimension():
    """(B, V, 3, h, w) to (B, V, dim): in evaluation mode each crop by itself, in training one batch of B * V."""
    net = model()
    crops = batch()["patches"][:, :4]
    found = net({"image": crops})["image"]
    assert found.shape == (3, 4, 6)
    torch.testing.assert_close(found.flatten(0, 1), model()({"image": crops.flatten(0, 1)})["image"])
    net.eval()
    torch.testing.assert_close(net({"image": crops[:, 2]})["image"], net({"image": crops})["image"][:, 2])


def test_what_is_no_pixels_comes_back_as_it_is():
    views = {
        "rotation": torch.tensor([1, 0, 3]),
        "image": batch()["image"],
        "order": torch.zeros(3, 4, dtype=torch.int64),
    }
    found = model()(views)
    assert list(found) == ["rotation", "image", "order"]
    assert found["rotation"] is views["rotation"]
    assert found["order"] is views["order"]


def test_views_can_share_a_head():
    net = build("model", {**CONFIG, "shared_heads": {"crops": "image"}})
    net.eval()
    image = batch()["image"]
    found = net({"image": image, "crops": image.unsqueeze(1)})
    torch.testing.assert_close(found["crops"][:, 0], found["image"])
    assert set(net.get_classy_state()["model"]["heads"]) == {"image", "patches"}
    for shared in ({"crops": "imge"}, {"patches": "image"}):
        with pytest.raises(ValueError, match="must be a view without a head"):
            build("model", {**CONFIG, "shared_heads": shared})


class TwoEmbeddings(ClassyHead):
    def __init__(self, in_dim: int, unique_id: str) -> None:
        super().__init__(unique_id, 2)
        self.projection, self.prediction = torch.nn.Linear(in_dim, 2), torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        projection = self.projection(x)
        return {"": projection, "prediction": self.prediction(projection)}


def test_a_head_can_give_several_embeddings():
    net = model()
    net.heads["image"] = TwoEmbeddings(net.trunk.channels["res5"], "image")
    found = net.eval()({"image": batch()["image"]})
    assert list(found) == ["image", "image/prediction"]
    torch.testing.assert_close(net.heads["image"].prediction(found["image"]), found["image/prediction"])
    given = net.heads["image"](torch.ones(2, net.trunk.channels["res5"]))
    assert main_embedding(given) is given[""]
    assert main_embedding(given["prediction"]) is given["prediction"]


def test_batch_statistics_are_per_view():
    """The image embedding is the same whether the patches came along or not: they are no part of its batch."""
    views = batch()
    together, alone = model()(views)["image"], model()({"image": views["image"]})["image"]
    torch.testing.assert_close(together, alone)


def test_head_without_its_view_is_not_run_and_view_without_head_is_refused():
    assert list(model()({"patches": batch()["patches"]})) == ["patches"]
    with pytest.raises(ValueError, match="view 'patch' has no head. Heads: image, patches. Did you mean 'patches'?"):
        model()({"patch": batch()["patches"]})
    with pytest.raises(ValueError, match="must be"):
        model()({"image": torch.zeros(3, 32, 32)})
    with pytest.raises(ValueError, match="dict of views"):
        model()(batch()["image"])


def test_state_round_trip_and_layout():
    first, second = model(0), model(1)
    first(batch())  # moves the running statistics
    state = first.get_classy_state(deep_copy=True)
    assert list(state["model"]) == ["trunk", "heads"]
    assert "layer1.0.conv1.weight" in state["model"]["trunk"]
    assert set(state["model"]["heads"]) == {"image", "patches"}
    second.set_classy_state(state)
    views = batch()
    for view, found in second.eval()(views).items():
        torch.testing.assert_close(found, first.eval()(views)[view], atol=0, rtol=0)


def test_deep_copy_does_not_follow_the_model():
    net = model()
    copied, tied = net.get_classy_state(deep_copy=True), net.get_classy_state()
    with torch.no_grad():
        net.trunk.conv1.weight.zero_()
    assert tied["model"]["trunk"]["conv1.weight"].abs().max() == 0
    assert copied["model"]["trunk"]["conv1.weight"].abs().max() > 0


def test_states_that_do_not_fit_are_refused():
    state = model().get_classy_state()
    with pytest.raises(ValueError, match="not a model state"):
        model().set_classy_state({"trunk": {}})
    with pytest.raises(ValueError, match="the state has the heads \\['image'\\], the model \\['image', 'patches'\\]"):
        model().set_classy_state({"model": {"trunk": state["model"]["trunk"], "heads": {"image": {}}}})
    less = {key: value for key, value in state["model"]["trunk"].items() if key != "bn1.weight"}
    with pytest.raises(ValueError, match=r"model's trunk: [\s\S]*bn1.weight"):
        model().set_classy_state({"model": {**state["model"], "trunk": less}})


def test_configuration_is_checked_to_the_bottom():
    bad = {**CONFIG, "heads": {"image": {"name": "linaer"}, "patches": {"name": "jigsaw", "dims": 3}}}
    assert [problem.path for problem in check("model", bad)] == ["heads.image.name", "heads.patches.dims"]
    with pytest.raises(ValueError, match="at least one view"):
        SSLModel(trunk=TRUNK, heads={})


def test_every_parameter_gets_a_gradient():
    """DistributedDataParallel waits for all of them."""
    net = model()
    sum(x.square().sum() for x in net(batch()).values()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_channels_last_gives_the_same():
    net, views = model().eval(), batch()
    expected = net(views)
    fast = model().eval().to(memory_format=torch.channels_last)
    for view, x in fast(views).items():
        torch.testing.assert_close(x, expected[view], atol=1e-4, rtol=1e-3)


def test_running_statistics_of_chosen_views():
    """Images and patches in training leave the statistics that images alone leave; the embeddings are as ever."""
    extras: tuple[dict, ...] = ({}, {}, {"running_statistics_of": ["image"]})
    both, images_alone, chosen = (build("model", CONFIG | extra) for extra in extras)
    for net in (images_alone, chosen):
        net.load_state_dict(both.state_dict())
    views = batch(8)
    expected, found = both.train()(views), chosen.train()(views)
    images_alone.train()({"image": views["image"]})
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for name, statistic in images_alone.trunk.named_buffers():
        if "running" in name:
            assert torch.equal(chosen.trunk.get_buffer(name), statistic), name
            assert not torch.equal(both.trunk.get_buffer(name), statistic), name
    assert {layer.momentum for layer in chosen.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {0.1}


def test_running_statistics_of_no_view():
    with pytest.raises(ValueError, match=r"running_statistics_of: 'imgae' is no view.*image, patches"):
        build("model", CONFIG | {"running_statistics_of": ["imgae"]})
