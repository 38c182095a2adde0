"""What the tests of `run`, the container and the cluster share."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

TOP = Path(__file__).parents[2]
SETTINGS = re.findall(r"^(\w+)=\$\{", (TOP / "config.sh").read_text(), re.MULTILINE)
SMALL = ["--model=squeezenet1_1", "--train-size=32", "--val-size=32", "--val-resize=36", "--batch-size=4", "--lr=0.1",
         "--shuffle=5", "--accelerator=cpu", "--workers=1", "--checkpoint-every=2"]


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def render(image: str = "registry/x:1", shards: str = "http://host/data/") -> list[dict]:
    """The documents of train.yml as its first line makes them: a volume claim, a Job, a ConfigMap."""
    env = os.environ | {"image": image, "shards": shards}
    text = (TOP / "train.yml").read_text()
    done = subprocess.run(["envsubst"], input=text, env=env, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def pod_of(job: dict) -> tuple[dict, dict]:
    """The pod of a Job and its only container."""
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container
