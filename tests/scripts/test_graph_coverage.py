from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import int8_coverage
import openvino as ov
import pytest
from graph_coverage import Coverage, Layer, measure, planned_layers

from sdvino.compress.folder import compress_component
from sdvino.compress.recipes import get_recipe
from sdvino.compress.targets import get_target
from sdvino.graph.walk import reshape_static
from tests.compress import nets

TOKENS = nets.SIDE**2
CONVOLUTION = TOKENS * nets.CHANNELS**2 * 9
LINEAR = TOKENS * nets.CHANNELS * 64


def static(model: ov.Model) -> ov.Model:
    reshape_static(model, {"sample": [1, nets.CHANNELS, nets.SIDE, nets.SIDE]})
    return model


def test_multiply_adds_are_counted_by_kind() -> None:
    layers = planned_layers("unet", static(nets.attention_network()))
    counted = {layer.name.split("/")[0].removeprefix("__module."): layer for layer in layers}
    assert counted["conv_in"].multiply_adds == CONVOLUTION
    assert counted["attn1.to_q"].multiply_adds == LINEAR
    assert counted["attn1.to_out.0"].multiply_adds == LINEAR
    assert counted["attn1"].multiply_adds == 2 * TOKENS * TOKENS * 64
    assert counted["attn1"].exception == "attention"
    assert counted["conv_in"].exception == counted["conv_out"].exception == "fragile"
    assert not any(layer.planned for layer in layers)


@pytest.mark.slow
def test_what_is_planned_runs() -> None:
    recipe = replace(get_recipe("int8").component("unet"), float_layers=("conv_in/", "conv_out/"))
    model = compress_component(
        "unet", nets.attention_network(), recipe, nets.samples(), get_target("avx2")
    )
    coverage = measure("unet", static(model))
    assert coverage.planned_share == coverage.running_share == 1.0
    assert coverage.sum("") == CONVOLUTION + 4 * LINEAR
    assert coverage.enough
    assert not coverage.left_in_float
    assert not coverage.unknown


def test_float_graphs_run_in_float() -> None:
    coverage = measure("unet", static(nets.attention_network()))
    assert coverage.planned_share == coverage.running_share == 0.0
    assert not coverage.enough
    assert len(coverage.left_in_float) == 5
    assert not coverage.unknown


def layer(name: str, multiply_adds: int, exception: str = "", planned: bool = True) -> Layer:
    return Layer(name=name, multiply_adds=multiply_adds, exception=exception, planned=planned)


def test_shares_leave_the_exceptions_out() -> None:
    layers = (layer("a", 90), layer("b", 6), layer("c", 4, planned=False), layer("d", 900, "x"))
    coverage = Coverage(component="unet", layers=layers, running=frozenset({"a", "d"}))
    assert coverage.planned_share == 0.96
    assert coverage.running_share == 0.90
    assert not coverage.enough
    assert [entry.name for entry in coverage.left_in_float] == ["b", "c"]
    assert replace(coverage, component="vae_decoder").enough
    assert replace(coverage, component="tiny_vae").required is None
    odd = replace(coverage, component="vae_decoder", unknown=("?",))
    assert not odd.enough


@pytest.mark.slow
def test_the_demo_runs_as_much_in_int8_as_required(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert int8_coverage.main([str(shapes)]) == 0
    said = capsys.readouterr().out
    assert "unet" in said
    assert "LESS" not in said


def test_the_command_names_what_is_wrong(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert int8_coverage.main([str(tmp_path)]) == 2
    assert int8_coverage.main([str(shapes), "--size", "100"]) == 2
    assert "Traceback" not in capsys.readouterr().err
