"""Checkpoints: whole or not there, damaged ones give way, a full disk leaves the one before."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from millrace.core.errors import DiskFullError
from millrace.train.checkpoint import CheckpointStore


def tensors(value: float, size: int = 4) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((size,), value), "optimizer/0/step": torch.tensor(value)}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(3, 4),
        "b": torch.randn(2).to(torch.bfloat16),
        "n": torch.tensor(7),
        "t": torch.randn(4, 3).t(),
    }
    CheckpointStore(tmp_path, "f").save(5, weights, {"epoch": 1, "loss": 0.1 + 0.2, "best": None})
    found = CheckpointStore(tmp_path, "f").newest()
    assert found is not None
    assert found.step == 5
    assert found.data == {"epoch": 1, "loss": 0.1 + 0.2, "best": None}
    assert all(torch.equal(found.tensors[name], value) for name, value in weights.items())


def test_the_last_two_and_their_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "f")
    for step in range(1, 7):
        if step in (1, 3):
            store.save_best(step, tensors(step))
        store.save(step, tensors(step), {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.startswith("step")] == [
        f"step-000000000{step}.{kind}" for step in (5, 6) for kind in ("json", "safetensors")
    ]
    assert [name for name in names if name.startswith("best")] == ["best-0000000003.safetensors"]
    found = CheckpointStore(tmp_path, "f").newest()
    assert found is not None
    assert found.best["model/w"][0] == 3


def test_of_another_training_nothing_is_read(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, "f").save(1, tensors(1), {})
    assert CheckpointStore(tmp_path, "other").newest() is None
    assert CheckpointStore(tmp_path / "absent", "f").newest() is None


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path, suffix: str, damage: str) -> None:
    store = CheckpointStore(tmp_path, "f")
    for step in (1, 2):
        store.save(step, tensors(step), {"loss_sum": 123.456, "words": "abc"})
    path = tmp_path / f"step-0000000002.{suffix}"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        place = data.index(b"123.456") if suffix == "json" else len(data) - 1
        data[place] ^= 1
    path.write_bytes(bytes(data[: len(data) // 2]) if damage == "cut" else b"" if damage == "empty" else bytes(data))
    if damage == "gone":
        path.unlink()
    found = CheckpointStore(tmp_path, "f").newest()
    assert found is not None
    assert found.step == 1


def test_a_damaged_best_makes_its_checkpoint_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "f")
    store.save(1, tensors(1), {})
    store.save_best(2, tensors(2))
    store.save(2, tensors(2), {})
    best = tmp_path / "best-0000000002.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    found = CheckpointStore(tmp_path, "f").newest()
    assert found is not None
    assert found.step == 1


def test_what_a_kill_left_half_written_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-0000000001.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "step-0000000001.safetensors").write_bytes(b"without a listing")
    store = CheckpointStore(tmp_path, "f")
    assert store.newest() is None
    store.save(2, tensors(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000002.json", "step-0000000002.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_keeps_the_checkpoint_before_and_continues_after(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "c", "f")
    store.save(1, tensors(1, 50_000), {})
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while stream.write(b"x" * 4096):
            pass
    before = sorted(path.name for path in (small_disk / "c").iterdir())
    with pytest.raises(DiskFullError, match="the previous one is kept"):
        store.save(2, tensors(2, 50_000), {})
    assert sorted(path.name for path in (small_disk / "c").iterdir()) == before
    found = CheckpointStore(small_disk / "c", "f").newest()
    assert found is not None
    assert found.step == 1
    ballast.unlink()
    store.save(2, tensors(2, 50_000), {})
    found = CheckpointStore(small_disk / "c", "f").newest()
    assert found is not None
    assert found.step == 2
