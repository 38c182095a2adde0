"""What limits training: the loader or the training step.

    python tests/benchmarks/limit.py --shards=./data [--steps=100] [imagenet_train.py's flags]
    torchrun --nproc-per-node=8 tests/benchmarks/limit.py --shards=./data --devices=8

Out: images/s of all ranks, with the same model, precision and loader as in training, of
  loader alone    batches that nobody trains on
  step alone      imagenet_train.py's own trainer on one batch that is already on the device
  both together   imagenet_train.py's own trainer on its loader's batches
the largest amounts of memory, of one rank and of one loader process with all that it shares with others,
and one line that says which of the two limits, and how many workers would be enough.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import imagenet_train as script  # noqa: E402


def image_bytes(index: script.Index) -> float:
    """Bytes to read for an image, on average; of a tree, by a thousand of its files."""
    if not index.tree:
        return sum(index.sizes) / index.total
    names = random.Random(0).sample(index.names, min(1000, index.total))
    return sum(os.path.getsize(Path(index.prefix, name)) for name in names) / len(names)


class OneBatch(script.Loader):
    """The same batch, on the device from the start, again and again: training as if loading cost nothing."""

    def __init__(self, config: script.LoaderConfig, device: torch.device, **options) -> None:
        super().__init__(config, **options)
        size = config.crop(self.epoch)
        self.images = torch.randint(0, 256, (config.batch, size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, len(config.index.classes), (config.batch,), device=device)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for _ in range(len(self) - self.done):
            self.advance()
            yield [self.images, self.labels]


def device_clock() -> float:
    """Seconds, read after the device has finished the work that was given to it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(pl.Callback):
    """The seconds that all steps after the first `skip` take, the device's part included."""

    def __init__(self, skip: int) -> None:
        self.skip = skip

    def on_train_batch_end(self, trainer: pl.Trainer, *args) -> None:
        if trainer.global_step == self.skip:
            self.begun = device_clock()
        if trainer.global_step == trainer.max_steps:
            self.seconds = device_clock() - self.begun


def verdict(load: float, step: float, workers: int, cores: int, device: str) -> str:
    """What limits, and what to do, from images/s of the loader and of the step; cores and workers of a rank."""
    need = math.ceil(max(workers, 1) * step / load)
    if load >= step:
        return f"step-bound: {device} takes {step:,.0f}, the loader would give {load / step:.1f} times as many"
    if need <= cores:
        return f"input-bound: {workers} workers give {load:,.0f}, {device} takes {step:,.0f}: use --workers={need}"
    return (
        f"input-bound: {device} takes {step:,.0f}, for which it needs {need} workers a rank on as many cores, not "
        f"{cores}: smaller images (imagenet_shards.py --resize, --train-size) need fewer"
    )


def timed_fit(
    args: argparse.Namespace, config: script.LoaderConfig, skip: int, count: int, one_batch: bool
) -> tuple[float, pl.Trainer]:
    """Seconds of `count` training steps after the first `skip`, from the loader or from one batch; and the trainer."""
    watch = Stopwatch(skip)
    callbacks = [watch, script.SigtermHandler(args.output / "last.ckpt"), script.ProgressBar()]
    trainer = script.make_trainer(
        args, args.output, callbacks=callbacks, enable_checkpointing=False, limit_val_batches=0,
        max_epochs=1, max_steps=skip + count,
    )
    make = partial(OneBatch, device=trainer.strategy.root_device) if one_batch else script.Loader
    trainer.fit(script.make_model(args, config.index, 0), datamodule=script.ImageNetData(config, config, make))
    return watch.seconds, trainer


def measure(args: argparse.Namespace, config: script.LoaderConfig, steps: int, cores: int) -> None:
    """Print images/s, of all ranks, of the loader alone, the training step alone and both; and what limits them.

    cores: of this machine, for each of its ranks.
    """
    skip = 5 + 2 * config.workers  # the workers make two batches ahead each, which must not count
    count = min(steps, config.steps - skip)
    if count < 1:
        raise script.TrainError(
            f"an epoch has {config.steps} batches, too few for {skip} to warm up and one to measure; "
            "give a smaller --batch-size or fewer --workers"
        )
    images = count * config.batch * config.world

    seconds, trainer = timed_fit(args, config, skip, count, one_batch=True)
    step = images / seconds
    trainer.strategy.barrier()  # all ranks load at once, as in training
    batches = iter(script.Loader(replace(config, rank=trainer.global_rank)))
    for _ in itertools.islice(batches, skip):
        pass
    begun = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    load = images / (time.perf_counter() - begun)
    batches.close()
    both = images / timed_fit(args, config, skip, count, one_batch=False)[0]

    device = trainer.strategy.root_device.type
    here, loader = (resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:,.2f} GB on the GPU, " if device == "cuda" else ""
    rank_zero_only(print)(
        f"loader alone   {load:9,.1f} images/s, {load * image_bytes(config.index) / 1e6:,.1f} MB/s read\n"
        f"step alone     {step:9,.1f} images/s, with a batch that is on {device} already\n"
        f"both together  {both:9,.1f} images/s, {both / min(load, step):.0%} of the slower one\n"
        f"memory          {memory}{here:,.2f} GB in the main process, {loader:,.2f} GB in a loader process\n"
        f"{verdict(load, step, config.workers, cores, device)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", metavar="N", type=int, default=100, help="batches to measure (default: 100)")
    own, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as output:
        args = script.parse_args([*rest, f"--output={output}"])
        try:
            trainer = script.make_trainer(args, args.output, enable_checkpointing=False, callbacks=[])
            config = script.make_configs(args, script.read_indexes(args, ("train", "val")), trainer)[0]
            cores = len(os.sched_getaffinity(0)) // (trainer.world_size // trainer.num_nodes)
            measure(args, config, own.steps, cores)
        except script.TrainError as error:
            print(f"limit.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
