"""Runs a user's own step: a Python function `(ctx, **params)`, or a script with its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from millrace.core.errors import InputError, StageError
from millrace.core.ports import Context
from millrace.core.source_code import load_source
from millrace.core.spec import Spec


def run_user_step(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Run `uses` of a step.

    A function is called as `function(ctx, **params)`; a dictionary that it returns becomes the step's facts.
    A script finds MILLRACE_PARAMS (JSON), MILLRACE_OUTPUT (a folder whose files become the output
    `files`) and MILLRACE_PROJECT in its environment.

    Raises:
        InputError: There is no such function.
        StageError: The script ended with a code other than 0.
    """
    uses: str = ctx.params["uses"]
    values: dict[str, Any] = ctx.params["values"]
    if uses.endswith((".py", ".sh")):
        return _run_script(uses, values, spec.project, ctx)
    name, _, function_name = uses.partition(":")
    module = load_module(ctx.project_dir / name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{name} has no function {function_name!r}", hint=f"define it in {name}, or correct `uses`")
    facts = function(ctx, **values)
    if facts is not None and not isinstance(facts, dict):
        raise StageError(f"{uses} must return a dictionary of facts or nothing, got {type(facts).__name__}")
    return facts or {}


def load_module(path: Path) -> ModuleType:
    """A module from a file; modules beside it can be imported."""
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return load_source(path)


def _run_script(script: str, values: dict[str, Any], project: str, ctx: Context) -> dict[str, Any]:
    output = ctx.scratch / "files"
    output.mkdir()
    command = [sys.executable, script] if script.endswith(".py") else ["bash", script]
    environment = {
        **os.environ,
        "MILLRACE_PARAMS": json.dumps(values),
        "MILLRACE_OUTPUT": str(output),
        "MILLRACE_PROJECT": project,
        **{name: ctx.secret(name) for name in ctx.params.get("secrets", ())},
    }
    done = subprocess.run(command, cwd=ctx.project_dir, env=environment, check=False)
    if done.returncode != 0:
        raise StageError(f"{script} ended with code {done.returncode}; it must end with 0")
    if any(output.iterdir()):
        ctx.output("files", output)
    return {"exit_code": 0}
