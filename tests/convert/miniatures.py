"""Every family in miniature by every recipe: exported and compressed here, in this process.

`convert` does the same in processes of its own, whose imports take longer than this work. The
autoencoders are one and the same, and so exported and compressed once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_synthetic
import openvino as ov
from synthetic_architectures import ARCHITECTURES

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan
from sdvino.compress.folder import calibrate, compress_component
from sdvino.compress.recipes import get_recipe
from sdvino.compress.targets import get_target
from sdvino.convert.export import export_component
from sdvino.convert.metadata import write_component_config, write_metadata
from sdvino.convert.source import DiffusersFolder

#: The one whose autoencoder all have.
BASE = "tiny-sd15"
#: As in GenAI, optimum-intel and here the same; LCM has its own.
DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PROMPTS = ("a red circle", "a green star above a blue ring")


class Miniatures:
    """Makes folders below ``base``, each when it is first asked for."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._inputs: dict[str, CalibrationInputs] = {}

    def source(self, arch: str) -> Path:
        """Return the diffusers folder of ``arch``, an architecture of make_synthetic.py."""
        folder = self._base / arch / "source"
        if not folder.is_dir():
            make_synthetic.make(arch, folder)
            if arch != BASE:
                name = "vae/diffusion_pytorch_model.safetensors"
                shutil.copyfile(self.source(BASE) / name, folder / name)
            if not arch.endswith("lcm"):
                prediction = ARCHITECTURES[arch]["scheduler"].get("prediction_type", "epsilon")
                config = {**DDIM, "prediction_type": prediction}
                text = json.dumps(config)
                (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
        return folder

    def exported(self, arch: str) -> Path:
        """Return the float folder of ``arch``, without a manifest."""
        folder = self._base / arch / "float"
        if not folder.is_dir():
            source = DiffusersFolder.open(self.source(arch))
            write_metadata(source, folder)
            for part in source.components:
                if part.startswith("vae") and arch != BASE:
                    shutil.copytree(self.exported(BASE) / part, folder / part)
                else:
                    export_component(source, part, folder / part)
                write_component_config(source, part, folder / part)
        return folder

    def inputs(self, arch: str) -> CalibrationInputs:
        """Return what `folder` calibrates on: a few inputs are enough for random weights."""
        if arch not in self._inputs:
            lcm = arch.endswith("lcm")
            plan = CalibrationPlan(
                prompts=PROMPTS,
                strata=2,
                few_steps=(4, 2) if lcm else (),
                sampler="lcm" if lcm else "euler",
                unet_samples=8,
                guidance_scale=5.0,
                embedded_guidance=lcm,
                shape=(4, 16, 16),
            )
            self._inputs[arch] = calibrate(self.exported(arch), plan)
        return self._inputs[arch]

    def folder(self, arch: str, recipe: str) -> Path:
        """Return the folder of ``arch`` as ``recipe`` stores it, without a manifest."""
        exported = self.exported(arch)
        if recipe == "fp16":
            return exported
        folder = self._base / arch / recipe
        if not folder.is_dir():
            shutil.copytree(exported, folder)
            for part in sorted(path.parent.name for path in exported.glob("*/openvino_model.xml")):
                if part.startswith("vae") and arch != BASE:
                    for file in (self.folder(BASE, recipe) / part).glob("openvino_model.*"):
                        shutil.copyfile(file, folder / part / file.name)
                else:
                    self._compress(arch, recipe, part, folder)
        return folder

    def _compress(self, arch: str, recipe: str, part: str, folder: Path) -> None:
        how = get_recipe(recipe).component(part)
        if how.mode == "local":  # each layer by itself would be compiled 200 times
            how = replace(how, measured_groups=12)
        model = ov.Core().read_model(self.exported(arch) / part / "openvino_model.xml")
        samples: list[Any] = self.inputs(arch).of(part) if how.calibrated else []
        model = compress_component(part, model, how, samples, get_target("avx2"))
        ov.save_model(model, folder / part / "openvino_model.xml", compress_to_fp16=True)
