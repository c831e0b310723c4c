"""The second exporter: torch's modules, traced by optimum-intel's own export configurations.

It knows networks that `sdvino.nets` does not, and the tests hold those against it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.quiet import quiet
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError, SdvinoError, said_by
from sdvino.nets.structure import Structure
from sdvino.train.modules import load_module
from sdvino.weights.lora_merge import merge

IR_NAME = "openvino_model.xml"

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


def trace_component(source: DiffusersFolder, component: str) -> ov.Model:
    """Return ``component`` of ``source`` as an OpenVINO model, as optimum-intel exports it.

    The module is in memory in float32. See `sdvino.convert.export.export_component`.
    Raises RequestError for weights that are not numbers or do not fit, SdvinoError when the
    libraries cannot load or trace the component.
    """
    folder = source.components[component]
    try:
        with quiet():
            tensors = merge(source.tensors(folder), source.loras, folder)
            structure = Structure.read(source.folder(folder))
            model = load_module(folder, source.configs[folder], tensors, structure)
            frequencies = _frequencies(model) if component == "unet" else None
            if component == "tiny_vae":
                converted = _convert_tiny(model)
            else:
                converted = _export(source, component, model)
            if frequencies is not None:
                restore_frequencies(converted, frequencies)
            return converted
    except (RequestError, MemoryError):
        raise
    except Exception as error:
        raise SdvinoError(
            f"The {component} of {source.name} cannot be exported: {said_by(error)}"
        ) from error


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


# 2^-24 is float32's own precision at 1; as two factors, each is exact in float16 too.
_BITS = 24
_FACTOR = np.float32(2.0 ** (-_BITS / 2))
# float16 frequencies are this close to the exact ones; anything farther is another table.
_TOLERANCE = 2.0**-10


def sinusoid_frequencies(num_channels: int, downscale_freq_shift: float) -> NDArray[np.float64]:
    """Return the frequencies of diffusers' ``get_timestep_embedding``, float64 [num_channels / 2].

    Source: arXiv:1706.03762, section 3.5, as diffusers' `Timesteps` has it.
    """
    half = num_channels // 2
    exponent = np.arange(half, dtype=np.float64) / (half - downscale_freq_shift)
    return np.asarray(np.exp(-np.log(10_000.0) * exponent))


def restore_frequencies(model: ov.Model, frequencies: NDArray[np.float64]) -> int:
    """Put exact ``frequencies`` in place of each rounded copy in ``model``; return how many.

    A copy is a constant that is multiplied to make the argument of a sine and agrees with
    ``frequencies`` to float16's precision.
    """
    products = {
        node.input_value(0).get_node().get_friendly_name(): node.input_value(0).get_node()
        for node in model.get_ops()
        if node.get_type_name() == "Sin"
    }
    replaced = 0
    for product in products.values():
        if product.get_type_name() != "Multiply":
            continue
        for port in product.inputs():
            table = _constant(port.get_source_output())
            if table is not None and _agrees(table, frequencies):
                port.replace_source_output(_fixed_point(frequencies.reshape(table.shape)))
                replaced += 1
    model.validate_nodes_and_infer_types()
    return replaced


def _constant(value: ov.Output) -> NDArray[np.float64] | None:
    node = value.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.data, dtype=np.float64)


def _agrees(table: NDArray[np.float64], frequencies: NDArray[np.float64]) -> bool:
    return table.size == frequencies.size and bool(
        np.abs(table.ravel() - frequencies).max() < _TOLERANCE
    )


def _fixed_point(frequencies: NDArray[np.float64]) -> ov.Output:
    whole = np.round(frequencies * 2.0**_BITS).astype(np.int32)
    scaled = ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(_FACTOR))
    result: ov.Output = ops.multiply(scaled, ops.constant(_FACTOR)).output(0)
    return result
