"What the lab's tests share: a toy notebook, its spec, and the command in a process of its own."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from filelock import Timeout

from temp_nce.lab.ledger import lock

PARAMETERS = '''
temperature = "0.5"  # a text
steps = 3  # a whole number
lr = 0.1  # a number
fast = True
seed = 0
device = "cpu"
run_dir = ""
'''
# Each step hashes the last state, so the end depends on every step; `steps.txt` counts the steps that were really made.
BODY = '''
import hashlib, json, os, time
from pathlib import Path
from temp_nce.lab import open_run, finish_run
run = open_run(run_dir)
if temperature == "broken": raise ValueError("temperature: broken is not known\\nsecond line")
checkpoint = run / "checkpoint.json"
step, state = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, f"{temperature} {seed}")
print("from step", step, flush=True)
while step < steps:
    step, state = step + 1, hashlib.sha256(state.encode()).hexdigest()
    if not fast: time.sleep(0.2)
    with open(run / "history.jsonl", "a") as file: file.write(json.dumps({"epoch": step, "loss": 1 / step}) + "\\n")
    with open(run / "steps.txt", "a") as file: file.write(f"{step}\\n")
    part = run / "part"
    part.write_text(json.dumps([step, state]))
    part.replace(checkpoint)
'''
END = '''
finish_run(run, {"score": int(state[:8], 16) / 2**32, "constant": float(Path("constant.txt").read_text()),
                 "threads": int(os.environ["OMP_NUM_THREADS"]), "in_test": int("IN_TEST" in os.environ)})
'''
LATE = 'if temperature == "late": raise RuntimeError("after the metrics")'
SPEC = '''
title: A toy
notebook: toy.ipynb
fixed: {steps: 4}
grid:
  temperature: [0.5, free]
  seed: [0, 1]
scales:
  smoke: {grid: {temperature: [free], seed: [0]}}
  quick: {about: four runs}
  paper: {parameters: {steps: 9}}
metrics:
  score: {percent: true}
  constant: {}
curves: [loss]
paper:
  values:
    - {temperature: 0.5, score: [50, 1]}
'''


def write_notebook(path: Path, parameters: str = PARAMETERS) -> None:
    cells = [dict(cell_type="code", id=f"cell-{i}", metadata={"tags": [] if i else ["parameters"]}, source=source,
                  outputs=[], execution_count=None) for i, source in enumerate((parameters, BODY, END, LATE))]
    kernel = dict(name="python3", display_name="python3", language="python")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


def make_lab(folder: Path, spec: str = SPEC) -> Path:
    "A folder with a toy notebook and its spec; also the home of its runs."
    write_notebook(folder / "toy.ipynb")
    (folder / "toy.yaml").write_text(spec)
    (folder / "constant.txt").write_text("7")
    return folder


def default_signals() -> None:
    "Hear signals again that nohup, or a shell's background, has set to be ignored."
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT): signal.signal(number, signal.SIG_DFL)


def command(lab: Path, *arguments: str) -> subprocess.Popen:
    "temp-nce in a process of its own."
    code = "import sys; from temp_nce.lab.cli import main; main(sys.argv[1:])"
    home = [] if "--home" in arguments else ["--home", str(lab)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments, *home], cwd=lab, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals)


def processes(folder: Path) -> list[psutil.Process]:
    "The worker of a run, if it is alive, and then its kernel, which bears the run's mark."
    kernels = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEMP_NCE_RUN") == str(folder): kernels.append(process)
        except psutil.Error: continue
    parents = [parent for kernel in kernels if (parent := kernel.parent())
               and "lab.worker" in " ".join(parent.cmdline())]
    return [*dict.fromkeys(parents), *kernels]


def is_free(folder: Path) -> bool:
    "Whether no worker holds the run."
    try: lock(folder / "lock", wait=False).release()
    except Timeout: return False
    return not processes(folder)


def make_row(number: int = 0, spec: str = "toy", **more) -> dict:
    "A row of a ledger; its metrics tell two rows of one id apart."
    return {"id": f"{number:012x}", "spec": spec, "scale": "quick", "parameters": {},
            "metrics": {"score": number}} | more


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition(): return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def lines(path: Path) -> int: return len(path.read_text().splitlines()) if path.exists() else 0
