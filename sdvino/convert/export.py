"""Export of one component to OpenVINO IR: the network written over the source's own tensors.

The weights stay in their file, mapped. Those that OpenVINO's file format is better without
(bfloat16, float8), and those that a LoRA is merged into, go through a file in half precision, one
at a time. Nothing is baked into the IR that a pipeline scales or clamps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import openvino as ov

from sdvino.convert.open_source import Source
from sdvino.convert.openvino_source import OpenVinoFolder, copy_component
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError, SdvinoError, said_by
from sdvino.graph.saving import save_graph
from sdvino.nets.clip import clip
from sdvino.nets.layers import UnknownNetwork
from sdvino.nets.structure import Structure
from sdvino.nets.tiny_vae import tiny_vae
from sdvino.nets.unet import unet
from sdvino.nets.vae import vae_decoder, vae_encoder
from sdvino.weights.lora_merge import merge
from sdvino.weights.numbers import as_half, check_finite
from sdvino.weights.safetensors import Tensor, Tensors, open_tensors, write_tensors

IR_NAME = "openvino_model.xml"
#: Who writes the graphs: these rooms, or optimum-intel, which traces torch's modules.
Exporter = Literal["sdvino", "optimum-intel"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)

_STORED = ("F16", "F32")
_SPOOL = "half.safetensors"
# fp16 devices overflow in these families' autoencoders; optimum-intel sets the same hints.
_V_PREDICTION_VAE_SCALE = "8.0"
_SDXL_VAE_SCALE = "128.0"


def export_component(
    source: DiffusersFolder | OpenVinoFolder,
    component: str,
    output: Path,
    exporter: Exporter = "sdvino",
) -> None:
    """Write ``component`` of ``source`` as ``output``/openvino_model.xml and .bin.

    Inputs and outputs, by name, are optimum-intel's: text_encoder input_ids -> last_hidden_state,
    pooler_output (of two: hidden_states.0 and on, too); text_encoder_2 input_ids -> text_embeds,
    last_hidden_state, hidden_states.0 and on; unet sample, timestep (int64), encoder_hidden_states
    (text_embeds, time_ids with two text encoders; timestep_cond with an embedded guidance scale:
    [N, D], [N, 6], [N, D]) -> out_sample; vae_decoder
    latent_sample -> sample; vae_encoder sample -> latent_parameters. tiny_vae (AutoencoderTiny's
    decoder) takes latent_sample, scaled as the pipeline's latents are, and gives sample in
    [-1, 1]. All float tensors are f32, NCHW; batch, height and width are dynamic.
    Raises RequestError for weights that are not numbers or do not fit the config, and for networks
    that ``exporter`` does not know; SdvinoError when the libraries fail.
    """
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(source, OpenVinoFolder):
        copy_component(source, component, output)
        return
    # Beside the folder: where a system does not remove what is mapped, it stays in the work folder.
    spool = output.with_name(f"{output.name}-{_SPOOL}")
    if exporter == "optimum-intel":
        from sdvino.train.optimum_export import trace_component

        model = trace_component(source, component)
    else:
        model = _build(source, component, spool)
    scale = _activations_scale(source, component)
    if scale is not None:
        model.set_rt_info(scale, ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    try:
        save_graph(model, output / IR_NAME, name=component)
    except RuntimeError as error:
        raise SdvinoError(
            f"The {component} of {source.name} cannot be saved: {said_by(error)}"
        ) from error
    del model
    with contextlib.suppress(OSError):
        spool.unlink(missing_ok=True)


def build(
    source: DiffusersFolder, component: str, tensors: Tensors, structure: Structure | None = None
) -> ov.Model:
    """Return the network of ``component`` over ``tensors``, which are all of its sub-folder's.

    Raises RequestError when they do not fit the config, UnknownNetwork.
    """
    config = source.configs[source.components[component]]
    more: dict[str, Any] = {"structure": structure}
    if component == "tiny_vae":
        more = {}
    elif component == "unet":
        text = source.configs[source.family.text_encoders[-1]]
        more["tokens"] = text.get("max_position_embeddings", 77)
    elif component.startswith("text_encoder"):
        more["projection"] = component == "text_encoder_2"
        # The UNet attends to the last states but one of both.
        more["hidden_states"] = len(source.family.text_encoders) > 1
    return _NETWORKS[component](config, tensors, **more)


_NETWORKS: Mapping[str, Callable[..., ov.Model]] = {
    "text_encoder": clip,
    "text_encoder_2": clip,
    "unet": unet,
    "vae_decoder": vae_decoder,
    "vae_encoder": vae_encoder,
    "tiny_vae": tiny_vae,
}


def _build(source: DiffusersFolder, component: str, spool: Path) -> ov.Model:
    folder = source.components[component]
    what = f"The {component} of {source.name}"
    tensors = _ready(source, component, spool)
    check_finite(tensors, what)
    try:
        return build(source, component, tensors, Structure.read(source.folder(folder)))
    except UnknownNetwork as unknown:
        raise RequestError(
            f"{what} is {unknown}, which sdvino does not write itself: install"
            ' pip install "sdvino[train]" and add --exporter optimum-intel.'
        ) from unknown
    except RequestError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        # What a config can say wrongly in more ways than can be told apart.
        raise RequestError(
            f"{what} cannot be built: its config.json does not describe a network"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:120]}); get the model again."
        ) from error


def _ready(source: DiffusersFolder, component: str, spool: Path) -> dict[str, Tensor]:
    """Return the component's tensors, LoRAs merged, mapped from files in f16 or f32."""
    plain = source.tensors(source.components[component])
    merged = merge(plain, source.loras, component)
    changed = {
        name: tensor
        for name, tensor in merged.items()
        if (tensor.dtype not in _STORED and _is_float(tensor)) or tensor is not plain[name]
    }
    if changed:
        write_tensors(spool, {name: _half(tensor) for name, tensor in changed.items()})
        merged |= open_tensors([spool])
    return merged


def spooled(source: Source, component: str) -> int:
    """Return the bytes beside the folder while ``component`` is exported, at most.

    They are what LoRAs change, and floats that OpenVINO's files do not have. Headers alone are
    read; raises RequestError for weights that cannot be.
    """
    if isinstance(source, OpenVinoFolder):
        return 0
    folder = source.components[component]
    copied = bool(source.loras)
    if folder not in source.elsewhere:
        tensors = source.tensors(folder).values()
        copied |= any(t.dtype not in _STORED and _is_float(t) for t in tensors)
    return source.bytes_of(folder) if copied else 0


def _half(tensor: Tensor) -> Tensor:
    if tensor.dtype in _STORED:
        return tensor
    return Tensor("F16", tensor.shape, lambda: as_half(tensor))


def _is_float(tensor: Tensor) -> bool:
    return "F" in tensor.dtype


def _activations_scale(source: DiffusersFolder, component: str) -> str | None:
    """Return the IR's ACTIVATIONS_SCALE_FACTOR, as optimum-intel chooses it."""
    if not component.startswith("vae"):
        return None
    if source.prediction_type == "v_prediction":
        return _V_PREDICTION_VAE_SCALE
    # force_upcast is on in diffusers where the config does not say.
    upcast = source.configs["vae"].get("force_upcast", True)
    return _SDXL_VAE_SCALE if upcast and source.family.added_conditioning != "none" else None
