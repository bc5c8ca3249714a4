"""Bad command lines, specs, notebooks and ledgers: what is typed, and what the one line on standard error must say."""
import json
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from lab_toys import SPEC, make_row
from test_cli import MISTAKES
from test_lab_trust import FORGED, MALFORMED, NO_NOTEBOOKS, NO_ROWS


class Command(NamedTuple):
    name: str
    arguments: list[str]
    status: int
    says: str  # in the one line
    prepare: Callable[[Path], object] = lambda repository: None  # what lies there before the command is typed


def _say(repository: Path, text: str | bytes, name: str = "toy.yaml") -> None:
    "Put a file beside the toy spec."
    path = repository / "nbs" / "experiments" / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _folder(repository: Path, way: str) -> None: (repository / way).mkdir(parents=True)


def _file(repository: Path, way: str) -> None:
    (repository / way).parent.mkdir(parents=True, exist_ok=True)
    (repository / way).write_text("a file where a folder should be")


def _ledger(repository: Path, raw: bytes) -> None:
    path = repository / "data" / "results" / "toy.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(raw + b"\n" + json.dumps(make_row(7)).encode() + b"\n")


TYPED = [  # arguments, what the line says; the exit status is 2
    (["run", "toy", "--set", ""], "--set: expected name=value"),
    (["run", "toy", "--set", "=1"], "--set: expected name=value"),
    (["run", "toy", "--set", "steps="], "--set: expected name=value"),
    (["run", "toy", "--set", "steps=[1, 2]"], "steps: expected int"),
    (["run", "toy", "--set", "steps={a: 1}"], "steps: expected int"),
    (["run", "toy", "--set", "steps=.nan"], "steps: expected int"),
    (["run", "toy", "--set", "steps=1.5"], "steps: expected int"),
    (["run", "toy", "--set", "steps=null"], "steps: expected int"),
    (["run", "toy", "--set", "steps=true"], "steps: expected int"),
    (["run", "toy", "--set", "lr=.inf"], "lr: expected float"),
    (["run", "toy", "--set", "lr=" + "9" * 400], "lr: expected float"),
    (["run", "toy", "--set", "lr=" + "9" * 5000], "lr: expected float"),
    (["run", "toy", "--set", "lr=much"], "lr: expected float"),
    (["run", "toy", "--set", "lr=" + "[" * 5000], "lr: expected float"),
    (["run", "toy", "--set", "fast=maybe"], "fast: expected bool"),
    (["run", "toy", "--set", "temperature=[1]"], "temperature: expected str"),
    (["run", "toy", "--set", "temperature={a: b}"], "temperature: expected str"),
    (["run", "toy", "--set", "device=cpu"], "device is set by the runner"),
    (["run", "toy", "--set", "run_dir=/etc"], "run_dir is set by the runner"),
    (["run", "toy", "--set", "x\ny=1"], "unknown parameter x y"),
    (["run", "toy", "--set", "../x=1"], "unknown parameter ../x"),
    (["run", "toy", "--set", "x" * 5000 + "=1"], "unknown parameter xxx"),
    (["run", "toy", "--scale", ""], "unknown scale"), (["run", "toy", "--scale", "../x"], "unknown scale ../x"),
    (["run", "toy", "--scale", "a\nb"], "unknown scale a b"), (["run", "toy", "--scale", "QUICK"], "unknown scale"),
    (["run", "toy", "--device", ""], "device: expected"), (["run", "toy", "--device", "CPU"], "device: expected"),
    (["run", "toy", "--device", "cuda:-1"], "device: expected"),
    (["run", "toy", "--device", "a\nb"], "device: expected"),
    (["run", "toy", "--device", "cpu; reboot"], "device: expected"),
    (["run", "toy", "--device", "cuda:999"], "device: "),
    (["run", "toy", "--jobs", "-1"], "jobs: expected"), (["run", "toy", "--jobs", "1.5"], "--jobs"),
    (["run", "toy", "--jobs", ""], "--jobs"), (["run", "toy", "--per-gpu", "0"], "per-gpu: expected"),
    (["run", "toy", "--per-gpu", "x"], "--per-gpu"),
    (["run", "toy", "--per-gpu", "2", "--device", "cpu"], "per-gpu: no GPU"),
    (["run", "toy", "--on", "x"], "on: expected ray, slurm or submitit"),
    (["run", "toy", "--on", "a\nb"], "on: expected"),
    (["run", "toy", "--ask", "a=1"], "ask: "), (["run", "toy", "--ask", "a"], "--ask: expected name=value"),
    (["run", "--id", "../../etc"], "id: 0 rows"), (["run", "--id", "0000\n"], "id: 0 rows"),
    (["run", "--id", "g000"], "id: 0 rows"), (["run", "--id", "0" * 13], "id: 0 rows"),
    (["run", "--id", "000"], "id: 0 rows"), (["run", "--id", "x" * 5000], "id: 0 rows"),
    (["run", "--id", "0000", "--set", "a=1"], "leave out SPEC"), (["run", "toy", "toi"], "did you mean toy?"),
    (["run", ""], "unknown spec"), (["run", "../toy"], "unknown spec"), (["run", "a\nb"], "unknown spec a b"),
    (["run", "x" * 5000], "unknown spec"), (["run", "nosuch.yaml"], "no spec file nosuch.yaml"),
    (["run", "nbs/../nosuch.yml"], "no spec file"), (["run", "/dev/null.yaml"], "no spec file"),
    (["run", "toy", "--nosuch"], "No such option"), (["run", "toy", "--jobs"], "requires an argument"),
    (["share", ""], "id: 0 rows"), (["share", "../x"], "id: 0 rows"), (["share", "0000"], "id: 0 rows"),
    (["share"], "Missing argument"), (["share", "0000", "x"], "unexpected extra argument"),
    (["report", ""], "unknown spec"), (["report", "nosuch.yaml"], "no spec file"), (["report", "../x"], "unknown spec"),
    (["report"], "no ledger in"), (["list", "x"], "unexpected extra argument"), (["LIST"], "No such command"),
    (["--home"], "No such option"), ([""], "No such command"), (["run\n"], "No such command")]


def command_lines() -> Iterator[Command]:
    for arguments, status, message in MISTAKES: yield Command(" ".join(arguments), arguments, status, message)
    for arguments, message in TYPED: yield Command(" ".join(arguments)[:60], arguments, 2, message)
    for way in ("data", "data/runs", "data/runs/toy"):
        yield Command(f"a file at {way}", ["run", "toy", "--scale", "smoke", "--device", "cpu"], 1, way,
                      lambda repository, way=way: _file(repository, way))
    yield Command("a folder called like a spec", ["run", "x.yaml"], 2, "no spec file x.yaml",
                  lambda repository: _folder(repository, "x.yaml"))
    ledger = "data/results/toy.jsonl"
    for arguments in (["list"], ["run", "--id", "0000"], ["report", "toy"]):
        yield Command(f"a folder for a ledger, {arguments[0]}", arguments, 1, "toy.jsonl: Is a directory",
                      lambda repository: _folder(repository, ledger))


def specs() -> Iterator[Command]:
    own = "toy.yaml: "
    for number, (text, message) in enumerate(MALFORMED):
        for arguments in (["run", "toy"], ["report", "toy"], ["list"]):
            yield Command(f"{arguments[0]} of {text[:30]!r} {number}", arguments, 1 if arguments == ["list"] else 2,
                          message if message.startswith("toy.yaml") else own,
                          lambda repository, text=text: _say(repository, text))
    for name, raw in {"latin": SPEC.replace("A toy", "é").encode("latin-1"), "zeros": b"\0" * 99,
                      "long": b"a: " + b"x" * 2**21, "notebook": b'{"cells": []}'}.items():
        for arguments in (["run", "toy"], ["list"]):
            yield Command(f"{arguments[0]} of {name}", arguments, 1 if arguments == ["list"] else 2, own,
                          lambda repository, raw=raw: _say(repository, raw))
    for text in NO_NOTEBOOKS:
        yield Command(f"run of the notebook {text[:30]!r}", ["run", "toy"], 2, "toy.ipynb",
                      lambda repository, text=text: _say(repository, text, "toy.ipynb"))
    for a, b in (("toy", "other"), ("toy", "toy")):
        says = "extends: there is no other spec"
        yield Command(f"{a} extends {b}", ["run", "toy"], 2, says, lambda repository, b=b: (
            _say(repository, f"title: A\nextends: {b}\n"), _say(repository, "title: A\nextends: toy\n", "other.yaml")))


def ledgers() -> Iterator[Command]:
    wrong = "toy.jsonl: line 1 is not a row of a ledger: "
    lines = {str(forged)[:50]: json.dumps(make_row(1) | forged).encode() for forged in FORGED}
    lines |= {repr(line)[:50]: line.encode() for line in NO_ROWS} | {"latin": '{"a": "é"}'.encode("latin-1")}
    for name, line in lines.items():
        for arguments in (["list"], ["run", "--id", "0000"], ["share", "0000"], ["report", "toy"]):
            yield Command(f"{arguments[0]} with {name}", arguments, 1 if arguments == ["list"] else 2, wrong,
                          lambda repository, line=line: _ledger(repository, line))
    outside = dict(spec_file="../x/toy.yaml"), dict(spec_file="/etc/toy.yaml"), dict(spec_file="data/toy.yaml")
    for more in outside:
        for arguments in (["run", "--id", "000000000001"], ["share", "000000000001"]):
            yield Command(f"{arguments[0]} of {more}", arguments, 2, "is no file that a row may name",
                          lambda repository, more=more: _ledger(repository, json.dumps(make_row(1) | more).encode()))
    unknown = dict(parameters={"nosuch": 1}), dict(parameters={"steps": "x"}), dict(parameters={"run_dir": "/etc"})
    for more in unknown:
        yield Command(f"run --id of {more}", ["run", "--id", "000000000001"], 2, "run 000000000001: ",
                      lambda repository, more=more: _ledger(repository, json.dumps(make_row(1) | more).encode()))


CLASSES = {"command lines": command_lines, "specs and notebooks": specs, "ledgers": ledgers}
