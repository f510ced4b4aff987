"""The terminal view `download`: a file with a progress bar, resumed after any interruption."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from streamlab import hookimpl
from streamlab.client import Pause, Terminal, TransferProgress, download, one_line, prompt, prompt_file


def show_download(terminal: Terminal) -> None:
    """Download a file with a progress bar; an interrupted one resumes."""
    path = prompt("path", "/download/large-file")
    target = prompt_file(Path(path.partition("?")[0]).name or "download.bin")
    noted = False
    with terminal.progress_bar(target.name, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as update:

        def on_progress(progress: TransferProgress) -> None:
            nonlocal noted
            if not noted and progress.resumed_at:
                of = f" of {progress.total:,}" if progress.total is not None else ""
                terminal.note(f"resuming at byte {progress.resumed_at:,}{of}")
            noted = True
            update(completed=progress.done, total=progress.total)

        def on_pause(pause: Pause) -> None:
            nonlocal noted
            terminal.note(pause)
            noted = False

        url = f"{terminal.url}/{path.removeprefix('/')}"
        proof = asyncio.run(download(url, target, on_progress=on_progress, on_pause=on_pause))
    terminal.print(one_line(f"{target}: {target.stat().st_size:,} bytes, verified by {proof}"))


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `download`."""
    return {"download": show_download}
