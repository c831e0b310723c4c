from __future__ import annotations

from typing import Any

import measure_choices
import pytest

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.fragile import float_nodes
from sdvino.compress.recipes import RECIPES, CalibrationRecipe, Recipe, get_recipe
from sdvino.compress.targets import get_target
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS

CONV = "/aten::_convolution/Convolution"


def test_every_recipe_says_how_each_component_is_stored() -> None:
    table = {
        name: {component: get_recipe(name).treatment(component) for component in COMPONENTS}
        for name in RECIPES
    }
    text, images = COMPONENTS[:2], COMPONENTS[2:]
    assert set(table["fp16"].values()) == {"fp16"}
    assert set(table["int8-weights"].values()) == {"int8-weights"}
    for name in ("int8", "int8-hybrid"):
        assert {table[name][component] for component in text} == {"int8-weights"}
        assert {table[name][component] for component in images} == {name}
    assert {table["int4-weights"][component] for component in (*text, "unet")} == {"int4-weights"}
    assert {table["int4-weights"][component] for component in images[1:]} == {"int8-weights"}


def test_what_the_recipes_are_made_of() -> None:
    int8, four = get_recipe("int8").component("unet"), get_recipe("int4-weights").component("unet")
    assert (int8.bits, int8.granularity, int8.smooth_quant_alpha) == (8, "channel", 0.95)
    assert get_recipe("int8-hybrid").component("unet").smooth_quant_alpha is None
    assert (four.bits, four.granularity, four.group_size) == (4, "group", 64)
    assert get_recipe("fp16").component("unet").bits == 16


def test_a_component_can_be_treated_otherwise() -> None:
    recipe = get_recipe("int8")
    changed = recipe.with_overrides({"vae_decoder": "fp16"})
    assert changed.treatment("vae_decoder") == "fp16"
    assert changed.treatment("text_encoder") == "int8-weights"
    assert recipe.treatment("vae_decoder") == "int8"
    assert changed.with_overrides({"vae_decoder": "int8"}) == recipe


@pytest.mark.parametrize("name", ["", "INT8", "int4", "fp32"])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RequestError, match="fp16, int8-weights, int8-hybrid, int8, int4-weights"):
        get_recipe(name)


@pytest.mark.parametrize("override", [{"vae": "fp16"}, {"unet": "int3"}])
def test_an_unknown_override_is_refused(override: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="choose one of"):
        get_recipe("int8").with_overrides(override)


@pytest.mark.parametrize(
    "override", [{"text_encoder": "int8"}, {"text_encoder_2": "int8-hybrid"}, {"unet": "unet"}]
)
def test_an_override_that_makes_no_sense_is_refused(override: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="choose"):
        get_recipe("fp16").with_overrides(override)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"mode": "int3"}, "Unknown mode"),
        ({"mode": "int8", "granularity": "row"}, "Unknown granularity"),
        ({"mode": "int8", "bits": 4}, "bits = 8"),
        ({"mode": "int4-weights", "bits": 8}, "bits = 4"),
        ({"mode": "int8-weights", "granularity": "tensor"}, "granularity channel"),
        ({"mode": "int8", "granularity": "group", "group_size": 64}, "channel or tensor"),
        ({"mode": "int4-weights", "granularity": "group"}, "group_size belongs"),
        ({"mode": "int4-weights", "group_size": 64}, "group_size belongs"),
        ({"mode": "int4-weights", "granularity": "group", "group_size": 48}, "16, 32, 64"),
        ({"mode": "int4-weights", "ratio": 0.0}, "ratio is 0"),
        ({"mode": "int4-weights", "ratio": float("nan")}, "ratio is nan"),
        ({"mode": "int8", "ratio": 0.5}, "ratio belongs"),
        ({"mode": "int8", "smooth_quant_alpha": 1.5}, "from 0 to 1"),
        ({"mode": "int8-weights", "smooth_quant_alpha": 0.5}, "belongs to int8"),
        ({"mode": "int8-weights", "quantize_attention": True}, "belongs to int8"),
        ({"mode": "int8", "float_layers": ("(",)}, "no regular expression"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ComponentRecipe(**choices)


@pytest.mark.parametrize(
    "choices",
    [{"strata": 0}, {"samples": 0}, {"trajectories": -1}, {"seed": -1}, {"prompts": ()}],
)
def test_a_calibration_that_cannot_be_is_refused(choices: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="give"):
        CalibrationRecipe(**choices)


def test_milder_recipes_end_at_half_precision() -> None:
    names, recipe = [], get_recipe("int8")
    while recipe is not None:
        names.append(recipe.name)
        recipe = recipe.milder()  # type: ignore[assignment]
    assert names == ["int8", "int8-hybrid", "int8-weights", "fp16"]
    milder = get_recipe("int4-weights").milder()
    assert milder is not None
    assert milder.name == "int8-weights"


def test_a_milder_recipe_keeps_the_calibration() -> None:
    mine = Recipe(
        "mine", "", {"unet": ComponentRecipe(mode="int8")}, CalibrationRecipe(prompts=("a fox",))
    )
    milder = mine.milder()
    assert milder is not None
    assert milder.calibration == mine.calibration


def test_single_layers_go_back_to_float() -> None:
    node = f"__module.mid_block.resnets.0.conv1{CONV}"
    recipe = get_recipe("int8").with_float_layers("unet", [node])
    assert recipe.with_float_layers("unet", [node]) == recipe
    nodes = [f"__module.conv_in{CONV}", node, f"{node}_1", f"__module.mid_block.conv{CONV}"]
    assert float_nodes(recipe.component("unet"), "unet", nodes) == nodes[:2]
    assert recipe.component("vae_decoder") == get_recipe("int8").component("vae_decoder")


def test_a_layer_that_the_model_has_not_is_named() -> None:
    recipe = ComponentRecipe(mode="int8", float_layers=("conv_in", "conv_inn"))
    with pytest.raises(RequestError, match=r"unet.*'conv_inn'.*matches no layer"):
        float_nodes(recipe, "unet", [f"__module.conv_in{CONV}"])


def test_ends_and_other_operations_stay_in_float() -> None:
    recipe = ComponentRecipe(mode="int8", float_layers=("attn1",), float_ends=True)
    assert float_nodes(recipe, "tiny_vae", ["a", "b", "c"], ["x.attn1"]) == ["x.attn1", "a", "c"]
    assert float_nodes(recipe, "tiny_vae", ["a"], ["b"], ["attn1/Add"]) == ["attn1/Add", "a"]
    assert float_nodes(ComponentRecipe(mode="int8", float_ends=True), "tiny_vae", []) == []


@pytest.mark.parametrize("name", ["", "a/b", "x" * 65, "a\nb"])
def test_a_recipe_has_a_name(name: str) -> None:
    with pytest.raises(RequestError, match="called"):
        Recipe(name, "")


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
@pytest.mark.parametrize("target", ["avx2", "avx512-vnni"])
def test_every_choice_that_is_measured_is_another(component: str, target: str) -> None:
    recipe = get_recipe("int8").component(component)
    made = measure_choices.variants(recipe, get_target(target))
    values = list(made.values())
    assert all(value not in values[:index] for index, value in enumerate(values))
    assert "conv_shortcut" not in made["conv_shortcut in 8 bits"].recipe.float_layers[0]
