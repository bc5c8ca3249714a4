"kill -9 of parent, worker and kernel at random moments of a batch: equal metrics, one row a run, nothing left over."
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


def finished(lab: Path) -> dict: return {row["id"]: row["metrics"] for row in Ledger("toy", lab).rows()}


def victims(lab: Path, parent) -> list[int]:
    "The command, and of each run its worker and its kernel."
    found = [parent.pid]
    for folder in (lab / "data" / "runs" / "toy").glob("*"):
        if folder.is_dir(): found += [process.pid for process in processes(folder)]
    return found


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    chance, spec = random.Random(0), SPEC.replace("{steps: 4}", "{steps: 12, fast: false}")
    cut, whole = (make_lab(tmp_path / name, spec) for name in ("cut", "whole") if not (tmp_path / name).mkdir())
    assert command(whole, *RUN).wait(300) == 0
    kills = 0
    while kills < KILLS:
        process = command(cut, *RUN)
        time.sleep(chance.uniform(0.3, 6))
        if process.poll() == 0: break  # the batch is done
        for pid in chance.sample(alive := victims(cut, process), k=chance.randint(1, len(alive))):
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: continue
            kills += 1
        try: os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        process.communicate()
        assert all(finished(whole)[name] == metrics for name, metrics in finished(cut).items())
    assert kills >= min(KILLS, 5)
    assert command(cut, *RUN).wait(300) == 0
    assert finished(cut) == finished(whole) and len(Ledger("toy", cut).path.read_text().splitlines()) == 4
    assert not [path for path in cut.rglob("*") if path.name.endswith(".tmp")]
    marked = lambda process: str((process.info["environ"] or {}).get("TEMP_NCE_RUN"))
    wait_for(lambda: not [p for p in psutil.process_iter(["environ"]) if str(cut) in marked(p)])
