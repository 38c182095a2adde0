# ./run build, or docker build --tag imagenet-webdataset .
# Build arguments, each passed as --build-arg NAME=VALUE:
#   tools                PyPI packages with the commands that a pipe: prefix calls, say tools="gsutil awscli"; curl is there
#   PIP_EXTRA_INDEX_URL  an index with PyTorch for the CPU only (1 GB instead of 6) or for another version of CUDA
#   base                 the base image
ARG base=docker.io/library/python:3.12-slim
FROM ${base}

# curl is for prefixes, g++ for --compile: PyTorch and Triton call a compiler. The base decides the versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl g++ \
    && rm -rf /var/lib/apt/lists/*

# What changes least comes first, so that a build after touching a script takes seconds.
WORKDIR /app
COPY requirements.txt tests/constraints.txt ./
ARG PIP_EXTRA_INDEX_URL
# The versions that were tested, so that a later build installs the same.
RUN pip install --no-cache-dir --requirement requirements.txt --constraint constraints.txt

ARG tools
# A list, to be split into its words; its versions are the caller's choice.
# hadolint ignore=DL3013,SC2086
RUN if [ -n "$tools" ]; then pip install --no-cache-dir $tools; fi

# --user may bring any uid, which has no home and no name here: caches want the one, torch.compile asks for the other.
ENV HOME=/tmp USER=imagenet PYTHONUNBUFFERED=1

COPY imagenet_shards.py imagenet_train.py ./
# Readable to everyone, whatever the umask of the checkout.
RUN chmod 0644 imagenet_shards.py imagenet_train.py
USER 1000:1000

# IMAGE imagenet_train.py … runs a script, IMAGE torchrun … or IMAGE bash any other command; exec lets signals through.
ENTRYPOINT ["sh", "-c", "case $0 in *.py) exec python \"$0\" \"$@\" ;; *) exec \"$0\" \"$@\" ;; esac"]
CMD ["imagenet_train.py", "--help"]
