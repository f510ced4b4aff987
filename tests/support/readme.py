"""The text of README, and the plugins that it shows."""

import re

from tests.support.servers import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

THUMBNAILS, COUNTDOWN, VOTES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
