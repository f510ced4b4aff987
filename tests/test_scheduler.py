"""The scheduler of the tests: half of the workers wait, the others compute."""

from types import SimpleNamespace

from tests.support.scheduler import ByServer

WAITS = [f"tests/plugins/test_progress.py::test_{number}" for number in range(60)]
COMPUTES = [f"tests/events/test_log.py::test_{number}" for number in range(60)]


class Worker:
    """A worker that collects what it is to run."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.shutting_down = False
        self.tests: list[str] = []

    def shutdown(self) -> None:
        self.shutting_down = True

    def send_runtest_some(self, indices: list[int]) -> None:
        self.tests += [(WAITS + COMPUTES)[index] for index in indices]


def test_half_of_the_workers_wait_while_there_is_something_to_compute() -> None:
    options = {"tx": ["4*popen"], "loadscopereorder": False}
    config = SimpleNamespace(getvalue=options.get, option=SimpleNamespace(**options), hook=None)
    scheduler = ByServer(config, None)  # type: ignore[arg-type]
    workers = [Worker(number) for number in range(4)]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, WAITS + COMPUTES)
    scheduler.schedule()
    done = [0] * 4
    while any(number < len(worker.tests) for number, worker in zip(done, workers, strict=True)):
        running = [
            worker.tests[number] for number, worker in zip(done, workers, strict=True) if number < len(worker.tests)
        ]
        if len(running) == 4:
            assert sum(test in WAITS for test in running) == 2
        for index, worker in enumerate(workers):
            if done[index] < len(worker.tests):
                scheduler.mark_test_complete(worker, (WAITS + COMPUTES).index(worker.tests[done[index]]))
                done[index] += 1
    assert sorted(test for worker in workers for test in worker.tests) == sorted(WAITS + COMPUTES)
