"""Make the activations of a dense transformer sparse, in place: ReLU for GELU, then a penalty.

    loss = task + alpha(t) * P        P = mean over FFNs (plus mean over replaced projections)
                                          of the mean over tokens of L_s

    L_s     on                                       formula
    hoyer   activations a                            (sum |a|)^2 / (sum a^2 + eps)     between 1 and F
    l1      activations a                            sum |a|
    clamp   pre-activations z, when GELU stays       sum (max(z, delta) - delta), delta = -10: pushes z to
                                                     where GELU is nearly zero

alpha rises linearly over the first `sparsity_ramp` of the run (D2DMoE, section 3.1: Hoyer for ViT, l1 for BERT
and GPT-2, the clamp for models that keep GELU).

Run it on a checkpoint:  python sparsify.py out/base.pt out/sparse.pt --sparsity_weight=1e-3

    T tokens · D n_embd · F hidden neurons
"""

import torch

LOSSES = ('hoyer', 'l1', 'gelu_clamp')
DELTA = -10.0


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
    train.convert('sparsify', sys.argv[1:])
