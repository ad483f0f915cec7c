"""``python tools/train.py``: pretraining, from overrides to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classy_vision.generic.distributed_util import set_cpu_device, set_cuda_device_index
from classy_vision.tasks import build_task

from pirl_plugin import config as configs
from pirl_plugin.atomic import write_text
from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.preflight import refuse_small_disk, refuse_unusable_folder, warn_of_idle_gpu
from pirl_plugin.commands.running import PREEMPTED, Preempted, exit_code, log_to
from pirl_plugin.distributed import is_launched_primary, launched_processes, local_rank, process_group
from pirl_plugin.heartbeat import watched
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.hooks.checkpoint_files import newest_usable
from pirl_plugin.plain_yaml import read_plain_yaml
from pirl_plugin.records import environment
from pirl_plugin.registry import completed, working_hooks
from pirl_plugin.run_lock import locked
from pirl_plugin.signals import CTRL_C, keep_torchrun_from_restarting, told_to_stop
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.tasks.checks import refuse_other_batch_size, refuse_other_dataset
from pirl_plugin.tasks.stopping import StopRequested
from pirl_plugin.tasks.trainer import Trainer

log = logging.getLogger(__name__)

# what may change between the pieces of one run without changing its result
_FREE_KEYS = ("run_dir", "device", "num_workers", "log_every", "hooks", "checkpoint", "compile", "about", "patience")
# what may change together: their product with the number of processes must not
_BATCH_KEYS = ("batch_size", "accumulate_steps")

_ENDING = "ending after this step, with a checkpoint; Ctrl-C once more ends at once\n"

_EPILOG = """\
examples:
  python tools/train.py                                             PIRL on generated scenes, on whatever there is
  python tools/train.py method=pirl_32 dataset=image_folder dataset.root=photos num_epochs=100
  torchrun --nproc_per_node=8 tools/train.py method=pirl dataset=imagenet dataset.root=imagenet
  python tools/train.py method=pirl trunk=resnet18 loss.lam=0.3 --print-config

groups: {groups}
The same command again goes on where the run stopped. Names and parameters: python tools/list.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 for a finished run, 2 for a mistake in the command, 75 for one told to stop."""
    parser = Parser(
        "train.py",
        "Pretrain a trunk without labels.",
        _EPILOG.format(groups=", ".join(configs.groups())),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and settings, in Hydra's syntax")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    code = exit_code(lambda: train(arguments.overrides, arguments.print_config), arguments.debug)
    if code == PREEMPTED:
        keep_torchrun_from_restarting()
    return code


def train(overrides: Sequence[str], print_config: bool = False) -> None:
    """Composes, checks, builds, resumes where there is something to resume, and trains."""
    orders = _Orders()
    try:
        with told_to_stop(orders.take, ctrl_c=True):
            _train(overrides, print_config, orders)
    except KeyboardInterrupt:
        if orders.ended_by in (None, CTRL_C):
            raise
        raise Preempted(f"{orders.ended_by} before the first step: the same command starts it again") from None


def _train(overrides: Sequence[str], print_config: bool, orders: _Orders) -> None:
    config = configs.load("train", overrides)
    task: SSLPretrainingTask = build_task(config)
    if print_config:
        print(configs.to_yaml(task.config), end="")
        return
    run_dir = task.run_dir
    assert run_dir is not None
    primary = is_launched_primary()
    refuse_unusable_folder(run_dir)
    with locked(run_dir) if primary else contextlib.nullcontext():
        log_to(run_dir if primary else None)
        if not _resume(task):
            return
        if primary:
            write_text(configs.to_yaml(task.config), run_dir / "config.yaml")
            write_text(json.dumps(environment(), indent=2) + "\n", run_dir / "environment.json")
            refuse_small_disk(task)
            warn_of_idle_gpu(task.device)
            log.info("%s", _introduction(task, launched_processes()))
        _run(task, orders)


def _run(task: SSLPretrainingTask, orders: _Orders) -> None:
    """Trains in as many processes as there are, each watched by another, until the end or until told to stop."""

    def note(signal: str) -> None:
        task.told_to_stop = signal

    set_cuda_device_index(local_rank()) if task.use_gpu else set_cpu_device()
    with process_group(task.device):
        orders.note = note
        with _words_for_the_end(task):
            _train_and_clean_up(task)


def _train_and_clean_up(task: SSLPretrainingTask) -> None:
    try:
        with watched(task.patience, lambda message: task.finish_writing(10)) as task.heartbeat:
            Trainer().train(task)
        # before the processes part: they make up the global batch that steps are counted in
        log.info("Finished after %d steps: %s", task.step_idx, task.run_dir)
    finally:
        # torch 2.11 waits for ever where the wrapped model outlives the process group that it belongs to
        task.distributed_model = task.distributed_loss = None
        task.data_iterator = task.dataloader = None
        task.datasets["train"].close()


class _Orders:
    """What becomes of a signal: it ends at once what has trained nothing yet, later it is noted.

    Attributes:
        note: called with the signal's name once there is something to save.
        ended_by: name of the signal that came before that.
    """

    def __init__(self) -> None:
        self.note: Callable[[str], None] | None = None
        self.ended_by: str | None = None

    def take(self, signal: str) -> None:
        """Hears one.

        Raises:
            KeyboardInterrupt: nothing would be lost. It is no ``Exception``, which readers of images take for damage.
        """
        if self.note is None:
            self.ended_by = signal
            raise KeyboardInterrupt
        self.note(signal)
        if signal == CTRL_C and is_launched_primary():
            os.write(2, _ENDING.encode())  # a logger may be in the middle of a line


@contextlib.contextmanager
def _words_for_the_end(task: SSLPretrainingTask) -> Iterator[None]:
    """Says, of a run that ends early, where it goes on from."""
    steps = 0
    try:
        try:
            yield
        finally:
            steps = task.images_seen // task.simulated_global_batchsize if task.simulated_global_batchsize else 0
    except StopRequested as error:
        if error.reason == CTRL_C:
            raise KeyboardInterrupt(f" {_after(task, steps)}") from None
        raise Preempted(f"{error.reason} {_after(task, steps)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f" {_after(task, steps)}") from None


def _after(task: SSLPretrainingTask, steps: int) -> str:
    assert task.run_dir is not None
    saved = checkpoints(task.run_dir)
    where = f"the same command goes on from {saved[-1]}" if saved else "nothing was saved yet"
    return f"after step {steps}: {where}"


def _resume(task: SSLPretrainingTask) -> bool:
    """Sets the newest usable checkpoint of the run folder on the task; False where the run is finished already.

    Raises:
        ValueError: the folder holds a run with other settings or on other images, or no checkpoint that can be used.
    """
    assert task.run_dir is not None
    own = _recorded_identity(task.run_dir)
    found = newest_usable(task.run_dir, lambda content: own is not None and _saved_identity(content) != own)
    if found is None:
        return True
    path, state = found
    changed = configs.differences(_saved_identity(state), _identity(task.config))
    if changed:
        raise ValueError(
            f"{task.run_dir} holds a run with other settings ({'; '.join(changed)}). "
            "Set run_dir to a new folder, or repeat the settings to go on with that run."
        )
    views, processes = task.datasets["train"], launched_processes()
    batch = views.get_batchsize_per_replica() * processes * task.accumulate_steps
    refuse_other_batch_size(state["classy_state_dict"], batch, processes)
    refuse_other_dataset(state, task)
    if state["classy_state_dict"]["num_updates"] >= views.images_per_epoch(processes) * int(task.num_epochs):
        log.info("Finished already: %s", path)
        return False
    log.info("Going on from %s", path)
    before = len(state["random_states"])
    if before != processes:
        log.warning(
            "Going on with %d process(es) instead of %d. The images of each step, the schedule, weights, optimiser and "
            "memory bank are the same; batch norm's statistics are of %d images instead of %d, negatives are drawn "
            "from other random states, and sums are rounded otherwise.",
            processes,
            before,
            views.get_batchsize_per_replica(),
            _per_process(state, before),
        )
    task._set_checkpoint_dict(state)
    return True


def _per_process(state: Mapping[str, Any], processes: int) -> int:
    steps = int(state["input_args"]["config"].get("accumulate_steps", 1))
    return int(state["classy_state_dict"]["global_batch_size"]) // (processes * steps)


def _recorded_identity(run_dir: Path) -> dict[str, Any] | None:
    """Identity of the run whose folder this is, as it stated itself; None where it does not say."""
    try:
        return _identity(completed("task", read_plain_yaml(run_dir / "config.yaml")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _saved_identity(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint; settings that are newer than it at their defaults."""
    return _identity(completed("task", state["input_args"]["config"]))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a run's result; of the hooks, those that work."""
    free = (*_FREE_KEYS, *_BATCH_KEYS)
    return {**{key: value for key, value in config.items() if key not in free}, "hooks": working_hooks(config["hooks"])}


def _introduction(task: SSLPretrainingTask, processes: int) -> str:
    parameters = sum(p.numel() for p in task.base_model.parameters())
    bank = getattr(task.base_loss, "memory_bank", None)
    size = sum(rows.numel() * rows.element_size() for rows in bank.buffers()) / 1e6 if bank is not None else 0
    return (
        f"{task.method}: {len(task.datasets['train'])} images, {task.num_epochs} epochs, "
        f"{task.datasets['train'].get_batchsize_per_replica()} images x {processes} process(es) a step, "
        f"{parameters / 1e6:.1f} M parameters, "
        f"{f'{size:.1f} MB of memory bank, ' if size else ''}on {task.device}; folder {task.run_dir}"
    )


if __name__ == "__main__":  # torchrun -m
    sys.exit(main())
