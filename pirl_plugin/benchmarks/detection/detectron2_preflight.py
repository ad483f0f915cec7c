"""What usually goes wrong when weights are moved into detectron2, printed and verified before anything is trained.

The built detector is looked at, not the options that it was built from, and compared with the protocol and with the
trunk. Only attributes of modules are used: nothing here imports detectron2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.schedule import learning_rate
from pirl_plugin.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from pirl_plugin.weights.detectron2_names import to_detectron2

FEATURE_TOLERANCE = 1e-4  # of the largest feature where that is above 1

_COUNTER = ".num_batches_tracked"
_EXTRA_NORM = "roi_heads.res5.norm."
_TRUNK_PARTS = ("backbone.", "roi_heads.res5.")
_STAGES = ("stem", "res2", "res3", "res4", "res5")
_OURS = ("conv1", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what it should be, what it is, as texts for people."""

    what: str
    wanted: str
    found: str
    right: bool


def same(what: str, wanted: Any, found: Any) -> Check:
    """A check that two values are equal."""
    return Check(what, str(wanted), str(found), wanted == found)


def table(checks: Sequence[Check]) -> str:
    """One line a check."""
    width = max(len(check.what) for check in checks)
    return "\n".join(
        f"  {'ok   ' if check.right else 'WRONG'} {check.what:<{width}}  "
        + (check.found if check.right else f"{check.found}, not {check.wanted}")
        for check in checks
    )


def verify(checks: Sequence[Check]) -> None:
    """Raises if any check failed.

    Raises:
        ValueError: names everything that is wrong.
    """
    wrong = [f"{check.what} is {check.found}, not {check.wanted}" for check in checks if not check.right]
    if wrong:
        raise ValueError(f"detectron2's model is not what the protocol says: {'; '.join(wrong)}.")


# -- weights -----------------------------------------------------------------------------------------------------------


def load_trunk(detector: nn.Module, trunk: nn.Module) -> list[Check]:
    """Puts a trunk's weights into a detector with a C4 backbone, if every entry has its place and every place an entry.

    Batch norm's counters of batches may be without a place (frozen batch norm has none) or without an entry (files of
    before torch 0.4.1); the extra norm after res5 is new and has none.

    Returns:
        What matched and what was left over.

    Raises:
        ValueError: shapes that do not fit.
    """
    given = to_detectron2(trunk.state_dict(), "c4")
    places = {
        name: tuple(value.shape)
        for name, value in detector.state_dict().items()
        if name.startswith(_TRUNK_PARTS) and not name.startswith(_EXTRA_NORM)
    }
    shapes = [
        f"{name} {tuple(given[name].shape)} for {places[name]}"
        for name in places
        if name in given and tuple(given[name].shape) != places[name]
    ]
    if shapes:
        raise ValueError(f"the trunk does not fit detectron2's ResNet: {_some(shapes)}.")
    matched = [name for name in given if name in places]
    detector.load_state_dict({name: given[name] for name in matched}, strict=False)
    ours = [name for name in given if name not in places and not name.endswith(_COUNTER)]
    theirs = [name for name in places if name not in given and not name.endswith(_COUNTER)]
    needed = sum(not name.endswith(_COUNTER) for name in given)
    return [
        same("trunk entries matched", needed, sum(not name.endswith(_COUNTER) for name in matched)),
        same("left over of the trunk", "nothing", _some(ours)),
        same("left over of the detector", "nothing", _some(theirs)),
    ]


# -- the network -------------------------------------------------------------------------------------------------------


def network_checks(
    detector: Any, trunk: nn.Module, settings: DetectionProtocol, norm_class: str, num_classes: int
) -> list[Check]:
    """What the built detector is: input, strides, norms, frozen stages, head.

    Args:
        detector: detectron2's ``GeneralizedRCNN`` with a C4 backbone.
        trunk: the ``ResNetTrunk`` whose weights it has.
        settings: the protocol.
        norm_class: class of the norms that are not frozen with their stage.
        num_classes: without the background.
    """
    mean, std = ([round(255 * value, 3) for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    stages = _stages(detector)
    anchors = detector.proposal_generator.anchor_generator
    return [
        same("channel order", "RGB", detector.input_format),
        same("pixel mean", mean, _rounded(detector.pixel_mean)),
        same("pixel std", std, _rounded(detector.pixel_std)),
        same("kernels of strided convolutions in blocks", [1] if settings.stride_in_1x1 else [3], _strided(stages)),
        same("norms", _counted(_wanted_norms(trunk, settings, norm_class)), _counted(_norm_classes(stages))),
        same("epsilon of the norms", _epsilons([trunk]), _epsilons(stages.values())),
        same("frozen stages", " ".join(_STAGES[: settings.freeze_at]) or "none", " ".join(_frozen(stages)) or "none"),
        same("trained norms", settings.batch_norm != "frozen", _trains_norms(stages)),
        same("extra norm after res5", settings.extra_norm, hasattr(detector.roi_heads.res5, "norm")),
        same("anchors at a position", _anchors(settings), list(anchors.num_anchors)),
        same("classes with background", num_classes + 1, detector.roi_heads.box_predictor.cls_score.out_features),
    ]


def feature_checks(detector: Any, trunk: Any, seen: Tensor, image: Tensor) -> list[Check]:
    """Whether both networks, each with its own preparation of the image, have the same res4 and res5 features.

    Args:
        detector: detectron2's; its mode is kept.
        trunk: ours, in evaluation mode, on the same device.
        seen: the image as detectron2's loader gives it, ``(3, H, W)``, channels in its order, 0..255.
        image: the same image, RGB, uint8 ``(3, H, W)``, prepared without detectron2.
    """
    mode = detector.training
    detector.eval()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        batch = detector.preprocess_image([{"image": seen}])
        res4 = detector.backbone(batch.tensor)["res4"]
        res5 = nn.Sequential(*(child for name, child in detector.roi_heads.res5.named_children() if name != "norm"))
        device = batch.tensor.device
        ours = trunk.features(Normalize().to(device)(image[None].to(device)), ("res4", "res5"))
        checks = [_close("res4", ours["res4"], res4), _close("res5", ours["res5"], res5(res4))]
    detector.train(mode)
    return checks


def _close(name: str, ours: Tensor, theirs: Tensor) -> Check:
    if ours.shape != theirs.shape:
        return Check(f"{name} features", str(tuple(ours.shape)), str(tuple(theirs.shape)), False)
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    bound = FEATURE_TOLERANCE * max(1.0, largest)
    found = f"the trunk's to {difference:.1e} (largest feature {largest:.3g})"
    return Check(f"{name} features", f"at most {bound:.1e} from the trunk's", found, difference <= bound)


def _stages(detector: Any) -> dict[str, nn.Module]:
    found = {name: getattr(detector.backbone, name) for name in _STAGES[:-1]}
    return {**found, "res5": detector.roi_heads.res5}


def _norms(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if hasattr(child, "running_mean"):
            yield child


def _norm_classes(stages: Mapping[str, nn.Module]) -> Counter[str]:
    return Counter(type(norm).__name__ for stage in stages.values() for norm in _norms(stage))


def _wanted_norms(trunk: nn.Module, settings: DetectionProtocol, norm_class: str) -> Counter[str]:
    """Counted in the trunk: those of frozen stages are frozen with them."""
    wanted: Counter[str] = Counter()
    for index, name in enumerate(_OURS):
        count = 1 if index == 0 else sum(1 for _ in _norms(getattr(trunk, name)))
        wanted["FrozenBatchNorm2d" if index < settings.freeze_at else norm_class] += count
    wanted[norm_class] += settings.extra_norm
    return wanted


def _counted(classes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(classes.items()) if count)


def _epsilons(modules: Iterable[nn.Module]) -> list[float]:
    return sorted({norm.eps for module in modules for norm in _norms(module)})


def _frozen(stages: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, stage in stages.items() if not any(p.requires_grad for p in stage.parameters())]


def _trains_norms(stages: Mapping[str, nn.Module]) -> bool:
    return any(p.requires_grad for stage in stages.values() for norm in _norms(stage) for p in norm.parameters())


def _strided(stages: Mapping[str, nn.Module]) -> list[int]:
    """Kernels of the convolutions with a stride in res3 to res5, shortcuts left out."""
    return sorted(
        {
            module.kernel_size[0]
            for stage in ("res3", "res4", "res5")
            for name, module in stages[stage].named_modules()
            if isinstance(module, nn.Conv2d) and "shortcut" not in name and module.stride[0] > 1
        }
    )


def _anchors(settings: DetectionProtocol) -> list[int]:
    return [len(settings.anchor_sizes) * len(settings.anchor_ratios)]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]


# -- training ----------------------------------------------------------------------------------------------------------


def training_checks(
    detector: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate_at: Callable[[int], float],
    settings: DetectionProtocol,
    batch_size: int,
) -> list[Check]:
    """What is optimised and how, and the learning rate of every kind of iteration.

    Args:
        detector: what is trained.
        optimizer: of it.
        rate_at: learning rate that detectron2 will use at an iteration.
        settings: the protocol.
        batch_size: images of a step over all processes.
    """
    trained = {id(p) for p in detector.parameters() if p.requires_grad}
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    norms = {id(p) for norm in _norms(detector) for p in norm.parameters() if p.requires_grad}
    decays = {
        (id(p) in norms, group["weight_decay"], group["momentum"], group["nesterov"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    wanted = {(False, settings.weight_decay, settings.momentum, False)}
    wanted |= {(True, settings.weight_decay_norm, settings.momentum, False)} if norms else set()
    checks = [
        same("parameters that are optimised", len(trained), len(optimised & trained)),
        same("(norm?, weight decay, momentum, Nesterov)", sorted(wanted), sorted(decays)),
        same("images of a step", settings.batch_size, batch_size),
    ]
    end = settings.warmup_iterations
    places = {
        f"learning rate at the start, of {end} iterations of warm-up by {settings.warmup_factor:.4g}": [0],
        "learning rate in and after the warm-up": [1, end // 2, end - 1, end, end + 1],
        f"learning rate at the drops {', '.join(map(str, settings.drops)) or '(none)'}": [
            at + step for at in settings.drops for step in (-1, 0, 1)
        ],
        f"learning rate up to the end, iteration {settings.iterations}": [
            *range(0, settings.iterations, max(1, settings.iterations // 200)),
            settings.iterations - 1,
        ],
    }
    return checks + [_rates(what, at, rate_at, settings) for what, at in places.items()]


def _rates(what: str, iterations: Sequence[int], rate_at: Callable[[int], float], settings: DetectionProtocol) -> Check:
    inside = sorted({at for at in iterations if 0 <= at < settings.iterations})
    wrong = [at for at in inside if abs(rate_at(at) - learning_rate(settings, at)) > 1e-6 * settings.lr]
    shown = wrong[:3] or inside[:1] + inside[-1:]
    wanted = ", ".join(f"{learning_rate(settings, at):.6g} at {at}" for at in dict.fromkeys(shown))
    found = ", ".join(f"{rate_at(at):.6g} at {at}" for at in dict.fromkeys(shown))
    return Check(what, wanted or "none", found or "none", not wrong)


def _some(names: Iterable[str], count: int = 4) -> str:
    listed = list(names)
    if not listed:
        return "nothing"
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")
