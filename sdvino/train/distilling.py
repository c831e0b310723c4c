"""`distill`: a diffusers folder whose UNet has learnt from another's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.compress.prompts import PROMPTS_FILE, check_prompts, prompts_of
from sdvino.compress.quiet import quiet
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.staging import check_target, staged
from sdvino.convert.state import check_ours, describe_files
from sdvino.convert.suggestions import TRAINED_STEPS, suggestions
from sdvino.errors import Cancelled, OutputError, RequestError
from sdvino.folder.manifest import MANIFEST_FILE
from sdvino.inputs.files import FileLock, read_json, write_json
from sdvino.nets.structure import Structure
from sdvino.train.distillation.engine import Distilled, Material, Progress, distill_unet
from sdvino.train.distillation.loop import LOG_FILE, PLOT_FILE
from sdvino.train.distillation.models import Models, check_fits
from sdvino.train.distillation.pictures import find_pictures
from sdvino.train.distillation.settings import DistillSettings
from sdvino.train.modules import load_component, save_component

#: What a distilled folder says about how it was made.
RECORD_FILE = "distillation.json"
_LOCK_FILE = "lock"
_KEPT_SUFFIXES = (".json", ".safetensors", ".txt")


@dataclass(frozen=True, slots=True)
class DistilledFolder:
    """Where a student stands, and the figures of its training."""

    path: Path
    figures: Mapping[str, Any]


def distill(
    teacher: Path | str,
    out: Path | str,
    *,
    student: Path | str | None = None,
    settings: DistillSettings | None = None,
    prompts: Sequence[str] | None = None,
    pictures: Path | str | None = None,
    work: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, share: None,
) -> DistilledFolder:
    """Let a student learn from ``teacher`` and write it to ``out``, a folder `convert` takes.

    teacher: a diffusers folder of Stable Diffusion 1.x or 2.x. student: another one, or the folder
    of a UNet alone, perhaps smaller (see `sdvino.train.modules`); None: the teacher's own
    UNet. prompts: what the teacher draws to learn from; None: its calibration_prompts.txt, or a
    general list. pictures: a folder of pictures with captions instead. work: a folder that keeps
    what takes time, for other runs too; None: one beside ``out``, gone when all is done.

    After Ctrl-C the same call goes on. Raises RequestError (a folder, student or setting that
    cannot be), OutputError (an ``out`` that cannot be written) and Cancelled (Ctrl-C).
    """
    settings = DistillSettings() if settings is None else settings
    target = Path(out).absolute()
    source = open_teacher(Path(teacher))
    own = None if student is None else open_student(Path(student), source)
    settings.check(source.configs["scheduler"])
    material = _material(source, prompts, pictures)
    if target == source.path.absolute() or target in source.path.absolute().parents:
        raise RequestError(f"{target} is, or holds, the teacher; choose another name.")
    check_target(target, overwrite=overwrite)
    kept = work is not None
    folder = Path(work).absolute() if work is not None else work_folder(target)
    if not kept:  # nobody has named it: it may have come with an archive
        check_ours(folder)
    lock = _lock(folder)
    try:
        found = _learn(source, own, settings, material, folder, progress)
    except KeyboardInterrupt as error:
        raise Cancelled(
            f"Cancelled; what was done is kept in {folder}: run the same command again to go on."
        ) from error
    finally:
        lock.release()
    with staged(target, overwrite=overwrite) as staging:
        _write(source, own, settings, found, staging)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    return DistilledFolder(target, found.figures)


def work_folder(target: Path) -> Path:
    """Return where a distillation into ``target`` keeps what it has done."""
    return target.parent / f".{target.name}.sdvino-distill"


def open_teacher(path: Path) -> DiffusersFolder:
    """Return the checked folder; raises RequestError for what cannot teach."""
    source = DiffusersFolder.open(path)
    plain = len(source.family.text_encoders) == 1 and source.family.runs
    if not plain or source.configs["unet"].get("time_cond_proj_dim") is not None:
        raise RequestError(
            f"{source.name} is {source.family.title}, which cannot teach yet; give a model of"
            " Stable Diffusion 1.x or 2.x that makes pictures from text."
        )
    return source


def open_student(path: Path, teacher: DiffusersFolder) -> Path:
    """Return the folder of the student's UNet; raises RequestError where it fits no teacher."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"{path} holds no UNet (config.json and .safetensors); give a diffusers folder, or its"
            " unet folder."
        )
    config = read_json(folder / "config.json", "unet/config.json")
    check_fits(teacher.configs["unet"], config)
    scheduler = path / "scheduler" / "scheduler_config.json"
    if folder != path and scheduler.is_file():
        own = DiffusersFolder.open(path).prediction_type
        if own != teacher.prediction_type:
            raise RequestError(
                f"The student predicts {own} and its teacher {teacher.prediction_type}; give a"
                " student made from this teacher."
            )
    return folder


def _material(
    source: DiffusersFolder, prompts: Sequence[str] | None, pictures: Path | str | None
) -> Material:
    if pictures is not None:
        if prompts is not None:
            raise RequestError("A student learns from prompts or from pictures; give one of them.")
        find_pictures(Path(pictures))  # what is wrong with them, before anything is loaded
        return Material(pictures=Path(pictures))
    return Material(prompts=prompts_of(source.path) if prompts is None else check_prompts(prompts))


def _lock(folder: Path) -> FileLock:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True, mode=0o700)
        lock = FileLock(folder / _LOCK_FILE)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}); choose another folder."
        ) from error
    if not lock.acquire(wait=False):
        raise RequestError(f"Another distillation in {folder} is running; wait, or stop it.")
    return lock


def _learn(
    source: DiffusersFolder,
    own: Path | None,
    settings: DistillSettings,
    material: Material,
    work: Path,
    progress: Progress,
) -> Distilled:
    unet = source.folder("unet")
    with quiet():
        models = Models(
            teacher=load_component(unet, "unet"),
            student=load_component(unet if own is None else own, "unet"),
            text_encoder=load_component(source.folder("text_encoder"), "text_encoder"),
            tokenizer=source.folder("tokenizer"),
            scheduler=source.configs["scheduler"],
            vae=None if material.pictures is None else load_component(source.folder("vae"), "vae"),
        )
    return distill_unet(
        models,
        material,
        settings,
        work,
        origin=describe_files(source.path),
        student_origin=[] if own is None else describe_files(own),
        guidance_scale=suggestions(source, {})["guidance_scale"],
        progress=progress,
    )


def _write(
    source: DiffusersFolder,
    own: Path | None,
    settings: DistillSettings,
    found: Distilled,
    folder: Path,
) -> None:
    """Write the complete folder: the student, and the rest as the teacher has it."""
    unet = source.folder("unet") if own is None else own
    structure = Structure.read(unet)
    config = read_json(unet / "config.json", "unet/config.json")
    save_component(
        found.module,
        folder / "unet",
        config=config,
        structure=Structure() if structure is None else structure,
    )
    others = ["text_encoder", "vae", *source.tokenizers]
    for name in others + (["tiny_vae"] if source.has_tiny_vae else []):
        _copy(source.folder(name), folder / name)
    if (source.path / PROMPTS_FILE).is_file():
        shutil.copyfile(source.path / PROMPTS_FILE, folder / PROMPTS_FILE)
    index = dict(source.model_index)
    scheduler = settings.scheduler_after(source.configs["scheduler"])
    if settings.few_steps:
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    hints = {**suggestions(source, {}), **settings.suggested_after()}
    trained = {TRAINED_STEPS: settings.student_steps} if settings.few_steps else {}
    write_json(folder / MANIFEST_FILE, {"suggested": hints, **trained})
    write_json(folder / RECORD_FILE, {**found.figures, "teacher": source.name})
    for name in (LOG_FILE, PLOT_FILE):
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, folder / name)


def _copy(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix in _KEPT_SUFFIXES:
            shutil.copyfile(file, folder / file.name)
