"""Which experts should a token run? The router, its rules, its targets and its losses.

A router is two small matrices that look at a token before its FFN does and predict how much each expert
will contribute. With a = act(x W_in^T + b) the hidden activations and S_r the neurons of output r,

    out_r = a[S_r] W_out[S_r]        what expert r adds to the residual stream
    |out_r|^2 = a_r^T G_r a_r        with the Gram matrix G_r = W_out[S_r] W_out[S_r]^T    (s, s)

so the exact norms need no (T, R, D) tensor. A rule then turns the scores of a token into the set it runs.

    router   score                               trained against                        usual rule
    norm     |W2 relu(W1 x)|                     MSE on |out_r| / RMS   (D2DMoE, eq. 5) dynk
    active   sigmoid(W2 relu(W1 x + b1) + b2)    BCE on |out_r| >= 5 % of the largest   threshold
    share    sigmoid(W2 tanh(W1 x / |x|))        BCE on the share of activation         topk
                                                 (MoEfication, as its authors train it)
    oracle   |out_r| itself                      nothing: the ceiling of every router   dynk

Run it on a checkpoint:  python router.py out/moe.pt out/d2dmoe.pt --router_loss=norm

    T tokens (batch and sequence flattened) · D n_embd · F hidden neurons · E experts (slices)
    R router outputs (= E without `owners`) · W router width · s neurons of the largest expert
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernel import linear

LOSSES = ('norm', 'active', 'share')
USUAL_RULE = dict(norm='dynk', active='threshold', share='topk', oracle='dynk')
RULES = ('dynk', 'threshold', 'topk', 'cumulative')


class Router(nn.Module):
    """Scores >= 0 for every router output: x (T, D) -> (T, R). `loss` names the row of the table above."""

    def __init__(self, n_embd, n_outputs, width, loss='norm'):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f'router_loss must be one of {", ".join(LOSSES)}, not {loss!r}')
        self.loss = loss
        width = n_outputs if loss == 'share' else width         # MoEfication's router is D -> E -> E
        self.w1 = nn.Parameter(torch.randn(width, n_embd) * n_embd ** -0.5)
        self.w2 = nn.Parameter(torch.randn(n_outputs, width) * width ** -0.5)
        self.b1 = nn.Parameter(torch.zeros(width)) if loss == 'active' else None
        self.b2 = nn.Parameter(torch.zeros(n_outputs)) if loss == 'active' else None
        self.register_buffer('scale', torch.zeros(()))           # RMS of the norms in this layer; 0 = not seen yet

    def logits(self, x):                                         # (T, D) -> (T, R)
        if self.loss == 'share':
            return linear(torch.tanh(linear(F.normalize(x, dim=-1), self.w1)), self.w2)
        return linear(F.relu(linear(x, self.w1, self.b1)), self.w2, self.b2)

    def forward(self, x):
        z = self.logits(x)
        return z.abs() if self.loss == 'norm' else z.sigmoid()

    def init_share(self, w_in, offsets, owners=None):
        """MoEfication's start: first layer = the cluster centres, second = the identity."""
        index, valid = neuron_index(offsets, owners)
        rows = F.normalize(w_in, dim=-1)[index] * valid[..., None]                      # (R, s, D)
        with torch.no_grad():
            self.w1.copy_(F.normalize(rows.sum(1), dim=-1))
            self.w2.copy_(torch.eye(self.w2.shape[0]))


def select(score, rule, tau=0.0, k=None, floor=0.0):
    """The outputs each token runs: score (T, R) >= 0 -> bool (T, R).

    dynk        score >= tau * the token's largest and score > floor   (D2DMoE; its authors' code writes 1 - tau
                and has no floor: a token whose FFN is silent, all norms 0, runs everything there)
    threshold   score >= tau
    topk        the k largest, ties broken by torch.topk
    cumulative  the smallest set whose scores reach the share tau of the token's sum

    A row with a NaN score runs nothing under dynk, threshold and cumulative.
    """
    if rule == 'dynk':
        return (score >= tau * score.amax(-1, keepdim=True)) & (score > floor)
    if rule == 'threshold':
        return score >= tau
    if rule == 'topk':
        k = max(0, min(int(k), score.shape[-1]))
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(k, -1).indices, True)
    if rule == 'cumulative':
        ordered, index = score.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered                    # what the larger ones already reach
        chosen = before < tau * ordered.sum(-1, keepdim=True)
        if tau >= 1:                                             # 1 means all: a sum in floats may fall short
            chosen = ordered == ordered
        return torch.zeros_like(chosen).scatter_(-1, index, chosen)
    raise ValueError(f'rule must be one of {", ".join(RULES)}, not {rule!r}')


def to_slices(chosen, owners):
    """Router outputs -> slices of the hidden dimension: a slice runs if any chosen output owns it.

    chosen (T, R) bool, owners (E, R)^T = (R, E) bool or None -> mask (T, E) bool
    """
    return chosen if owners is None else (chosen.float() @ owners.float()) > 0


def neuron_index(offsets, owners=None):
    """The neurons of every router output, padded to the largest: index (R, s) and valid (R, s)."""
    offsets = offsets.tolist()
    slices = [range(a, b) for a, b in zip(offsets, offsets[1:])]
    if owners is not None:
        slices = [[i for e, own in enumerate(row) if own for i in slices[e]] for row in owners.tolist()]
    s = max(1, max(len(r) for r in slices))
    index, valid = torch.zeros(len(slices), s, dtype=torch.long), torch.zeros(len(slices), s, dtype=torch.bool)
    for r, neurons in enumerate(slices):
        index[r, :len(neurons)] = torch.tensor(list(neurons), dtype=torch.long)
        valid[r, :len(neurons)] = True
    return index, valid


def gram(w_out, offsets, owners=None):
    """G_r = W_out[S_r] W_out[S_r]^T for every router output, zero-padded.

    w_out (F, D) -> gram (R, s, s), and the padded neurons of each output, index and valid (R, s)
    """
    index, valid = (t.to(w_out.device) for t in neuron_index(offsets, owners))
    w = w_out[index] * valid[..., None]                                                 # (R, s, D)
    return w @ w.transpose(1, 2), index, valid


def expert_norms(a, gram, index, valid):
    """The exact L2 norm of each expert's output: a (T, F) -> (T, R), without forming any output."""
    a = (a[:, index] * valid).transpose(0, 1)                                           # (R, T, s)
    return ((a @ gram) * a).sum(-1).clamp_min(0).sqrt().T                               # rounding may dip below 0


def router_target(loss, a, norms, index, valid):
    """What a router of kind `loss` should have said: a (T, F), norms (T, R) -> (T, R)."""
    if loss == 'norm':
        return norms
    if loss == 'active':
        return (norms >= 0.05 * norms.amax(-1, keepdim=True).clamp_min(1e-9)).float()
    total = (F.relu(a)[:, index] * valid).sum(-1)                                       # (T, R)
    return total / total.max().clamp_min(1e-9)                   # of the batch's largest, as the authors do


def router_loss(router, x, target):
    """MSE on norms divided by their RMS in this layer (dynk does not see a factor), else BCE."""
    if router.loss == 'norm':
        return F.mse_loss(router(x), target / router.scale)
    return F.binary_cross_entropy_with_logits(router.logits(x), target)


def train_loss(model, batch, grams):
    """One step's loss for the routers of a frozen model: the mean over MLPs, each a problem of its own.

    The model runs without gradients, so a step costs one forward pass and the routers' own few per cent.
    `grams` holds gram(...) of each MLP.
    """
    tap, losses = [], []
    with torch.no_grad():
        model.encode(**batch, tap=tap)
    for t, mlp, (g, index, valid) in zip(tap, model.mlps(), grams):
        norms = expert_norms(t['a'], g, index, valid)
        if mlp.router.scale == 0:
            mlp.router.scale.copy_(norms.square().mean().sqrt().clamp_min(1e-9))
        target = router_target(mlp.router.loss, t['a'], norms, index, valid)
        losses.append(router_loss(mlp.router, t['x'], target))
    return torch.stack(losses).mean(), {}


def learn(model):
    """What the router phase trains, and on what: (parameters, loss_fn(batch, progress))."""
    grams = [gram(mlp.w_out, mlp.offsets, mlp.owners) for mlp in model.mlps()]
    parameters = [p for mlp in model.mlps() for p in mlp.router.parameters()]
    return parameters, lambda batch, progress: train_loss(model, batch[0], grams)


if __name__ == '__main__':
    import sys

    import train
    train.convert('router', sys.argv[1:])
