"""Draw scenes with their captions into a folder, for the demo model's students to learn from.

    python scripts/draw_scenes.py build/scenes --count 4000

Each scene is NNNNNN.png, 128 x 128, with its caption in metadata.jsonl. Only combinations that the
demo model was trained on are drawn; those that its evaluation asks for are not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import scenes
from PIL import Image

#: Of the scenes; the demo model itself learnt from others.
SEED = 11


def draw_scenes(folder: Path, count: int, seed: int = SEED) -> None:
    """Write ``count`` scenes and metadata.jsonl into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        scene, prompt = scenes.sample_scene(rng)
        name = f"{i:06}.png"
        Image.fromarray(scenes.draw(scene)).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": prompt.text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    draw_scenes(options.folder, options.count, options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
