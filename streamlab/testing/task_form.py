"""The request that starts a long task, as its function declares it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamlab.tasks import Task

from .samples import EndpointForm, missing_lengths

TASKS = "/process/tasks"
"""The path at which tasks are started and listed."""


@dataclass(frozen=True)
class TaskForm(EndpointForm):
    """A kind of task: the parameters of the request that starts it."""

    noun = "kind of task"

    is_resumable: bool

    @property
    def endpoint(self) -> str:
        """`task thumbnails`."""
        return f"task {self.template}"

    def unbounded(self) -> Iterator[str]:
        """Yield what its parameters lack: a minimum or maximum of a number, a maximum length of a text or list."""
        for name, schema in self.numbers():
            for bound in ("minimum", "maximum"):
                if not schema.keys() & {bound, f"exclusive{bound.capitalize()}"}:
                    yield f"{name} has no {bound}: Annotated[..., Field(ge=..., le=...)]"
        for name, schema in self.body_schema.get("properties", {}).items():
            yield from (f"{name} has no {bound}" for bound in missing_lengths(self._resolved(schema)))


def form_of(task: Task) -> TaskForm:
    """Return the form of a kind of task."""
    schema: Mapping[str, Any] = task.parameters.model_json_schema()
    examples = {
        name: member["examples"][0] for name, member in schema.get("properties", {}).items() if member.get("examples")
    }
    content = {"application/json": {"schema": schema, "example": examples}}
    return TaskForm(
        method="POST",
        template=task.name,
        operation={"requestBody": {"content": content}},
        schemas=schema.get("$defs", {}),
        methods=frozenset({"POST"}),
        media="",
        is_resumable=task.resumable,
    )
