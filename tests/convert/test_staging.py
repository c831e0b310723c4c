from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sdvino.convert.staging import staged
from sdvino.errors import OutputError
from sdvino.folder.manifest import MANIFEST_FILE


def make_model(folder: Path, word: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).write_text(word, encoding="utf-8")


def fill_and_fail(target: Path, error: type[BaseException], *, overwrite: bool) -> None:
    with staged(target, overwrite=overwrite) as staging:
        make_model(staging, "half")
        raise error


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_target_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with staged(target, overwrite=False) as staging:
        make_model(staging, "fresh")
        assert not target.exists()
    assert everything(tmp_path) == {"new", "new/model", f"new/model/{MANIFEST_FILE}"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fill_and_fail(tmp_path / "new" / "model", error, overwrite=False)
    assert everything(tmp_path) == set()


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with staged(target, overwrite=False) as staging:
        make_model(staging, "fresh")
    assert everything(tmp_path) == {"model", f"model/{MANIFEST_FILE}"}


def test_an_old_model_is_replaced_only_when_asked_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model"
    make_model(target, "old")
    (target / "left over").touch()
    with pytest.raises(OutputError, match="--overwrite"), staged(target, overwrite=False):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError):
        fill_and_fail(target, RuntimeError, overwrite=True)
    assert (target / MANIFEST_FILE).read_text(encoding="utf-8") == "old"
    with staged(target, overwrite=True) as staging:
        make_model(staging, "fresh")
        assert (target / MANIFEST_FILE).read_text(encoding="utf-8") == "old"
    assert everything(tmp_path) == {"model", f"model/{MANIFEST_FILE}"}
    assert (target / MANIFEST_FILE).read_text(encoding="utf-8") == "fresh"


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "documents"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(OutputError, match="not made by"), staged(precious, overwrite=True):
        pytest.fail("the block must not run")
    file = tmp_path / "file"
    file.touch()
    for target in (file, file / "model"):
        with pytest.raises(OutputError, match="choose another"), staged(target, overwrite=True):
            pytest.fail("the block must not run")
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "years"


@pytest.mark.skipif(
    sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0),
    reason="permissions bind neither Windows' folders nor root",
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="cannot be"), staged(tmp_path / "m", overwrite=False):
        pytest.fail("the block must not run")
    tmp_path.chmod(0o755)
