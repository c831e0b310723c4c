"""One component of a model folder on disk: its graph, its weights and its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sdvino.errors import ModelFolderError
from sdvino.families import FAMILIES, SPECIAL_UNETS, TIME_IDS, PipelineKind
from sdvino.inputs.files import check_inside, read_json
from sdvino.inputs.ir import IrSummary, summarize_ir

_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae_decoder": "AutoencoderKL",
    "vae_encoder": "AutoencoderKL",
    "tiny_vae": "AutoencoderTiny",
}


@dataclass(frozen=True, slots=True)
class ComponentFiles:
    """One component on disk."""

    name: str
    xml: Path
    bin: Path
    #: The component's config.json, an object without NaN or infinities.
    config: Mapping[str, Any]
    #: Of the .xml and the .bin together.
    bytes: int
    ir: IrSummary

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """The files that running reads."""
        return self.xml, self.bin, self.xml.with_name("config.json")


def read_component(folder: Path, name: str) -> ComponentFiles:
    """Read the component ``name`` of ``folder``.

    Raises ModelFolderError when a file is missing or damaged, leads out of the folder, or belongs
    to another kind of component.
    """
    xml = folder / name / "openvino_model.xml"
    weights = xml.with_suffix(".bin")
    for path in (xml, weights, folder / name / "config.json"):
        check_inside(path, folder)
    ir = summarize_ir(xml, weights, name)
    config = read_json(folder / name / "config.json", f"{name}/config.json")
    expected = _CLASSES.get(name)
    stated = config.get("_class_name", expected)
    if stated != expected:
        raise ModelFolderError(
            f"{name}/config.json is that of {str(stated)[:80]!r}, not of {expected};"
            f" use a model of {FAMILIES}."
        )
    size = xml.stat().st_size + weights.stat().st_size
    return ComponentFiles(name=name, xml=xml, bin=weights, config=config, bytes=size, ir=ir)


_BASE_INPUTS = frozenset({"sample", "timestep", "encoder_hidden_states"})
_ADDED_INPUTS = frozenset({"text_embeds", "time_ids"})
_GUIDANCE_INPUT = "timestep_cond"


class Sizes:
    """The numbers in the configurations, with the libraries' defaults where a file is silent.

    Raises ModelFolderError where a number is none or absurd.
    """

    def __init__(self, components: Mapping[str, ComponentFiles], kind: PipelineKind) -> None:
        self._components = components
        self._kind = kind
        self.in_channels = self._integer("unet", "in_channels", 4, 64)
        self.out_channels = self._integer("unet", "out_channels", 4, 64)
        self.cross_attention_dim = self._integer("unet", "cross_attention_dim", 1280, 16384)
        self.native = self._native_size()
        self.latent_channels = self._integer("vae_decoder", "latent_channels", 4, 64)
        self.vae_scale_factor = 2 ** (self._vae_levels() - 1)
        self.scaling_factor = self._scaling_factor()
        self.shift_factor = self._shift_factor()
        self.text_length = self._integer("text_encoder", "max_position_embeddings", 77, 4096)
        self.text_width = self._text_width()
        #: Width of the pooled state; None where the UNet takes none.
        self.pooled_width: int | None = None
        if kind.pooled_encoder is not None:
            self.pooled_width = self._integer(kind.pooled_encoder, "projection_dim", 512, 16384)
        #: Width of the embedded guidance scale; None where guidance is not distilled.
        self.guidance_width: int | None = None
        if self._config("unet").get("time_cond_proj_dim") is not None:
            self.guidance_width = self._integer("unet", "time_cond_proj_dim", 256, 16384, low=4)

    def check(self) -> None:
        """Raise ModelFolderError where two files contradict each other."""
        if self.in_channels not in SPECIAL_UNETS or self.latent_channels != 4:
            self._agree("in_channels", self.in_channels, "vae_decoder", self.latent_channels)
        self._agree("out_channels", self.out_channels, "vae_decoder", self.latent_channels)
        self._agree(
            "cross_attention_dim",
            self.cross_attention_dim,
            " and ".join(self._kind.text_encoders),
            self.text_width,
        )
        self._check_inputs()
        self._graph("unet", "in_channels", self.in_channels, "sample", 4, 1)
        self._graph(
            "unet", "cross_attention_dim", self.cross_attention_dim, "encoder_hidden_states", 3, 2
        )
        self._graph("vae_decoder", "latent_channels", self.latent_channels, "latent_sample", 4, 1)
        for name in self._kind.text_encoders:
            length = self._integer(name, "max_position_embeddings", 77, 4096)
            if length != self.text_length:
                raise ModelFolderError(
                    f"{name} reads {length} tokens and text_encoder {self.text_length};"
                    " the parts are not of one model, so get the model again."
                )
            self._graph(name, "max_position_embeddings", length, "input_ids", 2, 1)
        self._graph("tiny_vae", "latent_channels", self.latent_channels, "latent_sample", 4, 1)
        self._check_added_conditions()
        if self.guidance_width is not None:
            width = self.guidance_width
            self._graph("unet", "time_cond_proj_dim", width, _GUIDANCE_INPUT, 2, 1)

    def _check_added_conditions(self) -> None:
        """Hold the pooled state's width and the sizes' embedding against the UNet."""
        part = self._kind.pooled_encoder
        if part is None or self.pooled_width is None:
            return
        self._graph_of("unet", part, "projection_dim", self.pooled_width, "text_embeds", 2, 1)
        shape = self._components["unet"].ir.inputs.get("time_ids", ())
        if len(shape) != 2 or shape[1] not in (None, TIME_IDS):
            raise ModelFolderError(
                f"unet/openvino_model.xml takes time_ids {list(shape)}, where {self._kind.title}"
                f" takes {TIME_IDS} numbers (a refiner takes 5); use a base model."
            )
        if "addition_time_embed_dim" not in self._config("unet"):
            return  # an old export: the graph has been held against the text encoder already
        embedded = self._integer("unet", "addition_time_embed_dim", 256, 16384)
        name = "projection_class_embeddings_input_dim"
        stated = self._integer("unet", name, 2816, 2**20)
        expected = self.pooled_width + TIME_IDS * embedded
        if stated != expected:
            raise ModelFolderError(
                f"unet/config.json says {name} is {stated}, but {part}'s pooled state and"
                f" {TIME_IDS} sizes are {expected} wide; the parts are not of one model, so get"
                " the model again."
            )

    def _check_inputs(self) -> None:
        """Refuse a UNet that wants an input which is not given, or lacks one that is."""
        given = _BASE_INPUTS
        if self._kind.added_conditions:
            given |= _ADDED_INPUTS
        if self.guidance_width is not None:
            given |= {_GUIDANCE_INPUT}
        ir = self._components["unet"].ir
        for names in ir.input_names:
            if not names & given:
                raise ModelFolderError(
                    f"The UNet wants an input {'/'.join(sorted(names))[:80]!r} that sdvino does not"
                    f" give; use a model of {FAMILIES} without it."
                )
        for name in sorted(given - ir.inputs.keys()):
            raise ModelFolderError(
                f"unet/openvino_model.xml has no input {name!r}, which the configurations of this"
                f" model ({self._kind.title}) call for; convert or get the model again."
            )

    def _agree(self, name: str, value: int, other: str, found: int) -> None:
        if value != found:
            raise ModelFolderError(
                f"unet/config.json says {name} is {value}, but by the configuration of {other} it"
                f" is {found}; the parts are not of one model, so get the model again."
            )

    def _graph(self, part: str, name: str, value: int, port: str, rank: int, axis: int) -> None:
        """Hold ``value`` of ``part`` against an input of its own graph."""
        self._graph_of(part, part, name, value, port, rank, axis)

    def _graph_of(
        self, graph: str, part: str, name: str, value: int, port: str, rank: int, axis: int
    ) -> None:
        """Hold ``value`` against dimension ``axis`` of the input ``port``, where it is fixed."""
        if graph not in self._components:
            return
        shape = self._components[graph].ir.inputs.get(port)
        if shape is None:
            raise ModelFolderError(
                f"{graph}/openvino_model.xml has no input {port!r}, so it is another kind of model;"
                " get the model again."
            )
        if len(shape) != rank or shape[axis] not in (None, value):
            raise ModelFolderError(
                f"{part}/config.json says {name} is {value}, but {graph}/openvino_model.xml takes"
                f" {port} {list(shape)}; the two do not belong together, so get the model again."
            )

    def _text_width(self) -> int:
        encoders = self._kind.text_encoders
        if len(encoders) == 1:
            return self._integer(encoders[0], "hidden_size", self.cross_attention_dim, 16384)
        # transformers leaves out of config.json what equals its class's default.
        return sum(self._integer(name, "hidden_size", 512, 16384) for name in encoders)

    def _config(self, part: str) -> Mapping[str, Any]:
        return self._components[part].config

    def _integer(self, part: str, name: str, default: int, limit: int, low: int = 1) -> int:
        value = self._config(part).get(name, default)
        # diffusers allows one number for every block; in these models they are all the same.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= limit:
            raise _wrong(part, name, value, f"a whole number from {low} to {limit}")
        return value

    def _native_size(self) -> tuple[int, int]:
        size = self._config("unet").get("sample_size")
        sides = size if isinstance(size, list) else [64 if size is None else size] * 2
        if len(sides) != 2 or not all(type(n) is int and 1 <= n <= 1024 for n in sides):
            raise _wrong("unet", "sample_size", size, "a whole number from 1 to 1024")
        return sides[0], sides[1]

    def _vae_levels(self) -> int:
        blocks = self._config("vae_decoder").get("block_out_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= 7:
            raise _wrong("vae_decoder", "block_out_channels", blocks, "a list of 1 to 7 numbers")
        return len(blocks)

    def _scaling_factor(self) -> float:
        config = self._config("vae_decoder")
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise ModelFolderError(
                    f"vae_decoder/config.json has {name}: this autoencoder scales every channel on"
                    f" its own, which sdvino does not do; use a model of {FAMILIES} without it."
                )
        value = config.get("scaling_factor", 0.18215)
        if not _is_number(value) or not 1e-6 < abs(value) < 1e6:
            raise _wrong("vae_decoder", "scaling_factor", value, "a number such as 0.18215")
        return float(value)

    def _shift_factor(self) -> float | None:
        value = self._config("vae_decoder").get("shift_factor")
        if value is None:
            return None
        if not _is_number(value) or abs(value) > 1e6:
            raise _wrong("vae_decoder", "shift_factor", value, "a number or null")
        return float(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(part: str, name: str, value: object, expected: str) -> ModelFolderError:
    return ModelFolderError(
        f"{part}/config.json says {name} is {str(value)[:40]!r}; it must be {expected},"
        " so get the model again."
    )
