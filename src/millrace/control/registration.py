"""The stage `register`: bundle, reference profile, golden answers, and the gate against the champion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.control.card import render_card
from millrace.control.gate import judge_challenger
from millrace.core.facts import GateFacts, RegisterFacts
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.bundle import BundleContents, open_bundle, write_bundle
from millrace.formats.dataset import open_dataset
from millrace.formats.session import open_session
from millrace.formats.signature import Signature
from millrace.stats.drift import build_reference

GOLDEN_ROWS = 16
CHUNK_ROWS = 1024


def answer_all(model: Path | bytes, tensors: dict[str, np.ndarray], threads: int) -> dict[str, np.ndarray]:
    """Outputs of a model on all rows, chunk by chunk.

    Args:
        model: The ONNX file, or its bytes.
        tensors: Input tensors by name; the first dimension is the row.
        threads: For onnxruntime.
    """
    session = open_session(model, threads=threads)
    rows = len(next(iter(tensors.values())))
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, rows, CHUNK_ROWS):
        parts.append(session.run({name: tensor[start : start + CHUNK_ROWS] for name, tensor in tensors.items()}))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def register(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Build the bundle and decide whether it may become the alias.

    Outputs `bundle` (a tree whose digest covers only functions of data, spec, code and seed),
    `measurements` and `card`. Control signs and records them.
    """
    reader = open_dataset(ctx.input("data.dataset"))
    onnx = ctx.input("export.onnx")
    signature = msgspec.json.decode((onnx / "signature.json").read_bytes(), type=Signature)
    tensors, labels = reader.arrays("test"), reader.labels("test")
    outputs = answer_all(onnx / "model.onnx", tensors, ctx.threads)
    variants = ctx.input("compress.variants")
    measured = ctx.input("compress.measurements") / "measurements.json"
    chosen = str(msgspec.json.decode(measured.read_bytes()).get("chosen", "fp32"))
    gate = _gate(spec, ctx, signature, tensors, labels, outputs)
    folder = ctx.scratch / "bundle"
    guarantees = variants / "guarantees.json"
    write_bundle(
        folder,
        BundleContents(
            model=onnx / "model.onnx",
            variants={path.stem: path for path in sorted(variants.glob("*.onnx"))},
            signature=signature,
            metrics=_metrics(ctx.params["evaluate"]),
            lineage=ctx.params["lineage"],
            guarantees=msgspec.json.decode(guarantees.read_bytes()) if guarantees.is_file() else {},
            reference=build_reference(tensors, outputs, signature),
            golden={
                "inputs": {name: tensor[:GOLDEN_ROWS] for name, tensor in tensors.items()},
                "outputs": {name: output[:GOLDEN_ROWS] for name, output in outputs.items()},
            },
        ),
    )
    ctx.output("bundle", folder)
    copy = ctx.scratch / "measurements.json"
    shutil.copyfile(measured, copy)
    ctx.output("measurements", copy)
    facts = RegisterFacts(model=ctx.params["model"], gate=gate, variant=chosen)
    card = ctx.scratch / "MODEL_CARD.md"
    card.write_text(render_card(_card_facts(ctx.params, facts), spec.project), encoding="utf-8")
    ctx.output("card", card)
    return msgspec.to_builtins(facts)


def _metrics(evaluate: dict[str, Any]) -> list[dict[str, Any]]:
    return list(evaluate.get("metrics", []))


def _card_facts(params: dict[str, Any], facts: RegisterFacts) -> dict[str, Any]:
    sections = {name: params[name] for name in ("data", "train", "evaluate", "compress") if name in params}
    return {**sections, "register": msgspec.to_builtins(facts)}


def _gate(
    spec: Spec,
    ctx: Context,
    signature: Signature,
    tensors: dict[str, np.ndarray],
    labels: np.ndarray,
    outputs: dict[str, np.ndarray],
) -> GateFacts:
    if not ctx.has_input("champion.bundle"):
        return GateFacts(verdict="first", explanation="first version")
    champion = open_bundle(ctx.input("champion.bundle"), signature=None, verifier=None, expected_digest=None)
    name = str(ctx.params["champion"])
    if champion.signature.inputs != signature.inputs or champion.signature.classes != signature.classes:
        text = f"{name} reads other columns or answers other classes: these rows cannot compare them; promote by hand"
        return GateFacts(verdict="undecided", champion=name, rows=len(labels), explanation=text)
    theirs = answer_all(champion.model("fp32"), tensors, ctx.threads)
    return judge_challenger(
        spec.register, signature.task, labels, challenger=outputs, champion=theirs, champion_name=name,
        looks=int(ctx.params["looks"]), confidence=spec.evaluate.confidence,
    )  # fmt: skip
