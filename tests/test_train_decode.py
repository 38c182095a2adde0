"""JPEG bytes → uint8 crops: what torchvision makes of them, for every oddity of ImageNet."""

import io
import math
import random
import statistics

import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from imagenet_train import (
    Index,
    LoaderConfig,
    TrainError,
    center_crop,
    decode,
    jpeg_frame,
    random_crop,
    resize_pixels,
    shorten_jpeg,
)

pytestmark = pytest.mark.quick

SIZES = [(500, 375), (333, 500), (256, 256), (224, 224), (97, 1200), (1500, 60), (31, 33), (1, 1), (300, 226)]


def jpeg(width: int, height: int, mode: str = "RGB", form: str = "JPEG", **options) -> bytes:
    """A picture with soft and sharp parts."""
    noise = Image.frombytes("RGB", (9, 7), random.Random(width).randbytes(189)).resize((width, height), Image.BICUBIC)
    noise.paste((255, 0, 0), (width // 3, height // 3, width // 2, height // 2))
    buffer = io.BytesIO()
    noise.convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def sample(data: bytes, label: bytes = b"3", key: str = "k") -> dict:
    return {"__key__": key, "__url__": "s.tar", "jpg": data, "cls": label}


def run(item: dict, size: int = 224, resize: int = 256, training: bool = False, seed: int = 0, epoch: int = 0):
    index = Index("", [f"n{label}" for label in range(10)], [], [], [], [])
    return decode(item, LoaderConfig(index, training, 1, size, resize, seed=seed), epoch)


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size, resize", [(224, 256), (64, 72), (128, 128), (33, 47)])
def test_validation_is_torchvisions_resize_and_centercrop(width, height, size, resize):
    data = jpeg(width, height)
    oracle = T.Compose([T.Resize(resize), T.CenterCrop(size), T.PILToTensor()])(Image.open(io.BytesIO(data)))
    pixels, label = run(sample(data), size, resize)
    assert label == 3 and pixels.shape == (size, size, 3) and pixels.dtype == torch.uint8
    assert (pixels.int() - oracle.permute(1, 2, 0).int()).abs().max() <= 2  # Pillow keeps the box in float32


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [224, 64])
def test_training_is_torchvisions_resized_crop_and_flip(width, height, size):
    data, flips = jpeg(width, height), set()
    for epoch in range(6):
        pixels, _ = run(sample(data), size, training=True, epoch=epoch)
        rng = random.Random(f"0/{epoch}/k")
        crop = Image.open(io.BytesIO(data)).crop(random_crop(width, height, rng)).resize((size, size), Image.BILINEAR)
        flips.add(flip := rng.random() < 0.5)
        oracle = T.PILToTensor()(crop.transpose(Image.FLIP_LEFT_RIGHT) if flip else crop).permute(1, 2, 0)
        assert pixels.shape == (size, size, 3) and pixels.dtype == torch.uint8
        assert (pixels.int() - oracle.int()).abs().max() <= 2
    assert flips == {True, False}


@pytest.mark.parametrize("width, height", [(500, 375), (97, 1200), (1500, 60), (31, 33)])
def test_crops_are_distributed_as_torchvisions(width, height):
    """Means and deviations of the boxes' area, shape and place, over 4,000 seeded draws of each."""
    torch.manual_seed(0)
    image, rng = Image.new("1", (width, height)), random.Random(0)
    theirs = [T.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours = [random_crop(width, height, rng) for _ in range(4000)]
    for left, top, right, bottom in ours:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height

    def features(boxes):  # of (left, top, w, h): area, log ratio, centre
        yield [w * h / width / height for _, _, w, h in boxes]
        yield [math.log(w / h) for _, _, w, h in boxes]
        yield [(x + w / 2) / width for x, _, w, _ in boxes]
        yield [(y + h / 2) / height for _, y, _, h in boxes]

    boxes = [(x, y, r - x, b - y) for x, y, r, b in ours]
    for a, b in zip(features(boxes), features([(j, i, w, h) for i, j, h, w in theirs])):
        error = 4 * statistics.pstdev(b) / math.sqrt(2000) + 1e-9  # four standard errors of the difference
        assert abs(statistics.fmean(a) - statistics.fmean(b)) <= error
        assert abs(statistics.pstdev(a) - statistics.pstdev(b)) <= error


def test_the_box_in_validation_lies_within_the_image():
    for width, height in SIZES:
        left, top, right, bottom = center_crop(width, height, 224, 256)
        assert -1e-6 <= left < right <= width + 1e-6 and -1e-6 <= top < bottom <= height + 1e-6


SCANS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "restarts": {"subsampling": 2, "restart_marker_blocks": 3},
    "greyscale": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("name", SCANS)
def test_a_jpeg_that_is_to_shorten_jpeg_a_row_has_the_same_rows_above_it(name):
    data = jpeg(50, 70, quality=90, **SCANS[name])
    whole = Image.open(io.BytesIO(data))
    for bottom in range(1, 71):
        file, frame = io.BytesIO(data), jpeg_frame(data)
        assert (frame is None) == (name == "progressive") and (not frame or frame[:2] == (50, 70))
        if frame:
            shorten_jpeg(file, frame, bottom)
        image = Image.open(file)
        assert image.height == (70 if name == "progressive" else min(bottom + 2, 70))
        assert image.crop((0, 0, 50, bottom)).tobytes() == whole.crop((0, 0, 50, bottom)).tobytes()


@pytest.mark.parametrize("end", [-2, -100, 300, 20, 2, 0])
def test_a_cut_jpeg_is_decoded_whole(end):
    assert jpeg_frame(jpeg(50, 70)[:end]) is None


def test_a_scaled_crop_is_contiguous():
    """If torch did not see that it is channels_last, to resize and to stack it would take twice the time."""
    assert resize_pixels(torch.zeros(200, 300, 3, dtype=torch.uint8)[10:150, 20:220], 64).is_contiguous()


ODD = {
    "greyscale": jpeg(60, 50, "L"),
    "CMYK": jpeg(60, 50, "CMYK"),
    "PNG": jpeg(60, 50, form="PNG"),
    "PNG with alpha": jpeg(60, 50, "RGBA", "PNG"),
    "PNG with a palette": jpeg(60, 50, "P", "PNG"),
    "progressive": jpeg(60, 50, progressive=True),
    "4:4:4": jpeg(60, 50, subsampling=0, quality=96),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("training", [True, False])
def test_oddities_become_rgb_as_torchvision_loads_them(name, training):
    pixels, _ = run(sample(ODD[name]), 32, 36, training)
    plain = io.BytesIO()
    Image.open(io.BytesIO(ODD[name])).convert("RGB").save(plain, "PNG")  # what torchvision's loader sees, no loss
    assert torch.equal(pixels, run(sample(plain.getvalue()), 32, 36, training)[0])


def test_exif_orientation_is_left_alone_as_torchvision_does():
    exif = Image.Exif()
    exif[0x112] = 6
    assert torch.equal(run(sample(jpeg(60, 50, exif=exif)), 32, 36)[0], run(sample(jpeg(60, 50)), 32, 36)[0])


def test_the_crop_depends_on_seed_epoch_and_key_only():
    data = jpeg(120, 90)
    one = run(sample(data), 32, training=True)[0]
    assert torch.equal(one, run(sample(data), 32, training=True)[0])
    for other in ({"seed": 1}, {"epoch": 1}):
        assert not torch.equal(one, run(sample(data), 32, training=True, **other)[0])
    assert not torch.equal(one, run(sample(data, key="l"), 32, training=True)[0])


BAD = {
    "an empty image": sample(b""),
    "a text": sample(b"<html>404</html>"),
    "a cut JPEG": sample(jpeg(60, 50)[:-100]),
    "a GIF": sample(jpeg(60, 50, "P", "GIF")),
    "a label out of range": sample(jpeg(60, 50), b"10"),
    "a negative label": sample(jpeg(60, 50), b"-1"),
    "no label": sample(jpeg(60, 50), b""),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_decoded_is_named(name, training):
    with pytest.raises(TrainError, match=r"^s\.tar: k: ."):
        run(BAD[name], training=training)
