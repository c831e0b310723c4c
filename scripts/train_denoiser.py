"""The demo model's text encoder and UNet, and the pool of encoded scenes they learn from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import demo_model
import numpy as np
import scenes
import torch
from diffusers import UNet2DConditionModel
from layout_labels import COUNTS, layout_labels
from torch.nn.functional import cross_entropy, mse_loss
from train_autoencoder import to_images
from train_loop import Loop
from train_run import Run, say
from transformers import CLIPTextModel

DROPPED_CAPTIONS = 0.1  # so that the model also learns the unconditional score, for guidance
MIN_SNR_GAMMA = 5.0
# Half the timesteps are drawn where shapes are decided (by the Min-SNR weights), half where the
# layout is: log-normally around this signal-to-noise ratio.
LAYOUT_SHARE = 0.5
LAYOUT_LOG_SNR, LAYOUT_SPREAD = -2.5, 1.3
CAPTION_TOKENS = 28  # no caption of ours is longer
# Of the layout's loss beside the UNet's: enough that the text encoder keeps what it has learnt.
LAYOUT_WEIGHT = 0.01
UNET_RATE = 1e-3


def make_pool(run: Run, vae: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Draw scenes and encode them.

    Returns unit-variance latents [n, 4, 16, 16], token ids [n, 77], layout labels [n, labels].
    """
    if run.pool.exists():
        pool: dict[str, torch.Tensor] = torch.load(
            run.pool, map_location=run.device, weights_only=True
        )
        return pool
    rng = np.random.default_rng(2)
    latents: list[torch.Tensor] = []
    prompts: list[scenes.Prompt] = []
    began = time.monotonic()
    while len(prompts) < run.scenes_in_pool:
        drawn = [scenes.sample_scene(rng) for _ in range(min(32, run.scenes_in_pool))]
        prompts += [prompt for _, prompt in drawn]
        images = to_images(np.stack([scenes.draw(scene) for scene, _ in drawn]), run.device)
        with torch.no_grad(), run.autocast():
            mean = vae.encode(images).latent_dist.mean
        latents.append(mean.float().contiguous() * vae.config.scaling_factor)
        if len(latents) % 64 == 0:
            spent = time.monotonic() - began
            left = spent * (run.scenes_in_pool / len(prompts) - 1)
            say(f"pool: {len(prompts)} scenes, {left / 60:.1f} min left")
    tokens = tokenize(tokenizer, [prompt.text for prompt in prompts])
    pool = {
        "latents": torch.cat(latents),
        "tokens": tokens.to(run.device),
        "labels": label(prompts).to(run.device),
    }
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


def label(prompts: Sequence[scenes.Prompt]) -> torch.Tensor:
    """Return the layout labels of prompts, int64 [n, labels]."""
    return torch.from_numpy(np.stack([layout_labels(prompt) for prompt in prompts]))


def layout_loss(
    head: torch.nn.Module,
    states: torch.Tensor,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    end: int,
) -> torch.Tensor:
    """Return the cross-entropy of the labels as read from the states at the end of the text."""
    at = (tokens == end).int().argmax(1)
    logits = head(states[torch.arange(len(at)), at])
    parts = zip(logits.split(COUNTS, 1), labels.unbind(1), strict=True)
    return torch.stack([cross_entropy(part, label) for part, label in parts]).sum()


def train_text(run: Run, tokenizer: Any) -> Any:
    """Train the text encoder to tell a caption's layout at the end of the text.

    Returns a module dict of the text encoder and the head that reads the layout.
    """
    torch.manual_seed(6)
    model: Any = torch.nn.ModuleDict(
        {
            "text_encoder": _text_encoder(run, tokenizer),
            "head": torch.nn.Linear(demo_model.TEXT_WIDTH, sum(COUNTS)),
        }
    ).to(run.device)
    end = tokenizer.eos_token_id

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        prompts = [scenes.sample_scene(rng)[1] for _ in range(4 * run.batch)]
        texts = [prompt.text for prompt in prompts]
        tokens = tokenize(tokenizer, texts, CAPTION_TOKENS).to(run.device)
        states = model["text_encoder"](tokens).last_hidden_state
        return layout_loss(model["head"], states, tokens, label(prompts).to(run.device), end)

    # Alone, the head learns to read what is there already.
    if run.init is not None:
        model["text_encoder"].requires_grad_(False)
    Loop(run.settings("text", learning_rate=2e-3, seed=6), model, run.work).run(loss)
    return model.requires_grad_(True)


def _text_encoder(run: Run, tokenizer: Any) -> Any:
    if run.init is None:
        return demo_model.make_text_encoder(tokenizer)
    return CLIPTextModel.from_pretrained(run.init / "text_encoder").float()


def _unet(run: Run) -> Any:
    if run.init is None:
        return demo_model.make_unet()
    return UNet2DConditionModel.from_pretrained(run.init / "unet").float()


def cumulative_alphas(device: torch.device) -> torch.Tensor:
    """Return alpha-bar of the scaled linear schedule, [1000]."""
    config = demo_model.SCHEDULER_CONFIG
    ends = (config["beta_start"] ** 0.5, config["beta_end"] ** 0.5)
    betas = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def min_snr_weights(alphas: torch.Tensor) -> torch.Tensor:
    """Return Min-SNR weights for predicting v (Hang et al. 2023), of mean 1, [1000].

    Shapes are decided at signal-to-noise ratios around one. Unweighted, most of the loss comes
    from nearly pure noise, where all there is to learn is the layout, and that is learnt soon.
    """
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
    return weights / weights.mean()


def timestep_density(alphas: torch.Tensor) -> torch.Tensor:
    """Return the probability of each timestep in training, float64 [1000].

    An object's place and its relation to another are settled in nearly pure noise, its outline
    near the end; a model that is trained on either alone draws the right shapes in wrong places,
    or blobs in right ones.
    """
    shapes = min_snr_weights(alphas).double()
    log_snr = (alphas / (1 - alphas)).double().log()
    layout = torch.exp(-0.5 * ((log_snr - LAYOUT_LOG_SNR) / LAYOUT_SPREAD) ** 2)
    return (1 - LAYOUT_SHARE) * shapes / shapes.sum() + LAYOUT_SHARE * layout / layout.sum()


def draw_timesteps(density: torch.Tensor, batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Return timesteps distributed as `density`, int64 [batch].

    One comes from each of `batch` strata of equal probability: a steadier loss.
    """
    strata = (torch.arange(batch) + torch.from_numpy(rng.random(batch))) / batch
    found = torch.searchsorted(density.cumsum(0).cpu(), strata)
    return found.clamp(max=len(density) - 1)


def train_unet(run: Run, pool: dict[str, torch.Tensor], tokenizer: Any, text: Any) -> Any:
    """Train the UNet together with the text encoder and its head; return them as a module dict."""
    torch.manual_seed(3)
    model: Any = torch.nn.ModuleDict({"unet": _unet(run), **dict(text.items())})
    run.place(model)
    denoiser = torch.compile(model["unet"]) if run.compiled else model["unet"]
    alphas = cumulative_alphas(run.device)
    density = timestep_density(alphas)
    empty = tokenize(tokenizer, [""]).to(run.device)

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(len(pool["latents"]), size=run.batch)).to(run.device)
        x0, tokens, labels = (pool[name][chosen] for name in ("latents", "tokens", "labels"))
        dropped = torch.from_numpy(rng.random(run.batch) < DROPPED_CAPTIONS).to(run.device)
        tokens = torch.where(dropped[:, None], empty, tokens)
        labels = torch.where(dropped[:, None], 0, labels)
        t = draw_timesteps(density, run.batch, rng).to(run.device)
        noise = torch.randn(x0.shape).to(run.device)
        a = alphas[t][:, None, None, None]
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        v = a.sqrt() * noise - (1 - a).sqrt() * x0
        with run.autocast():
            states = model["text_encoder"](tokens).last_hidden_state
            v_pred = denoiser(x_t, t, encoder_hidden_states=states, return_dict=False)[0]
        layout = layout_loss(model["head"], states.float(), tokens, labels, tokenizer.eos_token_id)
        return mse_loss(v_pred.float(), v) + LAYOUT_WEIGHT * layout

    settings = run.settings("unet", learning_rate=UNET_RATE, seed=3, muon=True)
    Loop(settings, model, run.work).run(loss)
    return model.eval()
