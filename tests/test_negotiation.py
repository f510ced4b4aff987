"""Preference for events in Accept."""

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from streamlab import wants_events


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (["text/event-stream"], True),
        (["TEXT/Event-Stream; charset=utf-8"], True),
        (["application/json, text/event-stream"], True),
        (["application/json", "text/event-stream"], True),
        (["text/event-stream, */*;q=0.5"], True),
        (["text/event-stream;q=0.5, application/json;q=0.4"], True),
        (["text/event-stream;q=0.5, application/json"], False),
        (["text/event-stream;q=0"], False),
        (["application/json"], False),
        (["*/*"], False),
        ([], False),
    ],
)
def test_events_are_preferred_where_accept_names_them_and_no_other_type_weighs_more(
    fields: list[str], wanted: bool
) -> None:
    request = make_mocked_request("GET", "/", headers=CIMultiDict([("Accept", field) for field in fields]))
    assert wants_events(request) is wanted
