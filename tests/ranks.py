"""Several processes of one script of this folder, as torchrun would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(script: str, folder: Path, world_size: int = 2, timeout: float = 300) -> None:
    """``python SCRIPT FOLDER`` in each rank, with RANK and WORLD_SIZE set; what rank R says goes to ``rank_R.txt``.

    Raises:
        AssertionError: one of them failed; the end of what each said.
        subprocess.TimeoutExpired: one did not end. None is left behind.
    """
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, **ONE_THREAD, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
        with (folder / f"rank_{rank}.txt").open("w") as output:
            command = [sys.executable, str(HERE / script), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, cwd=HERE.parent, stdout=output, stderr=output))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world_size, "\n".join(path.read_text()[-2000:] for path in folder.glob("rank_*.txt"))
