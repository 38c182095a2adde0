"""Trains a torchvision model on ImageNet from WebDataset shards, with PyTorch Lightning.

    python3 imagenet_train.py --shards=./data
    python3 imagenet_train.py --shards='pipe:curl -s http://localhost:8080/' --devices=8
    python3 imagenet_train.py --shards='pipe:gsutil cat gs://bucket/%s' --resume

In:  what imagenet_shards.py wrote, in a folder, at a URL, or behind a command that prints a file.
Out: checkpoints, logs and the trained weights in --output.

Guarantee: no sample is used twice in an epoch, and fewer than ranks x batch are left out; validation sees every sample
once. Every byte is checked before it is used. A run that is killed and resumed makes the same batches; with other
settings (ranks, workers, batch size), the rest of the epoch. The default recipe is NVIDIA's (77.1 % top-1).

make_pipeline() has the stages that WebDataset's documentation teaches: tar_file_expander, group_by_keys, map and
batched are WebDataset's; list_blocks replaces its split_by_node, open_blocks its url_opener, in_order its shuffle, and
decode its decode("pil"). README.md says why.
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
import re
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # before imports that take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: the kernel ends the process at once

import imagenet_shards as shards
from imagenet_shards import Index, PermanentError, UserError, plural, printable, read_index, reason, warn


def join_launcher(env: os._Environ[str]) -> None:
    """End with the process that started this rank, if it is torchrun or rank 0; check the variables that they set.

    torchrun sets RANK, LOCAL_RANK and WORLD_SIZE. Lightning sets the last two in ranks that rank 0 starts.
    """
    if env.get("IMAGENET_RANK_0") == str(os.getppid()) or "TORCHELASTIC_RUN_ID" in env:
        return shards.end_with_parent()
    env["IMAGENET_RANK_0"] = str(os.getpid())
    if "LOCAL_RANK" in env and not {"RANK", "WORLD_SIZE"} <= env.keys():
        del env["LOCAL_RANK"]  # left over: with it, Lightning would wait for other ranks
    if "LOCAL_RANK" not in env and {"RANK", "WORLD_SIZE"} & env.keys():
        sys.exit(f"{Path(__file__).name}: RANK or WORLD_SIZE is set without LOCAL_RANK; use torchrun, or unset both")


if __name__ == "__main__":  # before Lightning looks at them
    join_launcher(os.environ)

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
import webdataset as wds
from PIL import Image, ImageFile
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms.functional import center_crop, resize
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

show = rank_zero_only(print)

# ---------------------------------------------------------------- the pipeline
# The table of contents: its stages are defined below, in its order. To train on other data, change decode().


def make_pipeline(
    config: LoaderConfig, epoch: int, history: list[Division], worker: int, buffers: Iterator[torch.Tensor]
) -> wds.DataPipeline:
    """The batches that one loader process makes of the rest of an epoch, as stages of WebDataset."""
    index = config.index
    order, blocks, steps = plan_reader(config, epoch, history, worker)
    open_blocks = partial(
        shards.open_blocks, index=index, retry_for=config.retry_for, timeout=config.timeout, cache=config.cache,
        cache_full=config.cache_full,
    )
    return wds.DataPipeline(
        partial(list_blocks, blocks, index),  #                   ours         {"url", "block"}
        open_blocks,  #                                           ours         {"url", "stream"}, complete and checked
        tar_file_expander,  #                                     WebDataset   {"fname", "data", "__url__"}
        group_by_keys,  #                                         WebDataset   {"__key__", "jpg", "cls"}
        partial(in_order, order=order, index=index),  #           ours         the same, shuffled
        wds.map(partial(decode, config=config, epoch=epoch)),  #  WebDataset   (uint8 [S, S, 3], label)
        partial(fill, rows=steps * config.batch),  #              ours         as many on every rank
        wds.batched(config.batch, collation_fn=partial(collate, buffers=buffers)),  #  [uint8 [B, S, S, 3], labels, …]
    )


# ---------------------------------------------------------------- order of an epoch
# The order of an epoch is a pure function of index, seed and settings. Every process computes the whole order and takes
# its part; a resumed run also computes what was used.


class Division(NamedTuple):
    """How the samples of an epoch, or those left of it, are divided. A run that is resumed may add another one."""

    seekable: bool  # blocks are permuted; or shards, whose blocks stay in order
    world: int  # ranks
    workers: int  # loader processes of a rank, at least 1
    batch: int  # samples a rank and step
    shuffle: int  # samples by which the shuffle may delay a sample
    done: int = 0  # batches that every rank has made


# Under forkserver, Python 3.14's default, the kernel would not see when the main process ends.
START_METHOD = "fork" if sys.platform == "linux" else None


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
    # Is set when its disk is full; shared by the loader processes.
    cache_full: Event = field(default_factory=lambda: multiprocessing.get_context(START_METHOD).Event())
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

    Each rank gets a run of the line, each of its workers a run of whole batches of that. In it, samples are sorted by
    i + shuffle × U(0, 1): none moves by more than `shuffle`, which bounds what a worker holds.
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
    """Under the last of an epoch's divisions, the samples' numbers: int64 [world, steps, batch], −1 for none.

    Also returns what all divisions have used: bool [samples].
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
    """One loader process's samples in the order of use, their blocks in that of fetching, its number of batches."""
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
        yield {"url": f"{index.entries[index.blocks[block].shard]['url']}#{block}", "block": block}


def in_order(samples: Iterable[dict[str, Any]], order: list[int], index: Index) -> Iterator[dict[str, Any]]:
    """The samples with these numbers, in this order. Others are dropped; a sample is held until its turn.

    PermanentError if a block holds others than the index lists.
    """
    due, url = set(order), "#0"
    held: dict[int, dict[str, Any]] = {}
    blocks = itertools.groupby(samples, key=lambda sample: sample["__url__"])
    try:
        for number in order:
            while number not in held:
                url, group = next(blocks, (url, ()))
                shard, _, block = url.rpartition("#")
                found, start, listed = list(group), int(index.starts[int(block)]), index.blocks[int(block)].samples
                if len(found) != listed:
                    raise ValueError(f"{plural(len(found), 'sample')}, but the index lists {listed}")
                if bad := [s["__key__"] for s in found if "cls" not in s or not s.keys() & {*shards.IMAGES}]:
                    raise ValueError(f"sample {bad[0]!a} has no image or no cls")
                held |= {n: sample | {"__url__": shard} for n, sample in enumerate(found, start) if n in due}
            yield held.pop(number)
    except Exception as error:  # of many kinds; WebDataset adds arguments to them, the url last if it is a tar error
        if isinstance(error, UserError):  # no name in `except`: it is gone when the end of a process closes this
            raise
        url = next((arg for arg in error.args[:0:-1] if isinstance(arg, str)), url)
        problem = reason(Exception(str(*error.args[:1]).partition(" @ <")[0]))
        raise PermanentError(f"{url.replace('#', ', block ')}: {problem}; make the index again") from None


# ---------------------------------------------------------------- samples → images
# From here to the device an image is uint8 [S, S, 3], as decoders make it: a quarter of float32's bytes to copy, and a
# permuted view of it is the channels_last tensor that GPUs prefer.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]; torchvision's constants
IGNORE_INDEX = -1  # label of a row that does not count: padding, or an image that could not be decoded


def random_crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom as torchvision's RandomResizedCrop draws them, in a tenth of its get_params()' time."""
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


def shorten_jpeg(file: io.BytesIO, image: Image.Image, bottom: int) -> Image.Image:
    """The image in this file, without most rows below `bottom`: on average a seventh, which need not be decoded.

    Its header gets a smaller height, at which the decoder stops; the rows above are decoded alike.
    """
    data, height = file.getvalue(), bottom + 2  # 2 more: the last rows' colours are interpolated from both sides
    # The header of a sequential image in three colours: ITU T.81, B.2.2. A progressive one begins FF C2.
    at = data.find(struct.pack(">5sHH", b"\xff\xc0\x00\x11\x08", image.height, image.width))
    if at < 0 or height > 0.95 * image.height or b"\xff\xd9" not in data[-1024:]:  # or its end is missing
        return image
    file.seek(at + 5)
    file.write(height.to_bytes(2, "big"))
    return shards.open_image(file)


def resize_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] → uint8 [size, size, 3], within 2 levels of Pillow's bilinear filter, in half of its time."""
    # Bytes are resized, and stay, as they lie, if the strides, the batch's too, say channels_last.
    batch = pixels[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def sample_rng(sample: dict[str, Any], config: LoaderConfig, epoch: int) -> random.Random:
    """What draws a sample's augmentation: a function of (seed, epoch, key)."""
    return random.Random(f"{config.seed}/{epoch}/{sample['__key__']}")


warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's, of bytes that nobody writes to
ImageFile.MAXBLOCK = 1 << 20  # bytes that Pillow reads or converts at once: a whole image, not pieces to be joined


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [H, W, 3], in RGB."""
    return torch.frombuffer(shards.to_rgb(image).tobytes(), dtype=torch.uint8).view(image.height, image.width, 3)


def train_image(data: bytes, config: LoaderConfig, rng: random.Random) -> torch.Tensor:
    """A random crop, mirrored at random: uint8 [size, size, 3].

    Another augmentation goes here. If `rng` draws its parameters, an image gets the same ones also after a resume.
    """
    file = io.BytesIO(data)
    image = shards.open_image(file)
    box = random_crop(*image.size, rng)
    pixels = resize_pixels(pixels_of(shorten_jpeg(file, image, box[3]).crop(box)), config.size)
    return pixels.flip(1) if rng.random() < 0.5 else pixels


def val_image(data: bytes, config: LoaderConfig) -> torch.Tensor:
    """The image's middle, by torchvision's Resize and CenterCrop: uint8 [size, size, 3]."""
    image = shards.to_rgb(shards.open_image(io.BytesIO(data)))
    return pixels_of(center_crop(resize(image, config.resize), config.size))


def decode(sample: dict[str, Any], config: LoaderConfig, epoch: int) -> tuple[torch.Tensor | None, int | str]:
    """One sample as (uint8 [size, size, 3], label), or as (None, message) if it can't be decoded.

    For another data set change how the two are read from the sample.
    """
    try:
        label = int(sample["cls"])
        if not 0 <= label < len(config.index.classes):
            raise ValueError(f"label {label}, but the index has {plural(len(config.index.classes), 'class')}")
        data = shards.image_bytes(sample)
        if config.training:
            return train_image(data, config, sample_rng(sample, config, epoch)), label
        return val_image(data, config), label
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds on bad bytes
        return None, f"{sample['__url__']}: {sample['__key__']}: {reason(error)}"


# ---------------------------------------------------------------- images → batches


def fill(samples: Iterable[tuple], rows: int) -> Iterator[tuple]:
    """The samples, then rows that do not count: as many in all as make every rank's number of batches."""
    return itertools.islice(itertools.chain(samples, itertools.repeat((None, ""))), rows)


def make_buffers(config: LoaderConfig) -> Iterator[torch.Tensor]:
    """The memory of a process's batches, uint8 [B, S, S, 3], used in turn: fresh memory costs as much as resizing.

    The DataLoader lets a process make two batches ahead. With four buffers the last two that were handed out stay
    valid; if batches are copied into pinned memory, two are enough.
    """
    for _ in range(2 if config.pin else 4):
        buffer = torch.empty(config.batch, config.size, config.size, 3, dtype=torch.uint8)
        yield buffer.share_memory_() if get_worker_info() else buffer


def collate(rows: list[tuple[torch.Tensor | None, int | str]], buffers: Iterator[torch.Tensor]) -> list:
    """One batch: [images uint8 [B, S, S, 3], labels, error messages]. UserError if no image of it can be decoded.

    Rows that are missing, or could not be decoded, have the label −1 and the pixels of the first good row, because
    batch normalisation sees them. Labels are a list: as a tensor they would need shared memory of their own.
    """
    buffer, errors = next(buffers), [text for image, text in rows if image is None and text]
    blank = torch.zeros_like(buffer[0])
    good = next((image for image, _ in rows if image is not None), blank)
    if errors and good is blank:
        raise UserError(f"none of {plural(len(errors), 'image')} of a batch can be decoded: {errors[0]}")
    labels = [IGNORE_INDEX if image is None else label for image, label in rows]
    return [torch.stack([good if image is None else image for image, _ in rows], out=buffer), labels, errors]


def run_epochs(config: LoaderConfig, first: int, history: list[Division]) -> Iterator[list | UserError]:
    """The batches of one loader process, from within an epoch to the end of the run."""
    info, turn, buffers = get_worker_info(), history[-1].done, itertools.cycle(make_buffers(config))
    epochs = itertools.takewhile(lambda epoch: epoch < config.epochs, itertools.count(first))
    for epoch in epochs if config.training else [0]:
        # The DataLoader takes batches from its processes in turn and does not start over with an epoch: batch `turn` of
        # the epoch, modulo workers, comes from process 0.
        worker = ((info.id if info else 0) + turn) % max(1, config.workers)
        try:
            yield from make_pipeline(config, epoch, history, worker, buffers)
        except Exception as error:
            if not isinstance(error, UserError):
                raise
            yield error  # handed over like a batch: the DataLoader would make a page of traceback of it
            return
        turn -= count_batches(config, history)
        history = [config.division]


# ---------------------------------------------------------------- batches, epoch after epoch
# Training's loader processes live for the whole run and go on into the next epoch while validation runs. Validation's
# are started for each validation and end with it.

HANG_TIMEOUT = 1200  # seconds that a loader process may take for a batch, beside those of retried reads


def start_worker(worker: int) -> None:
    """In a loader process: end with the main process, without a word about memory that could not be handed over."""
    shards.end_with_parent()
    sys.excepthook = lambda *_: None


class Loader:
    """One rank's batches, an epoch for each iter(): [images uint8 [B, S, S, 3], labels int64 [B], −1: does not count].

    The memory of images is used again: a batch and the one before stay valid. The loader keeps its own epoch and
    position, because Lightning calls iter() before it knows the epoch; nothing happens before a batch is asked for.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self.epoch, self.history = config, 0, [config.division]
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

    def start(self) -> Iterator[list]:
        """Start the loader processes: the batches from here to the end of the run."""
        config, options, folder = self.config, {}, tempfile.gettempdir()
        if config.workers:
            if len(folder) > 75:  # they hand over memory through a socket there, whose path has at most 107 characters
                raise UserError(f"TMPDIR={folder}: longer than 75 characters; set a shorter one, such as TMPDIR=/tmp")
            options = dict(multiprocessing_context=START_METHOD, timeout=config.retry_for + HANG_TIMEOUT)
        batches = wds.DataPipeline(partial(run_epochs, config, self.epoch, self.history.copy()))
        return iter(DataLoader(batches, batch_size=None, num_workers=config.workers, pin_memory=config.pin,
                               worker_init_fn=start_worker, **options))

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        self.advance()
        epoch = self.epoch
        while self.epoch == epoch and self.done < len(self):  # also if another iterator hands out batches
            begun = time.perf_counter()
            if self.batches is None:
                self.batches = self.start()
            batch = next(self.batches)
            self.waited += time.perf_counter() - begun
            if isinstance(batch, UserError):
                raise batch
            images, labels, errors = batch
            for error in errors:
                warn(f"not used: {error}")
            self.bad += len(errors)
            if self.bad > self.config.max_bad:
                limit = f"--max-bad={self.config.max_bad}"
                raise UserError(f"{plural(self.bad, 'undecodable image')} in an epoch, {limit}; last: {errors[-1]}")
            self.history[-1] = self.history[-1]._replace(done=self.history[-1].done + 1)
            if not self.config.training and self.done == len(self):
                self.batches = None  # ends the loader processes; the batch stays valid
            yield [images, torch.tensor(labels, pin_memory=self.config.pin)]

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: equal on all ranks, and saved in checkpoints."""
        ended = self.done == len(self)
        history = [] if ended else [division for division in self.history if division.done]
        return {"epoch": self.epoch + ended, "history": list(map(list, history))} | self.identify(history)

    def identify(self, history: list[Division]) -> dict[str, Any]:
        """What the order of an epoch depends on. Its digest changes if a library or this script computes another."""
        config, order = self.config, ""
        if history:
            plan, _ = plan_epoch(config.index, config.training, config.seed, self.epoch, history)
            order = hashlib.sha256(plan.tobytes()).hexdigest()[:16]
        return {"index": config.index.digest, "seed": config.seed, "order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. UserError if it is within an epoch of another index, seed or order."""
        self.epoch, history = state["epoch"], [Division(*values) for values in state["history"]]
        ours = self.identify(history)
        mismatches = [f"{key} {state[key]} there, {ours[key]} here" for key in ours if state[key] != ours[key]]
        if history and mismatches:
            raise UserError("--resume: the checkpoint is within an epoch of other data or another order ("
                            f"{'; '.join(mismatches)}); resume from one at an epoch's end, such as best.ckpt")
        if not history or history[-1]._replace(done=0) != self.config.division:
            history.append(self.config.division)
        self.history = history


def compare_ranks(world: int, ours: dict[str, Any]) -> None:
    """UserError, which names the key and both values, unless all ranks have the same."""
    ranks = [ours] * world
    if world > 1:
        torch.distributed.all_gather_object(ranks, ours)
    for rank, theirs in enumerate(ranks):
        if keys := [key for key in ranks[0] if ranks[0][key] != theirs.get(key)]:
            values = "; ".join(f"{key} is {ranks[0][key]} on rank 0, {theirs.get(key)} on rank {rank}" for key in keys)
            raise UserError(f"ranks differ: {values}; give all of them the same flags, shards and --output")


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
        with torch.serialization.safe_globals([argparse.Namespace]):  # in those of torchvision's references
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: the system's, pickle's, zip's
        kind = f"not a file of weights or a checkpoint ({type(error).__name__})"
        raise UserError(f"{flag}: {getattr(error, 'strerror', None) or kind}") from None


def check_classes(theirs: list[str], classes: list[str], flag: str) -> None:
    """UserError if a checkpoint is of other classes."""
    pairs = itertools.zip_longest(theirs, classes)
    if differing := next((f"{n} is {a} there, {b} here" for n, (a, b) in enumerate(pairs) if a != b), None):
        raise UserError(f"{flag}: of {plural(len(theirs), 'class')}, here are {len(classes)}: class {differing}")


def read_weights(model: str, weights: str, classes: list[str], flag: str) -> dict[str, torch.Tensor]:
    """The state dict of torchvision's weights of this model and name, or of a file. UserError names the flag."""
    if named := named_weights(model, weights):
        if model in ("googlenet", "inception_v3"):
            raise UserError(f"{flag}: {model}'s published weights expect inputs of another normalisation")
        if len(classes) == 1000 and not shards.is_imagenet(classes):
            rank_zero_only(warn)(f"{flag}: for ImageNet's classes in sorted order; the index has 1,000 others")
        try:
            return torchvision.models.get_model(model, weights=named).state_dict()
        except (OSError, RuntimeError) as error:  # it is downloaded, and has a wrong hash if that was cut
            raise UserError(f"{flag}: cannot be downloaded: {reason(error)}; give a file with --weights") from None
    if not Path(weights).exists():
        names = ", ".join(torchvision.models.get_model_weights(model).__members__)
        raise UserError(f"{flag}: no such file; --weights takes a file, or for {model} one of {names}")
    state = load_checkpoint(weights, flag)
    if isinstance(state, dict) and len(state.get("classes", [])) == len(classes):  # or else the last layer is new
        check_classes(state["classes"], classes, flag)
    for key in ("state_dict", "model"):  # checkpoints: of this script and of others, of torchvision's references
        state = state.get(key, state) if isinstance(state, dict) else {}
    # DistributedDataParallel, torch.compile and this script put names before the keys.
    return {re.sub(r"^((module|_orig_mod|model)\.)+", "", str(key)): value for key, value in state.items()}


@torch.no_grad()
def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], classes: int, flag: str = "") -> list[str]:
    """Copy the weights into the model. UserError, which names the flag, if they do not fit.

    If they are for another number of classes, the last layer keeps its random values: returns the names of its tensors.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.lower().startswith("aux")}
    differ = {key for key in own.keys() & state.keys() if own[key].shape != getattr(state[key], "shape", None)}
    last = {key for key in differ if len(own[key]) == classes and own[key].shape[1:] == state[key].shape[1:]}
    missing = {key for key in own.keys() ^ state.keys() if not key.endswith("num_batches_tracked")}  # as in old files
    if wrong := (differ - last) | missing:
        what = f"{plural(len(wrong), 'tensor')} do not fit, such as {min(wrong)}"
        raise UserError(f"{flag}: not for this --model: {what}")
    for key in own.keys() & state.keys() - last:
        own[key].copy_(state[key])  # not load_state_dict(): some models want a version that a file may lack
    return sorted(last)


# ---------------------------------------------------------------- batches → gradients
# Lightning has the loop, the devices, the ranks and the precision. What it can't know is here: the model and its
# recipe, and the exact count of validated images.


def lr_factor(position: tuple[float, float], warmup: float, epochs: float) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then a cosine decay to 0. All in epochs."""
    start, end = position  # of the step: no step has rate 0
    if end < warmup:
        return end / warmup
    return 0.5 * (1 + math.cos(math.pi * max(0.0, start - warmup) / (epochs - warmup)))


REMEDIES = {  # parts of the messages of failures that a user can do something about
    "Bus error|</torch_": "/dev/shm is full: give it more (docker run --shm-size) or use fewer --workers",
    r"DataLoader worker \(pid|MemoryError|can't allocate memory": "use fewer --workers, a smaller --shuffle or batch",
    "DataLoader timed out": "a loader process hangs: rerun with --resume",
    "OutOfMemoryError": "give a smaller --batch-size",
    "^Dist|by peer": "another rank ended: its message says why",
}


def explain_failure(error: Exception) -> str | None:
    """A failure of this machine or of another rank, in one line; None for other errors."""
    text = f"{type(error).__name__}: {error}".strip()
    remedy = next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text)), None)
    return remedy and f"{remedy} ({text.splitlines()[-1][-150:]})"  # the last line of a loader process's traceback


def check_finite(loss: float, name: str, step: int | None) -> None:
    """UserError if the loss is not a finite number. step: None in an evaluation."""
    if not math.isfinite(loss):
        remedy = ("use a lower --lr, more --warmup-epochs or --precision=32-true, and resume from an earlier checkpoint"
                  if step else "evaluate other weights, or with --precision=32-true")
        raise UserError(f"the {name} is {loss}{f' at step {step}' if step else ''}; {remedy}")


class Classifier(pl.LightningModule):
    """The network, its loss, its optimiser and its metrics.

    images: in validation · settings: what all ranks must have alike · the rest are flags
    """

    def __init__(
        self, model: str, classes: list[str], images: int, lr: float, momentum: float, weight_decay: float,
        label_smoothing: float, warmup_epochs: float, val_size: int, val_resize: int, seed: int = 0,
        compile: bool = False, settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["classes", "settings"])
        self.classes, self.settings = classes, settings or {}
        self.model = build_model(model, len(classes)).to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("sums", torch.zeros(4), persistent=False)  # validated images, top-1, top-5, losses
        self.result: dict[str, float] = {}  # of the last validation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S, 3] → logits [B, classes]. The permuted view is channels_last as it lies: no copy.

        UserError with the model's own message if it does not accept images of this size.
        """
        try:
            return self.model((images.permute(0, 3, 1, 2) - self.mean) / self.std)
        except (RuntimeError, ValueError, AssertionError) as error:
            if explain_failure(error):
                raise
            sizes = f"{plural(len(images), 'image')} of {images.shape[1]} × {images.shape[2]} px"
            flag = "--compile" if self.hparams.compile else f"--model={self.hparams.model}"
            raise UserError(f"{flag}, {sizes}: {reason(error)}") from error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD of two groups: norms and biases, the parameters with one dimension, do not decay (arXiv:1812.01187)."""
        decay, rest = ([p for p in self.parameters() if (p.ndim > 1) == decays] for decays in (True, False))
        return torch.optim.SGD([{"params": decay}, {"params": rest}], lr=self.hparams.lr)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint |= {"metrics": self.result, "classes": self.classes}

    def setup(self, stage: str) -> None:
        """Before the ranks' models are compared, which would say less."""
        compare_ranks(self.trainer.world_size, self.settings)

    def on_train_batch_start(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Set the recipe's values, which depend only on flags and on the position in epochs, also after a resume."""
        h, epochs, loader = self.hparams, self.trainer.max_epochs, self.trainer.train_dataloader
        rate = h.lr * loader.config.batch * self.trainer.world_size / 256
        rate *= lr_factor(loader.position, min(h.warmup_epochs, epochs / 2), epochs)
        for group, decay in zip(self.optimizers().param_groups, (h.weight_decay, 0.0)):
            group |= {"lr": rate, "momentum": h.momentum, "weight_decay": decay}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        assert batch_idx == self.trainer.train_dataloader.done - 1, "Lightning has lost or repeated a batch"
        # Dropout too is a function of (seed, step, rank): a resumed run draws what it would have drawn.
        torch.manual_seed(random.Random(f"{self.hparams.seed}/{self.global_step}/{self.global_rank}").getrandbits(63))
        # The sum over valid rows, divided by all rows: a sample has the same weight on every rank.
        options = dict(label_smoothing=self.hparams.label_smoothing, ignore_index=IGNORE_INDEX, reduction="sum")
        return F.cross_entropy(self(images), labels, **options) / len(labels)

    def on_validation_epoch_start(self) -> None:
        self.sums.zero_()
        if self.trainer.world_size > 1:  # batch-norm statistics differ between ranks; rank 0's are saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images).float()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        right = logits.topk(min(5, len(self.classes))).indices == labels[:, None]  # a label −1 is in no row
        self.sums += torch.stack([(labels != IGNORE_INDEX).sum(), right[:, 0].sum(), right.sum(), loss])

    def on_validation_epoch_end(self) -> None:
        """Print the result. UserError unless every image was seen exactly once and the loss is finite."""
        seen, top1, top5, loss = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum").tolist()
        wanted = self.hparams.images
        fitting = self.trainer.state.fn == "fit"
        position = f" (epoch {self.current_epoch + 1}, step {self.global_step})" if fitting else ""
        self.result = {"val_top1": top1 / wanted, "val_top5": top5 / wanted, "val_loss": loss / wanted}
        self.print(f"validated {seen:.0f}/{wanted} images: top-1 {top1 / wanted:.2%}, top-5 {top5 / wanted:.2%}, "
                   f"loss {loss / wanted:.4f}{position}".replace("%", " %"))
        if seen != wanted:
            raise UserError(f"validation saw {seen:.0f} images, the index lists {wanted}")
        check_finite(loss, "validation loss", self.global_step if fitting else None)


# ---------------------------------------------------------------- pictures
# --preview draws samples → one sheet; training draws metrics.csv → curves.png.


def preview(config: LoaderConfig, path: Path) -> None:
    """Draw the first training batch: each image with its class and its crop's outline, beside what the model sees."""
    size, names, pictures = config.size, config.index.class_names or config.index.classes, []
    stages = make_pipeline(config, 0, [config.division], 0, make_buffers(config)).pipeline[:5]  # without map and so on
    for sample in itertools.islice(wds.DataPipeline(*stages), config.batch):
        pixels, label = decode(sample, config, epoch=0)
        if pixels is None:
            continue  # can't be decoded: training reports it
        image = pixels_of(shards.open_image(io.BytesIO(shards.image_bytes(sample)))).permute(2, 0, 1)
        box = torch.tensor([random_crop(image.shape[2], image.shape[1], sample_rng(sample, config, epoch=0))])
        small = resize(image, size - 1, max_size=size)
        box = box * small.shape[2] / image.shape[2]
        small = draw_bounding_boxes(small, box, [names[int(label)].split(",")[0]], ["red"], width=2)
        pictures += [center_crop(small, size), pixels.permute(2, 0, 1)]
    if not pictures:
        raise UserError(f"--preview: no image can be decoded: {label}")
    grid = make_grid(pictures, nrow=2 * math.ceil(math.sqrt(len(pictures) / 4)), padding=4, pad_value=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path, "PNG")
    print(f"{path}: {plural(len(pictures) // 2, 'image')}, each beside what the model sees, {size} px")


def draw_curves(metrics: Path, path: Path) -> None:
    """Draw loss, accuracy, learning rate and speed over the epochs of a metrics.csv, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = ["train_loss", "val_loss"], ["val_top1", "val_top5"], ["lr"], ["train_images/s"]
    for axes, names in zip(figure.subplots(2, 2).flat, panels):
        for name in names:
            # By position in epochs. After a resume the rows of repeated steps come twice; the later ones count.
            curve = {float(row["epoch"]): float(row[name]) for row in rows if row.get(name)}
            axes.plot(*zip(*sorted(curve.items())), label=name, marker="." if len(curve) < 50 else "")
        axes.set(xlabel="epoch", xlim=(0, None))
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- checkpoints, progress, results


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step; Lightning may copy the new one from TMPDIR over the old one."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: None = None) -> None:
        data = io.BytesIO()
        torch.save(checkpoint, data)
        shards.write_file(Path(path), data.getvalue())


COLUMNS = ("epoch", "lr", "step", "train_images/s", "train_loss", "train_wait", "val_loss", "val_top1", "val_top5")


class Results(TQDMProgressBar):
    """What a training run leaves in its folder; and the figures that it shows, in a bar or in a line for each entry.

    last.ckpt is written every `every` steps, after each validation and at --max-steps; best.ckpt if a validation has
    the best top-1 accuracy. With Lightning's ModelCheckpoint, a run that is killed in validation resumes without it.
    """

    BAR_FORMAT = "{desc}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"  # fits 80 columns, with all figures

    def __init__(self, folder: Path, every: int, max_steps: int, loader: Loader) -> None:
        super().__init__()
        self.folder, self.every, self.max_steps, self.loader = folder, every, max_steps, loader
        self.best = -1.0
        self.figures: dict[str, str] = {}
        self.window: tuple[int, float, float] | None = None  # where the next entry starts: step, seconds waited, clock

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (self.folder / "best.ckpt").exists():  # or else this folder has no best epoch yet
            self.best = state["best"]

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
        """What the bar shows; Lightning's own would read the loss off the device in each step."""
        return self.figures

    def on_train_start(self, trainer: pl.Trainer, module: Classifier) -> None:
        compare_ranks(trainer.world_size, {"step": trainer.global_step} | self.loader.state_dict())
        path = self.folder / "metrics.csv"
        if trainer.is_global_zero:
            if not path.exists():
                path.write_text(",".join(COLUMNS) + "\n")
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a power cut may have left a part of a line
        super().on_train_start(trainer, module)
        self.on_train_epoch_start(trainer)  # Lightning does not call it for an epoch that is resumed

    def on_train_epoch_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.epoch = f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"  # Lightning's count from 0
        self.train_progress_bar.set_description(self.epoch)

    def record(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        """Add an entry to metrics.csv and to Lightning's loggers, if there are any."""
        if trainer.is_global_zero:
            with open(self.folder / "metrics.csv", "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(values | {"step": trainer.global_step})
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *args) -> None:
        if self.window is None:  # at the start and after validation, whose seconds are not counted
            self.window = trainer.global_step, self.loader.waited, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Classifier, outputs: dict, batch: list, batch_idx: int
    ) -> None:
        step, loader = trainer.global_step, self.loader
        if step % trainer.log_every_n_steps == 0:
            loss = outputs["loss"].item()  # waits for the device
            (first, waited, clock), self.window = self.window, (step, loader.waited, time.perf_counter())
            seconds = self.window[2] - clock
            speed = (step - first) * len(batch[1]) * trainer.world_size / seconds
            wait = (loader.waited - waited) / seconds
            entry = {"train_loss": loss, "train_images/s": speed, "train_wait": wait}
            where = {"epoch": loader.position[1], "lr": trainer.optimizers[0].param_groups[0]["lr"]}
            self.record(trainer, where | entry)
            self.figures = {"loss": f"{loss:.3f}", "img/s": f"{speed:,.0f}", "wait": f"{wait:.0%}"}
            if self.is_disabled:
                figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
                show(f"{self.epoch}, step {loader.done}/{len(loader)}: {figures}")
            check_finite(loss, "training loss", step)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        # Not Lightning's max_steps: with it, a run that is resumed at an epoch's end skips an epoch.
        trainer.should_stop = 0 <= self.max_steps <= step
        due = trainer.should_stop or (self.every and step % self.every == 0)
        if due and loader.done < len(loader):  # after an epoch's last step comes its validation
            trainer.save_checkpoint(self.folder / "last.ckpt")
            trainer.limit_val_batches *= not trainer.should_stop  # Lightning would validate wherever it stops

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Classifier) -> None:
        super().on_train_epoch_end(trainer, module)
        self.window = None
        if self.loader.done < len(self.loader):  # --max-steps
            return
        self.record(trainer, {"epoch": trainer.current_epoch + 1.0} | module.result)
        if trainer.strategy.broadcast(module.result["val_top1"] > self.best):
            self.best = module.result["val_top1"]
            trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.loader.advance()
        try:
            rank_zero_only(draw_curves)(self.folder / "metrics.csv", self.folder / "curves.png")
        except Exception as error:  # a picture's failure does not end a run
            warn(f"{self.folder / 'curves.png'}: not drawn: {reason(error)}")


# ---------------------------------------------------------------- command line


def make_parser() -> argparse.ArgumentParser:
    """The flags. The defaults of the recipe are those of NVIDIA's ResNet-50 v1.5 (DeepLearningExamples)."""
    parser = shards.Parser("Train a torchvision model on ImageNet from WebDataset shards.")
    positive, whole, pixels = shards.bounded(int, 1), shards.bounded(int, 0), shards.bounded(int, 16, 4096)
    seconds, seed = shards.bounded(float, 0), shards.bounded(int, 0, 2**32 - 1)
    real, share = shards.bounded(float, 0), shards.bounded(float, 0, 1)
    add = parser.add_argument_group("data").add_argument
    add("--shards", "--base", type=shards.prefix_arg, default="./data",
        help="a folder, http(s)://, s3://, gs://, hf:// or pipe:COMMAND; file names are appended, or replace %%s in it")
    add("--index", type=shards.prefix_arg, help="prefix of the index, if it is not beside the shards")
    add("--batch-size", type=positive, default=256, help="images per device and step")
    add("--workers", type=whole, help="loader processes per rank (default: its share of the cores)")
    add("--train-size", type=pixels, default=224, help="side of a training crop, pixels")
    add("--val-size", type=pixels, default=224, help="side of the validation crop, pixels")
    add("--val-resize", type=pixels, default=256, help="shorter side before that crop, pixels")
    add("--shuffle", type=whole, default=4000,
        help="samples by which the shuffle may delay a sample; a worker holds half as many on average, 110 KB each")
    add("--cache", type=shards.path_arg, help="folder on a local disk for the blocks that are read")
    add("--retry-for", type=seconds, default=300, help="seconds for which a failing read is repeated")
    add("--timeout", type=shards.bounded(float, 0.1), default=60,
        help="seconds after which a read fails, of a command without a byte")
    add("--max-bad", type=whole, default=100,
        help="undecodable training images per rank and epoch that are reported and left out; more are an error")
    add("--seed", type=seed, default=0, help="determines initial weights, order, crops and flips")
    add("--preview", type=shards.path_arg, help="draw the first training batch, and exit")
    models = torchvision.models.list_models(module=torchvision.models)
    add = parser.add_argument_group("model and recipe").add_argument
    add("--model", metavar="NAME", choices=models, default="resnet50", help="any classification model of torchvision")
    add("--weights", metavar="NAME|FILE", type=shards.prefix_arg,
        help="start from torchvision's weights, such as IMAGENET1K_V1 or DEFAULT, or from a file with a state dict or "
        "checkpoint; the last layer is new if the number of classes differs")
    add("--evaluate", action="store_true", help="only validate --weights or --resume, by default with their sizes")
    add("--lr", type=real, default=0.256, help="peak learning rate for a global batch of 256; is scaled")
    add("--momentum", type=share, default=0.875, help="momentum of SGD")
    add("--weight-decay", type=real, default=1 / 32768, help="not of norms and biases (default: 1/32768)")
    add("--label-smoothing", type=share, default=0.1, help="share of the target spread over all classes")
    add("--warmup-epochs", type=real, default=8, help="epochs of linear warm-up, at most half of the run")
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add = parser.add_argument_group("trainer (Lightning's names)").add_argument
    add("--accelerator", default="auto", help="auto, cpu, gpu, …")
    add("--devices", default=os.environ.get("LOCAL_WORLD_SIZE", "auto"),
        help="per node: auto, a number, or a list such as 0,2; torchrun sets it")
    add("--num-nodes", type=positive, default=int(os.environ.get("GROUP_WORLD_SIZE", 1)), help="torchrun sets it")
    add("--precision", help="32-true, bf16-mixed, … (default: on a GPU bf16-mixed or 16-mixed)")
    add("--max-epochs", type=positive, default=90, help="epochs to train")
    add("--max-steps", type=shards.bounded(int, -1), default=-1,
        help="stop after N steps; -1: no limit. The learning rate follows --max-epochs")
    add("--log-every", type=positive, default=50, help="steps between two entries of the log")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=shards.path_arg, default="./output", help="each run writes to DIR/version_N")
    add("--checkpoint-every", type=whole, default=1000,
        help="steps between checkpoints, beside those after each validation; 0: none")
    add("--resume", nargs="?", const=True, type=shards.path_arg,
        help="continue from a checkpoint or version folder; without PATH from the last run in --output, if any")
    return parser


def run_number(folder: Path) -> int:
    """N of version_N; -1 for other names."""
    return int(folder.name[8:]) if re.fullmatch(r"version_\d+", folder.name) else -1


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume names, or last.ckpt of the last run in --output that has one; None if none has."""
    if args.resume is True:
        return max(args.output.glob("version_*/last.ckpt"), key=lambda path: run_number(path.parent), default=None)
    return args.resume / "last.ckpt" if args.resume and args.resume.is_dir() else args.resume


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The model and sizes that belong to the weights that are to be evaluated, as far as they are known."""
    if named := named_weights(args.model, args.weights):
        return {"val_size": named.transforms().crop_size[0], "val_resize": named.transforms().resize_size[0]}
    path, settings = find_checkpoint(args) or Path(args.weights or ""), {}
    if path.suffix == ".ckpt" and path.is_file() and isinstance(checkpoint := load_checkpoint(path, str(path)), dict):
        settings = checkpoint.get("hyper_parameters", {})
    elif path.name == "model.pt":  # export() wrote metrics.json beside it
        settings = shards.read_json(path.with_name("metrics.json"))
    return {key: settings[key] for key in ("model", "val_size", "val_resize") if key in settings}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags' values; exits with status 2 if they are not valid."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.evaluate:
        if (args.weights is None) == (args.resume is None):
            parser.error("--evaluate: give --weights or --resume")
        parser.set_defaults(**settings_of(args))
        args = parser.parse_args(argv)
    if args.val_size > args.val_resize:
        parser.error(f"--val-size {args.val_size} does not fit into --val-resize {args.val_resize}")
    return args


# ---------------------------------------------------------------- train, evaluate


def read_indexes(args: argparse.Namespace, *splits: str) -> list[Index]:
    """The indexes of these splits. UserError if one can't be read or they do not fit each other."""
    indexes = [read_index(args.shards, split, args.retry_for, args.timeout, args.index) for split in splits]
    if any(index.classes != indexes[0].classes for index in indexes):
        raise UserError(f"--shards={printable(args.shards)}: train and val have different classes; convert both again")
    return indexes


def read_resumed(path: Path, args: argparse.Namespace, index: Index) -> dict[str, Any]:
    """The checkpoint to resume. UserError if it is not one of this script, or of another model or other classes."""
    flag = f"--resume={path}"
    checkpoint = load_checkpoint(path, flag)
    try:
        state, model = checkpoint["callbacks"]["Results"], checkpoint["hyper_parameters"]["model"]
        parts = "state_dict", "lr_schedulers", "classes", "global_step", "pytorch-lightning_version"
        _ = [state["best"], *(state["loader"][key] for key in ("epoch", "history", "index", "seed", "order")),
             *(checkpoint[key] for key in parts), checkpoint["loops"]["fit_loop"], checkpoint["optimizer_states"][0]]
    except (TypeError, LookupError) as error:
        raise UserError(f"{flag}: not a checkpoint of this script, or an incomplete one (no {error})") from None
    if model != args.model:
        raise UserError(f"{flag}: of --model={model}, not {args.model}; give the same, or start without --resume")
    check_classes(checkpoint["classes"], index.classes, flag)
    return checkpoint


def make_folder(output: Path, checkpoint: Path | None) -> Path:
    """The folder of this run: that of the last.ckpt that it continues, if it is in --output, or a new one.

    Only rank 0 makes it and writes to it, so what other ranks find does not matter.
    """
    if checkpoint and checkpoint.name == "last.ckpt" and checkpoint.parent.parent.resolve() == output.resolve():
        return output / checkpoint.parent.name
    output.mkdir(parents=True, exist_ok=True)
    folder = output / f"version_{max(map(run_number, map(Path, os.listdir(output))), default=-1) + 1}"
    try:
        rank_zero_only(folder.mkdir)()
    except FileExistsError:  # another run took this number meanwhile
        return make_folder(output, checkpoint)
    return folder


def make_model(
    args: argparse.Namespace, index: Index, images: int, settings: dict[str, Any], weights: str | None = None
) -> Classifier:
    """The model for this index's classes and `images` images in validation, with the weights of a name or a file."""
    names = ("model", "lr", "momentum", "weight_decay", "label_smoothing", "warmup_epochs", "val_size", "val_resize",
             "seed", "compile")
    places = ("shards", "index", "cache", "output", "resume", "weights")  # ranks may have their own
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in places}
    flag, number = f"--{'weights' if args.weights else 'resume'}={weights}", plural(len(index.classes), "class")
    values = {name: getattr(args, name) for name in names}
    module = Classifier(classes=index.classes, images=images, settings=settings | flags, **values)
    if weights:
        state = read_weights(args.model, weights, index.classes, flag)
        if new := load_weights(module.model, state, len(index.classes), flag):
            if args.evaluate:
                raise UserError(f"{flag}: not for the {number} of the images; nothing to evaluate")
            show(f"{flag}: not for {number}; the last layer, {new[-1]}, starts at random")
    return module


def make_trainer(args: argparse.Namespace) -> pl.Trainer:
    """Lightning's Trainer by the flags. UserError for a device, precision or number of processes that is wrong."""
    precision = args.precision or "32-true"
    if args.precision is None and args.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    flags = f"--accelerator={args.accelerator} --devices={args.devices} --num-nodes={args.num_nodes}"
    try:
        trainer = pl.Trainer(
            accelerator=args.accelerator, devices=args.devices, num_nodes=args.num_nodes, precision=precision,
            max_epochs=args.max_epochs, log_every_n_steps=args.log_every, benchmark=True, logger=False,
            plugins=[AtomicCheckpointIO()], enable_progress_bar=args.evaluate and sys.stdout.isatty(),
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,  # so that Lightning asks for the loader's length in every epoch
        )
    except Exception as error:  # of many kinds
        raise UserError(f"{flags} --precision={precision}: {str(error).splitlines()[0]}") from None
    if isinstance(trainer.strategy, DDPStrategy):  # 1.4 % faster; validation broadcasts batch norm's buffers
        trainer.strategy._ddp_kwargs |= {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    # A signal ends the process at once. Lightning's handlers would delay that, and exchange a flag before each step.
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    ranks = trainer.num_devices * trainer.num_nodes
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or ranks)
    if started != ranks and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        raise UserError(f"{flags}: {plural(ranks, 'rank')}, but the launcher started {started}; make them equal")
    return trainer


def make_loader(args: argparse.Namespace, index: Index, training: bool, trainer: pl.Trainer) -> Loader:
    """The batches that this rank makes of a split."""
    workers, share = args.workers, shards.count_cores() * trainer.num_nodes // trainer.world_size
    if args.cache:
        with contextlib.suppress(OSError):  # writing the first block tells that the folder can't be written
            args.cache.mkdir(parents=True, exist_ok=True)
    return Loader(LoaderConfig(
        index, training, args.batch_size, args.train_size if training else args.val_size, args.val_resize,
        shuffle=args.shuffle if training else 0, seed=args.seed, rank=trainer.global_rank, world=trainer.world_size,
        workers=max(1, share) if workers is None else workers, retry_for=args.retry_for, timeout=args.timeout,
        cache=args.cache, epochs=args.max_epochs, max_bad=args.max_bad if training else 0,
        pin=trainer.strategy.root_device.type == "cuda",
    ))


def make_loggers(folder: Path) -> list[TensorBoardLogger]:
    """TensorBoard's logger, if it is installed and works."""
    try:
        logger = TensorBoardLogger(folder.parent, name="", version=folder.name)
        _ = logger.experiment  # imports it
        return [logger]
    except ModuleNotFoundError:
        pass
    except Exception as error:  # of other versions than it expects
        warn(f"no log for TensorBoard: {type(error).__name__}: {reason(error)}")
    return []


def write_metrics(folder: Path, args: argparse.Namespace, metrics: dict[str, float | str]) -> None:
    """metrics.json: what was measured, on what."""
    settings = {"model": args.model, "val_size": args.val_size, "val_resize": args.val_resize}
    (folder / "metrics.json").write_text(json.dumps(settings | metrics, indent=2) + "\n")


@rank_zero_only
def export(folder: Path, args: argparse.Namespace) -> None:
    """Write model.pt, the state dict of the best epoch for torchvision's get_model(), and its metrics.json."""
    if (folder / "best.ckpt").exists():
        best = load_checkpoint(folder / "best.ckpt", str(folder))
        state = {key.removeprefix("model."): value.contiguous() for key, value in best["state_dict"].items()}
        AtomicCheckpointIO().save_checkpoint(state, folder / "model.pt")
        write_metrics(folder, args, {"epoch": best["epoch"] + 1, "step": best["global_step"]} | best["metrics"])
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def run_evaluation(args: argparse.Namespace) -> None:
    """Validate --weights, or the checkpoint of --resume, on all ranks. metrics.json goes into a new version folder."""
    [index] = read_indexes(args, "val")
    weights = args.weights or str(find_checkpoint(args) or "")
    if not weights:
        raise UserError(f"--evaluate --resume: no version_N/last.ckpt in {args.output}; name a checkpoint")
    trainer = make_trainer(args)
    loader = make_loader(args, index, False, trainer)
    settings = {"index of val": index.digest, "division": loader.config.division}
    model = make_model(args, index, index.total, settings, weights)
    show(f"{args.model} with {weights} on {trainer.world_size} {trainer.strategy.root_device.type}, "
         f"{trainer.precision}: {plural(index.total, 'val image')}, resized to {args.val_resize} px, cropped to "
         f"{args.val_size} px; from {printable(args.shards)}")
    trainer.validate(model, loader, verbose=False)
    if trainer.is_global_zero:
        folder = make_folder(args.output, None)
        write_metrics(folder, args, {"weights": weights} | model.result)
        print(f"{folder}: metrics.json")


def run_training(args: argparse.Namespace) -> None:
    """Train, from the start or from the checkpoint of --resume, in a version folder. Cheap checks come first."""
    index, val = read_indexes(args, "train", "val")
    if args.preview:
        settings = {name: getattr(args, name) for name in ("shuffle", "seed", "retry_for", "timeout")}
        batch = min(args.batch_size, 32, index.total)
        return preview(LoaderConfig(index, True, batch, args.train_size, **settings), args.preview)
    checkpoint = find_checkpoint(args)
    resumed = read_resumed(checkpoint, args, index) if checkpoint else {}
    if args.resume is True and not checkpoint:
        show(f"--resume: no version_N/last.ckpt in {args.output} yet; starting from the beginning")
    trainer = make_trainer(args)
    loader, val_loader = make_loader(args, index, True, trainer), make_loader(args, val, False, trainer)
    settings = {"index of train": index.digest, "index of val": val.digest, "division": loader.config.division}
    device, ranks = trainer.strategy.root_device.type, trainer.world_size
    show(f"{args.model} on {ranks} {device} × {plural(loader.config.workers, 'worker')}, {trainer.precision}: "
         f"{plural(index.total, 'train image')} in {plural(len(index.entries), 'shard')}, {val.total:,} val in "
         f"{len(val.entries):,}, {plural(len(index.classes), 'class')}; {plural(len(loader), 'batch')} of "
         f"{args.batch_size} × {ranks} an epoch; from {printable(args.shards)}")
    torch.manual_seed(args.seed)
    model = make_model(args, index, val.total, settings, None if checkpoint else args.weights)
    folder = make_folder(args.output, checkpoint)  # as late as this: a failed check leaves no folder
    with rank_zero_only(shards.lock_folder)(folder) or contextlib.nullcontext():
        if resumed:
            loader.load_state_dict(resumed["callbacks"]["Results"]["loader"])
        step = resumed.get("global_step", 0)
        if finished := loader.epoch >= args.max_epochs or (resumed and 0 <= args.max_steps <= step):
            show(f"{checkpoint}: already at epoch {loader.epoch}, step {step}; raise --max-epochs or --max-steps")
        elif resumed:
            show(f"resuming {checkpoint} in epoch {loader.epoch + 1} after {loader.done:,} of "
                 f"{plural(len(loader), 'batch')}, with {plural(ranks, 'rank')} x "
                 f"{plural(loader.config.division.workers, 'worker')} x batch {args.batch_size}")
        if not finished:
            trainer.callbacks += [Results(folder, args.checkpoint_every, args.max_steps, loader)]
            trainer.loggers = make_loggers(folder)
            trainer.fit(model, loader, val_loader, ckpt_path=checkpoint, weights_only=True)
        export(folder, args)


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate, and return the exit status: 0, or 1 after an error."""

    def work() -> None:
        args = parse_args(argv)
        try:
            (run_evaluation if args.evaluate else run_training)(args)
        finally:
            for bar in sorted(tqdm._instances, key=lambda bar: bar.pos):  # an error's message stands below the bars
                bar.close()

    for name in ("pytorch_lightning", "lightning_fabric"):  # their tips; warnings still come through
        logging.getLogger(name).setLevel(logging.WARNING)
    # Of Lightning, of things that are meant so here; the last one wants an argument that PyTorch 2.11 does not have.
    ignored = "does not have many workers|exists and is not empty|smaller than the logging|LeafSpec|broadcast_buffers"
    warnings.filterwarnings("ignore", f".*({ignored}).*")
    return shards.run_script(work, explain_failure)


if __name__ == "__main__":
    sys.exit(main())
