"""What stands around the components of a converted folder: configs, scheduler, tokenizer, manifest.

The scheduler is one that OpenVINO GenAI knows, the better one is suggested. passes.md tells what
passes did to the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdvino import __version__
from sdvino.compress.recipes import Recipe
from sdvino.convert.open_source import Source
from sdvino.folder.manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestComponent,
    Suggested,
    checksums_around,
)
from sdvino.inputs.files import write_json
from sdvino.inputs.shown import markdown

_LIBRARIES = ("openvino", "openvino-tokenizers", "nncf")
# Those of passes and of optimum-intel's exporter.
_TRAINING = ("optimum-intel", "diffusers", "transformers", "torch")


def write_manifest(
    folder: Path,
    components: Iterable[str],
    *,
    source: str,
    family: str,
    recipe: Recipe,
    suggested: Mapping[str, Any],
    baked: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    passes: Sequence[Mapping[str, Any]] = (),
    target: str | None = None,
    trained: bool = False,
) -> None:
    """Write sdvino.json into the finished ``folder``: precision, size and hashes of each component.

    ``source`` is a name, never a path. ``baked`` names the LoRAs and autoencoders that went in;
    ``quality`` is the gate's verdict; ``passes`` is what was done to the weights first, with
    figures, which passes.md tells as well; ``target`` is the kind of machine that it is made for;
    ``trained`` tells whether the libraries of training took part.
    """
    manifest = Manifest(
        source=source,
        family=family,
        recipe=recipe.name,
        components={
            name: ManifestComponent.of(folder / name, recipe.treatment(name)) for name in components
        },
        files=checksums_around(folder),
        quality=quality,
        passes=tuple(passes),
        suggested=Suggested(**suggested),
        baked={} if baked is None else baked,
        target=target,
        versions=tool_versions(trained=trained),
    )
    if passes:
        report = passes_report(source, passes)
        (folder / PASSES_FILE).write_text(report, encoding="utf-8")
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def tool_versions(*, trained: bool) -> dict[str, str]:
    """Return the versions of the libraries that make a folder, without local build tags."""
    names = (*_LIBRARIES, *(_TRAINING if trained else ()))
    found = {name: text for name in names if (text := _version(name)) is not None}
    return {"sdvino": __version__, **found}


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def write_metadata(source: Source, folder: Path) -> None:
    """Write model_index.json, the scheduler and the tokenizer: no paths, no safety checker."""
    from sdvino.convert.openvino_tokenizer import convert_tokenizer

    index = _without_path(source.model_index)
    absent = ["feature_extractor", "image_encoder"]
    if len(source.family.text_encoders) == 1:  # SDXL's pipelines know no safety checker
        absent.append("safety_checker")
        index["requires_safety_checker"] = False
    index.update({name: [None, None] for name in absent})
    scheduler = portable_scheduler(source.configs["scheduler"])
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for tokenizer in source.tokenizers:
        convert_tokenizer(source.folder(tokenizer), folder / tokenizer)


def write_component_config(source: Source, component: str, folder: Path) -> None:
    """Write the config.json of ``component`` into its ``folder``."""
    config = source.configs[source.components[component]]
    write_json(folder / "config.json", _without_path(config))


def _without_path(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


#: Classes that OpenVINO GenAI runs Stable Diffusion with; it throws on any other.
GENAI_SCHEDULERS: tuple[str, ...] = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
)
_FALLBACK = "DDIMScheduler"
# The samplers that training scripts left in folders for years: nobody's choice, so a better one
# may be suggested in their place.
_HISTORIC = ("DDIMScheduler", "PNDMScheduler")
# Models distilled for these need few steps and hardly any guidance.
_DISTILLED = ("LCMScheduler", "TCDScheduler")


def portable_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` (a scheduler_config.json) naming a scheduler that GenAI knows.

    Another class becomes DDIM over the same betas; its fields stay, as classes ignore those they
    do not know. The two corrections are those that diffusers' Stable Diffusion pipeline makes to
    outdated files when it loads them: latents are never clipped (said of every scheduler, as in
    Stable Diffusion 1.5's own file: DDIM in another's place would clip), and a steps_offset is 1.
    """
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    if result.get("_class_name") not in GENAI_SCHEDULERS:
        result["_class_name"] = _FALLBACK
        result.setdefault("set_alpha_to_one", False)
    result["clip_sample"] = False
    if result.get("steps_offset") is not None:
        result["steps_offset"] = 1
    return result


def is_historic(config: Mapping[str, Any]) -> bool:
    """Tell whether the folder names a scheduler by habit rather than by choice."""
    return config.get("_class_name", _FALLBACK) in _HISTORIC


def is_distilled(config: Mapping[str, Any]) -> bool:
    """Tell whether the model was distilled to make a picture in a few steps."""
    return config.get("_class_name") in _DISTILLED


PASSES_FILE = "passes.md"

_HEAD = """\
# Passes

What was done to the weights of {name} before it was exported, in this order. The quality gate's
report, if there is one, compares with the model after these passes: what they cost is here, as the
distance of the component's output from what it was, on the pipeline's own inputs.
"""


def passes_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each pass: what it did, what is left, how far the output moved."""
    lines = []
    for entry in history:
        before, after = entry["before"], entry["after"]
        parts = [f"parameters {_share(after['parameters'], before['parameters'])}"]
        if after["nonzero"] * before["parameters"] < before["nonzero"] * after["parameters"]:
            parts.append(f"{1 - after['nonzero'] / after['parameters']:.1%} of them zero")
        parts.append(f"operations {_share(after['operations'], before['operations'])}")
        if entry["output_error"] is not None:
            parts.append(f"output moved by {entry['output_error']:.1%}")
        lines.append(f"{entry['component']}: {entry['what']}: {', '.join(parts)}")
    return lines


def notes(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what has to be said beside the figures, once each."""
    said = [entry["figures"]["note"] for entry in history if "note" in entry["figures"]]
    return list(dict.fromkeys(said))


def passes_report(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """Return passes.md: the lines of all passes, and each one's figures by layer."""
    lines = [_HEAD.format(name=markdown(name))]
    lines += [f"{place}. {line}" for place, line in enumerate(passes_lines(history), 1)]
    for place, entry in enumerate(history, 1):
        lines += ["", f"## {place}. {entry['what']}, {entry['component']}", ""]
        if "note" in entry["figures"]:
            lines += [markdown(entry["figures"]["note"]), ""]
        lines += _figures(entry["figures"])
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from ("", f"| layer | {key.replace('_', ' ')} |", "|---|---|")
            yield from (f"| `{layer}` | {_cell(cell)} |" for layer, cell in value.items())
        elif key.endswith("_bytes"):
            yield f"- {key.removesuffix('_bytes').replace('_', ' ')}: {value / 1e9:.2f} GB"
        elif key != "note":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"- {key.replace('_', ' ')}: {shown}"


def _cell(value: Any) -> str:
    return f"{value[0]} of {value[1]}" if isinstance(value, list) else f"{value:.2%}"


def _share(after: int, before: int) -> str:
    return f"{after / 1e6:,.1f} M ({after / max(before, 1):.1%} of before)"
