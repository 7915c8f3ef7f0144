"""Make the activations of a dense transformer sparse, in place: ReLU for GELU, then a penalty.

    loss = task + alpha(t) * P      P = mean over FFNs (plus mean over replaced projections)
                                        of the mean over tokens of L_s

    L_s          on                                       formula
    hoyer        activations a                            (sum |a|)^2 / (sum a^2 + eps)  in [1, H]
    l1           activations a                            sum |a|
    gelu_clamp   pre-activations z, when GELU stays       sum (max(z, delta) - delta), delta = -10:
                                                          pushes z to where GELU is nearly zero

alpha rises linearly over the first `sparsity_ramp` of the run (D2DMoE, section 3.1: Hoyer for ViT,
l1 for BERT and GPT-2, the clamp for models that keep GELU). With `--distil=s` a share s of the task
is what dense.pt says, not the labels (model.cross_entropy); it is ours, the paper has none. So is
`--lr_end=1`: the learning rate stays up until `adapt` (router.py) lowers it.

Attention projections have no hidden neurons to be sparse. Before that penalty each may become an
MLP of the same cost, which is then an MLP like any other. It starts from the largest singular
vectors of W (the authors start from random weights: a relative error of 0.5 to 0.8 after 150 steps
on MiniLM, where this begins with 0.3 to 0.55) and learns, by itself, what the frozen original makes
of its inputs,

    loss = |MLP(x) - (W x + b)|^2 / |W x + b|^2 + 1e-3 * progress * hoyer

relative to the original's size, so that one weight of the penalty suits all (the authors: MSE).

Heads of fewer dimensions r (ours): a head asks and is asked by q'k, and gives W_o y, y = sum p v.
Of all maps to r dimensions those that change these least on average, with R'R = E[q q'], S'S =
E[k k'] on some batches and U Z V' the SVD of R S', are

    q -> V_r' S q        k -> Z_r^-1 U_r' R k        and the same for the rows of W_o and y,

balanced, so that both learn alike (v and o as they come here lost 3 % in one of two seeds).

Pruning, the control, removes the neurons that do least on some batches and trains on.

    python sparsify.py out/base.pt out/sparse.pt --sparsity_weight=1e-3
    python sparsify.py out/base.pt out/narrow.pt --narrow=0.5
    python sparsify.py out/base.pt out/attn.pt --attn_projections=qkvo

    T tokens · D n_embd · H hidden neurons · n heads of d dimensions, then of r
"""

if __name__ == '__main__':                  # Ctrl-C while torch is being imported ends quietly
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn

from kernel import over_ranks, over_tokens, ranks
from model import MLP, BadInput, projection_width

DELTA = -10.0
PROJECTION_WEIGHT = 1e-3            # of the hoyer penalty at the end of distillation

def sparsity(kind, t):
    """L_s of one MLP, averaged over tokens: t is the MLP's tap, a and z (T, H) -> scalar."""
    # of ReLU: what fires is positive
    if kind == 'hoyer':
        a = t['a'].float()
        return (a.sum(-1) ** 2 / (a.square().sum(-1) + 1e-9)).mean()
    if kind == 'l1':
        return t['a'].float().sum(-1).mean()
    assert kind == 'gelu_clamp', f'sparsity_loss={kind}: must be hoyer, l1 or gelu_clamp'
    return (t['z'].float().clamp_min(DELTA) - DELTA).sum(-1).mean()

def penalty(model, tap, kind):
    """P: mean over FFNs, plus mean over replaced projections where there are any."""
    is_ffn = [mlp in model.ffns() for mlp in model.mlps()]
    groups = [[sparsity(kind, t) for t, ffn in zip(tap, is_ffn) if ffn == wanted]
              for wanted in (True, False)]
    return sum(torch.stack(g).mean() for g in groups if g)

@torch.no_grad()
def zeros(tap):
    """The share of activations that are exactly 0, averaged over MLPs."""
    return torch.stack([1 - t['a'].count_nonzero() / t['a'].numel() for t in tap]).mean()

@torch.no_grad()
def statistics(tap):
    """Per MLP [zeros, below 1/10, below 1/100, below 1/1000 of the token's largest]: shares of the
    activations. The last three say of GELU, never exactly 0, what zeros says of ReLU."""
    out = []
    for t in tap:
        a = t['a'].abs()
        largest = a.amax(-1, keepdim=True)
        small = [a == 0, a < 0.1 * largest, a < 0.01 * largest, a < 0.001 * largest]
        out.append([share.float().mean().item() for share in small])
    return out

@dataclass
class Prune:
    """The control: remove the neurons that do least, equally many in every FFN, and train on."""
    reads, writes = ('base',), 'pruned'
    wanted = 'prune'
    looks = True
    steps: int = 130
    lr: float = 1e-3
    prune: Annotated[float, '0..1'] = 0.0   # share of the neurons to remove; 0: no such phase
    prune_by: Literal['activation', 'output'] = 'activation'     # mean |a|, or |a| |w_out|
    distil: Annotated[float, '0..1'] = 0.0

    @torch.no_grad()
    def prepare(self, model, batches):
        if {len(mlp.w_in) for mlp in model.ffns()} != {model.config.n_hidden}:
            raise BadInput('--prune: FFNs of --init_from have lost neurons already; start from one '
                           'whose FFNs are of one size')
        n = max(1, round((1 - self.prune) * model.config.n_hidden))
        taps = []
        for batch in itertools.islice(batches, 8):
            model.encode(**batch[0], tap=(tap := []))
            taps.append([t['a'].abs().mean(0) for t in tap])
        for mlp, means in zip(model.mlps(), zip(*taps)):
            if mlp in model.ffns():
                does = sum(means) * (mlp.w_out.norm(dim=1) if self.prune_by == 'output' else 1)
                mlp.sort_neurons(does.topk(n).indices.sort().values, [0, n])
        model.config.n_hidden = n

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        return model.loss(batch), {}

@dataclass
class Sparsify:
    """ReLU for GELU, then task loss + alpha(t) * penalty."""
    reads, writes = ('attn', 'narrow', 'halting', 'pruned', 'base'), 'sparse'
    steps: int = 130                    # of dense, too
    lr: float = 1e-3                    # of dense, too
    sparsity_loss: Literal['l1', 'hoyer', 'gelu_clamp'] = 'l1'   # gelu_clamp keeps GELU
    sparsity_weight: float = 2e-3
    sparsity_ramp: Annotated[float, '0..1'] = 0.5   # share of the run over which the weight rises
    distil: Annotated[float, '0..1'] = 0.0  # share of the task learned from dense.pt's soft labels
    lr_end: Annotated[float, '0..1'] = 0.1  # share of the rate left at the end; 1: adapt lowers it

    def prepare(self, model, batches):
        if self.sparsity_loss != 'gelu_clamp' and model.config.activation != 'relu':
            print(f'sparsify {model.config.activation} becomes relu')
            for mlp in model.mlps():
                mlp.act = 'relu'
            model.config.activation = 'relu'

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        tap = []
        task = model.loss(batch, tap)
        log = dict(task=task.detach(), zeros=zeros(tap))
        ramp = min(1.0, progress / self.sparsity_ramp) if self.sparsity_ramp else 1.0
        alpha = self.sparsity_weight * ramp
        cost = penalty(model, tap, self.sparsity_loss)
        return task + alpha * over_tokens(cost, len(tap[0]['x'])), log

# -------------------------------------------------------------------------------------- attention

def closest(A, B, r):
    """Maps (n, r, d) of vectors a and b after which a'b is, on average, as close to what it was as
    r dimensions allow: an SVD between the roots of their second moments A, B (n, d, d), as if a and
    b were independent (Eckart and Young). And the share (n) of its squares that is lost."""
    def root(G):                            # R' R = G
        values, vectors = torch.linalg.eigh(G)
        # a direction that no token took is not quite forgotten
        least = 1e-6 * values.mean(-1, keepdim=True) + 1e-30
        return values.maximum(least).sqrt()[..., None] * vectors.mT

    A, B = root(A), root(B)
    U, S, V = torch.linalg.svd(A @ B.mT)
    lost = S[:, r:].square().sum(-1) / S.square().sum(-1)
    return V[:, :r] @ B, U.mT[:, :r] @ A / S[:, :r, None], lost

def balanced(a, b):
    """a, b (n, r, .) -> the two of the same a.mT @ b in which row i of one is as long as row i of
    the other: otherwise AdamW would hardly move the one and tear at the other."""
    (qa, ra), (qb, rb) = torch.linalg.qr(a.mT), torch.linalg.qr(b.mT)
    U, S, V = torch.linalg.svd(ra @ rb.mT)                       # of (r, r)
    root = S.sqrt()[..., None]
    return root * (qa @ U).mT, root * (V @ qb.mT)

@dataclass
class Narrow:
    """Heads of fewer dimensions: scores, and what heads find, come closest to what they were.

    On some batches. q, k, v, o, the scores and the cache shrink alike; dense products, no router;
    sparsify's steps heal it. Ours, not the paper's."""
    reads, writes = ('halting', 'pruned', 'base'), 'narrow'
    wanted = 'narrow'
    looks = True
    narrow: Annotated[float, '0..1'] = 0.0  # share of its dimensions that a head keeps; 0: all

    def moments(self, model, batches):
        """For each block (3, n, d, d): second moments of every head's queries, keys and what it
        found."""
        (n, d), original = model.config.heads, copy.deepcopy(model).eval()
        found = [torch.zeros(3, n, d, d).double() for _ in model.blocks]

        def add(i, place, x):               # (T, n d)
            x = x.cpu().double().unflatten(-1, (n, d))
            found[i][place] += torch.einsum('tni,tnj->nij', x, x)

        for i, at in enumerate(block.attn for block in original.blocks):
            at.q.register_forward_hook(lambda module, x, y, i=i: add(i, 0, y))
            at.k.register_forward_hook(lambda module, x, y, i=i: add(i, 1, y))
            at.o.register_forward_hook(lambda module, x, y, i=i: add(i, 2, x[0]))
        for batch in itertools.islice(batches, 8):
            original.encode(**batch[0])
        return found

    @torch.no_grad()
    def prepare(self, model, batches):
        c, lost = model.config, []
        n, d = c.heads
        r = min(d, 8 * math.ceil(self.narrow * d / 8))           # blocks of 8, as int8 has
        if c.projections:
            raise BadInput(f'--narrow: its {c.projections} are MLPs already')
        for block, (q, k, y) in zip(model.blocks, self.moments(model, batches)):
            parts = block.attn.q, block.attn.k, block.attn.v
            # (n, d, D + 1), with the bias, as a weight of the number 1
            new = [torch.cat([p.weight, p.bias[:, None]], 1).cpu().double().unflatten(0, (n, d))
                   for p in parts]
            o = block.attn.o.weight.T.cpu().double().unflatten(0, (n, d))        # (n, d, D)
            to_q, to_k, lost_qk = closest(q, k, r)
            to_o, to_v, lost_vo = closest(o @ o.mT, y, r)
            # attention divides by the root of the new size
            new[:2] = balanced((r / d) ** 0.5 * to_q @ new[0], to_k @ new[1])
            new[2], o = balanced(to_v @ new[2], to_o @ o)
            for p, t in zip(parts, new):
                t = t.flatten(0, 1).to(p.weight)
                p.weight, p.bias = (nn.Parameter(x.contiguous()) for x in (t[:, :-1], t[:, -1]))
            o = o.flatten(0, 1).T.contiguous()
            block.attn.o.weight = nn.Parameter(o.to(block.attn.o.weight))
            lost.append(torch.stack([lost_qk, lost_vo], -1))
        c.head_dim = r
        qk, vo = torch.cat(lost).mean(0).tolist()
        print(f'narrow   {r} of {d} dimensions a head: {qk:.1%} of the scores, {vo:.1%} of what '
              'heads find are lost, in squares')
        return dict(lost=[qk, vo])

@torch.no_grad()
def as_mlp(linear):
    """The MLP of a projection's cost that starts closest to it: v x = relu(v x) - relu(-v x), so
    its H hidden neurons are the H / 2 largest singular vectors of W and their negatives."""
    W, D = linear.weight, linear.weight.shape[1]
    mlp = MLP(D, projection_width(D), 'relu').to(W)
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)   # W = U diag(S) V
    n = len(mlp.w_in) // 2
    # an odd neuron starts random and adds nothing
    mlp.w_out.zero_()
    v, u = V[:n] * S[:n, None].sqrt(), U.T[:n] * S[:n, None].sqrt()
    mlp.w_in[:2 * n], mlp.w_out[:2 * n] = torch.cat([v, -v]), torch.cat([u, -u])
    mlp.b_out.copy_(linear.bias)
    return mlp

@dataclass
class Distil:
    """MLPs of the same cost instead of attention projections, each distilled by itself."""
    reads, writes = ('halting', 'pruned', 'base'), 'attn'
    wanted = 'attn_projections'
    steps: int = 150
    lr: float = 1e-3
    attn_projections: Annotated[str, 'letters of qkvo'] = ''     # which become MLPs; '' = none

    def prepare(self, model, batches):
        names, self.seen = self.attn_projections, []
        if model.config.projections:
            raise BadInput(f'its {model.config.projections} are MLPs already: begin with a model '
                           'that has none')
        if model.config.head_dim:
            raise BadInput('--attn_projections: its heads are narrow; begin with whole ones')
        self.original, self.students = copy.deepcopy(model).eval(), {}

        # what goes into a projection of the frozen original, and what comes out
        def watch(projection, inputs, y):
            self.seen.append((inputs[0].float(), y.float()))

        # in the order in which a forward pass meets them
        for i, (block, original) in enumerate(zip(model.blocks, self.original.blocks)):
            for name in (name for name in 'qkvo' if name in names):
                getattr(original.attn, name).register_forward_hook(watch)
                self.students[f'{i}.{name}'] = as_mlp(getattr(block.attn, name))
                setattr(block.attn, name, self.students[f'{i}.{name}'])
        model.config.projections = names

    def parameters(self, model):
        return [p for student in self.students.values() for p in student.parameters()]

    def errors(self, batch, tap=None):
        """The squared relative error of each student on the original's inputs and outputs."""
        self.seen.clear()
        with torch.no_grad():
            self.original.encode(**batch[0])
        out = []
        for student, (x, y) in zip(self.students.values(), self.seen):
            difference = (student(x, tap).float() - y).square().sum()
            # of all ranks: the ratio of sums
            whole = over_ranks(y.square().sum()) / ranks()[1]
            out.append(difference / whole.clamp_min(1e-9))
        return torch.stack(out)

    def loss(self, model, batch, progress):
        tap = []
        error = self.errors(batch, tap).mean()
        hoyer = torch.stack([sparsity('hoyer', t) for t in tap]).mean()
        log = dict(task=error.detach(), zeros=zeros(tap))
        return error + PROJECTION_WEIGHT * progress * over_tokens(hoyer, len(tap[0]['x'])), log

    @torch.no_grad()
    def report(self, model, batches):
        """The relative error of each, on held-out batches."""
        relative = torch.stack([self.errors(batch) for batch in batches]).mean(0).sqrt().tolist()
        found = dict(zip(self.students, relative))
        for i in range(len(model.blocks)):
            print(f'attn     relative error of block {i}: ' + '  '.join(
                f'{name} {found[f"{i}.{name}"]:.3f}' for name in self.attn_projections))
        return dict(projection_error=found)

if __name__ == '__main__':
    import sys

    import train
    optional = dict(prune='--prune=', narrow='--narrow=', attn='--attn_projections=')
    asked = (name for name, option in optional.items() if option in ' '.join(sys.argv))
    train.convert(next(asked, 'sparsify'))
