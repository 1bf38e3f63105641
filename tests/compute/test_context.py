"""The context of a step, in real workers, with real blobs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from millrace.compute.local import LocalCompute
from millrace.compute.worker import WorkerContext, WorkerLink, run_stage
from millrace.core.errors import NotFoundError
from millrace.core.ports import Context, Work, WorkResult
from millrace.core.spec import Compress, Spec, Train
from millrace.core.types import Artifact
from millrace.core.units import Share
from millrace.store.blobs_local import LocalBlobs
from millrace.testing.compute import PATIENCE_S, Frames

MODULE = Path(__file__).stem


def entry(work: Work, link: WorkerLink) -> dict[str, Any]:
    """What wiring does: the home's blobs, then the stage."""
    return run_stage(work, link, LocalBlobs(Path(work.home_dir) / "blobs"))


def look(spec: Spec, ctx: Context) -> dict[str, Any]:
    (ctx.scratch / "x").write_text("x")
    (ctx.checkpoints / "epoch.json").write_text("{}")
    return {
        "is_context": isinstance(ctx, Context),
        "drop": isinstance(spec.compress.max_drop, Share) and float(spec.compress.max_drop),
        "epochs": spec.train.epochs,
        "seed": ctx.seed, "threads": ctx.threads, "device": ctx.device, "params": ctx.params,
        "project": str(ctx.project_dir), "draws": [random.random(), float(np.random.rand())],
        "has": [ctx.has_input("data.dataset"), ctx.has_input("data.nothing")],
    }  # fmt: skip


def copy(spec: Spec, ctx: Context) -> dict[str, Any]:
    tree, blob = ctx.input("data.dataset"), ctx.input("register.signature")
    again = ctx.input("data.dataset")
    out = ctx.scratch / "out"
    shutil.copytree(tree, out, copy_function=shutil.copyfile)
    (out / "more.txt").write_bytes(blob.read_bytes())
    ctx.output("tree", out)
    ctx.output("file", out / "more.txt")
    return {"tree": str(tree), "same": tree == again, "names": sorted(path.name for path in tree.iterdir())}


def resume(spec: Spec, ctx: Context) -> dict[str, Any]:
    found = (ctx.checkpoints / "step").exists()
    stale = (ctx.scratch / "stale").exists()
    (ctx.checkpoints / "step").write_text("1")
    (ctx.scratch / "stale").write_text("1")
    if not found:
        raise RuntimeError("first attempt")
    return {"stale": stale}


def odd(spec: Spec, ctx: Context) -> Any:
    facts: dict[str, Any] = {
        "numpy": {
            "score": np.float64(0.5),
            "n": np.int64(3),
            "rows": np.arange(3),
            "path": Path("a/b"),
            "share": Share(0.5),
        },
        "object": {"model": object()},
        "list": [1, 2],
        "none": None,
    }
    return facts[ctx.params["facts"]]


@pytest.fixture
def compute(tmp_path: Path) -> Iterator[LocalCompute]:
    # the worker imports this file by its name
    compute = LocalCompute(tmp_path, f"{MODULE}:entry")
    yield compute
    compute.close()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def run(compute: LocalCompute, home: Path, function: str, **fields: Any) -> WorkResult:
    values: dict[str, Any] = {
        "step_id": "s" * 32, "run_id": "r", "name": function, "implementation": f"{MODULE}:{function}",
        "spec": msgspec.json.encode(Spec(train=Train(epochs=3), compress=Compress(max_drop=Share(0.01))), enc_hook=float),
        "project_dir": str(home), "scratch_dir": str(home / "scratch" / "steps" / function),
        "log_path": str(home / "logs" / "step.log"), "home_dir": str(home), **fields,
    }  # fmt: skip
    result = compute.submit(Work(**values), Frames()).wait(PATIENCE_S)
    assert result is not None
    return result


def test_a_stage_sees_its_spec_and_its_context(compute: LocalCompute, tmp_path: Path) -> None:
    inputs = {"data.dataset": Artifact(digest="sha256:" + "0" * 64, size_bytes=0)}
    result = run(compute, tmp_path, "look", seed=7, threads=2, device="cpu", params={"a": 1}, inputs=inputs)
    assert result.state == "succeeded", result.error
    facts = result.facts
    assert facts.pop("draws") == run(compute, tmp_path, "look", seed=7).facts["draws"]
    assert facts == {
        "is_context": True, "drop": 0.01, "epochs": 3, "seed": 7, "threads": 2, "device": "cpu", "params": {"a": 1},
        "project": str(tmp_path), "has": [True, False],
    }  # fmt: skip
    assert not (tmp_path / "scratch" / "steps" / "look").exists()


def test_inputs_come_from_blobs_and_outputs_go_there(compute: LocalCompute, tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    inputs = {"data.dataset": blobs.put_tree(folder), "register.signature": blobs.put(b"signed")}
    result = run(compute, tmp_path, "copy", inputs=inputs)
    assert result.state == "succeeded", result.error
    assert result.facts["names"] == ["a.txt"]
    assert result.facts["same"]
    assert result.facts["tree"].startswith(str(tmp_path / "scratch" / "trees"))
    assert [entry.path for entry in blobs.tree(result.outputs["tree"].digest)] == ["a.txt", "more.txt"]
    assert blobs.read(result.outputs["file"].digest) == b"signed"


def test_a_damaged_input_is_refused_by_name(compute: LocalCompute, tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    artifact = blobs.put(b"signed")
    path = blobs.path(artifact.digest)
    path.chmod(0o644)
    path.write_bytes(b"signeD")
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    inputs = {"data.dataset": blobs.put_tree(folder), "register.signature": artifact}
    error = run(compute, tmp_path, "copy", inputs=inputs).error
    assert error is not None
    assert error["code"] == "artifact.corrupt"
    assert artifact.digest[7:19] in error["message"]


def test_an_unknown_input_names_the_known_ones(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    work = Work(
        step_id="s", run_id="r", name="export", implementation="m:f", spec=b"{}", home_dir=str(tmp_path),
        inputs={"train.model": blobs.put(b"x")},
    )  # fmt: skip
    context = WorkerContext(work, None, blobs)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match=r"export has no input 'train\.models'") as caught:
        context.input("train.models")
    assert "train.model" in caught.value.hint


def test_checkpoints_survive_and_scratch_does_not(compute: LocalCompute, tmp_path: Path) -> None:
    first = run(compute, tmp_path, "resume")
    assert first.state == "failed"
    assert "first attempt" in str(first.error)
    second = run(compute, tmp_path, "resume")
    assert second.facts == {"stale": False}
    assert not (tmp_path / "scratch" / "steps" / "resume").exists()


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ("numpy", {"score": 0.5, "n": 3, "rows": [0, 1, 2], "path": "a/b", "share": 0.5}),
        ("none", {}),
        ("object", "plain data"),
        ("list", "dictionary of facts, got list"),
    ],
)
def test_facts_are_plain_data(compute: LocalCompute, tmp_path: Path, facts: str, wanted: Any) -> None:
    result = run(compute, tmp_path, "odd", params={"facts": facts})
    if isinstance(wanted, dict):
        assert result.facts == wanted
    else:
        assert result.error is not None
        assert wanted in result.error["message"]
