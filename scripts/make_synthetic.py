"""Make a diffusers folder with random weights in a real architecture, offline.

    python scripts/make_synthetic.py --arch sd15|sdxl|tiny-sd15|tiny-sdxl|... OUT [--file FILE]

Speed, memory and conversion do not depend on what the weights are; pictures do, and are noise.
Weights are half-precision safetensors, written a shard at a time. The tiny ones are each family's
layout with narrow layers, for tests; scripts/synthetic_architectures.py lists them all. --file
writes the same once more as a checkpoint in the original layout, as people download it.
Needs torch, diffusers and transformers (pip install "sdvino[train]").
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import itertools
import json
import math
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from synthetic_architectures import ARCHITECTURES, VOCABULARY

SHARD_BYTES = 2 * 2**30
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make(arch: str, out: Path, seed: int = 0) -> None:
    """Write the folder ``out``, which must not exist or be empty, for ``arch``."""
    import torch

    plan = ARCHITECTURES[arch]
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, Any] = {"_class_name": plan["pipeline"], "_diffusers_version": "0.36.0"}
    for name, (library, class_name, config) in plan["components"].items():
        write_component(out / name, library, class_name, config, generator)
        index[name] = [library, class_name]
    for name, pad in plan["tokenizers"].items():
        write_tokenizer(out / name, pad)
        index[name] = ["transformers", "CLIPTokenizer"]
    write_json(out / "scheduler" / "scheduler_config.json", plan["scheduler"])
    index["scheduler"] = ["diffusers", plan["scheduler"]["_class_name"]]
    index.update(plan.get("index", {}))
    write_json(out / "model_index.json", index)


def write_single_file(folder: Path, arch: str, file: Path) -> None:
    """Write ``folder``, made for ``arch``, as the checkpoint ``file`` in the original naming."""
    from original_naming import original_state
    from safetensors.torch import load_file, save_file

    def load(part: Path) -> dict[str, Any]:
        return {k: v for f in sorted(part.glob("*.safetensors")) for k, v in load_file(f).items()}

    state = original_state(folder, ARCHITECTURES[arch], load)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def write_component(
    folder: Path, library: str, class_name: str, config: dict[str, Any], generator: Any
) -> None:
    """Write one component's config and random weights; only one shard is ever in memory."""
    import diffusers
    import torch
    import transformers

    folder.mkdir(parents=True)
    with torch.device("meta"):
        if library == "diffusers":
            module = getattr(diffusers, class_name).from_config(config)
            module.save_config(folder)
        else:
            text_config = transformers.CLIPTextConfig(**config)
            text_config.architectures = [class_name]
            module = getattr(transformers, class_name)(text_config)
            text_config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    write_weights(folder, stem, shapes, lambda name: random_tensor(name, shapes[name], generator))


def random_tensor(name: str, shape: tuple[int, ...], generator: Any) -> Any:
    """Return float16 weights in torch's default scale, so that activations neither grow nor die."""
    import torch

    if len(shape) < 2:
        value = 1.0 if name.endswith("weight") else 0.0  # norms; biases
        return torch.full(shape, value, dtype=torch.float16)
    embedding = "embedding" in name and "time" not in name and "add_" not in name
    deviation = 0.02 if embedding else 1 / math.sqrt(3 * math.prod(shape[1:]))
    return (torch.randn(shape, generator=generator) * deviation).to(torch.float16)


def write_weights(
    folder: Path,
    stem: str,
    shapes: dict[str, tuple[int, ...]],
    tensor: Callable[[str], Any],
) -> None:
    """Write float16 safetensors, in shards with an index when they are large."""
    from safetensors.torch import save_file

    shards = list(split(shapes))
    where = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{suffix}.safetensors"
        save_file({name: tensor(name) for name in names}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors are written for their owner alone
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(2 * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def split(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Group names so that each group's float16 tensors take at most SHARD_BYTES."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = 2 * math.prod(shape)
        if group and size + more > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write vocab.json and merges.txt of 49,408 entries: CLIP's own if open_clip is installed."""
    merges = clip_merges() or synthetic_merges()
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges), BOS, EOS]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != VOCABULARY:
        raise ValueError(f"the vocabulary has {len(vocab)} entries")
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**special, **config})


def clip_merges() -> list[tuple[str, str]]:
    """Return CLIP's merges from open_clip's copy, or none when open_clip is not installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return []
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[1 : VOCABULARY - 512 - 2 + 1]
    return [(left, right) for left, right in (line.split() for line in lines)]


def synthetic_merges() -> list[tuple[str, str]]:
    """Return valid merges of letters into pairs, triples and quadruples, as many as CLIP has."""
    letters = string.ascii_lowercase
    pairs = list(itertools.product(letters, letters))
    triples = [(a + b, c) for (a, b), c in itertools.product(pairs, letters)]
    merges = [*pairs, *triples]
    merges += [(left, right + "</w>") for left, right in merges]
    quadruples = ((a + b, c) for (a, b), c in itertools.product(triples, letters))
    return [*merges, *itertools.islice(quadruples, VOCABULARY - 512 - 2 - len(merges))]


def byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes in CLIP's vocabulary, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--file", type=Path, help="a checkpoint file to write as well")
    parser.add_argument("out", type=Path, help="the folder to make")
    options = parser.parse_args(arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} exists and is not an empty folder; choose another name")
    make(options.arch, options.out, options.seed)
    print(options.out)
    if options.file is not None:
        write_single_file(options.out, options.arch, options.file)
        print(options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
