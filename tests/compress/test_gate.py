"""The gate on a pipeline of a few nodes that denoises a little: real folders, real IR, no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.float_layers import short_name
from sdvino.compress.gate import Gate
from sdvino.compress.prompts import GATE_PROMPTS, GENERAL_PROMPTS, held_back
from sdvino.compress.recipes import Recipe, get_recipe
from sdvino.compress.report import REPORT_FILE, write_report
from sdvino.compress.thresholds import (
    LIMITS,
    GatePlan,
    GateSettings,
    Speed,
    Thresholds,
    components_only,
    default_thresholds,
    fit_plan,
)
from sdvino.compress.verdict import Verdict, quality_line
from sdvino.errors import RequestError
from sdvino.folder.manifest import Manifest, Suggested
from sdvino.graph.saving import read_ir, save_ir
from sdvino.runtime.network import Network
from tests.conftest import SHAPES
from tests.tiny_folder import (
    POOLED,
    edit_json,
    make_tiny_folder,
    make_tiny_lcm_folder,
    make_tiny_xl_folder,
    save,
    trained_unet,
)

PROMPTS = ("a red circle", "a green star", "a blue ring")
LAYERS = ("blocks.0", "blocks.1", "blocks.2")
# Four steps of so small a model amplify what 8 bits do to it.
LIMITED = Thresholds(psnr=24.0, ssim=0.5, components={"unet": 0.05, "text_encoder": 0.01})
SUGGESTED = Suggested(num_inference_steps=4, guidance_scale=2.0, scheduler="ddim")


def random_unet() -> ov.Model:
    """The same inputs, and an answer that has nothing to do with them."""
    model = trained_unet({})
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Convolution":
            weights = np.random.default_rng(9).standard_normal((4, 4, 3, 3)).astype(np.float32)
            op.input(1).replace_source_output(ops.constant(weights / 6).output(0))
    return model


def in_8_bits(model: ov.Model, damage: dict[str, float], keep: Sequence[str] = ()) -> ov.Model:
    """Put weights in 8 bits as NNCF does; ``damage`` multiplies the scale of a layer's."""
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]:
        name = op.get_friendly_name()
        if name in keep:
            continue
        node = op.input_value(1).get_node()
        while node.get_type_name() != "Constant":
            node = node.input_value(0).get_node()
        weights = node.get_data().astype(np.float64)
        scale = np.abs(weights).max((1, 2, 3), keepdims=True) / 127
        levels = ops.convert(ops.constant(np.rint(weights / scale).astype(np.int8)), "f32")
        scale *= damage.get(short_name(name), 1.0)
        wide = ops.multiply(levels, ops.constant(scale.astype(np.float32)))
        op.input(1).replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()
    return model


class Folders:
    """A float folder, its compressed copy, and how the copy is compressed again."""

    def __init__(
        self,
        base: Path,
        unet: ov.Model,
        damage: dict[str, float],
        make: Callable[[Path], Path] = make_tiny_folder,
    ) -> None:
        self.float, self.model = base / "float", base / "model"
        make(self.float)
        (self.float / "sdvino.json").unlink(missing_ok=True)
        config = json.loads((self.float / "unet" / "config.json").read_text())
        save(unet, self.float / "unet", config)
        for tokenizer in self.float.glob("tokenizer*"):
            shutil.rmtree(tokenizer)
            shutil.copytree(SHAPES / "tokenizer", tokenizer)
        scheduler = self.float / "scheduler" / "scheduler_config.json"
        edit_json(
            scheduler,
            prediction_type="epsilon",
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
        )
        shutil.copytree(self.float, self.model)
        self.damage = damage
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self._compress(get_recipe("int8-weights"))

    def recompress(self, recipe: Recipe, components: Sequence[str]) -> None:
        self.calls.append((recipe.name, tuple(components)))
        self._compress(recipe)

    def _compress(self, recipe: Recipe) -> None:
        unet = read_ir(self.float / "unet" / "openvino_model.xml")
        if recipe.treatment("unet") != "fp16":
            unet = in_8_bits(unet, self.damage)
        save_ir(unet, self.model / "unet" / "openvino_model.xml")

    def judge(self, recipe: str = "int8-weights", **options: Any) -> Verdict:
        given: dict[str, Any] = {
            "settings": GateSettings(minutes=60.0),
            "prompts": PROMPTS,
            "suggested": SUGGESTED,
            "thresholds": LIMITED,
            **options,
        }
        return Gate(
            float_folder=self.float,
            folder=self.model,
            recipe=get_recipe(recipe),
            recompress=self.recompress,
            **given,
        ).run()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Verdict]:
    folders = Folders(tmp_path_factory.mktemp("sound"), trained_unet({}), {})
    return folders, folders.judge()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Verdict, list[str]]:
    folders = Folders(tmp_path_factory.mktemp("broken"), trained_unet({}), {"blocks.1": 1.3})
    said: list[str] = []
    return folders, folders.judge(say=said.append), said


def test_a_sound_folder_passes(sound: tuple[Folders, Verdict]) -> None:
    folders, verdict = sound
    assert verdict.passed is True, verdict.failures
    assert verdict.trained is True
    assert verdict.history == ()
    assert verdict.recipe.name == "int8-weights"
    assert folders.calls == []
    assert verdict.comparison is not None
    assert len(verdict.comparison.psnr) == len(PROMPTS)
    assert 0 < verdict.comparison.components["unet"] < 0.03
    assert verdict.comparison.components["text_encoder"] == 0.0
    assert [entry.timestep for entry in verdict.comparison.timesteps] == [750, 500, 250, 0]
    assert all(entry.unconditional is not None for entry in verdict.comparison.timesteps)
    assert [entry.component for entry in verdict.sensitivity] == ["unet"]
    assert {short_name(layer.name) for layer in verdict.sensitivity[0].layers} == set(LAYERS)


@pytest.mark.slow
def test_too_little_memory_is_judged_in_pieces(
    sound: tuple[Folders, Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, whole = sound
    made: list[int] = []
    pieces = Network.infer_each

    def count(self: Network, inputs: Any, **options: Any) -> Any:
        made.append(len(inputs))
        return pieces(self, inputs, **options)

    monkeypatch.setattr(Network, "infer_each", count)
    verdict = folders.judge(max_memory=1)
    assert set(made) == {1, 2}
    assert verdict.passed is True, verdict.failures
    assert whole.comparison is not None
    assert verdict.comparison is not None
    assert verdict.denoising_error == pytest.approx(whole.denoising_error, rel=1e-4)
    assert verdict.comparison.psnr == pytest.approx(whole.comparison.psnr, abs=0.5)
    assert verdict.comparison.components == pytest.approx(whole.comparison.components, rel=1e-3)
    (found,), (expected,) = verdict.sensitivity, whole.sensitivity
    assert [layer.nodes for layer in found.layers] == [layer.nodes for layer in expected.layers]
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.error == pytest.approx(other.error, rel=1e-3)


def test_nothing_compressed_is_nothing_to_judge(sound: tuple[Folders, Verdict]) -> None:
    verdict = sound[0].judge("fp16")
    assert verdict.passed is None
    assert "nothing is compressed" in verdict.note


def test_the_same_folder_twice_is_perfect(sound: tuple[Folders, Verdict]) -> None:
    folders, _ = sound
    verdict = Gate(
        float_folder=folders.float,
        folder=folders.float,
        recipe=get_recipe("int8-weights"),
        recompress=folders.recompress,
        prompts=PROMPTS,
        suggested=SUGGESTED,
    ).run()
    assert verdict.passed is True
    assert verdict.comparison is not None
    assert set(verdict.comparison.components.values()) == {0.0}
    assert set(verdict.comparison.psnr) == {99.0}
    assert verdict.comparison.ssim == pytest.approx((1.0,) * 3)


@pytest.mark.slow
def test_a_broken_layer_goes_back_to_float(broken: tuple[Folders, Verdict, list[str]]) -> None:
    folders, verdict, said = broken
    assert verdict.passed is True, verdict.failures
    assert verdict.recipe.name == "int8-weights"
    assert verdict.float_layers == {"unet": ("__module.blocks.1/aten::_convolution/Convolution",)}
    (remedy,) = verdict.history
    assert remedy.action == "float layers"
    assert any("unet" in failure for failure in remedy.because)
    assert remedy.error is not None
    assert remedy.error < 0.05
    assert folders.calls == []  # the IR was mended, not made anew
    assert any("3 pictures of 4 steps" in line for line in said)
    assert any("back to float" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "conditions", "suggested", "encoders"),
    [
        (make_tiny_xl_folder, {"text_embeds": POOLED, "time_ids": 6}, SUGGESTED, 2),
        (
            make_tiny_lcm_folder,
            {"timestep_cond": 16},
            Suggested(num_inference_steps=2, guidance_scale=8.5, scheduler="lcm"),
            1,
        ),
    ],
    ids=["sdxl", "lcm"],
)
def test_other_families_are_judged_and_mended(
    tmp_path: Path,
    make: Callable[[Path], Path],
    conditions: dict[str, int],
    suggested: Suggested,
    encoders: int,
) -> None:
    folders = Folders(tmp_path, trained_unet(conditions), {"blocks.1": 1.3}, make)
    thresholds = Thresholds(psnr=0.0, ssim=-1.0, components={"unet": 0.05, "text_encoder": 0.01})
    verdict = folders.judge(suggested=suggested, thresholds=thresholds)
    assert verdict.trained is True
    assert verdict.passed is True, verdict.failures
    assert verdict.float_layers == {"unet": ("__module.blocks.1/aten::_convolution/Convolution",)}
    assert verdict.comparison is not None
    parts = verdict.comparison.components
    assert len([name for name in parts if name.startswith("text_encoder")]) == encoders
    assert len(verdict.comparison.psnr) == len(PROMPTS)
    # LCM asks once a step: guidance is an input of its UNet.
    guided = [entry.unconditional is not None for entry in verdict.comparison.timesteps]
    assert set(guided) == {encoders == 2}


@pytest.mark.slow
def test_what_layers_cannot_mend_falls_back(tmp_path: Path) -> None:
    everything = dict.fromkeys(LAYERS, 1.3)
    folders = Folders(tmp_path, trained_unet({}), everything)
    verdict = folders.judge()
    assert verdict.passed is True
    assert verdict.fell_back
    assert verdict.recipe.name == "fp16"
    assert folders.calls[0][0] == "fp16"
    assert "unet" in folders.calls[0][1]
    assert verdict.history[-1].action == "milder recipe"
    assert "int8-weights did not pass" in verdict.note


@pytest.mark.slow
def test_random_weights_are_judged_on_components_alone(tmp_path: Path) -> None:
    said: list[str] = []
    folders = Folders(tmp_path, random_unet(), {"blocks.0": 3.0})
    verdict = folders.judge(say=said.append)
    assert verdict.trained is False
    assert verdict.denoising_error is not None
    assert verdict.denoising_error > 0.8
    assert verdict.comparison is not None
    assert verdict.comparison.psnr == ()
    assert verdict.passed is False  # the damage shows in the UNet's output
    assert verdict.history == ()
    assert folders.calls == []
    assert "only components" in verdict.note
    assert any("random" in line for line in said)


def test_no_time_is_no_verdict(sound: tuple[Folders, Verdict]) -> None:
    verdict = sound[0].judge(settings=GateSettings(minutes=1e-7))
    assert verdict.passed is None
    assert "--gate-minutes" in verdict.note


@pytest.mark.parametrize("options", [{"prompts": ()}, {"prompts": (" ",)}])
def test_bad_requests(sound: tuple[Folders, Verdict], options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        sound[0].judge(**options)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), 1e9])
def test_bad_minutes(minutes: float) -> None:
    with pytest.raises(RequestError, match="--gate-minutes"):
        GateSettings(minutes=minutes)


@pytest.mark.slow
def test_the_verdict_survives_the_manifest(broken: tuple[Folders, Verdict, list[str]]) -> None:
    quality = broken[1].to_dict()
    manifest = Manifest(
        source="tiny", family="sd1", recipe="int8-weights", components={}, quality=quality
    )
    read = Manifest.from_dict(json.loads(manifest.to_json()))
    assert read.quality is not None
    assert read.quality == quality
    assert read.quality["passed"] is True
    assert read.quality["measured"]["median_psnr"] > 24
    assert quality_line(read.quality).startswith("passed; median PSNR")


@pytest.mark.parametrize(
    ("quality", "line"),
    [
        ({}, "not judged"),
        ({"passed": "yes"}, "not judged"),
        ({"passed": [], "measured": []}, "not judged"),
        ({"passed": False, "measured": {"median_psnr": "x"}, "note": 3}, "FAILED"),
        ({"passed": True, "measured": {"median_psnr": 31.23}}, "passed; median PSNR 31.2 dB"),
        ({"passed": None, "note": "why"}, "not judged; why"),
    ],
)
def test_anybody_s_quality_gives_a_line(quality: dict[str, Any], line: str) -> None:
    assert quality_line(quality) == line


@pytest.mark.slow
def test_the_report_names_plots_that_exist_and_are_small(
    tmp_path: Path, broken: tuple[Folders, Verdict, list[str]]
) -> None:
    pytest.importorskip("matplotlib")
    path = write_report(tmp_path, broken[1], name="tiny")
    assert path == tmp_path / REPORT_FILE
    text = path.read_text(encoding="utf-8")
    named = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line[:2] == "!["}
    files = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "report").iterdir()}
    assert named == files
    assert {"report/pictures.png", "report/error_by_timestep.png"} < files
    for name in files:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 100_000
    for words in ("Passed", "blocks.1", "back to float", "Error by timestep", "int8-weights"):
        assert words in text


def test_the_plan_shrinks_with_the_time_there_is() -> None:
    speed = Speed(load=10.0, evaluation=1.0, evaluations_a_step=2)
    plans = [
        fit_plan(speed, prompts=16, steps=20, minutes=minutes)
        for minutes in (1000, 60, 30, 15, 8, 1)
    ]
    assert plans[0] == GatePlan(pictures=16, steps=20, replayed=4)
    costs = [speed.seconds(plan) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    for plan, minutes in zip(plans[:-1], (1000, 60, 30, 15, 8), strict=True):
        assert speed.seconds(plan) <= 0.6 * 60 * minutes
        assert plan.finished
    assert not plans[-1].finished
    assert plans[-1].pictures == 1


def test_the_estimate_counts_both_folders() -> None:
    plan = GatePlan(pictures=2, steps=10, replayed=1)
    # Two pictures in both folders, one replayed, both branches; four decodes, four encodes.
    assert plan.evaluations(2) == 2 * 2 * 10 * 2 + 10 * 2 + 4 * 3.0 + 4 * 1.5
    few = components_only(GatePlan(pictures=8, steps=10, replayed=4))
    assert (few.pictures, few.finished) == (4, False)


def test_prompts_are_not_those_of_calibration() -> None:
    own = [f"prompt {i}" for i in range(64)]
    chosen = held_back(own, own[::2])
    assert len(chosen) == 16
    assert not set(chosen) & set(own[::2])
    assert held_back(GENERAL_PROMPTS, GENERAL_PROMPTS) == GATE_PROMPTS
    assert not set(GATE_PROMPTS) & set(GENERAL_PROMPTS)


def test_thresholds_follow_the_most_compressed_part() -> None:
    mixed = get_recipe("int8-weights").with_overrides({"vae_decoder": "int8"})
    found = default_thresholds(mixed, ("unet", "vae_decoder"))
    assert found.psnr == LIMITS["int8"].psnr
    assert found.components["unet"] == LIMITS["int8-weights"].error
    assert default_thresholds(mixed, ("unet",), min_psnr=33.0).psnr == 33.0
    with pytest.raises(RequestError, match="--min-psnr"):
        GateSettings(min_psnr=-1.0)
    assert Thresholds().components == {}
