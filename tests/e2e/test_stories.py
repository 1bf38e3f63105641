"""The stories of the README, typed by hand."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from typing_by_hand import bundle_digest, command, environment, facts_of, run_millrace, states_of, write_table


def test_a_strangers_table_needs_no_code(tmp_path: Path) -> None:
    write_table(tmp_path / "cancer.csv")
    run_millrace(tmp_path, "init", "--data", "cancer.csv", "--label", "target")
    text = (tmp_path / "millrace.yaml").read_text()
    assert "patient" in text, "a unique id is ignored"
    done = run_millrace(tmp_path, "run")
    assert "569 in" in done.stdout
    assert "signed -> champion (first version)" in done.stdout
    facts = facts_of(tmp_path)
    assert facts["evaluate"]["metrics"][0]["value"] > 0.9
    assert facts["serve"]["answered"] == facts["serve"]["requests"]
    assert facts["serve"]["wrong"] == 0
    assert (tmp_path / "report.html").is_file()
    rows = run_millrace(tmp_path, "predict", "cancer", "--input", "cancer.csv", "--json")
    answers = json.loads(rows.stdout)
    assert len(answers) == 569
    assert set(answers[0]["probabilities"]) == {"benign", "malignant"}
    listed = json.loads(run_millrace(tmp_path, "models", "--json").stdout)
    assert listed[0]["aliases"] == ["champion"]
    assert json.dumps(listed).count("sha256:") == 1
    run_millrace(tmp_path, "models", "export", "cancer@champion", "--to", "out")
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert (tmp_path / "out" / "variants").is_dir()


def test_regression_throughout(tmp_path: Path) -> None:
    write_table(tmp_path / "diabetes.csv", "regression")
    run_millrace(tmp_path, "init", "--data", "diabetes.csv", "--label", "target")
    done = run_millrace(tmp_path, "run")
    facts = facts_of(tmp_path)
    assert facts["data"]["task"] == "regression"
    assert facts["serve"]["wrong"] == 0
    assert "Serving" in done.stdout
    answers = json.loads(run_millrace(tmp_path, "predict", "diabetes", "--input", "diabetes.csv", "--json").stdout)
    assert isinstance(answers[0]["value"], float)


def test_again_is_cached_and_a_change_says_why(finished: Path) -> None:
    digest = bundle_digest(finished)
    done = run_millrace(finished, "run")
    assert done.stdout.count("(cached)") == 8
    assert set(states_of(finished).values()) == {"cached"}
    assert bundle_digest(finished) == digest
    plan = json.loads(run_millrace(finished, "run", "--dry-run", "--json", "--set", "train.seed=1").stdout)
    steps = {step["name"]: step for step in plan["steps"]}
    assert steps["data"]["action"] == "cached"
    assert "seed 0 → 1" in steps["train"]["reason"]
    assert (steps["export"]["action"], steps["export"]["reason"]) == (
        "may run",
        "after train (kept if train's outputs are equal)",
    )


def test_a_plan_before_the_first_run_promises_nothing_kept(small: Path) -> None:
    plan = json.loads(run_millrace(small, "run", "--dry-run", "--json").stdout)
    assert {step["action"] for step in plan["steps"]} == {"run"}
    assert [step["reason"] for step in plan["steps"]][:2] == ["first time", "first time, after data"]
    assert not (small / ".millrace").exists(), "a plan writes nothing"


def test_other_slices_and_another_confidence_do_not_train_again(finished: Path) -> None:
    change = ("--set", "evaluate.slices=[mean_radius]", "--set", "evaluate.confidence=0.9")
    planned = run_millrace(finished, "run", "--dry-run", *change).stdout
    why = {line.split()[0]: line for line in planned.splitlines()}
    assert "evaluate.confidence 0.95 → 0.9, evaluate.slices [] → [" in why["evaluate"]
    assert "may run" in why["register"]
    assert all("cached" in why[step] for step in ("data", "train", "export"))
    run_millrace(finished, "run", *change)
    states = states_of(finished)
    assert [states[step] for step in ("data", "train", "export", "evaluate")] == ["cached"] * 3 + ["succeeded"]
    assert facts_of(finished)["evaluate"]["slices"]
    # The deciding metric is another matter: it picks the candidate.
    metric = json.loads(
        run_millrace(finished, "run", "--dry-run", "--json", "--set", "evaluate.metrics=[log_loss]").stdout
    )
    reasons = {step["name"]: (step["action"], step["reason"]) for step in metric["steps"]}
    assert reasons["train"] == ("run", 'evaluate.metrics [] → ["log_loss"]')


def test_what_may_run_is_kept_where_its_inputs_come_out_equal(finished: Path) -> None:
    """The same rows in a file with other line ends: the dataset is the same, and so is all that follows."""
    content = (finished / "cancer.csv").read_bytes()
    (finished / "cancer.csv").write_bytes(content.replace(b"\r\n", b"\n"))
    assert content != (finished / "cancer.csv").read_bytes()
    plan = json.loads(run_millrace(finished, "run", "--dry-run", "--json").stdout)
    assert [step["action"] for step in plan["steps"]] == ["run"] + ["may run"] * 7
    run_millrace(finished, "run")
    assert list(states_of(finished).values()) == ["succeeded"] + ["cached"] * 7


def test_a_second_run_joins_the_first(small: Path) -> None:
    first = subprocess.Popen(
        command("run"), cwd=small, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 30
    while not json.loads(run_millrace(small, "runs", "--json").stdout):
        assert time.monotonic() < deadline
    second = run_millrace(small, "run")
    first.communicate()
    assert first.returncode == 0
    runs = json.loads(run_millrace(small, "runs", "--json").stdout)
    assert len(runs) <= 2
    if "following it" in second.stdout:
        assert len(runs) == 1
    assert len(json.loads(run_millrace(small, "models", "--json").stdout)) == 1


def test_own_steps_run_in_parallel_with_a_matrix(tmp_path: Path) -> None:
    (tmp_path / "millrace.yaml").write_text(
        "project: own\nsteps:\n"
        "- {name: double, uses: 'steps.py:double', matrix: {x: [1, 2, 3]}}\n"
        "- {name: script, uses: script.sh, params: {word: hello}}\n"
        "- {name: total, uses: 'steps.py:total', needs: [double, script]}\n"
    )
    (tmp_path / "steps.py").write_text(
        "import json\n"
        "def double(ctx, x):\n"
        "    path = ctx.scratch / 'value.json'\n"
        "    path.write_text(json.dumps(2 * x))\n"
        "    ctx.output('value', path)\n"
        "    return {'value': 2 * x}\n"
        "def total(ctx):\n"
        "    names = [f'double-{i}.value' for i in range(3)]\n"
        "    assert ctx.has_input('script.files')\n"
        "    return {'total': sum(json.loads(ctx.input(n).read_text()) for n in names)}\n"
    )
    (tmp_path / "script.sh").write_text('echo "$MILLRACE_PARAMS" > "$MILLRACE_OUTPUT/params.json"\n')
    run_millrace(tmp_path, "run")
    assert facts_of(tmp_path)["total"] == {"total": 12}


def test_a_users_error_shows_the_users_line_first(tmp_path: Path) -> None:
    (tmp_path / "millrace.yaml").write_text("project: own\nsteps: [{name: broken, uses: 'steps.py:broken'}]\n")
    (tmp_path / "steps.py").write_text("def broken(ctx):\n    numbers = []\n    return numbers[3]\n")
    done = run_millrace(tmp_path, "run", code=5)
    assert "steps.py:3 in broken: IndexError" in done.stderr
    assert "log:" in done.stderr
    assert done.stderr.index("steps.py:3") < done.stderr.index("log:")
    logs = run_millrace(tmp_path, "logs")
    assert "IndexError" in logs.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("run",), 3, "there is no spec"),
        (("predict", "nothing", "--input", "x.csv"), 3, "there is no model 'nothing'"),
        (("models", "show", "../x"), 2, "want a name"),
        (("runs", "show", "abc"), 3, "no run"),
        (("init", "digit", "x"), 3, "there is no template"),
        (("init", "--data", "none.csv", "--label", "y"), 3, "there is no file"),
        (("init",), 2, "want a template"),
        (("serve", "nothing"), 3, "there is no model"),
        (("serve", "nothing", "--host", "0.0.0.0"), 2, "loopback"),
        (("datasets", "diff", "a", "b"), 3, "there is no dataset"),
        (("models", "register", "none.onnx"), 3, "there is no file"),
    ],
)
def test_mistakes_end_in_one_clear_message(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = run_millrace(tmp_path, *arguments, code=code)
    assert text in done.stderr
    assert "hint:" in done.stderr


def test_an_empty_list_says_where_it_looked(tmp_path: Path) -> None:
    for noun in ("runs", "models", "datasets", "alerts", "endpoints"):
        assert str(tmp_path / ".millrace") in run_millrace(tmp_path, noun).stdout
        assert json.loads(run_millrace(tmp_path, noun, "--json").stdout) == []
