from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdvino.cli.main import main
from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.recipe_file import from_toml, read_recipe, to_toml
from sdvino.compress.recipes import RECIPES, CalibrationRecipe, Recipe, get_recipe
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")

# Regular expressions and prompts in every writing, with quotes, backslashes and control characters.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
PATTERNS = st.one_of(
    st.sampled_from([r"conv_in/", r"(^|\.)it's\b", "a\\\\b", 'say "so"', "tab\tand\nline", "\x7f"]),
    TEXTS.map(lambda text: "".join(f"[{c}]" if c.isalnum() else "." for c in text)),
)
LAYERS = st.lists(PATTERNS, max_size=2, unique=True).map(tuple)
SHARES = st.floats(0.0, 1.0, exclude_min=True)


@st.composite
def components(draw: st.DrawFn) -> ComponentRecipe:
    mode = draw(st.sampled_from(RECIPES))
    choices: dict[str, Any] = {
        "float_layers": draw(LAYERS),
        "float_ends": draw(st.booleans()),
        "float_residual_sources": draw(st.booleans()),
    }
    if mode == "int4-weights":
        group = draw(st.sampled_from([None, 16, 64, 256]))
        granularity = "channel" if group is None else "group"
        choices |= {"group_size": group, "granularity": granularity, "ratio": draw(SHARES)}
    if mode == "int8":
        choices["granularity"] = draw(st.sampled_from(["channel", "tensor"]))
        choices["smooth_quant_alpha"] = draw(st.none() | st.floats(0, 1))
        choices["quantize_attention"] = draw(st.none() | st.booleans())
    return ComponentRecipe(mode=mode, **choices)


CALIBRATIONS = st.builds(
    CalibrationRecipe,
    prompts=st.none() | st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    trajectories=st.none() | st.integers(1, 100),
    strata=st.none() | st.integers(1, 100),
    samples=st.none() | st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
)
MADE = st.builds(
    Recipe,
    st.from_regex(r"[a-z0-9][a-z0-9 ._+-]{0,20}", fullmatch=True),
    st.text("aß'\"\\é#= ", max_size=8),
    st.dictionaries(st.sampled_from(COMPONENTS), components(), max_size=2),
    CALIBRATIONS,
)


# Machines differ in how fast they draw.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(recipe=MADE)
def test_a_recipe_comes_back_as_it_was(recipe: Recipe) -> None:
    assert from_toml(to_toml(recipe)) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_that_ship_come_back_as_they_were(name: str) -> None:
    assert from_toml(to_toml(get_recipe(name))) == get_recipe(name)


def test_a_file_needs_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a fox\na hen\n", encoding="utf-8")
    file = tmp_path / "my recipe.toml"
    file.write_text(
        "[unet]\r\nmode = 'int8'\r\nsmooth_quant_alpha = 1\r\n\r\n"
        "[calibration]\nprompts_file = 'texts.txt'\n",
        encoding="utf-8",
    )
    recipe = get_recipe(str(file))
    assert recipe.name == "my recipe"
    assert recipe.component("unet") == ComponentRecipe(mode="int8", smooth_quant_alpha=1.0)
    assert recipe.treatment("vae_decoder") == "fp16"
    assert recipe.calibration == CalibrationRecipe(prompts=("a fox", "a hen"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unet = ", "no TOML"),
        ("[unet]\nmode = 'int8'\n[unet]\n", "no TOML"),
        ("[vae]\nmode = 'int8'", "Unknown key 'vae' in a recipe"),
        ("unet = 'int8'", "write a table"),
        ("name = 3", "write a string"),
        ("[unet]\nbits = 8", "has no mode"),
        ("[unet]\nmode = 8", "write a string"),
        ("[unet]\nmode = 'int8'\nalpha = 1", "Unknown key 'alpha' in"),
        ("[unet]\nmode = 'int8'\nbits = '8'", "write a whole number"),
        ("[unet]\nmode = 'int8'\nbits = true", "write a whole number"),
        ("[unet]\nmode = 'int8'\nfloat_ends = 1", "write true or false"),
        ("[unet]\nmode = 'int8'\nfloat_layers = 'conv'", "write a list of strings"),
        ("[unet]\nmode = 'int8'\nfloat_layers = [1]", "write a list of strings"),
        ("[unet]\nmode = 'int8'\nsmooth_quant_alpha = nan", "none \\(nan or inf\\)"),
        ("[unet]\nmode = 'int8'\nbits = 4", r"\[unet\] int8 goes with bits = 8"),
        ("[unet]\nmode = 'int4-weights'\ngranularity = 'tensor'", "group or channel"),
        ("[calibration]\nsamples = 0", "from 1 to"),
        ("[calibration]\nprompts = []", "no prompts"),
        ("[calibration]\nprompts = 'a fox'", "write a list of strings"),
        ("[calibration]\nprompts_file = 'none.txt'", "missing"),
        ("[calibration]\nprompts = ['a']\nprompts_file = 'b'", "one"),
        ("x = " + "[" * 5000, "no TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=said) as caught:
        read_recipe(file)
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * (2**20 + 1)])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(RequestError, match=r"mine\.toml"):
        get_recipe(file)
    with pytest.raises(RequestError, match="missing"):
        get_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", ["int8", "int4-weights"])
def test_the_command_prints_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--show-recipe", name]) == 0
    assert from_toml(capsys.readouterr().out) == get_recipe(name)


def test_the_command_refuses_a_bad_recipe_before_it_looks_at_the_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[unet]\nmode = 'int9'\n", encoding="utf-8")
    words = ["convert", str(tmp_path), str(tmp_path / "out"), "--recipe", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", f"from sdvino.cli.main import main; exit(main({words!r}))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "int9" in done.stderr
    assert "Traceback" not in done.stderr
