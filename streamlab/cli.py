"""The command line and its exit codes: 0 success, 1 failure, 2 invalid configuration or arguments."""

import asyncio
import resource
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web
from rich.console import Console
from rich.table import Table

from .auth import new_token
from .client.doctor import examine
from .client.follow import follow as follow_events
from .client.terminal import LOCAL_URL, UrlOption, exit_on_error, print_error, print_events, printable
from .commands import DEFAULT_CONFIG, CommandGroup, plugin_views
from .config import CONFIG, Config, ConfigError, Fault, Server, Source
from .problems import Problem
from .scaffold import write_plugin
from .server import openapi, preflight
from .server.app import create_app, serve
from .server.app import work as serve_work
from .server.edge import reachable
from .server.listening import RETRY_SECONDS, listen
from .server.logging import logging_to
from .server.registry import find
from .server.reload import hold_reload_requests
from .server.service import Service
from .server.site import REGISTRY, ROUTES, version
from .server.worker import Assignment, Report, Worker
from .supervisor import RESTART_STATUS, supervise
from .tasks import TASKS
from .workers import Supervisor

cli = typer.Typer(
    cls=CommandGroup,
    help="Serve HTTP responses that take time, and read them: files, events, exports, tokens, long tasks.",
    epilog="""Example: streamlab run --port 9000

    Exit status: 0 success; 1 failure; 2 invalid arguments or configuration; 130 a client was stopped by Ctrl-C.
    `streamlab COMMAND --help` has what they mean for a command.""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Read this file instead of ./config.toml, which need not exist.", metavar="FILE"
    ),
]

UsageError: Any = typer.BadParameter.__base__
"""Raised for invalid arguments; typer does not export it."""


def main() -> None:
    """Run the command line; invalid arguments are reported in one line, with status 2."""
    try:
        sys.exit(COMMAND(prog_name="streamlab", standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except UsageError as error:
        message = error.format_message()
        command = error.ctx.command_path if error.ctx else "streamlab"
        if message.startswith("Usage:"):  # the help, without arguments
            typer.echo(message, err=True)
        else:
            message = message[:1].lower() + message[1:].rstrip(".").replace(". Did you", "; did you")
            print_error(f"{command}: {message} (see {command} --help)")
        sys.exit(2)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"streamlab {version()}")
        raise typer.Exit


@cli.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Read the options before the command."""


@contextmanager
def _exit_on_config_error() -> Iterator[None]:
    """Print every fault of the configuration, a line each, and exit with status 2."""
    try:
        yield
    except ConfigError as error:
        for fault in error.faults:
            typer.echo(fault, err=True)
        typer.echo(f"streamlab: {_count(len(error.faults))}; nothing was started", err=True)
        raise typer.Exit(2) from None


def _count(faults: int) -> str:
    return f"{faults} {'fault' if faults == 1 else 'faults'}"


def _read_config(path: Path | None) -> Config:
    return Config.read(_config_path(path))


@cli.command(
    epilog="""Example: streamlab run --port 9000 --reload

    Exit status: 0 after SIGTERM or Ctrl-C; 1 if code was still running when the process ended; 2 if nothing was
    started, since the configuration is invalid, the address is in use, or the event log cannot be written."""
)
def run(
    config: ConfigOption = None,
    host: Annotated[
        str | None,
        typer.Option(help="Listen on this address, or unix:PATH, instead of `host` of [server].", metavar="ADDRESS"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Listen on this port instead of `port` of [server]; 0 takes any free one.",
            metavar="PORT",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Start this number of workers instead of `workers` of [server]; auto is one for each processor.",
            metavar="N",
        ),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Take changes of the configuration and the plugins; restart if needed.")
    ] = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    worker: Annotated[int | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    It needs no configuration, and writes only below the folder `var` next to its config.toml, or without one in the
    working directory, unless keys of the configuration name other files.
    """
    options = {"host": host, "port": port, "workers": workers}
    if reload:
        _run_reloading(config, options)
        return
    hold_reload_requests()
    if worker is not None:
        _run_worker(worker)
        return
    with _exit_on_config_error():
        read = partial(Source.read, _config_path(config), options)
        source = read()
        settings = source.config()
        if found := list(preflight.event_log_faults(settings)):
            raise ConfigError(found)  # before the log file is opened, which is usually in the same folder
        server = settings.server
        with logging_to(style=server.log_format, level=server.log_level, file=server.log_file):
            _raise_file_limit(server.max_streams)
            if not settings.faults and server.processes > 1:
                status = _supervise_workers(source, settings, read, may_restart=supervised)
            else:
                serving = serve(
                    settings, on_ready=_announce, read_again=lambda: read().config(), may_restart=supervised
                )
                status = RESTART_STATUS if asyncio.run(serving) else 0
    if status:
        raise typer.Exit(status)


def _config_path(given: Path | None) -> Path | None:
    return given if given is not None else DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _supervise_workers(source: Source, settings: Config, read: Callable[[], Source], *, may_restart: bool) -> int:
    """Run the workers of a server until a signal ends them; return the exit status."""
    preflight.startable(settings)
    while (listening := listen(settings)) is None:
        time.sleep(RETRY_SECONDS)
    with closing(listening):
        supervisor = Supervisor(
            source,
            settings,
            listening,
            service=Service(),
            read=read,
            on_ready=partial(print, end="", flush=True),
            may_restart=may_restart,
        )
        status = supervisor.run()
    return RESTART_STATUS if supervisor.restarts else status


def _run_worker(lifeline: int) -> None:
    """Run one of several workers, as the process that supervises them has assigned it."""
    worker = Worker(Assignment.read(sys.stdin.buffer), lifeline)

    def on_ready(app: web.Application, address: str) -> None:
        worker.report(Report(_announcement(app, address)))

    try:
        settings = worker.assignment.source.config()
        server = settings.server
        number = worker.assignment.number
        with logging_to(style=server.log_format, level=server.log_level, file=server.log_file, worker=number):
            _raise_file_limit(server.max_streams)
            asyncio.run(serve(settings, on_ready=on_ready, worker=worker))
            worker.close()
    except ConfigError as error:
        worker.report(Report(faults=error.faults))
        raise typer.Exit(2) from None


def _run_reloading(config: Path | None, options: Mapping[str, Any]) -> None:
    """Run the server as a child process that takes changes of its files, or is restarted; a signal ends both."""
    with _exit_on_config_error():
        settings = _read_config(config)
    command = ["run", "--supervised"]
    for option, value in {"config": config, **options}.items():
        command += [] if value is None else [f"--{option}", str(value)]
    supervise(command, (config or DEFAULT_CONFIG).absolute(), settings)


def _raise_file_limit(streams: int) -> None:
    """Raise the limit of open files to what the streams need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * streams + 256
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _announce(app: web.Application, address: str) -> None:
    # In one write: a program may stop reading after a line, and a signal handler may print in between.
    print(_announcement(app, address), end="", flush=True)


def _announcement(app: web.Application, address: str) -> str:
    """Return the plugins, and what a user needs next; the line that ends with the address is for programs, too."""
    table = Table(box=None, pad_edge=False)
    for title in ("plugin", "state", "routes"):
        table.add_column(title)
    for plugin in app[REGISTRY].plugins:
        paths = ", ".join(dict.fromkeys(route.endpoint.template for route in plugin.routes))
        table.add_row(plugin.name, plugin.state, plugin.reason or paths)
    for scenario, reason in app[REGISTRY].degraded().items():
        table.add_row(scenario, "degraded", reason)
    console = Console()
    with console.capture() as plugins:
        console.print(table)
    config = app[CONFIG]
    source = "defaults (no config.toml)" if config.source == "defaults" else config.source
    origins = ", ".join(dict.fromkeys([source, *config.variables.values()]))
    written = ", ".join(map(str, preflight.written_paths(config)))
    if config.server.socket is None:
        lab = f"lab page: {reachable(address, config.server)}/lab"
    else:
        lab = f"try it: {_tried('curl http://localhost/', config.server)}"
    lines = (
        f"streamlab {version()} serves {address}",
        f"configuration: {origins}",
        f"data: {written}",
        *([f"workers: {config.server.processes}"] if config.server.processes > 1 else ()),
        lab,
    )
    return plugins.get() + "".join(f"{line}\n" for line in lines)


def _origin(server: Server) -> str:
    """Return the beginning of the URLs of a server as configured; at a Unix socket, curl needs any name of a host."""
    return "http://localhost" if server.socket is not None else f"http://{server.host}:{server.port}"


def _tried(command: str, server: Server) -> str:
    """Return a command of curl, as it reaches the Unix socket if the server has one."""
    if server.socket is None:
        return command
    return command.replace("curl ", f"curl --unix-socket {shlex.quote(str(server.socket))} ", 1)


@cli.command(
    epilog="""Example: streamlab check --config /srv/streamlab/config.toml

    Exit status: 0 if nothing is wrong; 2 otherwise."""
)
def check(config: ConfigOption = None) -> None:
    """Report what cannot work, a line each, and start nothing.

    It examines the configuration, the plugins, and the files and addresses of this machine; it writes nothing, and
    connects to nothing. A degraded scenario (its model is not installed, for example) is reported and is not an error,
    nor is a token that may use every scenario and never expires.
    """
    with _exit_on_config_error():
        settings = _read_config(config)
        found = preflight.faults(settings)
        try:
            app = create_app(settings)
        except ConfigError as error:
            raise ConfigError(dict.fromkeys([*error.faults, *found])) from None
        registry = app[REGISTRY]
        by_plugin: dict[str, list[Fault]] = {plugin.name: [] for plugin in registry.plugins}
        for name, fault in registry.check(settings):
            by_plugin[name].append(fault)
        for plugin in registry.plugins:
            state = _count(len(by_plugin[plugin.name])) if by_plugin[plugin.name] else plugin.state
            typer.echo(
                f"{plugin.name}: {state}{f' - {plugin.reason}' if plugin.reason else ''}", err=bool(plugin.reason)
            )
        for scenario, reason in registry.degraded().items():
            typer.echo(f"{scenario}: degraded - {reason}")
        for warning in preflight.scope_warnings(settings):
            typer.echo(f"warning: {warning}", err=True)
        if all_found := [*found, *(fault for faults in by_plugin.values() for fault in faults)]:
            raise ConfigError(all_found)
    if any(plugin.state == "failed" for plugin in registry.plugins):
        raise typer.Exit(2)


@cli.command(
    epilog="""Example: streamlab routes | grep -A 1 POST

    Exit status: 0; 2 if the configuration is invalid."""
)
def routes(config: ConfigOption = None) -> None:
    """List every route with a curl command that tries it."""
    with _exit_on_config_error():
        settings = _read_config(config)
        app = create_app(settings)
        origin = _origin(settings.server)
        for route in app[ROUTES]:
            typer.echo(
                f"{route.endpoint.method:6} {route.endpoint.template:24} {route.scenario:12} {route.endpoint.summary}"
            )
            typer.echo(f"       {_tried(openapi.curl(route, origin), settings.server)}")


@cli.command(
    epilog="""Example: streamlab new price_feed

    Exit status: 0; 2 if nothing was written, since the name is invalid or in use, or a file exists or cannot be
    written."""
)
def new(
    name: Annotated[
        str, typer.Argument(help="The name of the plugin, in lower case, as `price_feed`.", metavar="NAME")
    ],
    task: Annotated[bool, typer.Option("--task", help="Write a long task instead of a scenario.")] = False,
    config: ConfigOption = None,
) -> None:
    """Write a working plugin, and its conformance test.

    The plugin is written into the first folder of `path` of [plugins], `plugins` by default, and its test into `tests`
    beside that folder.
    """
    with _exit_on_config_error():
        settings = _read_config(config)
    existing = next((plugin.origin for plugin in find(settings) if plugin.name == name), None)
    if existing:
        typer.echo(f"streamlab: a plugin {name!r} already exists: {existing}", err=True)
        raise typer.Exit(2)
    folder = next(iter(settings.plugins.path), settings.base / "plugins")
    try:
        paths = write_plugin(name, folder=folder, tests=folder.parent / "tests", task=task)
    except (ValueError, OSError) as error:
        typer.echo(f"streamlab: {error}", err=True)
        raise typer.Exit(2) from None
    for path in paths:
        typer.echo(f"wrote {path}")
    url = _origin(settings.server)
    run = f"streamlab task run {name} --url {url}" if task else _tried(f"curl -N {url}/stream/{name}", settings.server)
    typer.echo(f"try it: streamlab run, then {run}\ntest it: pytest {paths[1]}")


@cli.command(
    epilog="""Example: STREAMLAB_SCENARIOS__PROGRESS__ENGINE=docket streamlab worker

    Exit status: 0 after SIGTERM or Ctrl-C; 1 if code was still running when the process ended; 2 if nothing was
    started, since the configuration is invalid, or has no work for workers."""
)
def worker(config: ConfigOption = None) -> None:
    """Run queued tasks until SIGTERM or Ctrl-C.

    Tasks that are unfinished by then are handed to another worker.
    """
    with _exit_on_config_error():
        settings = _read_config(config)
        server = settings.server
        with logging_to(style=server.log_format, level=server.log_level, file=None):
            try:
                asyncio.run(serve_work(settings, on_ready=_announce_worker))
            except Problem as problem:
                raise ConfigError([Fault(settings.source, "", problem.detail)]) from None


def _announce_worker(app: web.Application) -> None:
    print(f"streamlab {version()} runs tasks: {', '.join(sorted(app[TASKS].keys()))}", flush=True)


@cli.command(
    epilog="""Example: streamlab token alice --allow export:read:orders --allow logs:read --days 90

    Exit status: 0; 2 for an invalid name or scope."""
)
def token(
    name: Annotated[str, typer.Argument(help="The name of who has the token, for the log.", metavar="NAME")],
    allow: Annotated[
        list[str],
        typer.Option(help="Allow SCENARIO:ACTION or SCENARIO:ACTION:RESOURCE, once or more often.", metavar="SCOPE"),
    ],
    days: Annotated[
        float | None, typer.Option(min=0.001, help="Let it expire after N days.", metavar="N", show_default=False)
    ] = None,
) -> None:
    """Print a new token, and the lines for config.toml that let it in.

    The token is printed this once: the lines have its SHA-256 only. Send it as `Authorization: Bearer TOKEN`.
    """
    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    secret, lines = new_token(name, allow, expires)
    settings = Config.of(tomllib.loads(lines))
    if settings.faults:
        for fault in settings.faults:
            print_error(f"streamlab: {fault.value} - {fault.reason}" if fault.value else f"streamlab: {fault.reason}")
        raise typer.Exit(2)
    typer.echo(f"{secret}\n")
    typer.echo(lines, nl=False)


TargetArgument = Annotated[
    str,
    typer.Argument(help="The URL of a stream (http:// is optional), or a path of the server at --url.", metavar="URL"),
]


def _absolute(target: str, server: str) -> str:
    """Return the URL of a target, which is a URL or a path of the server."""
    return server.rstrip("/") + target if target.startswith("/") else target


@cli.command(
    epilog="""Example: streamlab follow /stream/stock-ticker --limit 10

    Exit status: 0 at the end of the stream, or after N events; 1 if the server is unreachable or rejects the request;
    2 for an invalid URL; 130 after Ctrl-C."""
)
def follow(
    target: TargetArgument,
    url: UrlOption = LOCAL_URL,
    last_event_id: Annotated[str, typer.Option(help="Start after this event.", metavar="ID", show_default=False)] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Exit after N events.", metavar="N")] = None,
    no_reconnect: Annotated[bool, typer.Option("--no-reconnect", help="Exit when the connection ends.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the id of each event before it.")] = False,
) -> None:
    """Print an event stream, and resume it when the connection is lost.

    The data of an event is a line, after its name if it has one.
    """
    # The reader of the pipe may exit first, as `head` does.
    with exit_on_error(), suppress(asyncio.CancelledError, BrokenPipeError):
        events = follow_events(
            _absolute(target, url),
            last_event_id=last_event_id,
            reconnect=not no_reconnect,
            on_pause=lambda pause: print_error(str(pause)),
        )
        asyncio.run(print_events(events, limit, ids=verbose))


@cli.command(
    epilog="""Example: streamlab doctor https://stream.example.org/stream/stock-ticker

    Exit status: 0 if it streams; 1 if it does not, or the server is unreachable; 2 for an invalid URL; 130 after
    Ctrl-C."""
)
def doctor(
    target: TargetArgument,
    url: UrlOption = LOCAL_URL,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=600, help="Observe it for this time, in seconds.", metavar="N")
    ] = 5.0,
) -> None:
    """Diagnose whether a URL streams, and what prevents it.

    Any server will do, through any proxy: the stream is received as a browser would receive it.
    """
    with exit_on_error():
        report = asyncio.run(examine(_absolute(target, url), seconds=seconds))
    for line in report.lines():
        typer.echo(printable(line))
    if not report.is_streaming:
        raise typer.Exit(1)


@cli.command(
    "client",
    epilog="""Example: streamlab client download --url http://127.0.0.1:9000

    Exit status: 0 after quit, or after the views; 1 if the server is unreachable, or a view failed; 2 for an invalid
    URL or an unknown view; 130 after Ctrl-C outside of a view.""",
)
def open_menu(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="The views to open, one after another, instead of the menu."),
    ] = None,
    url: UrlOption = LOCAL_URL,
) -> None:
    """Choose from a menu of live views: downloads, prices, logs, exports.

    Ctrl-C ends a view.
    """
    from .client import menu  # not imported by other commands

    raise typer.Exit(menu.run(url, plugin_views(), names or ()))


COMMAND: Any = typer.main.get_command(cli)
"""The command line with all commands of the core."""
