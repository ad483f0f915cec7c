"""Training commands in processes of their own that start in milliseconds, so that many can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parents[1]):  # as a program, and the processes it starts
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")

NUM_IMAGES = 24
SMALL = [
    "method=pirl_32",
    "trunk=resnet18_narrow",
    "trunk.width=0.125",
    f"dataset.num_images={NUM_IMAGES}",
    "dataset.size=32",
    "transform.image_size=16",
    "transform.jigsaw_size=24",
    "transform.patch_size=8",
    "heads.image.dim=16",
    "heads.patches.dim=16",
    "heads.patches.patch_dim=8",
    "loss.dim=16",
    "loss.num_negatives=8",
    "optimizer.warmup_epochs=0",
    "device=cpu",
]
"""A run of milliseconds a step."""

_CLOCK = ("seconds", "images_per_second", "peak_memory_mib")


class Ranks:
    """The processes of one run."""

    def __init__(self, processes: list[Any], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    @property
    def codes(self) -> list[int | None]:
        """Exit codes; None for those that run, minus the number for those that a signal ended."""
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Waits for all to end."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return self.codes

    def until(self, condition: Callable[[], Any], seconds: float = 300) -> bool:
        """Waits for a condition, as long as all run; whether it came."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or any(code is not None for code in self.codes):
                return bool(condition())
            time.sleep(0.01)
        return True

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """A signal to one or to all that run."""
        for index, process in enumerate(self.processes):
            if rank in (None, index) and process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        """kill -9 for all, and waits for their end."""
        self.send(signal.SIGKILL)
        self.wait(60)

    def said(self) -> str:
        """All that they have printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.logs)


class Starter:
    """Starts training commands; the libraries are imported once, in a server that forks."""

    def __init__(self) -> None:
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pirl_plugin.commands.train"])

    def start(self, arguments: Sequence[str], folder: Path, ranks: int = 1) -> Ranks:
        """``train.py`` with these arguments, on several processes; what they print goes to ``folder/rank_R.txt``."""
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        processes, logs = [], []
        for rank in range(ranks):
            environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            logs.append(folder / f"rank_{rank}.txt")
            process = self.context.Process(target=_command, args=(list(arguments), environment, str(logs[-1])))
            process.start()
            processes.append(process)
        return Ranks(processes, logs)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _command(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The body of a process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)

    import torch

    from pirl_plugin.commands.train import main

    torch.set_num_threads(1)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # as at the end of a program: threads that write are waited for
    sys.exit(code)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Logged lines without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCK} for line in lines]


def steps_logged(folder: Path) -> int:
    """The last step in the metrics so far."""
    try:
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def differences(left: Path, right: Path) -> list[str]:
    """What differs between the ends of two runs: weights, statistics, momentum, bank, Z, random states, metrics."""
    import torch

    from pirl_plugin.hooks.checkpoint import checkpoints
    from pirl_plugin.hooks.checkpoint_files import read_checkpoint

    states = [read_checkpoint(checkpoints(folder)[-1]) for folder in (left, right)]
    found = []
    parts = [[_flat(state["classy_state_dict"][part], part) for state in states] for part in _PARTS]
    parts.append([_flat(state["random_states"], "random") for state in states])
    for first, second in parts:
        if first.keys() != second.keys():
            found.append(f"other keys: {sorted(first.keys() ^ second.keys())[:3]}")
        found += [name for name in first if name in second and not torch.equal(first[name], second[name])]
    if metrics(left) != metrics(right):
        lines = list(zip(metrics(left), metrics(right), strict=False))
        bad = next((pair for pair in lines if pair[0] != pair[1]), (len(metrics(left)), len(metrics(right))))
        found.append(f"metrics.jsonl: {bad[0]} and {bad[1]}")
    return found


_PARTS = ("base_model", "loss", "optimizer", "num_updates")


def _flat(state: Any, path: str) -> dict[str, Any]:
    import torch

    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {name: value for key, item in items for name, value in _flat(item, f"{path}/{key}").items()}
    if isinstance(state, torch.Tensor):
        return {path: state}
    if isinstance(state, str):
        return {f"{path}={state}": torch.tensor(0)}
    return {path: torch.tensor(float(state or 0), dtype=torch.float64)}
