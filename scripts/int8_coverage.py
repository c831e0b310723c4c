"""What runs in 8 bits: python scripts/int8_coverage.py FOLDER [--size 512] [--layers]

Compiles each component of a converted folder for the CPU, at the static shapes that sdvino gives
it, and prints by component the multiply-adds that the IR plans in 8 bits and those that OpenVINO's
kernels really do in 8 bits. Required: 95 % of the UNet's and 90 % of the VAE decoder's, without
attention's own products (activations by activations) and the named exceptions: the fragile layers
(sdvino/compress/fragile.py) and the sources of residuals (sdvino/compress/layers.py). Exit status
1 when it is less. Text encoders are not quantized by design and are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openvino as ov
from graph_coverage import Coverage, fix_shapes, measure

from sdvino.errors import RequestError, SdvinoError
from sdvino.folder.index import ModelFolder

COMPONENTS = ("unet", "vae_decoder", "vae_encoder", "tiny_vae")
_COLUMNS = (
    ("component", 12),
    ("MMACs", 10),
    ("attention", 10),
    ("fragile", 9),
    ("residual", 9),
    ("planned", 9),
    ("runs", 9),
    ("required", 9),
    ("", 5),
)


def measure_folder(folder: ModelFolder, size: int | None = None) -> Iterator[Coverage]:
    """Yield the coverage of each component; ``size`` is the picture's side, or the model's own."""
    side = folder.height if size is None else size
    scale = folder.vae_scale_factor
    if side < scale or side % scale:
        raise RequestError(f"The size is {side}; give a multiple of {scale}.")
    for name in COMPONENTS:
        if name in folder.components:
            model = ov.Core().read_model(folder.components[name].xml)
            fix_shapes(folder, name, model, side // scale, side // scale)
            yield measure(name, model)


def row(coverage: Coverage) -> str:
    """Return the line of one component. Shares are of what is left without the exceptions."""
    total = coverage.sum("", "attention", "fragile", "residual")
    required = "" if coverage.required is None else f"{coverage.required:.0%}"
    verdict = "" if coverage.required is None else "ok" if coverage.enough else "LESS"
    values = (
        coverage.component,
        f"{total / 1e6:,.1f}",
        *(f"{coverage.sum(x) / total:.1%}" for x in ("attention", "fragile", "residual")),
        f"{coverage.planned_share:.1%}",
        f"{coverage.running_share:.1%}",
        required,
        verdict,
    )
    return _line(values)


def _line(values: tuple[str, ...]) -> str:
    pairs = zip(values, _COLUMNS, strict=True)
    return "".join(
        f"{value:<{width}}" if i == 0 else f"{value:>{width}}"
        for i, (value, (_, width)) in enumerate(pairs)
    ).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 when less runs in 8 bits than required."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, help="the picture's side in pixels")
    parser.add_argument("--layers", action="store_true", help="name what runs in float")
    options = parser.parse_args(arguments)
    status = 0
    try:
        folder = ModelFolder.open(options.folder)
        print(_line(tuple(title for title, _ in _COLUMNS)))
        for coverage in measure_folder(folder, options.size):
            print(row(coverage), flush=True)
            status = max(status, 0 if coverage.enough else 1)
            if options.layers:
                for layer in coverage.left_in_float:
                    why = "planned in 8 bits" if layer.planned else "planned in float"
                    print(f"  {layer.multiply_adds / 1e6:10.1f}  {layer.name}  ({why})")
                for name in coverage.unknown:
                    print(f"  a kernel of no layer that is known: {name}")
    except SdvinoError as error:
        print(f"int8_coverage: {error}", file=sys.stderr)
        return error.exit_code
    return status


if __name__ == "__main__":
    raise SystemExit(main())
