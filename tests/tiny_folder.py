"""A model folder with graphs of a few nodes, made in milliseconds: right in form, not in art."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.folder.manifest import Manifest, ManifestComponent, Suggested

WIDTH = 32
TOKENS = 77


def save(model: ov.Model, folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    write_json(folder / "config.json", config)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def parameter(shape: list[int], kind: ov.Type, name: str) -> Any:
    node = ops.parameter(ov.PartialShape(shape), kind, name=name)
    node.output(0).set_names({name})
    return node


def finish(node: Any, name: str, parameters: list[Any]) -> ov.Model:
    node.output(0).set_names({name})
    return ov.Model([ops.result(node)], parameters, "tiny")


def convolution(node: Any, channels_in: int, channels_out: int, seed: int = 0) -> Any:
    weights = np.random.default_rng(seed).standard_normal((channels_out, channels_in, 3, 3))
    constant = ops.constant(weights.astype(np.float32) / 10)
    return ops.convolution(node, constant, [1, 1], [1, 1], [1, 1], [1, 1])


def unet() -> ov.Model:
    """sample + mean of the states + timestep / 1000, after a convolution."""
    sample = parameter([-1, 4, -1, -1], ov.Type.f32, "sample")
    timestep = parameter([-1], ov.Type.i64, "timestep")
    states = parameter([-1, TOKENS, WIDTH], ov.Type.f32, "encoder_hidden_states")
    t = ops.divide(ops.convert(timestep, "f32"), np.float32(1000))
    text = ops.reduce_mean(states, np.array([1, 2], np.int64))
    shift = ops.unsqueeze(ops.add(t, text), np.array([1, 2, 3], np.int64))
    return finish(
        ops.add(convolution(sample, 4, 4), shift), "out_sample", [sample, timestep, states]
    )


def text_encoder() -> ov.Model:
    ids = parameter([-1, -1], ov.Type.i64, "input_ids")
    table = np.random.default_rng(1).standard_normal((49408 // 64, WIDTH)).astype(np.float32)
    return finish(ops.gather(ops.constant(table), ids, np.int64(0)), "last_hidden_state", [ids])


def vae_decoder() -> ov.Model:
    latents = parameter([-1, 4, -1, -1], ov.Type.f32, "latent_sample")
    pixels = ops.depth_to_space(convolution(latents, 4, 3 * 8**2, seed=2), "blocks_first", 8)
    return finish(pixels, "sample", [latents])


#: Of the tiny folder with two text encoders: widths, the pooled state's, a size's embedding.
WIDTHS, POOLED, SIZE_WIDTH = (32, 16), 24, 8


def xl_unet(channels: int = 4, times: int = 6) -> ov.Model:
    """As `unet`, and with the means of the pooled state and the sizes."""
    sample = parameter([-1, channels, -1, -1], ov.Type.f32, "sample")
    timestep = parameter([-1], ov.Type.i64, "timestep")
    states = parameter([-1, TOKENS, sum(WIDTHS)], ov.Type.f32, "encoder_hidden_states")
    pooled = parameter([-1, POOLED], ov.Type.f32, "text_embeds")
    sizes = parameter([-1, times], ov.Type.f32, "time_ids")
    t = ops.divide(ops.convert(timestep, "f32"), np.float32(1000))
    text = ops.reduce_mean(states, np.array([1, 2], np.int64))
    for extra, scale in ((pooled, 1), (sizes, 1000)):
        mean = ops.reduce_mean(extra, np.array([1], np.int64))
        text = ops.add(text, ops.divide(mean, np.float32(scale)))
    shift = ops.unsqueeze(ops.add(t, text), np.array([1, 2, 3], np.int64))
    inputs = [sample, timestep, states, pooled, sizes]
    return finish(ops.add(convolution(sample, channels, 4), shift), "out_sample", inputs)


def passing(sample: Any, channels: int = 4) -> Any:
    """Three convolutions, ``blocks.0`` and on, that pass their input on, as good as unchanged."""
    value = sample
    for index in range(3):
        weights = 0.01 * np.random.default_rng(index).standard_normal((channels, channels, 3, 3))
        weights[range(channels), range(channels), 1, 1] += 0.99
        constant = ops.constant(weights.astype(np.float32))
        value = ops.convolution(value, constant, [1, 1], [1, 1], [1, 1], [1, 1])
        value.set_friendly_name(f"__module.blocks.{index}/aten::_convolution/Convolution")
    return value


def trained_unet(conditions: Mapping[str, int]) -> ov.Model:
    """A UNet that nearly gives the noise back that it is given, with whatever else it is told.

    ``conditions``: name of an input of rank 2 -> its width; a little of each one's mean is added.
    """
    sample = parameter([-1, 4, -1, -1], ov.Type.f32, "sample")
    timestep = parameter([-1], ov.Type.i64, "timestep")
    xl = "text_embeds" in conditions
    width, weight = (sum(WIDTHS), 0.01) if xl else (WIDTH, 0.3)
    states = parameter([-1, TOKENS, width], ov.Type.f32, "encoder_hidden_states")
    inputs = [sample, timestep, states]
    shift = ops.divide(ops.convert(timestep, "f32"), np.float32(20_000))
    mean = ops.reduce_mean(states, np.array([1, 2], np.int64))
    shift = ops.add(shift, ops.multiply(mean, np.float32(weight)))
    for name, size in conditions.items():
        told = parameter([-1, size], ov.Type.f32, name)
        mean = ops.reduce_mean(told, np.array([1], np.int64))
        shift = ops.add(shift, ops.multiply(mean, np.float32(1e-4)))
        inputs.append(told)
    shift = ops.unsqueeze(shift, np.array([1, 2, 3], np.int64))
    return finish(ops.add(passing(sample), shift), "out_sample", inputs)


def xl_text_encoder(width: int, pooled: int | None) -> ov.Model:
    """Every layer's states (number n adds n), in optimum-intel's names; perhaps a pooled one."""
    ids = parameter([-1, -1], ov.Type.i64, "input_ids")
    table = np.random.default_rng(width).standard_normal((600, width)).astype(np.float32)
    base = ops.gather(ops.constant(table), ids, np.int64(0))
    results = []
    for name, number in (
        ("last_hidden_state", 9),
        *((f"hidden_states.{n}", n) for n in range(4)),
    ):
        state = ops.add(base, np.float32(number))
        state.output(0).set_names({name})
        results.append(ops.result(state))
    if pooled is not None:
        first = ops.reduce_mean(base, np.array([1], np.int64))
        state = ops.matmul(first, np.ones((width, pooled), np.float32), False, False)
        state.output(0).set_names({"text_embeds"})
        results.append(ops.result(state))
    return ov.Model(results, [ids], "tiny")


def make_tiny_xl_folder(folder: Path) -> Path:
    """Write a folder of the layout of Stable Diffusion XL, without tokenizers, and return it."""
    make_tiny_folder(folder)
    (folder / "sdvino.json").unlink()
    save(
        xl_unet(),
        folder / "unet",
        {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": sum(WIDTHS),
            "sample_size": 16,
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_WIDTH,
            "time_cond_proj_dim": None,
        },
    )
    for name, width, pooled in (
        ("text_encoder", WIDTHS[0], None),
        ("text_encoder_2", WIDTHS[1], POOLED),
    ):
        config = {"hidden_size": width, "max_position_embeddings": TOKENS}
        if pooled is not None:
            config["projection_dim"] = pooled
        save(xl_text_encoder(width, pooled), folder / name, config)
    write_json(folder / "tokenizer_2" / "tokenizer.json", {})
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    return folder


def make_tiny_lcm_folder(folder: Path, width: int = 16) -> Path:
    """Write a folder of an LCM, without a tokenizer, and return it."""
    make_tiny_folder(folder)
    (folder / "sdvino.json").unlink()
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    config["time_cond_proj_dim"] = width
    save(trained_unet({"timestep_cond": width}), folder / "unet", config)
    scheduler = {"_class_name": "LCMScheduler", "prediction_type": "epsilon"}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", {"_class_name": "LatentConsistencyModelPipeline"})
    return folder


def make_tiny_folder(folder: Path) -> Path:
    """Write a whole folder, manifest included, and return it."""
    save(
        unet(),
        folder / "unet",
        {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": WIDTH,
            "sample_size": 16,
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        },
    )
    save(
        text_encoder(),
        folder / "text_encoder",
        {"hidden_size": WIDTH, "max_position_embeddings": TOKENS},
    )
    save(
        vae_decoder(),
        folder / "vae_decoder",
        {
            "_class_name": "AutoencoderKL",
            "latent_channels": 4,
            "block_out_channels": [16, 32, 32, 32],
            "scaling_factor": 0.18215,
        },
    )
    write_json(folder / "tokenizer" / "tokenizer.json", {})
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    )
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    manifest = Manifest(
        source="tiny",
        family="sd1",
        recipe="fp16",
        components={
            name: ManifestComponent.of(folder / name, "fp16")
            for name in ("text_encoder", "unet", "vae_decoder")
        },
        suggested=Suggested(num_inference_steps=8, guidance_scale=4.0, scheduler="dpmpp_2m"),
    )
    (folder / "sdvino.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder
