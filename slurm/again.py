"""Run by the job script: `python3 RUN_DIR/job/again.py ...` is launcher/runs/again.py, copied beside it."""

import sys

from launcher.runs.again import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
