"""The process of the embedded model: llama.cpp's HTTP server on a unix socket.

Run as a program: `python worker.py MODEL SOCKET ALIAS SLOTS CONTEXT PARENT`, where CONTEXT is the maximum number of
tokens of prompt and response in each of the SLOTS, and PARENT the id of the process that starts it. SOCKET exists once
it serves, unless its parent has died before. It exits as soon as its standard input ends, of which every process that
uses it holds the other end: it never outlives them, even if they are killed.
"""

import os
import signal
import sys
import threading


def _exit_with_parent() -> None:
    """Wait for the end of standard input, then exit at once: destructors of the library have been seen to hang."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def main(model: str, socket: str, alias: str, slots: int, context: int, parent: int) -> None:
    """Load the model, serve it, and create the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process by its input
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {alias}
    own = f"{socket}.{os.getpid()}.sock"  # the library recognises a socket by the end of its name
    params.hostnames = [own]
    params.n_parallel = slots
    params.n_ctx = slots * context
    # A prompt is processed in batches of this size, between which the other slots get their turn.
    params.n_batch = params.n_ubatch = 128
    # OpenMP's threads spin: on the last core they would starve the event loop.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    params.sampling.temp = 0.2  # unless a request sets it: so small a model talks nonsense above that
    params.cache_ram_mib = 0
    params.n_gpu_layers = 0
    params.ui = False
    params.endpoint_slots = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != parent:  # another worker supervises the model now, and has started another process
        os._exit(1)
    os.rename(own, socket)  # noqa: PTH104 - pathlib is not loaded here
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
