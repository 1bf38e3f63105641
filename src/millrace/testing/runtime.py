"""Conformance of `Runtime`: derive, provide the fixtures, and every test must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from millrace.core.errors import MillraceError
from millrace.core.ports import Runtime


class RuntimeConformance:
    """What every runtime promises.

    Fixtures to provide:
        make_runtime: a function that gives a new runtime of the same model, not loaded.
        rows: tensors of at least 8 valid rows.
    """

    def test_is_not_ready_before_load(self, make_runtime: Callable[[], Runtime]) -> None:
        assert not make_runtime().is_ready

    def test_does_not_answer_before_load(
        self, make_runtime: Callable[[], Runtime], rows: Mapping[str, np.ndarray]
    ) -> None:
        with pytest.raises(MillraceError):
            make_runtime().infer(rows)

    def test_is_ready_after_load_until_unload(self, make_runtime: Callable[[], Runtime]) -> None:
        runtime = make_runtime()
        runtime.load()
        assert runtime.is_ready
        runtime.unload()
        assert not runtime.is_ready

    def test_can_be_loaded_again(self, make_runtime: Callable[[], Runtime], rows: Mapping[str, np.ndarray]) -> None:
        runtime = make_runtime()
        runtime.load()
        first = runtime.infer(rows)
        runtime.unload()
        runtime.load()
        second = runtime.infer(rows)
        for name, values in first.items():
            np.testing.assert_array_equal(values, second[name])

    def test_gives_one_row_per_row(self, make_runtime: Callable[[], Runtime], rows: Mapping[str, np.ndarray]) -> None:
        runtime = make_runtime()
        runtime.load()
        for count in (1, 3, 8):
            outputs = runtime.infer({name: values[:count] for name, values in rows.items()})
            assert outputs
            assert {len(values) for values in outputs.values()} == {count}

    def test_does_not_change_its_input(
        self, make_runtime: Callable[[], Runtime], rows: Mapping[str, np.ndarray]
    ) -> None:
        runtime = make_runtime()
        runtime.load()
        copies = {name: values.copy() for name, values in rows.items()}
        runtime.infer(copies)
        for name, values in rows.items():
            np.testing.assert_array_equal(values, copies[name])

    def test_answers_several_threads_at_once(
        self, make_runtime: Callable[[], Runtime], rows: Mapping[str, np.ndarray]
    ) -> None:
        runtime = make_runtime()
        runtime.load()
        expected = runtime.infer(rows)

        def one(index: int) -> bool:
            row = index % 8
            outputs = runtime.infer({name: values[row : row + 1] for name, values in rows.items()})
            return all(
                np.allclose(outputs[name], values[row : row + 1], atol=1e-5) for name, values in expected.items()
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(one, range(80)))

    def test_wrong_tensors_are_an_error_of_ours(
        self, make_runtime: Callable[[], Runtime], rows: Mapping[str, np.ndarray]
    ) -> None:
        runtime = make_runtime()
        runtime.load()
        name = next(iter(rows))
        for wrong in ({}, {**rows, name: rows[name][:, :-1]}, {f"not_{name}": rows[name]}):
            with pytest.raises(MillraceError):
                runtime.infer(wrong)
        assert runtime.infer(rows)
