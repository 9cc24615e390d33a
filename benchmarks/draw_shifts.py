"""Draw docs/shifts.png: every shift at severities 1, 3 and 5 beside the original.

    python benchmarks/draw_shifts.py        # seconds; needs scikit-learn for the picture and SciPy

The picture is scikit-learn's sample image of a dahlia, cut to 224 x 224 pixels. Prints the size of the file.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from ttmpd.data.corruptions import CORRUPTIONS, corrupted

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "shifts.png"
SEVERITIES = (1, 3, 5)
BLOCKS = 2  # side by side, so that the sheet is not too tall
SIDE, SEEN, GAP, LABEL, HEADER = 224, 112, 4, 128, 22


def picture(name: str = "flower.jpg") -> np.ndarray:
    """(224, 224, 3) from the middle of the sample image."""
    image = Image.fromarray(load_sample_image(name))
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def draw(original: np.ndarray) -> Image.Image:
    rows = -(-len(CORRUPTIONS) // BLOCKS)
    width = LABEL + (1 + len(SEVERITIES)) * (SEEN + GAP)
    sheet = Image.new("RGB", (BLOCKS * width, HEADER + rows * (SEEN + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, name in enumerate(CORRUPTIONS):
        left, top = number // rows * width, HEADER + number % rows * (SEEN + GAP)
        pen.text((left + 6, top + SEEN // 2), name, "black", font, anchor="lm")
        tiles = {"original": original} | {f"severity {s}": corrupted(original, name, s) for s in SEVERITIES}
        for column, (title, tile) in enumerate(tiles.items()):
            at = left + LABEL + column * (SEEN + GAP)
            sheet.paste(Image.fromarray(tile).resize((SEEN, SEEN), Image.Resampling.BOX), (at, top))
            if number % rows == 0:
                pen.text((at + SEEN // 2, HEADER // 2), title, "black", font, anchor="mm")
    return sheet


def main() -> None:
    sheet = draw(picture())
    palette = sheet.quantize(256, kmeans=1)  # a third of the size in full color
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(OUTPUT, optimize=True)
    print(OUTPUT, f"{OUTPUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
