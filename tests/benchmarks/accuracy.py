"""Whether imagenet_train.py reaches the accuracy of plain PyTorch with the same recipe.

    python3 tests/benchmarks/accuracy.py --tree=DIR [--epochs=10] [--seeds=3] [--size=64] [--precision=bf16-mixed]

In:  a tree of images, train/<class>/* and val/<class>/*.
Out: top-1 after the last epoch for each seed, and mean and standard deviation over the seeds, of
  plain    torchvision's ImageFolder and transforms, DataLoader, and a plain training loop
  script   imagenet_train.py on shards that imagenet_shards.py makes of the same images
Both in float32 (the script: unless --precision) with SGD, linear warm-up over one epoch, cosine decay, label smoothing
0.1, no weight decay on norms and biases, random resized crops and flips.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

TOP = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(args: argparse.Namespace, seed: int) -> float:
    """Top-1 after the last epoch, per cent."""
    torch.manual_seed(seed)
    tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]
    crop = T.Compose([T.RandomResizedCrop(args.size), T.RandomHorizontalFlip(), *tensor])
    train = ImageFolder(args.tree / "train", crop)
    val = ImageFolder(args.tree / "val", T.Compose([T.Resize(args.resize), T.CenterCrop(args.size), *tensor]))
    loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.get_model(args.model, num_classes=len(train.classes))
    model = model.to(device, memory_format=torch.channels_last)
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False))
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=1, momentum=args.momentum)
    peak, warmup, steps = args.lr * args.batch_size / 256, len(loader), args.epochs * len(loader)
    for epoch in range(args.epochs):
        model.train()
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
            decayed = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = peak * ((step + 1) / warmup if step < warmup else decayed)
            logits = model(images.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        batches = DataLoader(val, args.batch_size, num_workers=args.workers)
        right = sum((model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in batches)
    return 100 * right / len(val)


def script(args: argparse.Namespace, seed: int, folder: Path) -> float:
    """Top-1 after the last epoch, per cent."""
    same = ("model", "batch_size", "lr", "momentum", "weight_decay", "workers", "precision")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in same]
    flags += [f"--train-size={args.size}", f"--val-size={args.size}", f"--val-resize={args.resize}", f"--seed={seed}",
              f"--max-epochs={args.epochs}", "--warmup-epochs=1", "--label-smoothing=0.1", "--devices=1",
              f"--shards={folder}/shards", f"--output={folder}/{seed}"]  # fmt: skip
    run = subprocess.run([sys.executable, TOP / "imagenet_train.py", *flags], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    with open(folder / f"{seed}/version_0/metrics.csv", newline="") as file:
        return [100 * float(row["val_top1"]) for row in csv.DictReader(file) if row["val_top1"]][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precision", default="32-true", help="of the script; the plain loop's is 32-true")
    for name, default in {"epochs": 10, "seeds": 3, "size": 64, "resize": 64, "batch-size": 64, "workers": 1,
                          "lr": 0.08, "momentum": 0.9, "weight-decay": 5e-4}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, TOP / "imagenet_shards.py", f"--imagenet={args.tree}", f"--shards={folder}/shards"]
        subprocess.run([*make, "--maxcount=500"], check=True, stdout=subprocess.DEVNULL)
        rows = []
        print("| seed | plain, top-1 % | script, top-1 % |\n|---|---|---|")
        for seed in range(args.seeds):
            rows.append((plain(args, seed), script(args, seed, Path(folder))))
            print(f"| {seed} | {rows[-1][0]:.2f} | {rows[-1][1]:.2f} |", flush=True)
    (mean, spread), (mean_script, spread_script) = (
        (statistics.mean(column), statistics.stdev(column) if args.seeds > 1 else 0) for column in zip(*rows))
    print(f"| mean ± standard deviation | {mean:.2f} ± {spread:.2f} | {mean_script:.2f} ± {spread_script:.2f} |")
    print(f"difference of the means: {mean_script - mean:+.2f} points")


if __name__ == "__main__":
    main()
