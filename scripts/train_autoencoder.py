"""The demo model's autoencoders: the autoencoder, its decoder once more, and the tiny one."""

from __future__ import annotations

import copy
from typing import Any

import demo_model
import numpy as np
import scenes
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from torch.nn.functional import l1_loss, mse_loss
from train_loop import Loop
from train_run import Run, say

CROP = 64  # pixels: the autoencoder learns mostly from crops around objects
# The decoder learns to forgive what the UNet leaves in the latents, up to this share of their size.
LATENT_NOISE = 0.25
KL_WEIGHT = 5e-5
# What holds the latents where an earlier UNet knows them: enough to let only faults move.
ANCHOR_WEIGHT = 0.02
Pictures = NDArray[np.uint8]  # [N, H, W, 3]


def to_images(pictures: Pictures, device: torch.device) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], channels last."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: torch.Tensor) -> Pictures:
    """float [N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pictures: Pictures = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures


def draw_batch(rng: np.random.Generator, count: int, crop: int | None) -> Pictures:
    """Draw training scenes, or crops of them that mostly show the outline of an object."""
    batch = []
    for _ in range(count):
        scene, _ = scenes.sample_scene(rng)
        picture = scenes.draw(scene)
        if crop is not None:
            thing = scene.objects[int(rng.integers(len(scene.objects)))]
            offset = rng.uniform(-thing.radius, thing.radius, 2) - crop / 2
            corner = np.array([thing.y, thing.x]) + offset
            # Whole latent cells, as in a whole picture.
            top, left = np.clip(np.rint(corner / 8).astype(int) * 8, 0, len(picture) - crop)
            picture = picture[top : top + crop, left : left + crop]
        batch.append(picture)
    return np.stack(batch)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 keeps edges sharp, the square keeps flat areas clean."""
    return l1_loss(output, target) + mse_loss(output, target)


def train_autoencoder(run: Run) -> Any:
    """Train the autoencoder and set its scaling factor; return it in evaluation mode."""
    torch.manual_seed(1)
    earlier: Any = None
    if run.init is not None:
        earlier = run.place(AutoencoderKL.from_pretrained(run.init / "vae")).float().eval()
        earlier.requires_grad_(False)
    vae: Any = demo_model.make_autoencoder() if earlier is None else copy.deepcopy(earlier).train()
    run.place(vae).requires_grad_(True)

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        # Whole scenes now and then: group norms see other statistics there than in crops.
        whole = step % 2 == 1
        count = max(run.batch // (32 if whole else 8), 1)
        images = to_images(draw_batch(rng, count, None if whole else CROP), run.device)
        with run.autocast():
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        found = reconstruction_loss(output, images) + KL_WEIGHT * divergence
        if earlier is None:
            return found
        # The UNet knows the latents as they were.
        with torch.no_grad():
            known = earlier.encode(images).latent_dist.mean * earlier.config.scaling_factor
        moved = mse_loss(posterior.mean.float() * earlier.config.scaling_factor, known)
        return found + ANCHOR_WEIGHT * moved

    settings = run.settings("autoencoder", learning_rate=1e-3, weight_decay=1e-4, seed=1, muon=True)
    loop = Loop(settings, vae, run.work)
    if run.pool.exists():
        loop.finish()  # the pool was encoded with these weights, whatever the budget is now
    else:
        loop.run(loss)
    vae.eval().requires_grad_(False)
    if earlier is None:
        images = to_images(draw_batch(np.random.default_rng(98), 64, None), run.device)
        with torch.no_grad():
            parts = [vae.encode(part).latent_dist.sample() for part in images.split(16)]
        vae.register_to_config(scaling_factor=round(float(1 / torch.cat(parts).std()), 5))
    say_quality(run, vae)
    return vae


def say_quality(run: Run, vae: Any) -> None:
    """Print how well the autoencoder keeps whole scenes."""
    pictures = draw_batch(np.random.default_rng(99), 64, None)
    with torch.no_grad():
        decoded = [
            vae.decode(vae.encode(part).latent_dist.mean).sample
            for part in to_images(pictures, run.device).split(16)
        ]
    error = (to_pictures(torch.cat(decoded)).astype(float) - pictures) ** 2
    quality = float(np.mean(10 * np.log10(255**2 / error.mean((1, 2, 3)))))
    say(f"autoencoder: {quality:.1f} dB on whole scenes")


def train_decoder(run: Run, vae: Any) -> Any:
    """Train the decoder alone, on latents as noisy as a UNet's; the encoder stays as it is."""
    torch.manual_seed(5)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        whole = step % 2 == 1
        count = max(run.batch // (32 if whole else 8), 1)
        images = to_images(draw_batch(rng, count, None if whole else CROP), run.device)
        with run.autocast():
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean
            amount = LATENT_NOISE * torch.from_numpy(rng.random((count, 1, 1, 1))).float()
            noise = amount.to(run.device) / vae.config.scaling_factor * torch.randn_like(latents)
            output = vae.decode(latents + noise).sample.float()
        return reconstruction_loss(output, images)

    settings = run.settings("decoder", learning_rate=1e-3, weight_decay=1e-4, seed=5, muon=True)
    Loop(settings, vae, run.work).run(loss)
    vae.eval().requires_grad_(False)
    say_quality(run, vae)
    return vae


def train_tiny(run: Run, vae: Any) -> Any:
    """Train the tiny autoencoder: its decoder on the other's latents, its encoder to make them."""
    torch.manual_seed(4)
    earlier = None if run.init is None else run.init / "tiny_vae"
    if earlier is not None and earlier.is_dir():
        tiny: Any = AutoencoderTiny.from_pretrained(earlier).float().train()
    else:
        tiny = demo_model.make_tiny_autoencoder()
    run.place(tiny).requires_grad_(True)

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        images = to_images(draw_batch(rng, max(run.batch // 4, 1), CROP), run.device)
        with run.autocast():
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            output = tiny.decode(latents).sample.float()
            encoded = tiny.encode(images).latents.float()
        return reconstruction_loss(output, images) + 0.1 * mse_loss(encoded, latents.float())

    settings = run.settings("tiny", learning_rate=2e-3, weight_decay=1e-4, seed=4)
    Loop(settings, tiny, run.work).run(loss)
    return tiny.eval()
