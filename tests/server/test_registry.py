"""Which plugins exist, which are active, isolation of broken plugins, and every hook."""

import asyncio
import logging
import re
import socket
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from streamlab import hookspecs
from streamlab.config import Config, ConfigError
from streamlab.server.app import create_app
from streamlab.server.logging import LineFormatter
from streamlab.server.registry import HOOKS, find
from streamlab.server.site import REGISTRY, ROUTES
from streamlab.streaming.drain import STREAMS
from streamlab.tasks import TASKS
from tests.support.servers import REPOSITORY, disabled, write_plugins

Client = Callable[..., Awaitable[TestClient[Any, Any]]]

ONE = """
    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl


    class {title}(Scenario):
        word: str = "{name}"

        @endpoint("GET", "/{name}")
        async def say(self, request):
            return web.Response(text=self.word)


    @hookimpl
    def register_scenarios():
        return [{title}]
"""


def one(name: str) -> str:
    """Return a plugin with a scenario and a route of its name."""
    return ONE.format(name=name, title=name.capitalize())


def config(tmp_path: Path, sources: dict[str, str] | None = None, /, **tables: Any) -> Config:
    """Return the configuration of a server with dropped-in plugins; of the built-in ones only `file` is enabled."""
    write_plugins(tmp_path, sources or {})
    return Config.of({**tables, "scenarios": {**disabled(but="file"), **tables.get("scenarios", {})}}, base=tmp_path)


def faults_of(settings: Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        create_app(settings)
    return [str(fault) for fault in caught.value.faults]


def states(app: Any) -> dict[str, str]:
    return {plugin.name: plugin.state for plugin in app[REGISTRY].plugins}


def install(folder: Path, name: str, module: str, source: str) -> None:
    """Create an installed distribution NAME 1.0 with a module as the entry point NAME."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[streamlab]\n{name} = {module}\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that installs a plugin for this test, by name and source."""
    folder = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(folder)

    def installing(name: str, source: str) -> None:
        module = f"{tmp_path.name}_{name}"
        monkeypatch.setitem(sys.modules, module, None)  # restores the previous module at the end
        del sys.modules[module]
        install(folder, name, module, source)

    return installing


# -- discovery


def test_plugins_are_found_in_the_order_built_in_dropped_in_installed(
    tmp_path: Path, installed: Callable[[str, str], None]
) -> None:
    installed("aaa", one("aaa"))
    found = [plugin.name for plugin in find(config(tmp_path, {"bbb": one("bbb"), "abb": one("abb")}))]
    assert found.index("file") < found.index("abb") < found.index("bbb") < found.index("aaa")


def test_plugins_are_one_list_sorted_by_name(tmp_path: Path, installed: Callable[[str, str], None]) -> None:
    installed("mmm", one("mmm"))
    app = create_app(config(tmp_path, {"zzz": one("zzz"), "aaa": one("aaa")}))
    names = [plugin.name for plugin in app[REGISTRY].plugins]
    assert names == sorted(names)
    assert {"aaa", "file", "mmm", "zzz"} <= set(names)


async def test_built_in_plugins_are_found_without_configuration(tmp_path: Path, aiohttp_client: Client) -> None:
    client = await aiohttp_client(create_app(Config.of({}, base=tmp_path)))
    async with client.get("/files/") as response:
        assert response.status == 200
    async with client.get("/download/large-file?size_mb=1") as response:
        assert len(await response.read()) == 1_000_000


async def test_a_dropped_in_file_is_served(tmp_path: Path, aiohttp_client: Client) -> None:
    client = await aiohttp_client(create_app(config(tmp_path, {"hello": one("hello")})))
    async with client.get("/hello") as response:
        assert (response.status, await response.text()) == (200, "hello")


async def test_a_dropped_in_folder_is_served_and_may_import_its_own_modules(
    tmp_path: Path, aiohttp_client: Client
) -> None:
    folder = tmp_path / "plugins" / "hello"
    folder.mkdir(parents=True)
    (folder / "words.py").write_text("WORD = 'from words'\n")
    source = textwrap.dedent(one("hello")).replace('"hello"\n', "words.WORD\n")
    (folder / "__init__.py").write_text(f"from . import words\n{source}")
    client = await aiohttp_client(create_app(config(tmp_path)))
    async with client.get("/hello") as response:
        assert (response.status, await response.text()) == (200, "from words")


async def test_an_installed_plugin_is_served(
    tmp_path: Path, aiohttp_client: Client, installed: Callable[[str, str], None]
) -> None:
    installed("parcel", one("parcel"))
    app = create_app(config(tmp_path))
    assert next(plugin.origin for plugin in app[REGISTRY].plugins if plugin.name == "parcel") == "parcel"
    client = await aiohttp_client(app)
    async with client.get("/parcel") as response:
        assert (response.status, await response.text()) == (200, "parcel")


async def test_an_installed_plugin_that_cannot_be_imported_fails_alone(
    tmp_path: Path, aiohttp_client: Client, installed: Callable[[str, str], None]
) -> None:
    installed("parcel", "import no_such_module_at_all\n" + textwrap.dedent(one("parcel")))
    client = await aiohttp_client(create_app(config(tmp_path)))
    async with client.get("/parcel") as response:
        assert response.status == 503
        assert "'no_such_module_at_all'" in (await response.json())["detail"]


def test_files_that_are_not_plugins_are_ignored(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"_private": "1/0", ".hidden": "1/0", "not-a-name": "1/0"})
    (tmp_path / "plugins" / "notes.txt").write_text("1/0")
    (tmp_path / "plugins" / "no_package").mkdir()
    (tmp_path / "plugins" / "__pycache__").mkdir()
    shipped = [found.name for found in find(Config.of({}, base=tmp_path / "elsewhere"))]
    assert [found.name for found in find(Config.of({}, base=tmp_path))] == shipped


def test_a_folder_that_does_not_exist_has_no_plugin(tmp_path: Path) -> None:
    app = create_app(config(tmp_path, plugins={"path": ["nowhere"]}))
    assert states(app)["file"] == "ready"


def test_every_folder_of_the_path_is_searched(tmp_path: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(textwrap.dedent(one(name)))
    app = create_app(config(tmp_path, plugins={"path": ["left", str(tmp_path / "right")]}))
    assert {"left", "right"} <= set(states(app))


def test_a_folder_named_twice_is_searched_once(tmp_path: Path) -> None:
    app = create_app(config(tmp_path, {"hello": one("hello")}, plugins={"path": ["plugins", "./plugins"]}))
    assert states(app)["hello"] == "ready"


# -- disabled plugins


def marking(marker: Path, name: str) -> str:
    return f"open({str(marker)!r}, 'w').close()\n" + textwrap.dedent(one(name))


async def test_a_disabled_plugin_is_never_imported_and_serves_nothing(tmp_path: Path, aiohttp_client: Client) -> None:
    marker = tmp_path / "imported"
    plugins = {"off": marking(marker, "off"), "on": one("on")}
    client = await aiohttp_client(create_app(config(tmp_path, plugins, scenarios={"off": {"enabled": False}})))
    assert not marker.exists()
    async with client.get("/off") as response:
        assert response.status == 404
    async with client.get("/on") as response:
        assert response.status == 200
    async with client.get("/health") as response:
        report = await response.json()
        assert (report["status"], report["scenarios"]["off"]) == ("ok", {"state": "disabled"})


def test_an_installed_plugin_that_is_disabled_is_never_imported(
    tmp_path: Path, installed: Callable[[str, str], None]
) -> None:
    marker = tmp_path / "imported"
    installed("parcel", marking(marker, "parcel"))
    app = create_app(config(tmp_path, scenarios={"parcel": {"enabled": False}}))
    assert states(app)["parcel"] == "disabled"
    assert not marker.exists()


def test_a_plugin_that_is_enabled_explicitly_is_active(tmp_path: Path) -> None:
    app = create_app(config(tmp_path, {"hello": one("hello")}, scenarios={"hello": {"enabled": True, "word": "x"}}))
    assert states(app)["hello"] == "ready"


TWO = """
    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl


    class Left(Scenario):
        @endpoint("GET", "/left")
        async def say(self, request):
            return web.Response(text="left")


    class Right(Scenario):
        @endpoint("GET", "/right")
        async def say(self, request):
            return web.Response(text="right")


    @hookimpl
    def register_scenarios():
        return [Left, Right]
"""


async def test_one_scenario_of_a_plugin_can_be_disabled(tmp_path: Path, aiohttp_client: Client) -> None:
    client = await aiohttp_client(create_app(config(tmp_path, {"two": TWO}, scenarios={"left": {"enabled": False}})))
    async with client.get("/left") as response:
        assert response.status == 404
    async with client.get("/right") as response:
        assert response.status == 200


async def test_the_health_of_a_disabled_scenario_is_reported(tmp_path: Path, aiohttp_client: Client) -> None:
    client = await aiohttp_client(create_app(config(tmp_path, {"two": TWO}, scenarios={"left": {"enabled": False}})))
    async with client.get("/health") as response:
        scenarios = (await response.json())["scenarios"]
        assert (scenarios["left"], scenarios["right"]) == ({"state": "disabled"}, {"state": "ready"})


# -- isolation of broken plugins


BROKEN = {
    "a module it needs is missing": (
        "import no_such_module_at_all\n" + textwrap.dedent(one("broken")),
        "needs the Python module 'no_such_module_at_all': install the package that contains 'no_such_module_at_all'",
    ),
    "a name it imports is missing": (
        "from streamlab import no_such_name\n" + textwrap.dedent(one("broken")),
        "cannot import name 'no_such_name' from 'streamlab'",
    ),
    "its source is not Python": (
        textwrap.dedent(one("broken")) + "\ndef f(:\n    pass\n",
        "invalid syntax (line 18 of broken.py)",
    ),
    "its import raises": (
        textwrap.dedent(one("broken")) + "\nraise RuntimeError('no licence at ' + __file__)\n",
        "RuntimeError at line 18 of broken.py: no licence at ...",
    ),
    "its import exits": (
        textwrap.dedent(one("broken")) + "\nraise SystemExit('not today')\n",
        "SystemExit at line 18 of broken.py: not today",
    ),
    "a file it reads is missing": (
        textwrap.dedent(one("broken")) + "\nopen(__file__ + '.absent')\n",
        "FileNotFoundError at line 18 of broken.py: No such file or directory",
    ),
    "register_scenarios raises": (
        textwrap.dedent(one("broken")).replace("return [Broken]", "raise LookupError('no device')"),
        "LookupError at line 16 of broken.py: no device",
    ),
    "register_scenarios returns no scenario": (
        textwrap.dedent(one("broken")).replace("return [Broken]", "return ['Broken']"),
        "register_scenarios must return Scenario classes, not 'Broken'",
    ),
    "register_scenarios returns nothing": (
        textwrap.dedent(one("broken")).replace("return [Broken]", "return None"),
        "register_scenarios",
    ),
    "its lifespan raises at the start": (
        textwrap.dedent(one("broken"))
        + textwrap.dedent(
            """
            from contextlib import asynccontextmanager

            @hookimpl
            @asynccontextmanager
            async def lifespan(app):
                raise OSError(111, "Connection refused")
                yield
            """
        ),
        "Connection refused",
    ),
    "its lifespan is not a context manager": (
        textwrap.dedent(one("broken"))
        + textwrap.dedent(
            """
            @hookimpl
            def lifespan(app):
                return None
            """
        ),
        "lifespan",
    ),
    "the lifespan of its scenario raises at the start": (
        textwrap.dedent(one("broken"))
        .replace("class Broken", "from contextlib import asynccontextmanager\n\n\nclass Broken")
        .replace(
            "    @endpoint",
            "    @hookimpl\n    @asynccontextmanager\n    async def lifespan(self, app):\n"
            "        raise ValueError('no table ' + self.word)\n        yield\n\n    @endpoint",
        ),
        "no table broken",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_plugin_does_not_affect_others(case: str, tmp_path: Path, aiohttp_client: Client) -> None:
    source, reason = BROKEN[case]
    client = await aiohttp_client(create_app(config(tmp_path, {"broken": source, "sound": one("sound")})))
    async with client.get("/sound") as response:
        assert (response.status, await response.text()) == (200, "sound")
    async with client.get("/broken") as response:
        document = await response.json(content_type="application/problem+json")
        assert response.status == document["status"] == 503
        assert document["title"] == "Service Unavailable"
        assert document["detail"].startswith("The plugin broken is out of service: ")
        assert reason in document["detail"]
        assert str(tmp_path) not in document["detail"]
        assert "Traceback" not in document["detail"]
    async with client.get("/health") as response:
        report = await response.json()
        assert (response.status, report["status"]) == (200, "degraded")
        assert report["scenarios"]["broken"]["state"] == "failed"
        assert reason in report["scenarios"]["broken"]["reason"]
        assert report["scenarios"]["sound"] == {"state": "ready"}
    for accept in ("text/plain", "text/html"):
        async with client.get("/", headers={"Accept": accept}) as response:
            text = await response.text()
            assert "/broken" in text
            assert "out of service" in text.lower()
            assert str(tmp_path) not in text


async def test_head_on_a_route_of_a_broken_plugin_is_503_too(tmp_path: Path, aiohttp_client: Client) -> None:
    client = await aiohttp_client(create_app(config(tmp_path, {"broken": "1/0\n" + textwrap.dedent(one("broken"))})))
    async with client.head("/broken") as response:
        assert (response.status, await response.read()) == (503, b"")


def test_the_log_has_the_reason_of_a_failed_plugin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create_app(config(tmp_path, {"broken": "1/0\n"}))
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "plugin broken failed"
    assert "ZeroDivisionError: division by zero" in LineFormatter("text").format(record)


@pytest.mark.parametrize(
    "message",
    [
        "/srv/secret/place",
        "cannot open '/srv/secret/place'",
        "file=/srv/secret/place",
        "file:///srv/secret/place",
        "'/srv/secret folder/place' is missing",
        "C:/srv/secret/place",
        "/srv/sécret/place",
    ],
)
def test_no_path_of_the_machine_is_in_the_reason(message: str, tmp_path: Path) -> None:
    app = create_app(config(tmp_path, {"broken": f"raise RuntimeError({message!r})\n"}))
    (plugin,) = [plugin for plugin in app[REGISTRY].plugins if plugin.state == "failed"]
    assert plugin.reason.startswith("RuntimeError at line 1 of broken.py")
    assert not {"srv", "secret", "sécret", "place"} & set(plugin.reason.replace("'", "/").replace(" ", "/").split("/"))


def test_a_table_of_a_broken_plugin_is_not_called_unknown(tmp_path: Path) -> None:
    app = create_app(config(tmp_path, {"broken": "1/0\n"}, scenarios={"broken": {"x": 1}, "of_broken": {"y": 2}}))
    assert states(app)["broken"] == "failed"


FAILS_LATER = """
    import asyncio
    from contextlib import asynccontextmanager

    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl


    class Feed(Scenario):
        _over: asyncio.Event | None = None

        @hookimpl
        @asynccontextmanager
        async def lifespan(self, app):
            self._over = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(self.follow())
                yield

        async def follow(self):
            await self._over.wait()
            raise ConnectionError("the feed is down")

        @endpoint("GET", "/feed")
        async def feed(self, request):
            return web.Response(text="feed")

        @endpoint("POST", "/feed")
        async def end(self, request):
            self._over.set()
            return web.Response()


    @hookimpl
    def register_scenarios():
        return [Feed]
"""


async def wait_for(reached: Callable[[], bool], *, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.005)


async def test_a_lifespan_that_fails_while_serving_takes_its_plugin_out_alone(
    tmp_path: Path, aiohttp_client: Client
) -> None:
    app = create_app(config(tmp_path, {"feed": FAILS_LATER, "sound": one("sound")}))
    client = await aiohttp_client(app)
    async with client.get("/feed") as response:
        assert response.status == 200
    async with client.post("/feed") as response:
        assert response.status == 200
    await wait_for(lambda: states(app)["feed"] == "failed")
    async with client.get("/feed") as response:
        assert response.status == 503
        assert "out of service" in (await response.json())["detail"]
    async with client.get("/sound") as response:
        assert response.status == 200
    async with client.get("/health") as response:
        assert (await response.json())["status"] == "degraded"


async def test_the_reason_of_a_failed_task_group_is_the_error_inside_it(tmp_path: Path, aiohttp_client: Client) -> None:
    app = create_app(config(tmp_path, {"feed": FAILS_LATER}))
    client = await aiohttp_client(app)
    async with client.post("/feed"):
        pass
    await wait_for(lambda: states(app)["feed"] == "failed")
    async with client.get("/health") as response:
        reason = (await response.json())["scenarios"]["feed"]["reason"]
        assert "ConnectionError" in reason
        assert "the feed is down" in reason


# -- names that clash, hooks that do not exist


def test_a_misspelt_hook_is_a_fault_with_the_nearest_name(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")).replace("register_scenarios", "register_scenario")
    assert faults_of(config(tmp_path, {"hello": source})) == [
        f"{tmp_path}/plugins/hello.py: register_scenario is not a hook; did you mean 'register_scenarios'?"
    ]


def test_a_misspelt_hook_of_a_scenario_is_a_fault_with_the_nearest_name(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")).replace(
        "    @endpoint", "    @hookimpl\n    def lifespam(self, app): ...\n\n    @endpoint"
    )
    assert faults_of(config(tmp_path, {"hello": source})) == [
        f"{tmp_path}/plugins/hello.py: Hello - lifespam is not a hook; did you mean 'lifespan'?"
    ]


def test_a_hook_with_an_unknown_argument_is_a_fault(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")) + "\n@hookimpl\ndef lifespan(application): ...\n"
    (fault,) = faults_of(config(tmp_path, {"hello": source}))
    assert fault.startswith(f"{tmp_path}/plugins/hello.py: ")
    assert "lifespan" in fault
    assert "application" in fault


def test_a_hook_of_a_scenario_with_an_unknown_argument_is_a_fault(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")).replace(
        "    @endpoint", "    @hookimpl\n    def lifespan(self, application): ...\n\n    @endpoint"
    )
    (fault,) = faults_of(config(tmp_path, {"hello": source}))
    assert fault.startswith(f"{tmp_path}/plugins/hello.py: ")
    assert "lifespan" in fault
    assert "application" in fault


def test_two_plugins_of_one_name_are_a_fault_that_names_both(tmp_path: Path) -> None:
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "hello.py").write_text(textwrap.dedent(one("hello")))
    (fault,) = faults_of(config(tmp_path, plugins={"path": ["left", "right"]}))
    assert fault == (
        "config: plugins.path - two plugins have the name 'hello': "
        f"{tmp_path}/left/hello.py and {tmp_path}/right/hello.py; rename or remove one"
    )


def test_a_plugin_with_the_name_of_a_built_in_one_is_a_fault_that_names_both(tmp_path: Path) -> None:
    (fault,) = faults_of(config(tmp_path, {"file": one("hello")}))
    assert "two plugins have the name 'file'" in fault
    assert f"{tmp_path}/plugins/file.py" in fault


def test_two_scenarios_of_one_name_are_a_fault(tmp_path: Path) -> None:
    other = textwrap.dedent(one("hello")).replace('"/hello"', '"/elsewhere"')
    assert faults_of(config(tmp_path, {"hello": one("hello"), "welcome": other})) == [
        f"{tmp_path}/plugins/welcome.py: there already is a scenario 'hello'; rename this one"
    ]


def test_a_path_that_two_plugins_claim_is_a_fault_that_names_both(tmp_path: Path) -> None:
    other = textwrap.dedent(one("welcome")).replace('"/welcome"', '"/hello"')
    assert faults_of(config(tmp_path, {"hello": one("hello"), "welcome": other})) == [
        f"{tmp_path}/plugins/welcome.py: GET /hello already belongs to the plugin 'hello'"
    ]


def test_a_path_that_two_plugins_claim_with_parameters_of_other_names_is_a_fault(tmp_path: Path) -> None:
    left = textwrap.dedent(one("left")).replace('"/left"', '"/item/{left}"')
    right = textwrap.dedent(one("right")).replace('"/right"', '"/item/{right}"')
    (fault,) = faults_of(config(tmp_path, {"left": left, "right": right}))
    assert "GET /item/{right} already belongs to the plugin 'left'" in fault


def test_a_path_that_one_plugin_claims_twice_is_a_fault(tmp_path: Path) -> None:
    source = textwrap.dedent(TWO).replace('"/right"', '"/left"')
    (fault,) = faults_of(config(tmp_path, {"two": source}))
    assert fault.startswith(f"{tmp_path}/plugins/two.py: ")
    assert "GET /left" in fault


def test_a_path_of_the_server_itself_cannot_be_claimed(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")).replace('"/hello"', '"/health"')
    (fault,) = faults_of(config(tmp_path, {"hello": source}))
    assert fault.startswith(f"{tmp_path}/plugins/hello.py: GET /health already belongs to ")


def test_a_path_of_the_server_itself_cannot_be_claimed_by_a_plugin_called_site(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")).replace('"/hello"', '"/health"')
    (fault,) = faults_of(config(tmp_path, {"site": source}))
    assert fault.startswith(f"{tmp_path}/plugins/site.py: GET /health already belongs to ")


@pytest.mark.parametrize("path", ["hello", "/hello/{name", "/hello/{na-me}"])
def test_a_path_that_the_router_rejects_is_a_fault_that_names_the_plugin(path: str, tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")).replace('"/hello"', f'"{path}"')
    (fault,) = faults_of(config(tmp_path, {"hello": source}))
    assert fault.startswith(f"{tmp_path}/plugins/hello.py: ")
    assert path in fault


async def test_one_path_may_have_methods_of_two_plugins(tmp_path: Path, aiohttp_client: Client) -> None:
    other = textwrap.dedent(one("welcome")).replace('"GET", "/welcome"', '"POST", "/hello"')
    client = await aiohttp_client(create_app(config(tmp_path, {"hello": one("hello"), "welcome": other})))
    async with client.get("/hello") as response:
        assert await response.text() == "hello"
    async with client.post("/hello") as response:
        assert await response.text() == "welcome"


def test_an_unknown_scenario_table_is_a_fault_with_the_nearest_name(tmp_path: Path) -> None:
    assert faults_of(config(tmp_path, {"hello": one("hello")}, scenarios={"helo": {"word": "x"}})) == [
        "config: scenarios.helo - no plugin or scenario has this name; did you mean 'hello'?"
    ]


def test_a_key_for_a_plugin_whose_scenario_has_another_name_is_a_fault(tmp_path: Path) -> None:
    settings = config(tmp_path, {"greetings": one("hello")}, scenarios={"greetings": {"enabled": True, "word": "x"}})
    (fault,) = faults_of(settings)
    assert fault.startswith("config: scenarios.greetings.word")
    assert "'hello'" in fault


def test_the_configuration_of_every_plugin_is_checked_at_once(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        {"hello": one("hello"), "welcome": one("welcome")},
        server={"port": -1},
        scenarios={"hello": {"wrd": "x"}, "welcome": {"word": 5}},
    )
    assert [fault.partition(" ")[2].partition(" ")[0] for fault in faults_of(settings)] == [
        "server.port",
        "scenarios.hello.wrd",
        "scenarios.welcome.word",
    ]


# -- two servers share no state


COUNTING = """
    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl

    seen = []


    class Counting(Scenario):
        @endpoint("GET", "/count")
        async def count(self, request):
            seen.append(request.path)
            return web.Response(text=str(len(seen)))


    @hookimpl
    def register_scenarios():
        return [Counting]
"""


async def test_two_applications_of_one_process_share_nothing(tmp_path: Path, aiohttp_client: Client) -> None:
    settings = config(tmp_path, {"counting": COUNTING})
    first, second = create_app(settings), create_app(settings)
    assert first[REGISTRY]._hooks is not second[REGISTRY]._hooks
    assert first[STREAMS] is not second[STREAMS]
    assert not {id(route.endpoint) for route in first[ROUTES] if route.scenario == "counting"} & {
        id(route.endpoint) for route in second[ROUTES]
    }
    clients = [await aiohttp_client(first), await aiohttp_client(second)]
    texts = []
    for client in (clients[0], clients[0], clients[1]):
        async with client.get("/count") as response:
            texts.append(await response.text())
    assert texts == ["1", "2", "1"]


def test_a_server_can_be_built_where_no_loop_runs(tmp_path: Path) -> None:
    assert create_app(config(tmp_path))[STREAMS].draining is False


# -- every hook


LIVING = """
    from contextlib import asynccontextmanager
    from pathlib import Path

    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl


    @asynccontextmanager
    async def living(app, name):
        with open({events!r}, "a") as file:
            file.write(f"{{name}} in\\n")
        yield
        with open({events!r}, "a") as file:
            file.write(f"{{name}} out\\n")
        {last}


    @hookimpl
    def lifespan(app):
        return living(app, "{name}")


    class {title}(Scenario):
        @hookimpl
        def lifespan(self, app):
            return living(app, "{name}'s scenario")

        @endpoint("GET", "/{name}")
        async def say(self, request):
            return web.Response(text=Path({events!r}).read_text())


    @hookimpl
    def register_scenarios():
        with open({events!r}, "a") as file:
            file.write("{name} called\\n")
        return [{title}]
"""


def living(tmp_path: Path, *names: str, last: str = "") -> dict[str, str]:
    events = str(tmp_path / "events")
    return {name: LIVING.format(events=events, name=name, title=name.capitalize(), last=last) for name in names}


def events(tmp_path: Path) -> list[str]:
    return (tmp_path / "events").read_text().splitlines()


def test_every_hook_has_a_test_named_after_it() -> None:
    assert (
        frozenset(
            {
                *("register_scenarios", "register_tasks", "register_commands", "register_views"),
                *("lifespan", "worker_lifespan", "health", "check", "on_stream_end"),
            }
        )
        == HOOKS
    )
    assert all((getattr(hookspecs, hook).__doc__ or "").strip() for hook in HOOKS)
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [hook for hook in HOOKS if f"def test_{hook}_" not in tests] == []


WORKING = """
    from contextlib import asynccontextmanager
    from streamlab import Task, hookimpl


    async def nap(progress):
        pass


    @hookimpl
    def register_tasks():
        return [Task(nap)]


    @asynccontextmanager
    async def working():
        yield


    @hookimpl
    def worker_lifespan(app):
        return {returned}
"""


async def test_register_tasks_lists_the_kinds_that_clients_can_start(tmp_path: Path, aiohttp_client: Client) -> None:
    both = {"export": {"enabled": True}, "progress": {"enabled": True}}
    app = create_app(config(tmp_path, {"working": WORKING.format(returned=None)}, scenarios=both))
    assert "nap" in app[TASKS]
    async with (await aiohttp_client(app)).get("/process/kinds") as response:
        assert "nap" in [kind["kind"] for kind in (await response.json())["kinds"]]


def test_worker_lifespan_is_entered_by_workers_if_there_is_one(tmp_path: Path) -> None:
    alone = {"scenarios": {"file": {"enabled": False}}}
    for returned, count in (("None", 0), ("working()", 1)):
        app = create_app(config(tmp_path, {"working": WORKING.format(returned=returned)}, **alone))
        assert len(app[REGISTRY].worker_lifespans(app)) == count


def test_register_scenarios_is_called_once_for_each_plugin_before_a_socket_is_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> None:
        raise AssertionError("a socket was bound")

    monkeypatch.setattr(socket.socket, "bind", reject)
    create_app(config(tmp_path, living(tmp_path, "left", "right")))
    assert sorted(events(tmp_path)) == ["left called", "right called"]


def test_register_scenarios_is_called_in_the_order_of_names(tmp_path: Path) -> None:
    create_app(config(tmp_path, living(tmp_path, "right", "left", "middle")))
    assert events(tmp_path) == ["left called", "middle called", "right called"]


def test_register_scenarios_may_be_a_generator(tmp_path: Path) -> None:
    source = textwrap.dedent(TWO).replace("return [Left, Right]", "yield Left\n    yield Right")
    app = create_app(config(tmp_path, {"two": source}))
    assert [scenario.name for plugin in app[REGISTRY].plugins for scenario in plugin.scenarios if plugin.name == "two"]


async def test_lifespan_is_entered_in_the_order_of_names_and_exited_in_reverse(tmp_path: Path) -> None:
    app = create_app(config(tmp_path, living(tmp_path, "right", "left")))
    (tmp_path / "events").write_text("")
    async with TestClient(TestServer(app)) as client, client.get("/left") as response:
        entered = (await response.text()).splitlines()
    assert entered == ["left in", "left's scenario in", "right in", "right's scenario in"]
    assert events(tmp_path) == [
        *entered,
        "right's scenario out",
        "right out",
        "left's scenario out",
        "left out",
    ]


async def test_lifespan_is_exited_in_every_plugin_even_if_each_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(config(tmp_path, living(tmp_path, "left", "right", last="raise OSError('unclean')")))
    async with TestClient(TestServer(app)):
        pass
    assert sorted(event for event in events(tmp_path) if event.endswith(" out")) == [
        "left out",
        "left's scenario out",
        "right out",
        "right's scenario out",
    ]
    assert {record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR} == {
        "plugin left failed",
        "plugin right failed",
    }


async def test_lifespan_is_entered_and_exited_by_one_task(tmp_path: Path) -> None:
    source = textwrap.dedent(one("hello")) + textwrap.dedent(
        """
        import asyncio
        from contextlib import asynccontextmanager

        @hookimpl
        @asynccontextmanager
        async def lifespan(app):
            async with asyncio.timeout(60):  # raises when another task exits it
                yield
        """
    )
    app = create_app(config(tmp_path, {"hello": source}))
    async with TestClient(TestServer(app)):
        pass
    assert states(app)["hello"] == "ready"


STREAMING = """
    import json
    from streamlab import Scenario, endpoint, hookimpl, open_stream


    class Streaming(Scenario):
        @endpoint("GET", "/stream/{word}")
        async def stream(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"12345")
            return response


    @hookimpl
    def register_scenarios():
        return [Streaming]


    @hookimpl
    def on_stream_end(request, summary):
        with open(EVENTS, "a") as file:
            entry = [summary.scenario, summary.route, summary.method, summary.status, summary.outcome, summary.bytes]
            file.write(json.dumps([request.path, *entry, summary.seconds >= summary.first_byte_seconds >= 0]) + "\\n")
        FINALLY
"""


REPORTS = """
    from aiohttp import web
    from pydantic import PrivateAttr
    from streamlab import Scenario, endpoint, hookimpl


    class Left(Scenario):
        _problem: str | None = PrivateAttr("the disk\\nis full")

        @hookimpl
        def health(self):
            return self._problem

        @endpoint("POST", "/left")
        async def mend(self, request):
            self._problem = None
            return web.Response()


    class Right(Scenario):
        pass


    @hookimpl
    def register_scenarios():
        return [Left, Right]
"""


async def test_health_of_a_scenario_that_works_in_part_is_degraded_with_its_reason_until_it_recovers(
    tmp_path: Path, aiohttp_client: Client
) -> None:
    client = await aiohttp_client(create_app(config(tmp_path, {"both": REPORTS})))
    async with client.get("/health") as response:
        report = await response.json()
        assert (response.status, report["status"]) == (200, "degraded")
        assert report["scenarios"]["left"] == {"state": "degraded", "reason": "the disk is full"}
        assert report["scenarios"]["right"] == {"state": "ready"}
    async with client.post("/left") as response:
        assert response.status == 200
    async with client.get("/health") as response:
        report = await response.json()
        assert (report["status"], report["scenarios"]["left"]) == ("ok", {"state": "ready"})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise LookupError('no device at ' + __file__)", "LookupError at line 20 of one.py: no device at ..."),
        ("return 5", "TypeError at line NN of registry.py: health must return text or None, not int"),
    ],
)
async def test_health_hook_that_fails_is_a_reason_and_does_not_affect_others(
    body: str, reason: str, tmp_path: Path, aiohttp_client: Client
) -> None:
    source = textwrap.dedent(one("one")) + f"\n@hookimpl\ndef health():\n    {body}\n"
    client = await aiohttp_client(create_app(config(tmp_path, {"one": source, "sound": one("sound")})))
    async with client.get("/health") as response:
        report = await response.json()
        assert (response.status, report["status"]) == (200, "degraded")
        reported = re.sub(r"line \d+ of registry", "line NN of registry", report["scenarios"]["one"]["reason"])
        assert reported == f"its health is unknown: {reason}"
        assert report["scenarios"]["sound"] == {"state": "ready"}
    async with client.get("/one") as response:
        assert response.status == 200


async def test_on_stream_end_is_called_for_every_stream_with_its_summary(
    tmp_path: Path, aiohttp_client: Client
) -> None:
    source = STREAMING.replace("EVENTS", repr(str(tmp_path / "events"))).replace("FINALLY", "")
    app = create_app(config(tmp_path, {"streaming": source}))
    client = await aiohttp_client(app)
    async with client.get("/stream/one?secret=no") as response:
        assert response.status == 422
    async with client.get("/stream/one") as response:
        assert await response.read() == b"12345"
    await wait_for(lambda: not len(app[STREAMS]))
    assert events(tmp_path) == [
        '["/stream/one", "streaming", "/stream/{word}", "GET", 200, "finished", 5, true]',
    ]


async def test_on_stream_end_may_raise_without_affecting_other_hooks(
    tmp_path: Path, aiohttp_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    streaming = STREAMING.replace("EVENTS", repr(str(tmp_path / "events")))
    hook_alone = "from streamlab import hookimpl\n\n" + textwrap.dedent(
        streaming[streaming.index("    @hookimpl\n    def on_") :]
    )
    plugins = {
        "aaa": "import json\n" + hook_alone.replace("FINALLY", ""),
        "streaming": streaming.replace("FINALLY", "raise LookupError('bad hook')"),
        "zzz": "import json\n" + hook_alone.replace("FINALLY", ""),
    }
    app = create_app(config(tmp_path, plugins))
    client = await aiohttp_client(app)
    for _ in range(2):
        async with client.get("/stream/one") as response:
            assert (response.status, await response.read()) == (200, b"12345")
    await wait_for(lambda: not len(app[STREAMS]))
    assert "bad hook" in "".join(LineFormatter("text").format(record) for record in caplog.records)
    assert len(events(tmp_path)) == 6
