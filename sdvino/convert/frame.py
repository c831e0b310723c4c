"""What stands around the components of a converted folder: configs, scheduler, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdvino.convert.scheduler import portable_scheduler
from sdvino.convert.source import DiffusersFolder


def write_frame(source: DiffusersFolder, folder: Path) -> None:
    """Write model_index.json, the scheduler and the tokenizer: no paths, no safety checker."""
    from sdvino.convert.tokenizer import convert_tokenizer

    index = _without_path(source.model_index)
    for absent in ("safety_checker", "feature_extractor", "image_encoder"):
        index[absent] = [None, None]
    index["requires_safety_checker"] = False
    scheduler = portable_scheduler(source.configs["scheduler"])
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    convert_tokenizer(source.path / "tokenizer", folder / "tokenizer")


def write_component_config(source: DiffusersFolder, component: str, folder: Path) -> None:
    """Write the config.json of ``component`` into its ``folder``."""
    config = source.configs[source.components[component]]
    _write_json(folder / "config.json", _without_path(config))


def _without_path(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
