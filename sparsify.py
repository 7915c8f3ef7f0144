"""Make the activations of a dense transformer sparse, in place: ReLU for GELU, then a penalty.

    loss = task + alpha(t) * P        P = mean over FFNs (plus mean over replaced projections)
                                          of the mean over tokens of L_s

    L_s     on                                       formula
    hoyer   activations a                            (sum |a|)^2 / (sum a^2 + eps)     between 1 and F
    l1      activations a                            sum |a|
    gelu_clamp   pre-activations z, when GELU stays  sum (max(z, delta) - delta), delta = -10: pushes z to
                                                     where GELU is nearly zero

alpha rises linearly over the first `sparsity_ramp` of the run (D2DMoE, section 3.1: Hoyer for ViT, l1 for BERT
and GPT-2, the clamp for models that keep GELU).

Attention projections have no hidden neurons to be sparse. Before that penalty each may become an MLP of the same
cost, which is then an MLP like any other. It starts from the largest singular vectors of W (the authors start from
random weights: a relative error of 0.5 to 0.8 after 150 steps on MiniLM, where this begins with 0.3 to 0.55) and
learns, by itself, what the frozen original makes of its inputs,

    loss = |MLP(x) - (W x + b)|^2 / |W x + b|^2 + 1e-3 * progress * hoyer

relative to the original's size, so that one weight of the penalty suits all (the authors take the plain MSE).

Run it on a checkpoint:  python sparsify.py out/base.pt out/sparse.pt --sparsity_weight=1e-3
                         python sparsify.py out/base.pt out/attn.pt --attn_projections=qkvo

    T tokens · D n_embd · F hidden neurons
"""

import torch
import torch.nn as nn

from model import MLP, BadInput, projection_width

LOSSES = ('hoyer', 'l1', 'gelu_clamp')
DELTA = -10.0
PROJECTION_WEIGHT = 1e-3            # of the hoyer penalty while projections are distilled, reached at the end


def relufy(model):
    """ReLU instead of GELU in every MLP, in place."""
    for mlp in model.mlps():
        mlp.act = 'relu'
    model.config.activation = 'relu'
    return model


def sparsity(loss, t):
    """L_s of one MLP, averaged over tokens: t is the MLP's tap, a and z (T, F) -> scalar."""
    if loss == 'hoyer':
        a = t['a'].float().abs()
        return (a.sum(-1) ** 2 / (a.square().sum(-1) + 1e-9)).mean()
    if loss == 'l1':
        return t['a'].float().abs().sum(-1).mean()
    if loss == 'gelu_clamp':
        return (t['z'].float().clamp_min(DELTA) - DELTA).sum(-1).mean()
    raise ValueError(f'sparsity_loss must be one of {", ".join(LOSSES)}, not {loss!r}')


def penalty(model, tap, loss):
    """P: mean over FFNs, plus mean over replaced projections where there are any."""
    ffns = set(model.ffns())
    groups = {True: [], False: []}
    for mlp, t in zip(model.mlps(), tap):
        groups[mlp in ffns].append(sparsity(loss, t))
    return sum(torch.stack(g).mean() for g in groups.values() if g)


def train_loss(model, batch, task_loss, loss, alpha):
    """task + alpha * P of one batch, and what the progress line shows: the share of zero activations."""
    tap = []
    task = task_loss(model, batch, tap)
    with torch.no_grad():
        zeros = torch.stack([(t['a'] == 0).float().mean() for t in tap]).mean()
    total = task if alpha == 0 else task + alpha * penalty(model, tap, loss)
    return total, dict(task=task.detach(), zeros=zeros)


def learn(model, task_loss, loss, weight, ramp):
    """What the sparsify phase trains, and on what: (parameters, loss_fn(batch, progress))."""
    def loss_fn(batch, progress):
        return train_loss(model, batch, task_loss, loss, weight * min(1.0, progress / ramp if ramp else 1.0))
    return model.parameters(), loss_fn


# ---------------------------------------------------------------------------------------------- attention projections

def projections(model, names):
    """[(name, module)] of the projections in `names`, in the order in which a forward pass meets them."""
    return [(f'{i}.{n}', getattr(block.attn, n)) for i, block in enumerate(model.blocks) for n in 'qkvo' if n in names]


@torch.no_grad()
def as_mlp(linear):
    """The MLP of a projection's cost that starts closest to it: v x = relu(v x) - relu(-v x), so its H hidden
    neurons are the H / 2 largest singular vectors of W and their negatives, half of them zero for any x."""
    W, D = linear.weight, linear.weight.shape[1]
    mlp = MLP(D, projection_width(D), 'relu').to(W)
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)                          # W = U diag(S) V
    n = len(mlp.w_in) // 2
    mlp.w_out.zero_()                                            # an odd neuron starts random and adds nothing
    for rows, sign in ((slice(0, n), 1), (slice(n, 2 * n), -1)):
        mlp.w_in[rows] = sign * V[:n] * S[:n, None].sqrt()
        mlp.w_out[rows] = sign * U.T[:n] * S[:n, None].sqrt()
    mlp.b_out.copy_(linear.bias)
    return mlp


def replace_projections(model, names):
    """MLPs of the same cost instead of the projections in `names`, in place. BadInput if some are MLPs already."""
    if model.config.projections:
        raise BadInput(f'--attn_projections={names}: the model\'s {model.config.projections} are MLPs already')
    for block in model.blocks:
        for name in names:
            setattr(block.attn, name, as_mlp(getattr(block.attn, name)))
    model.config.projections = names


class Watched(nn.Module):
    """A projection of the frozen original that writes down what goes in and what comes out."""

    def __init__(self, linear, seen):
        super().__init__()
        self.linear, self.seen = linear, seen

    def forward(self, x):
        y = self.linear(x)
        self.seen.append((x.float(), y.float()))
        return y


def learn_projections(model, original):
    """What the attn phase trains, and on what: (parameters, loss_fn(batch, progress), report(batches, say)).

    `original` is the model before its projections were replaced; it is used up.
    """
    names, students = zip(*projections(model, model.config.projections))
    seen = []
    for block in original.blocks:
        for name in model.config.projections:
            setattr(block.attn, name, Watched(getattr(block.attn, name), seen))

    def errors(batch, tap):
        """The squared relative error of every student, on the original's inputs and outputs."""
        seen.clear()
        with torch.no_grad():
            original.encode(**batch[0])
        return torch.stack([(student(x, tap).float() - y).square().sum() / y.square().sum().clamp_min(1e-9)
                            for student, (x, y) in zip(students, seen)])

    def loss_fn(batch, progress):
        tap = []
        error = errors(batch, tap)
        penalty = torch.stack([sparsity('hoyer', t) for t in tap]).mean()
        zeros = torch.stack([(t['a'] == 0).float().mean() for t in tap]).mean()
        return error.mean() + PROJECTION_WEIGHT * progress * penalty, dict(task=error.mean().detach(), zeros=zeros)

    @torch.no_grad()
    def report(batches, say):
        relative = torch.stack([errors(batch, None) for batch in batches]).mean(0).sqrt().tolist()
        for i in range(0, len(names), len(model.config.projections)):
            say('attn    relative error of ' + '  '.join(
                f'{n} {e:.3f}' for n, e in zip(names[i:i + len(model.config.projections)], relative[i:])))
        return dict(projection_error=dict(zip(names, relative)))

    return [p for student in students for p in student.parameters()], loss_fn, report


# ---------------------------------------------------------------------------------------------- statistics

@torch.no_grad()
def statistics(tap):
    """Per MLP, over the tokens of one forward pass: how sparse the activations are.

    zeros: the share that is exactly 0 (ReLU). below: the share with |a| under 1/10, 1/100 and 1/1000 of the
    token's largest, which says the same of GELU, whose activations are never exactly 0.
    """
    out = []
    for t in tap:
        a = t['a'].abs()
        largest = a.amax(-1, keepdim=True)
        out.append(dict(zeros=(a == 0).float().mean().item(),
                        below=[(a < largest * f).float().mean().item() for f in (0.1, 0.01, 0.001)]))
    return out


if __name__ == '__main__':
    import sys

    import train
    distil = any(arg.startswith('--attn_projections=') for arg in sys.argv)
    train.convert('attn' if distil else 'sparsify', sys.argv[1:])
