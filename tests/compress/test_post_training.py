"""Quantizing on statistics gives what NNCF gives that runs the model on the samples itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest

from sdvino.compress import quantization
from sdvino.compress.bias_correction import constant_value
from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.quantization import measure, quantize
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import get_recipe
from sdvino.compress.stepwise import Sample
from sdvino.compress.targets import Target, get_target
from sdvino.errors import SdvinoError
from sdvino.graph.walk import is_constant
from tests.compress import nets

RECIPE = replace(get_recipe("int8").component("unet"), float_layers=("conv_in/", "conv_out/"))
RESIDUAL = ComponentRecipe(mode="int8", float_residual_sources=True)


def named(model: ov.Model) -> ov.Model:
    """The same model, whose clones have the same names."""
    for operation in model.get_ops():
        operation.set_friendly_name(operation.get_friendly_name())
    return model


def by_nncf(
    model: ov.Model, samples: Sequence[Sample], recipe: ComponentRecipe, target: Target
) -> ov.Model:
    """What nncf.quantize makes of ``model``, with the same choices."""
    ignored = quantization._ignored(recipe, "unet", model, target)
    options = quantization._options(recipe, target, recipe.smooth_quant_alpha)
    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(list(samples)),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=list(dict.fromkeys(ignored))),
            **options,
        )


def ranges(model: ov.Model) -> dict[str, list[float]]:
    """The ends of what every FakeQuantize takes, by its name."""
    return {
        op.get_friendly_name(): [
            float(constant_value(op.input_value(port)).item()) for port in range(1, 5)
        ]
        for op in model.get_ops()
        if op.get_type_name() == "FakeQuantize"
    }


def weights(model: ov.Model) -> dict[str, Any]:
    """The weights of every product, by its name."""
    return {
        op.get_friendly_name(): constant_value(value)
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul")
        for value in op.input_values()
        if is_constant(value)
    }


@pytest.mark.parametrize("target", ["avx2", "avx2-vnni", "gpu"])
@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (nets.attention_network, RECIPE),
        (nets.attention_network, replace(RECIPE, smooth_quant_alpha=None)),
        (nets.residual_network, RESIDUAL),
    ],
)
def test_ranges_and_weights_are_nncf_s(
    make: Callable[[], ov.Model], recipe: ComponentRecipe, target: str
) -> None:
    model, samples = named(make()), nets.samples()
    theirs = by_nncf(model.clone(), samples, recipe, get_target(target))
    ours = quantize("unet", model.clone(), samples, recipe=recipe, target=get_target(target))
    assert ranges(ours).keys() == ranges(theirs).keys()
    assert len(ranges(ours)) >= 2
    for name, ends in ranges(theirs).items():
        np.testing.assert_allclose(ranges(ours)[name], ends, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, matrix in weights(theirs).items():
        step = np.abs(matrix).max() / 60  # one level, where a weight lies between two
        difference = np.abs(weights(ours)[name] - matrix)
        assert difference.max() <= step, name
        assert np.count_nonzero(difference > 1e-5) <= matrix.size // 100, name


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    model = named(nets.residual_network())
    known = measure(model, nets.samples(), tmp_path / "other.bin")
    with pytest.raises(SdvinoError, match=r"no statistics of what.*convert again"):
        quantize(
            "unet",
            named(nets.attention_network()),
            known,
            recipe=RECIPE,
            target=get_target("avx512-vnni"),
        )
