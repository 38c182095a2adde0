"""Trains a ResNet on ImageNet from WebDataset shards, with PyTorch Lightning.

    python3 imagenet_train.py --shards=./data
    python3 imagenet_train.py --shards='pipe:curl -s http://localhost:8080/' --devices=8
    python3 imagenet_train.py --shards='pipe:gsutil cat gs://bucket/%s' --resume

In:  what imagenet_shards.py wrote, in a folder, at a URL, or behind a command that prints a file.
Out: checkpoints, logs and the trained weights in --output.

Guarantee: no sample is used twice in an epoch, and fewer than ranks x batch are left out; validation sees every sample
once. Every byte is checked before it is used. A run that is killed and resumed makes the same batches; with other
settings (ranks, workers, batch size), the rest of the epoch. The default recipe is NVIDIA's (77.1 % top-1).

The pipeline that WebDataset's documentation teaches is

    wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node)
        .shuffle(2000).decode("pil").to_tuple("jpg", "cls").map_tuple(augment, int).batched(256)

make_pipeline() below has the same stages. tar_file_expander, group_by_keys, map and batched are WebDataset's. Replaced:

| stage of WebDataset | here | what WebDataset's does |
|---|---|---|
| urls, shardshuffle, split_by_node | list_blocks | ranks get unequal numbers of batches; the last one waits for ever |
| url_opener | open_blocks | a stream that ends early between two members is taken for complete |
| shuffle | in_order | a run that is interrupted cannot continue with the same batches |
| decode("pil") | decode | unpickles .pyd members, which runs their code; an image takes twice the time |
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import struct
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # until end_on_signals() is known, ^C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import imagenet_shards as shards
from imagenet_shards import Index, PermanentError, UserError, count, printable, read_index, reason, warn


def newest_checkpoint(output: Path) -> Path | None:
    """The last.ckpt below --output that was written last."""
    return max(output.glob("version_*/last.ckpt"), key=os.path.getmtime, default=None)


def resume_hint() -> str:
    """What rank 0 says when a signal ends the run: the checkpoint from which --resume continues."""
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        return ""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output", type=shards.path_arg, default="./output")
    newest = newest_checkpoint(parser.parse_known_args()[0].output)
    return f"--resume continues from {newest}" if newest else "there is no checkpoint yet"


if __name__ == "__main__":  # before the following imports, which take seconds
    shards.end_on_signals(resume_hint)
    if "LOCAL_RANK" in os.environ:  # torchrun or rank 0 started this rank
        shards.end_with_parent()

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
import webdataset as wds
from PIL import Image, ImageDraw
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

# ---------------------------------------------------------------- the pipeline
# The table of contents: its stages are defined below, in its order. To train on other data, change decode().


def make_pipeline(
    config: LoaderConfig, epoch: int, history: list[Division], worker: int, collate: Collate, cache_full: Event
) -> wds.DataPipeline:
    """The batches that one loader process makes of the rest of an epoch, as stages of WebDataset."""
    index = config.index
    order, blocks, steps = plan_reader(config, epoch, history, worker)
    open_blocks = partial(
        shards.open_blocks, index=index, retry_for=config.retry_for, timeout=config.timeout, cache=config.cache,
        cache_full=cache_full,
    )
    return wds.DataPipeline(
        partial(list_blocks, blocks, index),  #                   ours         {"url", "block"}
        open_blocks,  #                                           ours         {"url", "stream"}, complete and checked
        tar_file_expander,  #                                     WebDataset   {"fname", "data", "__url__"}
        group_by_keys,  #                                         WebDataset   {"__key__", "jpg", "cls"}
        partial(in_order, order=order, index=index),  #           ours         the same, shuffled
        wds.map(partial(decode, config=config, epoch=epoch)),  #  WebDataset   (uint8 [S, S, 3], label)
        wds.batched(config.batch, collation_fn=collate),  #       WebDataset   [uint8 [B, S, S, 3], labels, errors]
        partial(pad, steps=steps, config=config),  #              ours         as many batches on every rank
    )


# ---------------------------------------------------------------- order of an epoch
# The order of an epoch is a pure function of index, seed and settings. Every process computes the whole order and takes
# its part; a resumed run also computes what was used.


class Division(NamedTuple):
    """How the samples of an epoch, or those left of it, are divided among ranks and their workers.

    An epoch has several if a run was resumed within it with other settings; a checkpoint holds their list.
    """

    seekable: bool  # blocks are permuted; or shards, whose blocks stay in order
    world: int  # ranks
    workers: int  # loader processes of a rank, at least 1
    batch: int  # samples a rank and step
    shuffle: int  # samples by which the shuffle may delay a sample
    done: int = 0  # batches that every rank has made


@dataclass(frozen=True)
class LoaderConfig:
    """All that decides which batches one rank gets, and how."""

    index: Index
    training: bool
    batch: int  # images a rank and step
    size: int  # pixels, side of the crop
    resize: int = 256  # pixels, shorter side before the crop; validation only
    shuffle: int = 0  # samples by which the shuffle may delay a sample
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0  # loader processes of this rank; 0: the main process reads
    retry_for: float = 300  # seconds for which a failing read is repeated
    timeout: float = 60  # seconds without a byte after which a read fails
    cache: Path | None = None  # folder for blocks that were read
    epochs: float = math.inf  # of the run: blocks of later ones are not read in advance
    max_bad: int = 0  # undecodable images a rank and epoch that are not an error
    pin: bool = False  # batches are copied into pinned memory, for a CUDA device

    @property
    def division(self) -> Division:
        return Division(self.index.seekable, self.world, max(1, self.workers), self.batch, self.shuffle)


def count_steps(left: int, training: bool, division: Division) -> int:
    """Batches that every rank makes of `left` samples: in training full ones, or a single one that is filled up."""
    full = left // (division.world * division.batch)
    return full if training and full else math.ceil(math.ceil(left / division.world) / division.batch)


def count_batches(config: LoaderConfig, history: Sequence[Division]) -> int:
    """Batches that every rank makes under the last of an epoch's divisions, those done included."""
    used = sum(division.done * division.world * division.batch for division in history[:-1])
    return count_steps(max(0, config.index.total - used), config.training, history[-1])


def permute_blocks(index: Index, training: bool, seekable: bool, seed: int, epoch: int) -> np.ndarray:
    """int64 [blocks]: the order in which an epoch's blocks are divided. Validation does not permute them."""
    unit = np.arange(len(index.blocks)) if seekable else np.array([block.shard for block in index.blocks])
    # RandomState's numbers are the same in all versions of numpy; those of a Generator are not.
    position = np.random.RandomState([seed, epoch]).permutation(unit[-1] + 1) if training else np.arange(unit[-1] + 1)
    return np.argsort(position[unit], kind="stable")


def divide(line: np.ndarray, training: bool, division: Division, random_state: np.random.RandomState) -> np.ndarray:
    """Divide a line of sample numbers among ranks, workers and steps: int64 [world, steps, batch], −1 for no sample.

    Each rank gets a run of the line, each of its workers a run of whole batches of that, in which sample i moves to the
    place that i + shuffle × U(0, 1) has among these keys: no sample moves by more than `shuffle`, which bounds what a
    worker holds.
    """
    _, world, workers, batch, shuffle, _ = division
    steps = count_steps(len(line), training, division)
    ends = np.arange(world + 1) * (steps * batch)
    if not training or len(line) < world * batch:  # equal parts, the first ones longer
        ends = -(-np.arange(world + 1) * len(line) // world)
    plan = np.full((world, steps * batch), -1)
    for rank in range(world):
        samples = line[ends[rank] : ends[rank + 1]]
        plan[rank, : len(samples)] = samples
    # The DataLoader takes batches from workers in turn: step s is made by worker s % workers.
    turns = np.argsort(np.arange(steps) % workers, kind="stable")  # the steps, worker by worker
    worker = np.repeat(turns % workers, batch)
    key = np.arange(steps * batch) + shuffle * (worker + random_state.random_sample(plan.shape))  # keeps runs apart
    order = np.argsort(np.where(plan < 0, np.inf, key), axis=1, kind="stable")
    batches = np.empty((world, steps, batch), np.int64)
    batches[:, turns] = np.take_along_axis(plan, order, axis=1).reshape(world, steps, batch)
    return batches


def plan_epoch(
    index: Index, training: bool, seed: int, epoch: int, history: Sequence[Division]
) -> tuple[np.ndarray, np.ndarray]:
    """The order under the last of an epoch's divisions, and what all of them have used.

    Returns int64 [world, steps, batch], the numbers of the samples, −1 for none; and bool [samples].
    """
    used = np.zeros(index.total, bool)
    for number, division in enumerate(history):
        blocks = permute_blocks(index, training, division.seekable, seed, epoch)
        sizes = np.diff(index.starts)[blocks]
        line = np.arange(index.total) + np.repeat(index.starts[blocks] - np.cumsum(sizes) + sizes, sizes)
        plan = divide(line[~used[line]], training, division, np.random.RandomState([seed, epoch, number]))
        done = plan[:, : division.done]
        used[done[done >= 0]] = True
    return plan, used


def plan_reader(
    config: LoaderConfig, epoch: int, history: Sequence[Division], worker: int
) -> tuple[list[int], list[int], int]:
    """What one loader process does in the rest of an epoch.

    Returns the numbers of its samples in the order of use, the blocks that hold them in the order of fetching, and its
    number of batches. Blocks are fetched in the order in which they were divided, which for a command is forwards.
    """
    index, last = config.index, history[-1]
    plan, _ = plan_epoch(index, config.training, config.seed, epoch, history)
    batches = plan[config.rank, last.done + (worker - last.done) % last.workers :: last.workers]
    order = batches[batches >= 0]
    needed = np.zeros(len(index.blocks), bool)
    needed[np.searchsorted(index.starts, order, side="right") - 1] = True
    blocks = permute_blocks(index, config.training, last.seekable, config.seed, epoch)
    return order.tolist(), blocks[needed[blocks]].tolist(), len(batches)


# ---------------------------------------------------------------- blocks → samples
# Stages: webdataset calls each with the iterator of the one before.


def list_blocks(blocks: list[int], index: Index) -> Iterator[dict[str, Any]]:
    """{"url", "block"} of each block. The url is the shard's name with the block's number: it gets into each sample."""
    for block in blocks:
        yield {"url": f"{index.shards[index.blocks[block].shard]['url']}#{block}", "block": block}


def number_samples(samples: Iterable[dict[str, Any]], index: Index) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, sample) of each sample. PermanentError if a block holds others than the index lists."""
    block, number, url = -1, 0, "the first block"
    try:
        for sample in samples:
            if sample["__url__"] != url:
                if number != index.starts[block + 1]:
                    raise ValueError(f"fewer samples than the {index.blocks[block].samples} that the index lists")
                url = sample["__url__"]
                block = int(url.rpartition("#")[2])
                number = int(index.starts[block])
            if number == index.starts[block + 1]:
                raise ValueError(f"more samples than the {index.blocks[block].samples} that the index lists")
            if "cls" not in sample or not sample.keys() & {*shards.IMAGES}:
                raise ValueError(f"sample {sample['__key__']!a} has no image or no cls")
            yield number, sample | {"__url__": url.rpartition("#")[0]}
            number += 1
        raise ValueError("fewer samples than the index lists")  # not reached while they are complete
    except UserError:
        raise
    except Exception as error:  # of many kinds; WebDataset adds arguments to them
        place, problem = url.replace("#", ", block "), reason(Exception(*error.args[:1]))
        raise PermanentError(f"{place}: {problem}; make the index again") from None


def in_order(samples: Iterable[dict[str, Any]], order: list[int], index: Index) -> Iterator[dict[str, Any]]:
    """The samples with these numbers, in this order. Others are dropped; a sample is held until its turn."""
    numbered, due = number_samples(samples, index), set(order)
    held: dict[int, dict[str, Any]] = {}
    for number in order:
        while number not in held:
            found, sample = next(numbered)
            if found in due:
                held[found] = sample
        yield held.pop(number)


# ---------------------------------------------------------------- samples → images
# From here to the device an image is uint8 [S, S, 3], as Pillow makes it: a quarter of float32's bytes to copy, and a
# permuted view of it is the channels_last tensor that GPUs prefer.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]; torchvision's constants
IGNORE_INDEX = -1  # label of a row that does not count: padding, or an image that could not be decoded


def random_crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom as torchvision's RandomResizedCrop draws them: 8–100 % of the area, 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # too long or too tall: the middle
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_crop(width: int, height: int, size: int, resize: int) -> tuple[float, float, float, float]:
    """The box, in the image's own pixels, that torchvision's Resize(resize) and CenterCrop(size) leave."""
    short = min(width, height)
    w, h = int(resize * width / short), int(resize * height / short)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return left * width / w, top * height / h, (left + size) * width / w, (top + size) * height / h


def jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, position of the height's two bytes) of a JPEG in one scan, as nearly all are, from its header.

    None for others: progressive, incomplete or damaged files, other formats, and more pixels than Pillow allows.
    """
    at, frame = 2, None
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-1024:]:
        return None
    while at + 10 <= len(data) and data[at] == 0xFF != data[at + 1]:  # ITU T.81, B.1: marker, length, content
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1):  # the header of a sequential image
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            frame = (width, height, at + 5) if 0 < width * height <= Image.MAX_IMAGE_PIXELS else None
        if marker == 0xDA:  # pixels begin; in one scan, if it has all components
            return frame if frame and data[at + 4] == components else None
        at += 2 + length
    return None


def shorten_jpeg(file: io.BytesIO, frame: tuple[int, int, int], bottom: int) -> None:
    """Write a smaller height into a JPEG's header, so that its decoder stops soon below row `bottom`.

    The rows above it are decoded alike. On average a seventh of an image's rows are below its crop.
    """
    _, height, height_at = frame
    if bottom + 2 < height:  # 2 more: the last rows' colours are interpolated from both sides
        file.seek(height_at)
        file.write((bottom + 2).to_bytes(2, "big"))


def resize_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] → uint8 [size, size, 3], within 2 levels of Pillow's bilinear filter, in half of its time."""
    # Torch resizes bytes without repacking them, and keeps them so, if the strides, the batch's too, say channels_last.
    batch = pixels[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's, of bytes that nobody writes to


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [H, W, 3]."""
    return torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(image.height, image.width, 3)


def sample_rng(sample: dict[str, Any], config: LoaderConfig, epoch: int) -> random.Random:
    """What draws a sample's augmentation: a function of (seed, epoch, key)."""
    return random.Random(f"{config.seed}/{epoch}/{sample['__key__']}")


def train_image(data: bytes, config: LoaderConfig, rng: random.Random) -> torch.Tensor:
    """A random crop, mirrored at random: uint8 [size, size, 3].

    Another augmentation goes here. Draw its parameters from `rng`, which is sample_rng()'s: then an image gets the same
    ones whoever decodes it, also after a resume.
    """
    file, frame = io.BytesIO(data), jpeg_frame(data)
    width, height = frame[:2] if frame else shards.open_image(file).size  # 0.03 ms more
    box = random_crop(width, height, rng)
    if frame:
        shorten_jpeg(file, frame, box[3])
    pixels = resize_pixels(pixels_of(shards.to_rgb(shards.open_image(file)).crop(box)), config.size)
    return pixels.flip(1) if rng.random() < 0.5 else pixels


def val_image(data: bytes, config: LoaderConfig) -> torch.Tensor:
    """The image's middle, as torchvision's Resize and CenterCrop make it: uint8 [size, size, 3]."""
    image = shards.to_rgb(shards.open_image(io.BytesIO(data)))
    box = center_crop(*image.size, config.size, config.resize)
    return pixels_of(image.resize((config.size, config.size), Image.Resampling.BILINEAR, box=box))


def decode(sample: dict[str, Any], config: LoaderConfig, epoch: int) -> tuple[torch.Tensor | None, int | str]:
    """One sample as (uint8 [size, size, 3], label), or as (None, message) if it can't be decoded.

    For another data set change how the two are read from the sample.
    """
    try:
        label = int(sample["cls"])
        if not 0 <= label < len(config.index.classes):
            raise ValueError(f"label {label}, but the index has {count(len(config.index.classes), 'class')}")
        data = shards.image_bytes(sample)
        if config.training:
            return train_image(data, config, sample_rng(sample, config, epoch)), label
        return val_image(data, config), label
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds on bad bytes
        return None, f"{sample['__url__']}: {sample['__key__']}: {reason(error)}"


# ---------------------------------------------------------------- images → batches


SHM_FULL = "/dev/shm is full; give it more (docker run --shm-size, shm in config.sh), or use fewer --workers"


class Collate:
    """Decoded samples as one batch: [images uint8 [B, S, S, 3], labels: list of int, error messages: list of str].

    A batch always has B rows. Rows that are missing, or could not be decoded, have the label −1 and the pixels of the
    first good row, because batch normalisation sees them. UserError if there is no good row.

    In a loader process the images lie in buffers that it shares with the main process and uses in turn: fresh memory
    would cost as much time as resizing. The DataLoader lets a process make two batches ahead. If these are copied into
    pinned memory, two buffers are enough; with four, the last two batches that were handed out stay valid.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.shape = config.batch, config.size, config.size, 3
        self.buffers: deque[torch.Tensor] = deque(maxlen=0 if get_worker_info() is None else 2 if config.pin else 4)

    def buffer(self) -> torch.Tensor | None:
        """uint8 [B, S, S, 3] in shared memory, the one that was used the longest time ago; None in the main process."""
        if len(self.buffers) == self.buffers.maxlen:
            self.buffers.rotate(-1)
        else:
            try:
                self.buffers.append(torch.empty(self.shape, dtype=torch.uint8).share_memory_())
            except RuntimeError:
                raise UserError(SHM_FULL) from None
        return self.buffers[-1] if self.buffers else None

    def __call__(self, samples: list[tuple[torch.Tensor | None, int | str]]) -> list:
        errors = [error for image, error in samples if image is None]
        good = next((image for image, _ in samples if image is not None), None)
        if good is None:
            raise UserError(f"none of {count(len(samples), 'image')} of a batch can be decoded: {errors[0]}")
        rows = samples + [(None, "")] * (self.shape[0] - len(samples))
        images = [good if image is None else image for image, _ in rows]
        labels = [IGNORE_INDEX if image is None else label for image, label in rows]
        return [torch.stack(images, out=self.buffer()), labels, errors]  # a tensor of labels would need shared memory


def pad(batches: Iterable[list], steps: int, config: LoaderConfig) -> Iterator[list]:
    """The batches, then as many of rows that do not count as make `steps`, because other ranks have more."""
    for batch in batches:
        yield batch
        steps -= 1
    for _ in range(steps):
        images = torch.zeros(config.batch, config.size, config.size, 3, dtype=torch.uint8)
        yield [images, [IGNORE_INDEX] * config.batch, []]


class EpochDataset(IterableDataset):
    """One rank's batches, from within an epoch to the end of the run. Each loader process makes its share."""

    def __init__(self, config: LoaderConfig, epoch: int, history: list[Division], cache_full: Event) -> None:
        self.config, self.epoch, self.history, self.cache_full = config, epoch, history, cache_full

    def __iter__(self) -> Iterator[list | UserError]:
        config, info, history = self.config, get_worker_info(), self.history
        collate = Collate(config)
        # The DataLoader takes batches from its processes in turn and does not start over with an epoch: batch `turn` of
        # the epoch, modulo workers, comes from process 0.
        turn = history[-1].done
        for epoch in itertools.count(self.epoch) if config.training else [0]:
            if epoch >= config.epochs:
                return
            worker = ((info.id if info else 0) + turn) % max(1, config.workers)
            try:
                yield from make_pipeline(config, epoch, history, worker, collate, self.cache_full)
            except UserError as error:  # handed over like a batch: the DataLoader would make a page of traceback of it
                yield error
                return
            turn -= count_batches(config, history)
            history = [config.division]


# ---------------------------------------------------------------- batches, epoch after epoch
# Training's loader processes live for the whole run and go on into the next epoch while validation runs. Validation's
# are started for each validation and end with it.

# Not Python's default: under forkserver (Python 3.14) a SIGTERM to the process group kills the loader processes.
START_METHOD = "fork" if sys.platform == "linux" else None
# Seconds without a batch, beside those for which a read is retried, after which a loader process is taken to hang.
HANG_TIMEOUT = 1200


def start_worker(worker: int) -> None:
    """In a loader process: end with the main process, and not with it on ^C or a SIGTERM to its group."""
    os.setpgrp()
    shards.end_with_parent()
    sys.excepthook = lambda *_: None  # a thread that hands over memory would print that the main process has ended


class Loader:
    """One rank's batches, an epoch for each iter(): [images uint8 [B, S, S, 3], labels int64 [B], −1: does not count].

    The memory of images is used again: a batch and the one before stay valid, clone what is to be kept longer.

    It keeps its own epoch and position, because Lightning calls iter() before it knows the epoch, and more than once:
    nothing happens before a batch is asked for. A checkpoint has rank 0's state_dict(), which is every rank's.
    """

    def __init__(self, config: LoaderConfig, cache_full: Event | None = None) -> None:
        self.config, self.epoch, self.history = config, 0, [config.division]
        # Shared by the loader processes, and by the loaders of a run.
        self.cache_full = cache_full or multiprocessing.get_context(START_METHOD).Event()
        self.bad = 0  # images of this epoch that could not be decoded, on this rank
        self.waited = 0.0  # seconds, in all, that the training loop waited for a batch
        self.batches: Iterator[list] | None = None

    @property
    def done(self) -> int:
        """Batches of the epoch that were handed out."""
        return sum(division.done for division in self.history)

    def __len__(self) -> int:
        """Batches of the epoch, exactly, on every rank: Lightning skips validation in silence if fewer come."""
        return self.done - self.history[-1].done + count_batches(self.config, self.history)

    @property
    def position(self) -> tuple[float, float]:
        """Where the last batch began and ended, in epochs."""
        total, last = self.config.index.total, self.history[-1]
        used = sum(division.done * division.world * division.batch for division in self.history)
        return self.epoch + (used - last.world * last.batch) / total, self.epoch + min(1, used / total)

    def advance(self) -> None:
        """Move on to the next epoch if all batches of this one were handed out."""
        if self.done == len(self):
            self.epoch, self.history, self.bad = self.epoch + self.config.training, [self.config.division], 0

    def next_batch(self) -> list:
        """What the loader processes made; starts them if there are none. UserError if they failed."""
        begun, config = time.perf_counter(), self.config
        if self.batches is None:
            self.batches = iter(DataLoader(
                EpochDataset(config, self.epoch, self.history.copy(), self.cache_full),
                batch_size=None, num_workers=config.workers, pin_memory=config.pin, worker_init_fn=start_worker,
                multiprocessing_context=START_METHOD if config.workers else None,
                timeout=config.retry_for + HANG_TIMEOUT if config.workers else 0,
            ))
        batch = next(self.batches)
        self.waited += time.perf_counter() - begun
        if isinstance(batch, UserError):
            raise batch
        return batch

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        self.advance()
        for _ in range(len(self) - self.done):
            images, labels, errors = self.next_batch()
            for error in errors:
                tqdm.write(f"{Path(sys.argv[0]).name}: not used: {error}", file=sys.stderr)  # above a progress bar
            self.bad += len(errors)
            if self.bad > self.config.max_bad:
                limit = f"--max-bad={self.config.max_bad}"
                raise UserError(f"{count(self.bad, 'undecodable image')} in an epoch, {limit}; last: {errors[-1]}")
            self.history[-1] = self.history[-1]._replace(done=self.history[-1].done + 1)
            yield [images, torch.tensor(labels, pin_memory=self.config.pin)]
        if not self.config.training:
            self.batches = None  # ends the loader processes

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: equal on all ranks, and saved in checkpoints.

        "order" is a digest of the order of the epoch. It changes if a library or this script computes another one.
        """
        ended = self.done == len(self)
        history = [] if ended else [division for division in self.history if division.done]
        state = {"epoch": self.epoch + ended, "history": list(map(list, history)), "order": self.order_digest(history)}
        return state | {"index": self.config.index.digest, "seed": self.config.seed}

    def order_digest(self, history: list[Division]) -> str:
        if not history:
            return ""
        plan, _ = plan_epoch(self.config.index, self.config.training, self.config.seed, self.epoch, history)
        return hashlib.sha256(plan.tobytes()).hexdigest()[:16]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. UserError if it is within an epoch of another index, seed or order."""
        self.epoch, history = state["epoch"], [Division(*values) for values in state["history"]]
        ours = {"index": self.config.index.digest, "seed": self.config.seed, "order": self.order_digest(history)}
        mismatches = [f"{key} {state[key]} there, {value} here" for key, value in ours.items() if state[key] != value]
        if history and mismatches:
            raise UserError(
                "--resume: the checkpoint is within an epoch of other data or another order ("
                f"{'; '.join(mismatches)}); resume from one at an epoch's end, such as best.ckpt"
            )
        if not history or history[-1]._replace(done=0) != self.config.division:
            history.append(self.config.division)
        self.history = history

    def describe_resume(self) -> str:
        """What is resumed, with which settings, and how much is read again."""
        config, now = self.config, self.history[-1]
        if not self.done:
            return f"resuming at the start of epoch {self.epoch + 1}"
        _, used = plan_epoch(config.index, config.training, config.seed, self.epoch, self.history)
        samples = np.add.reduceat(used, config.index.starts[:-1], dtype=int)  # of each block, those that were used
        again = [block.length for block, n in zip(config.index.blocks, samples) if 0 < n < block.samples]
        settings = f"{count(now.world, 'rank')} x {count(now.workers, 'worker')} x batch {now.batch}"
        before = "" if now.done else ", begun with other settings"
        return (
            f"resuming in epoch {self.epoch + 1} after {self.done:,} of {count(len(self), 'batch')}{before}, with "
            f"{settings}; {shards.format_bytes(sum(again))} are read again"
        )


class ImageNetData(pl.LightningDataModule):
    """The loaders of both splits, for this rank.

    The training loader's position is saved and restored here: Lightning restores a loader's own state only within an
    epoch.
    """

    def __init__(self, train: LoaderConfig | None, val: LoaderConfig, make: Callable[..., Loader] = Loader) -> None:
        super().__init__()
        self.train, self.val, self.make = train, val, make
        self.loader: Loader | None = None
        self.state: dict | None = None

    def train_dataloader(self) -> Loader:
        """Always the same one: Lightning asks before each epoch, and the loader moves on to it."""
        if self.loader is None:
            self.loader = self.make(replace(self.train, rank=self.trainer.global_rank))
            if self.state:
                self.loader.load_state_dict(self.state)
                rank_zero_only(print)(self.loader.describe_resume())
        self.loader.advance()
        return self.loader

    def val_dataloader(self) -> Loader:
        return Loader(replace(self.val, rank=self.trainer.global_rank), self.loader.cache_full if self.loader else None)

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.state = state

    def teardown(self, stage: str) -> None:
        if self.loader:
            self.loader.batches = None  # ends the loader processes

    def compare_ranks(self) -> None:
        """UserError unless the order of the batches depends on the same values on all ranks."""
        loaders = {"train": self.loader, "val": Loader(self.val)}
        ours = {f"{split} {key}": value for split, loader in loaders.items() if loader
                for key, value in (loader.state_dict() | {"settings": list(loader.config.division)}).items()}
        ours["step"] = self.trainer.global_step
        states = [ours] * self.trainer.world_size
        if len(states) > 1:
            torch.distributed.all_gather_object(states, ours)
        for rank, theirs in enumerate(states):
            if differing := [f"{key}: {value} on rank 0, {theirs[key]} on rank {rank}"
                             for key, value in states[0].items() if theirs[key] != value]:
                raise UserError(f"ranks differ in {'; '.join(differing)}; give all of them the same flags, shards "
                                "and --output")


# ---------------------------------------------------------------- model, weights


def build_model(name: str, classes: int) -> torch.nn.Module:
    """A freshly initialised classification model of torchvision.models with `classes` outputs."""
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)


def named_weights(model: str, weights: str | None) -> torchvision.models.WeightsEnum | None:
    """torchvision's weights of this model and name; None if `weights` is a file."""
    return torchvision.models.get_model_weights(model).__members__.get(weights)


def load_checkpoint(path: str | Path, flag: str) -> Any:
    """What torch.save() wrote, without running code in the file. UserError names the flag."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror or reason(error)}") from None
    except Exception as error:  # of many kinds: pickle's, zip's
        raise UserError(f"{flag}: not a file of weights or a checkpoint ({type(error).__name__})") from None


def read_weights(model: str, weights: str, flag: str) -> dict[str, torch.Tensor]:
    """The state dict of torchvision's weights of this model and name, or of a file. UserError names the flag."""
    if named := named_weights(model, weights):
        if model in ("googlenet", "inception_v3"):
            raise UserError(f"{flag}: {model}'s published weights expect inputs of another normalisation")
        try:
            return torchvision.models.get_model(model, weights=named).state_dict()
        except (OSError, RuntimeError) as error:  # it is downloaded, and has a wrong hash if that was cut
            raise UserError(f"{flag}: cannot be downloaded: {reason(error)}; give a file with --weights") from None
    if not Path(weights).exists():
        names = ", ".join(torchvision.models.get_model_weights(model).__members__)
        raise UserError(f"{flag}: no such file; --weights takes a file, or for {model} one of {names}")
    state = load_checkpoint(weights, flag)
    for key in ("state_dict", "model"):  # checkpoints: of this script and of others, of torchvision's references
        state = state.get(key, state) if isinstance(state, dict) else {}
    return {str(key).removeprefix("module.").removeprefix("model."): value for key, value in state.items()}


@torch.no_grad()
def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], classes: int) -> list[str]:
    """Copy the weights into the model. ValueError if they do not fit.

    If they are for another number of classes, the last layer keeps its random values: returns the names of its tensors.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.lower().startswith("aux")}
    differ = {key for key in own.keys() & state.keys() if own[key].shape != getattr(state[key], "shape", None)}
    last = {key for key in differ if len(own[key]) == classes and own[key].shape[1:] == state[key].shape[1:]}
    missing = {key for key in own.keys() ^ state.keys() if not key.endswith("num_batches_tracked")}  # as in old files
    if mismatches := (differ - last) | missing:
        raise ValueError(f"{count(len(mismatches), 'tensor')} do not fit, such as {min(mismatches)}")
    for key in own.keys() & state.keys() - last:
        own[key].copy_(state[key])  # not load_state_dict(): some models want a version that a file may lack
    return sorted(last)


# ---------------------------------------------------------------- batches → gradients
# Lightning has the loop, the devices, the ranks and the precision. What it can't know is here: the model and its
# recipe, and the exact count of validated images.


def lr_factor(position: tuple[float, float], warmup: float, epochs: float) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then a cosine decay to 0. All in epochs.

    position: start and end of the step. Warm-up is evaluated at the end and decay at the start, so no step has rate 0.
    """
    start, end = position
    if end < warmup:
        return end / warmup
    return 0.5 * (1 + math.cos(math.pi * max(0.0, start - warmup) / (epochs - warmup)))


def explain_failure(error: Exception) -> str | None:
    """A failure of this machine or of another rank, in one line; None for other errors."""
    text = reason(error)
    if "DataLoader worker (pid" in text:
        if "Bus error" in text or "shared memory" in text:
            return SHM_FULL
        return f"a loader process was killed ({text}); is memory too small? Use fewer --workers or a smaller --shuffle"
    if "DataLoader timed out" in text:
        return f"{text}: a loader process hangs; rerun with --resume"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "this machine has too little memory; give a smaller --batch-size, fewer --workers or a smaller --shuffle"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory; give a smaller --batch-size"
    if isinstance(error, torch.distributed.DistError) or "by peer" in text:
        return "another rank ended; its message says why"
    return None


def check_finite(loss: float, name: str, step: int) -> None:
    """UserError if the loss is not a finite number."""
    if not math.isfinite(loss):
        raise UserError(f"the {name} is {loss} at step {step}; use a lower --lr, more --warmup-epochs or "
                        "--precision=32-true, and resume from an earlier checkpoint")


class Classifier(pl.LightningModule):
    """The network, its loss, its optimiser and its metrics.

    lr: peak, for 256 images a global batch · warmup_epochs: epochs of linear warm-up · images: in validation
    val_size, val_resize: pixels; only stored, for --evaluate
    """

    def __init__(
        self, model: str, classes: int, lr: float, momentum: float, weight_decay: float, label_smoothing: float,
        warmup_epochs: float, images: int, val_size: int, val_resize: int, seed: int = 0, compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model(model, classes).to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)
        accuracy = partial(MulticlassAccuracy, classes, average="micro", ignore_index=IGNORE_INDEX)
        self.accuracy = MetricCollection({f"val_top{k}": accuracy(top_k=min(k, classes)) for k in (1, 5)})
        self.loss, self.seen = MeanMetric(), SumMetric()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S, 3] → logits [B, classes]. The permuted view is channels_last as it lies: no copy.

        UserError with the model's own message if it does not accept images of this size.
        """
        try:
            return self.model((images.permute(0, 3, 1, 2) - self.mean) / self.std)
        except (RuntimeError, ValueError, AssertionError) as error:
            if explain_failure(error):
                raise
            sizes = f"{count(len(images), 'image')} of {images.shape[1]} × {images.shape[2]} px"
            raise UserError(f"--model={self.hparams.model}: does not accept {sizes}: {reason(error)}") from error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD. The learning rate is set before each step."""
        h = self.hparams
        groups = [  # norms and biases are the parameters with one dimension: He et al., arXiv:1812.01187, section 3.1
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": h.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=h.lr, momentum=h.momentum)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Momentum and weight decay come from the flags, not from the checkpoint."""
        decay, no_decay = checkpoint["optimizer_states"][0]["param_groups"]
        decay |= {"momentum": self.hparams.momentum, "weight_decay": self.hparams.weight_decay}
        no_decay |= {"momentum": self.hparams.momentum}

    def on_train_start(self) -> None:
        self.trainer.datamodule.compare_ranks()
        # Otherwise Lightning exchanges a flag for its SIGTERM handler, and waits for the device, before each step.
        self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Set the learning rate. It depends only on the flags and on the position in epochs, also after a resume."""
        h, epochs, data = self.hparams, self.trainer.max_epochs, self.trainer.datamodule
        peak = h.lr * data.train.batch * self.trainer.world_size / 256
        for group in self.optimizers().param_groups:
            group["lr"] = peak * lr_factor(data.loader.position, min(h.warmup_epochs, epochs / 2), epochs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        done = self.trainer.datamodule.loader.done
        if batch_idx != done - 1:
            raise RuntimeError(f"Lightning is at batch {batch_idx}, the loader at {done}: batches would be lost")
        # Dropout too is a function of (seed, step, rank): a resumed run draws what it would have drawn.
        # Not torch.manual_seed: without a GPU it writes down the whole stack, each time, for when one comes.
        generator = torch.cuda if self.device.type == "cuda" else torch.default_generator
        draw = random.Random(f"{self.hparams.seed}/{self.global_step}/{self.global_rank}")
        generator.manual_seed(draw.getrandbits(63))
        # The sum over valid rows, divided by all rows: a sample has the same weight on every rank.
        options = dict(label_smoothing=self.hparams.label_smoothing, ignore_index=IGNORE_INDEX, reduction="sum")
        return F.cross_entropy(self(images), labels, **options) / len(labels)

    def on_train_epoch_end(self) -> None:
        bad = torch.tensor(float(self.trainer.datamodule.loader.bad), device=self.device)
        if bad := int(self.trainer.strategy.reduce(bad, reduce_op="sum")):
            self.print(f"epoch {self.current_epoch + 1}: {count(bad, 'undecodable image')} left out")

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self.trainer.datamodule.compare_ranks()

    def on_validation_epoch_start(self) -> None:
        self.accuracy.reset(), self.loss.reset(), self.seen.reset()
        if self.trainer.world_size > 1:  # batch-norm statistics differ between ranks; rank 0's are saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        real = (labels != IGNORE_INDEX).sum()
        logits = self(images).float()
        self.seen.update(real)
        self.accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        self.loss.update(loss / real.clamp(min=1), weight=real)

    def on_validation_epoch_end(self) -> None:
        """Log and print the result. UserError unless every image was seen exactly once and the loss is finite."""
        seen, wanted = int(self.seen.compute()), self.hparams.images
        result = {"val_loss": self.loss.compute(), **self.accuracy.compute()}
        self.log_dict(result | {"epoch": self.current_epoch + 1.0}, sync_dist=True)  # equal on all ranks already
        top1, top5 = (100 * float(result[f"val_top{k}"]) for k in (1, 5))
        fitting = self.trainer.state.fn == "fit"
        position = f" (epoch {self.current_epoch + 1}, step {self.global_step})" if fitting else ""
        self.print(
            f"validated {seen}/{wanted} images: top-1 {top1:.2f} %, top-5 {top5:.2f} %, "
            f"loss {float(result['val_loss']):.4f}{position}"
        )
        if seen != wanted:
            raise UserError(f"validation saw {seen} images, the index lists {wanted}")
        check_finite(float(result["val_loss"]), "validation loss", self.global_step)


# ---------------------------------------------------------------- pictures
# --preview draws samples → one sheet; training draws metrics.csv → curves.png.


def preview(config: LoaderConfig, path: Path) -> None:
    """Draw the first training batch: each image with its crop's outline, beside what the model sees, and the class."""
    size, index = config.size, config.index
    stages = make_pipeline(config, 0, [config.division], 0, Collate(config), multiprocessing.Event()).pipeline
    samples = list(itertools.islice(wds.DataPipeline(*stages[:-3]), config.batch))  # before map, batched and pad
    columns, width, height = max(1, round(math.sqrt(0.75 * len(samples)))), 2 * size + 12, size + 28
    sheet = Image.new("RGB", (columns * width + 8, math.ceil(len(samples) / columns) * height + 4), "white")
    draw = ImageDraw.Draw(sheet)
    names = index.class_names or index.classes
    for position, sample in enumerate(samples):
        pixels, label = decode(sample, config, epoch=0)
        if pixels is None:
            continue  # can't be decoded: training reports it
        left, top = position % columns * width + 8, position // columns * height + 4
        original = shards.to_rgb(shards.open_image(io.BytesIO(shards.image_bytes(sample))))
        box = random_crop(*original.size, sample_rng(sample, config, epoch=0))
        scale = size / max(original.size)
        original = original.resize([max(1, round(scale * side)) for side in original.size])
        ImageDraw.Draw(original).rectangle([round(scale * edge) for edge in box], outline="red", width=2)
        sheet.paste(original, (left + (size - original.width) // 2, top + (size - original.height) // 2))
        sheet.paste(Image.fromarray(pixels.numpy()), (left + size + 2, top))
        text = f"{label}  {names[int(label)].split(',')[0]}"[: size // 4]
        draw.text((left, top + size + 4), text, "black", font_size=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    images = count(len(samples), "image")
    print(f"{path}: {images} of the first training batch, each beside what the model sees, {size} px")


def draw_curves(metrics: Path, path: Path) -> None:
    """Draw loss, accuracy, learning rate and speed over the epochs of a metrics.csv, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))

    def values(name: str, factor: float = 1) -> dict[float, float]:
        """By position in epochs. After a resume the rows of repeated steps come twice; the later ones count."""
        return {float(row["epoch"]): factor * float(row[name]) for row in rows if row.get(name)}

    panels = {
        "loss": {"training": values("train_loss"), "validation": values("val_loss")},
        "accuracy, %": {"top-1": values("val_top1", 100), "top-5": values("val_top5", 100)},
        "learning rate": {"": values("lr")},
        "images/s": {"": values("train_images/s")},
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, panels.items()):
        for label, curve in curves.items():
            axes.plot(*zip(*sorted(curve.items())), label=label, marker="." if len(curve) < 50 else "")
        axes.set(title=title, xlabel="epoch", xlim=(0, None))
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- checkpoints, progress, results


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step: whenever the run is killed, the old file or the new one is there, complete.

    Lightning writes to TMPDIR first and, if that is another file system, copies from there over the old checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: None = None) -> None:
        """UserError if the disk is full or read-only."""
        path, data = Path(path), io.BytesIO()
        torch.save(checkpoint, data)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shards.remove_leftovers(path.parent)
            with shards.open_writer(path) as file:
                file.write(data.getbuffer())
        except OSError as error:
            kept = "the previous one is kept" if path.exists() else "there is no previous one"
            raise UserError(f"{path}: can't save the checkpoint: {error.strerror}; {kept}") from None


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt: every `every` steps, after each validation, and at --max-steps.

    Not Lightning's ModelCheckpoint: that saves a run which --max-steps ends within an epoch as if the epoch were over,
    and one that is killed in validation goes on without it.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: pl.Trainer, *args) -> None:
        due = trainer.global_step == trainer.max_steps or (self.every and trainer.global_step % self.every == 0)
        loader = trainer.datamodule.loader
        if due and loader.done < len(loader):  # after an epoch's last step comes its validation
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args) -> None:
        loader = trainer.datamodule.loader
        if loader.done == len(loader):
            trainer.save_checkpoint(self.path)


class BestCheckpoint(ModelCheckpoint):
    """Writes best.ckpt, of the best top-1 accuracy. Lightning forgets the best score if the folder has another path."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "best", monitor="val_top1", mode="max", enable_version_counter=False,
                         save_on_train_epoch_end=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        path, score = f"{self.dirpath}/best.ckpt", state["best_model_score"]
        moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        if score is not None and os.path.exists(path):  # or else this folder has no best epoch yet
            super().load_state_dict(state | moved | {"best_k_models": {path: score}})


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the figures of the last log entry; where there is no terminal, a line for each entry.

    An entry has loss, learning rate, images/s and the share of time spent waiting for data, and is also logged.
    """

    BAR_FORMAT = "{desc}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"  # fits 80 columns, with all figures

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, str] = {}
        self.window: tuple[int, float, float] | None = None  # where the next entry starts: step, seconds waited, clock

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
        """What the bar shows; Lightning's own would read the loss off the device in each step."""
        return self.figures

    def on_train_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_start(trainer, *args)
        self.on_train_epoch_start(trainer)  # Lightning does not call it for an epoch that is resumed

    def on_train_epoch_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.epoch = f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"  # Lightning's count from 0
        self.train_progress_bar.set_description(self.epoch)

    def on_train_batch_start(self, trainer: pl.Trainer, *args) -> None:
        if self.window is None:  # at the start and after validation, whose seconds are not counted
            self.window = trainer.global_step, trainer.datamodule.loader.waited, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Classifier, outputs: dict, batch: list, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            loss = outputs["loss"].item()  # waits for the device
            step, waited, clock = self.window
            self.window = trainer.global_step, trainer.datamodule.loader.waited, time.perf_counter()
            seconds = self.window[2] - clock
            speed = (self.window[0] - step) * len(batch[1]) * trainer.world_size / seconds
            wait = (self.window[1] - waited) / seconds
            module.log_dict({
                "epoch": trainer.datamodule.loader.position[1], "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "train_loss": loss, "train_images/s": speed, "train_wait": wait,
            })
            self.figures = {"loss": f"{loss:.3f}", "img/s": f"{speed:,.0f}", "wait": f"{wait:.0%}"}
            if self.is_disabled and trainer.is_global_zero:
                text = ", ".join(f"{name} {value}" for name, value in self.figures.items())
                print(f"{self.epoch}, step {batch_idx + 1}/{trainer.num_training_batches}: {text}", flush=True)
            check_finite(loss, "training loss", trainer.global_step)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, *args) -> None:
        self.window = None
        super().on_validation_start(trainer, *args)

    def on_exception(self, *args) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()  # or the message would follow the bar on its line


class Results(pl.Callback):
    """After each validation: its metrics go into the checkpoint, for export(), and into curves.png."""

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        metrics = trainer.callback_metrics
        checkpoint["metrics"] = {name: float(metrics[name]) for name in metrics if name.startswith("val_")}

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        folder = Path(trainer.logger.log_dir)
        try:
            draw_curves(folder / "metrics.csv", folder / "curves.png")
        except Exception as error:  # a picture's failure does not end a run
            warn(f"{folder / 'curves.png'}: not drawn: {reason(error)}")


class AppendingWriter(ExperimentWriter):
    """CSVLogger's writer deletes the metrics.csv of a run that is resumed; this one appends to its complete lines."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)  # a power cut or a full disk may have left a part of a line
            self.metrics_keys = next(csv.reader(text.decode(errors="replace").splitlines()[:1]), [])


# ---------------------------------------------------------------- command line


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the images are and how they are loaded."""
    positive, whole, pixels = shards.bounded(int, 1), shards.bounded(int, 0), shards.bounded(int, 16, 4096)
    add = parser.add_argument_group("data").add_argument
    add("--shards", "--base", metavar="PREFIX", type=shards.prefix_arg, default="./data",
        help="a folder, http(s)://… or pipe:COMMAND; file names are appended to it, or replace %%s in it")
    add("--index", metavar="PREFIX", type=shards.prefix_arg, help="prefix of the index, if it is not beside the shards")
    add("--batch-size", metavar="N", type=positive, default=256, help="images per device and step")
    add("--workers", metavar="N", type=whole, help="loader processes per rank (default: its share of the cores)")
    add("--train-size", metavar="PX", type=pixels, default=224, help="side of a training crop, pixels")
    add("--val-size", metavar="PX", type=pixels, default=224, help="side of the validation crop, pixels")
    add("--val-resize", metavar="PX", type=pixels, default=256,
        help="shorter side before the validation crop, pixels")
    add("--shuffle", metavar="N", type=whole, default=4000,
        help="samples by which the shuffle may delay a sample; a worker holds half as many on average, 110 KB each")
    add("--cache", metavar="DIR", type=shards.path_arg,
        help="folder on a local disk for the blocks that are read (default: none)")
    add("--retry-for", metavar="S", type=shards.bounded(float, 0), default=300,
        help="seconds for which a failing read is repeated, with exponential back-off")
    add("--timeout", metavar="S", type=shards.bounded(float, 0.1), default=60,
        help="seconds without a byte until a read fails")
    add("--max-bad", metavar="N", type=whole, default=100,
        help="undecodable training images per rank and epoch that are reported and left out; more are an error")
    add("--seed", metavar="N", type=shards.bounded(int, 0, 2**32 - 1), default=0,
        help="determines initial weights, order, crops and flips")
    add("--preview", metavar="FILE.png", type=shards.path_arg,
        help="draw the first training batch, each image beside what the model sees, and exit")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model, its training and its output.

    The defaults are those of NVIDIA's ResNet-50 v1.5, which reaches 77.1 % top-1: DeepLearningExamples,
    PyTorch/Classification/ConvNets.
    """
    positive, whole, real = shards.bounded(int, 1), shards.bounded(int, 0), shards.bounded(float, 0)
    share = shards.bounded(float, 0, 1)
    add = parser.add_argument_group("model and recipe").add_argument
    models = torchvision.models.list_models(module=torchvision.models)
    add("--model", metavar="NAME", choices=models, default="resnet50", help="any classification model of torchvision")
    add("--weights", metavar="NAME|FILE", type=shards.prefix_arg,
        help="start from torchvision's weights, such as IMAGENET1K_V1 or DEFAULT, or from a file with a state dict or "
        "checkpoint; the last layer is new if the number of classes differs")
    add("--evaluate", action="store_true",
        help="only validate --weights or --resume, with the sizes that belong to them unless given")
    add("--lr", metavar="X", type=real, default=0.256,
        help="peak learning rate for a global batch of 256; scaled with the actual one")
    add("--momentum", metavar="X", type=share, default=0.875, help="momentum of SGD")
    add("--weight-decay", metavar="X", type=real, default=1 / 32768,
        help="not applied to norms and biases (default: 1/32768)")
    add("--label-smoothing", metavar="X", type=share, default=0.1, help="share of the target spread over all classes")
    add("--warmup-epochs", metavar="X", type=real, default=8, help="epochs of linear warm-up, at most half of the run")
    add("--compile", action="store_true", help="compile the model with torch.compile")

    add = parser.add_argument_group("trainer (Lightning's names)").add_argument
    add("--accelerator", metavar="NAME", default="auto", help="auto, cpu, gpu, …")
    add("--devices", metavar="N", default=os.environ.get("LOCAL_WORLD_SIZE", "auto"),
        help="per node: auto, a number, or a list such as 0,2; torchrun sets it")
    add("--num-nodes", metavar="N", type=positive, default=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        help="machines; torchrun sets it")
    add("--precision", metavar="NAME",
        help="32-true, bf16-mixed, … (default: on a GPU bf16-mixed, or 16-mixed on an old one)")
    add("--max-epochs", metavar="N", type=positive, default=90, help="epochs to train")
    add("--max-steps", metavar="N", type=shards.bounded(int, -1), default=-1,
        help="stop after N steps; -1: no limit. The learning rate follows --max-epochs")
    add("--log-every", metavar="N", type=positive, default=50, help="steps between two entries of the log")

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", type=shards.path_arg, default="./output",
        help="each run writes its results to DIR/version_N")
    add("--checkpoint-every", metavar="N", type=whole, default=1000,
        help="steps between checkpoints, beside those after each validation; 0: none")
    add("--resume", metavar="PATH", nargs="?", const=True, type=shards.path_arg,
        help="continue from a checkpoint or version folder; without PATH from the newest last.ckpt in --output, if any")


def newest_or_named(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume names; None if it names none, or if there is none yet."""
    if args.resume in (None, True):
        return newest_checkpoint(args.output) if args.resume else None
    return args.resume / "last.ckpt" if args.resume.is_dir() else args.resume


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The model and sizes that belong to the weights that are to be evaluated, as far as they are known."""
    if named := named_weights(args.model, args.weights):
        transforms = named.transforms()
        return {"val_size": transforms.crop_size[0], "val_resize": transforms.resize_size[0]}
    path, settings = newest_or_named(args) or Path(args.weights or ""), {}
    if path.suffix == ".ckpt" and path.is_file():
        settings = load_checkpoint(path, f"--{'weights' if args.weights else 'resume'}={path}")
        settings = settings.get("hyper_parameters", {}) if isinstance(settings, dict) else {}
    elif path.name == "model.pt":  # export() writes metrics.json beside it
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((path.parent / "metrics.json").read_text())
    return {key: settings[key] for key in ("model", "val_size", "val_resize") if key in settings}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags' values; exits with status 2 if they are not valid."""
    parser = shards.Parser("Train a torchvision model on ImageNet from WebDataset shards.")
    add_data_flags(parser)
    add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.evaluate and (args.weights is None) == (args.resume is None):
        parser.error("--evaluate: give --weights or --resume")
    if args.evaluate:
        parser.set_defaults(**settings_of(args))
        args = parser.parse_args(argv)
    if args.val_size > args.val_resize:
        parser.error(f"--val-size {args.val_size} does not fit into --val-resize {args.val_resize}")
    if args.preview and args.preview.suffix != ".png":
        parser.error(f"--preview {args.preview}: give a name that ends in .png")
    return args


# ---------------------------------------------------------------- train, evaluate


def read_indexes(args: argparse.Namespace, splits: tuple[str, ...]) -> list[Index]:
    """The indexes of these splits. UserError if one can't be read or they do not fit each other."""
    indexes = [read_index(args.shards, split, args.retry_for, args.timeout, args.index) for split in splits]
    classes, source = indexes[0].classes, f"--shards={printable(args.shards)}"
    if any(index.classes != classes for index in indexes):
        raise UserError(f"{source}: train and val have different classes; convert both from one tree")
    if len(classes) < 2:
        raise UserError(f"{source}: has only the class {classes[0]}; training needs two or more")
    return indexes


def is_finished(path: Path, args: argparse.Namespace, classes: int) -> bool:
    """Whether the run of this checkpoint has no steps left. UserError if the checkpoint can't be continued."""
    checkpoint = load_checkpoint(path, f"--resume={path}")
    try:
        made, step = checkpoint["hyper_parameters"], checkpoint["global_step"]
        epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        found, wanted = f"{made['classes']} classes of {made['model']}", f"{classes} classes of {args.model}"
    except (TypeError, LookupError):
        raise UserError(f"--resume={path}: not a checkpoint of this script") from None
    if found != wanted:
        raise UserError(f"--resume={path}: for {found}, not {wanted}; give the same, or start without --resume")
    for name, done, limit in (("epoch", epoch, args.max_epochs), ("step", step, args.max_steps)):
        if 0 <= limit <= done:
            rank_zero_only(print)(f"--resume={path}: already at {name} {done} of {limit}; raise --max-{name}s")
            return True
    return False


def make_folder(output: Path, checkpoint: Path | None) -> Path:
    """The folder of this run: that of the last.ckpt that it continues, if it is in --output, or a new one.

    Only rank 0 makes it and writes to it, so what other ranks find does not matter.
    """
    if checkpoint and checkpoint.name == "last.ckpt" and checkpoint.parent.parent.resolve() == output.resolve():
        return output / checkpoint.parent.name
    while True:
        folder = Path(CSVLogger(output, name="").log_dir)
        if rank_zero_only.rank:
            return folder
        with contextlib.suppress(FileExistsError):  # another run took this number meanwhile
            folder.mkdir(parents=True)
            return folder


def make_model(args: argparse.Namespace, index: Index, images: int, weights: str | None = None) -> Classifier:
    """The model for this index's classes and `images` images in validation, with the weights of a name or a file."""
    names = ("model", "lr", "momentum", "weight_decay", "label_smoothing", "warmup_epochs", "val_size", "val_resize",
             "seed", "compile")
    classes = len(index.classes)
    module = Classifier(classes=classes, images=images, **{name: getattr(args, name) for name in names})
    if weights:
        flag, number = f"--{'resume' if args.weights is None else 'weights'}={weights}", count(classes, "class")
        try:
            last = load_weights(module.model, read_weights(args.model, weights, flag), classes)
        except ValueError as error:
            raise UserError(f"{flag}: not for --model={args.model}: {error}") from None
        if last and args.evaluate:
            raise UserError(f"{flag}: not for the {number} of the images; there is nothing to evaluate")
        if last:
            rank_zero_only(print)(f"{flag}: not for {number}; the last layer, {last[-1]}, starts at random")
    return module


def make_loggers(folder: Path) -> list[Logger]:
    """Logs in this folder, those of TensorBoard if it is installed."""
    place = dict(save_dir=folder.parent, name="", version=folder.name)
    loggers = [CSVLogger(**place)]
    if rank_zero_only.rank == 0:
        loggers[0]._experiment = AppendingWriter(str(folder))
    with contextlib.suppress(ModuleNotFoundError):
        loggers.append(TensorBoardLogger(**place))
    return loggers


def make_trainer(args: argparse.Namespace, **changes) -> pl.Trainer:
    """Lightning's Trainer by the flags, or else `changes`.

    UserError for a device or precision that is not available, and if a launcher started more or fewer processes than
    the trainer has ranks.
    """
    precision = args.precision or "32-true"
    if args.precision is None and args.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    options = dict(
        accelerator=args.accelerator, devices=args.devices, num_nodes=args.num_nodes, precision=precision,
        max_epochs=args.max_epochs, max_steps=args.max_steps, log_every_n_steps=args.log_every,
        logger=False, callbacks=[ProgressBar()], default_root_dir=args.output, plugins=[AtomicCheckpointIO()],
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        benchmark=True, reload_dataloaders_every_n_epochs=1,  # so that Lightning asks for a loader in every epoch
    )
    flags = f"--accelerator={args.accelerator} --devices={args.devices} --num-nodes={args.num_nodes}"
    try:
        trainer = pl.Trainer(**options | changes)
        if trainer.world_size > 1:  # 1.4 % faster on an H200; validation takes rank 0's batch-norm statistics anyway
            ddp = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
            trainer = pl.Trainer(**options | changes | {"strategy": ddp})
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(f"{flags} --precision={precision}: {str(error).splitlines()[0]}") from None
    for name, advice in (("WORLD_SIZE", "the launcher's"), ("SLURM_NTASKS", "srun's --ntasks")):
        ranks = trainer.num_devices * trainer.num_nodes  # under Slurm trainer.world_size is SLURM_NTASKS
        started = int(os.environ.get(name, ranks))
        if started != ranks and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            raise UserError(f"{flags}: {count(ranks, 'rank')}, but {advice} number of processes is "
                            f"{started} ({name}); make them equal")
    return trainer


def make_config(args: argparse.Namespace, index: Index, training: bool, trainer: pl.Trainer) -> LoaderConfig:
    """How the trainer's ranks load a split. UserError if it has less than a global batch of training images."""
    world = trainer.world_size
    workers = max(1, shards.count_cores() * trainer.num_nodes // world) if args.workers is None else args.workers
    if training and index.total < args.batch_size * world:
        raise UserError(f"--batch-size={args.batch_size} × {count(world, 'rank')}: more than the "
                        f"{count(index.total, 'training image')}; give a smaller one")
    if args.cache:
        with contextlib.suppress(OSError):  # writing the first block tells that the folder can't be written
            args.cache.mkdir(parents=True, exist_ok=True)
            shards.remove_leftovers(args.cache)
    return LoaderConfig(
        index, training, args.batch_size, args.train_size if training else args.val_size, args.val_resize,
        shuffle=args.shuffle if training else 0, seed=args.seed, world=world, workers=workers,
        retry_for=args.retry_for, timeout=args.timeout, cache=args.cache, epochs=args.max_epochs,
        max_bad=args.max_bad if training else 0, pin=trainer.strategy.root_device.type == "cuda",
    )


def write_metrics(path: Path, args: argparse.Namespace, metrics: dict[str, float | str]) -> None:
    """metrics.json: what was measured, on what."""
    settings = {"model": args.model, "val_size": args.val_size, "val_resize": args.val_resize}
    path.write_text(json.dumps(settings | metrics, indent=2) + "\n")


@rank_zero_only
def export(folder: Path, args: argparse.Namespace) -> None:
    """Write model.pt, the state dict of the best epoch for torchvision's get_model(), and its metrics.json."""
    if (folder / "best.ckpt").exists():
        best = load_checkpoint(folder / "best.ckpt", str(folder / "best.ckpt"))
        state = {key.removeprefix("model."): value for key, value in best["state_dict"].items()}
        AtomicCheckpointIO().save_checkpoint(state, folder / "model.pt")
        write_metrics(folder / "metrics.json", args,
                      {"epoch": best["epoch"] + 1, "step": best["global_step"]} | best["metrics"])
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def run_evaluation(args: argparse.Namespace) -> None:
    """Validate --weights, or the checkpoint of --resume, on all ranks. metrics.json goes into a new version folder."""
    [index] = read_indexes(args, ("val",))
    weights = args.weights or str(newest_or_named(args) or "")
    if not weights:
        raise UserError(f"--evaluate --resume: no version_N/last.ckpt in {args.output}; name a checkpoint")
    trainer, show = make_trainer(args), rank_zero_only(print)
    config = make_config(args, index, False, trainer)
    model = make_model(args, index, index.total, weights)
    device = f"{trainer.world_size} {trainer.strategy.root_device.type}, {trainer.precision}"
    show(f"{args.model} with {weights} on {device}: {count(index.total, 'val image')}, resized to "
         f"{args.val_resize} px, cropped to {args.val_size} px; from {printable(args.shards)}")
    named = named_weights(args.model, weights)
    if named and named.transforms().interpolation.value != "bilinear":
        show(f"{weights}: published with bicubic resizing, here it is bilinear; the accuracy will differ slightly")
    trainer.validate(model, datamodule=ImageNetData(None, config), verbose=False)
    if trainer.is_global_zero:
        folder = make_folder(args.output, None)
        result = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        write_metrics(folder / "metrics.json", args, {"weights": weights} | result)
        print(f"{folder}: metrics.json")


def run_training(args: argparse.Namespace) -> None:
    """Train, from the start or from the checkpoint of --resume, in a version folder. Cheap checks come first."""
    index, val = read_indexes(args, ("train", "val"))
    if args.preview:
        settings = {name: getattr(args, name) for name in ("shuffle", "seed", "retry_for", "timeout")}
        batch = min(args.batch_size, 32, index.total)
        return preview(LoaderConfig(index, True, batch, args.train_size, **settings), args.preview)
    checkpoint, show = newest_or_named(args), rank_zero_only(print)
    if checkpoint and is_finished(checkpoint, args, len(index.classes)):
        return export(checkpoint.parent, args)
    if args.resume is True and not checkpoint:
        show(f"--resume: no version_N/last.ckpt in {args.output} yet; starting from the beginning")
    trainer = make_trainer(args)
    config, val_config = (make_config(args, split, split is index, trainer) for split in (index, val))
    steps, device = count_batches(config, [config.division]), trainer.strategy.root_device.type
    show(
        f"{args.model} on {trainer.world_size} {device} × {count(config.workers, 'worker')}, {trainer.precision}: "
        f"{count(index.total, 'train image')} in {count(len(index.shards), 'shard')}, {val.total:,} val in "
        f"{len(val.shards):,}, {count(len(index.classes), 'class')}; {count(steps, 'batch')} of {args.batch_size} × "
        f"{trainer.world_size} an epoch; from {printable(args.shards)}"
    )
    pl.seed_everything(args.seed, verbose=False)
    model = make_model(args, index, val.total, None if checkpoint else args.weights)
    folder = make_folder(args.output, checkpoint)  # as late as this: a failed check leaves no folder
    last = LastCheckpoint(folder / "last.ckpt", args.checkpoint_every)
    trainer.callbacks += [Results(), BestCheckpoint(folder), last]  # the last one saves the best score too
    trainer.loggers = make_loggers(folder)
    trainer.fit(model, datamodule=ImageNetData(config, val_config), ckpt_path=checkpoint, weights_only=True)
    export(folder, args)


def train_or_evaluate(argv: list[str] | None) -> None:
    """Do what the flags say."""
    args = parse_args(argv)
    for name in ("pytorch_lightning", "lightning_fabric"):  # their tips; warnings still come through
        logging.getLogger(name).setLevel(logging.WARNING)
    ignored = (
        "does not have many workers|exists and is not empty|smaller than the logging|find the monitored|LeafSpec"
        "|broadcast_buffers. is deprecated"  # in favour of an argument that PyTorch 2.11 does not have
    )
    warnings.filterwarnings("ignore", f".*({ignored}).*")  # Lightning's, of things that are meant so here
    (run_evaluation if args.evaluate else run_training)(args)


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit status: 0, or 1 after an error."""
    return shards.run_script(partial(train_or_evaluate, argv), explain_failure)


if __name__ == "__main__":
    sys.exit(main())
