import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

import demo_model  # noqa: E402
import train_autoencoder  # noqa: E402
import train_demo  # noqa: E402
import train_denoiser  # noqa: E402
from layout_labels import COUNTS, layout_labels  # noqa: E402
from muon import orthogonalize  # noqa: E402
from train_loop import Loop, Settings  # noqa: E402

# transformers builds CLIP's tokenizer in a way that tokenizers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MINIATURE = ["--device", "cpu", "--scenes", "32", "--batch", "8"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    demo_model.write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_a_caption_is_one_token(tokenizer: Any) -> None:
    rng = np.random.default_rng(31)
    for _ in range(200):
        text = scenes.sample_scene(rng)[1].text
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2


@pytest.mark.parametrize("text", ["a mauve dodecahedron!", "naïve 日本", "🎈", "1.5", ""])
def test_any_text_has_tokens_and_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_captions_fit(tokenizer: Any) -> None:
    ids = train_denoiser.tokenize(tokenizer, ["a red circle", ""])
    assert ids.shape == (2, demo_model.MAX_TOKENS)
    assert ids[1, 1:].unique().tolist() == [tokenizer.pad_token_id]


def test_crops_are_whole_latent_cells() -> None:
    pictures = train_autoencoder.draw_batch(np.random.default_rng(32), 4, train_autoencoder.CROP)
    assert pictures.shape == (4, train_autoencoder.CROP, train_autoencoder.CROP, 3)
    back = train_autoencoder.to_pictures(train_autoencoder.to_images(pictures, torch.device("cpu")))
    assert (back == pictures).all()


def test_weights_favour_the_noise_at_which_shapes_are_decided() -> None:
    alphas = train_denoiser.cumulative_alphas(torch.device("cpu"))
    weights = train_denoiser.min_snr_weights(alphas)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    snr = alphas / (1 - alphas)
    assert float(snr[weights.argmax()]) == pytest.approx(train_denoiser.MIN_SNR_GAMMA, rel=0.05)
    assert weights[0] < 0.05
    assert weights[-1] < 0.05


def test_timesteps_follow_their_density() -> None:
    alphas = train_denoiser.cumulative_alphas(torch.device("cpu"))
    density = train_denoiser.timestep_density(alphas)
    assert float(density.sum()) == pytest.approx(1)
    snr = alphas / (1 - alphas)
    assert float(density[snr < 0.3].sum()) > 0.3  # where the layout is settled
    assert float(density[snr > 1].sum()) > 0.3  # where outlines are
    rng = np.random.default_rng(33)
    drawn = np.concatenate(
        [train_denoiser.draw_timesteps(density, 64, rng).numpy() for _ in range(400)]
    )
    assert drawn.min() >= 0
    assert drawn.max() < len(alphas)
    share = np.bincount(drawn // 100, minlength=10) / len(drawn)
    assert share == pytest.approx(density.reshape(10, 100).sum(1).numpy(), abs=0.01)


def test_labels_of_a_layout_do_not_depend_on_how_it_is_put() -> None:
    star, ring = scenes.Wanted("red", "star", "big"), scenes.Wanted("blue", "ring")
    one = layout_labels(scenes.Prompt((star, ring), "black", relation="to the right of"))
    other = layout_labels(scenes.Prompt((ring, star), "black", relation="to the left of"))
    assert (one == other).all()
    assert (one != layout_labels(scenes.Prompt((star, ring), "black", relation="above"))).any()
    assert (one < np.array(COUNTS)).all()
    alone = layout_labels(scenes.Prompt((star,), None, position="at the top"))
    assert (alone[6:] == 0).all()
    assert alone[1] == 0


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_muon_makes_updates_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert float(singular.min()) > 0.5
    assert float(singular.max()) < 1.3


def fit(work: Path, stop_after: int | None = None, muon: bool = False) -> dict[str, Any]:
    """Fit a line for 20 steps, perhaps as if Ctrl-C came after some of them."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    loop = Loop(Settings("line", seconds=60, steps=20, warmup_steps=3, muon=muon), module, work)
    begun_at = loop.step

    def loss(step: int, rng: np.random.Generator, progress: float) -> Any:
        if stop_after is not None and step == begun_at + stop_after:
            import signal

            signal.raise_signal(signal.SIGINT)
        x = torch.from_numpy(rng.normal(size=(8, 3)).astype(np.float32))
        return (module(x + 0.1 * torch.randn(8, 3)) - x.sum(1, keepdim=True)).square().mean()

    loop.run(loss)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_loop_goes_on_to_the_same_weights(tmp_path: Path, muon: bool) -> None:
    whole = fit(tmp_path / "whole", muon=muon)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_after=7, muon=muon)
    resumed = fit(tmp_path / "cut", muon=muon)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def train(folder: Path, *more: str) -> None:
    arguments = ["--out", str(folder / "out"), "--work", str(folder / "work"), *MINIATURE, *more]
    train_demo.train(*train_demo.parse(arguments))


@pytest.mark.slow
def test_training_writes_a_pipeline_and_resumes(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline
    from safetensors.torch import load_file

    train(tmp_path / "whole", "--steps", "2")
    train(tmp_path / "parts", "--steps", "2", "--until", "autoencoder")
    train(tmp_path / "parts", "--steps", "2", "--until", "pool")
    train(tmp_path / "parts", "--steps", "2")
    out = tmp_path / "whole" / "out"
    for path in sorted(out.rglob("*.safetensors")):
        other = load_file(tmp_path / "parts" / "out" / path.relative_to(out))
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float16
            # The loop is exact; kernels on memory laid out otherwise are not.
            assert torch.allclose(tensor.float(), other[name].float(), atol=1e-3), name

    index = json.loads((out / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False
    pipe = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe("a red circle", num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 4, 16, 16)
    tiny = AutoencoderTiny.from_pretrained(out / "tiny_vae")
    assert tiny.decode(latents).sample.shape == (1, 3, 128, 128)
