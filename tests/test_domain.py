"""A new domain is a task, a notebook and a yaml: made here, it runs, survives kill -9, and reports, and nothing
else is touched."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab_toys import command, lines, processes, wait_for
from temp_nce.lab.ledger import Ledger

ROOT = Path(__file__).parent.parent
PARAMETERS = '''
temperature = "0.5"  # the loss: what make_loss takes
epochs = 6  # passes over the words
pause = 0.0  # seconds between steps
seed = 0  # of initialisation, order and views
device = "cpu"  # "cpu" or "cuda"
run_dir = ""  # folder of this run; empty: a temporary one
'''
TASK = '''
import time
from dataclasses import dataclass

import torch
from torch import nn

from temp_nce.engine import Task, fingerprint, fit, lr_factor, make_optimizer, resolve_device
from temp_nce.lab import finish_run, open_run
from temp_nce.losses import make_loss
from temp_nce.metrics import knn_accuracy

WORDS = [stem + ending for stem in ("care", "hope", "use", "harm")
         for ending in ("", "ful", "less", "fully", "lessly", "d", "s")]

@dataclass(frozen=True)
class Recipe:
    temperature: str = "0.5"
    seed: int = 0

class Words(Task):
    "Letters of a word with some left out: which two belong to one word?"
    def __init__(self, recipe, device, pause):
        self.pause, self.device, self.fingerprint = pause, device, fingerprint(recipe)
        self.letters = torch.zeros(len(WORDS), 26)
        for row, word in zip(self.letters, WORDS):
            for letter in word: row[ord(letter) - 97] += 1
        self.labels = torch.arange(len(WORDS)) // 7
        torch.manual_seed(recipe.seed)
        loss = make_loss(recipe.temperature)
        loss.set_size(len(WORDS))
        self.modules = {"encoder": nn.Linear(26, 8 + loss.outputs), "loss": loss}
        self.optimizer = make_optimizer(self.modules, 0.05)
        self.generators = {name: torch.Generator().manual_seed(recipe.seed + i)
                           for i, name in enumerate(("order", "views"))}
    def rate(self, epoch, epochs): return lr_factor(epoch, epochs)
    def batches(self, epoch): return torch.randperm(len(WORDS), generator=self.generators["order"]).split(14)
    def view(self, x): return x * (torch.rand(x.shape, generator=self.generators["views"]) > 0.2)
    def forward(self, rows):
        time.sleep(self.pause)
        return [self.modules["encoder"](self.view(self.letters[rows])) for _ in range(2)]
    def objective(self, outputs, rows): return {"loss": self.modules["loss"].compare(*outputs, {"index": rows})}
    def evaluate(self):
        with torch.no_grad(): x = self.modules["encoder"](self.letters)
        return {"knn": knn_accuracy(x, self.labels, x, self.labels, k=7)}
'''
RUN = '''
run = open_run(run_dir)
result = fit(Words(Recipe(temperature, seed), resolve_device(device), pause), epochs, folder=run, resume=True,
             monitor="knn", evaluate_every=1, checkpoint_steps=1)
finish_run(run, {"knn_last": result.metrics["knn"], "knn_best": result.best["knn"],
                 "loss_last": result.history[-1]["loss"]})
'''
SPEC = '''
title: Words by their letters
notebook: words.ipynb
grid: {temperature: [0.1, 0.5, free], seed: [0, 1, 2]}
scales:
  smoke: {grid: {temperature: [uncertainty], seed: [0]}}
  quick: {about: nine runs of some seconds}
metrics: {knn_last: {percent: true}, knn_best: {percent: true}, loss_last: {better: low}}
curves: [loss, knn]
'''


def make_domain(folder: Path) -> Path:
    "A repository that holds the toy domain and nothing else."
    experiments = folder / "nbs" / "experiments"
    experiments.mkdir(parents=True)
    (folder / "settings.ini").touch()
    (experiments / "words.yaml").write_text(SPEC)
    cells = [dict(cell_type="code", id=f"c{i}", metadata={"tags": ["parameters"] if not i else []}, source=source,
                  outputs=[], execution_count=None) for i, source in enumerate((PARAMETERS, TASK, RUN))]
    kernel = dict(name="python3", display_name="python3", language="python")
    (experiments / "words.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4,
                                                             nbformat_minor=5)))
    return folder


def state_of_the_package() -> set:
    return {(path, path.stat().st_mtime_ns) for path in (ROOT / "temp_nce").rglob("*.py")}


def run(home: Path, *arguments: str) -> tuple[int, str, str]:
    process = command(home, "run", "words", *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_new_domain_runs_survives_kill_9_and_reports(tmp_path):
    assert len([line for line in TASK.splitlines() if line.strip()]) <= 60
    before = state_of_the_package()
    cut, whole = (make_domain(tmp_path / name) for name in ("cut", "whole"))
    one = ("--set", "temperature=free", "--set", "seed=0", "--set", "epochs=8")
    first = command(cut, "run", "words", *one, "--set", "pause=0.3")
    folders = lambda: [path for path in (cut / "data/runs/words").glob("*") if path.is_dir()]
    history = lambda: folders()[0] / "history.jsonl" if folders() else Path("none")
    wait_for(lambda: lines(history()) >= 3, 120)
    for process in [*processes(folders()[0]), first]: os.kill(process.pid, signal.SIGKILL)
    first.wait()
    assert not (folders()[0] / "metrics.json").exists()
    code, out, err = run(cut, *one, "--set", "pause=0.3")
    assert code == 0 and not err, (out, err)
    (row,) = Ledger("words", cut).rows()
    assert row["attempts"] == 2
    assert run(whole, *one)[0] == 0
    (other,) = Ledger("words", whole).rows()
    # the pause is a parameter, the result is the same
    assert row["metrics"] == other["metrics"] and row["id"] != other["id"]
    report = subprocess.run([sys.executable, "-c", "from temp_nce.lab.cli import main; import sys; main(sys.argv[1:])",
                             "report", "words", "--home", str(cut)], cwd=cut, capture_output=True, text=True,
                             timeout=120)
    assert report.returncode == 0 and "Words by their letters" in report.stdout, report.stderr
    assert state_of_the_package() == before
