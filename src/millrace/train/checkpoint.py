"""Checkpoints that survive `kill -9`: safetensors and JSON; whole or not there at all.

A checkpoint is `step-N.safetensors` and then `step-N.json`, which holds the digests of both: without a
valid JSON file there is no checkpoint. The two newest are kept, and the best weights they name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from millrace.core.errors import DiskFullError
from millrace.core.ids import digest_bytes, digest_json

KEPT = 2
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint: tensors by name, JSON data, and the best weights where there are some."""

    step: int
    tensors: dict[str, torch.Tensor]
    data: dict[str, Any]
    best: dict[str, torch.Tensor] = {}


class _Listing(msgspec.Struct, kw_only=True):
    step: int
    fingerprint: str
    tensors_digest: str
    data: dict[str, Any]
    data_digest: str
    best: str = ""
    best_digest: str = ""


class CheckpointStore:
    """Checkpoints of one training in one folder; one writer.

    Args:
        folder: Survives kills of the step.
        fingerprint: Of everything the training depends on: checkpoints of another are not read.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._best = ""
        self._best_digest = ""

    def save_best(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the best weights so far; the checkpoints saved from now on name them.

        Raises:
            DiskFullError: Nothing half-written remains.
        """
        data = save(_detached(tensors))
        name = f"best-{step:010d}.safetensors"
        self._write(name, data)
        self._best, self._best_digest = name, digest_bytes(data)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], data: dict[str, Any]) -> None:
        """Write a checkpoint, durable when this returns, then forget old ones.

        Args:
            step: How many optimiser steps are done.
            tensors: On any device.
            data: Plain JSON data.

        Raises:
            DiskFullError: Nothing half-written remains and the previous checkpoint is kept.
        """
        stored = save(_detached(tensors))
        name = f"step-{step:010d}"
        listing = _Listing(
            step=step,
            fingerprint=self._fingerprint,
            tensors_digest=digest_bytes(stored),
            data=data,
            data_digest=digest_json(data),
            best=self._best,
            best_digest=self._best_digest,
        )
        self._write(f"{name}.safetensors", stored)
        self._write(f"{name}.json", msgspec.json.encode(listing))
        self._forget_old()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and ours; a damaged one gives way to the one before."""
        for path in sorted(self._folder.glob("step-*.json"), reverse=True):
            found = self._read(path)
            if found is not None:
                return found
        return None

    def _read(self, path: Path) -> Checkpoint | None:
        try:
            listing = msgspec.json.decode(path.read_bytes(), type=_Listing)
            if listing.fingerprint != self._fingerprint or digest_json(listing.data) != listing.data_digest:
                return None
            tensors = self._tensors(path.with_suffix(".safetensors"), listing.tensors_digest)
            best = self._tensors(self._folder / listing.best, listing.best_digest) if listing.best else {}
        except (OSError, msgspec.MsgspecError, SafetensorError):
            return None
        if tensors is None or best is None:
            return None
        self._best, self._best_digest = listing.best, listing.best_digest
        return Checkpoint(step=listing.step, tensors=tensors, data=listing.data, best=best)

    def _tensors(self, path: Path, digest: str) -> dict[str, torch.Tensor] | None:
        data = path.read_bytes()
        return load(data) if digest_bytes(data) == digest else None

    def _write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.tmp"
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(self._folder / name)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in _FULL:
                raise DiskFullError(
                    f"the disk is full: a checkpoint of {len(data)} bytes does not fit in {self._folder}; "
                    "the previous one is kept"
                ) from error
            raise

    def _forget_old(self) -> None:
        """Listings go before what they name: a kill in between leaves no listing without its files."""
        listings = sorted(self._folder.glob("step-*.json"), reverse=True)
        kept_best = {self._best}
        for path in listings[:KEPT]:
            try:
                kept_best.add(msgspec.json.decode(path.read_bytes(), type=_Listing).best)
            except msgspec.MsgspecError:
                continue  # damaged: it names nothing
        for path in listings[KEPT:]:
            path.unlink(missing_ok=True)
        kept = {path.stem for path in listings[:KEPT]}
        for path in [*self._folder.glob("*.safetensors"), *self._folder.glob(".*.tmp")]:
            if path.stem not in kept and path.name not in kept_best:
                path.unlink(missing_ok=True)


def _detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
