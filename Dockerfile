# ./run build, or docker build --tag imagenet-webdataset .
# Build arguments, each passed as --build-arg NAME=VALUE:
#   tools                PyPI packages for buckets: tools="gcsfs s3fs" reads gs:// and s3://, huggingface_hub hf://;
#                        gsutil and awscli are commands for pipe: prefixes, and curl is always there
#   PIP_EXTRA_INDEX_URL  an index with PyTorch for another version of CUDA, or for the CPU only (2 GB instead of 7)
#   base                 the base image, say with a date or digest that fixes it. The tests built the image on Debian 12
#                        with Python 3.11, a stand-in for python:3.12-slim, since no registry could be reached.
ARG base=docker.io/library/python:3.12-slim
FROM ${base}

# curl is for pipe: prefixes, g++ for --compile: PyTorch and Triton call a compiler. tini is a container's process 1.
# The base image sets the versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl g++ tini \
    && rm -rf /var/lib/apt/lists/*

# Ordered from what changes least to what changes most, so that a build after a change of a script takes seconds.
WORKDIR /app
COPY requirements.txt tests/constraints.txt ./
ARG PIP_EXTRA_INDEX_URL
# The constraints are the tested versions, so that every build installs the same.
RUN pip install --no-cache-dir --requirement requirements.txt --constraint constraints.txt

ARG tools
# $tools is split into words on purpose; the constraints have the versions.
# hadolint ignore=DL3013,SC2086
RUN if [ -n "$tools" ]; then pip install --no-cache-dir --constraint constraints.txt $tools; fi

# The container may run as any user id, which has neither home folder nor name here. Caches need a home folder, and
# torch.compile a user name.
ENV HOME=/tmp USER=imagenet PYTHONUNBUFFERED=1

COPY imagenet_shards.py imagenet_train.py ./
# Every user id can read the scripts, whatever the umask was when they were checked out.
RUN chmod 0644 imagenet_shards.py imagenet_train.py
# The scripts' default folders, ./data and ./output, are then the mounts /data and /output.
WORKDIR /
USER 1000:1000

# The first argument is one of the scripts or any other command, such as torchrun or bash. tini passes signals on to it:
# process 1 ignores SIGTERM unless it has a handler, and the scripts have none. With exec, the command is tini's child.
ENTRYPOINT ["tini", "--", "sh", "-c", "case $0 in *.py) exec python \"/app/$0\" \"$@\" ;; *) exec \"$0\" \"$@\" ;; esac"]
CMD ["imagenet_train.py", "--help"]
