"""Other autoencoders in a source's place: every naming, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdvino.convert.replacements import replace_tiny_vae, replace_vae
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.weights.numbers import as_float32
from tests.convert import autoencoder_files as files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Edit = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def vae() -> Any:
    return files.kl()


@pytest.fixture(scope="module")
def tiny_vae() -> Any:
    return files.tiny()


@pytest.fixture
def opened(source: Path, edit: Edit) -> DiffusersFolder:
    """A source whose VAE is of Stable Diffusion's kind: 4 channels, an eighth of the size."""
    edit("vae/config.json", files.KL)
    return DiffusersFolder.open(source)


def loaded(source: DiffusersFolder, name: str) -> Any:
    """The autoencoder, its config and its tensors as diffusers takes them."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    cls: Any = AutoencoderTiny if name == "tiny_vae" else AutoencoderKL
    module = cls.from_config(dict(source.configs[name]))
    tensors = source.tensors(name)
    module.load_state_dict({n: torch.from_numpy(as_float32(t)) for n, t in tensors.items()})
    return module.eval()


def assert_same(found: Any, expected: Any) -> None:
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


def test_a_folder_is_used_where_it_stands(
    opened: DiffusersFolder, vae: Any, tmp_path: Path
) -> None:
    vae.save_pretrained(tmp_path / "sd-vae-ft-mse")
    replaced = replace_vae(opened, tmp_path / "sd-vae-ft-mse")
    assert replaced.folder("vae") == tmp_path / "sd-vae-ft-mse"
    assert replaced.folder("unet") == opened.path / "unet"
    assert replaced.configs["vae"]["layers_per_block"] == 2
    assert replaced.weights["vae"][0].parent == tmp_path / "sd-vae-ft-mse"
    assert_same(loaded(replaced, "vae"), vae)


def test_of_a_whole_pipeline_the_folder_inside(
    opened: DiffusersFolder, vae: Any, tmp_path: Path
) -> None:
    vae.save_pretrained(tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}", encoding="utf-8")
    replaced = replace_vae(opened, tmp_path / "pipe")
    assert replaced.folder("vae") == tmp_path / "pipe" / "vae"


@pytest.mark.parametrize(
    "naming", ["diffusers", "old diffusers", "bare", "prefixed", "checkpoint", "half"]
)
@pytest.mark.parametrize("attention", [True, False])
def test_single_files(
    opened: DiffusersFolder, tmp_path: Path, naming: str, attention: bool
) -> None:
    vae = files.kl(mid_block_add_attention=attention)
    if naming == "half":
        vae = vae.half()
    state = vae.state_dict()
    if naming == "diffusers":
        tensors = dict(state)
    elif naming == "old diffusers":
        tensors = files.to_old_diffusers(state)
    elif naming in ("bare", "half"):
        tensors = files.to_original(state) | {"loss.discriminator.weight": torch.ones(3)}
    else:
        tensors = files.to_original(state, "first_stage_model.")
    if naming == "checkpoint":
        tensors |= {"model.diffusion_model.out.2.weight": torch.ones(4), "alphas": torch.ones(9)}
    path = files.save(tmp_path / "a.safetensors", tensors)
    replaced = replace_vae(opened, path)
    assert {tensor.dtype for tensor in replaced.tensors("vae").values()} == {
        "F16" if naming == "half" else "F32"
    }
    module = loaded(replaced, "vae")
    assert_same(module, vae.float() if naming == "half" else vae)
    assert {name: module.config[name] for name in files.KL} == files.KL
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            module.encode(picture).latent_dist.mean, vae.encode(picture).latent_dist.mean
        )
    assert replace_vae(opened, path) == replaced


def test_the_scale_of_latents_stays_the_model_s(
    source: Path, edit: Edit, vae: Any, tmp_path: Path
) -> None:
    edit("vae/config.json", {**files.KL, "scaling_factor": 0.13025, "force_upcast": False})
    path = files.save(tmp_path / "sdxl_vae.safetensors", files.to_original(vae.state_dict()))
    replaced = replace_vae(DiffusersFolder.open(source), path)
    assert replaced.configs["vae"]["scaling_factor"] == 0.13025
    assert replaced.configs["vae"]["force_upcast"] is False


@pytest.mark.parametrize("form", ["folder", "file", "encoder", "decoder", "pair"])
def test_tiny_autoencoders(
    opened: DiffusersFolder, tiny_vae: Any, tmp_path: Path, form: str
) -> None:
    given = tmp_path / "given"
    encoder, decoder = files.taesd_halves(tiny_vae.state_dict())
    if form == "folder":
        tiny_vae.save_pretrained(given)
    elif form == "file":
        given = files.save(tmp_path / "taesd.safetensors", tiny_vae.state_dict())
    else:
        files.save(given / "taesd_encoder.safetensors", encoder)
        files.save(given / "taesd_decoder.safetensors", decoder)
        if form != "pair":
            given = given / f"taesd_{form}.safetensors"
    assert not opened.has_tiny_vae
    replaced = replace_tiny_vae(opened, given)
    assert replaced.components["tiny_vae"] == "tiny_vae"
    module = loaded(replaced, "tiny_vae")
    assert_same(module, tiny_vae)
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(module.decode(latents).sample, tiny_vae.decode(latents).sample)


def test_a_tiny_autoencoder_s_own_blocks_are_read_off_its_file(
    opened: DiffusersFolder, tiny_vae: Any, tmp_path: Path
) -> None:
    path = files.save(tmp_path / "taesd.safetensors", tiny_vae.state_dict())
    config = replace_tiny_vae(opened, path).configs["tiny_vae"]
    assert {name: config[name] for name in files.TINY} == files.TINY


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, "latents of 16 channels"),
        (
            {
                "block_out_channels": [8, 16, 16],
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
            },
            "1/4 of the picture's size",
        ),
    ],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_vae_of_another_family_is_refused(
    opened: DiffusersFolder, tmp_path: Path, changes: dict[str, Any], words: str, form: str
) -> None:
    vae = files.kl(**changes)
    given = tmp_path / "given"
    if form == "folder":
        vae.save_pretrained(given)
    else:
        given = files.save(tmp_path / "a.safetensors", files.to_original(vae.state_dict()))
    with pytest.raises(RequestError, match=words):
        replace_vae(opened, given)


def test_a_vae_whose_latents_have_another_scale_is_refused(
    opened: DiffusersFolder, tmp_path: Path
) -> None:
    files.kl(scaling_factor=0.13025).save_pretrained(tmp_path / "sdxl-vae")
    with pytest.raises(RequestError, match=r"by 0\.13025 and this model's by 0\.18215"):
        replace_vae(opened, tmp_path / "sdxl-vae")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, "latents of 16 channels"),
        (
            {
                "encoder_block_out_channels": [8, 8, 8],
                "decoder_block_out_channels": [8, 8, 8],
                "num_encoder_blocks": [1, 1, 1],
                "num_decoder_blocks": [1, 1, 1],
            },
            "1/4 of the picture's size",
        ),
    ],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_tiny_vae_of_another_family_is_refused(
    opened: DiffusersFolder, tmp_path: Path, changes: dict[str, Any], words: str, form: str
) -> None:
    tiny = files.tiny(**changes)
    given = tmp_path / "given"
    if form == "folder":
        tiny.save_pretrained(given)
    else:
        given = files.save(tmp_path / "a.safetensors", tiny.state_dict())
    with pytest.raises(RequestError, match=words):
        replace_tiny_vae(opened, given)


def missing_tensor(vae: Any, path: Path) -> None:
    tensors = files.to_original(vae.state_dict())
    del tensors["decoder.up.2.block.1.conv1.bias"]
    files.save(path, tensors)


def left_over(vae: Any, path: Path) -> None:
    files.save(path, files.to_original(vae.state_dict()) | {"decoder.extra": torch.ones(2)})


def other_shape(vae: Any, path: Path) -> None:
    tensors = files.to_original(vae.state_dict())
    tensors["decoder.up.2.block.1.conv1.bias"] = torch.ones(17)
    files.save(path, tensors)


def decoder_alone(vae: Any, path: Path) -> None:
    tensors = files.to_original(vae.state_dict())
    files.save(path, {n: value for n, value in tensors.items() if not n.startswith("encoder")})


def not_a_number(vae: Any, path: Path) -> None:
    tensors = files.to_original(vae.state_dict())
    tensors["decoder.conv_in.bias"] = torch.full((16,), float("nan"))
    files.save(path, tensors)


def cut(vae: Any, path: Path) -> None:
    files.save(path, files.to_original(vae.state_dict()))
    path.write_bytes(path.read_bytes()[:-4])


BAD: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "missing": (lambda vae, path: None, "does not exist"),
    "a LoRA": (lambda vae, path: files.save(path, {"a.alpha": torch.ones(1)}), "no AutoencoderKL"),
    "no weights": (lambda vae, path: files.save(path, {}), "empty"),
    "missing tensor": (missing_tensor, r"no whole AutoencoderKL.*\(decoder\.up_blocks"),
    "left over": (left_over, "no whole AutoencoderKL"),
    "other shape": (other_shape, "no whole AutoencoderKL"),
    "decoder alone": (decoder_alone, "no AutoencoderKL"),
    "NaN": (not_a_number, "NaN"),
    "cut": (cut, "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_a_sentence(
    opened: DiffusersFolder, vae: Any, tmp_path: Path, case: str
) -> None:
    write, words = BAD[case]
    path = tmp_path / "bad.safetensors"
    write(vae, path)
    with pytest.raises(RequestError, match=words) as caught:
        replace_vae(opened, path)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def pickled(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))


def config_with(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "no config.json"),
        (no_weights, "no .safetensors"),
        (pickled, "pickle"),
        (config_with(_class_name="AutoencoderTiny"), "--vae takes an AutoencoderKL"),
        (config_with(block_out_channels=4), "block_out_channels"),
        (config_with(block_out_channels=[1] * 99), "block_out_channels"),
        (config_with(latent_channels="four"), "latent_channels as four"),
        (config_with(layers_per_block=10**9), "layers_per_block"),
        (config_with(layers_per_block=3), "no whole autoencoder"),
        (config_with(mid_block_add_attention="yes"), "mid_block_add_attention"),
    ],
)
def test_bad_folders_get_a_sentence(
    opened: DiffusersFolder,
    vae: Any,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    vae.save_pretrained(tmp_path / "given")
    damage(tmp_path / "given")
    with pytest.raises(RequestError, match=words):
        replace_vae(opened, tmp_path / "given")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_pickles_are_never_opened(opened: DiffusersFolder, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\x80\x04.")
    for replace in (replace_vae, replace_tiny_vae):
        with pytest.raises(RequestError, match="pickle"):
            replace(opened, path)


def test_a_tiny_folder_whose_config_lies_is_refused(
    opened: DiffusersFolder, tiny_vae: Any, tmp_path: Path
) -> None:
    tiny_vae.save_pretrained(tmp_path / "given")
    for changes, words in (
        ({"num_decoder_blocks": [2, 1, 1]}, "different lengths"),
        ({"num_decoder_blocks": [2, 1, 1, 2]}, "no whole autoencoder"),
        ({"num_decoder_blocks": "many"}, "num_decoder_blocks as many"),
    ):
        config_with(**changes)(tmp_path / "given")
        with pytest.raises(RequestError, match=words):
            replace_tiny_vae(opened, tmp_path / "given")


def test_half_of_a_tiny_pair_is_refused(
    opened: DiffusersFolder, tiny_vae: Any, tmp_path: Path
) -> None:
    encoder, decoder = files.taesd_halves(tiny_vae.state_dict())
    lone = files.save(tmp_path / "taesd_decoder.safetensors", decoder)
    with pytest.raises(RequestError, match=r"taesd_encoder\.safetensors does not exist"):
        replace_tiny_vae(opened, lone)
    other = files.save(tmp_path / "x.safetensors", encoder)
    with pytest.raises(RequestError, match="side by side"):
        replace_tiny_vae(opened, other)
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    files.save(tmp_path / "taesd_encoder.safetensors", decoder)  # twice the same
    with pytest.raises(RequestError, match="AutoencoderTiny"):
        replace_tiny_vae(opened, lone)
