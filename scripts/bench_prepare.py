"""The folders that bench_peers.py measures: made once below a work folder, and then reused.

    WORK/sd15/source               random weights in the real architecture (make_synthetic.py)
    WORK/sd15/sdvino-avx512-vnni   sdvino convert --recipe int8, for one instruction set
    WORK/sd15/weights8             optimum-intel's export with 8-bit weights
    WORK/sdxl/weights8-by-sdvino   the same by sdvino, where that export takes too much memory
    WORK/sd15/hybrid, .../full     optimum-intel's hybrid quantization, and of the whole UNet

Speed does not depend on what the weights are, nor on what was calibrated on: two samples do. A
folder is made under another name and renamed, so that what is there is whole.
`python scripts/bench_prepare.py FORMAT SOURCE OUT` makes one of optimum-intel's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(__file__).resolve().parent
#: Who makes the peers' 8-bit weights.
Exporter = Literal["optimum-intel", "sdvino"]
CALIBRATION_STEPS = 2
TINY_VAE: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}


class PrepareError(Exception):
    """A folder could not be made; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Where folders are made, and for what."""

    root: Path
    #: Instruction set that sdvino's folders are made for, as `sdvino convert --target` names it.
    isa: str
    #: Diffusers folders that are there already, by architecture; read only.
    sources: Mapping[str, Path] = field(default_factory=dict)
    exporter: Exporter = "optimum-intel"

    def made_by_sdvino(self, format_: str) -> bool:
        """Return whether sdvino converts to a format here."""
        return format_ == "sdvino" or (format_ == "weights8" and self.exporter == "sdvino")

    def folder(self, arch: str, format_: str) -> Path:
        """Return where a folder is, or will be."""
        if format_ == "source" and arch in self.sources:
            return self.sources[arch]
        if format_ == "sdvino":
            return self.root / arch / f"sdvino-{self.isa}"
        by = "-by-sdvino" if self.made_by_sdvino(format_) else ""
        return self.root / arch / f"{format_}{by}"


def missing(shop: Workshop, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs of architecture and format that are not there yet, sources first.

    A source that nobody measures is needed only while something has yet to be made of it.
    """
    absent = [pair for pair in dict.fromkeys(wanted) if not shop.folder(*pair).is_dir()]
    archs = dict.fromkeys(arch for arch, _ in absent)
    sources = [(arch, "source") for arch in archs if not shop.folder(arch, "source").is_dir()]
    return list(dict.fromkeys([*sources, *absent]))


def recipe_text(recipe: str) -> str:
    """Return a recipe in TOML, calibrated on next to nothing."""
    head, mark, _ = recipe.partition("[calibration]\n")
    if not mark:
        raise PrepareError("The recipe int8 has no [calibration]; this script has to follow it.")
    return f"{head}{mark}trajectories = 1\nstrata = 1\nsamples = 2\nseed = 0\n"


def make_commands(shop: Workshop, arch: str, format_: str, out: Path) -> list[list[str]]:
    """Return the commands that make a folder at ``out``, one after the other."""
    source = str(shop.folder(arch, "source"))
    python = sys.executable
    part = [python, str(SCRIPTS / "bench_prepare.py")]
    if format_ == "source":
        return [[python, str(SCRIPTS / "make_synthetic.py"), "--arch", arch, str(out)]]
    if not shop.made_by_sdvino(format_):
        return [[*part, format_, source, str(out)]]
    convert = [python, "-m", "sdvino", "convert", source, str(out), "--no-gate"]
    if format_ == "weights8":
        return [[*convert, "--recipe", "int8-weights"]]
    tiny, recipe = str(shop.root / "tiny-vae"), str(shop.root / "int8-quick.toml")
    return [
        [*part, "recipe", source, recipe],
        [*part, "tiny-vae", source, tiny],
        [*convert, "--recipe", recipe, "--target", shop.isa, "--tiny-vae", tiny],
    ]


def prepare(shop: Workshop, arch: str, format_: str) -> Path:
    """Make one folder, unless it is there; raises PrepareError with the last words of what failed.

    What an interruption leaves is made again; sdvino's conversion goes on by itself.
    """
    folder = shop.folder(arch, format_)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    resumes = shop.made_by_sdvino(format_)
    out = folder if resumes else folder.with_name(folder.name + ".part")
    if not resumes:
        shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    for command in make_commands(shop, arch, format_, out):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
            how = _ended(done.returncode)
            raise PrepareError(f"{arch} as {format_} could not be made ({how}).\n{last}")
    if not resumes:
        out.rename(folder)
    return folder


def _ended(status: int) -> str:
    # Linux kills what takes the last of the memory, and nobody says a word.
    return "killed, perhaps for want of memory" if status == -9 else f"status {status}"


def export_weights8(source: Path, out: Path) -> None:
    """Export by optimum-intel's own command, as its users do, and see that it compressed."""
    words = ["export", "openvino", "--model", str(source), "--task", "text-to-image"]
    words += ["--library", "diffusers", "--weight-format", "int8", str(out)]
    program = "from optimum.commands.optimum_cli import main; main()"
    subprocess.run([sys.executable, "-c", program, *words], check=True)
    weights = sum(file.stat().st_size for file in (source / "unet").glob("*.safetensors"))
    made = (out / "unet" / "openvino_model.bin").stat().st_size
    if made > 0.7 * weights:
        raise SystemExit(f"optimum-cli left the UNet in {made / 1e9:.2f} GB: not in 8 bits.")


def quantize(source: Path, out: Path, kind: str) -> None:
    """Export in float and quantize: ``kind`` is "hybrid" or "full" (the whole UNet in 8 bits)."""
    import nncf
    from optimum.exporters.openvino import main_export
    from optimum.intel import (
        OVConfig,
        OVDiffusionPipeline,
        OVQuantizationConfig,
        OVQuantizer,
        OVWeightQuantizationConfig,
    )
    from optimum.intel.openvino.quantization import InferRequestWrapper, OVCalibrationDataset

    exported = out.with_name(out.name + "-float")
    shutil.rmtree(exported, ignore_errors=True)
    _export(main_export, source, exported, OVConfig(dtype="fp16"))
    pipe = OVDiffusionPipeline.from_pretrained(str(exported))
    samples: list[Any] = []
    request = pipe.unet.request
    pipe.unet.request = InferRequestWrapper(request, samples)
    pipe("a lake", num_inference_steps=CALIBRATION_STEPS, output_type="latent")
    pipe.unet.request = request
    pipe.clear_requests()
    if kind == "hybrid":
        config = OVWeightQuantizationConfig(bits=8, quant_method="hybrid", num_samples=len(samples))
    else:
        config = OVQuantizationConfig(bits=8, num_samples=len(samples))
    OVQuantizer(pipe).quantize(
        calibration_dataset=OVCalibrationDataset({"unet": nncf.Dataset(samples)}),
        ov_config=OVConfig(quantization_config=config),
        save_directory=str(out),
    )
    # Only the IRs of what was quantized are sure to be written: the rest is as exported.
    for file in exported.rglob("*"):
        target = out / file.relative_to(exported)
        if file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    shutil.rmtree(exported)


def _export(main_export: Any, source: Path, out: Path, config: Any) -> None:
    main_export(
        str(source),
        output=out,  # a text fails at the tokenizers
        task="text-to-image",
        library_name="diffusers",
        ov_config=config,
        convert_tokenizer=True,  # for OpenVINO GenAI
    )


def write_recipe(path: Path) -> None:
    """Write sdvino's int8 recipe, calibrated on next to nothing."""
    from sdvino.compress.recipe_file import to_toml
    from sdvino.compress.recipes import get_recipe

    path.write_text(recipe_text(to_toml(get_recipe("int8"))), encoding="utf-8")


def make_tiny_vae(out: Path) -> None:
    """Write a tiny autoencoder (TAESD's architecture) with random weights, unless it is there."""
    import torch
    from make_synthetic import write_component

    if not out.is_dir():
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        generator = torch.Generator().manual_seed(0)
        write_component(part, "diffusers", "AutoencoderTiny", TINY_VAE, generator)
        part.rename(out)


def main() -> int:
    """Make one part: FORMAT SOURCE OUT."""
    kind, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind == "recipe":
        write_recipe(out)
    elif kind == "tiny-vae":
        make_tiny_vae(out)
    elif kind == "weights8":
        export_weights8(source, out)
    else:
        quantize(source, out, kind)
    print(json.dumps({"made": out.name}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
