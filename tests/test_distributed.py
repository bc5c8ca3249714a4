"A batch spread over 2 and 3 processes, in parts of any size, against one process with the whole batch."
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from temp_nce.losses import (DCLLoss, DCLWLoss, DualTemperatureLoss, InfoNCELoss, ISogCLRLoss, LabelledNTXentLoss,
                             MACLLoss, MultipleNegativesRankingLoss, NTXentLoss, PrototypeLoss, SigLIPLoss, SupConLoss,
                             TempNetLoss, UncertaintyLoss)
from temp_nce.temperature import DySTreSS

TOTAL, WIDTH = 9, 5
SPLITS = {2: ((5, 4), (9, 0), (1, 8)), 3: ((3, 3, 3), (4, 3, 2), (5, 0, 4))}


def distance_weights(u, v): return 1 + (u - v).square().sum(1) * torch.linspace(0.5, 1, len(u), dtype=u.dtype)


CASES = {  # name: (loss from `gather_distributed`, how it is called)
    "nt-xent": (lambda g: NTXentLoss(0.1, gather_distributed=g), "views"),
    "nt-xent sum": (lambda g: NTXentLoss(0.1, gather_distributed=g, reduction="sum"), "views"),
    "free": (lambda g: NTXentLoss("free", gather_distributed=g), "views"),
    "learnable": (lambda g: NTXentLoss("learnable", gather_distributed=g), "views"),
    "dystress": (lambda g: NTXentLoss("dystress", gather_distributed=g), "views"),
    "0.004": (lambda g: NTXentLoss(0.004, gather_distributed=g), "views"),
    "info-nce": (lambda g: InfoNCELoss("learnable", gather_distributed=g), "views"),
    "clip": (lambda g: InfoNCELoss("learnable", symmetric=True, gather_distributed=g), "views"),
    "macl": (lambda g: MACLLoss(gather_distributed=g), "views"),
    "dual": (lambda g: DualTemperatureLoss(gather_distributed=g), "views"),
    "uncertainty": (lambda g: UncertaintyLoss(gather_distributed=g), "views"),
    "isogclr": (lambda g: ISogCLRLoss(samples=20, gather_distributed=g), "views"),
    "dcl": (lambda g: DCLLoss(DySTreSS(0.1, 0.2, detach=False), gather_distributed=g), "views"),
    "dcl weights": (lambda g: DCLLoss(0.1, distance_weights, g), "views"),
    "dclw": (lambda g: DCLWLoss(gather_distributed=g), "views"),
    "prototypes": (lambda g: PrototypeLoss("learnable", 3, gather_distributed=g), "views"),
    "siglip": (lambda g: SigLIPLoss(gather_distributed=g), "views"),
    "tempnet": (lambda g: TempNetLoss(prototypes=5, samples=20, gather_distributed=g), "views"),
    "ranking": (lambda g: MultipleNegativesRankingLoss(temperature="learnable", gather_distributed=g), "three"),
    "supcon": (lambda g: SupConLoss("learnable", gather_distributed=g), "labels"),
    "supcon free": (lambda g: SupConLoss("free", gather_distributed=g), "labels"),
    "labelled": (lambda g: LabelledNTXentLoss("learnable", gather_distributed=g), "labels"),
    "nt-xent bank": (lambda g: NTXentLoss(0.1, (2 * TOTAL, 4), g), "bank"),
    "info-nce bank": (lambda g: InfoNCELoss(0.1, (2 * TOTAL, 4), g), "bank"),
}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOTAL, WIDTH, generator=generator, dtype=torch.float64)
    views = [x + 0.5 * torch.randn(TOTAL, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]
    index = torch.randperm(20, generator=generator)[:TOTAL]
    return views, {"index": index, "labels": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])}


def run(make, kind, gather, part, wrap):
    "Two steps of a small encoder; the value of the last loss, all gradients, and the state of the loss."
    torch.manual_seed(dist.get_rank() if gather else 0)  # what a loss draws must not depend on how a process is seeded
    loss = make(gather).double()
    torch.manual_seed(0)
    encoder = wrap(nn.Linear(WIDTH, 4 + loss.outputs).double())
    views, context = data()
    views, context = [view[part] for view in views], {name: value[part] for name, value in context.items()}
    for step in range(2):
        encoder.zero_grad(), loss.zero_grad()
        z = encoder(torch.cat(views)).unflatten(0, (3, len(views[0]))).unbind()
        if kind == "three": value = loss(list(z))
        elif kind == "labels": value = loss(z[0], context["labels"])
        else: value = loss.compare(z[0], z[1], context)
        value.backward()
    return {"value": value.detach(), **{f"encoder {i}": p.grad for i, p in enumerate(encoder.parameters())},
            **{f"loss {i}": p.grad for i, p in enumerate(loss.parameters())},
            **{f"state {name}": b for name, b in loss.named_buffers()}}


def process(rank, world, port, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results = {}
    for sizes in SPLITS[world]:
        part = slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
        for name, (make, kind) in CASES.items():
            results[sizes, name] = run(make, kind, True, part, nn.parallel.DistributedDataParallel)
    results["alone"] = single_pair(rank)
    torch.save(results | {"clip": open_clip(rank, world)}, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()


def single_pair(rank):
    "One pair on process 0 and none elsewhere: the whole batch has no negatives."
    z = torch.randn(2, int(rank == 0), 4, dtype=torch.float64, requires_grad=True)
    values = []
    for name in ("nt-xent", "learnable", "clip", "macl", "dual", "dcl", "dclw", "prototypes", "siglip"):
        value = CASES[name][0](True).double()(*z)
        value.backward()
        values.append(value.item())
    return values, z.grad


def open_clip(rank, world):
    "Gradients of both inputs and of the scale, from ClipLoss in its two gathered forms and from InfoNCELoss."
    try: from open_clip.loss import ClipLoss
    except ImportError: return None
    results = {}
    for form in ("local", "global", "ours"):
        generator = torch.Generator().manual_seed(rank)
        raw = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
        image, text = nn.functional.normalize(raw, dim=2)  # a gradient along the rows themselves is nobody's business
        ours = InfoNCELoss("learnable", symmetric=True, gather_distributed=True).double()
        scale = ours.temperature.log_scale
        if form == "ours": value = ours(image, text)
        else:
            value = ClipLoss(form == "local", gather_with_grad=True, rank=rank,
                             world_size=world)(image, text, scale.exp())
        value.backward()
        results[form] = (value.detach(), raw.grad, scale.grad)
    return results


@pytest.fixture(scope="module", params=SPLITS)
def results(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (world, port, str(folder)), nprocs=world)
    return world, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one_large_batch(results, name):
    world, ranks = results
    make, kind = CASES[name]
    whole = run(make, kind, False, slice(None), lambda module: module)
    for sizes in SPLITS[world]:
        parts = [rank[sizes, name] for rank in ranks]
        torch.testing.assert_close(sum(part["value"] for part in parts) / world, whole["value"], rtol=1e-10, atol=1e-12)
        for key in whole.keys() - {"value"}:
            for part in parts:  # gradients are averaged already, states are the same everywhere
                torch.testing.assert_close(part[key], whole[key], rtol=1e-9, atol=1e-12,
                                           msg=lambda m: f"{sizes} {key}: {m}")
                assert torch.equal(part[key], parts[0][key])


def test_a_single_pair_on_all_processes_together_costs_nothing(results):
    for rank in results[1]:
        values, gradient = rank["alone"]
        assert not any(values) and gradient.count_nonzero() == 0


def test_open_clip_gathered_in_both_forms_gives_the_same_gradients(results):
    world, ranks = results
    if ranks[0]["clip"] is None: pytest.skip("open_clip is not installed")
    for form in ("local", "global"):
        values, ours = ([rank["clip"][which][0] for rank in ranks] for which in (form, "ours"))
        torch.testing.assert_close(sum(ours), sum(values))
        averaged = sum(rank["clip"][form][2] for rank in ranks) / world
        for rank in ranks:
            torch.testing.assert_close(rank["clip"]["ours"][1], rank["clip"][form][1])
            torch.testing.assert_close(rank["clip"]["ours"][2], averaged)
