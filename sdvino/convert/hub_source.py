"""A model on the Hugging Face hub as the source of a conversion: what of it is downloaded.

Weights as safetensors, of one variant (half precision where there is one), configurations and
tokenizers. Pickles, code and weights for other libraries stay there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError
from sdvino.folder.hub import Hub, fetch, is_hub_id, list_files
from sdvino.folder.hub_files import check_size, is_cached, read_remote_header
from sdvino.weights.safetensors import PICKLES

_COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae",
    "vae_decoder",
    "vae_encoder",
    "tiny_vae",
)
_PARTS = "|".join(_COMPONENTS)
_CONFIGS = re.compile(
    rf"model_index\.json|sdvino\.json|calibration_prompts\.txt|(?:{_PARTS})/config\.json"
    r"|scheduler/scheduler_config\.json|tokenizer(?:_2)?/[A-Za-z0-9_-]+\.(?:json|txt)"
)
_WEIGHTS = re.compile(
    rf"({_PARTS})/(?:diffusion_pytorch_model|model)(\.fp16)?(?:-\d+-of-\d+)?(\.fp16)?\.safetensors"
    rf"|({_PARTS})/(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.fp16)?\.json"
)
_IR = re.compile(rf"(?:{_PARTS})/openvino_model\.(?:xml|bin)")
#: How the names of weights end.
_HEAVY = (".safetensors", ".bin")
_FILE_ID = re.compile(r"([^/]+/[^/]+)/(.+\.safetensors)")


def split_file(source: str) -> tuple[str, str | None]:
    """Return the hub id in ``source`` and the single file in it that it names, if it names one."""
    match = _FILE_ID.fullmatch(source)
    if match is None or not is_hub_id(match[1]) or ".." in match[2]:
        return source, None
    return match[1], match[2]


def is_hub_source(source: str) -> bool:
    """Tell whether ``source`` has the form owner/name, or owner/name/FILE.safetensors."""
    return is_hub_id(split_file(source)[0])


def download(source: str, hub: Hub) -> Path:
    """Return the folder, or the single file, of the model ``source`` on the hub.

    source: owner/name, or owner/name/FILE.safetensors. What is not there yet is downloaded, after
    ``hub.report`` was told how much it is; a download that was cut off is resumed.
    Raises ModelFolderError when there is nothing to convert, RequestError when it is too large,
    SdvinoError when the hub cannot be reached and nothing was downloaded before.
    """
    model, file = split_file(source)
    chosen: list[str] = []

    def choose(names: Sequence[str]) -> Sequence[str]:
        chosen[:] = choose_files(model, file, names)
        return chosen

    folder = fetch(model, choose, hub)
    if len(chosen) == 1 and chosen[0].endswith(".safetensors"):
        return folder / chosen[0]
    return folder


@dataclass(frozen=True, slots=True)
class Outline:
    """A model on the hub whose weights were not downloaded."""

    #: The folder of what is small: configurations, tokenizers, graphs.
    folder: Path
    #: The files of weights that converting reads -> bytes.
    weights: Mapping[str, int]
    #: Those of them that no earlier download left here.
    missing: frozenset[str]
    #: The header of a single file, as its JSON has it.
    header: Mapping[str, Any] | None = None

    @property
    def download(self) -> int:
        """Return the bytes that converting would download."""
        return sum(self.weights[name] for name in self.missing)

    def bytes_of(self, folder: str) -> int:
        """Return the bytes of the weights in a sub-folder."""
        return sum(size for name, size in self.weights.items() if name.startswith(f"{folder}/"))


def look_up(source: str, hub: Hub) -> Path | Outline:
    """Return what `download` would, without downloading weights; what is all here is a path.

    Of the model come its configurations and tokenizers, to the hub's cache; of a single file its
    header. Raises as `download` does.
    """
    model, file = split_file(source)
    listing = list_files(model, hub)
    if listing is None:  # only what is here can be looked at
        return download(source, replace(hub, max_download=None))
    chosen = choose_files(model, file, list(listing.sizes))
    # What converting would refuse is refused here.
    check_size(listing, (n for n in chosen if not is_cached(listing, n)), hub.max_download)
    heavy = {name: listing.most_bytes(name) for name in chosen if name.endswith(_HEAVY)}
    missing = frozenset(name for name in heavy if not is_cached(listing, name))
    # From here on the commit that was looked at is asked for: the revision may move on.
    hub = replace(hub, revision=listing.commit)
    if not missing:
        return download(source, hub)
    small = [name for name in chosen if name not in heavy]
    if not small:
        header = read_remote_header(listing, chosen[0])
        return Outline(Path(model), heavy, missing, header)
    folder = fetch(model, lambda names: small, hub)
    return Outline(folder, heavy, missing)


def choose_files(model: str, file: str | None, names: Sequence[str]) -> list[str]:
    """Return which of the files ``names`` of a repository are needed; raises ModelFolderError."""
    if file is not None:
        if file not in names:
            raise ModelFolderError(f"{model} has no file {file[:120]}; check the spelling.")
        return [file]
    if "model_index.json" in names:
        configs = [name for name in names if _CONFIGS.fullmatch(name) is not None]
        if "unet/openvino_model.xml" in names:
            return configs + [name for name in names if _IR.fullmatch(name) is not None]
        weights = _choose_weights(names)
        if "unet" in {name.partition("/")[0] for name in weights}:
            return configs + weights
    single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if len(single) == 1:
        return single
    if single:
        some = ", ".join(sorted(single)[:5])
        raise ModelFolderError(
            f"{model} holds several checkpoints ({some}); name one: {model}/{sorted(single)[0]}."
        )
    if any(name.endswith(PICKLES) for name in names):
        raise ModelFolderError(
            f"{model} holds its weights as pickles, which can run code when they are opened;"
            " look on the hub for the same model as safetensors."
        )
    raise ModelFolderError(
        f"{model} holds no Stable Diffusion model, or its download was cut off;"
        " run again with a connection, or choose another model."
    )


def _choose_weights(names: Sequence[str]) -> list[str]:
    """Return each component's safetensors, in half precision (as the IR is) where it has it."""
    result: list[str] = []
    for part in _COMPONENTS:
        files = [n for n in names if n.startswith(f"{part}/") and _WEIGHTS.fullmatch(n) is not None]
        half = [name for name in files if ".fp16" in name]
        plain = [name for name in files if ".fp16" not in name]
        whole = any(name.endswith(".safetensors") for name in half)
        result += half if whole else plain
    return result
