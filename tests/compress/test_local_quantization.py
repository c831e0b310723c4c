from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.folder import compress_component
from sdvino.compress.fragile import is_fragile
from sdvino.compress.local_plan import (
    Candidate,
    LayerFacts,
    LocalPlan,
    budget_bytes,
    choose,
    codings,
    effects_of,
)
from sdvino.compress.local_quantization import plan_local, quantize_local
from sdvino.compress.local_report import HEAT_MAP_FILE, read_tables, write_plan
from sdvino.compress.targets import get_target
from sdvino.compress.weight_coding import Coding, Distribution
from sdvino.compress.weight_graph import (
    WeightLayer,
    put_encoded,
    read_weights,
    weight_bytes,
    weight_layers,
)
from sdvino.errors import RequestError
from sdvino.graph.walk import by_name
from tests.compress import nets

SAMPLES = nets.samples()
VNNI = get_target("avx512-vnni")
LOCAL = ComponentRecipe(mode="local", budget=0.4)
LINEAR = WeightLayer("linear", "MatMul", (64, 256), (0,))
FLAT = Distribution(outliers=0.0, kurtosis=0.0, spread=1.0)
HEAVY = Distribution(outliers=0.01, kurtosis=9.0, spread=4.0)


def compiled_weights(model: ov.Model) -> dict[str, str]:
    """Kernel -> type of the weights that it reads, in the compiled model."""
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    runtime = ov.Core().compile_model(model, "CPU", properties).get_runtime_model()
    found = {}
    for op in runtime.get_ordered_ops():
        kind = op.get_rt_info()["layerType"].astype(str)
        if kind in ("FullyConnected", "Convolution", "Gather", "Deconvolution"):
            port = 0 if kind == "Gather" else 1
            found[op.get_friendly_name()] = op.input(port).get_element_type().get_type_name()
    return found


def network(*, transposed: bool = True) -> ov.Model:
    """An embedding, a linear, convolutions of every kind."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return ops.constant(rng.standard_normal(shape, dtype=np.float32))

    ids = ops.parameter([1, 16], ov.Type.i64, name="ids")
    ids.output(0).get_tensor().set_names({"ids"})
    x = ops.gather(weights(40, 64), ids, ops.constant(np.int64(0)))
    x.set_friendly_name("embedding")
    x = ops.matmul(x, weights(64, 64), False, transposed)
    x.set_friendly_name("linear")
    x = ops.reshape(x, np.array([1, 64, 4, 4]), False)
    one = [1, 1]
    x = ops.convolution(x, weights(32, 64, 3, 3), one, one, one, one)
    x.set_friendly_name("convolution")
    x = ops.group_convolution(x, weights(4, 8, 8, 1, 1), one, [0, 0], [0, 0], one)
    x.set_friendly_name("grouped")
    x = ops.convolution_backprop_data(x, weights(32, 8, 2, 2), [2, 2])
    x.set_friendly_name("deconvolution")
    return ov.Model([x], [ids], "everything")


IDS = {"ids": np.arange(16, dtype=np.int64)[None] * 2}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "coding",
    [
        Coding(bits=8, granularity="tensor", symmetric=True),
        Coding(bits=8, granularity="channel"),
        Coding(bits=4, granularity="channel", estimator="mse"),
        Coding(bits=4, granularity="group", group_size=32),
        Coding(bits=4, granularity="group", group_size=32, symmetric=True),
        Coding(bits=8, granularity="group", group_size=64),
    ],
    ids=str,
)
def test_every_kind_of_layer_computes_with_what_was_written(
    coding: Coding, transposed: bool, tmp_path: Path
) -> None:
    model, plain = network(transposed=transposed), network(transposed=transposed)
    layers = weight_layers(model)
    assert [layer.name for layer in layers] == [
        "embedding",
        "linear",
        "convolution",
        "grouped",
        "deconvolution",
    ]
    nodes, expected_bytes = by_name(model), weight_bytes(model)
    for layer in layers:
        if layer.takes(coding):
            before = read_weights(nodes[layer.name], layer)
            put_encoded(nodes[layer.name], layer, coding)
            expected_bytes += coding.bytes(layer.rows, layer.width) - 2 * before.size
    model.validate_nodes_and_infer_types()
    # 16 for each small shape constant that groups need.
    assert weight_bytes(model) - expected_bytes in range(5 * 5 * 8)
    expected = run(plain)
    limit = 0.3 if coding.bits == 4 else 0.06
    assert np.linalg.norm(run(model) - expected) < limit * np.linalg.norm(expected)
    ov.save_model(model, tmp_path / "m.xml", compress_to_fp16=True)
    saved = ov.Core().read_model(tmp_path / "m.xml")
    np.testing.assert_allclose(run(saved), run(model), rtol=1e-2, atol=1e-2 * expected.std())


def run(model: ov.Model) -> Any:
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return np.array(ov.Core().compile_model(model, "CPU", properties)(IDS)[0])


@pytest.mark.parametrize(
    ("coding", "stored"),
    [
        (Coding(bits=4, granularity="group", group_size=32), "u4"),
        (Coding(bits=8, granularity="channel"), "u8"),
        (Coding(bits=8, granularity="tensor", symmetric=True), "i8"),
    ],
    ids=str,
)
def test_the_plugin_keeps_linears_and_embeddings_small(coding: Coding, stored: str) -> None:
    model = network()
    nodes = by_name(model)
    for layer in weight_layers(model):
        if layer.takes(coding):
            put_encoded(nodes[layer.name], layer, coding)
    model.validate_nodes_and_infer_types()
    kinds = compiled_weights(model)
    assert kinds["linear"] == stored
    # Convolutions are expanded when the model is compiled.
    assert kinds["convolution"] == "f32"


def facts(name: str, error: float, effect: float) -> LayerFacts:
    layer = replace(LINEAR, name=name)
    coding = Coding(bits=4, granularity="channel")
    eight = Coding(bits=8, granularity="channel")
    return LayerFacts(
        layer=layer,
        distribution=FLAT,
        candidates=(
            Candidate(coding=coding, bytes=coding.bytes(64, 256), error=error),
            Candidate(coding=eight, bytes=eight.bytes(64, 256), error=error / 256),
            Candidate(coding=None, bytes=2 * layer.size, error=0.0),
        ),
        effect=effect,
    )


def bits_of(plan: LocalPlan) -> list[int]:
    codings = [choice.taken.coding for choice in plan.layers]
    return [16 if coding is None else coding.bits for coding in codings]


def test_what_hurts_the_output_gets_the_bits() -> None:
    plan = choose("unet", [facts("a", 0.01, 9.0), facts("b", 0.01, 0.1)], 0.40)
    assert bits_of(plan) == [8, 4]
    assert plan.bytes <= plan.budget
    assert bits_of(choose("unet", [facts("a", 0.01, 0.1), facts("b", 0.01, 9.0)], 0.4)) == [4, 8]
    assert bits_of(choose("unet", [facts("a", 0.09, 1.0), facts("b", 0.01, 1.0)], 0.4)) == [8, 4]
    assert bits_of(choose("unet", [facts("a", 0.01, 1.0)], 1.0)) == [16]


def test_budgets_are_shares_or_bytes() -> None:
    both = [facts("a", 0.01, 1.0), facts("b", 0.01, 1.0)]
    assert budget_bytes(0.5, both, 100) == 100 + 64 * 256 * 2
    assert budget_bytes(5000, both, 100) == 5000
    for budget, said in ((0.2, r"0\.2, and the least .* 0\.2\d"), (9000.0, r"9000, .* 16\d\d\d")):
        with pytest.raises(RequestError, match=said) as caught:
            choose("unet", both, budget)
    # What it says is enough.
    needed = float(str(caught.value).split(" can take is ")[1].split(";")[0])
    assert choose("unet", both, needed).bytes <= needed


def test_candidates_follow_the_distribution() -> None:
    flat = codings(LINEAR, FLAT, bits=4)
    heavy = codings(LINEAR, HEAVY, bits=4)
    assert {coding.estimator for coding in flat if coding.bits == 8} == {"min-max"}
    assert {coding.estimator for coding in heavy if coding.bits == 8} == {
        "min-max",
        "percentile",
        "mse",
    }
    assert {coding.bits for coding in codings(LINEAR, HEAVY, bits=8)} == {8}
    narrow = replace(LINEAR, shape=(64, 48))
    assert not any(coding.group_size for coding in codings(narrow, HEAVY, bits=4))
    conv = replace(LINEAR, kind="Convolution")
    assert {c.bits for c in codings(conv, HEAVY, bits=4, activations=True)} == {8}


def test_effects_are_for_one_of_the_weights_squares() -> None:
    found = effects_of({("a",): 0.2, ("b", "c"): 0.1}, {"a": 0.02, "b": 0.01, "c": 0.03})
    assert found == pytest.approx({"a": 2.0, "b": 0.25, "c": 0.25})


@pytest.mark.slow
def test_a_component_by_local_quantization(tmp_path: Path) -> None:
    expected = nets.run(nets.attention_network(), SAMPLES[0])
    shares: list[float] = []
    model, plan = quantize_local(
        "unet",
        nets.attention_network(),
        SAMPLES,
        recipe=LOCAL,
        target=VNNI,
        progress=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert plan.measured_on == len(SAMPLES)
    assert len({choice.facts.effect for choice in plan.layers}) == len(plan.layers)
    assert set(bits_of(plan)) >= {4, 8}
    assert plan.bytes <= plan.budget
    assert abs(weight_bytes(model) - plan.bytes) <= 40 * len(plan.layers)
    error = nets.error(model, expected, SAMPLES[0])
    assert error < 0.1
    # Effects add up as they are taken to.
    assert 0.3 * plan.expected_error < error < 3 * plan.expected_error
    folder = tmp_path / "unet"
    folder.mkdir()
    write_plan(folder, plan)
    assert (folder / HEAT_MAP_FILE).read_bytes()[:4] == b"\x89PNG"
    lines = read_tables(tmp_path, ["unet", "vae_decoder"])
    assert len(lines) == len(plan.layers) + 2
    assert "of half precision" in lines[0]
    assert any("attn1.to_q" in line and " bits, " in line for line in lines)


@pytest.mark.slow
def test_the_same_weights_and_inputs_give_the_same_choice() -> None:
    plans = [
        plan_local("unet", nets.attention_network(), SAMPLES, budget=0.35, groups=3)
        for _ in range(2)
    ]
    assert plans[0] == plans[1]
    assert len({choice.facts.effect for choice in plans[0].layers}) <= 3


@pytest.mark.slow
def test_activations_of_eight_bit_layers() -> None:
    expected = nets.run(nets.attention_network(), SAMPLES[0])
    recipe = ComponentRecipe(mode="local", budget=0.5, activations=True, float_layers=("conv_in/",))
    plans: list[LocalPlan] = []
    model = compress_component(
        "unet", nets.attention_network(), recipe, SAMPLES, VNNI, planned=plans.append
    )
    found = dict(zip((c.facts.layer.name for c in plans[0].layers), bits_of(plans[0]), strict=True))
    inputs = {
        name: by_name(model)[name].input_value(0).get_node().get_type_name() for name in found
    }
    fragile = {name: bits for name, bits in found.items() if is_fragile("unet", name)}
    assert fragile
    sturdy = {name: bits for name, bits in found.items() if name not in fragile}
    assert {inputs[name] for name, bits in sturdy.items() if bits == 8} == {"FakeQuantize"}
    assert "FakeQuantize" not in {inputs[name] for name, bits in found.items() if bits == 4}
    assert "FakeQuantize" not in {inputs[name] for name in fragile}
    assert set(found.values()) == {4, 8}
    assert nets.error(model, expected, SAMPLES[0], exact=True) < 0.1


def test_one_scheme_for_everything() -> None:
    expected = nets.run(nets.attention_network(), SAMPLES[0])
    weights_alone = ComponentRecipe(mode="global", activations=False)
    model = compress_component("unet", nets.attention_network(), weights_alone)
    assert nets.constants(model) == {"i8"}
    assert nets.error(model, expected, SAMPLES[0]) < 0.05
    whole = compress_component(
        "unet", nets.attention_network(), ComponentRecipe(mode="global"), SAMPLES, VNNI
    )
    for op in whole.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize":
            low, high = (op.input_value(i).get_node().get_data() for i in (1, 2))
            assert low.size == high.size == 1
            # Symmetric: around zero, or, of what is never negative, from it.
            assert float(low.item()) == 0 or low.item() == pytest.approx(-high.item(), rel=0.02)
        if op.get_type_name() in ("Convolution", "MatMul") and "module" in op.get_friendly_name():
            scale = op.input_value(1).get_node().input_value(1).get_node()
            assert np.prod(scale.get_output_shape(0)) == 1
    assert nets.error(whole, expected, SAMPLES[0], exact=True) < 0.3


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"mode": "local", "budget": 0.0}, "budget is 0; give a share"),
        ({"mode": "local", "budget": -1.0}, "give a share"),
        ({"mode": "local", "budget": float("nan")}, "give a share"),
        ({"mode": "local", "bits": 2}, "bits = 4 or 8"),
        ({"mode": "local", "granularity": "group"}, "leave granularity out"),
        ({"mode": "local", "measured_groups": -1}, "measured_groups is -1"),
        ({"mode": "int8", "budget": 0.3}, "belongs to local"),
        ({"mode": "int8", "activations": False}, "belongs to global and local"),
        ({"mode": "global", "granularity": "channel"}, "granularity tensor"),
        ({"mode": "local", "smooth_quant_alpha": 0.5}, "belongs to int8"),
    ],
)
def test_choices_that_do_not_go_together(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ComponentRecipe(**choices)
