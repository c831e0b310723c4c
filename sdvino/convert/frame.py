"""What stands around the components of a converted folder: configs, scheduler, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdvino.convert.open_source import Source
from sdvino.convert.scheduler import portable_scheduler


def write_frame(source: Source, folder: Path) -> None:
    """Write model_index.json, the scheduler and the tokenizer: no paths, no safety checker."""
    from sdvino.convert.tokenizer import convert_tokenizer

    index = _without_path(source.model_index)
    absent = ["feature_extractor", "image_encoder"]
    if len(source.family.text_encoders) == 1:  # SDXL's pipelines know no safety checker
        absent.append("safety_checker")
        index["requires_safety_checker"] = False
    index.update({name: [None, None] for name in absent})
    scheduler = portable_scheduler(source.configs["scheduler"])
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for tokenizer in source.tokenizers:
        convert_tokenizer(source.folder(tokenizer), folder / tokenizer)


def write_component_config(source: Source, component: str, folder: Path) -> None:
    """Write the config.json of ``component`` into its ``folder``."""
    config = source.configs[source.components[component]]
    _write_json(folder / "config.json", _without_path(config))


def _without_path(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
