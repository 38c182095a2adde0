"""What a training step costs beyond the model: Lightning, this script's callbacks, the loader.

    python tests/benchmarks/step.py --shards=./data [--rounds=3] [imagenet_train.py's flags]
    python tests/benchmarks/step.py --shards=./data --trace=trace.json

Out: images/s, medians of interleaved rounds, of
  bare     a plain PyTorch loop: the same model, optimiser, schedule and precision, one batch that is on the device
  script   imagenet_train.py's own trainer on that same batch
  shards   imagenet_train.py's own trainer on its loader's batches
--trace writes a profile of the script's steps on the loader's batches (open it in ui.perfetto.dev), and prints how
often a step between two log entries waited for the device: 0 is what is wanted.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

from limit import OneBatch, device_clock, timed_fit  # noqa: E402

import imagenet_train as script  # noqa: E402

SKIP, STEPS = 10, 40
# Calls that stop the CPU until the device has done its work.
WAITS = ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def bare(args: argparse.Namespace, reader: script.LoaderConfig) -> float:
    """Seconds of STEPS steps."""
    trainer = trainer_of(args, [])
    device, dtype = trainer.strategy.root_device, torch.bfloat16
    model = script.make_model(args, reader.index, 0).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=args.momentum, weight_decay=args.weight_decay)
    batch = next(iter(OneBatch(reader, device)))
    for step in range(SKIP + STEPS):
        if step == SKIP:
            begun = device_clock()
        with torch.autocast(device.type, dtype, enabled="bf16" in str(trainer.precision)):
            loss = F.cross_entropy(model(batch[0]), batch[1], label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return device_clock() - begun


def trainer_of(args: argparse.Namespace, callbacks: list[pl.Callback]) -> pl.Trainer:
    return script.make_trainer(
        args, args.output, callbacks=callbacks, enable_checkpointing=False, limit_val_batches=0,
        max_epochs=-1, max_steps=SKIP + STEPS, enable_progress_bar=False,
    )


def trained(args: argparse.Namespace, reader: script.LoaderConfig, one_batch: bool) -> float:
    """Seconds of STEPS steps."""
    return timed_fit(args, reader, SKIP, STEPS, one_batch)[0]


def trace(args: argparse.Namespace, reader: script.LoaderConfig, path: Path) -> None:
    """Profile ten steps in the middle; none of them is one that logs."""
    args = argparse.Namespace(**vars(args) | {"log_every": 10 * STEPS})

    class Profile(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *rest) -> None:
            if trainer.global_step == SKIP:
                self.profile = torch.profiler.profile()
                self.profile.start()
            if trainer.global_step == SKIP + 10:
                self.profile.stop()

    profile = Profile()
    model = script.make_model(args, reader.index, 0)
    trainer = trainer_of(args, [profile, script.SigtermHandler(args.output / "last.ckpt")])
    trainer.fit(model, datamodule=script.ImageNetData(reader, reader))
    profile.profile.export_chrome_trace(str(path))
    waits = sum(event.count for event in profile.profile.key_averages() if event.key in WAITS)
    print(f"{path}: 10 steps, which waited {waits} times for the device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    own, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as output:
        args = script.parse_args([*rest, f"--output={output}"])
        index = script.read_index(args.shards, "train")
        reader = script.LoaderConfig(
            index, True, args.batch_size, args.train_size, shuffle=args.shuffle, workers=args.workers or 2
        )
        if reader.steps < SKIP + STEPS:
            raise SystemExit(f"step.py: an epoch has {reader.steps} batches, needs {SKIP + STEPS}; use a smaller batch")
        if own.trace:
            return trace(args, reader, own.trace)
        ways = {"bare": bare, "script": partial(trained, one_batch=True), "shards": partial(trained, one_batch=False)}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(own.rounds):
            for name, way in ways.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    rates[name].append(STEPS * args.batch_size / way(args, reader))
        base = statistics.median(rates["bare"])
        for name, found in rates.items():
            rate = statistics.median(found)
            print(f"{name:8} {rate:9,.1f} images/s  {rate / base:6.1%}  rounds {' '.join(f'{x:,.1f}' for x in found)}")


if __name__ == "__main__":
    main()
