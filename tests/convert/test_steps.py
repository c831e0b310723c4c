"""Steps, what they need, and how far they are."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sdvino.compress.calibration import CalibrationPlan, load_samples, save_samples
from sdvino.compress.recipes import get_recipe
from sdvino.convert.estimate import Work, check_needs, expected_seconds, work_out
from sdvino.convert.export import spooled
from sdvino.convert.request import Request, WorkPlan
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.steps import Step, group
from sdvino.errors import OutputError, RequestError, SdvinoError
from sdvino.runtime.memory import MemoryStatus
from sdvino.weights.safetensors import Tensor, open_tensors, write_tensors

SIZES = {"text_encoder": 246, "unet": 1719, "vae_decoder": 167, "vae_encoder": 167}
MEGABYTE = 10**6
SHAPES_SOURCE = Path(__file__).resolve().parents[2] / "models" / "shapes-source"
#: Peaks of processes at Stable Diffusion 1.5's real size, resident, in bytes: Linux, OpenVINO
#: 2026.4, NNCF 3.4, by scripts/bench_convert.py. A UNet in parts takes most where they are joined.
MEASURED = {
    "int8": {
        "export unet": 1.82e9,
        "calibrate": 3.18e9,
        "compress text_encoder": 1.00e9,
        "compress unet": 1.85e9,
    },
    "int8-weights": {"export unet": 1.82e9, "compress unet": 1.56e9},
}


def plan_of(recipe: str) -> WorkPlan:
    return WorkPlan(
        request=Request(
            source="/models/a", recipe=recipe, components={}, prompts=("a cat",), suggested=None
        ),
        recipe=get_recipe(recipe),
        calibration=CalibrationPlan(prompts=("a cat", "a dog"), shape=(4, 64, 64)),
        components=tuple(SIZES),
    )


def steps_like_sd15() -> list[Step]:
    exports = [Step("export", name, size * MEGABYTE) for name, size in SIZES.items()]
    compressions = [Step("compress", name, size * MEGABYTE) for name, size in SIZES.items()]
    return [
        Step("metadata"),
        *exports,
        Step("calibrate", "", SIZES["unet"] * MEGABYTE),
        *compressions,
    ]


def test_a_large_component_has_a_process_of_its_own() -> None:
    names = [[step.name for step in batch] for batch in group(steps_like_sd15())]
    assert names == [
        ["metadata", "export text_encoder"],
        ["export unet"],
        ["export vae_decoder", "export vae_encoder"],
        ["calibrate"],
        ["compress text_encoder"],
        ["compress unet"],
        ["compress vae_decoder", "compress vae_encoder"],
    ]


def test_small_passes_and_exports_share_a_process_but_not_with_training() -> None:
    passes = [Step("pass", name, 15 * MEGABYTE) for name in ("1-prune", "2-distill", "3-low_rank")]
    exports = [Step("export", "unet", 15 * MEGABYTE), Step("export", "text_encoder", 5 * MEGABYTE)]
    ends = [Step("calibrate", "", 15 * MEGABYTE), Step("compress", "unet", 15 * MEGABYTE)]
    steps = [Step("metadata"), Step("record"), *passes, *exports, *ends]
    assert [[step.name for step in batch] for batch in group(steps)] == [
        ["metadata", "record", "pass 1-prune"],
        ["pass 2-distill"],
        ["pass 3-low_rank", "export unet", "export text_encoder", "calibrate", "compress unet"],
    ]
    large = Step("compress", "vae_decoder", 400 * MEGABYTE)
    assert [[step.name for step in batch] for batch in group([*steps, large])] == [
        ["metadata"],
        ["record", "pass 1-prune"],
        ["pass 2-distill"],
        ["pass 3-low_rank"],
        ["export unet", "export text_encoder"],
        ["calibrate"],
        ["compress unet"],
        ["compress vae_decoder"],
    ]


def test_a_step_is_found_by_its_name() -> None:
    for step in steps_like_sd15():
        found = Step.parse(step.name)
        assert (found.kind, found.component) == (step.kind, step.component)
    with pytest.raises(ValueError, match="dance unet"):
        Step.parse("dance unet")


@pytest.mark.parametrize("recipe", ["fp16", "int8-weights", "int8"])
def test_the_plan_survives_the_way_to_the_worker(tmp_path: Path, recipe: str) -> None:
    plan = plan_of(recipe)
    plan.write(tmp_path)
    found = WorkPlan.read(tmp_path)
    assert found == plan
    assert found.quantized == plan.quantized


def test_samples_survive_the_way_to_the_worker(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        {"sample": rng.standard_normal((1, 4, 2, 2), dtype=np.float32), "timestep": np.array([i])}
        for i in range(12)
    ]
    save_samples(tmp_path / "unet.npz", samples)
    found = load_samples(tmp_path / "unet.npz")
    assert len(found) == len(samples)
    for one, other in zip(found, samples, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def test_progress_never_goes_back_and_ends_at_one() -> None:
    said: list[tuple[str, float]] = []
    steps = steps_like_sd15()
    work = Work(steps, plan_of("int8"), lambda what, share: said.append((what, share)))
    work.tick()  # before the first step: nothing to say
    for step in steps:
        for share in (0.0, 0.5, 1.0):
            work.update(step.name, share)
            work.tick()
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert [name for name, _ in said][::6] == [step.name for step in steps]


def test_quantizing_takes_longer_than_compressing() -> None:
    unet = Step("compress", "unet", SIZES["unet"] * MEGABYTE)
    times = [expected_seconds(unet, plan_of(name)) for name in ("fp16", "int8-weights", "int8")]
    assert times == sorted(times)


def test_needs_are_those_of_the_largest_step() -> None:
    needs = work_out(steps_like_sd15(), plan_of("int8-weights"))
    assert needs.memory == max(step.memory for step in needs.steps)
    assert needs.memory < 5e9  # what a machine of 8 GB has left
    assert needs.disk > 1.5 * sum(SIZES.values()) * MEGABYTE
    assert work_out([], plan_of("fp16")).memory == 0


@pytest.mark.parametrize("recipe", ["int8", "int8-weights"])
def test_needs_are_what_was_measured(recipe: str) -> None:
    needs = work_out(steps_like_sd15(), plan_of(recipe))
    known = {step.step.name: step.memory for step in needs.steps}
    for step, measured in MEASURED[recipe].items():
        assert 0.9 * measured < known[step] < 1.35 * measured, step


def test_parts_bound_what_quantizing_takes() -> None:
    plan = plan_of("int8")
    small, large = (
        work_out([Step("compress", "unet", size * MEGABYTE)], plan) for size in (1700, 5100)
    )
    assert small.memory < large.memory < 13e9  # as a whole, in float32, it would take 20 and more
    assert small.disk < 1.1e9


def test_a_disk_or_a_memory_too_small_is_told_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs = work_out(steps_like_sd15(), plan_of("int8"))
    plenty = MemoryStatus(64 * 10**9, 60 * 10**9)
    check_needs(needs, tmp_path, plenty)
    assert not caplog.records
    with pytest.raises(RequestError, match="memory"):
        check_needs(needs, tmp_path, MemoryStatus(2 * 10**9, 2 * 10**9))
    with caplog.at_level(logging.WARNING):
        check_needs(needs, tmp_path, MemoryStatus(64 * 10**9, 10**9))
    assert "close other programs" in caplog.text
    huge = [Step("export", "unet", 10**15)]
    with pytest.raises(OutputError, match="disk"):
        check_needs(work_out(huge, plan_of("int8")), tmp_path, plenty)


def test_what_is_written_beside_the_folder_is_counted(tmp_path: Path) -> None:
    shutil.copytree(SHAPES_SOURCE, tmp_path / "model")
    assert spooled(DiffusersFolder.open(tmp_path / "model"), "vae_decoder") == 0
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = open_tensors([weights])
    brain = {
        name: Tensor("BF16", tensor.shape, partial(np.zeros, tensor.shape, np.uint16))
        for name, tensor in tensors.items()
    }
    write_tensors(tmp_path / "brain.safetensors", brain)
    (tmp_path / "brain.safetensors").replace(weights)
    source = DiffusersFolder.open(tmp_path / "model")
    beside = spooled(source, "vae_decoder")
    assert beside == source.bytes_of("vae") > 0
    assert spooled(source, "unet") == 0
    step = Step("export", "vae_decoder", 10, 10**15)
    with pytest.raises(OutputError, match="disk"):
        check_needs(work_out([step], plan_of("fp16")), tmp_path, MemoryStatus(10**11, 10**11))


def test_what_json_does_not_hold_is_noticed() -> None:
    from sdvino.convert.request import to_plain

    assert to_plain({"a": (1, [2.5, None])}) == {"a": [1, [2.5, None]]}
    with pytest.raises(SdvinoError, match="Path"):
        to_plain({"path": Path()})
