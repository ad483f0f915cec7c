"""Batches on their way to the GPU. What needs no device is tested with streams that only take notes."""

import contextlib
from typing import Any

import pytest
import torch

from pirl_plugin.tasks import transfer
from pirl_plugin.tasks.transfer import Transfer


def batch() -> dict[str, Any]:
    return {
        "input": {
            "image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            "image_program": torch.ones(2, 4, 2),
            "rotation": torch.tensor([1, 3]),
        },
        "target": torch.tensor([5, 9]),
        "unreadable": torch.tensor([7]),
    }


def test_what_moves_what_stays_and_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Stream:
        device = torch.device("cpu")

        def __init__(self, name: Any) -> None:
            self.name = str(name)

        def wait_stream(self, other: "Stream") -> None:
            notes.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        notes.append("copies begin")
        yield
        notes.append("copies are queued")

    def copied(value: Any, non_blocking: bool) -> Any:
        assert non_blocking
        return {key: copied(x, non_blocking) for key, x in value.items()} if isinstance(value, dict) else value.clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computation"))
    monkeypatch.setattr(transfer, "recursive_copy_to_gpu", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: notes.append(f"used by {stream.name}"))
    before = batch()
    after = Transfer(torch.device("cuda"))(before)
    assert notes == [
        "copies begin",
        "copies are queued",
        "computation waits for copies",
        *["used by computation"] * 3,
    ]
    assert list(after["input"]) == list(before["input"])
    assert set(after) == set(before)
    assert after["input"]["image_program"] is before["input"]["image_program"]
    assert after["unreadable"] is before["unreadable"]
    for name in ("image", "rotation"):
        assert after["input"][name] is not before["input"][name]
        assert torch.equal(after["input"][name], before["input"][name])


@pytest.mark.gpu
def test_on_a_gpu_everything_arrives() -> None:
    move = Transfer(torch.device("cuda"))
    for number in range(20):
        torch.cuda._sleep(10_000_000)  # the step before is still on its way
        sent = batch()
        sent["input"]["image"] = torch.full((64, 3, 224, 224), number, dtype=torch.uint8).pin_memory()
        got = move(sent)
        assert got["target"].device.type == "cuda"
        assert got["input"]["image_program"].device.type == "cpu"
        assert bool((got["input"]["image"] == number).all())
