"""Everything `make test` checks, stage by stage; all stages run, then a summary says which failed and how long each took."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LIMIT = 1800 # seconds a stage may take


def run(name:str, command:list, env:dict) -> tuple: # name, seconds, exit status
    "One stage, its output passed through."
    print(f"\n== {name}: {' '.join(str(part) for part in command[1:])}", flush=True)
    start = time.monotonic()
    try: status = subprocess.run(command, cwd=ROOT, env=env, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {LIMIT} s", flush=True)
        status = 124
    return name, time.monotonic() - start, status


def main() -> int: # exit status
    "Checks, notebooks, pytest."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    if not torch.cuda.is_available(): env["TRITON_INTERPRET"] = "1" # before anything imports triton in a worker that notebooks share
    with tempfile.TemporaryDirectory() as out:
        smoke = env | {"ERWIN_NSA_SMOKE": "1", "ERWIN_NSA_OUT": out}
        stages = [
            run("checkout", [sys.executable, ".ci/checks.py"], env),
            run("notebooks", [sys.executable, BIN / "nbdev_test", "--n_workers", "2", "--timing"], smoke),
            run("pytest", [sys.executable, "-m", "pytest"], env),
        ]
    print("\n== summary")
    for name, seconds, status in stages: print(f"  {name:<10} {seconds:6.0f} s  {'ok' if status == 0 else f'FAILED (exit status {status})'}")
    print(f"  {'together':<10} {sum(seconds for _, seconds, _ in stages):6.0f} s", flush=True)
    return int(any(status for _, _, status in stages))


if __name__ == "__main__": sys.exit(main())
