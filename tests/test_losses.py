"The losses against slow references, other libraries, limiting cases and bad input."
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from temp_nce.losses import (DCLLoss, DCLWLoss, DualTemperatureLoss, InfoNCELoss, ISogCLRLoss, MACLLoss, NTXentLoss,
                             PrototypeLoss, SigLIPLoss, TempNetLoss, UncertaintyLoss, info_nce, make_loss, nt_xent)
from temp_nce.losses.prototypes import sinkhorn
from temp_nce.temperature import DySTreSS, Temperature, make_temperature
from temp_nce.tiled import plain_nt_xent

MAPS = ("0.5", "0.07", "0.01", "0.004", "learnable", "free", "dystress", "dystress(detach=False)",
        "dystress(0.1, 0.2, stabilise=True)", "dystress(shape='linear')", "dystress(shape='exponential')",
        "dystress(shape='shifted')", "cosine", "mine")


class Mine(Temperature):
    "A user's own map, with a parameter and no closed form."
    def __init__(self):
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, similarity): return 4 * similarity + self.bend.to(similarity.dtype) * similarity ** 2


def make(name): return (Mine() if name == "mine" else make_temperature(name)).double()


def pairs(n, d=16, spread=0.7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(n, d, generator=generator, dtype=dtype)
    z1 = z0 + spread * torch.randn(n, d, generator=generator, dtype=dtype)
    return z0.requires_grad_(), z1.requires_grad_()


def slow_nt_xent(z0, z1, temperature):
    "The formula, anchor by anchor, in Python."
    z = [row / row.norm() for row in (*z0, *z1)]
    n, losses = len(z0), []
    for i in range(2 * n):
        logits = {j: temperature((z[i] @ z[j]).reshape(1))[0] for j in range(2 * n) if j != i}
        losses.append(torch.stack(list(logits.values())).logsumexp(0) - logits[(i + n) % (2 * n)])
    return torch.stack(losses)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", (2, 3, 7))
def test_equals_the_formula_written_in_python(name, n):
    temperature, (z0, z1) = make(name), pairs(n)
    expected = slow_nt_xent(z0, z1, temperature)
    here = nt_xent(z0, z1, temperature, reduction="none")
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(here, expected, rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n,tile", ((2, None), (2, 1), (13, 5), (37, 16), (37, None), (64, 32)))
def test_value_and_gradient_equal_the_plain_form(name, n, tile):
    temperature, (z0, z1) = make(name), pairs(n)
    inputs = [z0, z1, *temperature.parameters()]
    expected, here = plain_nt_xent(z0, z1, temperature), nt_xent(z0, z1, temperature, tile=tile)
    assert abs(here - expected).item() < 1e-14 * max(1.0, abs(expected.item()))
    for a, b in zip(torch.autograd.grad(here, inputs), torch.autograd.grad(expected, inputs)):
        assert (a - b).norm() <= 1e-13 * b.norm() + 1e-15  # the plain form itself cancels at 1e-16


def test_many_tiles_equal_one():
    z0, z1 = pairs(900, 8)
    values = [torch.autograd.grad(nt_xent(z0, z1, "free", tile=tile), z0)[0] for tile in (None, 97, 1800)]
    for value in values[1:]: torch.testing.assert_close(value, values[0], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("tile", (None, 3))
def test_gradcheck(name, tile):
    if name in ("0.004", "dystress", "dystress(0.1, 0.2, stabilise=True)") or "shape" in name:
        pytest.skip("detached, or too steep for finite differences")
    temperature, (z0, z1) = make(name), pairs(5, 4)
    parameters = list(temperature.parameters())
    assert torch.autograd.gradcheck(lambda a, b, *p: nt_xent(a, b, temperature, tile=tile), (z0, z1, *parameters))


def test_second_derivatives_are_refused():
    z0, z1 = pairs(4)
    for name in ("0.5", "mine"):
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(nt_xent(z0, z1, make(name)), z0, create_graph=True)


# ---- numerics

@pytest.mark.parametrize("gap", (1e-2, 1e-4, 1e-6, 1e-8, 0.0))
@pytest.mark.parametrize("n", (8, 256, 1000))
def test_free_is_accurate_for_close_positives_in_float32(gap, n):
    generator = torch.Generator().manual_seed(n)
    u = F.normalize(torch.randn(n, 128, generator=generator, dtype=torch.float64), dim=1)
    aside = torch.randn(n, 128, generator=generator, dtype=torch.float64)
    aside = F.normalize(aside - (aside * u).sum(1, keepdim=True) * u, dim=1)
    z0, z1 = u.float(), ((1 - gap) * u + math.sqrt(1 - (1 - gap) ** 2) * aside).float()
    here = [z.clone().requires_grad_() for z in (z0, z1)]
    exact = [z.double().requires_grad_() for z in (z0, z1)]  # the same inputs
    loss, reference = nt_xent(*here, "free"), nt_xent(*exact, "free")
    assert abs(loss.item() - reference.item()) < 2e-6
    for a, b in zip(torch.autograd.grad(loss, here), torch.autograd.grad(reference, exact)):
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("name", ("0.5", "0.01", "0.001", "free", "dystress", "learnable", "macl", "dual", "dcl",
                                  "dclw", "prototypes", "prototypes('free')", "prototypes(0.001, epsilon=1e-5)",
                                  "siglip", "siglip('free')", "tempnet"))
def test_never_nan_in_any_precision(name, dtype):
    loss = make_loss(name)
    loss.set_size(32)
    z = torch.randn(32, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cases = {"equal views": (z, z), "opposite views": (z, -z), "all equal": (torch.ones_like(z),) * 2,
             "tiny": (z * 1e-3, z * 1e-3), "a zero row": (torch.cat([z[:1] * 0, z[1:]]), z),
             "duplicates": (z[:16].repeat(2, 1), z)}
    for case, (a, b) in cases.items():
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16): value = loss.compare(a, b, {"index": torch.arange(32)})
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32, case
        assert all(x.grad.isfinite().all() for x in (a, b, *loss.parameters())), case


def test_autocast_changes_nothing():
    z0, z1 = pairs(64, dtype=torch.float32)
    for name in ("0.1", "free", "mine"):
        temperature = make(name).float()
        with torch.autocast("cpu", torch.bfloat16): inside = nt_xent(z0, z1, temperature)
        assert inside == nt_xent(z0, z1, temperature)


@pytest.mark.parametrize("scale", (76.0, 99.0, 104.0, 110.0, 300.0))
def test_large_scales_keep_float32_accuracy(scale):
    z0, z1 = pairs(200, 64, dtype=torch.float32)
    here, reference = nt_xent(z0, z1, 1 / scale), nt_xent(z0.double(), z1.double(), 1 / scale)
    assert abs(here.item() - reference.item()) < 2e-5 * max(1.0, reference.item())


# ---- memory

def saved_bytes(loss, n, d=32):
    seen = {}
    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    z0, z1 = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): loss(z0, z1)
    return sum(seen.values())


@pytest.mark.parametrize("name", ("0.5", "learnable", "free", "dystress", "macl", "dual", "dcl", "0.004"))
def test_memory_kept_for_backward_grows_linearly(name):
    loss = make_loss(name)
    small, large = saved_bytes(loss, 1600), saved_bytes(loss, 3200)
    assert large / small == pytest.approx(2, rel=0.1)
    assert large < 30 * 3200 * 2 * 32 * 4  # a few copies of the embeddings, not a matrix of pairs


# ---- properties

@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 24), d=st.integers(1, 24), seed=st.integers(0, 10**6),
       tile=st.one_of(st.none(), st.integers(1, 60)),
       name=st.sampled_from(("0.5", "0.05", "free", "dystress", "learnable", "mine")),
       dtype=st.sampled_from((torch.float32, torch.float64)))
def test_shapes_types_and_symmetries(n, d, seed, tile, name, dtype):
    temperature, (z0, z1) = make(name).to(dtype), pairs(n, d, seed=seed, dtype=dtype)
    losses = nt_xent(z0, z1, temperature, reduction="none", tile=tile)
    assert losses.shape == (2 * n,) and losses.dtype == dtype and (losses >= 0).all()
    close = dict(rtol=1e-3, atol=1e-3) if dtype == torch.float32 else dict(rtol=1e-6, atol=1e-8)
    if name == "free" and dtype == torch.float32:  # its weight is 2/gap, and a gap carries the rounding of a product
        x = torch.nn.functional.normalize(torch.cat([z0, z1]).double())
        close["rtol"] += 4e-7 / (1 - x @ x.T).fill_diagonal_(2).min().clamp_min(1e-6).item()
    torch.testing.assert_close(nt_xent(z0, z1, temperature, reduction="sum", tile=tile), losses.sum(), **close)
    # the views may change places
    torch.testing.assert_close(nt_xent(z1, z0, temperature, reduction="none"), losses.roll(n), **close)
    # length does not matter
    torch.testing.assert_close(nt_xent(3 * z0, 0.1 * z1, temperature, reduction="none"), losses, **close)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(nt_xent(z0[order], z1[order], temperature, reduction="none").view(2, n),
                               losses.view(2, n)[:, order], **close)


@pytest.mark.parametrize("name", ("0.5", "0.1", "dystress", "cosine"))
def test_equal_embeddings_are_at_chance(name):
    same = torch.ones(64, 8)
    assert nt_xent(same, same, name).item() == pytest.approx(math.log(127), abs=1e-5)


# ---- parity with other libraries

def gradients(loss, z0, z1): return torch.autograd.grad(loss(z0, z1), (z0, z1))


@pytest.mark.parametrize("ours,theirs", (
    ("0.1", lambda l: l.NTXentLoss(0.1)), ("0.5", lambda l: l.NTXentLoss(0.5)),
    ("macl", lambda l: l.MACLLoss()),
    ("macl(0.3, 0.9, 0.2)", lambda l: l.MACLLoss(temperature=0.3, alpha=0.9, A_0=0.2)),
    ("dcl", lambda l: l.DCLLoss()), ("dcl(0.5)", lambda l: l.DCLLoss(0.5)),
    ("dclw", lambda l: l.DCLWLoss()), ("dclw(0.3, sigma=0.2)", lambda l: l.DCLWLoss(0.3, sigma=0.2))))
def test_parity_with_lightly(ours, theirs):
    lightly = pytest.importorskip("lightly.loss")
    z0, z1 = pairs(48, 32)
    a, b = make_loss(ours), theirs(lightly)
    torch.testing.assert_close(a(z0, z1), b(z0, z1), rtol=1e-7, atol=1e-9)
    for x, y in zip(gradients(a, z0, z1), gradients(b, z0, z1)): torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tau", (0.07, 0.5))
def test_parity_with_pytorch_metric_learning(tau):
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    z0, z1 = pairs(20, 16)
    labels = torch.arange(20).repeat(2)
    other = lambda a, b: theirs.NTXentLoss(tau)(torch.cat([a, b]), labels)
    ours = lambda a, b: nt_xent(a, b, tau)
    torch.testing.assert_close(ours(z0, z1), other(z0, z1), rtol=1e-7, atol=1e-9)
    for x, y in zip(gradients(ours, z0, z1), gradients(other, z0, z1)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_parity_with_info_nce_pytorch():
    theirs = pytest.importorskip("info_nce")
    query, key = pairs(20, 16)
    shared, own = torch.randn(50, 16, dtype=torch.float64), torch.randn(20, 7, 16, dtype=torch.float64)
    for negatives, mode in ((None, "unpaired"), (shared, "unpaired"), (own, "paired")):
        expected = theirs.InfoNCE(0.1, negative_mode=mode)(query, key, negatives)
        torch.testing.assert_close(info_nce(query, key, negatives, 0.1), expected)


def test_parity_with_open_clip():
    open_clip = pytest.importorskip("open_clip.loss")
    image, text = (F.normalize(x, dim=1) for x in pairs(20, 16))
    expected = open_clip.ClipLoss()(image, text, torch.tensor(1 / 0.07, dtype=torch.float64))
    torch.testing.assert_close(InfoNCELoss("0.07", symmetric=True)(image, text), expected)


@pytest.mark.parametrize("scale,bias,rate", ((10.0, -10.0, 1.0), (2.0, 0.0, 0.01), (50.0, -30.0, 0.5)))
def test_siglip_equals_open_clip(scale, bias, rate):
    open_clip = pytest.importorskip("open_clip.loss")
    z0, z1 = pairs(20, 16)
    ours = SigLIPLoss(f"learnable({1 / scale})", bias=bias, rate=rate).double()
    t, b = ours.temperature.log_scale, ours.bias
    expected = open_clip.SigLipLoss()(F.normalize(z0, dim=1), F.normalize(z1, dim=1), t.exp(), b)
    here = ours(z0, z1)
    torch.testing.assert_close(here, expected, rtol=1e-10, atol=1e-12)
    inputs = (z0, z1, t, b)
    factors = (1, 1, rate, rate)
    for x, y, factor in zip(torch.autograd.grad(here, inputs), torch.autograd.grad(expected, inputs), factors):
        torch.testing.assert_close(x, factor * y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau,number,epsilon,rounds", ((0.1, 12, 0.05, 3), (0.5, 30, 0.2, 1), (0.07, 3, 0.05, 10)))
def test_swapped_prediction_equals_lightly(tau, number, epsilon, rounds):
    lightly = pytest.importorskip("lightly.loss")
    z0, z1 = pairs(24, 16)
    ours = PrototypeLoss(tau, number, 16, epsilon, rounds).double()
    weight = ours.prototypes.weight
    cosines = [F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T for z in (z0, z1)]
    expected = lightly.SwaVLoss(tau, rounds, epsilon)(cosines, [])[0]
    here = ours(z0, z1)
    torch.testing.assert_close(here, expected, rtol=1e-10, atol=1e-12)
    inputs = (z0, z1, weight)
    for x, y in zip(torch.autograd.grad(here, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


# ---- InfoNCE

@pytest.mark.parametrize("name", ("0.1", "free", "dystress(detach=False)", "mine", "0.004"))
@pytest.mark.parametrize("tile", (None, 6))
def test_info_nce_equals_cross_entropy(name, tile):
    temperature, (query, key) = make(name), pairs(17, 8)
    queue = torch.randn(29, 8, dtype=torch.float64, requires_grad=True)
    q, k, n = (F.normalize(x, dim=1) for x in (query, key, queue))
    target = torch.arange(17)
    cases = (((query, key), {}, F.cross_entropy(temperature(q @ k.T), target)),
             ((query, key), {"symmetric": True},
              (F.cross_entropy(temperature(q @ k.T), target) + F.cross_entropy(temperature(k @ q.T), target)) / 2),
             ((query, key, queue), {}, F.cross_entropy(temperature(torch.cat([(q * k).sum(1, True), q @ n.T], 1)),
                                                       target * 0)))
    for arguments, options, expected in cases:
        here = info_nce(*arguments, temperature=temperature, tile=tile, **options)
        torch.testing.assert_close(here, expected, rtol=1e-12, atol=1e-13)
        inputs = [*arguments, *temperature.parameters()]
        for a, b in zip(torch.autograd.grad(here, inputs), torch.autograd.grad(expected, inputs, retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


# ---- strategies that are more than a map

def similarity_rows(z0, z1):
    "(2N, 2N−2) negatives and (2N,) positives of every anchor."
    z, n = F.normalize(torch.cat([z0, z1]), dim=1), len(z0)
    s = z @ z.T
    keep = ~(torch.eye(2 * n, dtype=torch.bool) | torch.eye(2 * n, dtype=torch.bool).roll(n, 0))
    return s[keep].view(2 * n, -1), s[torch.arange(2 * n), torch.arange(2 * n).roll(n)]


def test_macl_with_steep_settings_keeps_its_negatives():
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    # A near 0: the scale is 162
    z0, z1 = z.clone().requires_grad_(), torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    here, exact = MACLLoss(0.05, 2.0, 0.8)(z0, z1), MACLLoss(0.05, 2.0, 0.8)(z0.double(), z1.double())
    assert here.item() == pytest.approx(exact.item(), rel=1e-4)


def test_coinciding_negatives_are_pushed_apart():
    z0 = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z0[1] = z0[0] + 1e-5 * torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z1 = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z0.requires_grad_()
    grad, = torch.autograd.grad(nt_xent(z0, z1, "free"), z0)
    assert grad[:2].norm() > 1e-3 and grad.isfinite().all()


def test_dual_temperature_equals_its_formula():
    z0, z1 = pairs(12, 8)
    q, k = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    total = 0
    for a, b in ((q, k), (k, q)):
        intra, inter = ((a @ b.T / t).log_softmax(1).diagonal() for t in (0.1, 1.0))
        total = total + (((1 - inter.exp()) / (1 - intra.exp())).detach() * -intra).mean() / 2
    loss = DualTemperatureLoss(0.1, 10)
    torch.testing.assert_close(loss(z0, z1), total)
    torch.testing.assert_close(torch.autograd.grad(loss(z0, z1), z0), torch.autograd.grad(total, z0))


@pytest.mark.parametrize("positive", (True, False))
def test_uncertainty_equals_its_formula(positive):
    (z0, z1), u = pairs(12, 8), torch.randn(24, dtype=torch.float64, requires_grad=True)
    negatives, own = similarity_rows(z0, z1)
    factor = u.sigmoid() / 0.1
    logits = torch.cat([own[:, None], negatives], 1) * factor[:, None]
    expected = (logits if positive else logits[:, 1:]).logsumexp(1).sub(logits[:, 0]).mean()
    here = UncertaintyLoss(0.1, positive_in_denominator=positive)(z0, z1, *u.chunk(2))
    torch.testing.assert_close(here, expected)
    for a, b in zip(torch.autograd.grad(here, (z0, z1, u)), torch.autograd.grad(expected, (z0, z1, u))):
        torch.testing.assert_close(a, b)


def test_isogclr_equals_its_algorithm_over_several_batches():
    n, samples = 6, 10
    loss = ISogCLRLoss(samples=samples).double()
    state = {"mean": torch.zeros(samples).double(), "tau": torch.full((samples,), 0.1).double(),
             "m": torch.zeros(samples).double()}
    for step in range(4):
        z0, z1 = pairs(n, 8, seed=step)
        index = torch.randperm(samples, generator=torch.Generator().manual_seed(step))[:n]
        negatives, own = similarity_rows(z0, z1)
        tau, old = state["tau"][index].repeat(2), state["mean"][index]
        weight = (negatives.detach() / tau[:, None]).exp()
        new = weight.mean(1).view(2, n).mean(0)
        mean = torch.where(old == 0, new, 0.2 * old + 0.8 * new)
        w = weight / mean.repeat(2)[:, None]
        expected = ((w * negatives).mean(1) - own).view(2, n).sum(0).mean()
        slope = mean.log() + 0.4 - (w * negatives.detach() / tau[:, None]).mean(1).view(2, n).mean(0)
        here = loss(z0, z1, index)
        torch.testing.assert_close(here, expected)
        for a, b in zip(torch.autograd.grad(here, (z0, z1)), torch.autograd.grad(expected, (z0, z1))):
            torch.testing.assert_close(a, b)
        state["mean"][index] = mean
        state["m"][index] = 0.5 * state["m"][index] + 0.5 * slope.clamp(-3, 3)
        state["tau"][index] = (state["tau"][index] - 0.03 * state["m"][index]).clamp(0.05, 1)
        torch.testing.assert_close(loss.tau, state["tau"])
        torch.testing.assert_close(loss.mean, state["mean"])


def test_isogclr_state_is_checkpointed_and_frozen_in_evaluation():
    loss, (z0, z1) = ISogCLRLoss(samples=8), pairs(8, 4, dtype=torch.float32)
    for _ in range(3): loss(z0, z1, torch.arange(8))
    copy = ISogCLRLoss(samples=8)
    copy.load_state_dict(loss.state_dict())
    assert copy(z0, z1, torch.arange(8)) == loss(z0, z1, torch.arange(8))
    before = loss.eval().tau.clone()
    loss(z0, z1, torch.arange(8))
    assert torch.equal(before, loss.tau)


def test_dystress_in_dcl_lets_the_gradient_through_tau():
    z0, z1 = pairs(10, 6)
    negatives, own = similarity_rows(z0, z1)
    temperature = DySTreSS(0.1, 0.2, detach=False)
    expected = (temperature(negatives).logsumexp(1) - temperature(own)).mean()
    here = DCLLoss(temperature)(z0, z1)
    torch.testing.assert_close(torch.autograd.grad(here, z0), torch.autograd.grad(expected, z0))


# ---- prototypes, SigLIP, TempNet: their formulas are written out in their notebooks

@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 20), seed=st.integers(0, 10**6),
       epsilon=st.sampled_from((1e-6, 1e-3, 0.05, 1.0, 1e6)), rounds=st.sampled_from((1, 3, 10)))
def test_codes_share_the_images_out(n, k, seed, epsilon, rounds):
    scores = 2 * torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) - 1
    codes = sinkhorn(scores, epsilon, rounds)
    assert codes.isfinite().all() and (codes >= 0).all() and not codes.requires_grad
    torch.testing.assert_close(codes.sum(1), torch.ones(n))
    if epsilon >= 1:  # the rounds converge fast
        torch.testing.assert_close(sinkhorn(scores, epsilon, 20).sum(0), torch.full((k,), n / k), rtol=1e-3, atol=0)
    if epsilon >= 0.05:  # what is added to all scores of a prototype is divided out
        moved = sinkhorn(scores + torch.linspace(-1, 1, k), epsilon, rounds)
        torch.testing.assert_close(moved, codes, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ("prototypes", "prototypes('free', prototypes=5)", "prototypes('learnable')", "siglip",
                                  "siglip('dystress')", "tempnet", "tempnet(gamma=1.0)"))
def test_order_of_images_and_views_and_lengths_do_not_matter(name):
    z0, z1 = pairs(12)
    order, index = torch.randperm(12, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    def value(a, b, index, reduction="mean"):
        torch.manual_seed(0)
        loss = make_loss(name).double()
        loss.set_size(12)
        loss.reduction = reduction
        return loss.compare(a, b, {"index": index})
    expected = value(z0, z1, index)
    close = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value(z1, z0, index), expected, **close)
    torch.testing.assert_close(value(z0[order], z1[order], index[order]), expected, **close)
    torch.testing.assert_close(value(3 * z0, 0.1 * z1, index), expected, **close)
    each = value(z0, z1, index, "none")
    torch.testing.assert_close(each.mean(), expected, **close)
    torch.testing.assert_close(value(z0, z1, index, "sum"), each.sum(), **close)


@pytest.mark.parametrize("name", ("prototypes", "prototypes('learnable', features=16)", "tempnet", "siglip"))
def test_weights_of_a_loss_are_kept_and_have_numbers_of_their_own(name):
    (z0, z1), context = pairs(12), {"index": torch.arange(12)}
    torch.manual_seed(0)
    loss = make_loss(name)
    drawn = torch.rand(())
    assert drawn == torch.rand((), generator=torch.Generator().manual_seed(0))  # making it draws nothing
    loss.set_size(12)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)  # before there is a batch
    state = torch.get_rng_state()
    for _ in range(3):
        optimizer.zero_grad()
        loss.compare(z0, z1, context).backward()
        optimizer.step()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    copy = make_loss(name)
    copy.set_size(12)
    again = torch.optim.SGD(copy.parameters(), lr=0.1, momentum=0.9)
    copy.load_state_dict(loss.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, steps in ((loss, optimizer), (copy, again)):
        steps.zero_grad()
        each.compare(z0, z1, context).backward()
        steps.step()
    assert all(torch.equal(a, b) for a, b in zip(loss.parameters(), copy.parameters(), strict=True))
    assert loss.compare(z0, z1, context) == copy.compare(z0, z1, context)


def test_tempnet_is_frozen_in_evaluation_and_refuses_what_does_not_fit():
    loss, (z0, z1) = TempNetLoss(samples=8), pairs(8, 4, dtype=torch.float32)
    loss(z0, z1, torch.arange(8))
    before = loss.eval().log_mean.clone()
    loss(z0, z1, torch.arange(8))
    assert torch.equal(before, loss.log_mean) and before.isfinite().all()
    with pytest.raises(ValueError, match="z0: 5 features came; this loss has weights for 4"):
        loss(*pairs(8, 5, dtype=torch.float32), torch.arange(8))


# ---- bad input

ok = torch.randn(4, 8)


@pytest.mark.parametrize("arguments,error,words", (
    ((ok, torch.randn(5, 8)), ValueError, "z1"), ((ok, torch.randn(4, 7)), ValueError, "z1"),
    ((ok[:, :0], ok[:, :0]), ValueError, "features"),
    ((ok.to(torch.float8_e5m2), ok), TypeError, "z0.*float8"), ((ok.to_sparse(), ok), TypeError, "z0.*sparse"),
    ((ok * math.nan, ok), ValueError, "z0"), ((ok, ok / 0), ValueError, "z1"), ((ok.int(), ok), TypeError, "z0.*int32"),
    ((ok[0], ok[0]), ValueError, "matrix"), ((ok.tolist(), ok), TypeError, "z0"),
    ((ok, ok, 0), ValueError, "temperature.*greater than 0"),
    ((ok, ok, -0.1), ValueError, "temperature"), ((ok, ok, math.inf), ValueError, "temperature"),
    ((ok, ok, "dystress(0.3,0.2)"), ValueError, "tau_min"),
    ((ok, ok, "warm"), ValueError, "unknown.*free"), ((ok, ok, None), TypeError, "temperature"),
    ((ok, ok, "__import__('os')"), ValueError, "temperature")))
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words) as info: nt_xent(*arguments)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("call,words", (
    (lambda: nt_xent(ok, ok, reduction="avg"), "reduction"), (lambda: nt_xent(ok, ok, tile=0), "tile"),
    (lambda: NTXentLoss(reduction="x"), "reduction"),
    (lambda: info_nce(ok, ok, torch.randn(3, 7)), "negative_keys"),
    (lambda: info_nce(ok, ok, torch.randn(3, 5, 8)), "negative_keys"),
    (lambda: info_nce(ok, ok, ok, symmetric=True), "symmetric"), (lambda: info_nce(ok[:0], ok[:0]), "query"),
    (lambda: MACLLoss(alpha=-1), "alpha"), (lambda: MACLLoss(A_0=2), "A_0"), (lambda: DualTemperatureLoss(m=0), "m"),
    (lambda: ISogCLRLoss(tau_init=2.0), "tau_init"), (lambda: ISogCLRLoss(gamma=0), "gamma"),
    (lambda: ISogCLRLoss(samples=3)(ok, ok, torch.arange(4)), "index"),
    (lambda: UncertaintyLoss()(ok, ok, ok, ok), "u0"),
    (lambda: DCLWLoss(sigma=0), "sigma"), (lambda: DCLLoss(0.1, 0.2), "weight_fn"),
    (lambda: ISogCLRLoss(samples=9)(ok, ok, [0, 1, 2, 3]), "index"),
    (lambda: UncertaintyLoss()(ok, ok, ok[:, 0] * math.nan, ok[:, 0]), "u0"),
    (lambda: NTXentLoss(memory_bank_size=(4, 5))(ok, ok), "memory_bank_size"),
    (lambda: NTXentLoss(memory_bank_size=-1), "memory_bank_size"),
    (lambda: ISogCLRLoss(samples=4).compare(ok, ok, {}), "index"), (lambda: make_loss("macl(0.1, beta=3)"), "macl"),
    (lambda: PrototypeLoss(prototypes=0), "prototypes"), (lambda: PrototypeLoss(epsilon=-1), "epsilon"),
    (lambda: PrototypeLoss(sinkhorn_iterations=0), "sinkhorn_iterations"), (lambda: PrototypeLoss()("x", ok), "z0"),
    (lambda: PrototypeLoss()(ok * math.nan, ok), "z0"), (lambda: PrototypeLoss(features=3)(ok, ok), "z0"),
    (lambda: SigLIPLoss(bias=math.inf), "bias"), (lambda: SigLIPLoss(rate=0), "rate"),
    (lambda: SigLIPLoss(reduction="x"), "reduction"),
    (lambda: SigLIPLoss()(ok, ok[:3]), "z1"), (lambda: TempNetLoss(gamma=2), "gamma"),
    (lambda: TempNetLoss(tau_min=2), "tau_min"), (lambda: TempNetLoss(samples=3)(ok, ok, torch.arange(4)), "index"),
    (lambda: make_loss("cold"), "unknown")))
def test_bad_options_are_named(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as info: call()
    assert "\n" not in str(info.value)


def test_importing_the_losses_needs_torch_alone():
    import subprocess, sys
    code = ("import sys, temp_nce.losses; print([m for m in ('torchvision', 'sklearn', 'matplotlib', 'papermill', "
            "'scipy', 'PIL') if m in sys.modules])")
    assert (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            == "[]")


@pytest.mark.parametrize("name", ("0.1", "0.5", "free", "dystress", "learnable"))
@pytest.mark.parametrize("noise", (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
@pytest.mark.parametrize("n", (2, 3, 8, 100))
def test_a_batch_that_has_collapsed_is_at_chance_not_at_zero(name, noise, n):
    """The temperature-free loss is blind to contraction; below float32's resolution it must not reward it (GRACE on
    CiteSeer found the way)."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 512, generator=generator)  # in many dimensions all pairs are about equally far apart
    z0, z1 = (centre + noise * torch.randn(n, 512, generator=generator) for _ in range(2))
    chance = math.log(2 * n - 1)
    assert abs(nt_xent(z0, z1, name).item() - chance) < 0.7  # ln 2: both the gap and its addend may count near 1e-6
    if noise <= 1e-7:  # positives far nearer than float32 can tell
        together = (z0, z0 + noise * 1e-4 * torch.randn(n, 512, generator=generator))
        together = [z.requires_grad_() for z in together]
        loss = nt_xent(*together, name)
        assert loss.item() > chance - 0.05
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, together))


@pytest.mark.parametrize("k", (1, 2, 6, 14))
def test_twins_of_anchor_and_positive_cost_what_they_must(k):
    z = torch.eye(64)[:k + 8].clone()
    z[:k + 1] = z[0]  # anchor 0, whose positive is its equal; k of the images coincide with it, in both views
    losses = nt_xent(z, z, "free", reduction="none")
    # the smallest gap, 1e-6, is 1.013e-6 in float32
    assert losses[0].item() == pytest.approx(math.log(2 * k + 1), abs=0.02)


def test_negatives_told_apart_leave_close_positives_exact():
    free = make_temperature("free")
    sums, gap = (torch.tensor([10.0, 1e3, 1e4], dtype=torch.float64),
                 torch.tensor([1e-12, 1e-6, 0.5], dtype=torch.float64))
    torch.testing.assert_close(free.nll(sums, gap), torch.log1p(sums * gap / (2 - gap)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ("0.1", "0.01", "0.004", "free", "dystress", "learnable", "macl", "dual",
                                  "uncertainty", "isogclr", "dcl", "dclw", "prototypes", "siglip", "tempnet"))
@pytest.mark.parametrize("angle", (1.0, -1.0))
def test_a_batch_of_one_pair_costs_nothing(name, angle):
    loss = make_loss(name)
    loss.set_size(1)
    z0 = torch.randn(1, 4 + loss.outputs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z1 = (angle * z0).detach().requires_grad_()
    value = loss.compare(z0, z1, {"index": torch.zeros(1, dtype=torch.int64)})
    value.backward()
    assert value == 0 and z0.grad.count_nonzero() == 0 and z1.grad.count_nonzero() == 0
    assert all(p.grad is not None and not p.grad.count_nonzero() for p in loss.parameters())


def test_one_query_without_other_keys_costs_nothing():
    from temp_nce.losses import LabelledNTXentLoss, MultipleNegativesRankingLoss, SupConLoss
    z = torch.randn(1, 4, requires_grad=True)
    for value in (info_nce(z, -z), info_nce(z, -z, symmetric=True), MultipleNegativesRankingLoss()([z, -z]),
                  SupConLoss()(z, torch.zeros(1)), LabelledNTXentLoss()(torch.cat([z, -z]), torch.zeros(2))):
        assert value == 0 and torch.autograd.grad(value, z)[0].count_nonzero() == 0


def test_rows_too_large_to_be_squared_keep_their_direction():
    for dtype, size in ((torch.float64, 1e308), (torch.float32, 1e37), (torch.bfloat16, 1e37)):
        z0, z1 = (torch.randn(8, 16, dtype=dtype,
                              generator=torch.Generator().manual_seed(i)).clamp(-1.7, 1.7).requires_grad_()
                              for i in (0, 1))
        close = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else {}
        large = z0 * size
        torch.testing.assert_close(nt_xent(large, z1 * size), nt_xent(z0, z1), **close)
        assert torch.autograd.grad(nt_xent(large, z1), large)[0].isfinite().all()


def test_types_may_differ():
    z0, z1 = pairs(8)
    torch.testing.assert_close(nt_xent(z0.float(), z1), nt_xent(z0.float().double(), z1))
    for keys in (None, z1.float()):
        torch.testing.assert_close(info_nce(z0.float(), z1, keys),
                                   info_nce(z0.float().double(), z1, None if keys is None else keys.double()))
