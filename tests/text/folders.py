"""Writes small tokenizer folders that are built as CLIP's is, in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("red", "blue", "circle", "on", "green", "the", "light", "house", "lighthouse", "'s", "été")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's order: bytes, bytes that end a word, merges, the two special tokens."""
    letters = sorted(ByteLevel.alphabet())
    letters.remove("!")
    letters.insert(0, "!")  # CLIP's own vocabulary starts with it, and SD 2.x pads with id 0
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        spelled = [chr(c) for c in word.encode()] if word.isascii() else list("Ã©tÃ©")
        parts = [*spelled[:-1], spelled[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    merges = list(dict.fromkeys(merges))
    tokens = list(dict.fromkeys([*tokens, START, END]))
    return {token: i for i, token in enumerate(tokens)}, merges


def write_legacy(folder: Path, pad: str = END, flags: bool = False) -> Path:
    """Write vocab.json, merges.txt and the two configuration files, as transformers 4 did."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()

    def token(text: str) -> Any:
        if not flags:
            return text
        common = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"content": text, **common}

    special = {
        "bos_token": token(START),
        "eos_token": token(END),
        "pad_token": pad,
        "unk_token": token(END),
    }
    config = {
        **{name: token(END) for name in ("eos_token", "unk_token")},
        "bos_token": token(START),
        "pad_token": pad,
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "tokenizer_class": "CLIPTokenizer",
    }
    if flags:  # as saved, each token says what it is
        for name in ("bos_token", "eos_token", "unk_token"):
            config[name] = {"__type": "AddedToken", **special[name]}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_fast(folder: Path, pad: str = END, added: tuple[str, ...] = ()) -> Path:
    """Write tokenizer.json and its configuration, as transformers 5 does."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    special = [
        {"id": vocab[text], "content": text, **flags, "normalized": False, "special": True}
        for text in dict.fromkeys([START, END, pad])
    ]
    words = [
        {"id": len(vocab) + i, "content": text, **flags, "normalized": True, "special": False}
        for i, text in enumerate(added)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*special, *words],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [START, vocab[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    config = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
