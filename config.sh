# What ./run uses. Each line can be overridden from the environment: shards=/mnt/data ./run serve

imagenet=${imagenet:-/data/imagenet}          # folder with ImageNet's train/ and val/; mounted read-only
shards=${shards:-$PWD/data}                   # folder for the shards and the index
image=${image:-imagenet-webdataset}           # name of the container image
engine=${engine:-docker}                      # docker or podman
python=${python:-python3}                     # makes the virtual environment of `demo` and `test`; 3.10 or newer
