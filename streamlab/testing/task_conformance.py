"""The conformance test of a plugin's long tasks: the parameters of each kind, and the servers that run them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from .plugin_test import PluginRun, PluginTest, SetupError
from .process import ServerProcess
from .server import Server
from .task_form import TaskForm, form_of
from .tasks import Interrupted, TaskCases, TaskSubject, interrupted

TASKS_PLUGIN = "progress"
"""The plugin that runs tasks; it stays enabled."""

MAX_RUNNING = 16
"""Maximum number of tasks that a server under test runs at once."""


class TaskConformance(ServerProcess, TaskCases, PluginTest):
    """The promises of every long task, checked for each kind of a plugin on real servers that are killed and stopped.

    Inherit it in a test module, and name the plugin::

        class TestThumbnails(TaskConformance):
            plugin = "thumbnails"
            large = {"count": 300}

    Parameters are the defaults and examples of the task's function, or `values`.
    """

    large: ClassVar[Mapping[str, Any]] = {}
    """Values that make each task run for several seconds: it is cancelled meanwhile, and its server killed."""
    nondeterministic: ClassVar[Collection[str]] = ()
    """Kinds whose result may differ for the same parameters: results after a crash are not compared."""

    @classmethod
    def _create_run(cls, folder: Path) -> "TaskRun":
        return TaskRun(cls, folder)


class TaskRun(PluginRun):
    """The run of one class: its kinds of tasks, and its servers."""

    case: type[TaskConformance]

    def __init__(self, case: type[TaskConformance], folder: Path) -> None:
        variables = {f"STREAMLAB_SCENARIOS__{TASKS_PLUGIN.upper()}__MAX_RUNNING": str(MAX_RUNNING)}
        super().__init__(case, folder, needs=(TASKS_PLUGIN,), variables=variables)
        self._interrupted: Interrupted | None = None

    def _forms(self) -> list[TaskForm]:
        """Return the kinds of tasks of the plugin."""
        plugin, _ = self._loaded()
        if not plugin.tasks:
            raise SetupError(f"{self.case.__name__}: the plugin {plugin.name} has no task")
        return [form_of(task) for task in plugin.tasks]

    def subject(self, form: TaskForm, server: Server, report: Any) -> TaskSubject:
        """Return a kind of task with its parameters."""
        case = self.case
        is_deterministic = form.template not in case.nondeterministic
        return TaskSubject(
            form, server, case.values, case.large, is_deterministic, report, lambda: self._interruption(server)
        )

    def _interruption(self, server: Server) -> Interrupted:
        """Return what became of a task of each kind on a server that was killed and stopped, as the first call did."""
        if self._interrupted is None:
            subjects = {form.label: self.subject(form, server, print) for form in self.forms}
            settings = self._prepared("interrupted")
            self._interrupted = interrupted(lambda: self._serving(settings), server, subjects)
        return self._interrupted
