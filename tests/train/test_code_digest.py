"""Which files enter the cache key, found without running them."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.core.errors import InputError, NotFoundError
from millrace.train.code_digest import code_digests


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    write(
        tmp_path,
        model="import os\nfrom net.layers import block\ndef build(ctx):\n    import late\n",
        late="import model",
        net__layers="from . import parts\nfrom .deep import thing as other\n",
        net__parts="",
        net__deep="from ..outside import x",
        outside="x = 1",
        unused="",
    )
    (tmp_path / "net" / "__init__.py").write_text("")
    found = code_digests("model.py:build", tmp_path)
    assert sorted(found) == [
        "late.py",
        "model.py",
        "net/__init__.py",
        "net/deep.py",
        "net/layers.py",
        "net/parts.py",
        "outside.py",
    ]


def test_only_what_is_imported_changes_the_digests(tmp_path: Path) -> None:
    write(tmp_path, model="import helper", helper="a = 1", other="")
    before = code_digests("model.py:build", tmp_path)
    write(tmp_path, other="changed")
    assert code_digests("model.py:build", tmp_path) == before
    write(tmp_path, helper="a = 2")
    after = code_digests("model.py:build", tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"helper.py"}


def test_a_file_in_a_subfolder_finds_its_neighbours_and_the_root(tmp_path: Path) -> None:
    write(tmp_path, models__net="import near\nimport far", models__near="", far="")
    assert sorted(code_digests("models/net.py:build", tmp_path)) == ["far.py", "models/near.py", "models/net.py"]


def test_nothing_is_executed(tmp_path: Path) -> None:
    write(tmp_path, model="raise SystemExit(1)")
    assert list(code_digests("model.py:build", tmp_path)) == ["model.py"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file model\.py"):
        code_digests("model.py:build", tmp_path)
    write(tmp_path, model="import helper", helper="x = 1\ndef broken(:\n")
    with pytest.raises(InputError, match=r"helper\.py:2"):
        code_digests("model.py:build", tmp_path)
    with pytest.raises(InputError, match="outside the folder"):
        code_digests("../other.py:build", tmp_path)
