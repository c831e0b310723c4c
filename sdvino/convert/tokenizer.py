"""The tokenizer of a converted folder: the source's files, and the same as an OpenVINO model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sdvino.compress.quiet import quiet
from sdvino.errors import SdvinoError
from sdvino.inputs.files import read_bytes, read_json
from sdvino.text.vocabulary import MAX_FILE_BYTES

_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# What holds a path or a name of the machine that saved the tokenizer, or of its Python classes.
_PRIVATE_KEYS = ("name_or_path", "_name_or_path", "auto_map", "is_local")


def convert_tokenizer(source: Path, output: Path) -> None:
    """Copy the tokenizer in ``source`` to ``output`` and add what other runtimes read.

    transformers 5 reads tokenizer.json alone, and OpenVINO GenAI openvino_tokenizer.xml: both are
    made when they are not there. Raises SdvinoError when the files are no CLIP tokenizer.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if os.path.lexists(source / name):
            content = read_bytes(source / name, f"{source.name}/{name}", limit=MAX_FILE_BYTES)
            (output / name).write_bytes(content)
    _clean_config(output / "tokenizer_config.json")
    try:
        with quiet():
            _add_derived(output)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SdvinoError(f"The tokenizer in {source} cannot be converted: {what}") from error


def _add_derived(output: Path) -> None:
    import openvino as ov
    import openvino_tokenizers
    from transformers import CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(output, local_files_only=True)
    if not (output / "tokenizer.json").is_file():
        tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
    models = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), models, strict=True):
        model.set_friendly_name(name)
        ov.save_model(model, output / f"{name}.xml")


def _clean_config(path: Path) -> None:
    if not path.is_file():
        return
    config = read_json(path, path.name)
    kept = {key: value for key, value in config.items() if key not in _PRIVATE_KEYS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
