"""Options of a pytest that a test runs, such as one with the conformance suite of a plugin."""

OPTIONS = ["-q", *(f"-pno:{plugin}" for plugin in ("xdist", "cacheprovider", "schemathesis", "hypothesispytest"))]
"""Without plugins of pytest that are not needed: some import for a third of a second, in every run."""
