"""Export of one component to OpenVINO IR, by optimum-intel's own export configurations.

Only that component is in memory, and most of its weights are not: half precision stays half
precision, mapped from the source's file (see `sdvino.convert.mapped`). Nothing is baked into the
IR that a pipeline scales or clamps.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openvino as ov

from sdvino.compress.quiet import quiet
from sdvino.compress.structure import Structure, load_component
from sdvino.convert.lora import merge
from sdvino.convert.mapped import (
    Array,
    detach,
    first_not_finite,
    map_safetensors,
    place,
    weights_in_graph,
)
from sdvino.convert.openvino_source import OpenVinoFolder, copy_component
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.timestep_table import restore_frequencies, sinusoid_frequencies
from sdvino.errors import RequestError, SdvinoError
from sdvino.graph.saving import save_graph

IR_NAME = "openvino_model.xml"

_LIBRARIES = ("torch", "diffusers", "transformers", "optimum", "nncf", "openvino_tokenizers")
# Our component -> optimum's task and model type.
_EXPORTERS: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("feature-extraction", "clip-text"),
    "text_encoder_2": ("feature-extraction", "clip-text-with-projection"),
    "unet": ("semantic-segmentation", "unet"),
    "vae_decoder": ("semantic-segmentation", "vae-decoder"),
    "vae_encoder": ("semantic-segmentation", "vae-encoder"),
}
# Sizes the components are traced at. The graph is the same for every size (height and width stay
# dynamic), and small ones save the time and memory of running the model at its own size.
_TRACED_LATENTS = 16
_TRACED_PICTURE = 128
# fp16 devices overflow in these families' autoencoders; optimum-intel sets the same hints.
_V_PREDICTION_VAE_SCALE = "8.0"
_SDXL_VAE_SCALE = "128.0"


def require_libraries() -> None:
    """Raise RequestError unless the libraries of the ``convert`` extra are installed.

    They are looked for, not imported: the worker processes do that, and only what they need.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"Converting needs libraries that are not here ({', '.join(missing)});"
            ' install them with: pip install "sdvino[convert]".'
        )


def export_component(
    source: DiffusersFolder | OpenVinoFolder, component: str, output: Path
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
    Raises RequestError for weights that are not numbers, SdvinoError when the libraries cannot load
    or trace them.
    """
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(source, OpenVinoFolder):
        copy_component(source, component, output)
        return
    try:
        with quiet():
            model, weights = _load(source, component)
            _check_finite(source, component, model, weights)
            merge(model, source.components[component], source.loras, weights)
            weights = detach(model, weights)
            frequencies = _frequencies(model) if component == "unet" else None
            with weights_in_graph(weights):
                if component == "tiny_vae":
                    converted = _convert_tiny(model)
                else:
                    converted = _export(source, component, model)
            del model
            gc.collect()
            if frequencies is not None:
                restore_frequencies(converted, frequencies)
            save_graph(converted, output / IR_NAME, name=component)
    except (RequestError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SdvinoError(f"The {component} of {source.name} cannot be exported: {what}") from error


def _load(source: DiffusersFolder, component: str) -> tuple[Any, dict[str, Array]]:
    """Return the torch module, in float32 and eval mode, from safetensors alone.

    With it come the weights that it only seems to have: they are left in their file.
    """
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = source.components[component]
    structure = Structure.read(source.folder(folder))
    classes = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "tiny_vae": AutoencoderTiny,
    }
    if folder in ("unet", "vae"):
        lean = _load_lean(classes[folder], source, folder, structure)
        if lean is not None:
            return lean
    if structure is not None:  # ours, of a pass
        return load_component(source.folder(folder), folder), {}
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if any(".fp16." in file.name for file in source.weights[folder]):
        options["variant"] = "fp16"
    model, loaded = classes[folder].from_pretrained(
        source.folder(folder), output_loading_info=True, **options
    )
    missing = sorted(loaded["missing_keys"])
    if missing:  # the libraries would fill them with noise
        raise RequestError(
            f"The {component} of {source.name} lacks {len(missing)} of its weights ({missing[0]});"
            " get the model again, complete."
        )
    return model.to(torch.float32).eval(), {}


def _load_lean(
    cls: Any, source: DiffusersFolder, folder: str, structure: Structure | None
) -> tuple[Any, dict[str, Array]] | None:
    """Build the module without memory of its own; its large weights stay in their file.

    diffusers would initialise every weight first: for a UNet gigabytes, and a minute. None when
    the file's names are not this version's, so that diffusers' own loader can translate them.
    """
    import torch

    with torch.device("meta"):
        model = cls.from_config(dict(source.configs[folder]))
        if structure is not None:
            structure.apply(model)
    tensors = map_safetensors(source.weights[folder])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: array.shape for name, array in tensors.items()}
    if found != expected or any(array.dtype.kind != "f" for array in tensors.values()):
        return None
    weights = place(model, tensors)
    if any(buffer.is_meta for buffer in model.buffers()):
        return None
    return model.eval(), weights


def _check_finite(
    source: DiffusersFolder, component: str, model: Any, weights: Mapping[str, Array]
) -> None:
    """Raise RequestError unless every weight is a number; a sum needs no memory and keeps NaN."""
    import torch

    name = first_not_finite(weights)
    for own, tensor in model.named_parameters():
        if name is None and not bool(torch.isfinite(tensor.detach().sum(dtype=torch.float64))):
            name = own
    if name is not None:
        raise RequestError(
            f"The {component} of {source.name} has weights that are not numbers ({name});"
            " get the file again or choose another version of the model."
        )


def _export(source: DiffusersFolder, component: str, model: Any) -> ov.Model:
    """Return ``model`` as an OpenVINO model, by optimum-intel's configuration for it."""
    import optimum.exporters.openvino.convert
    import optimum.exporters.openvino.model_configs  # registers the configurations
    from optimum.exporters.tasks import TasksManager
    from optimum.intel.openvino import OVConfig

    task, model_type = _EXPORTERS[component]
    _set_export_options(source, component, model)
    constructor = TasksManager.get_exporter_config_constructor(
        model=model,
        exporter="openvino",
        library_name="diffusers",
        task=task,
        model_type=model_type,
    )
    config = constructor(model.config, int_dtype="int64", float_dtype="fp32")
    scale = _activations_scale(source, component)
    if scale is not None:
        config.runtime_options = {"ACTIVATIONS_SCALE_FACTOR": scale}
    with _saved_here(optimum.exporters.openvino.convert) as saved:
        optimum.exporters.openvino.convert.export_pytorch(
            model,
            config,
            Path(IR_NAME),
            input_shapes={"height": _TRACED_LATENTS, "width": _TRACED_LATENTS},
            ov_config=OVConfig(dtype="fp16"),
            stateful=False,
            library_name="diffusers",
        )
    return saved.pop()


@contextlib.contextmanager
def _saved_here(exporter: Any) -> Iterator[list[ov.Model]]:
    """Collect the models that optimum-intel would write, so that they are written once, mended."""
    saved: list[ov.Model] = []
    original = exporter.save_model
    exporter.save_model = lambda model, path, compress_to_fp16=True: saved.append(model)
    try:
        yield saved
    finally:
        exporter.save_model = original


def _activations_scale(source: DiffusersFolder, component: str) -> str | None:
    """Return the IR's ACTIVATIONS_SCALE_FACTOR, as optimum-intel chooses it."""
    if not component.startswith("vae"):
        return None
    if source.prediction_type == "v_prediction":
        return _V_PREDICTION_VAE_SCALE
    # force_upcast is on in diffusers where the config does not say.
    upcast = source.configs["vae"].get("force_upcast", True)
    return _SDXL_VAE_SCALE if upcast and source.family.added_conditioning != "none" else None


def _set_export_options(source: DiffusersFolder, component: str, model: Any) -> None:
    """Set what optimum reads from the module: extra fields of its config, and what is traced."""
    model.config.export_model_type = _EXPORTERS[component][1]
    if component.startswith("text_encoder") and len(source.family.text_encoders) > 1:
        # The UNet attends to the last states but one of both.
        model.config.output_hidden_states = True
        if hasattr(model, "text_model"):
            model.text_model.config.output_hidden_states = True
    elif component == "unet":
        text = source.configs[source.family.text_encoders[-1]]
        model.register_to_config(sample_size=_TRACED_LATENTS)
        model.config.model_max_length = text.get("max_position_embeddings", 77)
        model.config.requires_aesthetics_score = False
        model.config.text_encoder_projection_dim = text.get("projection_dim")
    elif component == "vae_decoder":
        model.forward = lambda latent_sample: model.decode(z=latent_sample)
    elif component == "vae_encoder":
        model.register_to_config(sample_size=_TRACED_PICTURE)
        model.forward = lambda sample: {
            "latent_parameters": model.encode(x=sample)["latent_dist"].parameters
        }


def _frequencies(model: Any) -> Any | None:
    """Return the exact frequencies of the UNet's time embedding; None for one that was learnt."""
    time_proj: Any = getattr(model, "time_proj", None)
    if not hasattr(time_proj, "downscale_freq_shift"):
        return None
    return sinusoid_frequencies(time_proj.num_channels, time_proj.downscale_freq_shift)


def _convert_tiny(model: Any) -> ov.Model:
    import torch

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.autoencoder = model

        def forward(self, latent_sample: Any) -> Any:
            return self.autoencoder.decode(latent_sample, return_dict=False)[0]

    channels = int(model.config.latent_channels)
    example = torch.zeros(1, channels, 8, 8)
    with torch.no_grad():
        converted = ov.convert_model(
            Decoder().eval(),
            example_input={"latent_sample": example},
            input=[("latent_sample", ov.PartialShape([-1, channels, -1, -1]), ov.Type.f32)],
        )
    converted.input(0).get_tensor().set_names({"latent_sample"})
    converted.output(0).get_tensor().set_names({"sample"})
    return converted
