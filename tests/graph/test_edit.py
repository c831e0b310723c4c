"""Edits are known by what they do: by name, arguments, files and code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdvino.graph import prepare
from sdvino.graph.edit import Edit, code_digest, sources
from sdvino.graph.walk import reshape_static
from sdvino.inputs.files import sha256_of
from tests.conftest import ROOT

#: The module of the edits that make a folder's graphs.
EDITS = "sdvino.graph.prepare"


def key(change: Any = reshape_static, **arguments: Any) -> str:
    return Edit.of(change, **arguments).key(sha256_of)


def test_other_arguments_are_another_edit() -> None:
    shapes = {"ids": [1, 7], "mask": [1, 7]}
    turned = dict(reversed(shapes.items()))
    assert key(shapes=shapes) == key(shapes=turned) == key(shapes={**shapes, "ids": (1, 7)})
    others = {"ids": [1, 8], "mask": [1, 7]}, {"ids": [1, 7]}, None, True, 1, 1.0, "1"
    assert len({key(shapes=shapes), *(key(shapes=other) for other in others)}) == 8
    assert key(prepare.prepare_text_keys, shapes=shapes) != key(shapes=shapes)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    keys = [key(files=[(tmp_path / name, 0.5)]) for name in "abc"]
    assert keys[0] == keys[1] != keys[2]
    assert key(files=[(tmp_path / "a", 0.6)]) != keys[0]


def within() -> Callable[[Any], None]:
    def edit(model: Any) -> None: ...

    return edit


@pytest.mark.parametrize(
    "make",
    [
        lambda: Edit.of(within()),
        lambda: Edit.of(test_a_file_is_known_by_its_content),
        lambda: Edit.of(reshape_static, shapes=object()),  # type: ignore[arg-type]
    ],
    ids=["in a function", "of another package", "not plain"],
)
def test_what_cannot_be_known_is_no_edit(make: Callable[[], Edit]) -> None:
    with pytest.raises(TypeError):
        make()


def test_the_code_is_all_that_is_imported() -> None:
    show = f"import sys, {EDITS}; print(*(n for n in sys.modules if n.startswith('sdvino')))"
    run = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True
    )
    packages = {"sdvino", "sdvino.graph"}  # which hold nothing that edits
    assert set(run.stdout.split()) - packages == set(sources(EDITS))


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("cli/options.py", False),
        ("settings.py", False),
        ("runtime/component.py", False),
        ("graph/prepare.py", True),
        ("graph/walk.py", True),  # which others import
    ],
)
def test_only_code_that_makes_graphs_counts(tmp_path: Path, file: str, counts: bool) -> None:
    shutil.copytree(ROOT / "sdvino", tmp_path / "sdvino")
    before = code_digest(EDITS, tmp_path)
    assert before == code_digest(EDITS)
    with (tmp_path / "sdvino" / file).open("a", encoding="utf-8") as source:
        source.write("# other words\n")
    code_digest.cache_clear()
    assert (code_digest(EDITS, tmp_path) != before) == counts
