"""Four ways to read the same shards on two ranks, with a loader process each: who gets which batches in an epoch.

    PYTHONPATH=. torchrun --nproc-per-node=2 tests/test_rivals.py SHARDS BATCH

prints a line of JSON for each. The train shards must have one image a class: a label then names an image.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import webdataset as wds
import wids
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

RANKS = 2
augment = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip(), v2.PILToTensor()])


# ---------------------------------------------------------------- each way's batches of an epoch


def make_pipeline(shards: Path, batch: int, **options) -> wds.DataPipeline:
    """WebDataset's documented pipeline. only=… keeps it from unpickling other members of a sample."""
    urls = sorted(map(str, shards.glob("imagenet-train-*.tar")))
    dataset = wds.WebDataset(urls, nodesplitter=wds.split_by_node, **options).shuffle(1000)
    dataset = dataset.decode("pil", only=["jpg", "cls"]).to_tuple("jpg", "cls")
    return dataset.map_tuple(augment, int).batched(batch)


def with_split_by_node(shards: Path, batch: int) -> wds.WebLoader:
    return wds.WebLoader(make_pipeline(shards, batch, shardshuffle=100), batch_size=None, num_workers=1)


def with_resampled(shards: Path, batch: int) -> wds.WebLoader:
    """An endless stream of random shards, of which an epoch is as many batches as there would be."""
    pipeline = make_pipeline(shards, batch, resampled=True, shardshuffle=False)
    images = sum(shard["nsamples"] for shard in json.loads((shards / "imagenet-train.json").read_text())["shardlist"])
    return wds.WebLoader(pipeline, batch_size=None, num_workers=1).with_epoch(images // (RANKS * batch))


def to_pair(sample: dict) -> tuple[torch.Tensor, int]:
    return augment(Image.open(sample[".jpg"]).convert("RGB")), int(sample[".cls"].read())


def with_wids(shards: Path, batch: int) -> DataLoader:
    """The index is wids' own format. Before another epoch: loader.sampler.set_epoch(epoch)."""
    dataset = wids.ShardListDataset(f"{shards}/imagenet-train.json", transformations=[to_pair])
    return DataLoader(dataset, batch, sampler=DistributedSampler(dataset), num_workers=1)


def with_this_project(shards: Path, batch: int) -> Iterable[list]:
    from imagenet_train import Loader, LoaderConfig, read_index

    index, rank = read_index(str(shards), "train"), dist.get_rank()
    return Loader(LoaderConfig(index, True, batch, size=64, shuffle=1000, workers=1, rank=rank, world=RANKS))


def main(shards: Path, batch: int) -> None:
    """On each rank, which torchrun started."""
    dist.init_process_group("gloo")
    torch.multiprocessing.set_start_method("fork")
    for way in (with_split_by_node, with_resampled, with_wids, with_this_project):
        mine, all_ranks = [labels.tolist() for _, labels in way(shards, batch)], [None] * RANKS
        dist.all_gather_object(all_ranks, mine)
        images = [[label for labels in batches for label in labels] for batches in all_ranks]
        figures = {"way": way.__name__, "batches": [*map(len, all_ranks)], "images": [*map(len, images)],
                   "different": len({*images[0], *images[1]})}
        if dist.get_rank() == 0:
            print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


# ---------------------------------------------------------------- what the README's table says


def test_only_two_ways_give_all_ranks_equal_batches_and_each_image_once(unique):
    """Of 47 images in 6 shards, of which the last is small, in batches of 5."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, unique, "5"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {line.pop("way"): line for line in map(json.loads, done.stdout.splitlines())}
    assert figures["with_split_by_node"] == {"batches": [6, 4], "images": [27, 20], "different": 47}
    assert figures["with_resampled"].pop("different") < 40
    assert figures["with_resampled"] == {"batches": [4, 4], "images": [20, 20]}
    assert figures["with_wids"] == {"batches": [5, 5], "images": [24, 24], "different": 47}  # one twice
    assert figures["with_this_project"] == {"batches": [4, 4], "images": [20, 20], "different": 40}  # 7 left out


def test_webdataset_runs_no_code_if_it_decodes_only_jpg_and_cls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with wds.TarWriter("imagenet-train-000000.tar") as writer:
        pickle = b"cos\nmkdir\n(S'unpickled'\ntR."  # os.mkdir("unpickled")
        writer.write({"__key__": "a", "jpg": Image.new("RGB", (70, 70)), "cls": 3, "pyd": pickle})
    [(_, labels)] = make_pipeline(tmp_path, 1, shardshuffle=False)
    assert labels.tolist() == [3] and not Path("unpickled").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
