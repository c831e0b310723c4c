"""One pass over one component: done, measured and written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdvino.compress.passes import Context, SourcePass
from sdvino.compress.prompts import evenly
from sdvino.compress.quiet import quiet
from sdvino.convert.source_passes import HISTORY_FILE
from sdvino.errors import RequestError
from sdvino.nets.structure import Structure
from sdvino.train.calls import operations, outputs_of, relative_error
from sdvino.train.modules import save_component

# Calls that the change of the output is measured on.
_SAMPLES = 4


def apply_pass(
    row: SourcePass,
    module: Any,
    structure: Structure,
    config: Mapping[str, Any],
    around: Context,
    output: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Do ``row`` to ``module``, changed in place, and write the component and its figures.

    ``output``/COMPONENT takes what `sdvino.train.modules.load_component` loads,
    ``output``/history.json what is returned: the row, weights and operations before and after,
    and how far the output moved on the inputs of ``around``, where there are any.
    Raises RequestError when the row does not fit the component.
    """
    samples = evenly(around.inputs, _SAMPLES)
    before = _figures(row.component, module, config, structure)
    references = outputs_of(module, samples)
    try:
        found = row.run(module, structure, around, lambda share: progress(0.05 + 0.85 * share))
    except RequestError as error:
        raise RequestError(f"{row.what} of {row.component}: {error}") from error
    after = _figures(row.component, found.module, config, found.structure)
    moved = relative_error(outputs_of(found.module, samples), references) if samples else None
    save_component(found.module, output / row.component, config=config, structure=found.structure)
    history = {
        "kind": row.kind,
        "component": row.component,
        "what": row.what,
        "settings": row.told(),
        "before": before,
        "after": after,
        "output_error": None if moved is None else round(moved, 5),
        "figures": found.figures,
    }
    (output / HISTORY_FILE).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    return history


def _figures(
    component: str, module: Any, config: Mapping[str, Any], structure: Structure
) -> dict[str, int]:
    """Return weights, those that are not zero, and operations of one call at its own size."""
    parameters = list(module.parameters())
    with quiet():
        counts = operations(component, config, structure)
    return {
        "parameters": sum(one.numel() for one in parameters),
        "nonzero": sum(int(one.count_nonzero()) for one in parameters),
        "operations": sum(counts.values()),
    }
