"""Processes that a test can kill: at a file operation, at a step, or at any time."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

# Children are forked from a server that has imported all of this once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ftlib.training", "ftlib.models.tiny", "ftlib.cli", "jsonschema", "scipy.stats"]
)

_OPERATIONS = {
    "open",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "shutil.rmtree",
}


class Operations:
    """Counts what this process does to the files of a folder.

    Args:
        folder: the folder; operations on anything under it count.
        fatal: the process is killed just before this operation, counted from 0.
    """

    def __init__(self, folder: Path, fatal: int | None = None) -> None:
        self.folder, self.fatal = str(folder), fatal
        self.count = 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in _OPERATIONS and str(arguments[0]).startswith(self.folder):
            if self.count == self.fatal:
                kill_this_process()
            self.count += 1


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def begin(target, *arguments):
    """Start a function in a process of its own."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process, exitcode: int = 0) -> None:
    """Wait for a process, which must end as expected."""
    process.join(120)
    assert process.exitcode == exitcode
