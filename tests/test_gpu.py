"On a GPU, skipped without one: accuracy, no host sync, capture, resume, compilation, and the notebooks' smoke runs."
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from temp_nce.losses import info_nce, make_loss
from temp_nce.temperature import make_temperature
from temp_nce.tiled import nt_xent_per_anchor, unit_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LOSSES = ("0.5", "0.07", "0.004", "learnable", "free", "dystress", "dystress(detach=False)",
          "dystress(0.1, 0.2, stabilise=True)", "cosine", "macl", "dual", "uncertainty", "isogclr", "dcl", "dclw",
          "prototypes", "siglip", "tempnet")
SMOOTH = [name for name in LOSSES if name not in ("uncertainty", "isogclr", "tempnet")]


def pairs(n, device="cuda", dtype=torch.float32, d=64):
    generator = torch.Generator().manual_seed(n)
    z0 = torch.randn(n, d, generator=generator)
    return tuple(z.to(device, dtype).requires_grad_() for z in (z0, z0 + 0.7 * torch.randn(n, d, generator=generator)))


def loss_and_extras(name, n, device, dtype):
    loss = make_loss(name)
    loss.set_size(n)
    extras = {"uncertainty": {name: torch.linspace(-1, 1, n, device=device, dtype=dtype) for name in ("u0", "u1")},
              **dict.fromkeys(("isogclr", "tempnet"), {"index": torch.arange(n, device=device)})}.get(name, {})
    return loss.to(device), extras


def value_and_gradients(name, n, device="cuda", dtype=torch.float32):
    loss, extras = loss_and_extras(name, n, device, dtype)
    inputs = pairs(n, device, dtype)
    value = loss(*inputs, **extras)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("n", (16, 3000))
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tf32", (False, True))
def test_float32_against_float64(name, n, tf32):
    "Whether the user allows TF32 or not."
    expected = value_and_gradients(name, n, "cpu", torch.float64)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try: here = value_and_gradients(name, n)
    finally: torch.set_float32_matmul_precision("highest")
    tolerance = 1e-4 if name == "0.004" else 2e-5
    for a, b in zip(here, expected): assert (a.double().cpu() - b).norm() <= tolerance * b.norm() + 1e-12


def test_keys_in_two_towers():
    for temperature in ("0.1", "free"):
        here, exact = (info_nce(*pairs(3000, device, dtype), temperature=temperature, symmetric=True)
                       for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)))
        assert here.item() == pytest.approx(exact.item(), rel=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_train_step_never_waits_for_the_gpu(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).cuda()
    loss, extras = loss_and_extras(name, 64, "cuda", torch.float32)
    optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=1e-3)
    inputs = [z.detach() for z in pairs(64)]

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16): value = loss(*map(network, inputs), **extras)
        value.backward()
        optimizer.step()
        return value

    step()  # first use of cuBLAS
    torch.cuda.set_sync_debug_mode("error")
    try: values = [step() for _ in range(3)]
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(values).isfinite().all()


@pytest.mark.parametrize("name", ("0.5", "learnable", "free", "dystress", "dystress(0.1, 0.2, stabilise=True)",
                                  "cosine"))
def test_a_captured_graph_sees_the_schedule(name):
    loss, inputs = make_loss(name).cuda(), [z.detach() for z in pairs(64)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3): loss(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad(): value = loss(*inputs)
    for epoch in (0, 5, 9):
        loss.set_epoch(epoch, 10)
        graph.replay()
        assert value.item() == pytest.approx(loss(*inputs).item(), rel=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    loss, inputs = make_loss(name).cuda(), pairs(64)
    compiled = torch.compile(loss)
    for epoch in (0, 3):
        loss.set_epoch(epoch, 10)
        here, there = ([v, *torch.autograd.grad(v, [*inputs, *loss.parameters()])]
                       for v in (compiled(*inputs), loss(*inputs)))
        tolerance = 5e-5 if name == "0.004" else 2e-6
        for a, b in zip(here, there): assert (a - b).norm() <= tolerance * b.norm() + 1e-9


def test_memory_stays_far_below_the_matrix_of_pairs():
    inputs, temperature = pairs(32768, d=128), make_temperature("free")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt_xent_per_anchor(unit_rows(torch.cat(inputs)), temperature).mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 ** 30  # one matrix of pairs would be 16 GiB


def test_adam_goes_on_where_it_stopped(tmp_path, monkeypatch, device="cuda"):
    from temp_nce.images.data import load_images
    from temp_nce.images import Recipe, pretrain
    from temp_nce.losses import ContrastiveLoss
    sets = [load_images("digits", split=split) for split in ("train", "test")]
    recipe = Recipe(epochs=2, optimizer="adam", lr=1e-3, temperature="learnable")
    whole = pretrain(*sets, recipe, folder=tmp_path / "whole", device=device)
    set_epoch = ContrastiveLoss.set_epoch

    def cut(self, epoch, epochs):
        if epoch == 1: raise RuntimeError("cut off")
        set_epoch(self, epoch, epochs)

    monkeypatch.setattr(ContrastiveLoss, "set_epoch", cut)
    with pytest.raises(RuntimeError, match="cut off"): pretrain(*sets, recipe, folder=tmp_path / "cut", device=device)
    monkeypatch.undo()
    again = pretrain(*sets, recipe, folder=tmp_path / "cut", resume=True, device=device)
    for a, b in zip(whole.encoder.parameters(), again.encoder.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("spec", (("digits",), ("citeseer", "--set", "dataset=blocks")), ids=lambda spec: spec[0])
def test_smoke_runs_of_the_notebooks(spec, tmp_path):
    command = shutil.which("temp-nce") or os.path.join(os.path.dirname(sys.executable), "temp-nce")
    done = subprocess.run([command, "run", *spec, "--scale", "smoke", "--device", "cuda"], capture_output=True,
                          text=True, timeout=600, env=os.environ | {"TEMP_NCE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
