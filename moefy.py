"""Group the neurons of every MLP into experts of equal size, and sort the weights in place.

Neurons that fire together should live together, so that a token finds what it needs in few experts.
The paper (and MoEfication before it) clusters the L2-normalised rows of W_in at equal sizes:

    minimise  J = sum over neurons i of |x_i - c_k(i)|^2,  c_k the mean of cluster k, sizes given

With fixed sizes J = sum |x_i|^2 - sum_k |S_k|^2 / n_k, where S_k is the sum of cluster k's rows, so
a swap of i in A with j in B lowers J by

    2 (x_j - x_i) . (S_A / n_A - S_B / n_B) + |x_i - x_j|^2 (1/n_A + 1/n_B)

All of it are products of rows, so the Gram matrix G = x x^T is all we take. We alternate balanced
assignment and means until it stalls, then swap the best disjoint pairs until no swap of two neurons
lowers J.

`coactivation` is MoEfication's graph: between i and j an edge of as much weight as there are tokens
on which both fire, cut into equal parts with the least weight between them. Let A (H, T) be 1 where
a neuron fires. The edge weighs A_i . A_j, so the weight within cluster k is, over its pairs,

    sum_{i<j in k} A_i . A_j = (|S_k|^2 - sum_{i in k} |A_i|^2) / 2,   S_k the sum of k's rows of A

The cut is the weight of all edges, a constant, minus what lies within clusters: const - sum_k
|S_k|^2 / 2. At n_k = s the J of the rows of A is const - sum_k |S_k|^2 / s. So the least cut *is*
balanced k-means on the raw rows of A, and its G is the graph itself: no other partitioner needed.

Learned masks (Mixture-of-Masks, ACL 2025) take the place of splits and penalty: K masks over the
neurons, 1 for all at first, each a sample of a hard concrete distribution (Louizos et al. 2018),

    z = clip(s (zeta - gamma) + gamma, 0, 1),  s = sigmoid((log u - log(1 - u) + log alpha) / beta)

of which each token takes those that its router likes best, combined by max, learned with the task
towards a share of neurons by two multipliers, l1 (share - t) + l2 (share - t)^2. In the end they
are 0 or 1: the neurons of the same masks become an expert, and those of none leave the weights.

A new split is a function (mlp, n_experts, seed, fires) -> the cluster of every neuron, and its name
in SPLITS. fires (T, H) is None unless the function says `looks = True`.

    python moefy.py out/sparse.pt out/moe.pt --n_experts=64

    D n_embd · H hidden neurons · E experts · n_k size of expert k · T tokens
"""

if __name__ == '__main__':                  # Ctrl-C while torch is being imported ends quietly
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
import math
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernel import linear, over_tokens, shared_out
from model import BadInput, n_tokens
from router import Router

TOKENS = 8192                           # that tell which neurons fire together

def expert_sizes(n_hidden, n_experts):
    """Sizes as equal as they get, the larger ones first: they sum to n_hidden."""
    if not 1 <= n_experts <= n_hidden:
        raise BadInput(f'--n_experts={n_experts}: must be between 1 and the {n_hidden} neurons of '
                       'an MLP')
    small, larger = divmod(n_hidden, n_experts)
    return torch.tensor([small + 1] * larger + [small] * (n_experts - larger))

def within(gram, cluster, n_experts):
    """x_i . S_k (H, E) and |S_k|^2 (E), where S_k is the sum of the rows of cluster k."""
    member = F.one_hot(cluster, n_experts).to(gram)
    near = gram @ member
    return near, (near * member).sum(0)

def balanced_assignment(affinity, sizes):
    """Greedy assignment to clusters of given sizes: affinity (H, E) -> cluster (H,).

    In rounds: everyone still free applies to the best cluster with room, which keeps the best.
    """
    H, E = affinity.shape
    room, cluster = sizes.clone(), torch.full((H,), -1)
    free = torch.arange(H)
    while len(free):
        value, wish = affinity[free].masked_fill(room == 0, -float('inf')).max(1)
        order = value.argsort(descending=True, stable=True)
        # by cluster, the best applicant first
        order = order[wish[order].argsort(stable=True)]
        applied = wish[order].bincount(minlength=E)
        rank = torch.arange(len(order)) - (applied.cumsum(0) - applied)[wish[order]]
        taken = order[rank < room[wish[order]]]
        cluster[free[taken]] = wish[taken]
        room -= wish[taken].bincount(minlength=E)
        free = free[cluster[free] < 0]
    return cluster

def swap_until_optimal(gram, cluster, sizes):
    """Swap pairs of neurons until none lowers J: best pairs first, one swap a cluster and round."""
    distance = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram                    # (H, H)
    near, inverse = within(gram, cluster, len(sizes))[0], 1.0 / sizes
    while True:
        # x_i . S_k / n_k, with k the cluster of j
        near_j = (near * inverse)[:, cluster]                                           # (H, H)
        own, half = near_j.diagonal(), 0.5 * inverse[cluster]
        # by how much a swap of i and j lowers J / 2
        gain = distance * (half[:, None] + half)
        gain += near_j.T
        gain += near_j
        gain -= own[:, None] + own
        gain[cluster[:, None] == cluster] = 0
        best, partner = gain.max(1)
        touched = set()
        # what is above rounding
        for i in best.argsort(descending=True)[:(best > 1e-6 * distance.max()).sum()].tolist():
            j = partner[i].item()
            a, b = cluster[i].item(), cluster[j].item()
            if not touched & {a, b}:
                touched |= {a, b}
                cluster[i], cluster[j] = b, a
                change = gram[j] - gram[i]
                near[:, a] += change
                near[:, b] -= change
        if not touched:
            return cluster

def balanced_kmeans(gram, n_experts, seed=0, iterations=20):
    """Clusters of (nearly) equal size, locally optimal under swaps, of rows of which only the
    products matter: gram (H, H) = x @ x.T -> cluster (H,)."""
    sizes, diagonal = expert_sizes(len(gram), n_experts), gram.diagonal()
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(gram), generator=generator)[:n_experts]
    near, squares, counts = gram[:, first], diagonal[first], torch.ones(n_experts)
    best, best_j = None, float('inf')
    for _ in range(iterations):
        # the nearest centre has the largest
        affinity = near / counts - 0.5 * squares / counts ** 2
        cluster = balanced_assignment(affinity, sizes)
        near, squares = within(gram, cluster, n_experts)
        counts, j = sizes, (diagonal.sum() - (squares / sizes).sum()).item()
        if j >= best_j:
            break
        best, best_j = cluster, j
    return swap_until_optimal(gram, best, sizes)

def kmeans(mlp, n_experts, seed=0, fires=None):
    """The paper's: balanced k-means on the normalised rows of w_in, what a neuron listens to, not
    how loudly -> cluster (H,)."""
    x = F.normalize(mlp.w_in.detach().float().cpu(), dim=-1)
    return balanced_kmeans(x @ x.T, n_experts, seed)

def coactivation(mlp, n_experts, seed=0, fires=None):
    """MoEfication's graph, cut into equal parts: fires (T, H) -> cluster (H,)."""
    return balanced_kmeans(together(fires), n_experts, seed)

def together(fires):
    """On how many tokens two neurons both fire: (T, H) of 0 and 1 -> (H, H)."""
    return sum(part.T @ part for part in (rows.float() for rows in fires.split(1024)))

def deal(mlp, n_experts, seed=0, fires=None):
    """The control: the same sizes, neurons dealt at random -> cluster (H,)."""
    labels = torch.arange(n_experts).repeat_interleave(expert_sizes(len(mlp.w_in), n_experts))
    generator = torch.Generator().manual_seed(seed)
    return labels[torch.randperm(len(labels), generator=generator).argsort()]

coactivation.looks = True               # else fires is None
SPLITS = dict(kmeans=kmeans, coactivation=coactivation, random=deal)

def into_experts(mlp, n_experts, split='kmeans', seed=0, fires=None):
    """What MLP.sort_neurons needs to sort an MLP's neurons into experts: order and offsets."""
    cluster = SPLITS[split](mlp, n_experts, seed, fires)
    offsets = F.pad(cluster.bincount(minlength=n_experts).cumsum(0), (1, 0))
    return cluster.argsort(stable=True), offsets

@torch.no_grad()
def watch(model, batches):
    """Which neurons fire on the first TOKENS tokens: (T, H) uint8 of every MLP."""
    seen, n = [[] for _ in model.mlps()], 0
    while n < TOKENS:
        tap = []
        model.encode(**next(batches)[0], tap=tap)
        for parts, t in zip(seen, tap):
            parts.append((t['a'] > 0).byte().cpu())
        n += len(tap[0]['a'])
    return [torch.cat(parts) for parts in seen]

@dataclass
class Moefy:
    """Sort the neurons of every MLP into experts: the output stays what it was."""
    reads, writes = ('sparse',), 'moe'
    n_experts: Annotated[int, '> 0'] = 128      # of an FFN; those of a projection are as large
    expert_size: int = 0                # neurons an expert, instead of n_experts
    split: Annotated[str, SPLITS] = 'kmeans'

    @property
    def looks(self):
        return getattr(SPLITS[self.split], 'looks', False)

    @torch.no_grad()
    def prepare(self, model, batches):
        mlps, began = model.mlps(), time.time()
        fires = watch(model, batches) if self.looks else [None] * len(mlps)

        def job(i):
            H = len(mlps[i].w_in)
            n = max(1, H // self.expert_size) if self.expert_size else self.n_experts
            # those of a replaced projection, which is narrower, are as large as those of FFNs
            if mlps[i] not in model.ffns() and not self.expert_size:
                n = max(1, n * H // model.config.n_hidden)
            found = into_experts(mlps[i], n, self.split, self.seed, fires[i])
            left = (time.time() - began) / (i + 1) * (len(mlps) - i - 1)
            print(f'moefy    mlp {i + 1}/{len(mlps)}  {n} experts  {left:.0f} s left', flush=True)
            return found

        for mlp, found in zip(mlps, shared_out(job, len(mlps))):
            mlp.sort_neurons(*found)
        model.config.n_experts = [len(mlp.offsets) - 1 for mlp in mlps]

# --------------------------------------------------------------------------------- learned masks

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1    # hard concrete (Louizos et al. 2018)
ALPHA = 3.0                             # log alpha at the start: all masks are ones
TRAVEL = 13                             # as far as log alpha could move at a constant rate
BINARY = 0.8                            # share of the run after which masks are 0 or 1, and stay

class SoftMasks(nn.Module):
    """K masks over an MLP's neurons while they are being learned, in the place of its router: every
    neuron is an expert, run as much as the token's masks say."""
    rule, rho = 'soft', None

    def __init__(self, mlp, n_masks, chosen, speed):
        super().__init__()
        H, D = mlp.w_in.shape
        self.w = nn.Parameter(torch.randn(n_masks, D) * 0.02)
        self.alpha = nn.Parameter(torch.full((n_masks, H), ALPHA / speed))
        self.chosen, self.speed, self.binary, self.density = chosen, speed, False, None

    def forward(self, x):               # (T, D) -> (T, K), (T, H)
        p = linear(x, self.w).float().softmax(-1)
        return p, self.choose(p)

    def values(self):
        """The masks (K, H), and how likely each value is not 0."""
        log_alpha = self.speed * self.alpha
        if self.binary:
            z = (stretched(log_alpha.sigmoid()) >= 0.5).float()
            return z, z
        u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
        z = stretched(((u.log() - (1 - u).log() + log_alpha) / BETA).sigmoid())
        return z, (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()

    def choose(self, p):                # (T, K) -> (T, H)
        best = p.topk(self.chosen, -1)
        # 1 forward, the probability backward
        gates = 1 + best.values - best.values.detach()           # (T, chosen)
        z, likely = self.values()
        self.density = union(gates, likely, best.indices).mean()
        return union(gates, z, best.indices)

def stretched(s):
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

def union(gates, masks, indices):
    """The largest of the chosen masks: gates, indices (T, k), masks (K, H) -> (T, H)."""
    parts = [gates[:, i, None] * masks[indices[:, i]] for i in range(gates.shape[1])]
    return functools.reduce(torch.maximum, parts)

@dataclass
class LearnMasks:
    """Mixture-of-Masks: learned masks over neurons, of which every token takes some."""
    reads, writes = ('base',), 'masks'
    wanted = 'n_masks'
    steps: int = 130
    lr: float = 1e-3
    n_masks: Annotated[int, '0..8'] = 0         # of an FFN; 0: no such phase
    masks_chosen: Annotated[int, '> 0'] = 1     # by each token
    mask_ratio: Annotated[float, '0..1'] = 0.3  # share of the neurons to run
    mask_ramp: Annotated[float, '0..1'] = 0.5   # share of the run over which it falls from 1
    mask_climb: float = 1.0             # speed of the multipliers over that of log alpha
    distil: Annotated[float, '0..1'] = 0.0

    @property
    def speed(self):                    # of log alpha and the multipliers, in learning rates
        return TRAVEL / (self.steps * self.lr or 1)

    def prepare(self, model, batches):
        if self.masks_chosen > self.n_masks:
            raise BadInput(f'--masks_chosen={self.masks_chosen}: at most --n_masks={self.n_masks}')
        if model.config.projections:
            raise BadInput('learned masks are for FFNs; this model has projections that are MLPs')
        for mlp in model.ffns():
            mlp.router = SoftMasks(mlp, self.n_masks, self.masks_chosen, self.speed)
            mlp.offsets = torch.arange(len(mlp.w_in) + 1, dtype=torch.int32)
        model.multipliers = nn.Parameter(torch.zeros(2))

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        routers = [mlp.router for mlp in model.ffns()]
        for router in routers:
            router.binary = progress > BINARY
        task = model.loss(batch)
        log = dict(task=task.detach())
        if progress > BINARY:
            return task, log
        ramp = min(1.0, progress / self.mask_ramp) if self.mask_ramp else 1.0
        density = torch.stack([r.density for r in routers]).mean()
        density = over_tokens(density, n_tokens(batch[0]))
        over, log['experts'] = density - 1 + ramp * (1 - self.mask_ratio), density.detach()
        # the multipliers climb where everything else descends
        now = model.multipliers.detach()
        linear_, square = self.mask_climb * self.speed * now + 1e-3 * (now - model.multipliers)
        return task + linear_ * over + square * over ** 2, log

    @torch.no_grad()
    def finish(self, model):
        """Neurons of the same masks become an expert, those of none go. Returns for every FFN how
        many neurons are shared, token-specific and redundant."""
        del model.multipliers
        found, c = [], model.config
        for i, mlp in enumerate(model.ffns()):
            soft, H = mlp.router, len(mlp.w_in)
            soft.binary = True
            masks = soft.values()[0].bool().T        # (H, K)
            patterns, cluster = masks.unique(dim=0, return_inverse=True)
            order, sizes = cluster.argsort(stable=True), cluster.bincount()
            if not patterns[0].any():   # the first, if it is there
                order, sizes, patterns = order[sizes[0]:], sizes[1:], patterns[1:]
            mlp.sort_neurons(order, F.pad(sizes.cumsum(0), (1, 0)))
            mlp.router = Router('masks', mlp, patterns.T.contiguous(), 0)
            mlp.router.net.w.copy_(soft.w)
            shared = int(masks.all(1).sum())
            found.append((shared, len(mlp.w_in) - shared, H - len(mlp.w_in)))
            print(f'masks    ffn {i}: {shared} shared, {found[-1][1]} token-specific, '
                  f'{found[-1][2]} redundant')
        c.router_loss, c.router_width = 'masks', 0
        c.n_experts = [len(mlp.offsets) - 1 for mlp in model.mlps()]
        c.n_outputs = [self.n_masks] * len(c.n_experts)
        return dict(neurons=found)

if __name__ == '__main__':
    import train
    train.convert('moefy')
