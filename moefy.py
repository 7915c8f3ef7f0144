"""Group the neurons of every MLP into experts of equal size, and sort the weights in place.

Neurons that fire together should live together, so that a token finds what it needs in few experts. The
paper (and MoEfication before it) clusters the L2-normalised rows of W_in under a size constraint:

    minimise  J = sum over neurons i of |x_i - c_k(i)|^2,  c_k the mean of cluster k, sizes given

With fixed sizes J = sum |x_i|^2 - sum_k |S_k|^2 / n_k, where S_k is the sum of cluster k's rows, so a swap of
i in A with j in B lowers J by  2 (x_j - x_i) . (S_A / n_A - S_B / n_B) + |x_i - x_j|^2 (1/n_A + 1/n_B):
a matrix over all pairs, from two matrix products. We alternate balanced assignment and means until it stalls,
then swap the best disjoint pairs until no swap of two neurons lowers J.

Run it on a checkpoint:  python moefy.py out/sparse.pt out/moe.pt --n_experts=64

    D n_embd · F hidden neurons · E experts · n_k size of expert k
"""

import time

import torch
import torch.nn.functional as F

from model import BadInput

SPLITS = ('kmeans', 'random')


def expert_sizes(n_hidden, n_experts):
    """Sizes as equal as they get, the larger ones first: they sum to n_hidden."""
    if not 1 <= n_experts <= n_hidden:
        raise BadInput(f'--n_experts={n_experts}: must be between 1 and the {n_hidden} neurons of an MLP')
    small, larger = divmod(n_hidden, n_experts)
    return torch.tensor([small + 1] * larger + [small] * (n_experts - larger))


def objective(x, cluster, n_experts):
    """J: the sum of squared distances to the cluster means; x (F, D), cluster (F,) in 0..E-1."""
    sums = x.new_zeros(n_experts, x.shape[1]).index_add_(0, cluster, x)
    counts = cluster.bincount(minlength=n_experts).clamp_min(1)
    return (x.square().sum() - (sums.square().sum(1) / counts).sum()).item()


def balanced_assignment(affinity, sizes):
    """Greedy assignment to clusters of given sizes: affinity (F, E) -> cluster (F,).

    In rounds: everyone still free applies to the best cluster with room, and each cluster keeps the best.
    """
    F_, E = affinity.shape
    room, cluster = sizes.clone(), torch.full((F_,), -1)
    free = torch.arange(F_)
    while len(free):
        value, wish = affinity[free].masked_fill(room == 0, -float('inf')).max(1)
        order = value.argsort(descending=True, stable=True)
        order = order[wish[order].argsort(stable=True)]          # by cluster, the best applicant first
        applied = wish[order].bincount(minlength=E)
        rank = torch.arange(len(order)) - (applied.cumsum(0) - applied)[wish[order]]
        taken = order[rank < room[wish[order]]]
        cluster[free[taken]] = wish[taken]
        room -= wish[taken].bincount(minlength=E)
        free = free[cluster[free] < 0]
    return cluster


def swap_until_optimal(x, cluster, sizes):
    """Swap pairs of neurons until none lowers J: best pairs first, at most one swap a cluster and round."""
    inverse = 1.0 / sizes.float()
    squares = x.square().sum(1)
    distance = torch.addmm(squares[:, None] + squares, x, x.T, alpha=-2)                # |x_i - x_j|^2  (F, F)
    sums = x.new_zeros(len(sizes), x.shape[1]).index_add_(0, cluster, x)
    best, partner = x.new_zeros(len(x)), torch.zeros(len(x), dtype=torch.long)

    def best_swaps(rows, columns):
        """For each of `rows` the best partner among `columns`, and by how much the swap lowers J / 2."""
        gains, partners = [], []
        half = 0.5 * inverse[cluster]
        for i in rows.split(256):                                # a block of the (F, F) pairs stays in cache
            gain = distance[i].index_select(1, columns).mul_(half[i][:, None] + half[columns])
            gain += near.T.index_select(0, cluster[i]).index_select(1, columns)
            gain += near[i].index_select(1, cluster[columns])
            gain -= own[i][:, None] + own[columns]
            value, at = gain.masked_fill_(cluster[i][:, None] == cluster[columns], 0).max(1)
            gains.append(value)
            partners.append(columns[at])
        return torch.cat(gains), torch.cat(partners)

    everyone = torch.arange(len(x))
    changed = torch.ones(len(sizes), dtype=torch.bool)           # clusters that the last round touched
    while changed.any():
        near = (x @ sums.T) * inverse                            # x_i . S_k / n_k  (F, E)
        own = near[everyone, cluster]
        moved = changed[cluster]
        stale = moved | changed[cluster[partner]]                # all their pairs must be looked at again
        best[stale], partner[stale] = best_swaps(everyone[stale], everyone)
        if not stale.all():                                      # of the others, only pairs with what moved
            value, at = best_swaps(everyone[~stale], everyone[moved])
            better = value > best[~stale]
            rows = everyone[~stale][better]
            best[rows], partner[rows] = value[better], at[better]
        changed = torch.zeros_like(changed)
        promising = best.argsort(descending=True)[:(best > 1e-6).sum()]                 # above rounding
        pairs = torch.stack([promising, partner[promising], cluster[promising], cluster[partner[promising]]])
        touched = set()
        for i, j, a, b in pairs.T.tolist():
            if a not in touched and b not in touched:
                touched |= {a, b}
                cluster[i], cluster[j] = b, a
                sums[a] += x[j] - x[i]
                sums[b] += x[i] - x[j]
        changed[list(touched)] = True
    return cluster


def balanced_kmeans(x, n_experts, seed=0, iterations=20):
    """Clusters of (nearly) equal size, locally optimal under swaps: x (F, D) -> cluster (F,). Deterministic."""
    x = x.detach().float().cpu()
    sizes = expert_sizes(len(x), n_experts)
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:n_experts]]
    best, best_j = None, float('inf')
    for _ in range(iterations):
        affinity = x @ centres.T - 0.5 * centres.square().sum(1)  # the nearest centre has the largest
        cluster = balanced_assignment(affinity, sizes)
        j = objective(x, cluster, n_experts)
        if j >= best_j:
            break
        best, best_j = cluster, j
        sums = torch.zeros(n_experts, x.shape[1]).index_add_(0, cluster, x)
        centres = sums / sizes[:, None]
    return swap_until_optimal(x, best, sizes)


def random_split(n_hidden, n_experts, seed=0):
    """The control: the same sizes, neurons dealt at random."""
    order = torch.randperm(n_hidden, generator=torch.Generator().manual_seed(seed))
    cluster = torch.empty(n_hidden, dtype=torch.long)
    cluster[order] = torch.arange(n_experts).repeat_interleave(expert_sizes(n_hidden, n_experts))
    return cluster


def split_mlp(mlp, n_experts, split='kmeans', seed=0):
    """Sort one MLP's neurons into experts, in place. Returns (J of the split, J of a random one)."""
    x = F.normalize(mlp.w_in.detach().float().cpu(), dim=-1)     # what a neuron listens to, not how loudly
    dealt = random_split(len(x), n_experts, seed)
    if split == 'kmeans':
        cluster = balanced_kmeans(x, n_experts, seed)
    elif split == 'random':
        cluster = dealt
    else:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, not {split!r}')
    sizes = expert_sizes(len(x), n_experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    order = cluster.argsort(stable=True).to(mlp.w_in.device)
    mlp.sort_neurons(order, offsets)
    return objective(x, cluster, n_experts), objective(x, dealt, n_experts)


@torch.no_grad()
def split_model(model, n_experts, expert_size=0, split='kmeans', seed=0, say=print):
    """Sort the neurons of every MLP into experts, and make sure that the model's output stays what it was.

    expert_size, where it is not 0, says how many neurons an expert has, instead of n_experts. Returns the
    objective of each MLP's split, that of a random one, and the largest change of the output.
    """
    idx = torch.arange(min(64, model.config.block_size), device=model.wte.weight.device)[None]
    idx, scores, start, mlps = idx % model.config.vocab_size, [], time.time(), model.mlps()
    ffns = set(model.ffns())
    before = model(idx)
    for i, mlp in enumerate(mlps):
        n_hidden = len(mlp.w_in)
        n = max(1, n_hidden // expert_size) if expert_size else n_experts
        if mlp not in ffns:                                      # a replaced projection, narrower than the FFNs
            n = min(n, n_hidden)
        scores.append(split_mlp(mlp, n, split, seed))
        left = (time.time() - start) / (i + 1) * (len(mlps) - i - 1)
        say(f'moefy   mlp {i + 1}/{len(mlps)}  {n} experts  objective {scores[-1][0]:.1f} '
            f'(random split {scores[-1][1]:.1f})  {left:.0f} s left', flush=True)
    model.add_experts([len(mlp.offsets) - 1 for mlp in mlps])
    worst = (model(idx) - before).abs().max().item()
    if not worst <= 1e-4 * max(1.0, before.abs().max().item()):
        raise RuntimeError(f'sorting neurons changed the output by {worst:.2e}: nothing was written')
    say(f'moefy   output unchanged to {worst:.1e}')
    return dict(objective=[a for a, _ in scores], objective_random=[b for _, b in scores], output_change=worst)


if __name__ == '__main__':
    import sys

    import train
    train.convert('moefy', sys.argv[1:])
