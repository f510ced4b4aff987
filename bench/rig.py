"""What surrounds every benchmark: its common options, the CPUs it is spread over, and a clean end whatever happens."""

import argparse
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable


def parser(prog: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Build a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    made.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each kind (default: {rounds})")
    made.add_argument("--no-pin", action="store_true", help="let servers and client share all CPUs")
    made.add_argument("--realtime", action="store_true", help="let nothing else on these CPUs disturb (needs root)")
    made.add_argument("--markdown", action="store_true", help="print everything as Markdown, too")
    return made


def choose_cpus(options: argparse.Namespace) -> tuple[int, int] | None:
    """Choose the servers' CPU and the client's; None where they are not to be, or cannot be, held apart."""
    if options.realtime:  # whatever is started inherits it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    allowed = sorted(os.sched_getaffinity(0))
    # The first and the last: neighbours are often two threads of one core.
    return None if options.no_pin or len(allowed) < 2 else (allowed[0], allowed[-1])


def placement(cpus: tuple[int, int] | None) -> str:
    """Say where and how servers and client run."""
    where = f"servers on CPU {cpus[0]}, client on CPU {cpus[1]}" if cpus else "not pinned"
    return where + (", real-time scheduling" if os.sched_getscheduler(0) == os.SCHED_RR else "")


def allow_files(count: int) -> None:
    """Let this process, and all that it starts, open so many files and sockets; raises RuntimeError if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
        except (ValueError, OSError):
            raise RuntimeError(f"needs {count} open files, but `ulimit -Hn` is {hard}") from None


def client(module: str, arguments: list[str], seconds: float, cpu: int | None) -> "subprocess.CompletedProcess[str]":
    """Run a measuring client, a module that prints JSON, on one CPU if given; it is killed after so many seconds."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
    )


def run(prog: str, main: Callable[[], None]) -> None:
    """Run a benchmark so that it ends its servers and says in one line what went wrong, if something did."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # they clean up as Ctrl-C does, but nohup is obeyed
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, OSError, ImportError, subprocess.TimeoutExpired) as error:
        sys.exit(f"{prog}: {error}")
