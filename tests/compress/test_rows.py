from __future__ import annotations

import sys

import pytest

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.recipe_file import Quantize, from_toml
from sdvino.compress.recipes import Recipe, get_recipe
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")


def recipe(*rows: str) -> Recipe:
    return from_toml("".join(f"[[passes]]\n{row}\n" for row in rows))


def test_a_row_is_the_recipe_of_its_scheme() -> None:
    for scheme in ("int8", "global", "local", "fp16"):
        found = recipe(f"kind = 'quantize'\nscheme = '{scheme}'")
        assert found.components == get_recipe(scheme).components
    assert set(Quantize().stored()) == set(COMPONENTS)


def test_a_row_speaks_of_one_component_and_its_choices() -> None:
    row = "kind = 'quantize'\nscheme = 'local'\ncomponent = 'unet'\nbudget = 1\nbits = 8"
    found = recipe(f"{row}\nactivations = true").component("unet")
    assert found == ComponentRecipe(mode="local", budget=1.0, bits=8, activations=True)
    everywhere = recipe("kind = 'quantize'\nscheme = 'local'\nbudget = 0.4")
    assert everywhere.component("unet").budget == 0.4
    assert everywhere.treatment("text_encoder") == "int8-weights"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("scheme = 'int3'", "Unknown quantization scheme 'int3'; choose one of: .*global, local"),
        ("scheme = 'local'\nbudget = 1.3", "budget is 1.3; give a share"),
        ("scheme = 'local'\nbudget = -0.3", "give a share"),
        ("scheme = 'local'\nbits = 3", "bits = 4 or 8"),
        ("scheme = 'local'\nactivations = 1", "write true or false"),
        ("scheme = 'int8'\nbudget = 0.3", "belongs to local"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        recipe(f"kind = 'quantize'\n{row}")
    assert "\n" not in str(caught.value)
