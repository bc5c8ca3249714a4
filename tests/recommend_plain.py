"""DCRec's training step as its published code has it (HKUDS/DCRec, run_DCRec.py, dcrec.py, layers.py), with loops over
edges and neighbours and torch.sparse in the place of DGL: slow, and what the fast one is held against.

The weights are those of a `DCRec` of this package. Items are numbered 1 … n, item 0 is padding.
Left out, as in the package: the logits of the padding and of the token that masks items, and the removal of an item's
diagonal where a user looked at it twice in a row.
"""
import math
import random
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F

SELF_LOOP = 1.0  # the weight that DGL gives to loops that it adds


def build_adj_graph(sequences, n):
    "edges {(from, to): w}, and the edges of each user; run_DCRec.py"
    neighbours, edges_of_user = defaultdict(list), {}
    for user, seq in enumerate(sequences):
        a, b = [], []
        for i in range(len(seq)):
            if i > 0:
                neighbours[seq[i]].append(seq[i - 1]); neighbours[seq[i - 1]].append(seq[i])
                a.append(seq[i]); b.append(seq[i - 1])
            if i + 1 < len(seq):
                neighbours[seq[i]].append(seq[i + 1]); neighbours[seq[i + 1]].append(seq[i])
                a.append(seq[i]); b.append(seq[i + 1])
        edges_of_user[user] = list(zip(a, b))
    value = {(item, other): float(count)
             for item, adj in neighbours.items() for other, count in Counter(adj).items()}
    for item in range(n + 1): value[item, item] = 1.0  # setdiag(1)
    rowsum = Counter()
    for (item, _), count in value.items(): rowsum[item] += count
    norm = {edge: count * rowsum[edge[0]] ** -0.5 * rowsum[edge[1]] ** -0.5 for edge, count in value.items()}
    return norm, edges_of_user


def build_sim_graph(sequences, n, k):
    "edges {(listed, lister): w}: a message flows to the item that lists; the mended graph, by loops"
    edges = {}
    for item, row in enumerate(cosines(sequences, n + 1)):
        for other, share in most_similar(row, item, k): edges[other, item] = share
    return edges


def cosines(sequences, nodes):
    "the similarity of the items' columns in the matrix of users and nodes"
    seen = np.zeros((len(sequences), nodes))
    for user, seq in enumerate(sequences):
        for item in seq: seen[user, item] += 1
    length = np.sqrt((seen ** 2).sum(0))
    return seen.T @ seen / np.maximum(np.outer(length, length), 1e-24)


def most_similar(row, item, k):
    "the k + 1 best of an item's row with their shares; equal ones in the package's order: itself, then lower numbers"
    best = sorted(row.nonzero()[0], key=lambda other: (-round(row[other], 6), other != item, other))[:k + 1]
    return [(int(other), row[other] / sum(row[each] for each in best)) for other in best]


def build_published_sim_graph(sequences, n, k, block=256):
    "the same as published: each block is cut from what the last cut left, and messages flow to the items listed"
    left, rows, i = list(enumerate(cosines(sequences, n + 2))), [], 0  # the code has one node more
    while i < len(left):
        left = left[i:]
        rows += left[:block]
        i += block
    rows += left[block:]
    return {(number, other): share for number, (item, row) in enumerate(rows) if number <= n
            for other, share in most_similar(row, item, k) if other <= n}


class Graph:
    "A weighted directed graph as DGL holds it: edges from, to, w."
    def __init__(self, edges, n, dtype=torch.float32):
        pairs = sorted(edges)
        self.n, self.src = n, torch.tensor([a for a, _ in pairs], dtype=torch.long)
        self.dst = torch.tensor([b for _, b in pairs], dtype=torch.long)
        self.w = torch.tensor([edges[pair] for pair in pairs], dtype=dtype)
        self.id = {pair: i for i, pair in enumerate(pairs)}
        self.out = None

    def without(self, ids):
        "remove_edges"
        other, keep = object.__new__(Graph), torch.ones(len(self.src), dtype=torch.bool)
        keep[ids] = False
        other.n, other.src, other.dst, other.w, other.out = self.n, self.src[keep], self.dst[keep], self.w[keep], None
        return other

    def out_edges(self, items):
        "the items that each item has an edge to"
        if self.out is None:
            self.out = defaultdict(list)
            for a, b in zip(self.src.tolist(), self.dst.tolist()): self.out[a].append(b)
        return [self.out[item] for item in items]


def gcn(graph, feature, keep_prob):
    "dcrec.py GCN.forward: add_self_loop, graph_dropout, twice GraphConv(norm='both', weight=False)"
    loops = torch.arange(graph.n + 1)
    src, dst = torch.cat([graph.src, loops]), torch.cat([graph.dst, loops])
    w = torch.cat([graph.w, torch.full((graph.n + 1,), SELF_LOOP, dtype=graph.w.dtype)])
    if keep_prob < 1:
        w[torch.randint(0, len(w), (int((1 - keep_prob) * len(w)),))] = 0
    out_degree, in_degree = (torch.bincount(end, minlength=graph.n + 1).clamp(min=1).to(w.dtype) for end in (src, dst))
    matrix = torch.sparse_coo_tensor(torch.stack([dst, src]), w, (graph.n + 1, graph.n + 1))
    embs = [feature]
    for _ in range(2):
        feature = torch.sparse.mm(matrix, feature * out_degree.pow(-0.5)[:, None]) * in_degree.pow(-0.5)[:, None]
        embs.append(feature)
    return torch.stack(embs, dim=1).mean(dim=1)


def gcn_forward(model, graph, p, edge_p):
    item_emb = F.dropout(model.items.weight, p)
    return model.norm(gcn(graph, item_emb, 1 - edge_p) + item_emb)


def attention(layer, x, mask, p, attention_p):
    "layers.py TransformerLayer"
    heads = lambda t: t.view(*t.shape[:2], layer.heads, -1).permute(0, 2, 1, 3)
    key, value = layer.key_value(x).chunk(2, -1)
    scores = torch.matmul(heads(layer.query(x)), heads(key).transpose(-1, -2)) / math.sqrt(x.shape[-1] // layer.heads)
    probs = F.dropout(torch.softmax(scores + mask, dim=-1), attention_p)
    context = torch.matmul(probs, heads(value)).permute(0, 2, 1, 3).contiguous().view(*x.shape)
    x = layer.norm_0(F.dropout(layer.out(context), p) + x)
    hidden = layer.widen(x)
    hidden = layer.narrow(hidden * 0.5 * (1.0 + torch.erf(hidden / math.sqrt(2.0))))
    return layer.norm_1(F.dropout(hidden, p) + x)


def forward(model, item_seq, item_seq_len, p, attention_p):
    "dcrec.py DCRec.forward: item_seq (B, L) padded with 0"
    encoder = model.encoder
    x = F.embedding(item_seq, model.items.weight) + encoder.places.weight[:item_seq.shape[1]]
    x = F.dropout(encoder.norm(x), p)
    mask = (1.0 - (item_seq > 0).to(x.dtype))[:, None, None] * -10000.0
    for layer in encoder.layers: x = attention(layer, x, mask, p, attention_p)
    return x[torch.arange(len(x)), item_seq_len - 1]


def graph_augment(graph, users, edges_of_user):
    return graph.without([graph.id[edge] for user in users for edge in edges_of_user[user] if edge[0] != edge[1]])


def readout(graph, aug, items, features, sampled=None, published=False):
    "dcrec.py graph_dual_neighbor_readout; `sampled` are the foreign and civil sets of each row, if they are given"
    everything = [set(each) for each in graph.out_edges(items)]
    left = [set(each) for each in aug.out_edges(items)]
    if sampled is None:
        some = lambda sets: [set(random.sample(sorted(s), 10)) if len(s) > 10 else s for s in sets]
        foreign = some(left)
        civil = some([a - f for a, f in zip(everything, foreign if published else left)])
    else: foreign, civil = sampled
    mean = lambda s: features[torch.tensor(sorted(s))].mean(0) if s else torch.zeros_like(features[0])
    return torch.stack([mean(s) for s in civil]), torch.stack([mean(s) for s in foreign])


def agreement(raw_seq, aug_seq, civil, foreign, lengths, weight_mean):
    "dcrec.py _subgraph_agreement"
    view1 = F.cosine_similarity(raw_seq, aug_seq, eps=1e-12)
    view2 = F.cosine_similarity(raw_seq, foreign, eps=1e-12)
    view3 = F.cosine_similarity(civil, foreign, eps=1e-12)
    w = torch.sigmoid((view1 + view2 + view3) / 3)
    w = (w - w.min()) / (w.max() - w.min())
    w = (weight_mean / w.mean()) * w
    w = w.clone()
    w[lengths == 1] = 0.5
    return w


def cal_kl_1(target, given):
    target = target.clone()
    target[target < 1e-8] = 1e-8
    return F.kl_div(torch.log_softmax(given + 1e-8, dim=0), torch.log(target + 1e-8), reduction="batchmean",
                    log_target=True)


def vanilla_loss(z1, z2, logit):
    "layers.py CLLayer.vanilla_loss; `logit` maps the cosine, c / tau in the published code"
    between = torch.exp(logit(torch.mm(F.normalize(z1), F.normalize(z2).t())))
    return -torch.log(1e-8 + between.diag() / between.sum(1))


def calculate_loss(model, graphs, edges_of_user, batch, recipe, logit, wanted=None, sampled=None, published=False):
    "dcrec.py calculate_loss_graphcl: the three terms; batch = users, item_seq (B, L), item_seq_len, pos_items"
    users, item_seq, item_seq_len, pos_items = batch
    p, attention_p, edge_p = recipe.drop, recipe.drop_attention, recipe.drop_edge
    last = item_seq[torch.arange(len(item_seq)), item_seq_len - 1]
    adj, sim = graphs
    aug = graph_augment(adj, users.tolist(), edges_of_user)
    adj_raw, sim_raw = (gcn_forward(model, graph, p, edge_p) for graph in (adj, sim))
    seq, aug_seq = (forward(model, item_seq, item_seq_len, p, attention_p) for _ in range(2))
    aug_raw = gcn_forward(model, aug, p, edge_p)
    civil, foreign = readout(adj, aug, last.tolist(), adj_raw, sampled, published)
    w = agreement(adj_raw[last], aug_raw[last], civil, foreign, item_seq_len, recipe.weight_mean)
    if wanted is None: wanted = torch.normal(recipe.weight_mean, 0.1, size=w.size())
    kl = recipe.shape * cal_kl_1(wanted.sort()[0], w.sort()[0])
    cl = (recipe.contrast * (w * vanilla_loss(aug_seq, adj_raw[last], logit)
                             + (w.max() - w) * vanilla_loss(adj_raw[last], sim_raw[last], logit))).mean()
    mixed = torch.stack((seq, adj_raw[last], sim_raw[last]), dim=0)
    score = F.softmax((torch.matmul(mixed, model.mixer.unsqueeze(0)) * model.score).sum(-1), dim=0).unsqueeze(-1)
    output = (mixed * score).sum(0)
    logits = torch.matmul(output, model.items.weight[1:].transpose(0, 1))
    return {"next_item": F.cross_entropy(logits + 1e-8, pos_items - 1), "contrast": cl, "shape": kl, "w": w}


def padded(log, rows, width=None):
    "users, item_seq, item_seq_len, pos_items of training rows"
    first, end = rows.T
    lengths = end - first
    seq = torch.zeros(len(rows), width or int(lengths.max()), dtype=torch.long)
    for i, (a, b) in enumerate(rows.tolist()): seq[i, :b - a] = log.items[a:b]
    users = torch.searchsorted(log.starts, first.contiguous(), right=True) - 1
    return users, seq, lengths, log.items[end]
