"""Detection with detectron2, the engine of record: the only file that imports it.

Its parts, put together as its ``DefaultTrainer`` does: configuration, data loaders, model, optimiser, schedule, hooks.
Ours are the box head for any depth, how an image is read, and what is checked before the training starts.
"""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException

from pirl_plugin.benchmarks.context import BenchmarkContext, progress_bar
from pirl_plugin.benchmarks.detection import detectron2_preflight as preflight
from pirl_plugin.benchmarks.detection.detectron2_config import NORM_CLASSES, norm_name, norm_note, options, trunk_shape
from pirl_plugin.benchmarks.detection.detectron2_job import (
    Batch,
    Batches,
    Found,
    Job,
    as_detections,
    check_processes,
    folder_of,
    last_line,
    log_in_process,
)
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.torchvision_engine import identity
from pirl_plugin.benchmarks.detection.voc import Examples

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing detectron2 makes today's torch warn of torch.jit
        import detectron2
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import CfgNode, get_cfg
        from detectron2.data import (
            DatasetCatalog,
            MetadataCatalog,
            build_detection_test_loader,
            build_detection_train_loader,
        )
        from detectron2.data import transforms as T
        from detectron2.data.detection_utils import (
            annotations_to_instances,
            filter_empty_instances,
            transform_instance_annotations,
        )
        from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model, hooks, launch
        from detectron2.layers import get_norm
        from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
        from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
        from detectron2.modeling.roi_heads import Res5ROIHeads
        from detectron2.solver import build_lr_scheduler, build_optimizer
        from detectron2.structures import BoxMode
        from detectron2.utils import comm
        from detectron2.utils.env import seed_all_rng
        from detectron2.utils.events import JSONWriter
except ImportError as error:
    raise ImportError(
        f"engine=detectron2 needs detectron2, which cannot be imported ({error}); it is on no package index: follow "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html, or use engine=torchvision."
    ) from error

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 60.0
_MESSAGES = 20  # of a whole training


def train_and_detect(
    trunk: nn.Module,
    trunk_config: Mapping[str, Any],
    train: Examples,
    test: Examples,
    settings: DetectionProtocol,
    context: BenchmarkContext,
    num_gpus: int = 1,
) -> tuple[list[Detections | None], dict[str, Any]]:
    """Trains detectron2's Faster R-CNN C4 and detects; see ``engine.TrainAndDetect``.

    The training is checkpointed into ``context.run_dir`` about once a minute and at its end, and goes on from there
    when the same is asked for again (with another order of the images than without the interruption). In float32.

    Args:
        trunk: see ``engine.TrainAndDetect``.
        trunk_config: of it.
        train: to train on.
        test: to detect in.
        settings: the protocol.
        context: for device, workers, seed and folder.
        num_gpus: processes, one on each GPU (without any GPU: on the CPU), started by detectron2's own launcher.

    Raises:
        ValueError: a trunk that detectron2's ResNet cannot be, no training image with an object, a batch that cannot be
            divided, fewer GPUs than asked for, a failed check before the training, or whatever failed in a process.
    """
    trunk_shape(trunk_config)
    if not train.with_objects():
        raise ValueError(f"none of the {len(train)} training images has an object to learn from.")
    check_processes(num_gpus, settings, context.device)
    with folder_of(context, identity(trunk, train, settings, context.seed)) as folder:
        job = Job(
            trunk=trunk,
            trunk_config=dict(trunk_config),
            train=train,
            test=test,
            settings=settings,
            device=str(context.device),
            processes=num_gpus,
            num_workers=context.num_workers,
            seed=context.seed,
            folder=folder,
            log_file=context.run_dir / "log.txt" if context.run_dir is not None else None,
            progress=context.progress,
        )
        found, notes = run_in_processes(job) if num_gpus > 1 else run(job)
    return as_detections(found), notes


def run(job: Job) -> tuple[Found, dict[str, Any]]:
    """What each process does: build, check, train, detect. The first one gets all detections, the others an empty list.

    Raises:
        ValueError: a failed check.
    """
    seed_all_rng(job.seed + comm.get_rank())
    norm = norm_name(job.settings, job.device, job.processes)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # what detectron2 asks torch, both warn of
    with registered(job) as names, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(torch.meshgrid|broadcast_buffers)")
        cfg = configuration(job, norm, names)
        detector = build_model(cfg)
        training = Training(cfg, detector, job)
        checks = training.preflight(norm)
        log.info("Before the training:\n%s", preflight.table(checks))
        preflight.verify(checks)
        training.run()
        found = detect(cfg, detector, job)
    notes = {
        "detectron2": detectron2.__version__,
        "processes": job.processes,
        "preflight": {check.what: check.found for check in checks},
        **training.notes(),
    }
    note = norm_note(norm)
    return found, {**notes, "norm": note} if note else notes


def run_in_processes(job: Job) -> tuple[Found, dict[str, Any]]:
    """``run`` in as many processes as the job says, started by detectron2's launcher.

    Raises:
        ValueError: one of them failed; with its reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        job = replace(job, trunk=copy.deepcopy(job.trunk).cpu(), progress=progress_bar)  # what can be sent
        try:
            launch(process, job.processes, dist_url="auto", args=(job, result))
        except ProcessException as error:
            raise ValueError(f"a process of detectron2 failed: {last_line(error)}") from error
        found, notes = torch.load(result, weights_only=True)
    return found, notes


def process(job: Job, result: Path) -> None:
    """One of several processes; the first one writes what was found to the file ``result``."""
    if comm.is_main_process():
        log_in_process(job.log_file)
    outcome = run(job)
    if comm.is_main_process():
        torch.save(outcome, result)


def configuration(job: Job, norm: str, names: tuple[str, str]) -> CfgNode:
    """detectron2's configuration: its defaults, and every option of the protocol.

    Args:
        job: what to do.
        norm: detectron2's name of it.
        names: of the registered training and test images.
    """
    cfg = get_cfg()
    chosen = options(job.settings, job.trunk_config, len(job.train.class_names), norm)
    chosen |= {
        "MODEL.DEVICE": "cuda" if job.processes > 1 and job.device != "cpu" else job.device,
        "DATASETS.TRAIN": (names[0],),
        "DATASETS.TEST": (names[1],),
        "DATALOADER.NUM_WORKERS": job.num_workers,
        "OUTPUT_DIR": str(job.folder),
        "SEED": job.seed,
    }
    cfg.merge_from_list(list(itertools.chain.from_iterable(chosen.items())))
    return cfg


# -- the network -------------------------------------------------------------------------------------------------------


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsAnyDepth(Res5ROIHeads):
    """detectron2's box head of a C4 detector, whose res5 is of basic blocks where the trunk's is (depth 18 and 34)."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """As detectron2's, with another res5."""
        parts = super().from_config(cfg, input_shape)
        resnets = cfg.MODEL.RESNETS
        if resnets.DEPTH < 50:
            blocks, channels = {18: 2, 34: 3}[resnets.DEPTH], 8 * resnets.RES2_OUT_CHANNELS
            parts["res5"] = nn.Sequential(
                *ResNet.make_stage(
                    BasicBlock,
                    blocks,
                    stride_per_block=[2] + [1] * (blocks - 1),
                    in_channels=channels // 2,
                    out_channels=channels,
                    norm=resnets.NORM,
                )
            )
        return parts


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeadsAnyDepth):
    """With one more norm after res5 (He et al. 2020, MoCo), which starts as the identity."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """As its base's, with the norm at the end of res5."""
        parts = super().from_config(cfg, input_shape)
        parts["res5"].add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS))
        return parts


# -- images ------------------------------------------------------------------------------------------------------------


@contextmanager
def registered(job: Job) -> Iterator[tuple[str, str]]:
    """Puts the training and the test images into detectron2's catalogues for a while, under names of their own."""
    names = []
    for part, examples in (("train", job.train), ("test", job.test)):
        name = f"pirl_plugin_{part}_{uuid.uuid4().hex}"
        DatasetCatalog.register(name, lambda examples=examples: records(examples))
        MetadataCatalog.get(name).set(thing_classes=examples.class_names)
        names.append(name)
    try:
        yield names[0], names[1]
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def records(examples: Examples) -> list[dict[str, Any]]:
    """The images in detectron2's format, difficult objects like any other; width and height come when they are read."""
    return [
        {"file_name": example.name, "image_id": index, "annotations": objects_of(examples, index)}
        for index, example in enumerate(examples)
    ]


def objects_of(examples: Examples, index: int) -> list[dict[str, Any]]:
    """The objects of one image in detectron2's format."""
    example = examples[index]
    return [
        {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(label)}
        for box, label in zip(example.boxes, example.labels, strict=True)
    ]


class Mapper:
    """Reads an image, resizes it and, in training, flips it: what detectron2's loaders call for each record.

    Args:
        examples: the images.
        settings: sizes and probability of a flip.
        training: augmented, with objects; otherwise as at test.
    """

    def __init__(self, examples: Examples, settings: DetectionProtocol, training: bool) -> None:
        self.examples, self.training = examples, training
        sizes = settings.train_min_sizes if training else (settings.test_min_size,)
        longest = settings.train_max_size if training else settings.test_max_size
        augmentations = [T.ResizeShortestEdge(list(sizes), longest, "choice")]
        if training:
            augmentations.append(T.RandomFlip(prob=settings.flip))
        self.augmentations = T.AugmentationList(augmentations)

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with ``image`` uint8 ``(3, H, W)`` RGB, its original size, and ``instances`` in training.

        ``unreadable`` tells that another image stands in; in training its objects are used.
        """
        image, shown = self.examples.image(record["image_id"])
        seen = T.AugInput(np.asarray(image))
        transforms = self.augmentations(seen)
        mapped = {
            "image_id": record["image_id"],
            "unreadable": shown != record["image_id"],
            "width": image.width,
            "height": image.height,
            "image": torch.as_tensor(np.ascontiguousarray(seen.image.transpose(2, 0, 1))),
        }
        if self.training:
            size = seen.image.shape[:2]
            objects = [transform_instance_annotations(o, transforms, size) for o in objects_of(self.examples, shown)]
            mapped["instances"] = filter_empty_instances(annotations_to_instances(objects, size))
        return mapped


# -- training ----------------------------------------------------------------------------------------------------------


class Training:
    """detectron2's trainer, its hooks and its checkpoints.

    Args:
        cfg: detectron2's configuration.
        detector: the built model.
        job: what to do.
    """

    def __init__(self, cfg: CfgNode, detector: nn.Module, job: Job) -> None:
        self.cfg, self.detector, self.job = cfg, detector, job
        self.optimizer = build_optimizer(cfg, detector)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.steps = Steps(job)
        self.batches = Batches(self.loader, job.num_workers)

    def loader(self, seed: int, num_workers: int) -> Iterable[Batch]:
        """detectron2's loader: endless, images of a batch grouped by orientation, those without an object left out."""
        cfg = self.cfg.clone()
        cfg.SEED, cfg.DATALOADER.NUM_WORKERS = seed, num_workers
        return build_detection_train_loader(cfg, mapper=Mapper(self.job.train, self.job.settings, training=True))

    def preflight(self, norm: str) -> list[preflight.Check]:
        """Loads the trunk and checks everything that ``detectron2_preflight`` can."""
        job, trunk = self.job, self.job.trunk.to(next(self.detector.parameters()).device)
        checks = preflight.load_trunk(self.detector, trunk)
        checks += preflight.network_checks(
            self.detector, trunk, job.settings, NORM_CLASSES[norm], len(job.train.class_names)
        )
        index = job.train.with_objects()[0]
        seen = Mapper(job.train, job.settings, training=False)({"image_id": index})["image"]
        size = (seen.shape[2], seen.shape[1])
        image = np.asarray(job.train.image(index)[0].resize(size, Image.Resampling.BILINEAR))
        checks += preflight.feature_checks(self.detector, trunk, seen, torch.tensor(image).permute(2, 0, 1))
        return checks + preflight.training_checks(
            self.detector, self.optimizer, self._rate_at, job.settings, self.cfg.SOLVER.IMS_PER_BATCH
        )

    def run(self) -> None:
        """Trains to the last iteration, from the last checkpoint where there is one."""
        device_ids = [comm.get_local_rank()] if self.job.device != "cpu" else None
        model = create_ddp_model(self.detector, broadcast_buffers=False, device_ids=device_ids)
        trainer = SimpleTrainer(model, self.batches, self.optimizer)
        checkpointer = DetectionCheckpointer(model, str(self.job.folder), trainer=trainer)
        trainer.register_hooks(self._hooks(model, checkpointer))
        start, last = 0, self.job.settings.iterations
        if checkpointer.has_checkpoint():
            checkpointer.resume_or_load("", resume=True)
            start = trainer.iter + 1
            log.info("Going on from iteration %d of %d.", start, last)
            seed_all_rng(self.job.seed + comm.get_rank() + start)  # or all augmentations would begin anew
        self.steps.resumed_at, self.batches.seed = start, self.job.seed + start
        if start < last:
            trainer.train(start, last)

    def notes(self) -> dict[str, Any]:
        """For the record."""
        unreadable = comm.all_gather(self.batches.unreadable)
        resumed = {"resumed_at": self.steps.resumed_at} if self.steps.resumed_at else {}
        return {**self.steps.state_dict(), **resumed, "unreadable_train": sum(unreadable)}

    def _rate_at(self, iteration: int) -> float:
        kept, self.scheduler.last_epoch = self.scheduler.last_epoch, iteration
        rate = self.scheduler.get_lr()[0]
        self.scheduler.last_epoch = kept
        return float(rate)

    def _hooks(self, model: nn.Module, checkpointer: DetectionCheckpointer) -> list[HookBase]:
        """In this order: what a checkpoint holds must be done before it is written."""
        count = self.job.settings.precise_bn
        chosen = [hooks.LRScheduler(self.optimizer, self.scheduler)]
        if count:
            chosen.append(hooks.PreciseBN(0, model, self._for_statistics(count), count))
        chosen.append(self.steps)
        if comm.is_main_process():
            chosen.append(hooks.PeriodicWriter([JSONWriter(str(self.job.folder / "metrics.json"))], period=20))
            chosen.append(Checkpoints(checkpointer))
        return chosen

    def _for_statistics(self, count: int) -> Iterator[Batch]:
        """Batches for batch norm's statistics; nothing is read before the first is asked for."""
        log.info("Batch norm statistics over %d batches ...", count)
        batches = itertools.islice(Batches(self.loader, 0, self.job.seed), count)
        yield from self.job.progress(batches, count, "batch norm") if comm.is_main_process() else batches


class Steps(HookBase):
    """Shows how far the training is, and keeps its time and losses, through interruptions, too."""

    def __init__(self, job: Job) -> None:
        self.job, self.resumed_at = job, 0
        self.seconds, self.losses = 0.0, list[list[float]]()

    def before_train(self) -> None:
        """Starts the bar."""
        todo = range(self.trainer.start_iter, self.trainer.max_iter)
        self._bar = iter(self.job.progress(todo, len(todo), "detector") if comm.is_main_process() else todo)
        next(self._bar)
        self._began = time.monotonic()

    def after_step(self) -> None:
        """Moves the bar; now and then a message."""
        next(self._bar, None)
        now = time.monotonic()
        self.seconds += now - self._began
        self._began = now
        done, total = self.trainer.iter + 1, self.trainer.max_iter
        every = max(1, total // _MESSAGES)
        if comm.is_main_process() and (done % every == 0 or done == total):
            loss = float(self.trainer.storage.history("total_loss").avg(every))
            self.losses.append([done, round(loss, 4)])
            rate, left = self.trainer.storage.history("lr").latest(), self.seconds / done * (total - done)
            log.info("detector %d/%d: loss %.3f, lr %.2g, %d s left", done, total, loss, rate, round(left))

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints and records."""
        return {"training_seconds": round(self.seconds, 1), "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.seconds, self.losses = state["training_seconds"], state["losses"]


class Checkpoints(HookBase):
    """Writes a checkpoint about once a minute and at the end, and removes the one before."""

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        self.checkpointer, self._last = checkpointer, time.monotonic()

    def after_step(self) -> None:
        """Writes, where it is time to."""
        done = self.trainer.iter + 1
        if done < self.trainer.max_iter and time.monotonic() - self._last < SECONDS_BETWEEN_CHECKPOINTS:
            return
        earlier = [Path(path) for path in self.checkpointer.get_all_checkpoint_files()]
        self.checkpointer.save(f"model_{done:07d}")
        for path in earlier:
            path.unlink(missing_ok=True)
        self._last = time.monotonic()


# -- detecting ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def detect(cfg: CfgNode, detector: nn.Module, job: Job) -> Found:
    """Runs the detector over the test images, each process over its part; the first one gets all, others nothing."""
    detector.eval()
    mapper = Mapper(job.test, job.settings, training=False)
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=mapper)
    own: dict[int, dict[str, Tensor] | None] = {}
    batches = job.progress(loader, len(loader), "detections") if comm.is_main_process() else loader
    for done, (record, *_) in enumerate(batches, start=1):
        if done % max(1, len(loader) // 4) == 0:
            log.info("detections %d/%d", done, len(loader))
        own[record["image_id"]] = None if record["unreadable"] else _fields(detector([record])[0]["instances"])
    everything = {index: found for part in comm.gather(own) for index, found in part.items()}
    return [everything[index] for index in range(len(job.test))] if comm.is_main_process() else []


def _fields(instances: Any) -> dict[str, Tensor]:
    found = instances.to("cpu")
    return {"boxes": found.pred_boxes.tensor, "scores": found.scores, "labels": found.pred_classes}
