"The tiled sum: numerics, precision settings, memory between calls, bad numbers."
import math

import pytest
import torch

from temp_nce.losses import info_nce, nt_xent
from temp_nce.temperature import (CosineSchedule, DySTreSS, FixedTemperature, LearnableTemperature, Temperature,
                                  TemperatureFree, make_temperature)
from temp_nce.tiled import (GPU_SMALL, GPU_TILE, _tile_size, full_precision, keep_slopes, negative_weights,
                            nt_xent_per_anchor, plain_nt_xent, positive_gap, unit_rows)


def rows(n, d=16, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- bit-equal duplicates

@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("k", (1, 2, 7))
def test_duplicates_of_the_positive_cost_what_they_must(k, dtype):
    x = torch.eye(40, dtype=dtype)[:k + 1].clone()
    x[:] = x[0]  # k keys that are bit for bit the positive
    assert info_nce(x, x, temperature="free").item() == pytest.approx(math.log(k + 1), abs=1e-6)
    assert info_nce(x[:1], x[:1], x[:k], temperature="free").item() == pytest.approx(math.log(k + 1), abs=1e-6)


def test_the_clamp_moves_nothing_else():
    s = torch.linspace(-1, 1, 100001).clamp(-1 + 2e-6, 1 - 2e-6)
    assert torch.equal(TemperatureFree().weight_(s.clone()), (1 - s).reciprocal() * 2 - 1)


# ---- precision

@pytest.mark.parametrize("tau", (0.05, 0.07, 0.1))
@pytest.mark.parametrize("spread", (1e-4, 0.02, 0.1))
def test_small_losses_keep_their_digits_in_float32(tau, spread):
    z0 = rows(32, 64)
    z1 = z0 + spread * rows(32, 64, 1)
    here, exact = (nt_xent(a, b, tau, reduction="none").double() for a, b in ((z0, z1), (z0.double(), z1.double())))
    assert exact.max() < 0.1 and ((here - exact) / exact).abs().max() < 1e-5  # 1/τ times the rounding of a cosine


def test_backward_inside_autocast():
    gradients = []
    for inside in (False, True):
        z = rows(64, 32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            nt_xent_per_anchor(unit_rows(z), make_temperature("0.1")).mean().backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def settings():
    return (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("allowed", ("high", "medium", "highest"))
def test_lower_precision_is_switched_off_and_on_again(device, allowed):
    try:
        torch.set_float32_matmul_precision(allowed)
        before = settings()
        with full_precision(torch.device(device)):
            inside = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
            assert inside.fp32_precision not in ("tf32", "bf16")
        assert settings() == before
        with pytest.raises(KeyError):
            with full_precision(torch.device(device)): raise KeyError
        assert settings() == before
    finally: torch.set_float32_matmul_precision("highest")


# ---- tiles and memory

def test_tiles_by_device():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert _tile_size(GPU_SMALL, GPU_SMALL, None, cuda) == (GPU_SMALL, GPU_SMALL)
    assert _tile_size(GPU_SMALL + 1, GPU_SMALL + 1, None, cuda) == GPU_TILE
    assert max(_tile_size(10 ** 5, 10 ** 5, None, cpu)) <= 512
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(ValueError, match="tile"): _tile_size(8, 8, wrong, cpu)


@pytest.mark.parametrize("name", ("0.5", "learnable", "free", "dystress", "dystress(detach=False)", "macl"))
def test_kept_slopes_give_the_same_gradient(name):
    gradients = []
    for kept in (0, 2000):
        temperature = make_temperature("0.3" if name == "macl" else name)
        x, y = (unit_rows(rows(1700, 8, seed)).requires_grad_() for seed in (0, 1))
        with keep_slopes(kept): sums = negative_weights(x, y, temperature, (0,))
        gradients.append(torch.autograd.grad(sums[0].log().sum() + 2 * sums[1].log().sum(), (x, y)))
    for a, b in zip(*gradients):  # DySTreSS's weight is computed in another order next to its slope
        assert torch.equal(a, b) if name != "dystress" else (a - b).norm() < 1e-6 * b.norm()


def test_two_forward_passes_before_the_first_backward():
    for name in ("0.5", "free", "dystress"):
        a, b = rows(50).requires_grad_(), rows(50, seed=1).requires_grad_()
        losses = [nt_xent_per_anchor(unit_rows(z), make_temperature(name)).sum() for z in (a, b)]
        together = torch.autograd.grad(losses[0], a)[0], torch.autograd.grad(losses[1], b)[0]
        for z, grad in zip((a, b), together):
            alone, = torch.autograd.grad(nt_xent_per_anchor(unit_rows(z), make_temperature(name)).sum(), z)
            assert torch.equal(alone, grad)


def test_the_slope_of_tau_is_what_autograd_finds():
    s = torch.linspace(-0.999, 0.999, 1001, dtype=torch.float64).requires_grad_()
    for shape in DySTreSS.SHAPES:
        temperature = DySTreSS(detach=False, shape=shape, stabilise=True)
        temperature.set_epoch(2, 9)
        expected, = torch.autograd.grad(temperature.tau(s).sum(), s)
        torch.testing.assert_close(temperature._tau_slope(s.detach()), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ("0.5", "0.004", "free", "dystress", "learnable"))
def test_one_pair_has_no_loss_and_no_gradient(name):
    z = rows(2).requires_grad_()
    loss = nt_xent_per_anchor(unit_rows(z), make_temperature(name)).mean()
    assert loss < 1e-30 and torch.autograd.grad(loss, z)[0].abs().max() < 1e-20


# ---- bad numbers

@pytest.mark.parametrize("spec", (1e-300, 1e300, 10 ** 400, 10 ** 5000, math.nan, math.inf, -1, 0, "1e-300", "nan",
                                  "inf", "1e400", "(" * 5000, "dystress(0.1, [])", "dystress(detach='no')",
                                  "dystress(delta=1e999)", "dystress(shape=[1])", "cosine(period=0)",
                                  "learnable(1e-40)", "fixed({})", "\0"), ids=lambda spec: "")
def test_bad_temperatures_are_refused_in_one_line(spec):
    with pytest.raises(ValueError) as error: make_temperature(spec)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_the_smallest_and_the_largest_temperature_give_numbers():
    z = rows(16)
    for tau in (1e-30, 9e29):
        x = z.clone().requires_grad_()
        loss = nt_xent_per_anchor(unit_rows(x), make_temperature(tau)).mean()
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_the_gap_and_the_plain_form_agree():
    z0, z1 = rows(30, dtype=torch.float64), rows(30, seed=1, dtype=torch.float64)
    u, v = unit_rows(z0), unit_rows(z1)
    torch.testing.assert_close(1 - positive_gap(u, v), (u * v).sum(1))
    torch.testing.assert_close(nt_xent_per_anchor(torch.cat([u, v]), make_temperature("0.2")).mean(),
                               plain_nt_xent(z0, z1, make_temperature("0.2")))


def test_the_backward_pass_asks_the_map_of_the_forward_pass():
    "Above 1,536 rows the tiles are computed again; what becomes of the map in between must not matter."
    def learned(step):
        map_ = LearnableTemperature(0.2)
        return map_, lambda: map_.log_scale.data.add_(step)
    def moving():
        map_ = CosineSchedule(0.1, 1.0, 10)
        return map_, lambda: map_.set_epoch(5, 10)
    def by_hand():
        map_ = FixedTemperature(0.5)
        return map_, lambda: setattr(map_, "tau", 0.1)
    generator = torch.Generator().manual_seed(0)
    for map_, change in (learned(1.0), moving(), by_hand()):
        x = unit_rows(torch.randn(1600, 8, generator=generator)).requires_grad_()
        loss = nt_xent_per_anchor(x, map_).mean()
        wanted = [x, *map_.parameters()]
        expected = torch.autograd.grad(loss, wanted, retain_graph=True)
        change()
        torch.testing.assert_close(torch.autograd.grad(loss, wanted), expected)


@pytest.mark.parametrize("forward", (lambda s: s.mean(-1, keepdim=True) * 5, lambda s: s.flatten(), lambda s: s.sum()))
def test_a_map_that_changes_the_shape_is_refused(forward):
    class Wrong(Temperature):
        def forward(self, similarity): return forward(similarity)
    with pytest.raises(ValueError, match="temperature: Wrong made logits of"):
        nt_xent_per_anchor(unit_rows(torch.randn(8, 4)), Wrong())


def test_a_parametrized_map_without_closed_form_has_value_and_gradient():
    class Own(Temperature):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, similarity): return similarity * self.w

    class Exp(torch.nn.Module):
        def forward(self, x): return x.exp()

    own, plain = Own(), FixedTemperature(1 / math.e)
    torch.nn.utils.parametrize.register_parametrization(own, "w", Exp())
    x = unit_rows(rows(8)).requires_grad_()
    found, expected = nt_xent_per_anchor(x, own).mean(), nt_xent_per_anchor(x, plain).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, retain_graph=True), torch.autograd.grad(expected, x))
    assert torch.autograd.grad(found, list(own.parameters()))[0].isfinite()
