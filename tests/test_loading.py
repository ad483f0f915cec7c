"""Batches: the same for any number of workers, for any sharing among processes, and from any step on."""

import itertools
import pickle
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pirl_plugin.data.collators import ViewCollator
from pirl_plugin.data.datasets import ImageDataset
from pirl_plugin.data.loading import GlobalBatchSampler, SampledViews, evaluation_loader, number_of_workers
from pirl_plugin.data.reading import UnreadableImageError


class Numbers(ImageDataset):
    """Image i is a grey pixel of value i; those in ``broken`` cannot be read."""

    def __init__(self, total: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.total, self.broken = total, broken

    def __len__(self) -> int:
        return self.total

    def read(self, image_id: int) -> Image.Image:
        if image_id in self.broken:
            raise UnreadableImageError(str(image_id), "broken on purpose")
        return Image.new("RGB", (1, 1), (image_id, image_id, image_id))

    def file_name(self, image_id: int) -> str:
        return str(image_id)

    @property
    def fingerprint(self) -> str:
        return f"{self.total}{self.broken}"


def draw(image: Image.Image, generator: np.random.Generator) -> dict[str, torch.Tensor]:
    """A transform that shows both of its arguments: the pixel, and what the generator gave."""
    return {"image": torch.tensor([image.getpixel((0, 0))[0], int(generator.integers(1 << 40))])}


def sampled(total: int = 23, batch_size: int = 4, broken: tuple[int, ...] = (), **arguments: int) -> SampledViews:
    return SampledViews(Numbers(total, broken), draw, ViewCollator(), batch_size, **arguments)


def content(batches) -> list:
    return [(b["target"].tolist(), b["input"]["image"].tolist(), b["unreadable"].tolist()) for b in batches]


def ids(sampler: GlobalBatchSampler) -> list[list[int]]:
    return [[image_id for image_id, _ in keys] for keys in sampler]


class TestGlobalBatchSampler:
    @pytest.mark.parametrize(("total", "steps"), [(24, 6), (23, 5), (4, 1)])
    def test_an_epoch_takes_each_id_at_most_once_and_drops_the_rest(self, total, steps):
        sampler = GlobalBatchSampler(total, batch_size=4, seed=3)
        batches = ids(sampler)
        flat = list(itertools.chain(*batches))
        assert len(batches) == len(sampler) == sampler.steps_per_epoch == steps
        assert len(set(flat)) == len(flat) == 4 * steps
        assert set(flat) <= set(range(total))

    def test_all_ids_come_and_in_an_order_of_their_own(self):
        flat = list(itertools.chain(*ids(GlobalBatchSampler(1000, batch_size=10))))
        assert sorted(flat) == list(range(1000))
        assert abs(np.corrcoef(flat, range(1000))[0, 1]) < 0.2

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_ranks_side_by_side_are_one_process_with_the_whole_batch(self, world_size):
        whole = ids(GlobalBatchSampler(50, batch_size=4 * world_size, seed=1, epoch=2))
        ranks = range(world_size)
        parts = [ids(GlobalBatchSampler(50, 4, seed=1, epoch=2, rank=rank, world_size=world_size)) for rank in ranks]
        assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole

    def test_seed_and_epoch_change_the_order_and_nothing_else_does(self):
        base = ids(GlobalBatchSampler(50, 5, seed=1, epoch=2))
        assert base == ids(GlobalBatchSampler(50, 5, seed=1, epoch=2))
        assert base != ids(GlobalBatchSampler(50, 5, seed=2, epoch=2))
        assert base != ids(GlobalBatchSampler(50, 5, seed=1, epoch=3))
        assert ids(GlobalBatchSampler(50, 5, seed=1, epoch=2)) != ids(GlobalBatchSampler(50, 5, seed=2, epoch=1))

    @pytest.mark.parametrize("start", [0, 1, 4, 5, 6])
    def test_start_step_equals_skipping(self, start):
        whole = ids(GlobalBatchSampler(23, 4))
        late = GlobalBatchSampler(23, 4, start_step=start)
        assert ids(late) == whole[start:]
        assert len(late) == len(whole[start:])

    def test_a_small_dataset_is_repeated_to_fill_one_batch(self):
        whole = ids(GlobalBatchSampler(3, 8))
        assert len(whole) == 1
        assert whole[0] == (whole[0][:3] * 3)[:8]
        assert set(whole[0]) == {0, 1, 2}
        first, second = (ids(GlobalBatchSampler(3, 4, rank=rank, world_size=2))[0] for rank in (0, 1))
        assert first + second == whole[0]

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="rank must be in 0..1"):
            GlobalBatchSampler(10, 2, rank=2, world_size=2)
        with pytest.raises(ValueError, match="got 0 and 2"):
            GlobalBatchSampler(0, 2)


class TestSampledViews:
    def test_views_are_a_function_of_seed_epoch_and_id(self):
        views = sampled(seed=5)
        asked, view, returned = views[7, 3]
        expected = np.random.default_rng(np.random.SeedSequence([5, 3, 7])).integers(1 << 40)
        assert (asked, returned) == (7, 7)
        assert view["image"].tolist() == [7, expected]

    def test_batches_carry_ids_and_their_own_pixels(self):
        for batch in sampled().iterator():
            assert batch["target"].dtype == torch.int64
            assert batch["input"]["image"][:, 0].tolist() == batch["target"].tolist()
            assert batch["unreadable"].shape == (0,)
            assert batch["unreadable"].dtype == torch.int64

    @pytest.mark.parametrize(("num_workers", "context"), [(2, None), (1, "spawn")])
    def test_workers_change_nothing_and_live_on(self, num_workers, context):
        alone = sampled(broken=(5, 6))
        helped = sampled(broken=(5, 6))
        helped.set_num_workers(num_workers)
        helped.multiprocessing_context = context
        seen = []
        for epoch, start in ((0, 0), (1, 3), (0, 0)):
            expected = content(alone.iterator(current_phase_id=epoch, start_step=start))
            assert content(helped.iterator(current_phase_id=epoch, start_step=start)) == expected
            seen.append({worker.pid for worker in helped._loader._iterator._workers})
        assert seen[0] == seen[1] == seen[2]
        assert any(flags for _, _, flags in content(alone.iterator()))

    @pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
    def test_workers_end_with_a_training_that_is_killed(self, context):
        """torch's own watch does not see it where a fork server is the workers' parent."""
        command = [sys.executable, str(Path(__file__).with_name("loader_parent.py")), context]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            workers = [Path("/proc") / pid for pid in parent.stdout.readline().split()]
            assert len(workers) == 2
            assert all(worker.exists() for worker in workers)
            parent.kill()
            end = time.monotonic() + 20
            while any(worker.exists() for worker in workers) and time.monotonic() < end:
                time.sleep(0.05)
        assert not any(worker.exists() for worker in workers)

    def test_an_epoch_left_early_does_not_spill_into_the_next(self):
        helped = sampled(num_workers=2, total=60)
        next(iter(helped.iterator(current_phase_id=0)))
        assert content(helped.iterator(current_phase_id=1)) == content(sampled(total=60).iterator(current_phase_id=1))

    def test_start_step_equals_skipping(self):
        assert content(sampled().iterator(start_step=2)) == content(sampled().iterator())[2:]
        assert len(sampled().iterator(start_step=2)) == 3

    def test_two_ranks_together_equal_one_process(self, monkeypatch):
        whole = content(sampled(batch_size=8).iterator(current_phase_id=1))
        parts = []
        for rank in (0, 1):
            monkeypatch.setattr("pirl_plugin.data.loading.get_rank", lambda rank=rank: rank)
            monkeypatch.setattr("pirl_plugin.data.loading.get_world_size", lambda: 2)
            views = sampled(batch_size=4)
            assert views.steps_per_epoch == 2
            parts.append(content(views.iterator(current_phase_id=1)))
        joined = [tuple(left + right for left, right in zip(*step, strict=True)) for step in zip(*parts, strict=True)]
        assert joined == whole

    def test_replaced_images_are_flagged_and_keep_their_own_id(self):
        batches = list(sampled(total=24, broken=(5, 23)).iterator())
        targets = torch.cat([batch["target"] for batch in batches]).tolist()
        assert sorted(torch.cat([batch["unreadable"] for batch in batches]).tolist()) == [5, 23]
        assert sorted(targets) == sorted([*range(5), 6, *range(6, 23), 0])
        for batch in batches:
            assert batch["input"]["image"][:, 0].tolist() == batch["target"].tolist()

    def test_a_stand_in_is_seen_differently_from_the_image_itself(self):
        views = sampled(broken=(5,))
        assert views[5, 0][1]["image"][0] == views[6, 0][1]["image"][0] == 6
        assert views[5, 0][1]["image"][1] != views[6, 0][1]["image"][1]

    def test_host_arguments_and_names(self):
        views = sampled()
        batches = views.iterator(shuffle_seed=1, phase_type="train", current_phase_id=0, multiprocessing_context=None)
        assert len(batches) == views.steps_per_epoch == 5
        assert views.get_batchsize_per_replica() == views.get_global_batchsize() == 4
        assert len(views) == 23

    @pytest.mark.filterwarnings("ignore:.*pin_memory.*")
    def test_page_locked_batches_come_as_soon_as_they_are_asked_for(self):
        views = sampled()
        loaders = [views.iterator(pin_memory=pin).loader for pin in (False, True, True)]
        assert [loader.pin_memory for loader in loaders] == [False, True, True]
        assert loaders[1] is loaders[2]

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        list(sampled().iterator())
        assert torch.equal(before, torch.get_rng_state())

    def test_travels_without_its_loader(self):
        views = sampled()
        list(views.iterator())
        assert content(pickle.loads(pickle.dumps(views)).iterator()) == content(views.iterator())

    def test_an_error_in_a_worker_reaches_the_user(self):
        with pytest.raises(ValueError, match="None of the 2 images") as caught:
            list(sampled(total=2, broken=(0, 1), batch_size=1, num_workers=1).iterator())
        traceback.clear_frames(caught.tb)  # they keep the loader alive


class TestEvaluationLoader:
    @pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (3, 0), (2, 2)])
    def test_every_image_once_in_order(self, world_size, num_workers):
        batches = []
        for rank in range(world_size):
            batches += evaluation_loader(Numbers(11), draw, 4, num_workers, rank, world_size)
        assert torch.cat([batch["target"] for batch in batches]).tolist() == list(range(11))
        assert torch.cat([batch["asked"] for batch in batches]).tolist() == list(range(11))
        if world_size == 1:
            assert [len(batch["target"]) for batch in batches] == [4, 4, 3]

    def test_replaced_images_are_flagged(self):
        batches = list(evaluation_loader(Numbers(5, broken=(2,)), draw, 2))
        assert [batch["unreadable"].tolist() for batch in batches] == [[], [2], []]
        assert batches[1]["asked"].tolist() == [2, 3]
        assert batches[1]["target"].tolist() == [3, 3]
        assert batches[1]["input"]["image"][:, 0].tolist() == [3, 3]

    def test_views_do_not_depend_on_the_batch_size(self):
        loaders = [evaluation_loader(Numbers(7), draw, batch_size) for batch_size in (2, 7)]
        small, large = (torch.cat([batch["input"]["image"] for batch in loader]) for loader in loaders)
        assert torch.equal(small, large)

    def test_more_processes_than_images(self):
        parts = [list(evaluation_loader(Numbers(2), draw, 4, rank=rank, world_size=3)) for rank in range(3)]
        assert [batch["target"].tolist() for part in parts for batch in part] == [[0], [1]]


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(8, None, 7), (64, "1", 16), (64, "8", 7), (2, "2", 0), (1, "4", 0)]
)
def test_workers_beside_a_gpu(cores: int, processes: str | None, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert number_of_workers(None, use_gpu=True) == workers
    assert number_of_workers(None, use_gpu=False) == 0
    assert number_of_workers(0, use_gpu=True) == 0
    assert number_of_workers(3, use_gpu=False) == 3
