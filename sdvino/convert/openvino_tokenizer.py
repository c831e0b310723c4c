"""The tokenizer of a converted folder: the source's files, and the same as an OpenVINO model."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import openvino as ov

from sdvino.compress.quiet import quiet
from sdvino.errors import SdvinoError, said_by
from sdvino.graph.saving import save_graph
from sdvino.inputs.files import read_bytes, read_json
from sdvino.text.tokenizer import WORDS, tokenizer_json
from sdvino.text.vocabulary import MAX_FILE_BYTES, TokenizerFiles, read_tokenizer_files

_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# What holds a path or a name of the machine that saved the tokenizer, or of its Python classes.
_MODELS = ("openvino_tokenizer", "openvino_detokenizer")
_PRIVATE_KEYS = ("name_or_path", "_name_or_path", "auto_map", "is_local")


def convert_tokenizer(source: Path, output: Path) -> None:
    """Copy the tokenizer in ``source`` to ``output`` and add what other runtimes read.

    transformers 5 reads tokenizer.json alone, and OpenVINO GenAI openvino_tokenizer.xml: both are
    made when they are not there, the latter where openvino_tokenizers is installed.
    Raises SdvinoError when the files are no CLIP tokenizer.
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
        raise SdvinoError(
            f"The tokenizer in {source} cannot be converted: {said_by(error)}"
        ) from error


def _add_derived(output: Path) -> None:
    files = read_tokenizer_files(output)
    written = output / "tokenizer.json"
    if not written.is_file():
        written.write_text(tokenizer_json(files), encoding="utf-8")
    if importlib.util.find_spec("openvino_tokenizers") is None:
        return  # a folder for sdvino, transformers and diffusers; OpenVINO GenAI wants more
    for name, model in zip(_MODELS, _openvino_models(files), strict=True):
        model.set_friendly_name(name)
        for key, token in (("bos", files.start), ("eos", files.end), ("pad", files.pad)):
            model.set_rt_info(files.vocab[token], f"{key}_token_id")
        save_graph(model, output / f"{name}.xml")


def _openvino_models(files: TokenizerFiles) -> tuple[ov.Model, ov.Model]:
    """Return CLIP's tokenizer and detokenizer as OpenVINO models, of openvino_tokenizers' steps.

    Its own converter makes the same steps, but of what transformers read.
    """
    from openvino_tokenizers.utils import change_inputs_type, change_outputs_type

    pipeline = _pipeline(files)
    whole = pipeline.get_tokenizer_ov_subgraph()
    named = {name: port for port in whole.outputs for name in port.get_names()}
    # CLIP has no types of tokens.
    kept = [named[name] for name in ("input_ids", "attention_mask")]
    tokenizer = ov.Model(kept, whole.get_parameters())
    tokenizer.add_sinks(whole.get_sinks())
    change_outputs_type(tokenizer, ov.Type.i64)
    detokenizer = pipeline.get_detokenizer_ov_subgraph()
    change_inputs_type(detokenizer, ov.Type.i64)
    return tokenizer, detokenizer


def _pipeline(files: TokenizerFiles) -> Any:
    """Return the steps from text to tokens and back, a TokenizerPipeline."""
    from openvino_tokenizers import tokenizer_pipeline as ot
    from openvino_tokenizers.constants import UTF8ReplaceMode

    content = json.loads(tokenizer_json(files))
    start, end, pad = (
        {"token": token, "_token_id": files.vocab[token]}
        for token in (files.start, files.end, files.pad)
    )
    split = [
        ot.SpecialToken(token.content, token.flags["lstrip"], token.flags["rstrip"])
        for token in files.added
    ]
    pipeline = ot.TokenizerPipeline()
    pipeline.number_of_inputs = 1
    pipeline.add_steps(
        [
            ot.SpecialTokensSplit(split),
            ot.NormalizeUnicode("NFC"),
            ot.RegexNormalizationStep(r"\s+", " "),
            ot.CaseFoldStep(),
            ot.RegexSplitStep(WORDS, invert=True, behaviour="remove"),
            ot.RegexSplitStep.byte_level_splitter(),
            ot.BytesToCharsStep(),
            ot.BPETokenizationStep.from_hf_json(content),
        ]
    )
    pipeline.vocab = pipeline[-1].vocab
    decoder = ot.VocabDecoderStep.from_hf_json(
        tokenizer_json=content,
        pipeline_vocab=pipeline.vocab,
        skip_tokens={token.id: token.content for token in files.added if token.flags["special"]},
        added_tokens={token.id: token.content for token in files.added},
        is_byte_level=True,
    )
    pipeline.add_steps(
        [
            ot.TruncationStep(files.max_length - 2),
            ot.CombineSegmentsStep([ot.AddToken(**start), ot.Sequence(), ot.AddToken(**end)]),
            ot.PaddingStep(**pad, max_length=files.max_length),
            decoder,
            ot.CharsToBytesStep(),
            ot.UTF8ValidateStep(mode=UTF8ReplaceMode.REPLACE),
            ot.RegexDecodingStep.replace_end_of_word_suffix(suffix="</w>"),
            ot.RegexDecodingStep.rstrip_space(),
        ]
    )
    return pipeline


def _clean_config(path: Path) -> None:
    if not path.is_file():
        return
    config = read_json(path, path.name)
    kept = {key: value for key, value in config.items() if key not in _PRIVATE_KEYS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
