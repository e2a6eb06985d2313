# The README's two commands on a CPU: `make demo`, three minutes on digits, and `make test`.
#   docker build -t resnet-train . && docker run --rm --shm-size=2g resnet-train
# One's own: docker run --rm -v "$PWD/runs:/resnet-train/runs" resnet-train .venv/bin/resnet-train data=digits
FROM python:3.12-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# make for the commands, git for the record of a run, a compiler for torch.compile
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 resnet \
    && install -d -o resnet /resnet-train
USER 1000
WORKDIR /resnet-train
COPY --chown=resnet . .
# Wheels of torch without CUDA, from PyTorch's own index
ENV UV_TORCH_BACKEND=cpu UV_NO_CACHE=1
RUN make .venv/installed-dev .venv/installed-digits,report
CMD ["bash", "-c", "make demo && make test"]
