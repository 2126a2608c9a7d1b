"""Scripts of ours in processes of their own, and what they leave."""

import json
import logging
import os
import runpy
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from recording import Killer
from safetensors.torch import load_file

import transformers_aar.training.runs  # noqa: F401, so that no fork has to

SCRIPTS = Path(__file__).parents[2] / "scripts"


@dataclass
class Finished:
    """How a process ended: its exit status, negative for a signal, and what it wrote."""

    status: int
    stdout: str
    stderr: str


class Forked:
    """
    A script of ours that runs in a copy of this process, which has imported everything already.

    Args:
        script (`str`): its name.
        options (`dict`): its command line.
        folder (`Path`): for what it writes to stdout and stderr.
        prepare (`Callable`): called in the new process, before the script.
        environment (`dict[str, str]`): variables of the new process.
    """

    def __init__(self, script: str, options: dict, folder: Path, prepare=lambda: None, environment: dict = {}):  # noqa: B006
        folder.mkdir(parents=True, exist_ok=True)
        self.files = folder / "stdout.txt", folder / "stderr.txt"
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environment)
            self._run([str(SCRIPTS / script), *as_words(options)], prepare)

    def _run(self, argv: list[str], prepare) -> None:
        status = 1
        try:
            for number, path in enumerate(self.files, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            # PyTorch renews its pool of threads after a fork, which the first threads must not do together
            torch.set_num_threads(1)
            # what tests before this one have left in the process
            logging.getLogger().handlers.clear()
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            sys.argv = argv
            prepare()
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> Finished:
        _, status = os.waitpid(self.pid, 0)
        return Finished(os.waitstatus_to_exitcode(status), *(path.read_text() for path in self.files))


def as_words(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def rank_environments(num_processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes; nothing for a single one."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in range(num_processes))
    return [{name: str(value) for name, value in (shared | rank).items()} for rank in ranks]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {
        f"{path.name} {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def dies(action, root: Path, deadline: int) -> bool:
    """Whether `action`, in a process of its own, got as far as the event in a folder that it is to be killed at."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Killer(root, deadline)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
