"""Train the demo model "shapes" from nothing: draws its data, trains every part, saves a folder.

    python scripts/train_demo.py --out models/shapes-source --work build/train --minutes 95

Stages, in order: the autoencoder; a pool of scenes encoded once; the text encoder by itself; the
UNet together with it; the autoencoder's decoder once more; the tiny autoencoder for previews. Each
goes on from its checkpoint in --work when run again, so Ctrl-C is safe. `--init FOLDER` goes on
from the weights of an earlier folder, whose encoder is taken as it is.
Needs pip install "sdvino[train]".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import demo_model
import torch
from train_autoencoder import train_autoencoder, train_decoder, train_tiny
from train_denoiser import make_pool, train_text, train_unet
from train_run import STAGES, Run, say
from transformers import CLIPTokenizer


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
    text = train_text(run, tokenizer)
    if last_stage == "text":
        return
    model = train_unet(run, pool, tokenizer, text)
    save(run, "unet", model["unet"])
    save(run, "text_encoder", model["text_encoder"])
    if last_stage == "unet":
        return
    save(run, "vae", train_decoder(run, vae))
    if last_stage == "decoder":
        return
    save(run, "tiny_vae", train_tiny(run, vae))


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
    parser.add_argument("--init", type=Path, help="an earlier folder to go on from")
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
