from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_fast.config import VisionConfig
from d2v_fast.data import Batch, ImageDataset
from d2v_fast.data import loader as loader_module
from d2v_fast.data.bad_files import BadFiles, judge_listing
from d2v_fast.data.listing import Listing
from d2v_fast.errors import DataError
from d2v_fast.masking import block_mask_rows
from d2v_fast.modalities.vision.batches import image_dataset
from tests.helpers.squares import Squares, make_config, make_loader

NUM_PATCHES = 16

more_workers_than_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(30):
        noise = generator.integers(0, 256, (20, 25 + i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def by_sample(batches: list[Batch]) -> dict[int, tuple[bytes, tuple[int, ...]]]:
    """Pixels and masked patches of each sample, bit for bit."""
    seen = {}
    for batch in batches:
        for b, sample_id in enumerate(batch.sample_ids.tolist()):
            rows = batch.rows[batch.rows // NUM_PATCHES == b] % NUM_PATCHES
            assert sample_id not in seen
            seen[sample_id] = (batch.inputs[b].numpy().tobytes(), tuple(rows.tolist()))
    return seen


def all_steps(dataset: ImageDataset, config: VisionConfig, split: tuple[int, int, int], num_steps: int) -> list[dict]:
    """For each optimizer step what all processes see together."""
    micro_batch, accumulation, world_size = split
    options = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world_size}
    ranks = [
        list(make_loader(dataset, config, **options, rank=rank, num_steps=num_steps)) for rank in range(world_size)
    ]
    steps = []
    for parts in zip(*ranks, strict=True):
        assert all(len(part.micro_batches) == accumulation for part in parts)
        batches = [batch for part in parts for batch in part.micro_batches]
        assert {part.num_rows for part in parts} == {sum(len(batch.rows) for batch in batches)}
        steps.append(by_sample(batches))
    return steps


SPLITS = [(12, 1, 1), (4, 3, 1), (6, 1, 2), (2, 2, 3), (1, 12, 1)]


@more_workers_than_cores
@pytest.mark.parametrize("kind", ["digits", "images"])
def test_any_workers_and_any_split_give_the_same_samples(kind: str, folder: Path) -> None:
    options = {} if kind == "digits" else {"kind": "images", "path": str(folder), "color_jitter": 0.3}
    config = make_config(**options)
    dataset = image_dataset(config)
    # 30 images are two steps an epoch, so five steps cross its edge twice
    expected = all_steps(dataset, config, SPLITS[0], 5)
    for split in SPLITS[1:]:
        assert all_steps(dataset, config, split, 5) == expected, split
    for num_workers in (1, 3):
        assert all_steps(dataset, make_config(num_workers, **options), (4, 3, 1), 5) == expected, num_workers


@more_workers_than_cores
def test_batches_in_their_order_with_workers() -> None:
    def batches(num_workers: int) -> Iterator[Batch]:
        config = make_config(num_workers)
        dataset = image_dataset(config)
        for step in make_loader(dataset, config, micro_batch=8, accumulation=2, num_steps=6):
            yield from step.micro_batches

    for one, other in zip(batches(0), batches(3), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.sample_ids, other.sample_ids)


def test_an_epoch_sees_every_sample_at_most_once_and_the_next_in_another_order() -> None:
    loader = make_loader(Squares(), make_config(), micro_batch=8, accumulation=4, num_steps=6)
    assert loader.order.steps_per_epoch == 3
    assert loader.order.split.global_batch == 32
    ids = [torch.cat([batch.sample_ids for batch in step.micro_batches]) for step in loader]
    epochs = torch.cat(ids[:3]), torch.cat(ids[3:])
    for epoch in epochs:
        assert len(epoch.unique()) == 96
        assert epoch.max() < 100
    assert not torch.equal(*epochs)
    assert len(list(loader)) == 6


def test_augmentation_and_masks_change_with_the_epoch() -> None:
    config = make_config()
    dataset = image_dataset(config)
    loader = make_loader(dataset, config, micro_batch=len(dataset), num_steps=2)
    first, second = (by_sample(step.micro_batches) for step in loader)
    assert all(first[i][0] != second[i][0] for i in first)
    assert np.mean([first[i][1] == second[i][1] for i in first]) < 0.05


@pytest.mark.parametrize("start_step", [1, 11, 12, 13, 24, 27, 30])
def test_resume_continues_exactly(start_step: int) -> None:
    config = make_config()
    dataset = image_dataset(config)
    options = {"micro_batch": 59, "accumulation": 2, "num_steps": 30}
    whole = list(make_loader(dataset, config, **options))
    rest = list(make_loader(dataset, config, start_step=start_step, **options))
    assert len(whole) == 30
    assert [by_sample(step.micro_batches) for step in rest] == [
        by_sample(step.micro_batches) for step in whole[start_step:]
    ]


def test_batch_contents() -> None:
    config = make_config()
    dataset = image_dataset(config)
    step = next(iter(make_loader(dataset, config, micro_batch=16, accumulation=2)))
    batch, other = step.micro_batches
    assert batch.inputs.shape == (16, 1, 8, 8)
    assert batch.inputs.dtype == torch.float32
    assert batch.rows.dtype == batch.sample_ids.dtype == torch.int64
    rows = block_mask_rows(9, 0, batch.sample_ids.numpy(), 4, 10, 4, None, 0.3)
    np.testing.assert_array_equal(batch.rows, rows)
    assert torch.equal(batch.inputs, dataset.augmented(batch.sample_ids.numpy(), 9, 0)[0])
    assert batch.bad == ()
    assert step.num_rows == len(batch.rows) + len(other.rows)
    moved = batch.to("meta", non_blocking=True)
    assert {moved.inputs.device.type, moved.rows.device.type, moved.sample_ids.device.type} == {"meta"}


@pytest.mark.gpu
def test_pinned_memory(device: torch.device) -> None:
    for num_workers in (0, 1):
        config = make_config(num_workers)
        dataset = image_dataset(config)
        [batch] = next(iter(make_loader(dataset, config, micro_batch=16, pin_memory=True))).micro_batches
        assert batch.inputs.is_pinned()
        assert batch.rows.is_pinned()
        assert torch.equal(batch.to(device, non_blocking=True).inputs.cpu(), batch.inputs)
        loader = make_loader(dataset, config, micro_batch=16, pin_memory=True, device=device)
        [moved] = next(iter(loader)).micro_batches
        assert moved.inputs.device.type == "cuda"
        assert moved.rows.is_pinned()
        assert torch.equal(moved.inputs.cpu(), batch.inputs)


def test_seed_is_the_runs_unless_given() -> None:
    def first(**options: int) -> list[int]:
        step = next(iter(make_loader(Squares(), make_config(), micro_batch=8, **options)))
        return step.micro_batches[0].sample_ids.tolist()

    assert first() == first(seed=9) != first(seed=10)


def test_torch_generator_stays_untouched() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(make_loader(Squares(), make_config(1), micro_batch=8, num_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_start_once_and_end_with_the_iteration() -> None:
    steps = iter(make_loader(Squares(), make_config(2), micro_batch=30))
    next(steps)
    workers = {process.pid for process in multiprocessing.active_children()}
    assert len(workers) == 2
    for _ in range(10):
        # over three epochs
        next(steps)
    assert {process.pid for process in multiprocessing.active_children()} == workers
    steps.close()
    assert multiprocessing.active_children() == []


def test_data_set_smaller_than_a_step() -> None:
    message = (
        r"has 100 samples and a step takes 120 \(20 per micro-batch x 2 micro-steps x 3 processes\). "
        "Lower `train_batch_size` to 100 or less, or add"
    )
    with pytest.raises(DataError, match=message):
        make_loader(Squares(), make_config(), micro_batch=20, accumulation=2, world_size=3)
    assert make_loader(Squares(), make_config(), micro_batch=20, accumulation=5).order.steps_per_epoch == 1


def spoil(folder: Path, num: int) -> list[str]:
    paths = sorted(str(path) for path in folder.iterdir())[:num]
    for path in paths:
        Path(path).write_bytes(b"junk")
    return paths


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_named_once(num_workers: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoilt = spoil(folder, 3)
    config = make_config(num_workers, kind="images", path=str(folder), max_bad_fraction=0.1)
    loader = make_loader(image_dataset(config), config, micro_batch=15, num_steps=6)
    with caplog.at_level(logging.WARNING):
        steps = list(loader)
    assert len(steps) == 6
    assert sorted(text.split(": ")[0] for text in loader.bad_files) == spoilt
    assert len(caplog.messages) == 3
    assert all(any(path in message for message in caplog.messages) for path in spoilt)
    assert "skipped unreadable image number 3: " in caplog.messages[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_files_stop_the_run(num_workers: int, folder: Path) -> None:
    spoilt = spoil(folder, 4)
    config = make_config(num_workers, kind="images", path=str(folder), max_bad_fraction=0.1)
    loader = make_loader(image_dataset(config), config, micro_batch=15, num_steps=4)
    with pytest.raises(
        DataError, match=r"4 of \d+ images are unreadable, and `d2v.data.max_bad_fraction` is 0.1"
    ) as info:
        list(loader)
    assert all(path in str(info.value) for path in spoilt)
    assert multiprocessing.active_children() == []


def test_no_bad_file_allowed(folder: Path) -> None:
    spoil(folder, 1)
    for max_bad_fraction, num_steps in ((0.0, 0), (0.01, 4)):
        config = make_config(kind="images", path=str(folder), max_bad_fraction=max_bad_fraction)
        loader = make_loader(image_dataset(config), config, micro_batch=30, num_steps=4)
        if num_steps:
            assert len(list(loader)) == num_steps
        else:
            with pytest.raises(DataError, match=r"1 of 30 images are unreadable.*\n.*00.png: not a JPEG"):
                list(loader)


def test_one_bad_batch_early_is_no_reason_to_stop() -> None:
    config = make_config(max_bad_fraction=0.01).data
    maker = SimpleNamespace(num_samples=100_000, what="image", listing=Listing())
    bad = BadFiles(config, maker)
    ids = torch.arange(10)
    # 1 % of 1,000 and four standard deviations: those seen so far are a random part of all
    for i in range(23):
        bad.add(Batch(torch.empty(0), ids, ids, bad=(f"{i}.jpg: junk",)))
    with pytest.raises(DataError, match="24 of 240 images"):
        bad.add(Batch(torch.empty(0), ids, ids, bad=("x.jpg: junk",)))
    later = BadFiles(config, maker)
    for i in range(200):
        later.add(Batch(torch.empty(0), ids, torch.arange(100), bad=(f"{i}.jpg: junk",)))


@pytest.mark.waits
@more_workers_than_cores
@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_that_stops_with_a_batch_in_the_queue_is_named(num_workers: int) -> None:
    """The batch lies in memory of the worker, which has to pass it on."""
    steps = iter(make_loader(Squares(), make_config(num_workers), micro_batch=10, num_steps=40, timeout_s=1.5))
    next(steps)
    # so that others are in the queue
    time.sleep(0.5)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"returned no batch for 1.5 s: worker \d \(pid {worker.pid}\) is stopped\.$"):
        list(steps)
    assert time.monotonic() - started < 20
    assert multiprocessing.active_children() == []


def test_worker_that_goes_on_in_time_is_waited_for() -> None:
    steps = iter(make_loader(Squares(), make_config(1), micro_batch=10, num_steps=20, timeout_s=4))
    next(steps)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(1.0, lambda: os.kill(worker.pid, signal.SIGCONT)).start()
    assert len(list(steps)) == 19


def test_worker_killed_while_its_batch_is_taken_over() -> None:
    """torch raises what the broken connection raises where it finds the dead worker too late."""

    class Broken:
        _workers = (SimpleNamespace(pid=2**22 + 1, kill=lambda: None),)

        def __next__(self) -> None:
            raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(DataError, match=r"died, .*worker 0 \(pid \d+\) is dead: ConnectionRefusedError"):
        next(loader_module._micro_batches(Broken(), 0))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a worker five seconds to end, twice."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("killed", DataError, "A data loader worker died, .* lower `d2v.data.num_workers`"),
        ("hangs", DataError, r"A data loader worker returned no batch for 1 s \(worker 0 \(pid \d+\) is due\)"),
        ("raises", KeyError, "in DataLoader worker process 0(.|\n)*no such square"),
        ("data", DataError, "^64 files in a row are unreadable$"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_worker_in_trouble(trouble: str, error: type[Exception], message: str) -> None:
    timeout_s = 1 if trouble == "hangs" else 60
    loader = make_loader(Squares(trouble), make_config(1), micro_batch=10, num_steps=10, timeout_s=timeout_s)
    start = time.monotonic()
    with pytest.raises(error, match=message):
        list(loader)
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []


def test_error_without_workers_is_the_error_itself() -> None:
    with pytest.raises(KeyError, match=r"^'no such square'$"):
        list(make_loader(Squares("raises"), make_config(), micro_batch=10, num_steps=10))


def test_workers_leave_ctrl_c_and_sigterm_to_the_main_process() -> None:
    steps = iter(make_loader(Squares(), make_config(2), micro_batch=30))
    next(steps)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    for _ in range(20):
        next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()


@pytest.mark.waits
def test_workers_do_not_hold_up_the_end_of_the_process() -> None:
    script = """
import sys, time
from tests.helpers.squares import Squares, make_config, make_loader
steps = iter(make_loader(Squares(), make_config(2), micro_batch=30))
next(steps)
print(time.time(), flush=True)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    ended = time.time()
    assert done.returncode == 7, done.stderr
    assert done.stderr == ""
    # a worker that were waited for would take a minute
    assert ended - float(done.stdout) < 30


def test_shared_memory_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 0, 0, 0, 0, 255))
    monkeypatch.setattr(loader_module.os, "statvfs", lambda path: full)
    with pytest.raises(DataError, match=re.escape("2 workers need up to 0 MB of it and 0 MB are free")):
        make_loader(Squares(), make_config(2), micro_batch=30)
    make_loader(Squares(), make_config(0), micro_batch=30)


def a_maker(num_samples: int, num_bad: int, num_files: int) -> SimpleNamespace:
    bad = tuple(f"{i}.wav: an empty file" for i in range(num_bad))
    return SimpleNamespace(
        num_samples=num_samples, what="recording", listing=Listing({".wav": num_files}, bad_files=bad)
    )


@pytest.mark.parametrize(
    ("num_samples", "num_bad", "num_files", "stops"),
    [
        # 0.4 % of all
        (2988, 12, 3000, False),
        (2970, 30, 3000, False),
        (2969, 31, 3000, True),
        # those that are too short are files as well
        (100, 30, 3000, False),
        (20, 1, 21, False),
        (19, 2, 21, True),
    ],
)
def test_unreadable_files_of_the_listing_are_judged_against_all_files(
    num_samples: int, num_bad: int, num_files: int, stops: bool
) -> None:
    config, maker = make_config(max_bad_fraction=0.01).data, a_maker(num_samples, num_bad, num_files)
    if stops:
        with pytest.raises(DataError, match=rf"^{num_bad} of {num_files:,} recordings are unreadable"):
            judge_listing(config, maker)
        return
    judge_listing(config, maker)
    bad = BadFiles(config, maker)
    assert len(bad.files) == num_bad
    bad.add(Batch(torch.empty(0), torch.arange(20), torch.arange(20)))
    with pytest.raises(DataError, match="strict` is true"):
        judge_listing(config.model_copy(update={"strict": True}), maker)


def test_files_of_the_listing_count_with_those_that_are_met_later() -> None:
    config, ids = make_config(max_bad_fraction=0.01).data, torch.arange(10)
    bad = BadFiles(config, a_maker(2970, 30, 3000))
    with pytest.raises(DataError, match="31 of 3,000 recordings are unreadable"):
        bad.add(Batch(torch.empty(0), ids, ids, bad=("silent.wav: silent",)))


def test_share_just_below_the_limit_does_not_stop_a_run_by_chance() -> None:
    """Of 20,000 files 0.9 % are unreadable, where 1 % is allowed: whatever the order, the run goes on."""
    config = make_config(max_bad_fraction=0.01).data
    for seed in range(50):
        order = np.random.default_rng(seed).permutation(20_000)
        bad = BadFiles(config, a_maker(20_000, 0, 20_000))
        for start in range(0, 20_000, 100):
            ids = order[start : start + 100]
            found = tuple(f"{i}.wav: silent" for i in ids if i < 180)
            bad.add(Batch(torch.empty(0), torch.empty(0), torch.from_numpy(ids), bad=found))


@pytest.mark.parametrize("message", ["DataLoader worker (pid 1) is killed by signal: Killed. ", "something else"])
def test_worker_that_dies_while_all_are_ended_is_no_error(message: str) -> None:
    """torch raises that out of a signal handler; it would take the place of what ended them."""

    class Workers:
        def _shutdown_workers(self) -> None:
            raise RuntimeError(message)

    with nullcontext() if "killed" in message else pytest.raises(RuntimeError, match="something else"):
        loader_module._stop_workers(Workers())
