"""
Draws a small stand-in for ImageNet, in the tree that torchvision expects: python tests/standin.py DIR

Ten classes of textures, in DIR/train/<wnid>/<wnid>_<n>.JPEG and DIR/val/<wnid>/ILSVRC2012_val_<8 digits>.JPEG. The
first five images of each split are the odd ones that real ImageNet holds: a greyscale and a CMYK JPEG, a PNG named
.JPEG, a JPEG with an EXIF orientation tag, a progressive JPEG.

Guarantee: the same arguments give the same bytes (with the same Pillow). DIR is complete or absent; a complete one, of
which standin.json holds the arguments, is kept.
"""
import colorsys
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from PIL import ExifTags, Image, ImageDraw

WNIDS = {"n02128385": "leopard", "n02317335": "starfish", "n02391049": "zebra", "n02782093": "balloon",
         "n03000134": "chainlink fence", "n03447721": "gong", "n03530642": "honeycomb",
         "n04275548": "spider web", "n04326547": "stone wall", "n06785654": "crossword puzzle"}
# Hue, in turns of the colour wheel; then the distance across and down, the jitter, each odd row's shift,
# in steps. Neighbours in hue are far in texture.
LAYOUT = {"leopard": (0.6, 1, 1, 0.2, 0.5), "starfish": (0, 1.7, 1.7, 0.2, 0.5), "zebra": (0.2, 1, 1, 0, 0),
          "balloon": (0.9, 1.6, 1.6, 0.4, 0.5), "chainlink fence": (0.3, 1.2, 0.6, 0, 0.5),
          "gong": (0.5, 4, 4, 0.8, 0.5), "honeycomb": (0.1, 1.1, 0.95, 0, 0.5),
          "spider web": (0.7, 4, 4, 0.4, 0.5), "stone wall": (0.4, 2, 1, 0, 0.5),
          "crossword puzzle": (0.8, 1, 1, 0, 0)}
ODDITIES = ("L", "CMYK", "png", "exif", "progressive")  # of the first images of each split
TRAIN, VAL = 100, 30  # images per class
Colour = tuple[int, ...]


def ring(x: float, y: float, radii: list[float], turn: float = 0) -> list[tuple[float, float]]:
    """A closed polygon round (x, y): corners at equal angles, the k-th at distance radii[k]."""
    corners = [(r, turn + 2 * math.pi * k / len(radii)) for k, r in enumerate([*radii, radii[0]])]
    return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in corners]


def motif(draw: ImageDraw.ImageDraw, rng: Random, name: str, x: float, y: float, step: float,
          ink: Callable[[], Colour]) -> None:
    """One motif of a class at (x, y); every ink() is a slightly different shade."""
    match name:
        case "leopard":
            draw.polygon(ring(x, y, [step * rng.uniform(0.2, 0.45) for _ in range(7)]), ink())
        case "starfish":
            r = step * rng.uniform(0.7, 1.0)
            draw.polygon(ring(x, y, [r, 0.35 * r] * 5, rng.uniform(0, 2)), ink())
        case "zebra":  # the wave depends on y alone, so that the pieces of a stripe meet
            wave = [(x + 0.6 * step * math.sin(v / step), v) for v in range(int(y), int(y + step) + 3, 2)]
            draw.line(wave, ink(), int(0.45 * step))
        case "balloon":
            r = step * rng.uniform(0.8, 1.2)
            draw.circle((x, y), r, ink(), "black", 2)
            draw.circle((x - 0.4 * r, y - 0.4 * r), 0.2 * r, "white")
        case "chainlink fence":
            draw.line(ring(x, y, [0.6 * step] * 4), ink(), int(0.2 * step))
        case "gong":
            for r in (0.3, 0.9, 1.5, 2.1):
                draw.circle((x, y), r * step, None, ink(), int(0.3 * step))
        case "honeycomb":
            draw.line(ring(x, y, [0.64 * step] * 6, math.pi / 6), ink(), int(0.25 * step))
        case "spider web":
            for r in (0.5, 1, 1.5, 2):
                draw.line(ring(x, y, [r * step] * 9), ink(), 2)
            for end in ring(x, y, [2.3 * step] * 9):
                draw.line([(x, y), end], ink(), 2)
        case "stone wall":
            right = x + step * rng.uniform(1.5, 2)
            draw.rounded_rectangle((x, y, right - 3, y + step - 3), 4, ink())
        case "crossword puzzle":
            fill = ink() if rng.random() < 0.4 else None
            draw.rectangle((x, y, x + step, y + step), fill, ink(), 1)


def picture(rng: Random, kind: int) -> Image.Image:
    """A picture of the kind-th class. Its hue only hints at the class, as the greyscale one has none."""
    def shade(h: float, s: float, v: float) -> Colour:
        rgb = colorsys.hsv_to_rgb(h, s + rng.uniform(-0.15, 0.15), v + rng.uniform(-0.1, 0.1))
        return tuple(round(255 * c) for c in rgb)

    name = list(WNIDS.values())[kind]
    width, height = rng.randint(120, 260), rng.randint(120, 260)
    side = int(1.25 * max(width, height))  # leaves no empty corner after the turn below
    step, hue = rng.uniform(18, 32), LAYOUT[name][0] + rng.uniform(-0.04, 0.04)
    ink, ground = rng.choice([(0.6, 0.9), (0.9, 0.2)])  # dark on light, or light on dark
    canvas = Image.new("RGB", (side, side), shade(rng.random(), 0.2, ground))
    draw = ImageDraw.Draw(canvas)
    across, down, jitter, shift = (step * value for value in LAYOUT[name][1:])
    left, top = -across * rng.uniform(0.5, 1.5), -down * rng.uniform(0.5, 1.5)
    for row in range(int((side - top) / down) + 1):
        for col in range(int((side - left) / across) + 1):
            x = left + across * col + row % 2 * shift + rng.uniform(-jitter, jitter)
            y = top + down * row + rng.uniform(-jitter, jitter)
            motif(draw, rng, name, x, y, step, lambda: shade(hue, 0.75, ink))
    canvas = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    x, y = (side - width) // 2, (side - height) // 2
    grain = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    return Image.blend(canvas.crop((x, y, x + width, y + height)), grain, rng.uniform(0.02, 0.08))


def save(image: Image.Image, path: Path, rng: Random, oddity: str) -> None:
    options: dict[str, object] = {"quality": rng.randint(80, 96), "progressive": oddity == "progressive"}
    if oddity in ("L", "CMYK"):
        image = image.convert(oddity)
    else:
        options["subsampling"] = rng.choice(["4:4:4", "4:2:2", "4:2:0"])
    if oddity == "exif":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # to be shown a quarter turn from how it is stored
        options["exif"] = exif
    image.save(path, "PNG") if oddity == "png" else image.save(path, "JPEG", **options)


def make_tree(root: Path, train: int = TRAIN, val: int = VAL, seed: int = 0, classes: int = 10) -> None:
    """Make root: train and val images in each of the first `classes` classes."""
    recipe = {"train": train, "val": val, "seed": seed, "classes": classes}
    if min(train, val, classes) < 1 or classes > len(WNIDS):
        raise ValueError(f"{recipe} cannot be made; ask for 1 or more images of 1 to {len(WNIDS)} classes")
    mark = root / "standin.json"
    if mark.is_file() and json.loads(mark.read_text()) == recipe:
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError("holds something else; name a new folder, or remove this one first")
    root = root.resolve()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
        tree = Path(scratch) / root.name
        for split, per_class in (("train", train), ("val", val)):
            kinds = list(range(classes)) * per_class
            Random(f"{seed} {split}").shuffle(kinds)  # a number says nothing of the class
            for i, kind in enumerate(kinds, start=1):
                wnid, rng = list(WNIDS)[kind], Random(f"{seed} {split} {i}")
                name = f"{wnid}_{i}" if split == "train" else f"ILSVRC2012_val_{i:08d}"
                (tree / split / wnid).mkdir(parents=True, exist_ok=True)
                oddity = ODDITIES[i - 1] if i <= len(ODDITIES) else ""
                save(picture(rng, kind), tree / split / wnid / f"{name}.JPEG", rng, oddity)
        (tree / "standin.json").write_text(json.dumps(recipe) + "\n")
        tree.rename(root)  # also takes the place of an empty folder


if __name__ == "__main__":
    len(sys.argv) == 2 or sys.exit(__doc__)
    try:
        make_tree(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(f"standin.py DIR: {error}")
    print(f"{sys.argv[1]}: {10 * TRAIN} train and {10 * VAL} val images")
