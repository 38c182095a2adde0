# Settings of ./run. The environment overrides each: shards=/mnt/data ./run serve
# shellcheck shell=bash disable=SC2034

imagenet=${imagenet:-/data/imagenet}     # folder with ImageNet's train/ and val/; /imagenet in a container, read-only
shards=${shards:-$PWD/data}              # folder for the shards and the index; /data in a container
output=${output:-$PWD/output}            # folder for checkpoints and logs; /output in a container
image=${image:-imagenet-webdataset}      # name of the container image
# Credentials that containers get, separated by spaces: absolute paths of files or folders, which are mounted read-only,
# and names of environment variables. Example: credentials="$HOME/.boto $HOME/.aws AWS_PROFILE"
credentials=${credentials:-}
engine=${engine:-docker}                 # docker or podman
shm=${shm:-16g}                          # shared memory, at most: 4 batches of 38.5 MB for each GPU's loader process
nginx=${nginx:-docker.io/library/nginx:stable} # image of the web server of `serve`; podman needs the full name
port=${port:-8080}                       # port of `serve`; 127.0.0.1:8080 accepts connections from this machine only
python=${python:-python3}                # makes the virtual environment of `demo` and `test`; 3.10 or newer
