"""Rows of a recipe: read, written, put in order, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdvino.compress.fragile import is_fragile
from sdvino.compress.recipe_file import from_toml, to_toml
from sdvino.compress.recipes import get_recipe
from sdvino.errors import RequestError
from sdvino.train.low_rank import LowRank
from sdvino.train.prune import Prune

LEAN = """
name = 'lean'
[calibration]
trajectories = 1

[[passes]]
kind = 'prune'
method = 'heads'
share = 0.25

[[passes]]
kind = 'low_rank'
component = 'text_encoder'
energy = 1
whiten = false
keep = ['fc1$']

[[passes]]
kind = 'quantize'
scheme = 'int8-weights'
"""


def test_rows_are_taken_in_order_and_quantize_becomes_tables() -> None:
    recipe = from_toml(LEAN)
    assert recipe.passes == (
        Prune(method="heads", share=0.25),
        LowRank(component="text_encoder", energy=1.0, whiten=False, keep=("fc1$",)),
    )
    assert recipe.components == get_recipe("int8-weights").components
    assert from_toml(to_toml(recipe)) == recipe
    assert "[[passes]]" in to_toml(recipe)


def test_a_milder_recipe_keeps_the_passes() -> None:
    recipe = from_toml(LEAN)
    milder = recipe.milder()
    assert milder is not None
    assert milder.passes == recipe.passes
    assert recipe.with_overrides({"unet": "fp16"}).passes == recipe.passes


def rows(*texts: str) -> str:
    return "".join(f"[[passes]]\n{text}\n" for text in texts)


HEADS = "kind = 'prune'\nmethod = 'heads'\nshare = 0.2"
ZEROS = "kind = 'prune'\nshare = 0.2"
THIN = "kind = 'low_rank'\nenergy = 0.9"
STORE = "kind = 'quantize'\nscheme = 'int8'"
LEARN = "kind = 'distill'\nobjective = 'copy'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("passes = 1", "tables in double brackets"),
        ("passes = [1]", "has no kind"),
        (rows("share = 0.2"), "has no kind"),
        (rows("kind = 7"), "Unknown pass 7; choose one of: prune"),
        (rows("kind = 'shrink'"), "Unknown pass 'shrink'"),
        (rows(LEARN), "Unknown objective 'copy'"),
        (rows("kind = 'distill'\ncomponent = 'vae'"), "distill trains the unet alone"),
        (rows("kind = 'distill'\niterations = 5\nminutes = 1"), "iterations or minutes"),
        (rows("kind = 'distill'\nprompts = ['a']\npictures = 'b'"), "from prompts or from pict"),
        (rows("kind = 'distill'\nbatch = 0"), "batch is 0"),
        (rows("kind = 'distill'\nstudent_steps = 3"), "cannot be shared out over 3"),
        (rows("kind = 'distill'\nprompts = 'a'"), "write a list of strings"),
        (rows(f"{ZEROS}\nscale = 2"), "Unknown key 'scale'"),
        (rows("kind = 'prune'\nshare = -0.1"), "share is -0.1"),
        (rows("kind = 'prune'\nshare = 1.0"), "share is 1"),
        (rows("kind = 'prune'\nshare = 30"), "share is 30; give a share from 0 to below 1"),
        (rows("kind = 'prune'\nshare = nan"), "nan or inf"),
        (rows("kind = 'prune'\nshare = 'most'"), "write a number"),
        (rows("kind = 'prune'"), "share"),
        (rows(f"{ZEROS}\nmethod = 'luck'"), "Unknown method 'luck'"),
        (rows(f"{ZEROS}\nscope = 'some'"), "Unknown scope 'some'"),
        (rows(f"{ZEROS}\ncomponent = 'vae_decoder'"), "Unknown component 'vae_decoder'"),
        (rows(f"{HEADS}\ncomponent = 'vae'"), "the unet alone"),
        (rows(f"{ZEROS}\nkeep = ['(']"), "no regular expression"),
        (rows("kind = 'low_rank'"), "one of energy, budget and rank"),
        (rows("kind = 'low_rank'\nrank = 2\nenergy = 0.5"), "one of energy, budget and rank"),
        (rows("kind = 'low_rank'\nrank = 0"), "rank is 0"),
        (rows("kind = 'low_rank'\nrank = 2.5"), "write a whole number"),
        (rows("kind = 'low_rank'\nenergy = 0.0"), "energy is 0; give a share above 0"),
        (rows("kind = 'low_rank'\nenergy = 1.01"), "energy is 1.01"),
        (rows("kind = 'low_rank'\nbudget = -1"), "budget is -1"),
        (rows("kind = 'low_rank'\nenergy = 0.9\nwhiten = 1"), "true or false"),
        (rows("kind = 'quantize'\nscheme = 'int3'"), "Unknown quantization scheme 'int3'"),
        (rows("kind = 'quantize'\ncomponent = 'nose'"), "Unknown component 'nose'"),
        (rows("kind = 'quantize'\nscheme = 'int8'\ncomponent = 'text_encoder'"), "once for each"),
        (rows(STORE) + "[unet]\nmode = 'fp16'", "by a table and by the pass quantize"),
        # Orders that cannot work, with the reason.
        (rows(STORE, THIN), "Pass 2 .* stored already; move it before quantize"),
        (rows(STORE, ZEROS), "Pass 2 .* stored already"),
        (rows(STORE, "kind = 'distill'"), "distill works on the weights of the source"),
        (rows(STORE, STORE), "quantized already"),
        (rows(THIN, HEADS), "move it before low_rank"),
        (rows(ZEROS, THIN), "move prune behind low_rank"),
        (rows(THIN, THIN), "write one low_rank"),
        (rows(*[ZEROS] * 33), "up to 32"),
    ],
)
def test_rows_that_cannot_be_are_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        from_toml(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        rows(HEADS, THIN, STORE),
        rows(THIN, ZEROS, STORE),
        rows(HEADS, ZEROS),
        rows(HEADS, THIN, "kind = 'distill'\nminutes = 2.5", STORE),
        rows(ZEROS, "kind = 'distill'\nobjective = 'steps'\nprompts = ['a', 'b']"),
        rows(f"{THIN}\ncomponent = 'vae'", HEADS),
        rows(THIN, f"{THIN}\ncomponent = 'text_encoder'"),
        rows("kind = 'prune'\nshare = 0.0"),
        rows(f"{STORE}\ncomponent = 'unet'", f"{STORE}\ncomponent = 'vae_decoder'"),
    ],
)
def test_orders_that_work_are_taken(text: str) -> None:
    recipe = from_toml(text)
    assert from_toml(to_toml(recipe)) == recipe


def test_fragile_layers_stay_fragile_when_they_are_two() -> None:
    for layer in ("conv_in", "time_embedding.linear_1", "up_blocks.0.resnets.1.conv_shortcut"):
        for part in (".down", ".up", ""):
            assert is_fragile("unet", f"__module.{layer}{part}/aten::_convolution/Convolution")
    assert not is_fragile("unet", "__module.down_blocks.0.resnets.0.conv1.down/aten::linear/MatMul")


def test_a_file_is_named_in_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lean.toml"
    path.write_text(rows(STORE, THIN), encoding="utf-8")
    with pytest.raises(RequestError, match=r"lean\.toml: Pass 2"):
        get_recipe(path)
