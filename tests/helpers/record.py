"""imagenet_train.py as it stands, with a diary: every rank writes what it trained on and validated, and dies on demand.

    RECORD=DIR [DIE_AT=STEP] [WORKERS="0 2 3"] python record.py [imagenet_train.py's arguments]

DIR/rank-R.jsonl gets a line [epoch, step, "train" or "val", labels] a batch. With a tree of one image a class a label
names an image. DIE_AT: this process gets a real SIGKILL when it is about to make that step, DIE_IN_VALIDATION: in that
epoch's validation. TERM_AT, TERM_RANK: that rank gets a real SIGTERM at that step, or in validation if TERM_AT is
"val". LINGER: seconds that rank 0 takes to end after an exception. WORKERS: the number of loader processes; of several,
a run each, one after the other, with the diary in DIR/workers-N. READS=1: DIR/reads-R.txt gets a line a training step,
the number of times that anything was read off the device before it.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import tiny  # noqa: E402, F401

import imagenet_train  # noqa: E402


class Reads(TorchDispatchMode):
    """Counts when a number is read off a tensor, for which one waits for the device. On a CPU too, but for uint8: that
    is the flag that ranks exchange between CPUs.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Reads.count += func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.uint8
        return func(*args, **(kwargs or {}))


class Diary(pl.Callback):
    def terminate(self, trainer: pl.Trainer, moment: str) -> None:
        if os.environ.get("TERM_AT") == moment and os.environ.get("TERM_RANK", "0") == str(trainer.global_rank):
            os.kill(os.getpid(), signal.SIGTERM)

    def write(self, trainer: pl.Trainer, kind: str, batch: list) -> None:
        folder.mkdir(exist_ok=True)
        line = [trainer.current_epoch, trainer.global_step, kind, batch[1].tolist()]
        with open(folder / f"rank-{trainer.global_rank}.jsonl", "a") as file:
            print(json.dumps(line), file=file)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: list, number: int) -> None:
        if trainer.global_step == int(os.environ.get("DIE_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        self.terminate(trainer, str(trainer.global_step))
        self.write(trainer, "train", batch)
        if "READS" in os.environ:
            with open(folder / f"reads-{trainer.global_rank}.txt", "a") as file:
                print(Reads.count, file=file)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        time.sleep(float(os.environ.get("LINGER", 0)) * trainer.is_global_zero)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: list, *numbers) -> None:
        self.write(trainer, "val", batch)
        self.terminate(trainer, "val")
        if trainer.current_epoch == int(os.environ.get("DIE_IN_VALIDATION", -1)):
            os.kill(os.getpid(), signal.SIGKILL)


def with_diary(args, **changes):
    trainer = make_trainer(args, **changes)
    trainer.callbacks.append(Diary())
    return trainer


make_trainer, imagenet_train.make_trainer = imagenet_train.make_trainer, with_diary

if __name__ == "__main__":
    if "APART" in os.environ:  # every rank on a machine of its own, as far as relative paths go
        os.chdir(Path(os.environ["RECORD"]) / f"machine-{os.environ.get('RANK', 0)}")
    folder, numbers = Path(os.environ["RECORD"]), os.environ.get("WORKERS", "2").split()
    for workers in numbers:
        several = [f"--output={folder}/out-{workers}"] if len(numbers) > 1 else []
        folder = Path(os.environ["RECORD"]) / (f"workers-{workers}" if several else "")
        with Reads() if "READS" in os.environ else nullcontext():
            status = imagenet_train.main([*sys.argv[1:], f"--workers={workers}", *several])
        if status:
            sys.exit(status)
