"Calls that users of other libraries know, with the numbers that those libraries give."
import math

import pytest
import torch
import torch.nn.functional as F

from temp_nce.losses import (DCLLoss, InfoNCELoss, LabelledNTXentLoss, MemoryBank, MultipleNegativesRankingLoss,
                             NTXentLoss, SupConLoss)


def rows(n, d=8, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("size,batches", (((8, 8), 5), ((8, 8), 3), ((4, 8), 2)))
def test_memory_bank_is_lightlys_when_the_batch_divides_its_size(size, batches):
    lightly = pytest.importorskip("lightly.loss")
    losses = []
    for Loss in (NTXentLoss, lightly.NTXentLoss):
        torch.manual_seed(0)
        loss = Loss(0.2, memory_bank_size=size)
        z0, z1 = rows(4).detach().float().requires_grad_(), rows(4, seed=1).detach().float()
        values = [loss(z0 + step, z1 - step) for step in range(batches)]
        losses.append((torch.stack(values), torch.autograd.grad(values[-1], z0)[0]))
    for ours, theirs in zip(*losses): torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_ring_wraps_and_keeps_the_newest():
    bank = MemoryBank((5, 1))
    for start in (0, 3): bank.push(torch.arange(start, start + 3.0)[:, None])
    assert bank.bank.flatten().tolist() == [5, 1, 2, 3, 4] and bank.place == 1
    bank.push(torch.arange(10, 20.0)[:, None])
    assert sorted(bank.bank.flatten().tolist()) == [15, 16, 17, 18, 19]


def test_bank_is_saved_and_loaded_whatever_is_known_of_its_width():
    loss = InfoNCELoss(0.1, memory_bank_size=6)
    loss(rows(4), rows(4, seed=1))
    for size in (6, (6, 8)):
        copy = InfoNCELoss(0.1, memory_bank_size=size)
        copy.load_state_dict(loss.state_dict())
        expected = InfoNCELoss(0.1)(rows(4), rows(4, seed=2), loss.memory_bank.bank.double())
        torch.testing.assert_close(copy(rows(4), rows(4, seed=2)), expected, rtol=1e-6, atol=0)


def test_weight_fn_is_lightlys():
    lightly = pytest.importorskip("lightly.loss")
    def weights(u, v): return 1 + (u - 2 * v).square().sum(1)
    z0, z1 = rows(6), rows(6, seed=1)
    ours, theirs = DCLLoss(0.3, weights)(z0, z1), lightly.DCLLoss(0.3, weights)(z0, z1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, z0), torch.autograd.grad(theirs, z0))


LABELS = {"pairs": torch.arange(10).repeat(2), "three classes": torch.arange(20) % 3,
          "uneven": torch.tensor([0] * 9 + [1] * 6 + [2] * 3 + [3, 4])}


@pytest.mark.parametrize("form", ("labels", "reference", "pairs", "triplets"))
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("names", (("SupConLoss", SupConLoss), ("NTXentLoss", LabelledNTXentLoss)),
                         ids=lambda names: names[0])
def test_labelled_losses_are_pytorch_metric_learnings(names, labels, form):
    theirs = getattr(pytest.importorskip("pytorch_metric_learning.losses"), names[0])(0.2)
    from pytorch_metric_learning.utils import loss_and_miner_utils as mining
    labels, results = LABELS[labels], []
    arguments = {"labels": (labels,), "reference": (labels, None, rows(7, seed=1).detach(), torch.arange(7) % 3),
                 "pairs": (None, mining.get_all_pairs_indices(labels)),
                 "triplets": (labels, mining.get_all_triplets_indices(labels))}[form]
    for loss in (names[1](0.2), theirs):
        x = rows(20)
        value = loss(x, *arguments)
        results.append((value, *torch.autograd.grad(value, x)))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ("0.2", "learnable", "free", "dystress"))
@pytest.mark.parametrize("tile", (None, 3))
def test_supcon_over_any_map_is_its_formula(name, tile):
    loss, x, labels = SupConLoss(name, tile=tile).double(), rows(12), torch.arange(12) % 5
    z = F.normalize(x, dim=1)
    itself, same = torch.eye(12, dtype=torch.bool), labels[:, None] == labels
    logits = loss.temperature(z @ z.T * ~itself)
    log_p = logits - logits.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    positive = same & ~itself
    expected = (-(log_p * positive).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(loss(x, labels), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss(x, labels), x), torch.autograd.grad(expected, x), rtol=1e-7,
                               atol=1e-9)


@pytest.mark.parametrize("Loss", (SupConLoss, LabelledNTXentLoss))
@pytest.mark.parametrize("labels", (torch.zeros(6), torch.arange(6)))
def test_without_a_positive_or_a_negative_there_is_no_loss(Loss, labels):
    x = rows(6)
    value = Loss()(x, labels)
    assert value == 0 and torch.autograd.grad(value, x)[0].count_nonzero() == 0


@pytest.mark.parametrize("name", ("0.1", "free"))
def test_supcon_keeps_memory_linear_in_the_batch(name):
    def saved(n):
        kept, x = {}, torch.randn(n, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(),
                                                                                t) is None or t, lambda t: t):
            SupConLoss(name)(x, torch.arange(n) % 10)
        return sum(t.untyped_storage().nbytes() for t in kept.values())
    assert saved(4096) < 2.2 * saved(2048) and saved(4096) < 30 * 4096 * 32 * 4


def test_ranking_is_cross_entropy_of_20_cosines_with_hard_negatives():
    anchor, positive, *hard = (rows(6, seed=i) for i in range(4))
    unit = [F.normalize(x, dim=1) for x in (positive, *hard)]
    expected = F.cross_entropy(20 * F.normalize(anchor, dim=1) @ torch.cat(unit).T, torch.arange(6))
    torch.testing.assert_close(MultipleNegativesRankingLoss()([anchor, positive, *hard], None), expected)
    model = torch.nn.Linear(8, 3).double()
    embed = lambda x: model(x)
    inside = MultipleNegativesRankingLoss(model, scale=10.0)([anchor, positive])
    torch.testing.assert_close(inside, MultipleNegativesRankingLoss(scale=10.0)([embed(anchor), embed(positive)]))
