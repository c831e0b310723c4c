"""One scheme against a choice for each layer, at the same bytes.

    python scripts/compare_quantization.py FOLDER [--component unet] [--groups N] [--table]

FOLDER is a converted folder in half precision (sdvino convert SOURCE FOLDER --recipe fp16). A
component is quantized globally (8 bits, one symmetric scale for a tensor), then locally into the
same bytes, and both are compared with the float component on inputs of other prompts and seeds:
once with weights alone, once with activations in 8 bits too. --budgets adds what local quantization
loses in other sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from equal_bytes import compare_at_equal_bytes
from measure_choices import error, inputs

from sdvino.compress.local_quantization import apply_plan, measure, plan_local
from sdvino.compress.local_report import table_lines
from sdvino.compress.prompts import GENERAL_PROMPTS
from sdvino.compress.sensitivity import run_model
from sdvino.compress.targets import get_target
from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.graph.saving import read_ir
from sdvino.inputs.files import read_prompts


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--component", default="unet")
    parser.add_argument("--prompts", type=Path, help="a file; default: a general list")
    parser.add_argument("--samples", type=int, default=64, help="inputs to calibrate on")
    parser.add_argument("--groups", type=int, help="groups of layers to measure; default: by size")
    parser.add_argument("--budgets", default="0.3,0.4,0.5", help="shares of half precision")
    parser.add_argument("--target", default="auto", help="as of sdvino convert")
    parser.add_argument("--table", action="store_true", help="print every layer's choice")
    options = parser.parse_args(arguments)
    try:
        _compare(options)
    except SdvinoError as problem:
        print(f"compare_quantization: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def _compare(options: argparse.Namespace) -> None:
    folder, name = ModelFolder.open(options.folder), options.component
    texts = GENERAL_PROMPTS if options.prompts is None else read_prompts(options.prompts)
    given = inputs(folder, texts[::2], options.samples, seed=0).of(name)
    unseen = inputs(folder, texts[1::2], options.samples // 2, seed=1).of(name)
    xml, target = folder.components[name].xml, get_target(options.target)
    effects = measure(read_ir(xml), given, groups=options.groups)
    print(f"{name}, {len(given)} inputs, {len(unseen)} unseen, made for {target.name}")
    for activations in (False, True):
        found = compare_at_equal_bytes(
            name, xml, given, unseen, activations=activations, effects=effects, target=target
        )
        print(found, flush=True)
        for words, count in Counter(
            "half precision" if choice.taken.coding is None else str(choice.taken.coding)
            for choice in found.plan.layers
        ).most_common():
            print(f"  {count:4} layers: {words}")
    expected = run_model(read_ir(xml), unseen)
    for budget in map(float, options.budgets.split(",")):
        model = read_ir(xml)
        plan = plan_local(name, model, budget=budget, effects=effects)
        lost = error(run_model(apply_plan(model, plan), unseen), expected)
        print(f"budget {budget:g}: {plan.bytes / 1e6:.2f} MB, error {lost:.2%}", flush=True)
        if options.table:
            print("\n".join(table_lines(plan.to_dict())))


if __name__ == "__main__":
    raise SystemExit(main())
