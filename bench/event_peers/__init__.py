"""The peers of the fan-out benchmark: the same ticker as usually written with other libraries, one file each.

Each serves /stream/stock-ticker: POST accepts JSON lines, one event per line, and GET follows them as
text/event-stream. Pings are delayed beyond the end of a run, since only events may reach a follower meanwhile.
"""

PATH = "/stream/stock-ticker"
PING_SECONDS = 3600
