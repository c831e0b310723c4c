"""The work folder: what counts as finished, and what is left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sdvino.convert.state import (
    WorkFolder,
    describe_files,
    files_under,
    key_of,
    recorded_steps,
    work_path,
)
from sdvino.errors import OutputError, RequestError
from sdvino.folder.manifest import MANIFEST_FILE


def finish(work: WorkFolder, step: str, key: str, content: str = "weights") -> Path:
    """Let ``step`` have made one file."""
    work.prepare()
    file = work.model / f"{step}.bin"
    file.write_text(content, encoding="utf-8")
    work.record(step, key, files_under(file, work.path))
    return file


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_finished_step_is_known_to_the_next_run(tmp_path: Path) -> None:
    target = tmp_path / "model"
    first = WorkFolder(target)
    file = finish(first, "export unet", "key")
    first.close(remove=False)
    assert recorded_steps(target) == {"export unet": "key"}
    second = WorkFolder(target)
    assert second.has_progress
    assert second.finished("export unet", "key")
    assert not second.finished("export unet", "another key")
    assert not second.finished("export vae_decoder", "key")
    file.write_text("cut off", encoding="utf-8")
    assert not second.finished("export unet", "key")
    file.unlink()
    assert not second.finished("export unet", "key")
    second.close(remove=True)
    assert names(tmp_path) == set()


def test_only_steps_made_from_the_same_things_are_kept(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "model")
    finish(work, "a", "1")
    finish(work, "b", "1")
    work.record_verdict("asked", {"quality": {}})
    assert work.keep_only({"a": "1", "b": "2", "c": "1"}) == ["a"]
    assert not work.finished("b", "1")
    assert work.verdict("asked") is None  # it was about another model
    work.close(remove=True)


def test_a_state_that_cannot_be_read_is_no_progress(tmp_path: Path) -> None:
    target = tmp_path / "model"
    work = WorkFolder(target)
    finish(work, "a", "1")
    work.close(remove=False)
    state = work_path(target) / "state.json"
    for text in ("{", "[]", '{"format_version": 99}', '{"format_version": 1}'):
        state.write_text(text, encoding="utf-8")
        again = WorkFolder(target)
        assert not again.has_progress
        again.close(remove=False)


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "model")
    with pytest.raises(RequestError, match="running"):
        WorkFolder(tmp_path / "model")
    work.close(remove=True)
    WorkFolder(tmp_path / "model").close(remove=True)


def test_parents_made_for_nothing_go_again(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "some" / "where" / "model")
    assert (tmp_path / "some" / "where").is_dir()
    work.close(remove=True)
    assert names(tmp_path) == set()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    work_path(tmp_path / "model").touch()
    with pytest.raises(OutputError, match="in the way"):
        WorkFolder(tmp_path / "model")


@pytest.mark.parametrize("overwrite", [False, True])
def test_delivery_leaves_the_target_alone(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "model"
    if overwrite:
        target.mkdir()
        (target / MANIFEST_FILE).write_text("old", encoding="utf-8")
    work = WorkFolder(target)
    finish(work, "a", "1")
    (work.model / MANIFEST_FILE).write_text("new", encoding="utf-8")
    work.deliver("request", overwrite=overwrite)
    assert (target / MANIFEST_FILE).read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == {"model", f"model/{MANIFEST_FILE}", "model/a.bin"}


def test_a_model_that_would_be_overwritten_stays_without_the_word(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / MANIFEST_FILE).write_text("old", encoding="utf-8")
    work = WorkFolder(target)
    finish(work, "a", "1")
    with pytest.raises(OutputError, match="--overwrite"):
        work.deliver("request", overwrite=False)
    assert (target / MANIFEST_FILE).read_text(encoding="utf-8") == "old"
    work.close(remove=True)


def test_killed_between_the_renames_the_old_model_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    work = WorkFolder(target)
    finish(work, "a", "1")
    work.old.mkdir()
    (work.old / MANIFEST_FILE).write_text("old", encoding="utf-8")
    work.close(remove=False)
    WorkFolder(target).close(remove=False)
    assert (target / MANIFEST_FILE).read_text(encoding="utf-8") == "old"


def test_killed_after_the_rename_the_model_is_known_as_delivered(tmp_path: Path) -> None:
    target = tmp_path / "model"
    work = WorkFolder(target)
    finish(work, "a", "1")
    (work.model / MANIFEST_FILE).write_text("new", encoding="utf-8")
    # What `deliver` does, up to its last line.
    work._delivering = "request"
    work._write()
    work.model.rename(target)
    work.close(remove=False)
    again = WorkFolder(target)
    assert again.was_delivered("request")
    assert not again.was_delivered("another request")
    again.close(remove=True)
    assert names(tmp_path) == {"model", f"model/{MANIFEST_FILE}", "model/a.bin"}


def test_starting_anew_forgets_everything(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "model")
    finish(work, "a", "1")
    work.start_anew()
    assert not work.has_progress
    assert not work.model.exists()
    work.close(remove=True)


def test_a_changed_source_has_another_key(tmp_path: Path) -> None:
    file = tmp_path / "unet" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"one")
    before = key_of(describe_files(tmp_path))
    assert key_of(describe_files(tmp_path)) == before
    file.write_bytes(b"more")
    assert key_of(describe_files(tmp_path)) != before
    assert [name for name, _, _ in describe_files(file)] == ["model.safetensors"]


def test_the_state_is_written_as_a_whole(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "model")
    finish(work, "a", "1")
    value = json.loads((work.path / "state.json").read_text(encoding="utf-8"))
    assert list(value["steps"]) == ["a"]
    assert not (work.path / "state.json.new").exists()
    work.close(remove=True)


def link(work: Path) -> None:
    work.symlink_to(work.parent / "elsewhere")


def linked_log(work: Path) -> None:
    (work / "logs").mkdir(parents=True)
    (work / "logs" / "metadata.txt").symlink_to(work.parent / "precious")


def writable(work: Path) -> None:
    work.mkdir()
    work.chmod(0o777)


@pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX")
@pytest.mark.parametrize("plant", [link, linked_log, writable, Path.touch])
def test_a_work_folder_that_is_not_ours_is_refused(
    plant: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "precious").write_text("kept")
    target = tmp_path / "model"
    plant(work_path(target))
    for act in (WorkFolder, recorded_steps):
        with pytest.raises(OutputError, match="remove"):
            act(target)
    assert (tmp_path / "precious").read_text() == "kept"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_nobody_else_can_write_to_a_work_folder(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        work = WorkFolder(tmp_path / "model")
        assert work.path.stat().st_mode & 0o777 == 0o700
        work.close(remove=True)
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "state", ["{", "[]", '{"steps": []}', '{"format_version": 1, "steps": {"a": 3}}', "[" * 9999]
)
def test_a_damaged_state_is_no_progress(state: str, tmp_path: Path) -> None:
    work = work_path(tmp_path / "model")
    work.mkdir(mode=0o700)
    (work / "state.json").write_text(state)
    assert recorded_steps(tmp_path / "model") == {}
