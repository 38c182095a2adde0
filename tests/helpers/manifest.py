"""train.yml as the cluster sees it, and the settings of config.sh."""

import os
import re
import subprocess
from pathlib import Path

import yaml

TOP = Path(__file__).parents[2]
SETTINGS = ("imagenet", "shards", "output", "image", "credentials", "engine", "shm", "nginx", "port", "python")


def render(
    image: str = "registry/x:1", shards: str = "http://host/data/", nodes: int = 1, last: int | None = None
) -> list[dict]:
    """The documents of train.yml as its first line makes them, edited for several nodes as it says."""
    text, last = (TOP / "train.yml").read_text(), nodes - 1 if last is None else last
    for line, value in (("parallelism: &nodes 1", nodes), ('succeededIndexes: &last "0"', last)):
        assert text.count(line) == 1
        text = text.replace(line, re.sub(r"\d", str(value), line))
    done = subprocess.run(["envsubst"], input=text, env=os.environ | {"image": image, "shards": shards},
                          capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def environment(job: dict, index: int) -> dict[str, str]:
    """What Kubernetes sets in the container of one pod."""
    env = {entry["name"]: entry["value"] for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    return env | {"JOB_COMPLETION_INDEX": str(index)}


def command_line(job: dict, index: int = 0) -> list[str]:
    """The container's command and arguments, $(NAME) replaced as Kubernetes does: nothing nested, no unknown NAME."""
    container = job["spec"]["template"]["spec"]["containers"][0]
    env = environment(job, index)
    words = container["command"] + container["args"]
    return [re.sub(r"\$\(([^)]*)\)", lambda match: env.get(match[1], match[0]), word) for word in words]
