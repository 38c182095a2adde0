"""imagenet_train.py's models and their weights: --weights, --evaluate, and every model of torchvision."""

import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from training import SMALL, TINY, record

import imagenet_train as script

MODELS = torchvision.models.list_models(module=torchvision.models)
VALIDATED = r"validated 30/30 images: top-1 ([\d.]+) %, top-5 ([\d.]+) %, loss ([\d.]+)\n"


def run(shards: Path, output: Path, *flags: str) -> int:
    """imagenet_train.py in this process; its exit status."""
    fixed = ["--workers=0", "--accelerator=cpu", "--batch-size=8", "--shuffle=5", "--log-every=2", "--max-epochs=1"]
    return script.main([*fixed, f"--shards={shards}", f"--output={output}", *flags])


def error_line(capsys) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    return line


# ---------------------------------------------------------------- every model


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
    script.check_sizes(name, size)
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model, twin = script.build_model(name, 7), script.build_model(name, 7)
    model, twin = (each.to("meta", memory_format=torch.channels_last) for each in (model, twin))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    logits = model(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.empty(2, dtype=torch.int64, device="meta")).backward()
    optimizer.step()
    assert all(p in optimizer.state for p in model.parameters())  # each has got a gradient
    assert script.load_weights(twin, model.state_dict(), 7) == []


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "regnet_y_400mf", "googlenet"])
def test_training_and_resuming_other_models(shards, tmp_path, capsys, name):
    flags = [f"--model={name}", "--train-size=64", "--val-size=64", "--val-resize=64"]
    assert run(shards, tmp_path, *flags, "--max-steps=2") == 0
    assert run(shards, tmp_path, *flags, "--max-steps=7", "--resume") == 0
    assert "validated 30/30 images" in capsys.readouterr().out


# ---------------------------------------------------------------- --weights


def random_model(name: str, classes: int, seed: int = 7) -> torch.nn.Module:
    torch.manual_seed(seed)
    return script.build_model(name, classes)


def wrapped(prefix: str, key: str | None) -> Callable[[dict], dict]:
    """A state dict as other programs save it: each tensor's name with a prefix, all of it under a key."""
    def wrap(state: dict) -> dict:
        state = {prefix + name: value for name, value in state.items()}
        return {key: state, "epoch": 3} if key else state

    return wrap


@pytest.mark.parametrize("wrap", [wrapped("", None), wrapped("module.", "state_dict"), wrapped("module.", "model")])
def test_weights_of_a_file(tmp_path, wrap):
    """A plain state dict, that of pytorch/examples, that of torchvision's references."""
    source, model = random_model("resnet18", 10), random_model("resnet18", 10, seed=8)
    torch.save(wrap(source.state_dict()), tmp_path / "x.pt")
    assert script.load_weights(model, script.read_weights("resnet18", str(tmp_path / "x.pt")), 10) == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_of_old_files(tmp_path):
    """torchvision's DenseNet files have other names and no batch counters, those of GoogLeNet auxiliary classifiers."""
    source, model = random_model("densenet121", 10), random_model("densenet121", 10, seed=8)
    state = source.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): state[name] for name in state}
    old = {name: old[name] for name in old if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "x.pt")
    assert script.load_weights(model, script.read_weights("densenet121", str(tmp_path / "x.pt")), 10) == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    full = torchvision.models.get_model("googlenet", num_classes=10, init_weights=True, aux_logits=True)
    assert any(name.startswith("aux1") for name in full.state_dict())
    assert script.load_weights(random_model("googlenet", 10), full.state_dict(), 10) == []


@pytest.mark.parametrize(
    "name, layer",
    [("shufflenet_v2_x0_5", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3"),
     ("densenet121", "classifier")],
)
def test_the_last_layer_is_new_for_other_classes(name, layer):
    source, model, before = (random_model(name, classes, seed) for classes, seed in ((20, 7), (10, 8), (10, 8)))
    new = script.load_weights(model, source.state_dict(), 10)
    assert new == [f"{layer}.bias", f"{layer}.weight"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key in new else source).state_dict()[key])


def test_fine_tuning(shards, tmp_path, capsys):
    """It starts from the weights, says that the last layer is new, and resumes from its own checkpoint."""
    source = random_model("shufflenet_v2_x0_5", 20)
    torch.save(source.state_dict(), tmp_path / "x.pt")
    flags = [*SMALL, f"--weights={tmp_path}/x.pt", "--lr=0", "--resume"]
    assert run(shards, tmp_path / "out", *flags, "--max-steps=2") == 0
    note = f"{tmp_path}/x.pt: not for 10 classes; the last layer, fc.weight, starts at random\n"
    assert note in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "version_0" / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in source.named_parameters():
        assert torch.equal(state[f"model.{key}"], value) != key.startswith("fc.")
    (tmp_path / "x.pt").unlink()
    assert run(shards, tmp_path / "out", *flags, "--max-steps=3") == 0  # the checkpoint has all weights
    assert note not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_one_line(shards, tmp_path, capsys):
    torch.save(random_model("resnet18", 10).state_dict(), tmp_path / "resnet18.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    (tmp_path / "text.pt").write_text("weights")
    for model, weights, expected in [
        ("shufflenet_v2_x0_5", "resnet18.pt", r"not for --model=shufflenet_v2_x0_5: \d+ tensors do not fit, such as"),
        ("resnet34", "resnet18.pt", r"not for --model=resnet34: 80 tensors do not fit, such as layer1.2.bn1.bias"),
        ("resnet18", "number.pt", "number.pt: not for --model=resnet18: 103 tensors do not fit"),
        ("resnet18", "text.pt", r"text.pt: not a file of weights \(UnpicklingError\)"),
        ("resnet18", "none.pt", "none.pt: No such file or directory; for resnet18 give a file or one of IMAGENET1K_V1"),
        ("resnet18", "IMAGENET1K_V2", "IMAGENET1K_V2: No such file or directory; for resnet18 give a file or one of"),
    ]:
        path = weights if weights.startswith("IMAGENET") else tmp_path / weights
        assert run(shards, tmp_path / "out", *SMALL, f"--model={model}", f"--weights={path}") == 1
        assert re.search(expected, error_line(capsys))
    assert not (tmp_path / "out").exists()


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_weights_run_no_code(tmp_path):
    torch.save({"fc.weight": Evil(tmp_path / "created")}, tmp_path / "evil.pt")
    with pytest.raises(script.TrainError, match="not a file of weights"):
        script.read_weights("resnet18", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "created").exists()


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path, shards, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # it reads the environment once
    assert run(shards, tmp_path / "out", *SMALL, "--weights=DEFAULT") == 1
    assert re.search("--weights=DEFAULT: .*[Cc]onnection refused", error_line(capsys))


# ---------------------------------------------------------------- --evaluate


@pytest.fixture(scope="module")
def thousand(shards, tmp_path_factory) -> Path:
    """The shards with an index of 1,000 classes, of which the images have the first ten."""
    folder = shutil.copytree(shards, tmp_path_factory.mktemp("thousand") / "data")
    for path in folder.glob("imagenet-*.json"):
        index = json.loads(path.read_text())
        index["classes"] += [f"n{number:08d}" for number in range(90_000_000, 90_000_990)]
        if index.get("class_names"):
            index["class_names"] += ["unknown"] * 990
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
    flags = ["--evaluate", f"--weights={path if weights == 'file' else weights}", "--model=resnet18"]
    assert run(thousand, tmp_path / "out", *flags) == 0
    out = capsys.readouterr().out
    assert "1 cpu, 32-true: 30 val images, resized to 256 px, cropped to 224 px; from" in out
    top1, top5, loss = (float(number) for number in re.search(VALIDATED, out).groups())
    assert (top1, top5) == (round(100 * expected[0], 2), round(100 * expected[1], 2))
    assert loss == pytest.approx(expected[2], rel=0.02)
    metrics = json.loads((tmp_path / "out" / "version_0" / "metrics.json").read_text())
    assert metrics["val_top1"] == pytest.approx(expected[0]) and metrics["weights"] == flags[1].partition("=")[2]
    assert [path.name for path in (tmp_path / "out" / "version_0").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    "model, weights, size, resize",
    [("resnet50", "IMAGENET1K_V1", 224, 256), ("resnet50", "IMAGENET1K_V2", 224, 232),
     ("resnet50", "DEFAULT", 224, 232), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 384, 384),
     ("resnet50", "x.pt", 224, 256)],
)
def test_named_weights_bring_their_sizes(model, weights, size, resize):
    args = script.parse_args(["--evaluate", f"--model={model}", f"--weights={weights}"])
    assert (args.val_size, args.val_resize) == (size, resize)
    args = script.parse_args(["--evaluate", f"--model={model}", f"--weights={weights}", "--val-resize=400"])
    assert (args.val_size, args.val_resize) == (size, 400)
    args = script.parse_args([f"--model={model}", f"--weights={weights}"])  # training: the flags' own
    assert (args.val_size, args.val_resize) == (224, 256)


def test_weights_for_other_inputs_are_refused():
    with pytest.raises(script.TrainError, match="googlenet's published weights expect inputs of another normalisation"):
        script.read_weights("googlenet", "IMAGENET1K_V1")


def test_evaluation_of_a_checkpoint_on_one_and_two_ranks(shards, tmp_path, capsys):
    """--resume and --weights give the line that training printed, on any number of ranks; training is not touched."""
    output = tmp_path / "out"
    assert run(shards, output, *TINY, "--lr=0.01") == 0
    [trained] = re.findall(r"validated 30/30 images: .* loss [\d.]+", capsys.readouterr().out)
    before = {path.name: path.read_bytes() for path in (output / "version_0").iterdir()}
    for flag in ("--resume", f"--resume={output}/version_0", f"--weights={output}/version_0/model.pt"):
        assert run(shards, output, *TINY, "--evaluate", flag) == 0
        assert f"{trained}\n" in capsys.readouterr().out
    done = record(tmp_path / "two", f"--shards={shards}", f"--output={output}", "--evaluate", "--resume", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("validated 30/30 images") == 1
    top = trained.partition(", loss")[0]
    assert f"{top}, loss" in done.stdout
    assert {path.name: path.read_bytes() for path in (output / "version_0").iterdir()} == before
    assert sorted(path.name for path in output.iterdir()) == [f"version_{number}" for number in range(5)]


def test_evaluation_needs_only_the_validation_split(shards, tmp_path, capsys):
    """As a user checks shards before the training split is converted."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in shards.glob("*val*"):
        shutil.copy(path, folder)
    torch.save(random_model("shufflenet_v2_x0_5", 10).state_dict(), tmp_path / "x.pt")
    assert run(folder, tmp_path / "out", *SMALL, "--evaluate", f"--weights={tmp_path}/x.pt") == 0
    assert "validated 30/30 images" in capsys.readouterr().out


def test_evaluation_of_what_does_not_fit(shards, tmp_path, capsys):
    torch.save(random_model("shufflenet_v2_x0_5", 20).state_dict(), tmp_path / "x.pt")
    assert run(shards, tmp_path / "out", *SMALL, "--evaluate", f"--weights={tmp_path}/x.pt") == 1
    assert "x.pt: not for the 10 classes of the images; there is nothing to evaluate" in error_line(capsys)
    assert run(shards, tmp_path / "out", *SMALL, "--evaluate", "--resume") == 1
    assert f"--evaluate --resume: no version_N/last.ckpt in {tmp_path}/out; name a checkpoint" in error_line(capsys)
