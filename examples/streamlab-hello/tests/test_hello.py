"""Conformance and behaviour of the plugin hello."""

from collections.abc import Mapping
from typing import Any

from streamlab.testing import Conformance, EndpointForm, Server


class TestHello(Conformance):
    plugin = "hello"

    @classmethod
    def prepare(cls, server: Server, form: EndpointForm) -> Mapping[str, Any]:
        """Post greetings to follow."""
        if form.carries_events:
            for name in ("Ada", "Grace", "Barbara"):
                server.request("/hello", method="POST", body={"name": name})
        return {}

    def test_greets_by_name(self, streamlab_server: Server) -> None:
        response = streamlab_server.request("/hello", method="POST", body={"name": "Edsger"})
        assert (response.status, response.json["greeting"]) == (201, "Hello, Edsger!")
