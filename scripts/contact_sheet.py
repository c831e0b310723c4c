"""Draw the README's picture: `python scripts/contact_sheet.py` writes docs/demo.png.

Eight prompts, none of them chosen by looking: the first seeds, the demo model's own settings.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from sdvino import StableDiffusionPipeline

PROMPTS = (
    "a big red star on a blue background",
    "a small white heart on a purple background",
    "a green ring to the left of a yellow triangle on a black background",
    "a blue circle above a pink square on a white background",
    "a big orange cross on a green background",
    "a yellow diamond below a red ring on a cyan background",
    "a small black square to the right of a white circle on an orange background",
    "a pink heart on a black background",
)
COLUMNS = 4
SIDE, MARGIN, CAPTION = 192, 12, 40


def main() -> int:
    pipe = StableDiffusionPipeline.from_pretrained()
    pictures = pipe(list(PROMPTS), seed=0).images
    rows = -(-len(PROMPTS) // COLUMNS)
    cell = (SIDE + MARGIN, SIDE + CAPTION + MARGIN)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        x, y = MARGIN + i % COLUMNS * cell[0], MARGIN + i // COLUMNS * cell[1]
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + SIDE + 4), textwrap.fill(prompt, 32), fill="black")
    path = Path(__file__).resolve().parent.parent / "docs" / "demo.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, optimize=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
