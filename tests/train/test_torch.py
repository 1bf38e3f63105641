"""PyTorch: what our loop does with good and with bad models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from millrace.core.errors import InputError, NotFoundError, StageError, StepMemoryError
from millrace.core.facts import TrainFacts
from millrace.core.spec import EarlyStopping, Train
from millrace.formats.dataset import open_dataset
from millrace.stats.metrics import wilson
from millrace.train import torch_training
from millrace.train.checkpoint import CheckpointStore
from millrace.train.loop import Hooks, Trainer, Validation, make_optimizer
from millrace.train.rows import row_order
from millrace.train.stage import train
from millrace.train.torch_training import Target, TensorRows
from millrace.train.usercode import load_function

HEAD = "import torch\nfrom torch import nn\n"
MLP = HEAD + (
    "def build(ctx):\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(ctx.features, 32), nn.ReLU(), nn.Linear(32, ctx.outputs))\n"
)


def run(project: Any, code: str, evaluate: dict[str, Any] | None = None, **section: Any) -> tuple[dict[str, Any], Any]:
    (project.folder / "model.py").write_text(code)
    spec = project.spec(train={"model": "model.py:build", "epochs": 2, **section}, evaluate=evaluate or {})
    context = project.context("train")
    return train(spec, context), context


def weights(project: Any) -> dict[str, torch.Tensor]:
    return load_file(project.context("x").input("train.model") / "weights.safetensors")


def test_digits_are_learnt_and_reported(digits: Any) -> None:
    facts, context = run(digits, MLP, epochs=6, optimizer={"name": "adamw", "lr": 5e-3}, schedule="one_cycle")
    assert facts["metric"] == "accuracy"
    assert facts["best_score"] > 0.9
    assert [line["epoch"] for line in facts["epochs"]] == [1, 2, 3, 4, 5, 6]
    assert facts["epochs"][-1]["loss"] < facts["epochs"][0]["loss"] / 4
    assert facts["parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    assert set(facts) == set(TrainFacts.__struct_fields__)
    done, total, text = context.lines[-1]
    assert (done, total) == (6, 6)
    assert text.startswith("loss .")
    assert text.endswith(" %")
    assert {name for name, _, _ in context.points} >= {"epoch_loss", "validation_loss", "validation_accuracy"}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "linear", "step"])
def test_every_optimiser_and_schedule_lowers_the_loss_and_repeats(name: str, schedule: str, digits: Any) -> None:
    rate = 0.05 if name == "sgd" else 2e-3
    section = {"optimizer": {"name": name, "lr": rate}, "schedule": schedule, "clip_norm": 1.0}
    facts, _ = run(digits, MLP, **section)
    assert facts["epochs"][1]["loss"] < facts["epochs"][0]["loss"]
    before = weights(digits)
    run(digits, MLP, **section)
    assert all(torch.equal(before[key], value) for key, value in weights(digits).items())


def test_our_steps_are_those_of_plain_torch(digits: Any) -> None:
    """The reference loop is written with torch alone, from the documented order and schedule."""
    run(digits, MLP, epochs=2, batch_size=100, accumulate=3, clip_norm=0.3, optimizer={"name": "sgd", "lr": 0.1})
    reader = open_dataset(digits.context("x").input("data.dataset"))
    model_file = json.loads((digits.context("x").input("train.model") / "model.json").read_text())
    scale = np.float32(model_file["preprocess"]["scale"][0])
    pixels = (reader.arrays("train")["pixels"] - np.float32(model_file["preprocess"]["mean"][0])) * scale
    inputs, labels = torch.from_numpy(pixels), torch.from_numpy(reader.labels("train"))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    kept: dict[str, torch.Tensor] = {}
    top = 0.0
    held = torch.from_numpy((reader.arrays("validation")["pixels"] - model_file["preprocess"]["mean"][0]) * scale)
    held_labels = torch.from_numpy(reader.labels("validation"))
    for epoch in range(2):
        batches = torch.from_numpy(row_order(0, epoch, len(labels))).split(100)
        for start in range(0, len(batches), 3):
            group = batches[start : start + 3]
            for batch in group:
                (nn.functional.cross_entropy(module(inputs[batch]), labels[batch]) / len(group)).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            output = module(held)
        score = float((output.argmax(1) == held_labels).double().mean())
        top = max(top, score)
        if score >= wilson(round(top * 150), 150)[0]:
            kept = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in weights(digits).items():
        assert torch.allclose(value, kept[name], atol=1e-5), name


def test_rows_are_the_same_bits_from_memory_and_from_the_cache(cancer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(cancer, MLP)
    before = weights(cancer)
    monkeypatch.setattr(torch_training, "_IN_MEMORY_BYTES", 0)
    run(cancer, MLP)
    assert all(torch.equal(before[key], value) for key, value in weights(cancer).items())


def test_the_seed_matters(digits: Any) -> None:
    run(digits, MLP)
    before = weights(digits)
    (digits.folder / "model.py").write_text(MLP)
    spec = digits.spec(train={"model": "model.py:build", "epochs": 2})
    train(spec, digits.context("train", seed=1))
    assert not torch.equal(before["1.weight"], weights(digits)["1.weight"])


def test_early_stopping_keeps_the_latest_of_the_best_epochs(digits: Any) -> None:
    section = {"epochs": 30, "early_stopping": {"patience": 2}, "optimizer": {"name": "sgd", "lr": 0.2}}
    facts, _ = run(digits, MLP, **section)
    scores = [line["validation_score"] for line in facts["epochs"]]
    assert len(scores) < 30
    top = scores.index(max(scores))
    assert len(scores) - (1 + top) == 2
    worse = wilson(round(scores[top] * 150), 150)[0]
    assert facts["best_epoch"] - 1 == max(epoch for epoch, score in enumerate(scores) if score >= worse)
    assert facts["best_score"] == scores[facts["best_epoch"] - 1]


@pytest.mark.parametrize(
    ("scores", "kept", "ran"),
    [
        ([0.5, 0.9, 0.95, 0.94, 0.80, 0.80], 4, 6),  # .94 is within .02 of .95
        ([0.5, 0.9, 0.95, 0.92, 0.91, 0.96, 0.90, 0.90, 0.90], 6, 9),
        ([0.9] * 9, 4, 4),  # the same again is no improvement
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 9, 9),
    ],
)
def test_which_epoch_is_kept_and_when_it_stops(scores: list[float], kept: int, ran: int, tmp_path: Path) -> None:
    class Rows:
        rows = 4

        def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(len(indices), 1), torch.ones(len(indices), 1)

    section = Train(epochs=len(scores), early_stopping=EarlyStopping(patience=3), batch_size=4)
    left, seen = iter(scores), []

    def validate(module: nn.Module) -> Validation:
        seen.append(next(module.parameters()).detach().clone())
        return Validation(loss=0.0, score=next(left), margin=0.02)

    hooks = Hooks(loss=nn.MSELoss(), validate=validate, log=lambda *_: None, metric="accuracy", higher_is_better=True)
    context: Any = type("Nobody", (), {"seed": 0, "cancelled": False, "progress": lambda *_: None})()
    trainer = Trainer(nn.Linear(1, 1), Rows(), section, context, hooks, CheckpointStore(tmp_path, "f"))
    state = trainer.run()
    assert (state.best_epoch, len(state.epochs)) == (kept, ran)
    assert torch.equal(next(trainer.module.parameters()), seen[kept - 1])


def test_regression_is_scaled_while_training(diabetes: Any) -> None:
    facts, _ = run(diabetes, MLP, epochs=20, optimizer={"name": "adam", "lr": 5e-3})
    assert facts["metric"] == "mae"
    assert facts["epochs"][0]["loss"] < 10  # of the standardised label: it is about 1.2e6
    assert 30_000 < facts["best_score"] < 60_000


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train(precision: str, digits: Any) -> None:
    facts, _ = run(digits, MLP, precision=precision, epochs=3, optimizer={"name": "adamw", "lr": 5e-3})
    assert facts["precision"] == precision
    assert facts["best_score"] > 0.8
    assert all(value.dtype == torch.float32 for value in weights(digits).values())


def test_class_weights_move_the_answers(cancer: Any) -> None:
    plain, _ = run(cancer, MLP, {"metrics": ["log_loss"]})
    heavy, _ = run(cancer, MLP, {"metrics": ["log_loss"]}, class_weights={"malignant": 50.0})
    assert plain["metric"] == heavy["metric"] == "log_loss"
    assert heavy["best_score"] > plain["best_score"]


def test_event_files_are_written(digits: Any) -> None:
    run(digits, MLP, tensorboard=True)
    files = list((digits.folder / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1
    assert b"validation_accuracy" in files[0].read_bytes()


def test_local_imports_and_the_context(digits: Any) -> None:
    (digits.folder / "width_here.py").write_text("WIDTH = 12\n")
    code = HEAD + (
        "from width_here import WIDTH\n"
        "def build(ctx):\n"
        "    assert ctx.image_shape == (1, 8, 8) and ctx.classes == ctx.outputs == 10 and ctx.features == 64\n"
        "    assert ctx.class_names[3] == '3' and ctx.params == {'depth': 2} and ctx.task == 'classification'\n"
        "    x, y = ctx.data('train')\n"
        "    assert x.shape == (len(y), 1, 8, 8) and abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))\n"
    )
    facts, _ = run(digits, code, params={"depth": 2})
    assert facts["parameters"] == 64 * 12 + 12 + 12 * 10 + 10


OWN = HEAD + (
    "def train(ctx):\n"
    "    x, y = (torch.from_numpy(part) for part in ctx.data('train'))\n"
    "    net = nn.Linear(ctx.features, ctx.outputs)\n"
    "    opt = torch.optim.Adam(net.parameters(), lr=0.05)\n"
    "    y = y if ctx.classes else y[:, None]\n"
    "    loss_of = nn.functional.cross_entropy if ctx.classes else nn.functional.mse_loss\n"
    "    for step in range(40):\n"
    "        loss = loss_of(net(x.flatten(1)), y)\n"
    "        opt.zero_grad(); loss.backward(); opt.step()\n"
    "        ctx.log_metric('loss', loss.item(), step)\n"
    "    return nn.Sequential(nn.Flatten(), net)\n"
)


def test_a_loop_of_ones_own(digits: Any) -> None:
    (digits.folder / "model.py").write_text(OWN)
    context = digits.context("train")
    facts = train(digits.spec(train={"model": "model.py:train"}), context)
    assert facts["framework"] == "torch"
    assert len([point for point in context.points if point[0] == "loss"]) == 40
    names = {path.name for path in digits.context("x").input("train.model").iterdir()}
    assert names == {"model.json", "model.onnx", "expected.npz"}


def test_a_forward_that_raises_passes_through(digits: Any) -> None:
    code = HEAD + (
        "class Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n        raise KeyError('my own mistake')\n"
        "def build(ctx):\n    return Net()\n"
    )
    with pytest.raises(KeyError, match="my own mistake"):
        run(digits, code)


EXPLODES = HEAD + (
    "class Net(nn.Module):\n    def __init__(self):\n"
    "        super().__init__()\n        self.layer = nn.Linear(64, 10)\n"
    "        self.calls = 0\n"
    "    def forward(self, x):\n        self.calls += self.training\n"
    "        return self.layer(x.flatten(1)) * (float('nan') if self.calls > 20 else 1.0)\n"
    "def build(ctx):\n    return Net()\n"
)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(digits: Any) -> None:
    with pytest.raises(StageError, match=r"loss became NaN at step 21 \(epoch 2\)"):
        run(digits, EXPLODES, checkpoint_every_steps=5)
    names = sorted(path.name for path in digits.context("train").checkpoints.glob("step-*.json"))
    assert names == ["step-0000000015.json", "step-0000000020.json"]


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        ("nn.Linear(64, 7)", r"want \[N, 10\] \(\[64, 10\]\), got \[64, 7\]"),
        ("nn.Unflatten(1, (8, 8))", r"\[64, 8, 8\]"),
    ],
)
def test_a_wrong_output_shape_says_what_is_wanted(layer: str, got: str, digits: Any) -> None:
    code = HEAD + f"def build(ctx):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), {layer})\n"
    with pytest.raises(StageError, match=got):
        run(digits, code)


def test_too_little_memory_is_said(digits: Any) -> None:
    code = HEAD + (
        "class Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n        torch.empty(1 << 50)\n        return self.layer(x)\n"
        "def build(ctx):\n    return Net()\n"
    )
    with pytest.raises(StepMemoryError, match=r"ran out of memory at step 1 \(epoch 1\)"):
        run(digits, code)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("def biuld(ctx): pass", InputError, "wants a function 'build'"),
        ("import torch\ndef build(ctx)\n", InputError, r"model\.py:2"),
        ("import torch\n\nimport no_such_package_here\n", InputError, r"model\.py:3: No module named"),
        ("def build(ctx): return 3", InputError, r"must return a torch\.nn\.Module, got int"),
        (HEAD + "def build(ctx): return nn.Flatten()", StageError, "no parameter to train"),
        ("1 / 0", ZeroDivisionError, "division"),
    ],
)
def test_code_that_is_not_a_model_is_named(code: str, error: type[Exception], words: str, digits: Any) -> None:
    with pytest.raises(error, match=words):
        run(digits, code)


def test_a_missing_file_and_a_near_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file model\.py"):
        load_function("model.py:build", tmp_path)
    (tmp_path / "model.py").write_text("def build_net(ctx): pass\n")
    with pytest.raises(InputError) as caught:
        load_function("model.py:build_nets", tmp_path)
    assert caught.value.hint == "did you mean 'build_net'?"


def test_two_projects_may_have_files_of_the_same_name(tmp_path: Path) -> None:
    for index, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        folder.mkdir()
        (folder / "part_of_it.py").write_text(f"value = {index}\n")
        (folder / "model.py").write_text("import part_of_it\ndef build(ctx): return part_of_it.value\n")
    assert load_function("model.py:build", tmp_path / "a")(None) == 0
    assert load_function("model.py:build", tmp_path / "b")(None) == 1


def test_an_unseen_device_is_refused_unless_auto(digits: Any) -> None:
    (digits.folder / "model.py").write_text(MLP)
    context = digits.context("train")
    context.device = "cuda"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(StageError, match=r"train\.device is cuda"):
        train(digits.spec(train={"model": "model.py:build", "device": "cuda"}), context)
    facts = train(digits.spec(train={"model": "model.py:build", "epochs": 1}), context)
    assert facts["device"] == "cpu"


def test_optimisers_are_fused_and_take_the_specs_values(digits: Any) -> None:
    section = digits.spec(train={"optimizer": {"name": "sgd", "lr": 0.3, "momentum": 0.5, "weight_decay": 0.2}}).train
    group = make_optimizer([nn.Parameter(torch.zeros(2))], section).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["fused"]) == (0.3, 0.5, 0.2, True)


def test_tensor_rows_scale_the_target(diabetes: Any) -> None:
    (diabetes.folder / "model.py").write_text(MLP)
    context = diabetes.context("train")
    reader = open_dataset(context.input("data.dataset"))
    made = torch_training.open_context(diabetes.spec(), context, reader)
    rows = TensorRows(made.feed("train"), made.preprocess, Target(mean=1e6, sd=1000.0), "cpu")
    features, answers = rows.take(torch.tensor([3, 0]))
    assert features.shape == (2, 10)
    assert torch.allclose(
        answers[:, 0], (torch.from_numpy(reader.labels("train"))[[3, 0]].double() - 1e6).float() / 1e3
    )
