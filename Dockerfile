# syntax=docker/dockerfile:1
# bagel-compress on an NVIDIA GPU. The host needs its driver (580 or newer) and the NVIDIA Container Toolkit, no compiler:
# torch's wheel brings CUDA's libraries and compiles our kernels itself (NVRTC).
#
#   docker build -t bagel-compress .
#   docker run --rm --gpus all -v "$PWD/models:/models" bagel-compress generate /models/nf4 "a red cat" --out cat.png
#
# The web page: see compose.yaml.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 bagel \
 && install -d -o bagel -g bagel /models

RUN --mount=type=bind,source=.,target=/src,rw \
    python3 -m venv /opt/bagel \
 && /opt/bagel/bin/pip install --no-cache-dir "/src[app,gpu]"

ENV PATH=/opt/bagel/bin:$PATH \
    HF_HOME=/models/.hub \
    NUMBA_CACHE_DIR=/tmp/numba \
    TRITON_CACHE_DIR=/tmp/triton \
    PYTHONUNBUFFERED=1
USER bagel
WORKDIR /models
VOLUME /models
EXPOSE 7860
ENTRYPOINT ["bagel-compress"]
# Reachable from outside the container, so it asks for --password; see compose.yaml.
CMD ["app", "/models", "--host", "0.0.0.0"]
