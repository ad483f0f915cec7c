"""Self-supervised pretraining on classy-vision's task and trainers."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from classy_vision.generic.util import Timer
from classy_vision.optim.param_scheduler import ConstantParamScheduler
from classy_vision.tasks import register_task
from classy_vision.tasks.classification_task import BatchNormSyncMode, LastBatchInfo
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.data.loading import SampledViews, number_of_workers
from pirl_plugin.functional.pending_colours import coloured, view_of
from pirl_plugin.heartbeat import COMPUTING, DATA, HOOKS
from pirl_plugin.hooks.random_state import seed_everything
from pirl_plugin.models.ssl_model import is_pixels
from pirl_plugin.registry import Configurable, build, completed
from pirl_plugin.schema import Component, NonNegativeInt, PositiveFloat, PositiveInt, checked
from pirl_plugin.tasks import checks
from pirl_plugin.tasks.guarded import GuardedTask
from pirl_plugin.tasks.network import build_network
from pirl_plugin.tasks.numerics import Numerics
from pirl_plugin.tasks.step_flags import StepFlags
from pirl_plugin.tasks.transfer import Transfer

log = logging.getLogger(__name__)

ComponentConfig = Mapping[str, Any]
_PIRL_HEADS = {"image": {"name": "linear"}, "patches": {"name": "jigsaw"}}


@register_task("ssl_pretraining")
@checked
class SSLPretrainingTask(Configurable, GuardedTask):
    """Pretrains a trunk without labels: views of each image, one loss, one optimiser.

    Args:
        dataset: images with stable ids.
        transform: draws the views of one image.
        collator: makes a batch of them.
        trunk: the network to pretrain.
        heads: one head for each view, by the view's name.
        loss: gets the heads' outputs and the image ids; ``num_images``, ``num_classes`` and ``labels``, where it takes
            them, come from the dataset.
        model: joins trunk and heads, which it is given; another than ``ssl_model`` may add to them.
        optimizer: optimiser with its learning rate schedule.
        hooks: what happens besides training, such as the memory bank's update; null: what model and loss need.
        checkpoint: the hook that saves and restores the run, without its name; null saves nothing.
        num_epochs: passes over the dataset; 0 writes the initial weights as a checkpoint.
        batch_size: images per process and step.
        accumulate_steps: batches whose gradients make one optimiser step; an epoch holds whole groups of them.
        num_workers: processes that make the views; 0 makes them in the training process; null: none on a CPU, a GPU's
            share of the cores but one, 16 at most.
        seed: of the weights, the bank, the order, the views and the negatives.
        device: ``auto`` takes a GPU where there is one.
        precision: ``bf16`` runs the model under autocast; weights, loss and bank stay float32.
        channels_last: memory layout of the weights, and so of everything that passes through them.
        compile: compile the trunk with ``torch.compile``; does not pay on a CPU.
        sync_batch_norm: batch statistics over all processes (GPU only, as in torch).
        clip_grad_norm: largest norm of the gradient; null does not clip.
        on_nonfinite: what a loss or a gradient that is not finite does: ``stop`` the run; ``skip`` the step, whose
            update is undone; ``roll_back`` to the last checkpoint, and leave that step out. The step's batch is saved
            under ``run_dir/nonfinite``.
        patience: of several processes, seconds that one may make no progress in a step while others wait for it; then
            all end, so that they can be started again. Slow steps have ten times their length.
        log_every: optimiser steps between logged values; only there the host waits for the device.
        method: name of the method, for the records.
        evaluation_size: pixels of the images that benchmarks show to the trunk; null: the transform's ``image_size``.
        about: the method's paper, year and what it needs, for the list of methods; nothing depends on it.
        run_dir: folder of the run; null writes nothing.
        plugins: modules to import first, for the components they register.
    """

    def __init__(
        self,
        dataset: Annotated[ComponentConfig, Component("dataset")],
        transform: Annotated[ComponentConfig, Component("transform")],
        collator: Annotated[ComponentConfig, Component("collator")],
        trunk: Annotated[ComponentConfig, Component("model")],
        loss: Annotated[ComponentConfig, Component("loss")],
        model: Annotated[ComponentConfig, Component("model")] | None = None,
        heads: Mapping[str, Annotated[ComponentConfig, Component("head")]] | None = None,
        optimizer: Annotated[ComponentConfig, Component("optimizer")] | None = None,
        hooks: list[Annotated[ComponentConfig, Component("hook")]] | None = None,
        checkpoint: Annotated[ComponentConfig, Component("hook")] | None = None,
        num_epochs: NonNegativeInt = 1,
        batch_size: PositiveInt = 32,
        accumulate_steps: PositiveInt = 1,
        num_workers: NonNegativeInt | None = None,
        seed: NonNegativeInt = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["float32", "bf16"] = "float32",
        channels_last: bool = False,
        compile: bool = False,
        sync_batch_norm: bool = False,
        clip_grad_norm: PositiveFloat | None = None,
        on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop",
        patience: PositiveFloat = 40.0,
        log_every: PositiveInt = 50,
        method: str = "pirl",
        evaluation_size: PositiveInt | None = None,
        about: Mapping[str, str | int] | None = None,
        run_dir: str | None = None,
        plugins: list[str] | None = None,
    ) -> None:
        super().__init__()
        use_gpu = checks.chosen_device(device, sync_batch_norm) == "cuda"
        self.seed, self.method, self.log_every = seed, method, log_every
        self.run_dir = Path(run_dir) if run_dir else None
        self.accumulate_steps, self.precision = accumulate_steps, precision
        self.channels_last, self.compile_trunk = channels_last, compile
        self.on_nonfinite, self.patience = on_nonfinite, patience
        self._begin()

        self.set_use_gpu(use_gpu)
        self.set_num_epochs(num_epochs)
        self.set_clip_grad_norm(clip_grad_norm)
        source = build("dataset", dataset)
        views = SampledViews(
            source,
            build("transform", transform),
            build("collator", collator),
            batch_size,
            seed=seed,
            num_workers=number_of_workers(num_workers, use_gpu),
            accumulate_steps=accumulate_steps,
            with_programs=True,
        )
        self.set_dataset(views, "train")
        network = build_network(model or {"name": "ssl_model"}, trunk, heads or _PIRL_HEADS, loss, source, seed)
        self._filled_in = network.filled_in
        self.set_model(network.model)
        self.set_loss(network.loss)
        self.set_optimizer(build("optimizer", optimizer or {"name": "scheduled_sgd"}))
        parts = (self.base_model, self.base_loss)
        chosen = [{"name": name} for name in checks.needed_hooks(parts)] if hooks is None else hooks
        self.set_hooks([build("hook", hook) for hook in (*chosen, *([checkpoint] if checkpoint else []))])
        checks.refuse_wrong_hooks(parts, self.hooks)
        checks.freeze_idle_heads(self.base_model, self.base_loss)
        self._needed_views: set[str] | None = None
        self._transfer: Transfer | None = None
        if sync_batch_norm:
            self.set_distributed_options(batch_norm_sync_mode=BatchNormSyncMode.PYTORCH)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SSLPretrainingTask:
        """Builds the task; ``task.config`` is the configuration with every derived value filled in."""
        task: SSLPretrainingTask = super().from_config(config)
        task.config = completed("task", {"name": "ssl_pretraining", **copy.deepcopy(dict(config)), **task._filled_in})
        return task

    # -- set-up --------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Moves everything to its device and restores a checkpoint, if one was set."""
        if self.precision == "bf16" and not self.use_gpu:
            checks.refuse_wrong_bfloat16_gradients(self.base_model.trunk, self.datasets["train"])
        if self.checkpoint_dict is not None:
            checks.refuse_other_batch_size(self.checkpoint_dict["classy_state_dict"], self.global_batch_size)
        checks.refuse_disagreement(self)
        checks.warn_of_repeated_images(len(self.datasets["train"]), self.global_batch_size)
        self.simulated_global_batchsize = self.global_batch_size
        self._flags, self._numerics = StepFlags(self.device), Numerics(self.run_dir)
        self._transfer = Transfer(self.device) if self.use_gpu else None
        self._snapshot = None
        self._needed_views = checks.needed_views(self.base_loss, self.hooks)
        if self.channels_last:
            self.base_model.to(memory_format=torch.channels_last)
        # ranks draw different negatives; a restored run takes its own state instead, in the checkpoint hook
        seed_everything(self.seed * 100_003 + distributed.rank())
        # the host would print a traceback where the checkpoint does not fit: it is kept from it until ours has looked
        self._to_restore, self.checkpoint_dict = self.checkpoint_dict, None
        restored = self._to_restore
        super().prepare()
        self.checkpoint_dict = restored
        if self.compile_trunk:
            self.base_model.compile_trunk()

    def prepare_optimizer(self, optimizer: Any, model: torch.nn.Module, loss: torch.nn.Module | None = None) -> None:
        """Parameter groups and schedule, now that the number of processes is known."""
        epochs = self.num_epochs
        schedule = optimizer.lr_scheduler(self.global_batch_size, epochs) if epochs else ConstantParamScheduler(0.0)
        modules = [model] if loss is None else [model, loss]
        optimizer.set_param_groups(optimizer.param_groups_of(*modules, lr=schedule))

    def build_dataloaders_for_current_phase(self) -> None:
        """This epoch's batches; of an epoch that a checkpoint was written in, those that are left."""
        views = self.datasets["train"]
        done = self.images_seen // views.get_global_batchsize() - self.epoch * views.steps_per_epoch
        self.dataloader = views.iterator(current_phase_id=self.epoch, start_step=done, pin_memory=self.use_gpu)

    def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
        """The host's state, health signs and global batch size; the epoch's losses are the process's own."""
        state: dict[str, Any] = super().get_classy_state(deep_copy)
        more = {"health": dict(self.health), "excluded_steps": list(self.excluded_steps)}
        return {**state, "losses": [], "global_batch_size": self.global_batch_size, **more}

    def set_classy_state(self, state: dict[str, Any]) -> None:
        """Restores a checkpoint; an epoch that it was written in is entered again where it was left."""
        super().set_classy_state(state)
        self.health.update(state.get("health", {}))
        self.excluded_steps = sorted({*self.excluded_steps, *state.get("excluded_steps", ())})
        views = self.datasets["train"]
        batches = self.images_seen // views.get_global_batchsize()
        if batches < (self.train_phase_idx + 1) * views.steps_per_epoch:
            self.phase_idx -= 1  # the host's next phase is then this one
            self.train_phase_idx -= 1

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """Forward, backward and, every ``accumulate_steps`` batches, the optimiser; nothing waits for the device."""
        self.last_batch = None
        self.mark(DATA)
        with Timer() as timer:
            sample = self._without_idle_views(next(self.data_iterator))
        self.mark(COMPUTING)
        if self._transfer is not None:
            sample = self._transfer(sample)
        sample["input"] = coloured(sample["input"])
        begins = self.is_update_step
        if begins and self._snapshot_wanted():
            self._take_snapshot()
        with contextlib.ExitStack() as gradients_wait:
            if not self._should_do_step():
                for part in filter(None, (self.distributed_model, self.distributed_loss)):
                    gradients_wait.enter_context(part.no_sync())
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = self.compute_model(sample)
            loss = self.compute_loss(output, sample)
            self._numerics.note(self._new_record() if begins else None, sample, loss)
            self.run_optimizer(loss)
        self.losses.append(loss.detach())
        self.num_updates += self.get_global_batchsize()
        self.last_batch = LastBatchInfo(
            loss=loss.detach(),
            output={view: embedding.detach() for view, embedding in output.items()},
            target=sample["target"],
            sample=sample,
            step_data={"sample_fetch_time": timer.elapsed_time},
        )
        self.mark(HOOKS)

    def _without_idle_views(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The batch without views that neither the loss nor a hook looks at: nothing is computed for them."""
        needed, views = self._needed_views, sample["input"]
        kept = {
            v: x for v, x in views.items() if needed is None or (view_of(v, views) or v) in needed or not is_pixels(x)
        }
        return {**sample, "input": kept}

    def compute_model(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings by view, and what a pretext knows of its views."""
        return self.model(sample["input"])

    # -- the host's bookkeeping, for outputs that are dictionaries and losses that stay on the device ------------------

    def update_meters(self, model_output: Mapping[str, Tensor], sample: Mapping[str, Any]) -> None:
        """There is nothing to classify: the host's meters do not apply."""

    @property
    def losses_so_far(self) -> list[float]:
        """This process's losses of the current epoch, batch by batch; reading them waits for the device."""
        return torch.stack(self.losses).tolist() if self.losses else []

    @losses_so_far.setter
    def losses_so_far(self, losses: list[float]) -> None:
        self.losses = list(torch.tensor(losses, device=self.device))

    def synchronize_losses(self) -> None:
        """Mean over processes of every step's loss, as numbers."""
        if self.losses:
            self.losses = distributed.all_reduce_mean(torch.stack(self.losses).float()).tolist()
