"""Print what one step of distillation takes: forward, backward, update; time and peak memory.

    python scripts/make_synthetic.py --arch sd15 build/sd15
    python scripts/distill_step.py build/sd15 --device cpu

The UNet of the folder is the teacher and, as a copy, the student; latents and texts are noise, on
which neither time nor memory depends. Activations are recomputed unless that is turned off.
`--ema 0` trains without the running average of the weights, which is as large as they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sdvino.compress.quiet import quiet
from sdvino.runtime.memory import peak_memory
from sdvino.train.distillation.loop import Trainer
from sdvino.train.distillation.models import choose_device, place
from sdvino.train.distillation.noise_levels import NoiseLevels
from sdvino.train.distillation.objectives import (
    Features,
    FoldGuidance,
    FollowTrajectories,
    Objective,
    Recover,
)
from sdvino.train.distillation.pool import Pool, Texts, Trajectories
from sdvino.train.distillation.settings import DistillSettings
from sdvino.train.modules import load_component

TOKENS = 77


def objective_of(
    settings: DistillSettings, teacher: Any, student: Any, scheduler: Any
) -> Objective:
    """Return the objective on noise."""
    config = teacher.config
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    device = next(teacher.parameters()).device
    levels = NoiseLevels(scheduler, device)
    states = torch.randn(3, TOKENS, config.cross_attention_dim)
    texts = Texts(states[1:].half(), states[0])
    text = torch.tensor([0, 1])
    pool = Pool(torch.randn(shape), text)
    if settings.objective == "steps":
        steps = settings.student_steps
        x = torch.randn(2, steps + 1, *shape[1:])
        return FollowTrajectories(
            teacher, levels, texts, trajectories=Trajectories(x, text), steps=steps
        )
    if settings.objective == "guidance":
        return FoldGuidance(teacher, levels, texts, pool=pool, guidance_scale=7.5)
    weight, features = settings.feature_weight, Features(teacher, student)
    return Recover(teacher, levels, texts, pool=pool, feature_weight=weight, features=features)


def measure(folder: Path, settings: DistillSettings, steps: int) -> dict[str, Any]:
    """Return the seconds of each step and the peaks of memory, in bytes."""
    device = choose_device(settings.device)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    with quiet():
        teacher, student = (load_component(folder / "unet", "unet") for _ in range(2))
    teacher, student = place(teacher, device), place(student, device)
    objective = objective_of(settings, teacher, student, scheduler)
    if settings.gradient_checkpointing is not False:
        student.enable_gradient_checkpointing()
    loaded = peak_memory()
    seconds = []
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(student, settings, Path(work), device)
        for _ in range(steps):
            began = time.monotonic()
            trainer.iterate(objective)
            seconds.append(time.monotonic() - began)
    cuda = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "device": device.type,
        "parameters": sum(one.numel() for one in student.parameters()),
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak_memory(),
        "cuda_peak_bytes": cuda,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a diffusers folder")
    parser.add_argument("--objective", default="recover", choices=("recover", "guidance", "steps"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="steps to do, one after the other")
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    options = parser.parse_args()
    settings = DistillSettings(
        objective=options.objective,
        batch=options.batch,
        ema=options.ema,
        device=options.device,
        gradient_checkpointing=not options.no_gradient_checkpointing,
    )
    found = measure(options.folder, settings, options.steps)
    seconds = ", ".join(f"{one:.1f}" for one in found["seconds"])
    print(f"{options.folder.name}: {found['parameters'] / 1e6:.1f} M parameters, batch of", end=" ")
    print(f"{options.batch}, {options.objective}, on {found['device']}")
    print(f"  seconds of each step: {seconds}")
    for name, key in (
        ("both UNets loaded", "loaded_bytes"),
        ("peak memory", "peak_bytes"),
        ("peak memory of the GPU", "cuda_peak_bytes"),
    ):
        if found[key] is not None:
            print(f"  {name}: {found[key] / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
