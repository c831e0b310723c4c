"""A model as people have it becomes a folder that runs: converted when it is first used, and kept.

`resolve` stands above both running and converting: the command line calls it, and so does
`StableDiffusionPipeline.from_pretrained`. What converts is imported when something is converted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdvino.errors import ModelFolderError, OutputError, RequestError, SdvinoError
from sdvino.first_use.report import above_bar, announcement, progress_bar, trim
from sdvino.first_use.sources import HubSource, LocalSource, find_on_hub
from sdvino.first_use.store import FOLDER_VARIABLE, ConvertedModels, Entry
from sdvino.folder.hub import (
    Hub,
    NotConverted,
    NotDownloaded,
    Report,
    fetch,
    local_model,
    not_found,
    report_to_stderr,
    resolve_model,
    runnable_files,
)
from sdvino.folder.index import INDEX_FILE, ModelFolder
from sdvino.inputs.shown import shown_size
from sdvino.runtime.cache import cache_key

if TYPE_CHECKING:
    from sdvino.compress.thresholds import GateSettings
    from sdvino.convert.api import Outlook

Source = LocalSource | HubSource
#: Changed when what is converted today should not be found any more.
_FORMAT = 1
#: Reading more than this is said: it takes seconds.
_LONG_BYTES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a model is got, and converted if it has to be."""

    #: As in `sdvino.convert.api.convert`; None takes int8 where NNCF is installed, else fp16.
    recipe: str | Path | None = None
    #: Compare the result with the uncompressed model.
    gate: bool = False
    #: Branch, tag or commit of a model on the hub, and the cache of what is downloaded from there.
    revision: str | None = None
    cache_dir: str | Path | None = None
    offline: bool = False
    #: The most bytes that may come from the hub.
    max_download: int | None = None
    #: Without a bar.
    quiet: bool = False
    #: Told, in a line each, what is downloaded, converted and dropped.
    report: Report = report_to_stderr

    @property
    def hub(self) -> Hub:
        """Return how the hub is asked."""
        return Hub(
            revision=self.revision,
            cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
            offline=self.offline,
            max_download=self.max_download,
            report=self.report,
        )

    @property
    def recipes(self) -> tuple[str | Path, ...]:
        """Return the recipes whose result will do, that to convert by first."""
        if self.recipe is not None:
            return (self.recipe,)
        chosen = default_recipe()
        return (chosen,) if chosen == "int8" else (chosen, "int8")

    @property
    def gate_settings(self) -> GateSettings | None:
        """Return how the result is compared."""
        if not self.gate:
            return None
        from sdvino.compress.thresholds import GateSettings

        return GateSettings()

    def key(self, source: str) -> str:
        """Return the key of what ``source`` would be converted into."""
        return _key(source, self.recipes[0], gated=self.gate)

    def keys(self, source: str) -> list[str]:
        """Return the keys of what will do, the best first: that is what was compared."""
        gates = (True,) if self.gate else (True, False)
        return [_key(source, recipe, gated=gated) for recipe in self.recipes for gated in gates]


_DEFAULT = ModelOptions()


def resolve(model: str | Path | None, asked: ModelOptions = _DEFAULT) -> Path:
    """Return the model folder of ``model``, downloaded and converted when need be.

    What `sdvino.folder.hub.resolve_model` takes (None for the bundled model, a model folder, the
    hub id of an OpenVINO model) is found as there. A .safetensors checkpoint, a diffusers folder,
    or a hub id of one (owner/name, owner/name/FILE.safetensors) is converted into the user's cache,
    once: it is known by its content, on the hub by its commit, and found again wherever it is.

    Raises RequestError, before anything is written, for what cannot be converted and for a recipe
    beside a model that needs none; OutputError for a cache that cannot be written, or too small a
    disk; Cancelled after Ctrl-C: what is finished stays, and the same call goes on from there.
    """
    path = None if model is None else local_model(model)
    if model is None or (path is not None and not needs_conversion(path)):
        _check_unasked(model, asked)
        return resolve_model(model)
    if asked.recipe is not None:
        from sdvino.compress.recipes import get_recipe

        get_recipe(asked.recipe)  # before anything is downloaded
    if path is not None:
        return _converted(LocalSource(path.absolute(), asked.hub.revision), asked)
    found = _on_hub(str(model), asked)
    return found if isinstance(found, Path) else _converted(found, asked)


def _key(source: str, recipe: str | Path, *, gated: bool) -> str:
    """Return the key of what ``source`` becomes by ``recipe``, known by what it says."""
    from sdvino.compress.recipe_file import to_toml
    from sdvino.compress.recipes import get_recipe

    return cache_key(_FORMAT, source, to_toml(get_recipe(recipe)), gated)


def default_recipe() -> str:
    """Return the recipe of models that are converted at first use."""
    return "int8" if importlib.util.find_spec("nncf") is not None else "fp16"


def needs_conversion(path: Path) -> bool:
    """Tell whether ``path`` is a file, or a diffusers folder, rather than a model folder."""
    if path.is_file():
        return True
    unet = path / "unet"
    converted = any((unet / f"openvino_model{suffix}").exists() for suffix in (".xml", ".bin"))
    return (path / INDEX_FILE).is_file() and unet.is_dir() and not converted


def _check_unasked(model: object, asked: ModelOptions) -> None:
    """Raise RequestError for options of converting beside a model that is not converted."""
    if asked.recipe is not None or asked.gate:
        option = "--gate" if asked.recipe is None else "--recipe"
        what = "the bundled model" if model is None else str(model)[:200]
        raise RequestError(
            f"{option} is for models that are converted at first use, and {what} is an OpenVINO"
            " model already; leave it out, or make another folder with `sdvino convert`."
        )


def _on_hub(model: str, asked: ModelOptions) -> Path | HubSource:
    """Return the folder of an OpenVINO model on the hub, or what there is to convert.

    Where the hub cannot be reached and nothing is here, what an earlier conversion made will do.
    """
    from sdvino.convert.hub_source import is_hub_source, split_file

    alone = split_file(model)[1] is None
    # owner/name.safetensors is a file that is not there, more likely than a model on the hub.
    if not is_hub_source(model) or (alone and model.lower().endswith(".safetensors")):
        raise not_found(model)

    def choose(names: Sequence[str]) -> list[str]:
        wanted = runnable_files(model, names)
        _check_unasked(model, asked)
        return wanted

    try:
        with contextlib.suppress(NotConverted):
            if alone:
                return fetch(model, choose, asked.hub)
        return find_on_hub(model, asked.hub)
    except NotDownloaded:
        found = _made_before(model, asked)
        if found is None:
            raise
        return found


def _made_before(model: str, asked: ModelOptions) -> Path | None:
    """Return what was converted of a model on the hub, last used at last, as it is asked for."""
    store = ConvertedModels()
    for entry in reversed(store.entries()):
        made = entry.made
        if made.hub == model and asked.revision in (made.revision, made.commit):
            found = _ready(store, made.source, asked)
            if found is not None:
                return found
    return None


def _converted(source: Source, asked: ModelOptions) -> Path:
    """Return the folder that ``source`` was converted into, now if it was not before."""
    store = ConvertedModels()
    if source.unread:
        # What convert refuses is refused before it is read.
        with tempfile.TemporaryDirectory(prefix="sdvino-") as scratch:
            _look_ahead(source, asked, Path(scratch) / "model")
        if source.unread > _LONG_BYTES:
            asked.hub.report(
                f"Reading {source.name} ({shown_size(source.unread)}) to know it by its content."
            )
    known = source.key()
    found = _ready(store, known, asked)
    return _convert(source, known, store, asked) if found is None else found


def _ready(store: ConvertedModels, source: str, asked: ModelOptions) -> Path | None:
    """Return a complete model made from ``source`` as it is asked for, kept from being removed."""
    for key in asked.keys(source):
        entry = store.entry(key)
        if entry is not None and store.use(entry) and _is_sound(entry):
            trim(store, entry, asked.hub.report)
            return entry.model
    return None


def _convert(source: Source, known: str, store: ConvertedModels, asked: ModelOptions) -> Path:
    """Convert ``source``, which is known by ``known``, unless another process just did."""
    from sdvino.convert.api import run

    key, recipe = asked.key(known), asked.recipes[0]
    target = store.root / key / "model"
    # What is there already is damaged, and goes.
    outlook = _look_ahead(source, asked, target.with_name("new") if target.exists() else target)
    _check_room(outlook, store.root)

    def waiting() -> None:
        asked.hub.report(f"Another process is converting {source.name}; waiting until it is done.")

    with store.converting(key, source.made(outlook.recipe.name, known), waiting) as entry:
        if entry.complete and _is_sound(entry):  # by that other process
            store.use(entry)
            return entry.model
        store.discard(entry)
        asked.hub.report(_announcement(source, outlook, entry, store, asked))
        request = source.request(recipe, asked.gate_settings)
        with progress_bar(quiet=asked.quiet) as show:
            run(
                request,
                entry.model,
                overwrite=False,
                fresh=False,
                progress=show,
                say=above_bar(asked.hub.report),
            )
        if source.key() != known:
            store.discard(entry)
            raise SdvinoError(f"{source.name} changed while it was converted; run it again.")
        store.use(entry)
    if asked.gate:  # the same without is of no use any more
        _remove_uncompared(store, entry, asked)
    trim(store, entry, asked.hub.report)
    return entry.model


def _look_ahead(source: Source, asked: ModelOptions, target: Path) -> Outlook:
    """Return what converting would do; raises RequestError for what it, or running, refuses."""
    from sdvino.convert.api import look_ahead

    def outlook(recipe: str | Path) -> Outlook:
        return look_ahead(source.outline(recipe, asked.gate_settings), target)

    try:
        found = outlook(asked.recipes[0])
    except RequestError:
        # With the recipe that some of these sentences ask for it may still not run.
        other = None
        with contextlib.suppress(RequestError):
            other = outlook("fp16")
        if other is not None:
            _check_runs(other)
        raise
    _check_runs(found)
    return found


def _check_runs(outlook: Outlook) -> None:
    """Raise RequestError for a model that could be converted and makes no picture from text."""
    family = outlook.source.family
    if not family.runs:
        raise RequestError(
            f"{outlook.source.name} is for {family.title}; sdvino makes pictures from text alone,"
            " so use an ordinary text-to-image model."
        )


def _check_room(outlook: Outlook, root: Path) -> None:
    """Raise OutputError for a folder or disk that cannot take the model, and the memory too small.

    Before anything is downloaded, that is.
    """
    standing = next(folder for folder in (root, *root.parents) if os.path.lexists(folder))
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise OutputError(
            f"{root} cannot be written; set {FOLDER_VARIABLE} to a folder that you may write to."
        )
    free = shutil.disk_usage(standing).free
    if free < outlook.needs.disk:
        raise OutputError(
            f"Converting {outlook.source.name} needs {shown_size(outlook.needs.disk)} on the disk"
            f" of {root} and {shown_size(free)} are free; free some space (`sdvino models --remove"
            f" NAME` removes what was converted), or set {FOLDER_VARIABLE} to a folder on another"
            " disk."
        )
    if outlook.download:
        from sdvino.convert.estimate import check_needs

        check_needs(outlook.needs, standing)


def _announcement(
    source: Source, outlook: Outlook, entry: Entry, store: ConvertedModels, asked: ModelOptions
) -> str:
    settings = asked.gate_settings
    others = {
        other.made.recipe
        for other in store.entries()
        if other.complete and other.made.source == entry.made.source
    }
    return announcement(
        source.name,
        outlook,
        store.root,
        chosen=asked.recipe is not None,
        gate_minutes=None if settings is None else settings.minutes,
        others=sorted(others),
    )


def _is_sound(entry: Entry) -> bool:
    """Tell whether the model of an entry still opens: somebody may have removed a part of it."""
    try:
        ModelFolder.open(entry.model)
    except ModelFolderError:
        return False
    return True


def _remove_uncompared(store: ConvertedModels, entry: Entry, asked: ModelOptions) -> None:
    """Remove what was made from the same source by the same recipe and compared with nothing."""
    other = store.entry(_key(entry.made.source, asked.recipes[0], gated=False))
    if other is not None:
        with contextlib.suppress(OutputError):
            store.remove(other)
