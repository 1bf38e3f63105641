"""From a model to facts: what is dropped and why, what is certified, what is chosen."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from millrace.compress.choose import choose, describe, pays
from millrace.compress.recipes import RECIPES, Recipe
from millrace.compress.search import Job, Outcome, search
from millrace.compress.trees import TrainingRows
from millrace.core.errors import InputError
from millrace.core.facts import GuaranteeFacts, LatencyFacts, VariantFacts
from millrace.core.spec import Compress
from millrace.core.units import Share
from millrace.formats.cpu import has_vnni
from millrace.formats.session import open_session


def job_of(model: bytes, digits: Any, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": model,
        "task": "classification",
        "output": "probabilities",
        "calibration": digits.part(0, 256),
        "ordering": digits.validation,
        "test": digits.test,
        "expected": digits.test_labels,
        "training": TrainingRows(digits.train, digits.train_labels, 10),
        "latency_budget_s": 0.1,
    }
    return Job(**(values | changes))


@pytest.fixture(scope="module")
def found(cnn: bytes, digits: Any) -> Outcome:
    return search(job_of(cnn, digits))


def test_the_base_stands_first_then_the_tested_order(found: Outcome) -> None:
    rows = found.facts.variants
    assert rows[0].name == "fp32"
    assert rows[0].guarantee is None
    assert rows[0].size_ratio == 1.0
    noise = [row.snr_db for row in rows[1:] if row.snr_db is not None]
    assert noise == sorted(noise, reverse=True)
    assert {row.name for row in rows[1:]} == {"fp32-optimized", "int8-weights", "int8-static"}


def test_every_candidate_has_a_guarantee_and_latencies_with_intervals(found: Outcome) -> None:
    for row in found.facts.variants[1:]:
        assert row.guarantee is not None
        assert row.guarantee.rows == 600
        assert [entry.batch_size for entry in row.latency] == [1, 32]
        assert all(entry.low <= entry.speedup <= entry.high for entry in row.latency)


def test_only_certified_variants_have_files(found: Outcome, digits: Any, cnn: bytes) -> None:
    certified = {name for name, facts in found.guarantees.items() if facts.status == "certified"}
    assert set(found.files) == certified
    assert "int8-static" in certified
    base = open_session(cnn).run(digits.test)["probabilities"].argmax(axis=1)
    other = open_session(found.files["int8-static"]).run(digits.test)["probabilities"].argmax(axis=1)
    assert int(np.sum(base != other)) == found.guarantees["int8-static"].changed


def test_what_is_left_out_says_why(found: Outcome) -> None:
    reasons = {entry["name"]: entry["reason"] for entry in found.facts.skipped}
    assert "slower" in reasons["int8-dynamic"]
    assert "trees-60" not in reasons  # nobody asked for trees


def test_the_same_rows_give_the_same_files_and_guarantees(cnn: bytes, digits: Any, found: Outcome) -> None:
    again = search(job_of(cnn, digits))
    assert again.files == found.files
    assert again.guarantees == found.guarantees


def test_few_rows_certify_nothing_and_say_how_many_are_needed(mlp: bytes, digits: Any) -> None:
    few = search(job_of(mlp, digits, test=digits.part(1197, 1297), expected=digits.labels[1197:1297]))
    assert few.facts.chosen == "fp32"
    assert few.files == {}
    assert "not enough test rows (100 there, about" in few.facts.why
    first = few.facts.variants[1].guarantee
    assert first is not None
    assert first.status == "undecided"
    assert first.rows_needed is not None
    assert first.rows_needed >= 268


def test_regression_all_the_way(regressor: bytes, digits: Any) -> None:
    job = job_of(
        regressor, digits, task="regression", output="value", expected=digits.test_labels.astype(np.float32),
        metric="rmse",
    )  # fmt: skip
    outcome = search(job)
    assert outcome.facts.max_drop == 0.02
    guarantee = outcome.guarantees["int8-weights"]
    assert guarantee.metric == "mae"
    assert guarantee.status == "certified"
    assert "rmse" in guarantee.explanation


def test_none_wanted_none_made(mlp: bytes, digits: Any) -> None:
    outcome = search(job_of(mlp, digits, options=Compress(variants="none")))
    assert [row.name for row in outcome.facts.variants] == ["fp32"]
    assert outcome.facts.chosen == "fp32"
    assert outcome.facts.variants[0].latency


def test_named_variants_only(mlp: bytes, digits: Any) -> None:
    outcome = search(job_of(mlp, digits, options=Compress(variants=["int8-weights"])))
    assert [row.name for row in outcome.facts.variants] == ["fp32", "int8-weights"]


def test_an_unknown_name_is_corrected(mlp: bytes, digits: Any) -> None:
    with pytest.raises(InputError, match="int8-statik") as caught:
        search(job_of(mlp, digits, options=Compress(variants=["int8-statik"])))
    assert caught.value.hint == "did you mean 'int8-static'?"


def test_full_range_is_only_for_processors_with_vnni(mlp: bytes, digits: Any) -> None:
    assert not RECIPES["int8-static-full"].is_automatic
    outcome = search(job_of(mlp, digits, options=Compress(variants=["int8-static-full"])))
    made = [row for row in outcome.facts.variants if row.name == "int8-static-full"]
    if has_vnni():
        assert made[0].needs_vnni
        assert "VNNI" in made[0].note
    else:
        assert made == []
        assert "saturates" in outcome.facts.skipped[0]["reason"]


def test_a_smaller_limit_certifies_less(mlp: bytes, digits: Any) -> None:
    strict = search(job_of(mlp, digits, options=Compress(max_drop=Share(0.001))))
    assert strict.files == {}
    assert strict.facts.max_drop == 0.001


def test_trees_offer_replacements_only_where_allowed(forest: bytes, digits: Any) -> None:
    closed = search(job_of(forest, digits))
    assert [row.name for row in closed.facts.variants] == ["fp32"]
    assert any("allow_replacement" in entry["reason"] for entry in closed.facts.skipped)
    assert "tree ensembles are not quantised" in closed.facts.why
    assert "compress.allow_replacement: true" in closed.facts.why
    opened = search(job_of(forest, digits, options=Compress(allow_replacement=True)))
    rows = {row.name: row for row in opened.facts.variants}
    assert rows["trees-25"].is_replacement
    assert rows["trees-25"].size_ratio > 2
    assert "a replacement" in rows["trees-25"].note


def recipe_that(build: Any, **changes: Any) -> dict[str, Recipe]:
    broken = Recipe("broken", "", "float32", "float32", lambda profile: None, build, **changes)
    return {"broken": broken}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda material: b"nonsense", "did not load"),
        (lambda material: material.data, "unchanged"),
        (lambda material: [][0], "could not be made"),
    ],
)
def test_unusable_variants_are_dropped_with_their_reason(
    mlp: bytes, digits: Any, monkeypatch: pytest.MonkeyPatch, build: Any, reason: str
) -> None:
    monkeypatch.setattr("millrace.compress.search.RECIPES", recipe_that(build))
    outcome = search(job_of(mlp, digits))
    assert reason in outcome.facts.skipped[0]["reason"]
    assert outcome.facts.chosen == "fp32"


@pytest.mark.parametrize(("factor", "reason"), [(np.nan, "not finite"), (-3.0, "too noisy")])
def test_noise_and_infinities_are_dropped(
    mlp: bytes, digits: Any, monkeypatch: pytest.MonkeyPatch, factor: float, reason: str
) -> None:
    def spoil(material: Any) -> bytes:
        model = type(material.model)()
        model.CopyFrom(material.model)
        weights = next(entry for entry in model.graph.initializer if entry.name == "last.weight")
        spoilt = np.frombuffer(weights.raw_data, np.float32) * np.float32(factor)
        weights.raw_data = spoilt.astype(np.float32).tobytes()
        model.graph.node[0].name = "changed"
        model.graph.node.add(op_type="Identity", input=["pixels"], output=["unused"], name="unused")
        return model.SerializeToString()

    monkeypatch.setattr("millrace.compress.search.RECIPES", recipe_that(spoil))
    assert reason in search(job_of(mlp, digits)).facts.skipped[0]["reason"]


# --------------------------------------------------------------------------- choosing

CERTIFIED = GuaranteeFacts(
    status="certified", metric="accuracy", base_score=0.99, score=0.99, drop=0.0, bound=0.004, limit=0.01,
    confidence=0.95, rows=600, changed=0, changed_bound=0.005, changed_limit=0.05,
)  # fmt: skip


def variant(name: str, speeds: list[float], ratio: float = 1.0, **changes: Any) -> VariantFacts:
    latency = [
        LatencyFacts(batch_size=size, p50_s=1e-4 / speed, speedup=speed, low=speed * 0.99, high=speed * 1.01)
        for size, speed in zip((1, 32), speeds, strict=True)
    ]
    values: dict[str, Any] = {
        "name": name, "size_bytes": round(1000 / ratio), "size_ratio": ratio, "snr_db": 40.0,
        "guarantee": CERTIFIED, "latency": latency,
    }  # fmt: skip
    return VariantFacts(**(values | changes))


BASE = variant("fp32", [1.0, 1.0], guarantee=None)


def test_the_fastest_certified_variant_is_chosen() -> None:
    chosen, why = choose([BASE, variant("a", [1.2, 1.3]), variant("b", [1.5, 1.8], 3.9)], Compress())
    assert chosen == "b"
    assert "1.50x at batch 1, 1.80x at batch 32, 3.9x smaller" in why


def test_a_faster_one_that_is_not_certified_is_not_chosen() -> None:
    refused = msgspec.structs.replace(CERTIFIED, status="refused")
    fast = variant("fast", [9.0, 9.0], guarantee=refused)
    assert choose([BASE, variant("a", [1.2, 1.3]), fast], Compress())[0] == "a"


def test_no_variant_pays_is_a_clear_outcome() -> None:
    chosen, why = choose([BASE, variant("a", [1.01, 1.02]), variant("b", [0.7, 0.7], 3.4)], Compress())
    assert chosen == "fp32"
    assert why.startswith("no variant pays: the best certified one, a, is 1.01x at batch 1")


def test_faster_alone_and_slower_in_batches_does_not_pay() -> None:
    assert not pays(variant("4bit", [1.25, 0.67], 1.2))
    assert pays(variant("static", [1.06, 0.96]))


def test_smaller_at_the_same_speed_pays_but_not_when_slow() -> None:
    assert pays(variant("weights", [0.97, 1.0], 3.8))
    assert not pays(variant("weights", [0.85, 1.0], 3.8))


def test_alike_speeds_prefer_the_smaller_file() -> None:
    assert choose([BASE, variant("a", [1.5, 1.5], 1.0), variant("b", [1.49, 1.49], 3.9)], Compress())[0] == "b"


def test_replacements_are_never_chosen_unasked() -> None:
    refit = variant("refit", [3.0, 3.0], is_replacement=True)
    assert choose([BASE, refit], Compress())[0] == "fp32"
    assert choose([BASE, refit], Compress(allow_replacement=True))[0] == "refit"


def test_slower_is_shown_as_slower() -> None:
    assert describe(variant("4bit", [1.25, 0.67])) == "slower at batch 32 (0.67x)"
    assert describe(variant("same", [1.0, 1.0])) == ""
