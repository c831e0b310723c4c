from __future__ import annotations

import pytest

from sdvino.compress.recipes import RECIPES, get_recipe
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS


def test_every_recipe_says_how_each_component_is_stored() -> None:
    table = {
        name: {component: get_recipe(name).treatment(component) for component in COMPONENTS}
        for name in RECIPES
    }
    assert set(table["fp16"].values()) == {"fp16"}
    assert set(table["int8-weights"].values()) == {"int8-weights"}
    assert table["int8"] == {
        "text_encoder": "int8-weights",
        "text_encoder_2": "int8-weights",
        "unet": "int8",
        "vae_decoder": "int8",
        "vae_encoder": "int8",
        "tiny_vae": "int8",
    }


def test_a_component_can_be_treated_otherwise() -> None:
    recipe = get_recipe("int8")
    changed = recipe.with_overrides({"vae_decoder": "fp16"})
    assert changed.treatment("vae_decoder") == "fp16"
    assert changed.treatment("text_encoder") == "int8-weights"
    assert recipe.treatment("vae_decoder") == "int8"


@pytest.mark.parametrize("name", ["", "INT8", "int4", "fp32"])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RequestError, match="fp16, int8-weights, int8"):
        get_recipe(name)


@pytest.mark.parametrize("override", [{"vae": "fp16"}, {"unet": "int3"}])
def test_an_unknown_override_is_refused(override: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="choose one of"):
        get_recipe("int8").with_overrides(override)
