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


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def render(image: str = "registry/x:1", shards: str = "http://host/data/") -> tuple[dict, dict]:
    """The documents of train.yml as its first line makes them: a volume claim and a Job."""
    env = os.environ | {"image": image, "shards": shards}
    text = (TOP / "train.yml").read_text()
    done = subprocess.run(["envsubst"], input=text, env=env, capture_output=True, text=True, check=True)
    claim, job = yaml.safe_load_all(done.stdout)
    return claim, job


def pod_of(**values: str) -> tuple[dict, dict]:
    """The pod of the Job in train.yml, and its only container; values as for render()."""
    pod = render(**values)[1]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container
