"""CLIP's byte-pair tokenizer from a model folder, with the `tokenizers` library alone.

Only the vocabulary, the merges and the special tokens are read from the folder. How text is
normalized and split is CLIP's own and stands here, so a tokenizer.json cannot bring a regular
expression or a post-processor of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import RobertaProcessing

from sdvino.errors import ModelFolderError, RequestError
from sdvino.text.vocabulary import TokenizerFiles, read_tokenizer_files

#: CLIP's split: special tokens, English endings, runs of letters, single digits, runs of the rest.
#: Source: openai/CLIP, simple_tokenizer.py.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as a text encoder reads it."""

    #: int64 [1, max_length]: start token, the prompt, end token, padding.
    ids: NDArray[np.int64]
    #: The end of the prompt, as it was written, that did not fit; '' when all of it did.
    dropped: str


class ClipTokenizer:
    """Turns prompts into token ids, equal to those of transformers' CLIPTokenizer."""

    def __init__(self, files: TokenizerFiles, max_length: int | None = None) -> None:
        self.max_length = files.max_length if max_length is None else max_length
        if self.max_length < 3:
            raise RequestError(
                f"A prompt of {self.max_length} tokens holds no word; give 3 or more."
            )
        self._tokenizer = _build(files)
        self.start_id = files.vocab[files.start]
        self.end_id = files.vocab[files.end]
        self.pad_id = files.vocab[files.pad]

    @classmethod
    def from_folder(cls, path: Path | str, max_length: int | None = None) -> ClipTokenizer:
        """Read a tokenizer folder: tokenizer.json, or vocab.json with merges.txt.

        ``max_length`` is the text encoder's length in tokens; None: what the folder says, or 77.
        Raises ModelFolderError, with what to do, when the files are missing, damaged or too large.
        """
        return cls(read_tokenizer_files(Path(path)), max_length)

    @property
    def vocab_size(self) -> int:
        """Return the number of ids: every id is below it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> TokenizedPrompt:
        """Return the ids of ``text``, cut or padded to ``max_length`` tokens.

        Raises RequestError when ``text`` holds half a surrogate pair, which is no text.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(
                "The prompt holds a broken character (half of a surrogate pair); type it again."
            ) from error
        room = self.max_length - 2
        ids = [self.start_id, *encoding.ids[:room], self.end_id]
        ids += [self.pad_id] * (self.max_length - len(ids))
        dropped = text[encoding.offsets[room][0] :].strip() if len(encoding.ids) > room else ""
        return TokenizedPrompt(ids=np.array([ids], np.int64), dropped=dropped)


def tokenizer_json(files: TokenizerFiles) -> str:
    """Return the tokenizer as transformers 5 reads it: the content of a tokenizer.json."""
    tokenizer = _build(files)
    ends = [(token, files.vocab[token]) for token in (files.end, files.start)]
    tokenizer.post_processor = RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str(pretty=True)
    return text


def _build(files: TokenizerFiles) -> Tokenizer:
    try:
        tokenizer = Tokenizer(
            BPE(
                vocab=files.vocab,
                merges=files.merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=files.unknown,
            )
        )
    except Exception as error:  # the library raises plain Exception for a merge it does not know
        raise ModelFolderError(
            f"The merges in {files.source.name} do not fit its vocabulary ({error});"
            " get the tokenizer files again."
        ) from error
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for token in files.added:
        tokenizer.add_tokens([AddedToken(token.content, **token.flags)])
    return tokenizer
