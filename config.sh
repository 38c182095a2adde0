# What ./run uses. Each line can be overridden from the environment: shards=/mnt/data ./run serve
# shellcheck shell=bash disable=SC2034

imagenet=${imagenet:-/data/imagenet}     # folder with ImageNet's train/ and val/; /imagenet in a container, read-only
shards=${shards:-$PWD/data}              # folder for the shards and the index; /data in a container
output=${output:-$PWD/output}            # folder for checkpoints and logs; /output in a container
image=${image:-imagenet-webdataset}      # name of the container image
# What a container gets to log in to a bucket, separated by spaces: absolute paths of files or folders, mounted read-only,
# and names of environment variables. Say credentials="$HOME/.boto AWS_PROFILE $HOME/.aws".
credentials=${credentials:-}
engine=${engine:-docker}                 # docker or podman
shm=${shm:-16g}                          # shared memory, at most: a loader keeps 4 batches of 40 MB a worker in it
nginx=${nginx:-docker.io/library/nginx:stable} # image of the web server of `serve`; podman needs the whole name
port=${port:-8080}                       # of `serve`; 127.0.0.1:8080 lets nobody in from other machines
python=${python:-python3}                # makes the virtual environment of `demo` and `test`; 3.10 or newer
