# squeezewire in a container: torch and CUDA's libraries come with the wheels, the host gives the driver.
#
#   docker build --tag squeezewire .
#   docker build --tag squeezewire --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     without CUDA
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --volume "$PWD:/data" squeezewire train name=first ...
#
# What of it is checked, and what is not: docs/installing.md.
FROM python:3.11-slim

# Where torch's wheels are, if not where all others are.
ARG TORCH_INDEX=""

COPY pyproject.toml constraints.txt README.md LICENSE /srv/squeezewire/
COPY conf /srv/squeezewire/conf
COPY pipeline /srv/squeezewire/pipeline

RUN cd /srv/squeezewire \
    && if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch torchvision; \
    fi \
    && pip install --no-cache-dir -c constraints.txt '.[timm]' \
    && squeezewire --version

WORKDIR /data
ENTRYPOINT ["squeezewire"]
CMD ["--help"]
