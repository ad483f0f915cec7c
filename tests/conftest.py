"""Shared by all tests: one thread, the same seed, and the places of real data."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: test processes would only fight for the cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("PIRL_PLUGIN_CACHE", str(Path(tempfile.gettempdir()) / "pirl_plugin_tests"))  # not the user's own

import pytest
import torch

import pirl_plugin  # noqa: F401  (registers all components)

ROOT = Path(__file__).resolve().parents[1]
# zip archives of the datasets in docs/small_scale.md, if they are there
REAL_DATA = Path(os.environ.get("PIRL_REAL_DATA") or ROOT.parent / "shared" / "data")

torch.set_num_threads(1)
if threading.current_thread() is threading.main_thread():
    # a shell has what it runs in the background ignore Ctrl-C, and the tests would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout, for tests that read its files or run its tools."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with archives of real images; the test is skipped where it is not there."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real images are not here: {REAL_DATA} does not exist (PIRL_REAL_DATA names another folder)")
    return REAL_DATA
