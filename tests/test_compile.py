"""torch.compile and torch.func: the same numbers as eager, one graph, no recompilation over epochs; fake and meta
tensors."""
import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from temp_nce.losses import InfoNCELoss, NTXentLoss, SupConLoss, make_loss, nt_xent
from temp_nce.temperature import CosineSchedule, DySTreSS, Temperature, TemperatureFree, make_temperature
from temp_nce.tiled import (_sums, _sums_backward, negative_logsumexp, negative_weights, nt_xent_per_anchor,
                            positive_gap, unit_rows)

MAPS = ("0.5", "0.07", "0.004", "learnable", "free", "dystress", "dystress(detach=False)",
        "dystress(0.1, 0.2, stabilise=True)", "dystress(shape='linear')", "dystress(shape='exponential')",
        "dystress(shape='shifted')", "cosine", "mine", "bent free")
LOSSES = ("0.5", "learnable", "free", "dystress", "cosine", "macl", "dual", "dcl", "dclw", "uncertainty", "isogclr",
          "prototypes(features=16)", "prototypes('free', features=16)", "siglip", "tempnet(features=16)")


class Mine(Temperature):
    "A user's own map, with a parameter and no closed form."
    def __init__(self):
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(1.5))

    def forward(self, similarity): return 4 * similarity + self.bend * similarity ** 2


class Bent(TemperatureFree):
    "A subclass that changes the map but says nothing of operators: it must not be taken for its parent."
    closed_form = False

    def forward(self, similarity): return 0.5 * super().forward(similarity)


def make(name): return {"mine": Mine, "bent free": Bent}.get(name, lambda: make_temperature(name))()


def pairs(n, d=16, seed=0, spread=0.7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(n, d, generator=generator, dtype=dtype)
    return z0, z0 + spread * torch.randn(n, d, generator=generator, dtype=dtype)


def loss_of(temperature, tile=None):
    return lambda z0, z1: nt_xent_per_anchor(unit_rows(torch.cat([z0, z1])), temperature, tile).mean()


def value_and_gradients(loss, inputs, parameters=()):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [*inputs, *parameters])]


def assert_same(here, there, tolerance=1e-6):
    for a, b in zip(here, there): assert (a - b).norm() <= tolerance * b.norm() + 1e-9


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", MAPS)
def test_one_graph_gives_the_eager_gradients_at_every_epoch(name):
    temperature, inputs = make(name), pairs(20)
    eager, compiled = loss_of(temperature), torch.compile(loss_of(temperature), fullgraph=True, backend="aot_eager")
    tolerance = 3e-5 if name == "0.004" else 1e-6  # a scale of 250 multiplies the rounding of the unit rows
    for epoch in (0, 3, 7):
        temperature.set_epoch(epoch, 8)
        assert_same(value_and_gradients(compiled, inputs, temperature.parameters()),
                    value_and_gradients(eager, inputs, temperature.parameters()), tolerance)
    assert counters["stats"]["unique_graphs"] == 1  # no recompilation


@pytest.mark.parametrize("name", ("0.5", "learnable", "dystress", "mine", "0.004"))
@pytest.mark.parametrize("tile", (None, 300))
def test_large_batches_take_the_same_way(name, tile):
    temperature, inputs = make(name), pairs(900, 8)  # beyond SMALL: slopes are computed again
    compiled = torch.compile(loss_of(temperature, tile), fullgraph=True, backend="aot_eager")
    tolerance = 3e-5 if name == "0.004" else 2e-6
    assert_same(value_and_gradients(compiled, inputs, temperature.parameters()),
                value_and_gradients(loss_of(temperature, tile), inputs, temperature.parameters()), tolerance)


@pytest.mark.parametrize("name", ("0.5", "free", "learnable", "mine"))
def test_two_sets_of_rows(name):
    temperature, (x, y) = make(name), pairs(20)

    def loss(x, y):
        x, y = unit_rows(x), unit_rows(torch.cat([y, y.flip(0) - x]))
        if temperature.closed_form:
            rows, columns = negative_weights(x, y, temperature, (0,))
            return temperature.nll(rows, positive_gap(x, y[:len(x)])).sum() + columns.log().sum()
        return negative_logsumexp(x, y, temperature, (0,), factor=x[:, 0].exp()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(value_and_gradients(compiled, (x, y), temperature.parameters()),
                value_and_gradients(loss, (x, y), temperature.parameters()), 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_compiles(name):
    """As one graph, but for iSogCLR and TempNet: whether an image was seen before is read from its state, on the
    host."""
    torch.manual_seed(0)
    inputs, more = pairs(24), {}
    losses, kept = [make_loss(name).train(False) for _ in range(2)], name.startswith(("isogclr", "tempnet"))
    for loss in losses: loss.set_size(24)
    if name == "uncertainty": more = {"u0": torch.zeros(24), "u1": torch.ones(24)}
    if kept: more = {"index": torch.arange(24)}
    compiled = torch.compile(losses[0], backend="aot_eager", fullgraph=not kept)
    assert_same(value_and_gradients(lambda a, b: compiled(a, b, **more), inputs, losses[0].parameters()),
                value_and_gradients(lambda a, b: losses[1](a, b, **more), inputs, losses[1].parameters()), 5e-6)


@pytest.mark.parametrize("loss", (InfoNCELoss(0.1), InfoNCELoss("free", symmetric=True), SupConLoss("dystress"),
                                  NTXentLoss("free", memory_bank_size=(48, 16))), ids=lambda loss: type(loss).__name__)
def test_losses_of_other_calls_compile_as_one_graph(loss):
    inputs, labels, twin = pairs(24), torch.arange(24).repeat(2) % 5, copy.deepcopy(loss)
    call = lambda loss, a, b: (loss(torch.cat([a, b]), labels) if isinstance(loss, SupConLoss) else loss(a, b))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # a bank has something in it from the second time on
        assert_same(value_and_gradients(lambda a, b: compiled(loss, a, b), inputs),
                    value_and_gradients(lambda a, b: call(twin, a, b), inputs), 5e-6)


def test_a_whole_step_with_a_network():
    def step(compiled):
        torch.manual_seed(0)
        network, temperature = nn.Linear(12, 8), make_temperature("learnable")
        optimizer = torch.optim.SGD([*network.parameters(), *temperature.parameters()], lr=0.1)
        forward = lambda a, b: loss_of(temperature)(network(a), network(b))
        if compiled: forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        for seed in range(3):
            optimizer.zero_grad()
            forward(*pairs(16, 12, seed)).backward()
            optimizer.step()
        return [p.detach() for p in (*network.parameters(), *temperature.parameters())]
    torch.testing.assert_close(step(True), step(False), rtol=1e-5, atol=1e-6)


def test_batches_of_several_sizes():
    temperature = make_temperature("free")
    compiled = torch.compile(loss_of(temperature), fullgraph=True, backend="aot_eager")
    for n in (16, 24, 9, 31):
        assert_same(value_and_gradients(compiled, pairs(n)), value_and_gradients(loss_of(temperature), pairs(n)))
    assert counters["stats"]["unique_graphs"] <= 3


def test_one_pair_costs_nothing():
    for name in ("0.5", "free", "mine", "0.004"):
        for loss in (loss_of(make(name)), torch.compile(loss_of(make(name)), fullgraph=True, backend="aot_eager")):
            value, *grads = value_and_gradients(loss, pairs(1))
            assert value < 1e-30 and all(grad.abs().max() < 1e-20 for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("0.5", "learnable", "free", "dystress(stabilise=True)", "mine"))
def test_inductor(name):
    temperature, inputs = make(name), pairs(64)
    compiled = torch.compile(loss_of(temperature), fullgraph=True)
    assert_same(value_and_gradients(compiled, inputs, temperature.parameters()),
                value_and_gradients(loss_of(temperature), inputs, temperature.parameters()))


def test_the_operators_keep_their_promises():
    for name in ("0.3", "free", "dystress"):
        x = unit_rows(torch.randn(12, 4, dtype=torch.float64)).requires_grad_()
        key, numbers, moving = make_temperature(name).arguments()
        torch.library.opcheck(torch.ops.temp_nce.negative_weights.default,
                              (x, None, moving, key, numbers, [0, 6, -6], [12, 12], True))
    torch.library.opcheck(torch.ops.temp_nce.product.default, (x, x.detach().flip(0)))


# ---- torch.func

@pytest.mark.parametrize("name", ("0.5", "learnable", "free", "dystress", "cosine", "mine"))
def test_torch_func(name):
    temperature, (z0, z1) = make(name), pairs(7)
    loss = lambda a: loss_of(temperature)(a, z1)
    expected = value_and_gradients(loss, [z0])
    gradient, value = torch.func.grad_and_value(loss)(z0)
    assert_same([value, gradient], expected, 2e-6)
    by_vmap = torch.func.vmap(torch.func.grad(loss))(torch.stack([z0, 2 * z0]))
    assert_same([by_vmap[0], 2 * by_vmap[1]], [gradient, gradient], 5e-6)


# ---- buffers

@pytest.mark.parametrize("name", ("cosine", "dystress(0.1, 0.2, stabilise=True)"))
def test_progress_is_saved_and_old_checkpoints_load(name):
    first, second = make_loss(name), make_loss(name)
    first.set_epoch(3, 10)
    second.load_state_dict(first.state_dict())
    z = pairs(8)
    assert torch.equal(first(*z), second(*z)) and not torch.equal(first(*z), make_loss(name)(*z))
    second.load_state_dict({})  # from before there was a buffer
    assert torch.equal(first(*z), second(*z))
    half = make_loss(name).half()
    half.set_epoch(3, 10)
    assert torch.equal(half(*z), first(*z))  # whole numbers are not cast
    with pytest.raises(TypeError, match="epoch: 0.5"): first.set_epoch(0.5, 10)
    assert "progress" not in "".join(make_loss("dystress").state_dict())


def test_schedules_in_tensors_equal_those_in_numbers():
    for temperature in (CosineSchedule(), DySTreSS(stabilise=True)):
        temperature.set_epoch(37, 100)
        numbers = temperature(torch.linspace(-1, 1, 50, dtype=torch.float64))
        temperature._at = temperature.progress.double().unbind()  # as within a captured graph
        torch.testing.assert_close(temperature(torch.linspace(-1, 1, 50, dtype=torch.float64)), numbers, rtol=1e-14,
                                   atol=0)


# ---- tensors without numbers

@pytest.mark.parametrize("name", ("0.5", "0.004", "learnable", "free", "dystress", "cosine", "mine"))
def test_meta_and_fake_tensors(name):
    def shapes(device):
        with torch.device(device):
            temperature, z = make(name), torch.empty(10, 4, requires_grad=True)
        losses = nt_xent_per_anchor(unit_rows(z), temperature)
        return losses.shape, torch.autograd.grad(losses.sum(), z)[0].shape
    assert shapes("meta") == ((10,), (10, 4))
    with FakeTensorMode(): assert shapes("cpu") == ((10,), (10, 4))
    z = pairs(5)
    # nothing fake has stayed in the scratch memory
    assert torch.equal(loss_of(make(name))(*z), loss_of(make(name))(*z))


@pytest.mark.parametrize("name", ("0.5", "learnable", "free", "dystress", "dystress(stabilise=True)", "cosine", "mine",
                                  "0.004"))
def test_a_step_on_a_gpu_asks_it_nothing(name):
    """With fake CUDA tensors: whatever needs a value on the host raises. (Autograd's engine wants a real device, so
    its parts are called.)"""
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        temperature, z = make(name), torch.empty(10, 4)
        assert nt_xent_per_anchor(unit_rows(z), temperature).device.type == "cuda"
        if not temperature.closed_form: return
        for keep in (True, False):
            sums, _, slopes = _sums(z, None, temperature, (0, 5, -5), (4, 10), keep)
            assert (_sums_backward(sums, None, z, None, temperature, (0, 5, -5), (4, 10), slopes)[0].device.type
                    == "cuda")


def test_memory_from_inference_mode_serves_training():
    z0, z1 = pairs(40)
    for name in ("0.5", "dystress"):
        with torch.inference_mode(): before = nt_xent(z0, z1, name)
        assert value_and_gradients(lambda a, b: nt_xent(a, b, name), (z0, z1))[0] == before
