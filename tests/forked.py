"""Processes that run Python code and begin at once: each is a fork of a process that has imported the commands."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from command_line import ROOT

SERVER = """
import gc, json, os, signal, sys
import huggingface_hub.hf_api, stable_diffusion.__main__

for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
    del sys.modules[name]  # but not what it imports: itself it reads the environment as it is imported
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        break
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)
else:
    sys.exit()
signal.alarm(120)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
for number, name in enumerate([os.devnull, *job["files"]]):
    os.dup2(os.open(name, os.O_RDWR), number)
os.closerange(3, 64)
sys.argv = ["-c", *job["argv"]]
exec(job["code"], {"__name__": "__main__"})
"""


class Ended(NamedTuple):
    """A process that is over: a code below zero is the signal that killed it; ``seconds`` are the processor's."""

    code: int
    out: str
    err: str
    seconds: float


class Forks:
    """Run code as ``python -c`` does, without the time of imports; on a Mac, where forks cannot compute, with it."""

    def __init__(self) -> None:
        self.program = [sys.executable, "-c"]
        self.environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([*self.program, SERVER], env=self.environment, **pipes)

    def __call__(self, code: str, *argv: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Ended:
        with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
            words, env = [str(word) for word in argv], env or dict(self.environment)
            if sys.platform == "linux":
                job = {"code": code, "argv": words, "cwd": str(cwd), "env": env, "files": [out.name, err.name]}
                print(json.dumps(job), file=self.server.stdin, flush=True)
                status, seconds = json.loads(self.server.stdout.readline())
            else:
                process = subprocess.Popen([*self.program, code, *words], cwd=cwd, env=env, stdout=out, stderr=err)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = status = os.waitstatus_to_exitcode(status)
                seconds = usage.ru_utime + usage.ru_stime
            return Ended(status, *(file.seek(0) or file.read() for file in (out, err)), seconds)

    def close(self) -> None:
        self.server.communicate()
