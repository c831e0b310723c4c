"""What the benchmarks choose: instruction set, cases, contenders, settings, what is prepared."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_cases import (
    CASES,
    CONTENDERS,
    SDVINO,
    ChoiceError,
    Contender,
    choose_cases,
    choose_contenders,
    formats_of,
    keeps_cache,
    make_job,
    missing_options,
    properties,
    runs_of,
)
from bench_machine import Isa, choose_isa, closure, installed_bytes
from bench_peers import make_bench, parser
from bench_prepare import Workshop, make_commands, missing, recipe_text

from sdvino.compress.recipe_file import from_toml, to_toml
from sdvino.compress.recipes import get_recipe
from sdvino.compress.targets import TARGETS

NATIVE = Isa("avx512-vnni", {}, None)
LAPTOP = Isa("avx2-vnni", {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, "f32")


def contender(name: str) -> Contender:
    return next(c for c in CONTENDERS if c.name == name)


def test_a_laptop_is_stood_in_for_where_there_is_vnni() -> None:
    isa = choose_isa("avx2-vnni", ("AVX2", "AVX-512", "AVX-VNNI", "AVX512-VNNI"))
    assert (isa.name, isa.precision, isa.note) == ("avx2-vnni", "f32", "")
    assert isa.label == "avx2-vnni as stand-in"
    assert isa.environment["ONEDNN_MAX_CPU_ISA"] == "AVX2_VNNI"


def test_vnni_among_avx_512_alone_stands_in_for_avx2() -> None:
    isa = choose_isa("avx2-vnni", ("AVX2", "AVX-512", "AVX512-VNNI"))
    assert (isa.name, isa.label, isa.precision) == ("avx2", "avx2 as stand-in", "f32")
    assert isa.environment["ONEDNN_MAX_CPU_ISA"] == "AVX2_VNNI"
    assert "AVX-512" in isa.note


def test_without_vnni_it_is_refused_and_said_what_was_used() -> None:
    isa = choose_isa("avx2-vnni", ("AVX2",))
    assert (isa.name, isa.label, dict(isa.environment), isa.precision) == ("avx2", "avx2", {}, None)
    assert "no VNNI" in isa.note
    assert "avx2" in isa.note


def test_the_native_instruction_set_is_a_target_of_convert() -> None:
    for names in ((), ("AVX2",), ("AVX2", "AVX-VNNI"), ("AVX512-VNNI", "AMX-INT8")):
        isa = choose_isa("native", names)
        assert isa.name in TARGETS
        assert not isa.note


def test_a_case_of_approximations_brings_the_exact_one() -> None:
    assert [case.name for case in choose_cases(["sd15-20-fast"])] == ["sd15-20", "sd15-20-fast"]
    fast = choose_cases(["sd15-20-fast"])[1]
    assert [c.name for c in runs_of(fast, CONTENDERS)] == ["sdvino"]
    with pytest.raises(ChoiceError, match="sd15-4"):
        choose_cases(["sd15-5"])


def test_every_approximation_is_compared_with_the_same_exact_work() -> None:
    known = {case.name: case for case in CASES}
    for case in CASES:
        assert (case.like is None) == (not case.speed)
        if case.like is not None:
            exact = known[case.like]
            assert (exact.arch, exact.side, exact.steps, exact.guidance) == (
                case.arch,
                case.side,
                case.steps,
                case.guidance,
            )


def test_who_takes_part() -> None:
    assert choose_contenders(None, isa=NATIVE, quick=False) == list(CONTENDERS)
    laptop = {c.name for c in choose_contenders(None, isa=LAPTOP, quick=False)}
    assert laptop == {c.name for c in CONTENDERS} - {"diffusers bf16"}
    named = choose_contenders(["optimum-intel full"], isa=NATIVE, quick=True)
    assert [c.name for c in named] == ["sdvino", "optimum-intel full"]
    with pytest.raises(ChoiceError, match="openvino-genai"):
        choose_contenders(["genai"], isa=NATIVE, quick=False)
    quick = choose_contenders(None, isa=NATIVE, quick=True)
    assert {c.group for c in quick} == {"sdvino", "default", "best", "torch"}
    assert len(quick) < len(CONTENDERS)


def test_settings_of_each_contender() -> None:
    assert properties(contender("optimum-intel"), NATIVE) == {}
    limited = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    assert properties(contender("optimum-intel"), LAPTOP) == limited
    assert properties(SDVINO, NATIVE) == {}
    assert properties(SDVINO, LAPTOP)["INFERENCE_PRECISION_HINT"] == "f32"
    tuned = properties(contender("openvino-genai full"), NATIVE)
    assert tuned == {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    # With AMX, and with AMD's AVX-512, OpenVINO's own bf16 is the fastest.
    for isa in (Isa("amx", {}, None), Isa("avx512-vnni", {}, None, fast_bf16=True)):
        assert "INFERENCE_PRECISION_HINT" not in properties(contender("openvino-genai full"), isa)
    assert properties(contender("diffusers f32"), LAPTOP) == {}
    assert keeps_cache(SDVINO)
    assert not keeps_cache(contender("openvino-genai"))


def test_a_job_is_the_same_work_for_everybody() -> None:
    case = choose_cases(["sd15-4-fast"])[1]
    jobs = [
        make_job(case, c, NATIVE, folder=Path(c.name), result=Path(), cache=Path("c"), pictures=1)
        for c in CONTENDERS
    ]
    assert {(job.width, job.height, job.steps, job.guidance) for job in jobs} == {(512, 512, 4, 1)}
    assert [dict(job.speed) for job in jobs if job.speed] == [dict(case.speed)]


def test_approximations_that_sdvino_lacks() -> None:
    case = choose_cases(["sd15-4-fast"])[1]

    def without(prompt: str) -> None: ...
    def having(prompt: str, speed: object = None) -> None: ...

    assert missing_options(case, without, set(case.speed)) == list(case.speed)
    assert missing_options(case, having, {"tiny_vae"}) == ["token_downsampling"]
    assert missing_options(case, having, set(case.speed)) == []
    assert missing_options(choose_cases(["sd15-4"])[0], without, ()) == []


def test_what_has_to_be_made(tmp_path: Path) -> None:
    shop = Workshop(root=tmp_path, isa="avx2")
    wanted = formats_of(choose_cases(["sd15-4"]), [SDVINO, contender("openvino-genai")])
    assert wanted == [("sd15", "sdvino"), ("sd15", "weights8")]
    assert missing(shop, wanted) == [("sd15", "source"), *wanted]
    (tmp_path / "sd15" / "sdvino-avx2").mkdir(parents=True)
    assert missing(shop, wanted) == [("sd15", "source"), ("sd15", "weights8")]
    (tmp_path / "sd15" / "weights8").mkdir()
    assert missing(shop, wanted) == []  # nothing is left to be made of the source
    assert missing(shop, [("sd15", "source")]) == [("sd15", "source")]
    given = Workshop(root=tmp_path, isa="avx2", sources={"sd15": tmp_path})
    assert missing(given, [("sd15", "source"), ("sd15", "hybrid")]) == [("sd15", "hybrid")]


def test_sdvino_converts_for_the_instruction_set(tmp_path: Path) -> None:
    shop = Workshop(root=tmp_path, isa="avx2-vnni")
    folder = shop.folder("sd15", "sdvino")
    assert folder.name == "sdvino-avx2-vnni"
    command = make_commands(shop, "sd15", "sdvino", folder)[-1]
    assert command[command.index("--target") + 1] == "avx2-vnni"


def test_sdvino_makes_the_peers_weights_where_they_cannot(tmp_path: Path) -> None:
    shop = Workshop(root=tmp_path, isa="avx2", exporter="sdvino")
    folder = shop.folder("sdxl", "weights8")
    assert folder != Workshop(root=tmp_path, isa="avx2").folder("sdxl", "weights8")
    (command,) = make_commands(shop, "sdxl", "weights8", folder)
    assert command[command.index("--recipe") + 1] == "int8-weights"
    (command,) = make_commands(shop, "sdxl", "hybrid", shop.folder("sdxl", "hybrid"))
    assert "convert" not in command
    words = ["--work", str(tmp_path), "--exporter", "sdvino", "--cases", "sdxl-4,sd15-4"]
    bench = make_bench(
        parser().parse_args([*words, "--peers", "openvino-genai,optimum-intel full"])
    )
    said = "openvino-genai ran 8-bit weights that sdvino's `int8-weights` made."
    assert bench.notes == {"sd15-4": [said], "sdxl-4": [said]}


def test_the_quick_recipe_differs_in_its_calibration_alone() -> None:
    recipe = get_recipe("int8")
    quick = from_toml(recipe_text(to_toml(recipe)))
    assert quick.components == recipe.components
    assert quick.calibration.samples == 2


def test_what_is_installed() -> None:
    assert {"numpy", "openvino"} <= closure(["sdvino"])
    assert not {"torch", "nncf"} & closure(["sdvino"])
    assert "nncf" in closure(["sdvino[convert]"])
    assert closure(["no-such-distribution"]) == set()
    assert installed_bytes(["numpy"]) > 10**6
