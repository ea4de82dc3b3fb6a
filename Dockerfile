# Two images: `docker build --target cpu .` and `docker build --target cuda .`
# Linted with hadolint (2026-11-27); never built by us, since our machines run no docker daemon.
FROM python:3.13-slim AS cpu
RUN useradd --uid 1000 --create-home specs && mkdir /runs && chown specs /runs
WORKDIR /app
COPY . .
RUN python -m pip install --no-cache-dir .
USER 1000
ENV HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
VOLUME /runs
ENTRYPOINT ["specs"]
CMD ["run", "--run-dir", "/runs/default"]

# PyPI's torch and vllm bring CUDA's libraries along; the host lends its driver through the NVIDIA container toolkit.
FROM python:3.12-slim AS cuda
# Triton compiles a small launcher at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home specs && mkdir /runs && chown specs /runs
WORKDIR /app
COPY . .
RUN python -m pip install --no-cache-dir '.[vllm,qlora,judge,track]'
USER 1000
VOLUME /runs
# SIGTERM must reach `specs` itself, which then saves: no shell in between.
ENTRYPOINT ["specs"]
CMD ["--help"]
