"""Processes of one run that watch each other: one that dies or hangs must not leave the others waiting.

Each process says every second, from a thread, where its training is, and looks at the next process in the ring. Who
finds that one silent, dead or stuck says so to all, and all end. No collective is involved: those are what hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pirl_plugin.distributed import collectives_entered, gather_objects

LOST = 76
"""Exit code of a process that ends because another one of its run is gone."""

STARTING, HOOKS, BETWEEN_EPOCHS, DATA, COMPUTING = -1, 0, 1, 2, 3
_DOING = {
    STARTING: "starts",
    HOOKS: "is in the hooks",
    BETWEEN_EPOCHS: "is between two epochs or at a checkpoint",
    DATA: "waits for its data",
    COMPUTING: "computes",
}
_PRECEDENCE = 8.0  # seconds
_FAREWELL = 2.5  # seconds: the store may be in this process, and the others have yet to read from it why they end
_LONG = 1800.0  # seconds for what may take long: compilation, a pass over the data between epochs, a checkpoint


class Heartbeat:
    """Signs of life of this process, and a watch on its neighbour's.

    Args:
        store: where processes leave notes for each other; used by the thread alone.
        rank: this process.
        world_size: number of processes.
        patience: seconds that a step may take without any progress, while another process waits for it; more where
            steps themselves are slow.
        silence: seconds without any sign of life.
        on_loss: called with the message before the process ends; must not take longer than seconds.
        end: ends the process with an exit code.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        patience: float = 40.0,
        silence: float = 30.0,
        on_loss: Callable[[str], None] = lambda message: None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.patience, self.silence = patience, silence
        self.on_loss, self.end = on_loss, end
        self._position, self._since, self._marked_steps = (0, STARTING), time.monotonic(), 0
        self._latest_steps: deque[float] = deque([0.0], maxlen=50)  # seconds
        self._step_began: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to beat and to watch."""
        self._thread.start()

    def stop(self, reason: str = "") -> None:
        """Ends; with a reason, all others are told that this process has failed."""
        self._over.set()  # first: this process's own watch must not end it by the message it leaves for the others
        if self._thread.is_alive():
            self._thread.join(5)
        if reason:
            with contextlib.suppress(Exception):  # the store may be what is gone
                self.store.set("verdict", f"rank {self.rank} failed, {self._place(*self._where())}: {reason}")

    def mark(self, batches: int, doing: int) -> None:
        """Notes progress; called by the training several times a step, so it does next to nothing."""
        now = time.monotonic()
        if doing == DATA:
            self._step_began = now
        elif doing == HOOKS and self._step_began is not None:
            self._marked_steps += 1
            if self._marked_steps > 1:  # the first one compiles, starts workers, ...
                self._latest_steps.append(now - self._step_began)
            self._step_began = None  # hooks may come back from a long pause: that is no step
        self._position, self._since = (batches, doing), now

    def _allowed(self, doing: int) -> float:
        long = doing in (STARTING, BETWEEN_EPOCHS) or self._marked_steps < 2
        return _LONG if long else max(self.patience, 10 * statistics.median(self._latest_steps))

    def _where(self) -> tuple[int, int, int]:
        """How far this process is: batches, what it does, collectives; of two processes the smaller one is behind."""
        return (*self._position, collectives_entered())

    def _place(self, batches: int, doing: int, collectives: int) -> str:
        return f"after {batches} batches, where it {_DOING[doing]}"

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        count, seen, seen_at, reached = 0, -1, time.monotonic(), time.monotonic()
        neighbour = (self.rank + 1) % self.world_size
        while not self._over.wait(1.0 if count else 0.0):  # the first at once: it says which process this is
            count += 1
            try:
                beat = self._exchange(count, neighbour)
                reached = time.monotonic()
                if self.store.check(["verdict"]) and not self._over.is_set():
                    return self._end(self.store.get("verdict").decode())
            except Exception as error:
                if time.monotonic() - reached > self.silence and not self._over.is_set():
                    return self._end(f"the launcher of the processes cannot be reached: {str(error)[:100]}")
                continue
            if beat is not None and (beat["over"] or beat["count"] != seen):
                seen, seen_at = beat["count"], time.monotonic()
            problem = self._problem(beat, time.monotonic() - seen_at)
            if problem:
                message = f"rank {neighbour} {problem}"
                with contextlib.suppress(Exception):
                    self.store.set("verdict", message)
                return self._end(message)
        with contextlib.suppress(Exception):
            self._exchange(-1, neighbour)

    def _exchange(self, count: int, neighbour: int) -> dict[str, Any] | None:
        """Leaves this process's sign of life and takes the neighbour's, if it has left one yet."""
        doing = self._position[1]
        beat = {
            "count": count,
            "over": count < 0,
            "position": self._where(),
            "stalled": time.monotonic() - self._since,
            "allowed": self._allowed(doing),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.store.set(f"beat/{self.rank}", json.dumps(beat))
        if not self.store.check([f"beat/{neighbour}"]):
            return None
        found: dict[str, Any] = json.loads(self.store.get(f"beat/{neighbour}"))
        return found

    def _problem(self, beat: dict[str, Any] | None, silent: float) -> str:
        """What is wrong with the neighbour, in words; empty where nothing is."""
        if beat is None:
            return "has given no sign of life since the start" if silent > self.silence else ""
        who, where = f"(process {beat['pid']} on {beat['host']})", self._place(*beat["position"])
        if silent > self.silence:
            return f"{who} has given no sign of life for {silent:.0f} s, {where}"
        if silent > 2 and beat["host"] == socket.gethostname() and not _is_alive(beat["pid"]):
            return f"{who} is dead, {where}"
        if beat["stalled"] <= beat["allowed"]:
            return ""
        if tuple(beat["position"]) < self._where():
            return f"{who} has made no progress for {beat['stalled']:.0f} s, {where}"
        # at the same place: only if nobody has found another one behind by now
        stalled, doing = min(beat["stalled"], time.monotonic() - self._since) - _PRECEDENCE, self._position[1]
        if tuple(beat["position"]) == self._where() and doing != DATA and stalled > self._allowed(doing):
            return f"{who} has made no progress for {beat['stalled']:.0f} s, like this process, {where}"
        return ""

    def _end(self, message: str) -> None:
        where = self._place(*self._where())
        text = f"error: {message}; rank {self.rank} ends, {where}. The same command goes on from the last checkpoint."
        print(text, file=sys.stderr, flush=True)
        self.on_loss(text)
        time.sleep(_FAREWELL)
        self.end(LOST)


@contextlib.contextmanager
def watched(patience: float, on_loss: Callable[[str], None]) -> Iterator[Heartbeat | None]:
    """A heartbeat among the processes that ``torchrun`` started, while the block runs; None for a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    # not torchrun's number of restarts: each machine counts those that began on it
    start = gather_objects(uuid.uuid4().hex)[0]
    server = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    client = dist.TCPStore(*server, is_master=False, timeout=timedelta(seconds=15), wait_for_workers=False)
    store = dist.PrefixStore(f"pirl_plugin/heartbeat/{start}", client)
    heartbeat = Heartbeat(store, dist.get_rank(), dist.get_world_size(), patience, on_loss=on_loss)
    heartbeat.start()
    try:
        yield heartbeat
    except RuntimeError:
        # a collective broke off because a process at its other end is gone: the watch is about to say which
        time.sleep(heartbeat.silence + 10 if _is_connection_lost(sys.exc_info()[1]) else 0)
        heartbeat.stop(_first_line(sys.exc_info()[1]))
        raise
    except BaseException as error:
        heartbeat.stop(_first_line(error) if isinstance(error, Exception) and not getattr(error, "orderly", 0) else "")
        raise
    else:
        heartbeat.stop()


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _is_connection_lost(error: BaseException | None) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("gloo", "nccl", "connection", "peer", "timed out", "socket"))


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    except (OSError, IndexError):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
