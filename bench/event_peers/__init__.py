"""The peers of the fan-out measurement: the same ticker as it is usually written with other libraries, a file each.

Each answers /stream/stock-ticker: POST takes JSON lines, an event a line, and GET follows them as text/event-stream.
Pings are put off beyond the end of a run, as nothing but events may reach a follower while they are counted.
"""

PATH = "/stream/stock-ticker"
FAR_OFF_SECONDS = 3600
