"""The text encoder: a prompt becomes the states that steer the denoising."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError, SdvinoError
from sdvino.graph.protocol import InferenceComponent
from sdvino.text.tokenizer import ClipTokenizer

#: Prompts whose states are kept: a run alternates between few, and each is 77 x 768 floats.
CACHED_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """What a text encoder makes of a prompt. The arrays are read only and belong to the caller."""

    #: By the names asked for: float32 [1, max_length, D] each.
    states: Mapping[str, NDArray[np.float32]]
    #: float32 [1, D], or None where the encoder gives none.
    pooled: NDArray[np.float32] | None
    #: The words that did not fit; '' when all did.
    dropped: str


class TextEncoder:
    """A compiled text encoder with its tokenizer. Each prompt is encoded once and remembered.

    ``component`` takes ``input_ids`` and gives the outputs named in ``states``, perhaps
    ``pooler_output`` (or ``text_embeds``) too. ``vocab_size`` is the number of rows of its
    embedding, where known: a tokenizer with more ids is refused.
    """

    def __init__(
        self,
        component: InferenceComponent,
        tokenizer: ClipTokenizer,
        *,
        states: Sequence[str] = ("last_hidden_state",),
        vocab_size: int | None = None,
        cached: int = CACHED_PROMPTS,
    ) -> None:
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise ModelFolderError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and the text encoder knows"
                f" {vocab_size}: they do not belong together; get the tokenizer of this model."
            )
        self.tokenizer = tokenizer
        self._component = component
        self._states = tuple(states)
        self._cached = cached
        self._cache: OrderedDict[str, EncodedPrompt] = OrderedDict()

    def encode_prompt(self, prompt: str) -> EncodedPrompt:
        """Return the states of ``prompt``, its pooled state and the words that did not fit.

        Raises RequestError for a prompt that is no text, SdvinoError when the encoder fails.
        """
        known = self._cache.get(prompt)
        if known is None:
            known = self._run(prompt)
            self._cache[prompt] = known
            while len(self._cache) > self._cached:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(prompt)
        return known

    def _run(self, prompt: str) -> EncodedPrompt:
        tokens = self.tokenizer.encode(prompt)
        outputs = self._component.infer({"input_ids": tokens.ids})
        for name in self._states:
            if name not in outputs:
                raise ModelFolderError(
                    f"The text encoder gives no {name};"
                    " export it again with optimum-intel or `sdvino convert`."
                )
        pooled = next((outputs[n] for n in ("pooler_output", "text_embeds") if n in outputs), None)
        return EncodedPrompt(
            states={name: _keep(outputs[name]) for name in self._states},
            pooled=None if pooled is None else _keep(pooled),
            dropped=tokens.dropped,
        )


def _keep(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return a read-only float32 copy: the component writes its own buffer again."""
    kept = np.array(values, np.float32)
    if not np.isfinite(kept).all():
        raise SdvinoError(
            "The text encoder gave values that are not numbers; run it with --precision f32."
        )
    kept.setflags(write=False)
    return kept
