"""The campaign: what a careless or hostile user, a killed process and a full disk do, counted in one table.

`python tests/campaign.py --kills 50` tries it all, `pytest tests/test_campaign.py -m slow -s` all but the kills. Both
end with a table: class, tried, right, wrong. What was wrong is printed above it. Kills and moments come from a seed.
"""
import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Callable, Iterator

sys.path.insert(0, str(Path(__file__).parent))

import campaign_api  # noqa: E402
import campaign_commands  # noqa: E402
from campaign_commands import Command  # noqa: E402
from lab_toys import SPEC, command, lines, make_lab, wait_for  # noqa: E402
from test_cli import make_repository  # noqa: E402
from test_kills import finished, kill_batches, orphans, states  # noqa: E402
from test_lab_trust import fill_disk  # noqa: E402

import temp_nce.lab.report  # noqa: E402, F401  # what a library costs to load is no part of a refusal
import torchvision.datasets  # noqa: E402, F401
from temp_nce.lab.cli import main as temp_nce_main  # noqa: E402
from temp_nce.lab.ledger import Ledger  # noqa: E402

SECONDS = 2.0  # of processor time that a refusal may take
LONGEST = 700  # characters of a message
Result = tuple[int, list[str]]  # how many were tried, and for each that was wrong one line


# --- bad arguments ----------------------------------------------------------------------------------------------------

def refused(case: campaign_api.Case) -> str:
    "What is wrong with the answer to a bad argument; empty when it is right."
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()): case.call()
    except case.errors as error: said = str(error)
    except Exception as error: return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    else: return "no error"
    spent = time.process_time() - start
    if len(said.splitlines()) != 1: return f"{len(said.splitlines())} lines: {said[:150]!r}"
    if len(said) > LONGEST: return f"{len(said)} characters: {said[:150]}"
    if not re.search(case.pattern, said): return f"does not name {case.pattern}: {said[:150]}"
    return f"{spent:.1f} s of processor time" if spent > SECONDS else ""


def api(area: str, folder: Path) -> Result:
    "All bad arguments of one area; the last case is that nothing which was planted has been executed."
    folder.mkdir()
    cases = list(campaign_api.AREAS[area](folder))
    wrong = [f"{case.name}: {said}" for case in cases if (said := refused(case))]
    if (folder / "EXECUTED").exists(): wrong.append("a planted file was executed")
    return len(cases) + 1, wrong


# --- bad commands -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def typed_in(folder: Path) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    "Work in `folder`, as a shell does: its output and errors come back, its signal handlers go."
    here, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    home = os.environ.pop("TEMP_NCE_HOME", None)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): yield out, err
    finally:
        os.chdir(here)
        if home is not None: os.environ["TEMP_NCE_HOME"] = home
        for number, handler in kept.items(): signal.signal(number, handler)


def content(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answered(case: Command, repository: Path) -> str:
    "What is wrong with the answer to a bad command; empty when it is right."
    case.prepare(repository)
    before, start, status = content(repository), time.process_time(), 0
    with typed_in(repository) as (out, err):
        try: temp_nce_main(case.arguments)
        except SystemExit as end: status = end.code
        except BaseException as error: return f"{type(error).__name__}: {str(error)[:150]}"
    spent, said = time.process_time() - start, err.getvalue()
    if status != case.status: return f"exit status {status}: {said[:150]}"
    if len(said.splitlines()) != 1 or not said.startswith("temp-nce: "): return f"not one line: {said[:200]!r}"
    if case.says not in said: return f"does not say {case.says!r}: {said[:200]}"
    if len(said) > LONGEST: return f"{len(said)} characters: {said[:150]}"
    if out.getvalue() and case.status == 2: return f"output: {out.getvalue()[:150]}"
    if content(repository) != before: return f"written: {sorted(map(str, content(repository).keys() ^ before.keys()))}"
    return f"{spent:.1f} s of processor time" if spent > SECONDS else ""


def commands(name: str, folder: Path) -> Result:
    "All bad commands of one class, each in a repository of its own."
    cases, wrong = list(campaign_commands.CLASSES[name]()), []
    for number, case in enumerate(cases):
        (folder / str(number)).mkdir(parents=True)
        repository = make_repository(folder / str(number))
        if said := answered(case, repository): wrong.append(f"{case.name}: {said}")
    return len(cases), wrong


# --- processes --------------------------------------------------------------------------------------------------------

def collide(folder: Path, times: int = 3, seed: int = 0) -> Result:
    "Two batches of one spec at once: every run made once, one row a run, the metrics of a batch alone."
    def fresh(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return make_lab(folder / name, SPEC.replace("{steps: 4}", "{steps: 8, fast: false}"))
    draw, run, wrong = random.Random(seed), ("run", "toy.yaml", "--device", "cpu", "--jobs", "2"), []
    alone = fresh("alone")
    assert command(alone, *run).wait(300) == 0
    for number in range(times):
        lab = fresh(f"both{number}")
        first = command(lab, *run)
        time.sleep(draw.uniform(0, 3))
        second = command(lab, *run)
        ended = [process.communicate(timeout=300) for process in (first, second)]
        rows = Ledger("toy", lab).path.read_text().splitlines()
        steps = [lines(path) for path in lab.glob("data/runs/toy/*/steps.txt")]
        if (first.returncode, second.returncode) != (0, 0) or any(err for _, err in ended):
            wrong.append(f"{number}: exit statuses {first.returncode}, {second.returncode}: {ended}")
        elif len(rows) != 4 or steps != [8] * 4: wrong.append(f"{number}: {len(rows)} rows, steps made {steps}")
        elif finished(lab) != finished(alone) or states(lab) != states(alone): wrong.append(f"{number}: other metrics")
    return times, wrong


def full_disk(folder: Path) -> Result:
    "A disk of 300 kB; nothing is tried where none can be made."
    (folder / "small").mkdir(parents=True)
    return (1 if fill_disk(make_lab(folder), folder / "small") else 0), []


def kills(folder: Path, number: int, seed: int = 0) -> Result:
    folder.mkdir()
    total, _ = kill_batches(folder, number, seed)
    wait_for(lambda: not orphans(folder))
    return total, []


# --- the table --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], Result]] = {
    "two batches at once": collide, "full disk": full_disk,
    **{name: lambda folder, name=name: commands(name, folder) for name in campaign_commands.CLASSES},
    **{f"API: {area}": lambda folder, area=area: api(area, folder) for area in campaign_api.AREAS}}


def attempt(name: str, call: Callable[[Path], Result], root: Path) -> Result:
    "A part of the campaign; a failed assertion inside it counts as wrong."
    folder = root / re.sub(r"\W+", "-", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(folder)
    except AssertionError: return 1, [traceback.format_exc(limit=-1)]


def table(results: dict[str, Result]) -> str:
    "class | tried | right | wrong, and what was wrong before it."
    rows = [(name, tried, tried - len(wrong), len(wrong)) for name, (tried, wrong) in results.items()]
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    said = [f"{name}: {line}" for name, (_, wrong) in results.items() for line in wrong]
    head = f"{'class':24} {'tried':>6} {'right':>6} {'wrong':>6}"
    return "\n".join([*said, head, *(f"{name:24} {a:6} {b:6} {c:6}" for name, a, b, c in rows)])


def run(number: int = 0, seed: int = 0, only: str = "") -> dict[str, Result]:
    "The whole campaign, or the parts whose name has `only` in it; with kills where a number is given."
    parts = dict(PARTS) | ({"kill -9": lambda folder: kills(folder, number, seed)} if number else {})
    with tempfile.TemporaryDirectory(prefix="temp-nce-campaign-") as root:
        return {name: attempt(name, call, Path(root)) for name, call in parts.items() if only in name}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=0, help="processes to kill (default: none)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="", help="only the classes whose name contains this")
    given = options.parse_args()
    results = run(given.kills, given.seed, given.only)
    print(table(results))
    sys.exit(any(wrong for _, wrong in results.values()))
