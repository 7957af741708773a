"""A rank on a CPU ends when its work is done, whatever threads of libraries would do while Python shuts down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import atexit, os, sys, threading, time
from launcher.titan import cpu

class Thread:
    def __del__(self):  # as gloo's, at the end of the interpreter
        os.abort()

library = Thread()
atexit.register(lambda: print("said goodbye"))
threading.Thread(target=lambda: (time.sleep(0.3), print("checkpoint written"))).start()
print("trained")
cpu.end()
"""


def test_it_ends_after_everything_is_written_and_does_not_abort(tmp_path: Path) -> None:
    out = tmp_path / "log"
    with out.open("w") as stream:  # a file: what is not flushed would be lost
        done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=stream, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_text().split("\n") == ["trained", "checkpoint written", "said goodbye", ""]
