"""The model: every one of torchvision, learning rate, loss, metrics, --weights and --evaluate."""

import argparse
import json
import math
import re
import shutil
import types
import urllib.request
from pathlib import Path

import pytest
import runs
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from conftest import TRAIN_IMAGES, VAL_IMAGES
from runs import BATCH, SMALL, TINY, assert_same_weights, one_line, rows, train

import imagenet_train as script

MODELS = torchvision.models.list_models(module=torchvision.models)
VALIDATED = r"validated 30/30 images: top-1 ([\d.]+) %, top-5 ([\d.]+) %, loss ([\d.]+)\n"


# ---------------------------------------------------------------- every model


def classifier(name: str, classes: int, images: int) -> script.Classifier:
    return script.Classifier(name, [f"n{number}" for number in range(classes)], images, 0.1, 0.9, 1e-4, 0.1, 1, 32, 36)


def scale_and_shift(images: torch.Tensor, mean, var, weight: torch.Tensor, bias: torch.Tensor, *args) -> torch.Tensor:
    """Shapes and gradients of batch norm; on the meta device that one is a dozen operations in Python."""
    return torch.addcmul(bias[:, None, None], images, weight[:, None, None])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_makes_a_step_and_loads_its_own_weights(name, monkeypatch):
    """Of the largest ones too: on the meta device, which computes shapes only."""
    for method in ("normal_", "uniform_"):  # RegNets are built on the CPU; nothing reads their values
        monkeypatch.setattr(torch.Tensor, method, lambda self, *args, **kwargs: self)
    monkeypatch.setattr(F, "batch_norm", scale_and_shift)
    size = 224 if name.startswith(("vit", "maxvit")) else 75 if name.startswith("inception") else 64
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model, twin = script.build_model(name, 7), script.build_model(name, 7)
    model, twin = (each.to("meta", memory_format=torch.channels_last) for each in (model, twin))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    logits = model(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.empty(2, dtype=torch.int64, device="meta")).backward()
    optimizer.step()
    assert all(p in optimizer.state for p in model.parameters())  # each has got a gradient
    assert not any(n.endswith("bias") for n, p in model.named_parameters() if p.ndim > 1)  # what decays
    assert script.load_weights(twin, model.state_dict(), 7) == []


# ---------------------------------------------------------------- learning rate


def test_the_learning_rate_of_four_epochs_of_five_steps():
    """Warm-up of one epoch, evaluated at each step's end; then a cosine, evaluated at its start."""
    factors = [script.lr_factor((step / 5, (step + 1) / 5), warmup=1, epochs=4) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert factors[5:] == pytest.approx([(1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)])
    for epochs, warmup in ((1, 0), (1, 0.5), (90, 8), (2, 1)):  # no step has the rate 0, or more than the peak
        for steps in (1, 3, 10):
            factors = [script.lr_factor((n / steps, (n + 1) / steps), warmup, epochs) for n in range(epochs * steps)]
            assert all(0 < factor <= 1 for factor in factors) and max(factors) > 0.9 * (steps > 1 or warmup != 0.5)


@pytest.fixture
def rates(monkeypatch):
    """Runs the script in this process with these flags.

    Returns {(images used, step): [(rate, momentum, weight decay)] of the optimiser's groups in that step}.
    """

    def train(folder: Path, *flags: str) -> dict[tuple[int, int], list[tuple[float, float, float]]]:
        used = {}

        def record(self, optimizer: torch.optim.Optimizer) -> None:
            images = round(self.trainer.train_dataloader.position[1] * TRAIN_IMAGES)
            groups = [(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups]
            used[images, self.global_step] = groups

        monkeypatch.setattr(script.Classifier, "on_before_optimizer_step", record)
        assert script.main([*TINY, f"--output={folder}", "--workers=0", *flags]) == 0
        return used

    return train


def test_the_optimiser_gets_the_recipe(unique, tmp_path, rates):
    """Peak × global batch / 256; no weight decay on norms and biases."""
    recipe = ["--lr=0.512", "--warmup-epochs=0", "--weight-decay=0.01", "--momentum=0.5"]
    used = rates(tmp_path, f"--shards={unique}", "--max-epochs=1", *recipe)
    assert list(used) == [(BATCH * (step + 1), step) for step in range(11)]
    for (images, _), (decay, no_decay) in used.items():
        rate = 0.512 * BATCH / 256 * (1 + math.cos(math.pi * (images - BATCH) / TRAIN_IMAGES)) / 2
        assert decay == (pytest.approx(rate), 0.5, 0.01) and no_decay == (pytest.approx(rate), 0.5, 0)
    model = classifier("shufflenet_v2_x0_5", 47, VAL_IMAGES)
    decay, no_decay = model.configure_optimizers().param_groups
    assert {p.ndim for p in decay["params"]} == {2, 4} and {p.ndim for p in no_decay["params"]} == {1}
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("steps", [4, 11])
def test_after_a_resume_the_flags_decide(unique, tmp_path, rates, steps):
    """In an epoch or at its end, with other flags: at the same positions, all is as in a run that always had them."""
    flags = [f"--shards={unique}", "--warmup-epochs=1"]
    new = ["--max-epochs=3", f"--batch-size={2 * BATCH}", "--lr=0.1", "--momentum=0.5", "--weight-decay=0.01"]
    rates(tmp_path / "out", *flags, "--max-epochs=1", f"--max-steps={steps}")
    resumed = rates(tmp_path / "out", *flags, *new, "--resume")
    whole = rates(tmp_path / "whole", *flags, *new)
    resumed, whole = ({images: groups for (images, _), groups in used.items()} for used in (resumed, whole))
    assert len(whole) == 3 * 5 and list(resumed) == list(whole)[2 if steps == 4 else 5 :]
    assert all(groups == whole[images] and groups[0][0] > 0 for images, groups in resumed.items())


def test_ranks_share_the_rate_of_a_global_batch(unique, tmp_path):
    runs.run(tmp_path, f"--shards={unique}", "--max-epochs=1", "--warmup-epochs=1", "--log-every=1", ranks=2)
    peak, steps = 0.256 * 2 * BATCH / 256, TRAIN_IMAGES // (2 * BATCH)
    logged = [float(row["lr"]) for row in rows(tmp_path) if row["lr"]]
    warm = [2 * BATCH * (step + 1) / TRAIN_IMAGES for step in range(steps)]  # in epochs, at most half of the run
    assert logged[:2] == pytest.approx([peak * position / 0.5 for position in warm[:2]]) and len(logged) == steps


# ---------------------------------------------------------------- loss, metrics, speed


def test_rows_without_a_label_do_not_count_in_the_loss():
    """The sum over the others, divided by all; 0 if there are no others."""
    torch.manual_seed(0)
    model = classifier("resnet18", 10, 10).eval()  # eval: no row changes another one's
    loader = types.SimpleNamespace(done=1)
    model._trainer = types.SimpleNamespace(train_dataloader=loader, global_step=0, global_rank=0)
    images, labels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8), torch.tensor([3, -1, 0, -1, -1, 9])
    loss = model.training_step([images, labels], 0)
    counted = F.cross_entropy(model(images), labels, label_smoothing=0.1, ignore_index=-1, reduction="none")
    assert counted[labels < 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(loss, counted.sum() / 6)
    loss = model.training_step([images, torch.full((6,), -1)], 0)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_metrics_are_those_of_plain_arithmetic(unique):
    """Of a fixed model on 1 rank: top-1, top-5 and loss over real images only, the padding left out."""
    index = script.read_index(str(unique), "val")
    torch.manual_seed(0)
    model = classifier("shufflenet_v2_x0_5", 47, VAL_IMAGES).eval()
    batches = list(script.Loader(script.LoaderConfig(index, False, 10, 32, 36)))
    with torch.no_grad():
        for n, batch in enumerate(batches):
            model.validation_step(batch, n)
        images, labels = (torch.cat(part)[:VAL_IMAGES] for part in zip(*batches))
        logits = model(images)
    top1, top5 = (logits.topk(k).indices.eq(labels[:, None]).sum() for k in (1, 5))
    seen, *found, loss = model.sums
    assert seen == VAL_IMAGES and found == [top1, top5] and 0 < top1 < top5
    torch.testing.assert_close(loss / VAL_IMAGES, F.cross_entropy(logits, labels))


def test_normalisation_is_torchvisions():
    import torchvision.transforms.v2.functional as oracle

    model = classifier("resnet18", 10, 10)
    model.model = torch.nn.Identity()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = oracle.normalize(images.permute(0, 3, 1, 2) / 255, script.MEAN, script.STD)
    torch.testing.assert_close(model(images), expected)
    assert model(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("said", ["No working C++ compiler found", "out of resource: shared memory, Required: 300"])
def test_what_the_compiler_says_is_passed_on(unique, tmp_path, monkeypatch, capsys, said):
    """Nothing else is blamed: neither the images' size nor /dev/shm."""
    def fail(*args) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    assert train(unique, tmp_path, "--compile") == 1
    line = one_line(capsys)
    assert "--compile" in line and line.endswith(f": {said}") and "accept" not in line


def test_a_resumed_run_draws_the_same_dropout(unique, tmp_path):
    """In the middle of an epoch, of a model with dropout and without batch norm."""
    flags = ["--model=squeezenet1_1", "--resume", "--checkpoint-every=3"]
    assert train(unique, tmp_path / "whole", *flags) == 0
    for steps in (4, 7, -1):
        assert train(unique, tmp_path / "parts", *flags, f"--max-steps={steps}") == 0
        torch.rand(100)  # the state of the generator does not matter
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_images_per_second_are_those_of_training_alone(unique, tmp_path, monkeypatch, rates):
    """By a clock that advances 1 s a training step and 1000 s a validation batch."""
    seconds = [0.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: seconds[0])
    for name, each in (("training_step", 1.0), ("validation_step", 1000.0)):
        real = getattr(script.Classifier, name)

        def timed(self, *args, real=real, each=each) -> torch.Tensor | None:
            seconds[0] += each
            return real(self, *args)

        monkeypatch.setattr(script.Classifier, name, timed)
    rates(tmp_path, f"--shards={unique}", "--max-epochs=3", "--log-every=2")
    speeds = [float(row["train_images/s"]) for row in rows(tmp_path) if row["train_images/s"]]
    assert speeds == [BATCH] * (33 // 2)


# ---------------------------------------------------------------- --weights


def random_model(name: str, classes: int, seed: int = 7) -> torch.nn.Module:
    torch.manual_seed(seed)
    return script.build_model(name, classes)


def read_weights(model: str, weights: Path | str) -> dict[str, torch.Tensor]:
    return script.read_weights(model, str(weights), [f"n{number}" for number in range(10)], "--weights")


WRAPPED = [  # names before a tensor's own, and the key of a checkpoint: pytorch/examples', torchvision's references', …
    ("", None), ("module.", "state_dict"), ("module.", "model"), ("_orig_mod.", None), ("_orig_mod.module.", "model"),
    ("model._orig_mod.", "state_dict"), ("module._orig_mod.model.module.", "state_dict"),
]


@pytest.mark.parametrize("prefix, key", WRAPPED)
def test_weights_of_a_file(tmp_path, prefix, key):
    """Of a model that was compiled or wrapped; beside flags, as torchvision's references save them."""
    source, model = random_model("resnet18", 10), random_model("resnet18", 10, seed=8)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)} if key else state, tmp_path / "x.pt")
    assert script.load_weights(model, read_weights("resnet18", tmp_path / "x.pt"), 10) == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_of_old_files():
    """torchvision's first ResNet files have no batch counters, those of GoogLeNet auxiliary classifiers."""
    source, model = random_model("resnet18", 10), random_model("resnet18", 10, seed=8)
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert script.load_weights(model, state, 10) == []
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    full = torchvision.models.get_model("googlenet", num_classes=10, init_weights=True, aux_logits=True)
    assert any(name.startswith("aux1") for name in full.state_dict())
    assert script.load_weights(random_model("googlenet", 10), full.state_dict(), 10) == []


LAST = {"shufflenet_v2_x0_5": "fc", "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3",
        "densenet121": "classifier"}


@pytest.mark.parametrize("name", LAST)
def test_the_last_layer_is_new_for_other_classes(name):
    source, model, before = (random_model(name, classes, seed) for classes, seed in ((20, 7), (10, 8), (10, 8)))
    new = script.load_weights(model, source.state_dict(), 10)
    assert new == [f"{LAST[name]}.bias", f"{LAST[name]}.weight"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key in new else source).state_dict()[key])


def test_fine_tuning(shards, tmp_path, capsys):
    """It starts from the weights, says that the last layer is new, and resumes from its own checkpoint."""
    source = random_model("shufflenet_v2_x0_5", 20)
    torch.save(source.state_dict(), tmp_path / "x.pt")
    flags = [*SMALL, f"--weights={tmp_path}/x.pt", "--lr=0", "--resume"]
    assert train(shards, tmp_path / "out", *flags, "--max-steps=2") == 0
    note = f"{tmp_path}/x.pt: not for 10 classes; the last layer, fc.weight, starts at random\n"
    assert note in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "version_0" / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in source.named_parameters():
        assert torch.equal(state[f"model.{key}"], value) != key.startswith("fc.")
    (tmp_path / "x.pt").unlink()
    assert train(shards, tmp_path / "out", *flags, "--max-steps=3") == 0  # the checkpoint has all weights
    assert note not in capsys.readouterr().out


MISFITS = {
    "shufflenet_v2_x0_5": {"resnet18.pt": r"not for this --model: \d+ tensors do not fit, such as"},
    "resnet34": {"resnet18.pt": "not for this --model: 80 tensors do not fit, such as layer1.2.bn1.bias"},
    "googlenet": {"IMAGENET1K_V1": "googlenet's published weights expect inputs of another normalisation"},
    "resnet18": {
        "number.pt": "number.pt: not for this --model: 103 tensors do not fit",
        "text.pt": r"text.pt: not a file of weights or a checkpoint \(UnpicklingError\)",
        "none.pt": "none.pt: no such file; .* for resnet18 one of IMAGENET1K_V1",
        "IMAGENET1K_V2": "IMAGENET1K_V2: no such file; .* for resnet18 one of",
    },
}


def test_weights_that_do_not_fit_are_one_line(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(random_model("resnet18", 10).state_dict(), "resnet18.pt")
    torch.save({"a": 1}, "number.pt")
    Path("text.pt").write_text("weights")
    for model, expected in MISFITS.items():
        for weights, said in expected.items():
            assert train(shards, tmp_path / "out", f"--model={model}", f"--weights={weights}") == 1
            assert re.search(said, one_line(capsys))
    assert not (tmp_path / "out").exists()


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("wrap", [lambda evil: {"fc.weight": evil}, lambda evil: {"args": argparse.Namespace(a=evil)}])
def test_weights_run_no_code(tmp_path, wrap):
    torch.save(wrap(Evil(tmp_path / "created")), tmp_path / "evil.pt")
    with pytest.raises(script.UserError, match="not a file of weights"):
        read_weights("resnet18", tmp_path / "evil.pt")
    assert not (tmp_path / "created").exists()


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path, shards, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # it reads the environment once
    assert train(shards, tmp_path / "out", *SMALL, "--weights=DEFAULT") == 1
    assert re.search("--weights=DEFAULT: .*[Cc]onnection refused", one_line(capsys))


# ---------------------------------------------------------------- --evaluate


def evaluate(shards: Path, output: Path, *flags: str) -> int:
    """With the sizes that belong to the weights, unless the flags give them."""
    own = ["--workers=0", "--accelerator=cpu", "--batch-size=8", f"--shards={shards}", f"--output={output}"]
    return script.main([*own, "--evaluate", *flags])


@pytest.fixture(scope="module")
def thousand(shards, tmp_path_factory) -> Path:
    """The shards with an index of 1,000 classes, of which the images have the first ten."""
    folder = shutil.copytree(shards, tmp_path_factory.mktemp("thousand") / "data")
    for path in folder.glob("imagenet-*.json"):
        index = json.loads(path.read_text())
        index["classes"] += [f"n{number:08d}" for number in range(90_000_000, 90_000_990)]
        path.write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def known(tree) -> tuple[torch.nn.Module, float, float, float]:
    """A ResNet-18 for 1,000 classes; its top-1, top-5 and loss on the tree's validation images, by torchvision alone.

    Its last layer is fitted to the images with 9 of 30 labels wrong.
    """
    model = random_model("resnet18", 1000).eval()
    transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    images, labels = zip(*torchvision.datasets.ImageFolder(tree / "val", transforms))
    labels, head = torch.tensor(labels), model.fc
    with torch.no_grad():
        model.fc = torch.nn.Identity()
        features = model(torch.stack(images))
        center = features.mean(0)
        wrong = torch.where(torch.arange(30) % 10 < 3, (labels + 1) % 10, labels)
        head.weight.copy_((torch.linalg.pinv(features - center, rtol=1e-3) @ (8 * F.one_hot(wrong, 1000) - 1.0)).T)
        head.bias.copy_(-head.weight @ center)
        model.fc = head
        logits = head(features)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    top1 = (logits.argmax(1) == labels).float().mean()
    return model, top1.item(), top5.item(), F.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "file"])
def test_evaluation_gives_what_torchvision_gives(thousand, known, tmp_path, monkeypatch, capsys, weights):
    """The same images, sizes and weights through torchvision's ImageFolder and transforms, and through this script."""
    model, *expected = known
    assert 0.5 < expected[0] < 0.9
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    path = tmp_path / ("x.pt" if weights == "file" else f"hub/checkpoints/{name}")  # where a download would be kept
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    flags = ["--model=resnet18", f"--weights={path if weights == 'file' else weights}"]
    if weights == "DEFAULT":  # as if these classes were ImageNet's
        monkeypatch.setattr(script.shards, "is_imagenet", lambda classes: len(classes) == 1000)
    assert evaluate(thousand, tmp_path / "out", *flags) == 0
    out, warning = capsys.readouterr()
    others = ".*--weights=IMAGENET1K_V1: .* 1,000 others.*\n"
    assert re.fullmatch(others if weights == "IMAGENET1K_V1" else "", warning)
    assert "1 cpu, 32-true: 30 val images, resized to 256 px, cropped to 224 px; from" in out
    top1, top5, loss = (float(number) for number in re.search(VALIDATED, out).groups())
    assert (top1, top5) == (round(100 * expected[0], 2), round(100 * expected[1], 2))
    assert loss == pytest.approx(expected[2], rel=1e-3)
    metrics = json.loads((tmp_path / "out" / "version_0" / "metrics.json").read_text())
    assert metrics["val_top1"] == pytest.approx(expected[0]) and metrics["weights"] == flags[1].partition("=")[2]
    assert [path.name for path in (tmp_path / "out" / "version_0").iterdir()] == ["metrics.json"]


SIZES = {"resnet50 IMAGENET1K_V1": (224, 256), "resnet50 IMAGENET1K_V2": (224, 232), "resnet50 DEFAULT": (224, 232),
         "vit_b_16 IMAGENET1K_SWAG_E2E_V1": (384, 384), "resnet50 x.pt": (224, 256)}


@pytest.mark.parametrize("weights", SIZES)
def test_named_weights_bring_their_sizes(weights):
    """Unless they are given; not in training."""
    name, _, weights = weights.partition(" ")
    size, resize = SIZES[f"{name} {weights}"]
    for flags, expected in ((["--evaluate"], (size, resize)), (["--evaluate", "--val-resize=400"], (size, 400)),
                            ([], (224, 256))):
        args = script.parse_args([f"--model={name}", f"--weights={weights}", *flags])
        assert (args.val_size, args.val_resize) == expected


def test_evaluation_of_a_run_on_one_and_two_ranks(shards, tmp_path, capsys):
    """A checkpoint, or model.pt with its metrics.json, bring their model and sizes: the line is that of training.

    The run's folder is not touched. The file's name does not matter for a checkpoint.
    """
    output = tmp_path / "out"
    assert train(shards, output, "--lr=0.01") == 0
    [trained] = re.findall(r"validated 30/30 images: .* loss [\d.]+", capsys.readouterr().out)
    version = output / "version_0"
    state = torch.load(version / "model.pt", weights_only=True)
    torchvision.models.get_model("tiny", num_classes=10).load_state_dict(state)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    before = {path.name: path.read_bytes() for path in version.iterdir()}
    for flag in ("--resume", f"--resume={version}", f"--weights={version}/model.pt", f"--weights={version}/best.ckpt"):
        assert evaluate(shards, output, flag) == 0
        out = capsys.readouterr().out
        assert f"{trained}\n" in out and re.search("tiny with .* resized to 36 px, cropped to 32 px; from", out)
    out = runs.run(tmp_path / "two", f"--shards={shards}", f"--output={output}", "--evaluate", "--resume", ranks=2)
    assert out.count(f"{trained.partition(', loss')[0]}, loss") == 1
    assert {path.name: path.read_bytes() for path in version.iterdir()} == before
    assert sorted(path.name for path in output.iterdir()) == [f"version_{number}" for number in range(6)]
    assert evaluate(shards, output, "--resume", "--val-size=16", "--val-resize=20") == 0
    assert "resized to 20 px, cropped to 16 px" in capsys.readouterr().out  # given ones count


def test_evaluation_needs_only_the_validation_split(shards, tmp_path, capsys):
    """As a user checks shards before the training split is converted. What does not fit is one line."""
    (tmp_path / "data").mkdir()
    for path in shards.glob("*val*"):
        shutil.copy(path, tmp_path / "data")
    for name, classes, factor in (("10", 10, 1), ("20", 20, 1), ("nan", 10, math.nan)):
        state = random_model("shufflenet_v2_x0_5", classes).state_dict()
        torch.save({key: factor * value for key, value in state.items()}, tmp_path / f"{name}.pt")
    flags = [tmp_path / "data", tmp_path / "out", *SMALL]
    assert evaluate(*flags, f"--weights={tmp_path}/10.pt") == 0
    assert "validated 30/30 images" in capsys.readouterr().out
    for flag, said in (
        (f"--weights={tmp_path}/20.pt", "20.pt: not for the 10 classes of the images; nothing to evaluate"),
        ("--resume", f"--evaluate --resume: no version_N/last.ckpt in {tmp_path}/out; name a checkpoint"),
        ("--resume=missing", "--resume=missing: no such file"),
        (f"--weights={tmp_path}/nan.pt", "the validation loss is nan; "),
    ):
        assert evaluate(*flags, flag) == 1
        assert said in (line := one_line(capsys)) and "--lr" not in line
