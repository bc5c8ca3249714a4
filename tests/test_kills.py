"kill -9 of command, worker and kernel at random moments of batches: equal metrics, one row a run, nothing left over."
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from lab_toys import SPEC, command, make_lab, processes, wait_for
from temp_nce.lab.ledger import Ledger

KILLS = int(os.environ.get("TEMP_NCE_KILLS", 10))
RUN = ("run", "toy.yaml", "--device", "cpu", "--jobs", "2")
SLOW_TOY = SPEC.replace("{steps: 4}", "{steps: 12, fast: false}")


def finished(lab: Path) -> dict: return {row["id"]: row["metrics"] for row in Ledger("toy", lab).rows()}


def states(lab: Path) -> dict:
    "What the runs have learned: the content of their last checkpoints, by id."
    return {path.parent.name: path.read_text() for path in lab.glob("data/runs/toy/*/checkpoint.json")}


def victims(lab: Path, parent) -> list[int]:
    "The command, and of each run its worker and its kernel."
    found = [parent.pid]
    for folder in (lab / "data" / "runs" / "toy").glob("*"):
        if folder.is_dir(): found += [process.pid for process in processes(folder)]
    return found


def orphans(lab: Path) -> list[psutil.Process]:
    "Kernels of this lab's runs that are still there."
    marked = lambda process: str((process.info["environ"] or {}).get("TEMP_NCE_RUN"))
    return [process for process in psutil.process_iter(["environ"]) if str(lab) in marked(process)]


def kill(pids: list[int]) -> int:
    "Kill -9, and the number of those that were still there."
    killed = 0
    for pid in pids:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: continue
        killed += 1
    return killed


def attack(lab: Path, chance: random.Random) -> tuple[int, bool]:
    "Start a batch, kill some of its processes after a while; the number of kills, and whether the batch is done."
    process = command(lab, *RUN)
    time.sleep(chance.uniform(0.3, 6))
    if process.poll() is not None: return 0, process.communicate() is not None and process.returncode == 0
    alive = victims(lab, process)
    chosen = chance.sample(alive, k=chance.randint(1, len(alive)))
    killed = kill(chosen)
    if process.pid not in chosen and chance.random() < 0.5: killed += kill([process.pid])
    _, err = process.communicate(timeout=300)  # a command that lives goes on, and says which runs were killed
    assert "Traceback" not in err and process.returncode in (0, 1, -signal.SIGKILL), (process.returncode, err)
    assert process.returncode != 1 or all(line.startswith("failed: toy ") for line in err.splitlines()), err
    return killed, process.returncode == 0


def kill_batches(folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    "Kill so many processes, in as many batches as that takes, and check each batch: the numbers of kills and batches."
    def fresh(name: str) -> Path:
        (folder / name).mkdir()
        return make_lab(folder / name, SLOW_TOY)
    chance, whole, total, batches = random.Random(seed), fresh("whole"), 0, 0
    assert command(whole, *RUN).wait(300) == 0
    while total < kills:
        batches, lab, done = batches + 1, fresh(f"cut{batches}"), False
        while total < kills and not done:
            killed, done = attack(lab, chance)
            total += killed
            assert finished(lab).items() <= finished(whole).items()
        assert command(lab, *RUN).wait(300) == 0
        assert finished(lab) == finished(whole) and states(lab) == states(whole)
        assert len(Ledger("toy", lab).path.read_text().splitlines()) == 4
        assert not [path for path in lab.rglob("*") if path.name.endswith(".tmp")]
        wait_for(lambda: not orphans(lab))
    return total, batches


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    total, batches = kill_batches(tmp_path, KILLS)
    assert total >= KILLS
    print(f"\n{total} kills in {batches} batches, every one made up for")
