"""The demo model's text encoder and UNet, and the pool of encoded scenes they learn from."""

from __future__ import annotations

import time
from typing import Any

import demo_model
import numpy as np
import scenes
import torch
from layout_labels import COUNTS, layout_labels
from torch.nn.functional import cross_entropy, mse_loss
from train_autoencoder import to_images
from train_loop import Loop
from train_run import Run, say

DROPPED_CAPTIONS = 0.1  # so that the model also learns the unconditional score, for guidance
MIN_SNR_GAMMA = 5.0
UNIFORM_SHARE = 0.25  # of the timesteps; the others are drawn where shapes are decided
CAPTION_TOKENS = 28  # no caption of ours is longer


def make_pool(run: Run, vae: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Draw scenes and encode them: unit-variance latents [n, 4, 16, 16], token ids [n, 77]."""
    if run.pool.exists():
        pool: dict[str, torch.Tensor] = torch.load(
            run.pool, map_location=run.device, weights_only=True
        )
        return pool
    rng = np.random.default_rng(2)
    latents: list[torch.Tensor] = []
    texts: list[str] = []
    began = time.monotonic()
    while len(texts) < run.scenes_in_pool:
        drawn = [scenes.sample_scene(rng) for _ in range(min(32, run.scenes_in_pool))]
        texts += [prompt.text for _, prompt in drawn]
        images = to_images(np.stack([scenes.draw(scene) for scene, _ in drawn]), run.device)
        with torch.no_grad(), run.autocast():
            mean = vae.encode(images).latent_dist.mean
        latents.append(mean.float().contiguous() * vae.config.scaling_factor)
        if len(latents) % 64 == 0:
            spent = time.monotonic() - began
            left = spent * (run.scenes_in_pool / len(texts) - 1)
            say(f"pool: {len(texts)} scenes, {left / 60:.1f} min left")
    pool = {"latents": torch.cat(latents), "tokens": tokenize(tokenizer, texts).to(run.device)}
    partial = run.pool.with_suffix(".partial")
    torch.save(pool, partial)
    partial.replace(run.pool)
    return pool


def tokenize(tokenizer: Any, texts: list[str], length: int = demo_model.MAX_TOKENS) -> torch.Tensor:
    """Return token ids, int64 [n, length], padded with the end of text as Stable Diffusion does."""
    ids: torch.Tensor = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    ).input_ids
    return ids


def train_text(run: Run, tokenizer: Any) -> Any:
    """Train the text encoder to tell a caption's layout at the end of the text."""
    torch.manual_seed(6)
    text_encoder = demo_model.make_text_encoder(tokenizer)
    head = torch.nn.Linear(demo_model.TEXT_WIDTH, sum(COUNTS))
    model: Any = torch.nn.ModuleDict({"text_encoder": text_encoder, "head": head})
    model.to(run.device)

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        prompts = [scenes.sample_scene(rng)[1] for _ in range(4 * run.batch)]
        tokens = tokenize(tokenizer, [prompt.text for prompt in prompts], CAPTION_TOKENS)
        labels = torch.from_numpy(np.stack([layout_labels(prompt) for prompt in prompts]))
        end = (tokens == tokenizer.eos_token_id).int().argmax(1)
        tokens, labels = tokens.to(run.device), labels.to(run.device)
        states = model["text_encoder"](tokens).last_hidden_state
        logits = model["head"](states[torch.arange(len(end)), end])
        parts = zip(logits.split(COUNTS, 1), labels.unbind(1), strict=True)
        return torch.stack([cross_entropy(part, label) for part, label in parts]).sum()

    Loop(run.settings("text", learning_rate=2e-3, seed=6), model, run.work).run(loss)
    return model["text_encoder"]


def cumulative_alphas(device: torch.device) -> torch.Tensor:
    """Return alpha-bar of the scaled linear schedule, [1000]."""
    config = demo_model.SCHEDULER_CONFIG
    ends = (config["beta_start"] ** 0.5, config["beta_end"] ** 0.5)
    betas = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def min_snr_weights(alphas: torch.Tensor) -> torch.Tensor:
    """Return Min-SNR weights for predicting v (Hang et al. 2023), of mean 1, [1000].

    Timesteps are drawn in their proportion, rather than evenly and then weighted: the expected
    gradient is the same and less of the work goes into timesteps that hardly count.

    Shapes are decided at signal-to-noise ratios around one. Unweighted, most of the loss comes
    from nearly pure noise, where all there is to learn is the layout, and that is learnt soon.
    """
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
    return weights / weights.mean()


def draw_timesteps(weights: torch.Tensor, batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Return timesteps distributed as `weights`, a share of them evenly, int64 [batch].

    One comes from each of `batch` strata of equal probability: a steadier loss.
    """
    density = (1 - UNIFORM_SHARE) * weights.double() / weights.double().sum()
    density += UNIFORM_SHARE / len(weights)
    strata = (torch.arange(batch) + torch.from_numpy(rng.random(batch))) / batch
    found = torch.searchsorted(density.cumsum(0).cpu(), strata)
    return found.clamp(max=len(weights) - 1)


def train_unet(run: Run, pool: dict[str, torch.Tensor], tokenizer: Any, text_encoder: Any) -> Any:
    """Train the UNet and the text encoder together on the pool; return them as a module dict."""
    torch.manual_seed(3)
    model: Any = torch.nn.ModuleDict({"unet": demo_model.make_unet(), "text_encoder": text_encoder})
    run.place(model)
    denoiser = torch.compile(model["unet"]) if run.compiled else model["unet"]
    alphas = cumulative_alphas(run.device)
    weights = min_snr_weights(alphas)
    empty = tokenize(tokenizer, [""]).to(run.device)
    latents, tokens = pool["latents"], pool["tokens"]

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(len(latents), size=run.batch)).to(run.device)
        x0 = latents[chosen]
        dropped = torch.from_numpy(rng.random(run.batch) < DROPPED_CAPTIONS).to(run.device)
        captions = torch.where(dropped[:, None], empty, tokens[chosen])
        t = draw_timesteps(weights, run.batch, rng).to(run.device)
        noise = torch.randn(x0.shape).to(run.device)
        a = alphas[t][:, None, None, None]
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        v = a.sqrt() * noise - (1 - a).sqrt() * x0
        with run.autocast():
            context = model["text_encoder"](captions).last_hidden_state
            v_pred = denoiser(x_t, t, encoder_hidden_states=context, return_dict=False)[0]
        return mse_loss(v_pred.float(), v)

    settings = run.settings("unet", learning_rate=1e-3, seed=3, muon=True)
    Loop(settings, model, run.work).run(loss)
    return model.eval()
