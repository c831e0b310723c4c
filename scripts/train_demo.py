"""Train the demo model "shapes" from nothing: draws its data, trains every part, saves a folder.

    python scripts/train_demo.py --out models/shapes-source --work build/train --minutes 95

Stages, in order: the autoencoder; a pool of scenes encoded once; the text encoder by itself; the
UNet together with it; the autoencoder's decoder once more; the tiny autoencoder for previews. Each
goes on from its checkpoint in --work when run again, so Ctrl-C is safe. `--init FOLDER` takes the
autoencoder of an earlier folder as it is. Needs pip install "sdvino[convert]".
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_model
import numpy as np
import scenes
import torch
from diffusers import AutoencoderKL
from layout_labels import COUNTS, layout_labels
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, l1_loss, mse_loss
from train_loop import Loop, Settings
from transformers import CLIPTokenizer

CROP = 64  # pixels: the autoencoder learns mostly from crops around objects
DROPPED_CAPTIONS = 0.1  # so that the model also learns the unconditional score, for guidance
Pictures = NDArray[np.uint8]  # [N, H, W, 3]
MIN_SNR_GAMMA = 5.0
UNIFORM_SHARE = 0.25  # of the timesteps; the others are drawn where shapes are decided
# The decoder learns to forgive what the UNet leaves in the latents, up to this share of their size.
LATENT_NOISE = 0.25
CAPTION_TOKENS = 28  # no caption of ours is longer
STAGES = ("autoencoder", "pool", "text", "unet", "decoder", "tiny")
# Shares of the budget; the pool is drawn and encoded in what is left.
SHARES = {"autoencoder": 0.17, "text": 0.03, "unet": 0.60, "decoder": 0.10, "tiny": 0.03}


@dataclass(frozen=True)
class Run:
    """Where and how one training run happens."""

    out: Path
    work: Path
    device: torch.device
    seconds: float
    steps: int | None
    scenes_in_pool: int
    batch: int
    compiled: bool
    init: Path | None = None
    muon: bool = True
    learning_rate: float = 1e-3

    @property
    def pool(self) -> Path:
        """Where the encoded scenes are kept."""
        return self.work / "pool.pt"

    def settings(self, name: str, **changes: Any) -> Settings:
        """Return a stage's settings: its share of the budget, or `steps` of them."""
        budget = self.seconds * SHARES[name]
        return Settings(name=name, seconds=budget, steps=self.steps, **changes)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bfloat16 where it is faster: on CUDA and on CPUs with bfloat16 instructions."""
        context: contextlib.AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self._has_bfloat16()
        )
        return context

    def _has_bfloat16(self) -> bool:
        if self.device.type == "cuda":
            return True
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module to the device, its images channels last."""
        return module.to(device=self.device, memory_format=torch.channels_last)


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
    if run.init is not None:
        return run.place(AutoencoderKL.from_pretrained(run.init / "vae")).float().eval()
    torch.manual_seed(1)
    vae: Any = run.place(demo_model.make_autoencoder())

    def loss(step: int, rng: np.random.Generator, progress: float) -> torch.Tensor:
        # Whole scenes now and then: group norms see other statistics there than in crops.
        whole = step % 4 == 3
        count = max(run.batch // (32 if whole else 8), 1)
        images = to_images(draw_batch(rng, count, None if whole else CROP), run.device)
        with run.autocast():
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(output, images) + 5e-4 * divergence

    settings = run.settings("autoencoder", learning_rate=2e-3, weight_decay=1e-4, seed=1)
    loop = Loop(settings, vae, run.work)
    if run.pool.exists():
        loop.finish()  # the pool was encoded with these weights, whatever the budget is now
    else:
        loop.run(loss)
    vae.eval().requires_grad_(False)
    images = to_images(draw_batch(np.random.default_rng(98), 64, None), run.device)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(16)])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
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
        whole = step % 4 == 3
        count = max(run.batch // (32 if whole else 8), 1)
        images = to_images(draw_batch(rng, count, None if whole else CROP), run.device)
        with run.autocast():
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean
            amount = LATENT_NOISE * torch.from_numpy(rng.random((count, 1, 1, 1))).float()
            noise = amount.to(run.device) / vae.config.scaling_factor * torch.randn_like(latents)
            output = vae.decode(latents + noise).sample.float()
        return reconstruction_loss(output, images)

    settings = run.settings("decoder", learning_rate=1e-3, weight_decay=1e-4, seed=5)
    Loop(settings, vae, run.work).run(loss)
    vae.eval().requires_grad_(False)
    say_quality(run, vae)
    return vae


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

    settings = run.settings("unet", learning_rate=run.learning_rate, seed=3, muon=run.muon)
    Loop(settings, model, run.work).run(loss)
    return model.eval()


def train_tiny(run: Run, vae: Any, pool: dict[str, torch.Tensor]) -> Any:
    """Train the tiny autoencoder: its decoder on the pool's latents, its encoder to make them."""
    torch.manual_seed(4)
    tiny: Any = run.place(demo_model.make_tiny_autoencoder())

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


def save(run: Run, name: str, module: Any) -> None:
    """Save one trained component under its name in the output folder."""
    demo_model.save_component(module, run.out / name)
    say(f"saved {run.out / name}: {demo_model.parameters_of(module):,} parameters")


def train(run: Run, last_stage: str = STAGES[-1]) -> None:
    """Run the stages up to and including `last_stage`, each from its checkpoint."""
    run.work.mkdir(parents=True, exist_ok=True)
    demo_model.write_tokenizer(run.out / "tokenizer")
    demo_model.write_pipeline_files(run.out)
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    vae = train_autoencoder(run)
    save(run, "vae", vae)
    if last_stage == "autoencoder":
        return
    pool = make_pool(run, vae, tokenizer)
    if last_stage == "pool":
        return
    text_encoder = train_text(run, tokenizer)
    if last_stage == "text":
        return
    model = train_unet(run, pool, tokenizer, text_encoder)
    save(run, "unet", model["unet"])
    save(run, "text_encoder", model["text_encoder"])
    if last_stage == "unet":
        return
    save(run, "vae", train_decoder(run, vae))
    if last_stage == "decoder":
        return
    save(run, "tiny_vae", train_tiny(run, vae, pool))


def say(message: str) -> None:
    """Tell the person watching."""
    print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> tuple[Run, str]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, help="whole budget (CPU 95, CUDA 10)")
    parser.add_argument("--steps", type=int, help="steps a stage, instead of a time budget")
    parser.add_argument("--scenes", type=int, default=24_576, help="scenes in the pool")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a step of the UNet")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--compile", action="store_true", help="compile the UNet (for CUDA)")
    parser.add_argument("--init", type=Path, help="a folder whose autoencoder is taken as it is")
    parser.add_argument("--muon", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    minutes = options.minutes
    if minutes is None:
        minutes = 10.0 if device == "cuda" else 95.0
    run = Run(
        out=options.out,
        work=options.work,
        device=torch.device(device),
        seconds=60 * minutes,
        steps=options.steps,
        scenes_in_pool=options.scenes,
        batch=options.batch,
        compiled=options.compile,
        init=options.init,
        muon=bool(options.muon),
        learning_rate=options.lr,
    )
    return run, options.until


def main() -> int:
    """Train; exit 130 when interrupted, as shells expect."""
    run, last_stage = parse()
    try:
        train(run, last_stage)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
