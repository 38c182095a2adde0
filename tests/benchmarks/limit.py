"""What limits training: the loader or the training step.

    python3 tests/benchmarks/limit.py --shards=./data [--steps=100] [imagenet_train.py's flags]
    torchrun --nproc-per-node=8 tests/benchmarks/limit.py --shards=./data --devices=8

Out: images/s of all ranks, with the same model, precision and loader as in training, of
  loader alone    batches that nobody trains on
  step alone      imagenet_train.py's trainer on one batch that is already on the device
  both together   imagenet_train.py's trainer on its loader's batches
the largest amounts of memory, of one rank and of one loader process with all that it shares with others,
and one line that says which of the two limits, and how many workers would be enough.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imagenet_train as script  # noqa: E402
from imagenet_shards import UserError  # noqa: E402


class OneBatch(script.Loader):
    """The same batch, on the device from the start, again and again: training as if loading cost nothing."""

    def __init__(self, config: script.LoaderConfig, device: torch.device) -> None:
        super().__init__(config)
        shape = config.batch, config.size, config.size, 3
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, len(config.index.classes), (config.batch,), device=device)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        self.advance()
        for _ in range(len(self) - self.done):
            self.history[-1] = self.history[-1]._replace(done=self.history[-1].done + 1)
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


def timed_fit(
    args: argparse.Namespace, config: script.LoaderConfig, skip: int, steps: int, one_batch: bool,
    make: Callable = script.Loader, module: pl.LightningModule | None = None, callbacks: tuple = (), **changes,
) -> tuple[float, pl.Trainer]:
    """Seconds of `steps` training steps after the first `skip`, from the loader or from one batch; and the trainer.

    Trained as by imagenet_train.py, its progress and checkpoints included; `changes` are Lightning's arguments.
    """
    watch = Stopwatch(skip)
    options = dict(limit_val_batches=0, max_epochs=10_000, max_steps=skip + steps)
    trainer = script.make_trainer(args, **options | changes)
    trainer.callbacks += [watch, *callbacks]
    if one_batch:
        make = partial(OneBatch, device=trainer.strategy.root_device)
    module = module or script.make_model(args, config.index, 0)
    trainer.fit(module, datamodule=script.ImageNetData(config, config, make))
    gc.collect()
    return watch.seconds, trainer


def timed_load(config: script.LoaderConfig, skip: int, steps: int) -> float:
    """Seconds of `steps` batches after the first `skip`, of as many epochs as that takes."""
    loader = script.Loader(config)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in itertools.islice(batches, skip):
        pass
    begun = time.perf_counter()
    for _ in itertools.islice(batches, steps):
        pass
    seconds = time.perf_counter() - begun
    loader.batches = None  # ends the loader processes
    return seconds


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


def measure(args: argparse.Namespace, config: script.LoaderConfig, steps: int, cores: int) -> None:
    """Print images/s, of all ranks, of the loader alone, the training step alone and both; and what limits them.

    cores: of this machine, for each of its ranks.
    """
    skip = 5 + 2 * config.workers  # the workers make two batches ahead each, which must not count
    images = steps * config.batch * config.world
    seconds, trainer = timed_fit(args, config, skip, steps, one_batch=True)
    step = images / seconds
    trainer.strategy.barrier()  # all ranks load at once, as in training
    load = images / timed_load(replace(config, rank=trainer.global_rank), skip, steps)
    both = images / timed_fit(args, config, skip, steps, one_batch=False)[0]

    device, index = trainer.strategy.root_device.type, config.index
    size = sum(block.length for block in index.blocks) / index.total
    here, loader = (resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:,.2f} GB on the GPU, " if device == "cuda" else ""
    rank_zero_only(print)(
        f"loader alone   {load:9,.1f} images/s, {load * size / 1e6:,.1f} MB/s read\n"
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
            trainer = script.make_trainer(args)
            config = script.make_config(args, script.read_indexes(args, ("train", "val"))[0], True, trainer)
            cores = len(os.sched_getaffinity(0)) // (trainer.world_size // trainer.num_nodes)
            measure(args, config, own.steps, cores)
        except UserError as error:
            print(f"limit.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
