"""Train the demo model "shapes" from nothing: draws its data, trains every part, saves a folder.

    python scripts/train_demo.py --out models/shapes-source --work build/train --minutes 95

Stages, in order: the autoencoder; a pool of scenes encoded once; the UNet with the text encoder;
the tiny autoencoder for previews. Each goes on from its checkpoint in --work when run again, so
Ctrl-C is safe. Needs torch, diffusers and transformers (pip install "sdvino[convert]").
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
from numpy.typing import NDArray
from torch.nn.functional import l1_loss, mse_loss
from train_loop import Loop, Settings
from transformers import CLIPTokenizer

CROP = 64  # pixels: the autoencoder learns mostly from crops around objects
DROPPED_CAPTIONS = 0.1  # so that the model also learns the unconditional score, for guidance
Pictures = NDArray[np.uint8]  # [N, H, W, 3]
MIN_SNR_GAMMA = 5.0
STAGES = ("autoencoder", "pool", "unet", "tiny")
# Shares of the budget; the pool is drawn and encoded in what is left.
SHARES = {"autoencoder": 0.29, "unet": 0.58, "tiny": 0.04}


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
    pictures = draw_batch(np.random.default_rng(99), 64, None)
    images = to_images(pictures, run.device)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(16)])
        decoded = torch.cat([vae.decode(part).sample for part in latents.split(16)])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    error = (to_pictures(decoded).astype(float) - pictures) ** 2
    quality = float(np.mean(10 * np.log10(255**2 / error.mean((1, 2, 3)))))
    say(f"autoencoder: {quality:.1f} dB on whole scenes, latents of {latents.std():.2f}")
    return vae


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


def tokenize(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return token ids, int64 [n, 77], padded with the end of text as Stable Diffusion does."""
    ids: torch.Tensor = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=demo_model.MAX_TOKENS,
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

    Shapes are decided at signal-to-noise ratios around one. Unweighted, most of the loss comes
    from nearly pure noise, where all there is to learn is the layout, and that is learnt soon.
    """
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
    return weights / weights.mean()


def train_unet(run: Run, pool: dict[str, torch.Tensor], tokenizer: Any) -> Any:
    """Train the UNet and the text encoder together on the pool; return them as a module dict."""
    torch.manual_seed(3)
    model: Any = torch.nn.ModuleDict(
        {"unet": demo_model.make_unet(), "text_encoder": demo_model.make_text_encoder(tokenizer)}
    )
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
        # One timestep from each of `batch` equal strata: a steadier loss than independent draws.
        strata = (np.arange(run.batch) + rng.random(run.batch)) / run.batch
        t = torch.from_numpy((strata * len(alphas)).astype(np.int64)).to(run.device)
        noise = torch.randn(x0.shape).to(run.device)
        a = alphas[t][:, None, None, None]
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        v = a.sqrt() * noise - (1 - a).sqrt() * x0
        with run.autocast():
            context = model["text_encoder"](captions).last_hidden_state
            v_pred = denoiser(x_t, t, encoder_hidden_states=context, return_dict=False)[0]
        error = (v_pred.float() - v).square().mean((1, 2, 3))
        return (weights[t] * error).mean()

    settings = run.settings("unet", learning_rate=1e-3, seed=3)
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
    model = train_unet(run, pool, tokenizer)
    save(run, "unet", model["unet"])
    save(run, "text_encoder", model["text_encoder"])
    if last_stage == "unet":
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
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
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
        compiled=not options.no_compile,
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
