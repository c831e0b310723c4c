from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdvino.folder.index import ModelFolder
from sdvino.runtime.profile import (
    Fallback,
    Profile,
    ProfileKey,
    ProfileMemory,
    ProfileStore,
    TunedComponent,
    model_hash,
    profile_key,
)
from sdvino.runtime.properties import DeviceFacts, compile_properties, precision_in
from sdvino.runtime.topology import CpuReport
from sdvino.runtime.tuned import apply_profile, tuned_run
from sdvino.settings import DeviceSettings, RunSettings
from tests.tiny_folder import edit_json, make_tiny_folder

KEY = ProfileKey(machine="i7; 4+8 cores; Linux", openvino="2026.4", model="ab" * 32)
FALLBACK = Fallback(
    from_device="CPU", from_precision="bf16", device="CPU", precision="f32", why="it gave NaN"
)


def tuned(**settings: Any) -> TunedComponent:
    return TunedComponent(settings={"device": "CPU", **settings}, seconds=1.0, default_seconds=2.0)


PROFILE = Profile(
    key=KEY,
    name="shapes",
    tuned="2026-11-24",
    width=128,
    height=128,
    components={
        "unet": tuned(num_threads=6, core_type="any", precision="bf16"),
        "vae_decoder": tuned(num_threads=4),
    },
    guidance_mode="sequential",
    fallbacks={"vae_decoder": FALLBACK},
    trusted={"unet on GPU": "error 1.0e-03, 3.0 x the CPU"},
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "new" / "profiles")
    assert store.read(KEY, "shapes") == Profile(key=KEY, name="shapes")
    assert store.write(PROFILE)
    assert store.read(KEY) == PROFILE
    assert store.all() == [PROFILE]


@pytest.mark.parametrize("other", [{"machine": "i5"}, {"openvino": "2026.5"}, {"model": "cd" * 32}])
def test_another_machine_openvino_or_model_has_none(other: dict[str, str], tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    store.write(PROFILE)
    key = replace(KEY, **other)
    assert store.read(key) == Profile(key=key, name="")


def damaged(**changes: Any) -> str:
    return json.dumps({**json.loads(PROFILE.to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        damaged(format_version=2),
        damaged(key={"machine": "x"}),
        damaged(components={"unet": {}}),
        damaged(
            components={
                "unet": {"settings": {"cache_dir": "/"}, "seconds": 1, "default_seconds": 1}
            }
        ),
        damaged(
            components={
                "unet": {"settings": {"num_threads": -1}, "seconds": 1, "default_seconds": 1}
            }
        ),
        damaged(fallbacks={"unet": {"device": "CPU"}}),
        damaged(fallbacks=[]),
        damaged(guidance_mode="both"),
    ],
)
def test_a_damaged_profile_costs_the_profile_alone(text: str, tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    (tmp_path / KEY.file_name).write_text(text, encoding="utf-8")
    assert store.read(KEY) == Profile(key=KEY, name="")
    assert store.all() == []
    assert store.write(PROFILE)
    assert store.read(KEY) == PROFILE


def test_a_folder_that_cannot_be_written_costs_the_profile_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not ProfileStore(tmp_path / "file").write(PROFILE)


def test_memory_adds_to_what_another_process_wrote(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    first, second = (ProfileMemory(store, KEY, "shapes") for _ in range(2))
    first.remember("unet", FALLBACK)
    second.trust("unet", "GPU", "well")
    found = store.read(KEY)
    assert found.fallbacks == {"unet": FALLBACK}
    assert second.trusts("unet", "GPU")
    assert not second.trusts("unet", "GPU.1")


def test_the_key_follows_the_model(tmp_path: Path) -> None:
    path = make_tiny_folder(tmp_path / "model")
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    folder = ModelFolder.open(path)
    key = profile_key(folder)
    assert key == profile_key(ModelFolder.open(copy))  # wherever it lies
    assert key.machine
    assert key.openvino
    text = (copy / "sdvino.json").read_text(encoding="utf-8")
    (copy / "sdvino.json").write_text(text.replace('"tiny"', '"other"'), encoding="utf-8")
    assert model_hash(ModelFolder.open(copy)) != key.model
    (copy / "sdvino.json").unlink()
    without = model_hash(ModelFolder.open(copy))
    assert without == model_hash(ModelFolder.open(copy))
    assert without != key.model


OPEN = RunSettings(any_device=True)


def test_a_profile_fills_what_was_left_open() -> None:
    found = apply_profile(OPEN, PROFILE)
    unet = found.for_component("unet")
    assert (unet.num_threads, unet.core_type, unet.precision) == (6, "any", "bf16")
    assert found.guidance_mode == "sequential"
    assert found.for_component("vae_decoder").num_threads == 4
    # Parts that were not measured run where their neighbours do, in their own precision.
    assert found.for_component("tiny_vae").num_threads == 4
    text = found.for_component("text_encoder")
    assert (text.num_threads, text.precision) == (6, None)


@pytest.mark.parametrize(
    ("own", "threads", "precision"),
    [
        ({"num_threads": 2}, 2, "bf16"),
        # Measured together, so chosen together.
        ({"pinning": True}, None, "bf16"),
        ({"performance_hint": "throughput"}, None, "bf16"),
        ({"precision": "f32"}, 6, "f32"),
    ],
)
def test_what_the_user_chose_stands(
    own: dict[str, Any], threads: int | None, precision: str
) -> None:
    settings = RunSettings(default=DeviceSettings(**own), any_device=True)
    unet = apply_profile(settings, PROFILE).for_component("unet")
    assert (unet.num_threads, unet.precision) == (threads, precision)


def test_a_device_that_was_asked_for_stands() -> None:
    gpu = replace(
        PROFILE,
        components={
            "unet": TunedComponent(
                settings={"device": "GPU", "precision": "f16"}, seconds=1.0, default_seconds=2.0
            )
        },
    )
    assert apply_profile(OPEN, gpu).for_component("unet").device == "GPU"
    asked = RunSettings(default=DeviceSettings(device="CPU"))
    assert apply_profile(asked, gpu).for_component("unet") == DeviceSettings()
    assert apply_profile(asked, gpu).guidance_mode is None
    mixed = RunSettings(components={"vae": DeviceSettings(device="CPU", num_threads=1)})
    found = apply_profile(mixed, PROFILE)
    assert found.for_component("vae_decoder").num_threads == 1
    assert found.for_component("unet").num_threads == 6


def test_an_arithmetic_that_overflowed_since_is_not_used() -> None:
    since = replace(PROFILE, fallbacks={"unet": FALLBACK})
    unet = apply_profile(OPEN, since).for_component("unet")
    assert (unet.num_threads, unet.precision) == (6, None)


def test_an_empty_profile_changes_nothing() -> None:
    assert apply_profile(OPEN, Profile(key=KEY, name="x")) == OPEN


def test_a_damaged_profile_is_set_aside_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, path = ProfileStore(tmp_path), tmp_path / KEY.file_name
    path.write_text("[" * 100_000)
    for _ in range(2):
        assert store.read(KEY) == Profile(key=KEY, name="")
    assert caplog.text.count("was set aside") == 1
    assert [file.name for file in tmp_path.iterdir()] == [f"{path.stem}.damaged"]
    assert store.write(Profile(key=KEY, name="new"))
    assert store.read(KEY).name == "new"


def test_a_remembered_f32_stands_on_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an older sdvino wrote bf16 into the manifest, which nobody chose."""
    monkeypatch.setenv("SDVINO_CACHE_DIR", str(tmp_path / "cache"))
    path = make_tiny_folder(tmp_path / "model")
    stored = [{"device": "CPU", "kind": "amx", "precision": "bf16", "rewrites": []}]
    edit_json(path / "sdvino.json", accelerated=stored)
    folder = ModelFolder.open(path)
    store = ProfileStore()
    flags = frozenset({"avx2", "avx512_vnni", "amx_int8", "amx_bf16"})
    for module in ("profile", "core", "topology"):
        read_cpu = f"sdvino.runtime.{module}.read_cpu"
        monkeypatch.setattr(read_cpu, lambda: CpuReport(performance_cores=4, flags=flags))
    store.write(Profile(key=profile_key(folder), name="x", fallbacks={"unet": FALLBACK}))
    settings, guard = tuned_run(folder, OPEN)
    names = frozenset({"PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_PRECISION_HINT"})
    amx = DeviceFacts(supported=names, capabilities=frozenset({"FP32", "BF16"}), amx=True)

    def precision(part: str) -> str | None:
        chosen = guard.settings(part, settings.for_component(part))
        return precision_in(compile_properties(chosen, "CPU", {"CPU": amx}, part))

    assert precision("unet") == "f32"
    assert precision("vae_decoder") == "bf16"
