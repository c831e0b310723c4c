"""Reads the files of a CLIP tokenizer folder, in both layouts, checking everything they say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError
from sdvino.inputs.files import read_json, read_text

#: Largest file that is read (CLIP's tokenizer.json has 3.6 MB), and the largest vocabulary.
MAX_FILE_BYTES = 64 * 2**20
MAX_TOKENS = 1_000_000
DEFAULT_LENGTH = 77
MAX_LENGTH = 4096

_END = "<|endoftext|>"
_NAMED = {
    "unk_token": _END,
    "bos_token": "<|startoftext|>",
    "eos_token": _END,
    "pad_token": _END,
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is matched in the text before the text is split into words."""

    content: str
    id: int
    #: Flags of `tokenizers.AddedToken`: single_word, lstrip, rstrip, normalized, special.
    flags: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a tokenizer folder says, checked."""

    #: The file with the vocabulary, for messages.
    source: Path
    #: Every token and its id, the added ones too.
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: tuple[SpecialToken, ...]
    start: str
    end: str
    pad: str
    unknown: str
    max_length: int


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read a tokenizer folder as transformers 5 does; raises ModelFolderError, with what to do."""
    single = folder / "tokenizer.json"
    config = _read_object(folder / "tokenizer_config.json", required=False)
    fast: dict[str, Any] = {}
    if single.is_file():
        source = single
        fast = _read_object(single)
        model = fast.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise _wrong(single, "it holds no byte-pair vocabulary")
        vocab, merges = _check_vocab(single, model.get("vocab")), _json_merges(single, model)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        source = folder / "vocab.json"
        vocab = _check_vocab(source, _read_object(source))
        merges = _text_merges(folder / "merges.txt")
    else:
        raise ModelFolderError(
            f"{folder.name} holds neither tokenizer.json nor vocab.json with merges.txt;"
            " copy them from the original model."
        )
    return _assemble(source, config, fast, vocab, merges)


def _assemble(
    source: Path,
    config: dict[str, Any],
    fast: dict[str, Any],
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
) -> TokenizerFiles:
    folder = source.parent
    listed = _listed_tokens(folder, config, fast)
    named: dict[str, str] = {}
    flags: dict[str, dict[str, bool]] = {content: given for content, given, _ in listed}
    special = _read_object(folder / "special_tokens_map.json", required=False)
    if "added_tokens_decoder" in config:
        special = {}  # transformers then takes tokenizer_config.json alone
    for name, default in _NAMED.items():
        value = special.get(name, config.get(name))
        content, given = _token(source, default if value is None else value, special=True)
        named[name] = content
        flags.setdefault(content, given)
    known = dict(vocab)
    for content, _, token_id in sorted(listed, key=lambda entry: entry[2]):
        if known.setdefault(content, token_id) != token_id:
            raise _wrong(source, f"the token {content!r} has two ids")
    for name, content in named.items():
        if content not in known:
            raise _wrong(source, f"its {name} {content!r} is not in the vocabulary")
        flags[content] = {**flags[content], "special": True}
    _check_ids(source, known)
    if max(known.values()) >= len(known):
        raise _wrong(source, "an id is larger than the number of tokens")
    added = [SpecialToken(content, known[content], given) for content, given in flags.items()]
    return TokenizerFiles(
        source=source,
        vocab=known,
        merges=merges,
        added=tuple(sorted(added, key=lambda token: token.id)),
        start=named["bos_token"],
        end=named["eos_token"],
        pad=named["pad_token"],
        unknown=named["unk_token"],
        max_length=_max_length(config),
    )


def _listed_tokens(
    folder: Path, config: dict[str, Any], fast: dict[str, Any]
) -> list[tuple[str, dict[str, bool], int]]:
    """Return (content, flags, id) of the added tokens; the first file that has them counts."""
    listed = config.get("added_tokens_decoder")
    source = folder / "tokenizer_config.json"
    entries: list[tuple[Any, Any]]
    if isinstance(listed, dict):
        entries = list(listed.items())
    else:
        source = folder / "tokenizer.json"
        given = fast.get("added_tokens", [])
        if not isinstance(given, list):
            raise _wrong(source, "its added_tokens are not a list")
        entries = [(token.get("id") if isinstance(token, dict) else None, token) for token in given]
    found: list[tuple[str, dict[str, bool], int]] = []
    for key, token in entries:
        text = str(key)
        if not (text.isascii() and text.isdigit() and len(text) < 8):
            raise _wrong(source, "an added token has no id")
        content, flags = _token(source, token, special=False)
        found.append((content, flags, int(text)))
    return found


def _token(source: Path, value: object, *, special: bool) -> tuple[str, dict[str, bool]]:
    """Return a token's text and flags from its text alone or from its JSON object."""
    given: Mapping[str, Any] = {}
    if isinstance(value, dict):
        given, value = value, value.get("content")
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise _wrong(source, "a special token is not a short text")
    flags = {name: given.get(name, False) for name in _FLAGS}
    flags["special"] = special or flags["special"]
    # tokenizers' own default: what is not special is matched in normalized text.
    flags["normalized"] = given.get("normalized", not flags["special"])
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(source, f"the flags of the token {value!r} are not true or false")
    return value, flags


def _check_vocab(source: Path, vocab: object) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise _wrong(source, "it holds no vocabulary")
    _check_ids(source, vocab)
    return vocab


def _check_ids(source: Path, vocab: dict[str, Any]) -> None:
    """Check that the ids are whole numbers from 0, each once: they are rows of an embedding."""
    if len(vocab) > MAX_TOKENS:
        raise _wrong(source, f"it has more than {MAX_TOKENS:,} tokens")
    if any(type(i) is not int for i in vocab.values()):
        raise _wrong(source, "an id is not a whole number")
    if len(set(vocab.values())) != len(vocab) or min(vocab.values()) < 0:
        raise _wrong(source, "an id stands for two tokens or is negative")
    if max(vocab.values()) >= MAX_TOKENS:
        raise _wrong(source, "an id is absurdly large")


def _json_merges(source: Path, model: dict[str, Any]) -> list[tuple[str, str]]:
    merges = model.get("merges")
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise _wrong(source, "its merges are not a list of pairs")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [_pair(source, pair) for pair in pairs]


def _text_merges(path: Path) -> list[tuple[str, str]]:
    # Only \n ends a line: a merge may hold characters that splitlines() takes for line ends.
    text = read_text(path, f"{path.parent.name}/{path.name}", limit=MAX_FILE_BYTES)
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > MAX_TOKENS:
        raise _wrong(path, f"it has more than {MAX_TOKENS:,} lines")
    body = lines[1:] if lines[0].startswith("#version") else lines
    return [_pair(path, line.split(" ")) for line in body if line]


def _pair(source: Path, pair: object) -> tuple[str, str]:
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        return pair[0], pair[1]
    raise _wrong(source, "a merge is not a pair of tokens")


def _max_length(config: dict[str, Any]) -> int:
    """Return the length asked for; transformers writes 1e30 where it is not known."""
    value = config.get("model_max_length")
    if isinstance(value, int) and not isinstance(value, bool) and 3 <= value <= MAX_LENGTH:
        return value
    return DEFAULT_LENGTH


def _read_object(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not required and not os.path.lexists(path):
        return {}
    return read_json(path, f"{path.parent.name}/{path.name}", limit=MAX_FILE_BYTES)


def _wrong(path: Path, what: str) -> ModelFolderError:
    return ModelFolderError(
        f"{path.parent.name}/{path.name} is not a CLIP tokenizer's: {what};"
        " get the file again or convert the model again."
    )
