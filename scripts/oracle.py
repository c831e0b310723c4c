"""Hold every sampler against diffusers on real weights: `python scripts/oracle.py`.

The same weights, prompt, seed, steps and guidance go through diffusers (torch, f32) and through
sdvino (the same weights as IR, run in f32). Prints, for every pair of sampler and grid that
diffusers also has, the relative error of the final latents and the PSNR of the pictures.
Needs the convert extra. Exits 1 when a case misses 1e-3 or 40 dB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle_schedulers import COMBINATIONS, Combination, oracle_scheduler
from tqdm import tqdm

from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline

SOURCE = Path(__file__).resolve().parent.parent / "models" / "shapes-source"
PROMPT = "a big red star to the left of a small yellow ring on a blue background"
STEPS = (4, 8, 20)
SEED = 11
GUIDANCE_SCALE = 4.0
# LCM and TCD put fresh noise on a whole new guess at every step. Guided, as their models never are,
# a model that was not made for them turns the last bit of a float into another picture, in
# diffusers as here; with the guidance that they are used with, it does not.
DISTILLED_GUIDANCE_SCALE = 1.0
DISTILLED = ("lcm", "tcd")
MAX_ERROR = 1e-3
MIN_PSNR = 40.0


@dataclass(frozen=True)
class Case:
    """How far one run of sdvino is from the same run of diffusers."""

    combination: Combination
    steps: int
    #: || ours - theirs || / || theirs || of the final latents.
    error: float
    #: Of the 8-bit pictures, in dB.
    psnr: float

    @property
    def passed(self) -> bool:
        """Return whether both limits hold."""
        return self.error <= MAX_ERROR and self.psnr >= MIN_PSNR


class Oracle:
    """The two pipelines, loaded once."""

    def __init__(self, source: Path, converted: Path) -> None:
        from diffusers import StableDiffusionPipeline as DiffusersPipeline

        self._theirs: Any = DiffusersPipeline.from_pretrained(source, torch_dtype=torch.float32)
        self._theirs.set_progress_bar_config(disable=True)
        self._config = dict(self._theirs.scheduler.config)
        settings = RunSettings(default=DeviceSettings(precision="f32"))
        self._ours = StableDiffusionPipeline.from_pretrained(converted, settings=settings)

    def compare(self, combination: Combination, steps: int) -> Case:
        """Run one case through both."""
        arguments: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale(combination),
        }
        self._theirs.scheduler = oracle_scheduler(
            self._config,
            combination.sampler,
            combination.timestep_spacing,
            combination.sigma_schedule,
        )
        generator = torch.Generator("cpu").manual_seed(SEED)
        theirs: Any = self._theirs(PROMPT, generator=generator, output_type="latent", **arguments)
        expected = theirs.images.numpy()
        ours = self._ours(
            PROMPT,
            seed=SEED,
            scheduler=combination.sampler,
            timestep_spacing=combination.timestep_spacing,
            sigma_schedule=combination.sigma_schedule,
            output_type="latent",
            **arguments,
        ).images
        return Case(
            combination=combination,
            steps=steps,
            error=float(np.linalg.norm(ours - expected) / np.linalg.norm(expected)),
            psnr=psnr(self._ours.decode(ours), self._decode_theirs(expected)),
        )

    def _decode_theirs(self, latents: Any) -> Any:
        vae = self._theirs.vae
        with torch.no_grad():
            picture = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
        unit = (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (unit * 255).round().astype(np.uint8)


def guidance_scale(combination: Combination) -> float:
    """Return the guidance that both pipelines run a combination with."""
    return DISTILLED_GUIDANCE_SCALE if combination.sampler in DISTILLED else GUIDANCE_SCALE


def psnr(a: Any, b: Any) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit pictures in dB; equal ones give 99."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * float(np.log10(255**2 / error)))


def cases(
    oracle: Oracle, steps: Sequence[int] = STEPS, combinations: Sequence[Combination] = COMBINATIONS
) -> Iterator[Case]:
    """Yield every case in turn."""
    for combination in combinations:
        for count in steps:
            yield oracle.compare(combination, count)


def table(results: Sequence[Case]) -> str:
    """Return the results as a Markdown table, a line for each sampler and grid."""
    steps = sorted({case.steps for case in results})
    heads = [f"{count} steps" for count in steps]
    lines = [
        "| sampler | spacing | sigmas | " + " | ".join(heads) + " |",
        "|---|---|---|" + "---|" * len(heads),
    ]
    rows: dict[Combination, dict[int, Case]] = {}
    for case in results:
        rows.setdefault(case.combination, {})[case.steps] = case
    for combination, by_steps in rows.items():
        cells = [
            f"{case.error:.1e}, {case.psnr:.0f} dB{'' if case.passed else ' MISSED'}"
            for case in (by_steps[count] for count in steps)
        ]
        names = [
            combination.sampler,
            combination.timestep_spacing,
            combination.sigma_schedule,
        ]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table of all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", type=Path, default=SOURCE, help="a diffusers folder")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    options = parser.parse_args()

    from sdvino.convert.api import convert

    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "fp16"
        convert(options.source, converted, recipe="fp16")
        oracle = Oracle(options.source, converted)
        total = len(COMBINATIONS) * len(options.steps)
        results = list(tqdm(cases(oracle, options.steps), total=total, desc="oracle"))
    print(table(results))
    missed = [case for case in results if not case.passed]
    worst = max(results, key=lambda case: case.error)
    print(
        f"\n{len(results) - len(missed)} of {len(results)} cases within {MAX_ERROR:g} and"
        f" {MIN_PSNR:g} dB; the largest error is {worst.error:.1e} ({worst.combination},"
        f" {worst.steps} steps)."
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
