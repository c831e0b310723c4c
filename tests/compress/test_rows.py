from __future__ import annotations

from typing import Any

import pytest

from sdvino.compress.recipes import ComponentRecipe, get_recipe
from sdvino.compress.rows import AccelerateSettings, QuantizeSettings
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS


def test_a_row_is_the_recipe_of_its_scheme() -> None:
    for scheme in ("int8", "global", "local", "fp16"):
        stored = QuantizeSettings.from_table({"scheme": scheme}).stored()
        assert stored == dict(get_recipe(scheme).components)
    assert set(QuantizeSettings().stored()) == set(COMPONENTS)


def test_a_row_speaks_of_one_component_and_its_choices() -> None:
    row = {"scheme": "local", "component": "unet", "budget": 1, "bits": 8, "activations": True}
    assert QuantizeSettings.from_table(row).stored() == {
        "unet": ComponentRecipe(mode="local", budget=1.0, bits=8, activations=True)
    }
    everywhere = QuantizeSettings.from_table({"scheme": "local", "budget": 0.4}).stored()
    assert everywhere["unet"].budget == 0.4
    assert everywhere["text_encoder"] == get_recipe("local").component("text_encoder")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"scheme": "int3"}, "Unknown quantization scheme 'int3'; choose one of: .*global, local"),
        ({"scheme": 8}, "write a string"),
        ({"scheme": "local", "component": "vae"}, "Unknown component 'vae'"),
        ({"scheme": "local", "share": 0.3}, "Unknown key 'share' in the pass quantize; it takes"),
        ({"scheme": "local", "budget": 1.3}, "budget is 1.3; give a share"),
        ({"scheme": "local", "budget": -0.3}, "give a share"),
        ({"scheme": "local", "budget": True}, "write a number"),
        ({"scheme": "local", "bits": 3}, "bits = 4 or 8"),
        ({"scheme": "local", "bits": 4.0}, "write a whole number"),
        ({"scheme": "local", "activations": 1}, "write true or false"),
        ({"scheme": "int8", "budget": 0.3}, "belongs to local"),
        ({"scheme": "int8", "component": "text_encoder"}, "choose int8-weights"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        QuantizeSettings.from_table(row)
    assert "\n" not in str(caught.value)


def test_a_row_names_the_device_to_accelerate_for() -> None:
    assert AccelerateSettings().resolve(("AVX2", "AVX-VNNI")).target == "avx2-vnni"
    assert AccelerateSettings.from_table({"device": "gpu.1"}).resolve(()).stored.device == "GPU.1"
    for row, said in (
        ({"device": "the moon"}, "The pass accelerate: 'the moon' is no device"),
        ({"device": "HETERO"}, "such as HETERO:GPU,CPU"),
        ({"device": 3}, "write a string"),
        ({"where": "CPU"}, "it takes: device"),
    ):
        with pytest.raises(RequestError, match=said):
            AccelerateSettings.from_table(row)
