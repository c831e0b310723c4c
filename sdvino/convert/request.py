"""What is asked of a conversion, as plain data: it travels to the worker processes as JSON."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.recipe_file import from_toml, to_toml
from sdvino.compress.recipes import Recipe, get_recipe
from sdvino.compress.thresholds import GateSettings
from sdvino.convert.baking import BakingRequest, bake
from sdvino.convert.export import Exporter
from sdvino.convert.open_source import Source, Told, open_source, outline_source
from sdvino.errors import RequestError, SdvinoError
from sdvino.folder.hub import Hub

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one conversion. Every field is something that JSON holds."""

    #: Absolute path of the source; empty where it is on the hub and only looked at.
    source: str
    #: Name of the recipe or absolute path of its TOML file, and exceptions from it: component ->
    #: precision.
    recipe: str
    components: Mapping[str, str]
    #: The machine that int8 is made for: a name in `sdvino.compress.targets`.
    target: str = "auto"
    #: Prompts to calibrate on; None: the source's own, or a general list.
    prompts: tuple[str, ...] | None = None
    #: num_inference_steps, guidance_scale, scheduler.
    suggested: Mapping[str, Any] | None = None
    #: The model's name in the manifest; None: the source's.
    name: str | None = None
    #: What the source is called, where its path does not say: its hub id.
    source_name: str | None = None
    #: For single files: absolute path of a folder with CLIP's vocabulary, and what the UNet
    #: predicts.
    tokenizer: str | None = None
    prediction_type: str | None = None
    #: LoRAs and autoencoders that go in.
    baking: BakingRequest = field(default_factory=BakingRequest)
    #: How the gate judges the result; None: there is none.
    gate: GateSettings | None = None
    #: Who writes the graphs.
    exporter: Exporter = "sdvino"
    #: Of the hub, where the source is only looked at.
    revision: str | None = None
    offline: bool = False
    max_download: int | None = None

    def open_source(self, work: Path, *, say: bool = False) -> Source:
        """Open the source, checked, with whatever is put in the place of its parts.

        What a single file lacks goes below ``work``, once: workers open the source again. ``say``
        logs what of a LoRA fits nothing. Raises RequestError for a source that is none.
        """
        source = open_source(Path(self.source), work, self._told)
        return bake(source, self.baking, say=say)

    def outline_source(self, work: Path) -> tuple[Source, int]:
        """Return the source as `open_source` would, and the bytes to be downloaded before.

        It tells what a conversion would take; no weight is downloaded.
        """
        source, download = outline_source(
            Path(self.source) if self.source else str(self.source_name),
            work,
            self._told,
            Hub(revision=self.revision, offline=self.offline, max_download=self.max_download),
        )
        return bake(source, self.baking, say=False), download

    @property
    def _told(self) -> Told:
        return Told(
            name=self.source_name,
            tokenizer=None if self.tokenizer is None else Path(self.tokenizer),
            prediction_type=self.prediction_type,
            own_vae=self.baking.vae is None,
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Return every file and folder that the model is made from."""
        vocabulary = () if self.tokenizer is None else (Path(self.tokenizer),)
        source = (Path(self.source),) if self.source else ()
        return (*source, *vocabulary, *self.baking.files)

    def resolve_recipe(self) -> Recipe:
        """Return the recipe with its exceptions; raises RequestError for unknown names."""
        return get_recipe(self.recipe).with_overrides(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPlan:
    """What the worker processes read: the request, and what was decided from it."""

    request: Request
    recipe: Recipe
    calibration: CalibrationPlan
    #: Our names of the components, in order.
    components: tuple[str, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Return the components that need calibration inputs."""
        return tuple(name for name in self.components if self.recipe.component(name).calibrated)

    def open_source(self, work: Path) -> Source:
        """Open the source as the request does."""
        return self.request.open_source(work)

    def write(self, folder: Path) -> None:
        """Write ``folder``/plan.json."""
        value = {
            "request": to_plain(asdict(self.request)),
            "recipe": recipe_to_plain(self.recipe),
            "calibration": to_plain(asdict(self.calibration)),
            "components": list(self.components),
        }
        text = json.dumps(value, indent=1)
        (folder / PLAN_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> WorkPlan:
        """Read what `write` wrote."""
        value = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return cls(
            request=_from_plain(Request, value["request"]),
            recipe=recipe_from_plain(value["recipe"]),
            calibration=_from_plain(CalibrationPlan, value["calibration"]),
            components=tuple(value["components"]),
        )


def recipe_to_plain(recipe: Recipe) -> str:
    """Return a recipe as what JSON holds: its TOML."""
    return to_toml(recipe)


def recipe_from_plain(value: str) -> Recipe:
    """Return the recipe that `recipe_to_plain` wrote down."""
    return from_toml(value)


def to_plain(value: Any) -> Any:
    """Return ``value`` with tuples and mappings as JSON has them: lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise SdvinoError(f"A {type(value).__name__} cannot be handed to a worker process.")


_NESTED: Mapping[str, Any] = {"baking": BakingRequest, "gate": GateSettings}


def _from_plain(cls: Any, value: Mapping[str, Any]) -> Any:
    """Return the dataclass; its sequences are tuples."""
    known = {field.name for field in fields(cls)}
    return cls(**{key: _field(key, item) for key, item in value.items() if key in known})


def _field(name: str, value: Any) -> Any:
    if name in _NESTED and isinstance(value, Mapping):
        return _from_plain(_NESTED[name], value)
    return tuple(value) if isinstance(value, list) else value


_COMPRESSING = ("nncf",)
_DRAWING = ("matplotlib",)
_TRAINING = ("torch", "diffusers", "transformers")
_TRACING = (*_TRAINING, "optimum")


def require_libraries(recipe: Recipe, exporter: Exporter, *, gated: bool) -> None:
    """Raise RequestError unless the libraries that this conversion takes are installed.

    They are looked for, not imported: the worker processes do that, and only what they need.
    """
    compresses = any(entry.mode != "fp16" for entry in recipe.components.values())
    convert = [*_COMPRESSING, *(_DRAWING if gated else ())] if compresses else []
    train = _TRACING if exporter != "sdvino" else _TRAINING if recipe.passes else ()
    wanted: Mapping[str, Sequence[str]] = {"train": train, "convert": convert}
    for extra, names in wanted.items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise RequestError(
                f"This conversion needs libraries that are not here ({', '.join(missing)});"
                f' install them with: pip install "sdvino[{extra}]"'
                f"{', or choose --recipe fp16' if extra == 'convert' else ''}."
            )
