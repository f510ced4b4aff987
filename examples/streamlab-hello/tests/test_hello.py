"""Conformance and behaviour of the plugin hello."""

from collections.abc import Mapping
from typing import Any

from streamlab.testing import Asked, Conformance, Server


class TestHello(Conformance):
    plugin = "hello"

    @classmethod
    def prepare(cls, server: Server, asked: Asked) -> Mapping[str, Any]:
        """Post greetings to follow."""
        if asked.carries_events:
            for name in ("Ada", "Grace", "Barbara"):
                server.ask("/hello", method="POST", body={"name": name})
        return {}

    def test_greets_by_name(self, streamlab_server: Server) -> None:
        answer = streamlab_server.ask("/hello", method="POST", body={"name": "Edsger"})
        assert (answer.status, answer.json["greeting"]) == (201, "Hello, Edsger!")
