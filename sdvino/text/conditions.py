"""What the UNet is told beside the latents: text, the picture's size, the guidance scale."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.graph.text_states import state_name
from sdvino.request import PictureJob, ResolvedRequest
from sdvino.runtime.components import Components
from sdvino.runtime.timings import Timings, clock
from sdvino.text.encoder import TextEncoder
from sdvino.text.tokenizer import ClipTokenizer

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Text states given instead of a prompt, by diffusers' names; None is left to the encoders.

    Raises RequestError for other shapes, and for numbers that are none.
    """

    #: float32 [N, length, width] each.
    prompt_embeds: Array | None = None
    negative_prompt_embeds: Array | None = None
    #: float32 [N, width] each.
    pooled_prompt_embeds: Array | None = None
    negative_pooled_prompt_embeds: Array | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None:
                object.__setattr__(self, one.name, _states(one.name, value))

    def check_beside(self, prompt: object, negative_prompt: object) -> None:
        """Raise RequestError where a prompt is given twice, or not at all."""
        if (prompt is None) == (self.prompt_embeds is None):
            raise RequestError("Give either a prompt or prompt_embeds, and not both.")
        if negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise RequestError("Give either a negative_prompt or negative_prompt_embeds, not both.")

    def of_prompt(self, index: int) -> Embeddings:
        """Return the states of one prompt, [1, ...] each; a single one serves all prompts."""
        found: dict[str, Array] = {}
        for one in fields(self):
            states = getattr(self, one.name)
            if states is None:
                continue
            if index >= len(states) > 1:
                raise RequestError(
                    f"There are embeddings for {len(states)} prompts and more prompts than that;"
                    " give one, or one for each."
                )
            found[one.name] = states if len(states) == 1 else states[index : index + 1]
        return Embeddings(**found)


@dataclass(frozen=True, slots=True)
class TextStates:
    """What the text encoders make of one prompt."""

    #: float32 [1, length, width], all text encoders' side by side.
    hidden: Array
    #: float32 [1, width]; None in models whose UNet takes none.
    pooled: Array | None = None

    def zeros(self) -> TextStates:
        """Return zeros of the same shapes."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return TextStates(np.zeros_like(self.hidden), pooled)


class Conditioner:
    """Makes the UNet's inputs of a picture's prompts, size and guidance, for every family.

    How the families differ is data: the folder's kind and the widths that its UNet takes.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        self._folder = components.folder
        self._kind = components.folder.kind
        self._tokenizers: dict[str, ClipTokenizer] = {}
        self._encoders: dict[str, tuple[tuple[int, ...], TextEncoder]] = {}

    def tokenizer(self, text_encoder: str = "text_encoder") -> ClipTokenizer:
        """Return the tokenizer of ``text_encoder``: each pads in its own way."""
        if text_encoder not in self._tokenizers:
            folder = self._folder
            self._tokenizers[text_encoder] = ClipTokenizer.from_folder(
                folder.tokenizer(text_encoder), folder.text_length
            )
        return self._tokenizers[text_encoder]

    def needs_negative(self, guidance_scale: float) -> bool:
        """Return whether guidance asks the UNet twice: not where the scale is an input of it."""
        return guidance_scale > 1.0 and self._folder.guidance_width is None

    def unet_inputs(
        self,
        request: ResolvedRequest,
        job: PictureJob,
        embeddings: Embeddings | None = None,
        timings: Timings | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """Return the UNet's inputs but for latents and timestep, by name.

        The first are those of the prompt, the second those of the negative prompt, where guidance
        needs them. All are float32 with a batch of 1: ``encoder_hidden_states``; for Stable
        Diffusion XL ``text_embeds`` and ``time_ids``; for a UNet with distilled guidance
        ``timestep_cond``. Raises RequestError for embeddings that do not fit the model.
        """
        cond, uncond = self.text_states(request, job, embeddings, timings)
        negative = None if uncond is None else self._inputs(request, uncond)
        return self._inputs(request, cond), negative

    def text_states(
        self,
        request: ResolvedRequest,
        job: PictureJob,
        embeddings: Embeddings | None = None,
        timings: Timings | None = None,
    ) -> tuple[TextStates, TextStates | None]:
        """Return the states of the prompt and, where guidance needs it, of the negative prompt.

        As in diffusers, clip_skip counts for the prompt alone. Raises as `unet_inputs` does.
        """
        given = Embeddings() if embeddings is None else embeddings.of_prompt(job.prompt_index)
        timings = Timings() if timings is None else timings
        self._check_pooled(given)
        skip = 0 if request.clip_skip is None else request.clip_skip
        hidden, pooled = given.prompt_embeds, given.pooled_prompt_embeds
        if hidden is None:
            encoded = self._encode(job.prompt, skip, skip, timings)
            hidden, pooled = encoded.hidden, encoded.pooled if pooled is None else pooled
        cond = self._checked(TextStates(hidden, pooled))
        if not self.needs_negative(request.guidance_scale):
            return cond, None
        hidden, pooled = given.negative_prompt_embeds, given.negative_pooled_prompt_embeds
        if hidden is None and job.negative_prompt is None and self._folder.zeros_for_empty_prompt:
            return cond, cond.zeros()
        if hidden is None:
            text = "" if job.negative_prompt is None else job.negative_prompt
            encoded = self._encode(text, 0, skip, timings)
            hidden, pooled = encoded.hidden, encoded.pooled if pooled is None else pooled
        return cond, self._checked(TextStates(hidden, pooled))

    def _inputs(self, request: ResolvedRequest, states: TextStates) -> dict[str, Array]:
        # Copies: a device reads arrays in place only where they are writable.
        inputs = {"encoder_hidden_states": states.hidden.copy()}
        if states.pooled is not None:
            height, width = request.height, request.width
            inputs["text_embeds"] = states.pooled.copy()
            inputs["time_ids"] = np.array([[height, width, 0, 0, height, width]], np.float32)
        if self._folder.guidance_width is not None:
            inputs["timestep_cond"] = embed_guidance_scale(
                request.guidance_scale, self._folder.guidance_width
            )
        return inputs

    def _encode(self, text: str, skip: int, clip_skip: int, timings: Timings) -> TextStates:
        """Encode ``text`` without ``skip`` layers, with encoders that also give ``clip_skip``."""
        base = self._kind.skipped_layers
        encoders = self._loaded(tuple(sorted({base, base + clip_skip})), timings)
        with clock(timings, "text"):
            encoded = [encoder.encode_prompt(text) for encoder in encoders]
            states = [prompt.states[state_name(base + skip)] for prompt in encoded]
            hidden = states[0] if len(states) == 1 else np.concatenate(states, axis=2)
        return TextStates(hidden, encoded[-1].pooled if self._kind.added_conditions else None)

    def _loaded(self, skipped: tuple[int, ...], timings: Timings) -> list[TextEncoder]:
        """Return the text encoders, loaded, that give the states without ``skipped`` layers."""
        found: list[TextEncoder] = []
        for name in self._kind.text_encoders:
            known = self._encoders.get(name)
            if known is None or not set(skipped) <= set(known[0]):
                vocab_size = self._folder.components[name].config.get("vocab_size")
                with clock(timings, "load"):
                    component = self._components.text_encoder(name, skipped)
                encoder = TextEncoder(
                    component,
                    self.tokenizer(name),
                    states=[state_name(number) for number in skipped],
                    vocab_size=vocab_size if isinstance(vocab_size, int) else None,
                )
                known = self._encoders[name] = (skipped, encoder)
            found.append(known[1])
        return found

    def _check_pooled(self, given: Embeddings) -> None:
        pairs = (
            ("", given.prompt_embeds, given.pooled_prompt_embeds),
            ("negative_", given.negative_prompt_embeds, given.negative_pooled_prompt_embeds),
        )
        for prefix, hidden, pooled in pairs:
            if self._kind.added_conditions:
                if hidden is not None and pooled is None:
                    raise RequestError(
                        f"{self._kind.title} takes a pooled text state too: give"
                        f" {prefix}pooled_prompt_embeds beside {prefix}prompt_embeds."
                    )
            elif pooled is not None:
                raise RequestError(
                    f"This model takes no {prefix}pooled_prompt_embeds; leave them out."
                )

    def _checked(self, states: TextStates) -> TextStates:
        folder = self._folder
        length, width = folder.text_length, folder.cross_attention_dim
        if states.hidden.shape != (1, length, width):
            raise RequestError(
                f"The prompt embeddings have the shape {list(states.hidden.shape)}; this model"
                f" takes [N, {length}, {width}]."
            )
        if states.pooled is not None and states.pooled.shape != (1, folder.pooled_width):
            raise RequestError(
                f"The pooled prompt embeddings have the shape {list(states.pooled.shape)}; this"
                f" model takes [N, {folder.pooled_width}]."
            )
        return states


def _states(name: str, value: Array) -> Array:
    states = np.ascontiguousarray(value, np.float32)
    pooled = "pooled" in name
    if states.ndim != (2 if pooled else 3) or not len(states):
        wanted = "[N, width]" if pooled else "[N, length, width]"
        raise RequestError(f"The {name} have the shape {list(states.shape)}; give {wanted}.")
    if not np.isfinite(states).all():
        raise RequestError(f"The {name} hold NaN or infinity; give finite numbers.")
    return states


def embed_guidance_scale(guidance_scale: float, width: int) -> Array:
    """Return the ``timestep_cond`` of a UNet with distilled guidance, float32 [1, width].

    Args:
        guidance_scale: in diffusers' scale, where 1 is no guidance; the paper's w is one less.
        width: the UNet's time_cond_proj_dim, 4 or more.

    Source: Luo et al. 2023 (arXiv:2310.04378), section 4.2; diffusers'
    get_guidance_scale_embedding, whose float32 steps these are.
    """
    w = np.float32(guidance_scale - 1.0) * np.float32(1000.0)
    half = width // 2
    rate = np.log(np.float32(10000.0)) / np.float32(half - 1)
    angles = w * np.exp(np.arange(half, dtype=np.float32) * -rate)
    embedded = np.zeros((1, width), np.float32)  # an odd width ends in a zero
    embedded[0, : 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return embedded
