"""The table that decides what happened to a log file: every combination of facts."""

from itertools import product

from tests.support.servers import plugin_module

content = plugin_module("logs", "content")
rotation = plugin_module("logs", "rotation")
Facts, Finding, Place, Successor, Unread = (
    rotation.Facts,
    rotation.Finding,
    rotation.Place,
    rotation.Successor,
    content.Unread,
)

TABLE = """
    finding            step          place                      successor   reported  unread                silent

    IN_PLACE           WAIT          AT_PATH                    NONE|FOUND  -         -                     -
    RENAMED            WAIT          RENAMED                    NONE        no        -                     -
    MISSING            WAIT          NOT_FOUND                  NONE        no        -                     -
    LOST               SKIP_TO_NEXT  NOT_FOUND                  FOUND       no        -                     -
    ENDED              WAIT          RENAMED|DELETED|NOT_FOUND  NONE        yes       -                     -
    SUCCEEDED          OPEN_NEXT     RENAMED|DELETED|NOT_FOUND  FOUND       yes       -                     -

    UNREAD             READ          RENAMED|DELETED            FOUND       no        LINES                 -
    UNSETTLED          WAIT          RENAMED|DELETED            FOUND       no        PARTIAL_LINE          no
    PARTIAL_LINE       FINISH        RENAMED|DELETED            FOUND       no        PARTIAL_LINE          yes
    REPLACED           MOVE_TO_NEXT  RENAMED|DELETED            FOUND       no        NOTHING               -

    UNREAD             READ          DELETED                    NONE        no        LINES                 -
    UNSETTLED          WAIT          DELETED                    NONE        no        PARTIAL_LINE|NOTHING  no
    PARTIAL_LINE       FINISH        DELETED                    NONE        no        PARTIAL_LINE          yes
    DELETED            END           DELETED                    NONE        no        NOTHING               yes

    LATE               WAIT          AT_PATH|RENAMED|DELETED    OPEN        -         LINES                 -
    LATE               WAIT          AT_PATH|RENAMED|DELETED    OPEN        -         PARTIAL_LINE|NOTHING  no
    LATE_PARTIAL_LINE  FINISH        AT_PATH|RENAMED|DELETED    OPEN        -         PARTIAL_LINE          yes
    SILENT             CLOSE         AT_PATH|RENAMED|DELETED    OPEN        -         NOTHING               yes
    UNTRACEABLE        CLOSE         NOT_FOUND                  OPEN        -         -                     -
"""
"""Each combination of facts is in exactly one row; `-` is any value."""

ROWS = [line.split() for line in TABLE.splitlines() if line.strip()][1:]


def test_every_combination_of_facts_has_the_finding_and_the_step_of_its_row() -> None:
    combinations = 0
    for place, successor, reported, unread, silent in product(Place, Successor, (False, True), Unread, (False, True)):
        values = [place.name, successor.name, "yes" if reported else "no", unread.name, "yes" if silent else "no"]
        rows = [
            (finding, step)
            for finding, step, *cells in ROWS
            if all(cell == "-" or value in cell.split("|") for cell, value in zip(cells, values, strict=True))
        ]
        found = rotation.classify(Facts(place, successor, reported, unread, silent))
        assert rows == [(found.name, found.step.name)], values
        combinations += 1
    assert combinations == 4 * 3 * 2 * 3 * 2


def test_every_finding_is_in_the_table() -> None:
    assert {finding for finding, *_ in ROWS} == {finding.name for finding in Finding}
    assert {step for _, step, *_ in ROWS} == {step.name for step in rotation.Step}
