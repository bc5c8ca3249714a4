"""The loop that all domains share: exact resume wherever it is cut, checkpoints that cannot be forged by accident,
early stopping."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from temp_nce.engine import (Task, check_recipe, fingerprint, fit, lr_factor, make_optimizer, pair_histogram, untouched,
                             watch_pairs)
from temp_nce.engine.checkpoint import content_digest
from temp_nce.engine.similarities import BINS, _candidates, pushes
from temp_nce.losses import make_loss, nt_xent
from temp_nce.temperature import make_temperature


class Toy(Task):
    "Two noisy views of eight points; dropout, Adam, and batches that are dealt one by one."
    def __init__(self, temperature="free", seed=0, rows=40):
        torch.manual_seed(seed)
        loss = make_loss(temperature)
        loss.set_size(rows)
        self.x = torch.randn(rows, 6)
        self.modules = {"encoder": nn.Linear(6, 4 + loss.outputs), "loss": loss}
        self.optimizer, self.device = make_optimizer(self.modules, 0.01), torch.device("cpu")
        self.generators = {name: torch.Generator().manual_seed(seed + i) for i, name in enumerate(("order", "views"))}
        self.fingerprint = fingerprint(Settings(temperature), self.x)
        self.quality = iter(range(1000))
    def rate(self, epoch, epochs): return lr_factor(epoch, epochs)
    def batches(self, epoch):  # drawn one at a time, while training goes on
        for _ in range(4): yield torch.randperm(len(self.x), generator=self.generators["order"])[:10]
    def forward(self, rows):
        return [self.modules["encoder"](self.x[rows] + 0.1 * torch.randn(10, 6, generator=self.generators["views"]))
                for _ in range(2)]
    def objective(self, outputs, rows):
        return {"loss": self.modules["loss"].compare(*outputs, {"index": rows}),
                "size": outputs[0].detach().square().mean()}
    def evaluate(self): return {"norm": self.modules["encoder"].weight.norm().item()}
    def keep(self, folder, name): torch.save(self.modules["encoder"].state_dict(), folder / f"{name}.pt")


@dataclass(frozen=True)
class Settings:
    temperature: str = "0.5"
    size: int = 4
    rate: float = 1.0


def weights(task): return {f"{n}.{k}": v for n, m in task.modules.items() for k, v in m.state_dict().items()}


def timeless(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


@pytest.mark.parametrize("temperature", ("free", "learnable", "isogclr", "uncertainty", "dystress(stabilise=True)",
                                         "prototypes(0.1)", "siglip", "tempnet"))
@pytest.mark.parametrize("cut", (1, 2, 6, 7, 11))
def test_a_training_cut_at_any_step_goes_on_bit_for_bit(temperature, cut, tmp_path):
    class PowerCut(Exception): pass
    class Cut(Toy):
        steps = 0
        def forward(self, rows):
            self.steps += 1
            if self.steps == cut + 1: raise PowerCut
            return super().forward(rows)
    options = dict(monitor="norm", evaluate_every=2, checkpoint_every=2, checkpoint_steps=1)
    with pytest.raises(PowerCut): fit(Cut(temperature), 4, folder=tmp_path, **options)
    resumed, whole = Toy(temperature), Toy(temperature)
    after, before = fit(resumed, 4, folder=tmp_path, resume=True, **options), fit(whole, 4, **options)
    for name, value in weights(whole).items(): assert torch.equal(value, weights(resumed)[name]), name
    assert (timeless(after.history) == timeless(before.history) and (after.best, after.metrics)
            == (before.best, before.metrics))


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_engine import Toy, fit
class Slow(Toy):
    def forward(self, rows): time.sleep(0.02); return super().forward(rows)
fit(Slow("isogclr"), 6, folder=sys.argv[1], checkpoint_steps=1)
"""


def test_kill_9_anywhere_goes_on_bit_for_bit(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "run"), os.path.dirname(__file__)])
    deadline = time.time() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None and time.time() < deadline; time.sleep(0.01)
    time.sleep(0.137)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed, whole = Toy("isogclr"), Toy("isogclr")
    fit(resumed, 6, folder=tmp_path / "run", resume=True)
    fit(whole, 6)
    for name, value in weights(whole).items(): assert torch.equal(value, weights(resumed)[name]), name
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_every_flipped_bit_is_noticed(tmp_path):
    fit(Toy(), 1, folder=tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        place, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(whole), 8))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        task = Toy()
        try: fit(task, 2, folder=tmp_path, resume=True)
        except ValueError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error) and str(path) in str(error)
        else:  # a bit that carries no content, such as padding or a date in the archive: the same training goes on
            other = Toy(); path.write_bytes(whole); fit(other, 2, folder=tmp_path, resume=True)
            for name, value in weights(task).items(): assert torch.equal(value, weights(other)[name])
        path.write_bytes(whole)


@pytest.mark.parametrize("change, said", (
    (lambda c: c["place"].update(epoch=99), "epoch: 99"), (lambda c: c["parts"].pop("encoder"), "encoder"),
    (lambda c: c["parts"]["encoder"].update(weight=torch.zeros(2, 2)), "size mismatch"),
    (lambda c: c.pop("history"), "history"),
    (lambda c: c.update(fingerprint="another"), "another recipe"),
    (lambda c: c["random"].pop("views"), "another kind of device")))
def test_a_forged_checkpoint_is_refused_in_one_line(change, said, tmp_path):
    fit(Toy(), 1, folder=tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["digest"]
    change(content)
    torch.save(content | {"digest": content_digest(content)}, path)
    with pytest.raises(ValueError, match=said) as error: fit(Toy(), 2, folder=tmp_path, resume=True)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_patience_counts_evaluations_and_the_best_weights_are_kept(tmp_path):
    class Worse(Toy):
        def evaluate(self): return {"norm": -float(next(self.quality))}
    result = fit(Worse(), 50, folder=tmp_path, monitor="norm", evaluate_every=1, patience=3)
    assert result.stopped_early and [record["norm"] for record in result.history] == [0, -1, -2, -3]
    assert result.best == {"norm": 0, "epoch": 1} and {"best.pt", "last.pt"} <= {path.name
                                                                                 for path in tmp_path.iterdir()}
    again = fit(Worse(), 50, folder=tmp_path, resume=True, monitor="norm", evaluate_every=1, patience=3)
    assert len(again.history) == 4 and again.stopped_early
    assert fit(Worse(), 9, monitor="norm", better="low", evaluate_every=1, patience=3).best["epoch"] == 9


def test_the_history_says_what_was_watched(tmp_path):
    result = fit(Toy(), 3, folder=tmp_path, monitor="norm", evaluate_every=2)
    assert [list(record) for record in result.history] == [["epoch", "loss", "size", "lr", *extra, "seconds"]
                                                           for extra in ([], ["norm"], ["norm"])]
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == result.history


def test_half_precision_reaches_the_network_and_never_the_loss():
    seen = []
    class Watched(Toy):
        def objective(self, outputs, rows):
            seen.append((outputs[0].dtype, torch.is_autocast_enabled("cpu")))
            return super().objective(outputs, rows)
    fit(Watched(), 1, precision="bf16")
    assert set(seen) == {(torch.bfloat16, False)}


@pytest.mark.parametrize("wrong, said", (
    (dict(epochs=-1), "epochs: -1"), (dict(evaluate_every=-1), "evaluate_every"),
    (dict(patience=2), "patience: 2 came without monitor"),
    (dict(checkpoint_every=0), "checkpoint_every: 0"), (dict(checkpoint_steps=1.5), "checkpoint_steps: 1.5"),
    (dict(better="up"), "better: 'up'"),
    (dict(precision="fp8"), "precision: 'fp8'")))
def test_wrong_options_are_named(wrong, said):
    with pytest.raises((TypeError, ValueError), match=said): fit(Toy(), **{"epochs": 1, **wrong})


def test_a_training_that_diverges_names_the_epoch():
    class Diverging(Toy):
        def objective(self, outputs, rows): return {"loss": outputs[0].sum() * float("inf")}
    with pytest.raises(ValueError, match="loss: (inf|nan|-inf) in epoch 1; training has diverged"): fit(Diverging(), 2)


def test_an_empty_epoch_is_an_error():
    class Empty(Toy):
        def batches(self, epoch): return []
    with pytest.raises(ValueError, match="batches: epoch 1 has none"): fit(Empty(), 1)


def test_frozen_parameters_are_left_out_and_losses_are_not_decayed():
    encoder = nn.Linear(3, 3)
    encoder.bias.requires_grad_(False)
    optimizer = make_optimizer({"encoder": encoder, "loss": make_loss("learnable")}, 0.1, "adamw", weight_decay=0.01)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.01), (1, 0.0)]
    with pytest.raises(ValueError, match="optimizer: 'lion'"): make_optimizer({"encoder": encoder}, 0.1, "lion")


@pytest.mark.parametrize("wrong, error", ((dict(temperature="hot"), ValueError), (dict(size=0), ValueError),
                                          (dict(size=2.0), TypeError), (dict(rate="1"), TypeError)))
def test_recipes_are_checked(wrong, error):
    with pytest.raises(error, match=next(iter(wrong))): check_recipe(Settings(**wrong), dict(size=1), {})


@pytest.mark.parametrize("spec", ("0.1", "free", "dystress", "dystress(detach=False)", "learnable"))
def test_the_pushes_carry_the_gradient_of_the_loss(spec):
    "∂L/∂z of the package's loss is made of ∂L/∂s of the plain one: g_i = Σ_j (G_ij + G_ji) x_j, on the sphere."
    views = torch.randn(2, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, t = nn.functional.normalize(views.flatten(0, 1)).requires_grad_(), make_temperature(spec)
    loss = nt_xent(*x.chunk(2), t)
    wanted, = torch.autograd.grad(loss, x)
    positive, negative = _candidates(torch.arange(40), 20)
    x = x.detach()
    push, losses = pushes(x @ x.T, positive, negative, t)
    pull = (push + push.T) @ x / 40
    torch.testing.assert_close(pull - (pull * x).sum(1, keepdim=True) * x, wanted, rtol=1e-6, atol=1e-8)
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-9)


def test_a_histogram_counts_every_pair_once():
    z0, z1 = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    labels, t = torch.tensor([0, 0, 1, 1, 2, 2, 2]), make_temperature("free")
    found = pair_histogram(z0, z1, labels, t)
    x = nn.functional.normalize(torch.cat([z0, z1]).double())
    pairs, same, push, push_same = ([0.0] * BINS for _ in range(4))
    total, weights = 0.0, []
    for i in range(14):
        others = [j for j in range(14) if j % 7 != i % 7]
        s = {j: float(x[i] @ x[j]) for j in range(14) if j != i}
        w = {j: (1 + c) / (1 - c) for j, c in s.items()}
        weights.append(sum(w[j] for j in others) / sum(w.values()))
        for j in others:
            place, force = min(int((s[j] + 1) * BINS / 2), BINS - 1), 2 / (1 - s[j]) ** 2 / sum(w.values())
            alike, total = bool(labels[i % 7] == labels[j % 7]), total + force
            pairs[place] += 1; push[place] += force; same[place] += alike; push_same[place] += alike * force
    assert (found["pairs"], found["pairs_same"]) == (pairs, same)
    assert found["push"] == pytest.approx([100 * f / total for f in push], abs=0.01)
    assert found["push_same"] == pytest.approx([100 * f / total for f in push_same], abs=0.01)
    assert found["anchor_weight"] == pytest.approx(sum(weights) / 14, abs=1e-4)


class Watched(Toy):
    watch_every = 1
    def watch(self): return watch_pairs(untouched(self, 7), torch.arange(10), torch.arange(10) % 3)


@pytest.mark.parametrize("spec", ("free", "learnable", "isogclr", "uncertainty"))
def test_a_watched_training_is_the_one_that_is_not(spec, tmp_path):
    seen, blind = Watched(spec), Toy(spec)
    records, others = (fit(task, 3).history for task in (seen, blind))
    assert [[record[name] for name in ("loss", "size")] for record in records] == [
        [record[name] for name in ("loss", "size")] for record in others]
    for name, module in seen.modules.items():
        for one, two in zip(module.state_dict().values(), blind.modules[name].state_dict().values(), strict=True):
            assert torch.equal(one, two)
    assert ("push" in records[0]) is (spec in ("free", "learnable")) and records[0]["gradient_norm"] > 0
    fit(Watched(spec), 3, folder=tmp_path)
    class Cut(Watched):
        def batches(self, epoch):
            if epoch == 2: raise KeyboardInterrupt
            return super().batches(epoch)
    with pytest.raises(KeyboardInterrupt): fit(Cut(spec), 3, folder=tmp_path / "cut")
    resumed = fit(Watched(spec), 3, folder=tmp_path / "cut", resume=True)
    lists = lambda history: [{k: v for k, v in record.items() if k != "seconds"} for record in history]
    assert lists(resumed.history) == lists(records)
    assert lists(map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())) == lists(records)


def test_the_rate_rises_to_the_full_one_and_falls_as_a_cosine_after_it():
    assert [lr_factor(epoch, 4, 2) for epoch in range(4)] == pytest.approx([0.5, 1, 1, 0.5])
    assert [lr_factor(epoch, 4) for epoch in range(4)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_a_temperature_that_moves_is_told_the_epoch():
    task, seen = Toy("cosine(0.1, 1, 4)"), []
    task.evaluate = lambda: seen.append(task.modules["loss"].temperature(torch.ones(())).item()) or {"norm": 0.0}
    fit(task, 3, evaluate_every=1)
    assert len(set(seen)) == 3


def test_an_untouched_twin_is_in_training_mode():
    task = Toy()
    task.modules["encoder"].eval()
    assert untouched(task, 0).modules["encoder"].training and not task.modules["encoder"].training
