"""Samples → images: what torchvision makes of the same bytes, for every oddity of ImageNet."""

import contextlib
import io
import math
import random
import re
import statistics

import pytest
import torch
import torchvision.transforms as T
from PIL import Image

import imagenet_shards
from imagenet_shards import Index
from imagenet_train import LoaderConfig, decode, random_crop, resize_pixels, shorten_jpeg

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:Image size")]

SIZES = [(500, 375), (333, 500), (224, 224), (97, 1200), (1500, 60), (31, 33), (1, 1), (300, 226)]


def jpeg(width: int, height: int, mode: str = "RGB", form: str = "JPEG", **options) -> bytes:
    """A picture with soft and sharp parts."""
    noise = Image.frombytes("RGB", (9, 7), random.Random(width).randbytes(189)).resize((width, height), Image.BICUBIC)
    noise.paste((255, 0, 0), (width // 3, height // 3, width // 2, height // 2))
    buffer = io.BytesIO()
    noise.convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def run(data: bytes, size: int = 224, resize: int = 256, training: bool = False, seed: int = 0, epoch: int = 0,
        label: bytes = b"3", key: str = "k") -> tuple:
    """decode() of a sample of 10 classes."""
    config = LoaderConfig(Index("", [f"n{n}" for n in range(10)], [], []), training, 1, size, resize, seed=seed)
    return decode({"__key__": key, "__url__": "s.tar", "jpg": data, "cls": label}, config, epoch)


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size, resize", [(224, 256), (64, 72), (128, 128), (33, 47)])
def test_validation_is_torchvisions_resize_and_centercrop(width, height, size, resize):
    data = jpeg(width, height)
    pixels, label = run(data, size, resize)
    oracle = T.Compose([T.Resize(resize), T.CenterCrop(size), T.PILToTensor()])(Image.open(io.BytesIO(data)))
    assert label == 3 and pixels.dtype == torch.uint8 and torch.equal(pixels, oracle.permute(1, 2, 0))


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [224, 64])
def test_training_is_torchvisions_resized_crop_and_flip(width, height, size):
    data, flips = jpeg(width, height), set()
    for epoch in range(6):
        rng = random.Random(f"0/{epoch}/k")
        crop = Image.open(io.BytesIO(data)).crop(random_crop(width, height, rng)).resize((size, size), Image.BILINEAR)
        flips.add(flip := rng.random() < 0.5)
        oracle = crop.transpose(Image.FLIP_LEFT_RIGHT) if flip else crop
        pixels, _ = run(data, size, training=True, epoch=epoch)
        assert pixels.shape == (size, size, 3) and pixels.dtype == torch.uint8
        # Within 2 levels: Pillow keeps a box in float32.
        assert (pixels.int() - T.PILToTensor()(oracle).permute(1, 2, 0).int()).abs().max() <= 2
    assert flips == {True, False}


@pytest.mark.parametrize("width, height", [(500, 375), (97, 1200), (1500, 60), (31, 33)])
def test_crops_are_distributed_as_torchvisions(width, height):
    """Means and deviations of the boxes' area, shape and place, over 4,000 seeded draws of each."""
    torch.manual_seed(0)
    image, rng = Image.new("1", (width, height)), random.Random(0)
    theirs = [T.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours = [random_crop(width, height, rng) for _ in range(4000)]
    assert all(0 <= left < right <= width and 0 <= top < bottom <= height for left, top, right, bottom in ours)
    boxes = [(x, y, right - x, bottom - y) for x, y, right, bottom in ours], [(j, i, w, h) for i, j, h, w in theirs]
    features = (
        lambda x, y, w, h: w * h / width / height, lambda x, y, w, h: math.log(w / h),
        lambda x, y, w, h: (x + w / 2) / width, lambda x, y, w, h: (y + h / 2) / height,
    )  # fmt: skip
    for feature in features:
        a, b = ([feature(*box) for box in both] for both in boxes)
        error = 4 * statistics.pstdev(b) / math.sqrt(2000) + 1e-9  # four standard errors of the difference
        assert abs(statistics.fmean(a) - statistics.fmean(b)) <= error
        assert abs(statistics.pstdev(a) - statistics.pstdev(b)) <= error


# ---------------------------------------------------------------- shortened JPEGs

SCANS = {
    "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "4:2:0": {"subsampling": 2}, "greyscale": {"mode": "L"},
    "restarts": {"subsampling": 2, "restart_marker_blocks": 3}, "CMYK": {"mode": "CMYK"},
    "progressive": {"progressive": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
def test_a_jpeg_that_is_shortened_to_any_row_has_the_same_rows_above_it(name):
    data = jpeg(50, 70, quality=90, **SCANS[name])
    whole, left = Image.open(io.BytesIO(data)), name in ("greyscale", "CMYK", "progressive")  # these stay as they are
    for bottom in range(1, 71):
        file = io.BytesIO(data)
        image = shorten_jpeg(file, Image.open(file), bottom)
        assert image.size == (50, 70 if left or bottom > 64 else bottom + 2)
        assert image.crop((0, 0, 50, bottom)).tobytes() == whole.crop((0, 0, 50, bottom)).tobytes()


@pytest.mark.parametrize("end", [-2, -100, 300, 20, 2, 0])
def test_a_cut_jpeg_is_not_shortened(end):
    """Its crop may lie above the cut."""
    file = io.BytesIO(jpeg(50, 70)[:end])
    with contextlib.suppress(OSError):
        image = Image.open(file)
        assert shorten_jpeg(file, image, 20) is image
    results = [run(file.getvalue(), 32, training=True, seed=seed) for seed in range(9)]
    assert all(image is None and "s.tar: k: " in message for image, message in results)


def test_a_resized_crop_is_contiguous():
    """If torch did not see that it is channels_last, to resize and to stack it would take twice the time."""
    assert resize_pixels(torch.zeros(200, 300, 3, dtype=torch.uint8)[10:150, 20:220], 64).is_contiguous()


# ---------------------------------------------------------------- other images than RGB JPEGs

TURNED = Image.Exif()
TURNED[0x112] = 6
ODD = {
    "greyscale": jpeg(60, 50, "L"), "CMYK": jpeg(60, 50, "CMYK"), "PNG": jpeg(60, 50, form="PNG"),
    "PNG with alpha": jpeg(60, 50, "RGBA", "PNG"), "PNG with a palette": jpeg(60, 50, "P", "PNG"),
    "progressive": jpeg(60, 50, progressive=True), "4:4:4": jpeg(60, 50, subsampling=0, quality=96),
    "turned by EXIF, which torchvision ignores": jpeg(60, 50, exif=TURNED),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("training", [True, False])
def test_oddities_become_rgb_as_torchvision_loads_them(name, training):
    image, plain = Image.open(io.BytesIO(ODD[name])).convert("RGB"), io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(plain, "PNG")  # what torchvision's loader sees, no loss
    assert torch.equal(run(ODD[name], 32, 36, training)[0], run(plain.getvalue(), 32, 36, training)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_grey_png_of_16_bits_is_scaled_and_not_white(training):
    """As --resize does it."""
    grey, file = Image.linear_gradient("L").resize((60, 60)), io.BytesIO()
    Image.frombytes("I;16", (60, 60), b"".join(bytes([7, value]) for value in grey.tobytes())).save(file, "PNG")
    plain = io.BytesIO()
    grey.save(plain, "PNG")
    pixels, _ = run(file.getvalue(), 32, 36, training)
    assert (pixels.int() - run(plain.getvalue(), 32, 36, training)[0].int()).abs().max() <= 1
    resized = imagenet_shards.resize_image(file.getvalue(), 36, 95)
    assert (run(resized, 32, 36)[0].int() - run(plain.getvalue(), 32, 36)[0].int()).abs().float().mean() < 3


def test_the_crop_depends_on_seed_epoch_and_key_only():
    data, changes = jpeg(120, 90), ({}, {"label": b"4"}, {"seed": 1}, {"epoch": 1}, {"key": "l"})
    one, *others = (run(data, 32, training=True, **change)[0] for change in changes)
    assert [torch.equal(one, other) for other in others] == [True, False, False, False]


BAD = {
    "an empty image": {"data": b""}, "a text": {"data": b"<html>404</html>"}, "no label": {"label": b""},
    "a cut JPEG": {"data": jpeg(60, 50)[:-100]}, "a GIF": {"data": jpeg(60, 50, "P", "GIF")},
    "a label out of range": {"label": b"10"}, "a negative label": {"label": b"-1"},
    "108 megapixels": {"data": jpeg(12000, 9000, "1", "PNG")},
    "a pickle": {"data": b"cos\nsystem\n(S'touch boom'\ntR."},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_decoded_is_a_message_that_names_it(name, training):
    image, message = run(**{"data": jpeg(60, 50), "training": training} | BAD[name])
    assert image is None and re.fullmatch(r"s\.tar: k: .+", message)


def test_a_lack_of_memory_does_not_make_an_image_invalid(monkeypatch):
    def fail(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(imagenet_shards, "to_rgb", fail)
    with pytest.raises(MemoryError):
        run(jpeg(60, 50))
