"""A training that is about to be killed: prints the pids of its loader's workers and waits.

python loader_parent.py CONTEXT, of ``fork``, ``spawn`` and ``forkserver``.
"""

from __future__ import annotations

import sys
import time

from test_loading import sampled

if __name__ == "__main__":
    views = sampled(num_workers=2)
    views.multiprocessing_context = sys.argv[1]
    batches = iter(views.iterator())
    next(batches)
    print(*(worker.pid for worker in views._loader._iterator._workers), flush=True)
    time.sleep(600)
