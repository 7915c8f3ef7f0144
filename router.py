"""Which experts should a token run, and how many blocks? Kinds of routers, the rules, the phases
that train them, alone or with the model; early exits and token halting.

A router looks at a token before its FFN does and says how much each expert would contribute. With
a = act(x W_in^T + b) the hidden activations and S_r the neurons of router output r,

    out_r = a[S_r] W_out[S_r]        what output r adds to the residual stream
    |out_r|^2 = a_r^T G_r a_r        with the Gram matrix G_r = W_out[S_r] W_out[S_r]^T

so the exact norms need no (T, R, D) tensor. A rule then turns the scores of a token into a set.

    kind     score                             trained against                       usual rule
    norm     |W2 relu(W1 x)|                   MSE on |out_r| / RMS (D2DMoE, eq. 5)  dynk
    active   sigmoid(W2 relu(W1 x + b1) + b2)  BCE on |out_r| >= 5 % of the largest  threshold
    share    sigmoid(W2 tanh(W1 x / |x|))      BCE on the share of activation        topk
                                               (MoEfication, as its authors do it)
    masks    softmax(W x)                      the task (moefy.py, learned masks)    topk
    oracle   |out_r| / RMS itself              nothing: the ceiling of every router  dynk
    truth    share of activation itself        nothing: MoEfication's ceiling        topk

RMS is the root mean square of the norms in a layer. MoEfication's parameter centres, experts by the
cosine of x and the mean of their rows of W_in, are `share` with --router_steps=0. A new kind is a
class (mlp, owners, width) with its usual `rule`, the kind that is its `ceiling` or None, forward(x
(T, D)) -> scores (T, R) >= 0 and loss(Seen), most easily one derived from Norm, and its name in
ROUTERS. Adapt learns with scores that are probabilities: kinds whose rule is threshold.

    python router.py out/moe.pt out/d2dmoe.pt --router_loss=norm

    T tokens · D n_embd · H hidden neurons · E experts (slices) · R router outputs (E without
    `owners`) · W router width · s neurons of the largest output
"""

if __name__ == '__main__':                  # Ctrl-C while torch is being imported ends quietly
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernel import ACTIVATIONS, linear, neuron_mask, over_ranks, over_tokens, shared_out

# -------------------------------------------------------------------------------------- rules

# the values of tau that an evaluation tries, by rule
GRID = dict(dynk=(0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3),
            threshold=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
            topk=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75),
            cumulative=(0.5, 0.7, 0.8, 0.9, 0.95, 0.99))
CONFIDENCE = 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99                 # the same of exits
# of dynk, where nobody says otherwise: hardly anything lost where it was measured; 0.2 saves a
# quarter more of a young GPT's experts and costs MiniLM, whose RMS a few loud neurons make, 14
# points of accuracy
FLOOR = 0.01

def select(score, rule, tau=0.0, floor=0.0):
    """The outputs that each token runs: score (T, R) >= 0 -> bool (T, R).

    dynk        score >= tau * the token's largest and score > floor  (D2DMoE; the authors' code
                writes 1 - tau and has no floor: a token whose FFN is silent runs everything there)
    threshold   score >= tau
    topk        the share tau of the outputs, at least one: the largest, ties as in torch.topk
    cumulative  the smallest set whose scores reach the share tau of the token's sum

    A row of NaN runs nothing under dynk, threshold and cumulative. ValueError names the
    rules if `rule` is none.
    """
    if rule == 'dynk':
        return (score >= tau * score.amax(-1, keepdim=True)) & (score > floor)
    if rule == 'threshold':
        return score >= tau
    if rule == 'topk':
        k = max(1, round(tau * score.shape[-1]))
        chosen = torch.zeros_like(score, dtype=torch.bool)
        return chosen.scatter_(-1, score.topk(k, -1).indices, True)
    if rule == 'cumulative':
        ordered, index = score.sort(-1, descending=True)
        # what the larger ones already reach
        before = ordered.cumsum(-1) - ordered
        chosen = before < tau * ordered.sum(-1, keepdim=True)
        return torch.zeros_like(chosen).scatter_(-1, index, chosen)
    raise ValueError(f'rule must be one of {", ".join(GRID)}, not {rule!r}')

# -------------------------------------------------------------------------------------- true norms

class Grams(NamedTuple):
    """The neurons of every router output, padded to the largest, and their Gram matrices."""
    index: torch.Tensor                     # (R, s) int64
    valid: torch.Tensor                     # (R, s) bool
    gram: torch.Tensor                      # (R, s, s)

def neuron_index(offsets, owners=None):
    """-> index (R, s) and valid (R, s): which neurons belong to which output."""
    if owners is None:
        owners = torch.eye(len(offsets) - 1, dtype=torch.bool, device=offsets.device)
    member = neuron_mask(owners, offsets, int(offsets[-1]))      # (R, H)
    # its neurons first, in their order
    valid, index = member.byte().sort(dim=1, descending=True, stable=True)
    s = max(1, int(member.sum(1).max()))
    return index[:, :s], valid[:, :s].bool()

def grams(w_out, offsets, owners=None):
    """w_out (H, D) -> Grams."""
    index, valid = neuron_index(offsets, owners)
    w = w_out[index] * valid[..., None]     # (R, s, D)
    return Grams(index, valid, w @ w.transpose(1, 2))

def expert_norms(a, g):
    """The exact L2 norm of each output: activations a (T, H), Grams -> (T, R)."""
    a = a.T[g.index]                    # (R, s, T); the Gram matrices are 0 where not valid
    # rounding may dip below 0
    return ((g.gram @ a) * a).sum(1).clamp_min(0).sqrt().T

# -------------------------------------------------------------------------------------- kinds

class Seen(NamedTuple):
    """What a router is trained on: one MLP, one batch."""
    x: torch.Tensor                         # (T, D) what the MLP read
    a: torch.Tensor                         # (T, H) its activations
    norms: torch.Tensor                     # (T, R) of what each output adds
    scale: torch.Tensor                     # () RMS of the norms in this layer
    grams: Grams

def n_outputs(mlp, owners):
    return len(mlp.offsets) - 1 if owners is None else len(owners)

class Norm(nn.Module):
    """The paper's: regression on the norms, in units of their RMS (dynk does not see a factor)."""
    rule, ceiling = 'dynk', 'oracle'

    def __init__(self, mlp, owners, width):
        super().__init__()
        D, R = mlp.w_in.shape[1], n_outputs(mlp, owners)
        self.w1 = nn.Parameter(torch.randn(width, D) * D ** -0.5)
        self.w2 = nn.Parameter(torch.randn(R, width) * width ** -0.5)

    def forward(self, x):                   # (T, D) -> (T, R)
        return linear(F.relu(linear(x, self.w1)), self.w2).abs()

    def loss(self, seen):
        return F.mse_loss(self(seen.x), seen.norms / seen.scale)

class Active(Norm):
    """Ours: the same network, asked only whether a norm reaches 5 % of the token's largest."""
    rule = 'threshold'

    def __init__(self, mlp, owners, width):
        super().__init__(mlp, owners, width)
        self.b1, self.b2 = (nn.Parameter(torch.zeros(len(w))) for w in (self.w1, self.w2))

    def logits(self, x):                    # (T, D) -> (T, R)
        return linear(F.relu(linear(x, self.w1, self.b1)), self.w2, self.b2)

    def forward(self, x):
        return self.logits(x).sigmoid()

    def loss(self, seen):
        largest = seen.norms.amax(-1, keepdim=True).clamp_min(1e-9)
        target = (seen.norms >= 0.05 * largest).float()
        return F.binary_cross_entropy_with_logits(self.logits(seen.x), target)

class Share(nn.Module):
    """MoEfication's, D -> R -> R: starts as the cluster centres and the identity."""
    rule, ceiling = 'topk', 'truth'
    square = True                           # its layers are R wide, whatever --router_width says
    waits = True                            # its loss for the other processes, MLP by MLP

    def __init__(self, mlp, owners, width):
        super().__init__()
        D, R = mlp.w_in.shape[1], n_outputs(mlp, owners)
        centres = torch.zeros(R, D)
        # a checkpoint brings its own weights, and its modules have none yet
        if not mlp.w_in.is_meta:
            index, valid = neuron_index(mlp.offsets, owners)
            rows = F.normalize(mlp.w_in.detach(), dim=-1)[index] * valid[..., None]      # (R, s, D)
            centres = F.normalize(rows.sum(1), dim=-1)
        self.w1 = nn.Parameter(centres)
        self.w2 = nn.Parameter(torch.eye(R))

    def logits(self, x):
        return linear(torch.tanh(linear(F.normalize(x, dim=-1), self.w1)), self.w2)

    def forward(self, x):
        return self.logits(x).sigmoid()

    def loss(self, seen):
        total = (F.relu(seen.a)[:, seen.grams.index] * seen.grams.valid).sum(-1)        # (T, R)
        # of the batch's largest, as the authors do
        target = total / over_ranks(total.max(), 'MAX').clamp_min(1e-9)
        return F.binary_cross_entropy_with_logits(self.logits(seen.x), target)

class Choice(nn.Module):
    """Which of the learned masks a token takes; the phase that learns them trains it, too."""
    rule, ceiling = 'topk', None            # masks overlap: no norm of theirs is the best

    def __init__(self, mlp, owners, width):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_outputs(mlp, owners), mlp.w_in.shape[1]) * 0.02)

    def forward(self, x):                   # (T, D) -> (T, R)
        return linear(x, self.w).float().softmax(-1)

class Oracle(nn.Module):
    """The true norms: no router can do better on the same experts. It has nothing to learn."""
    rule, ceiling = 'dynk', None

    def __init__(self, mlp, owners, width):
        super().__init__()
        # a tuple, so that the MLP's weights do not become the router's
        self.experts, self.grams = mlp.experts, grams(mlp.w_out, mlp.offsets, owners)
        seen = mlp.router is not None and mlp.router.scale > 0
        self.scale = mlp.router.scale.clone() if seen else 1.0

    def forward(self, x):
        a = ACTIVATIONS[self.experts.act](linear(x, self.experts.w_in, self.experts.b_in))
        return expert_norms(a, self.grams) / self.scale

class Truth(Oracle):
    """MoEfication's ground truth: the sum of the positive activations of an expert."""
    rule = 'topk'

    def forward(self, x):
        a = ACTIVATIONS[self.experts.act](linear(x, self.experts.w_in, self.experts.b_in))
        return (F.relu(a)[:, self.grams.index] * self.grams.valid).sum(-1)

ROUTERS = dict(norm=Norm, active=Active, share=Share, masks=Choice, oracle=Oracle, truth=Truth)

def ceilings():
    """The kinds that look at what the others have to predict."""
    return {net.ceiling for net in ROUTERS.values()} - {None}

class Masks(list):
    """A tap that wants only what each MLP chose: the model runs its fast path. `alive`: the census
    of each block, where tokens or texts may leave early."""
    alive = ()

class Router(nn.Module):
    """What stands in front of an MLP: a kind's scores, a rule, and who owns which slice."""

    def __init__(self, kind, mlp, owners, width):
        super().__init__()
        self.net = ROUTERS[kind](mlp, owners, width)
        self.size = sum(p.numel() for p in self.net.parameters() if p.dim() == 2)
        self.n_outputs = n_outputs(mlp, owners)
        # RMS of the norms in this layer; 0: not seen yet
        self.register_buffer('scale', torch.zeros(()))
        self.register_buffer('owners', owners)                   # (R, E) bool, or None
        # no rule: every expert runs, and the router does not
        self.rule, self.tau, self.floor = '', 0.0, 0.0
        # share of neurons run under this rule, once measured: a hint for GPUs
        self.rho = None
        # while it learns with the model a choice passes the gradient on to its score
        self.soft = False

    def choose(self, score):                # (T, R) -> (T, E)
        chosen = select(score, self.rule, self.tau, self.floor)
        if self.soft:                       # 1 or 0, and the score's slope
            return chosen + (score - score.detach())
        # a slice runs if any chosen output owns it
        return chosen if self.owners is None else (chosen.float() @ self.owners.float()) > 0

    def forward(self, x):                   # (T, D) -> (T, R), (T, E)
        score = self.net(x)
        return score, self.choose(score)

# -------------------------------------------------------------------------------------- depth

class Exits(nn.Module):
    """Heads after every block but the last (ZTW, Wójcik et al. 2023): each reads the first token
    and, in a cascade, the logits of the head before; the answer after block i is an ensemble,

        mean over heads j <= i of exp(w_ij) log p_j  +  b_i

    A text of whose class it is sure, largest probability >= tau, leaves there."""

    def __init__(self, n_layer, n_embd, n_classes):
        super().__init__()
        n, C = n_layer - 1, n_classes
        self.heads = nn.ModuleList(nn.Linear(n_embd + C * (i > 0), C) for i in range(n))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(n))
        self.weights, self.biases = nn.Parameter(torch.zeros(n, n)), nn.Parameter(torch.zeros(n, C))

    def head(self, i, h, before):           # h (B, D), logits of head i - 1 -> (B, C)
        if i:
            h = torch.cat([h, self.norms[i](before.detach())], -1)
        return self.heads[i](h)

    def answer(self, logits):               # of the heads so far, each (B, C) -> (B, C)
        i = len(logits) - 1
        logs = [l.detach().float().log_softmax(-1) for l in logits]
        parts = [w * log for w, log in zip(self.weights[i].exp(), logs)]
        return sum(parts) / len(parts) + self.biases[i]

@dataclass
class LearnExits:
    """Early exits (ZTW) on the converted model, or the dense one, which stays as it is; for a BERT.

    The next tokens of a GPT need the keys and values of every block."""
    reads, writes = ('d2dmoe', 'dense'), 'exits'
    wanted = 'exits'
    steps: int = 400
    lr: float = 1e-2
    exits: bool = False                     # 1: heads after every block, for texts that leave early

    def prepare(self, model, batches):
        model.add_exits()
        if model.config.router_loss:
            model.set_rule(ROUTERS[model.config.router_loss].rule, 0.1)
            print(f'exits    of {model.config.router_loss} by {model.config.rule}, tau 0.1')

    def parameters(self, model):
        model.eval()                        # no dropout: the model is frozen
        return model.exits.parameters()

    def loss(self, model, batch, progress):
        """The mean over heads, and over their ensembles, whose heads do not learn from them."""
        inputs, targets = batch
        with torch.no_grad():
            x, layout = model.embed(**inputs)
            firsts = [(x := block(x, layout))[layout.head_rows()] for block in model.blocks[:-1]]
        logits, losses = [], []
        for i, h in enumerate(firsts):
            logits.append(model.exits.head(i, h, logits[-1] if i else None))
            losses.append(F.cross_entropy(logits[-1], targets))
            losses.append(F.cross_entropy(model.exits.answer(logits), targets))
        return torch.stack(losses).mean(), {}

class Halting(nn.Module):
    """When a token has been read enough (A-ViT, Yin et al. 2022): after each block it adds up

        h = sigmoid(gain x[0] - shift)          of its first number, which learns to say so

    and halts when the sum reaches 1 - 0.01. What comes out is the sum of its states after each
    block, weighted by h, the last by what was missing to 1."""

    def __init__(self):
        super().__init__()
        for name in ('gain', 'shift', 'depth'):                  # depth: wanted, in blocks
            self.register_buffer(name, torch.zeros(()))
        # of the last batch: mean h after each block, and what was missing at the end
        self.scores, self.missing = [], 0.0

    def forward(self, x):                   # (T, D) -> (T)
        return torch.sigmoid(self.gain * x[:, 0] - self.shift)

    def cost(self, n_layer, n):
        """Of the last batch, n tokens: 5e-4 of what was missing at the end (the part of the ponder
        cost that has a gradient), + 0.1 of the KL divergence of how the halting scores lie over
        depth from a normal (sigma 1) around the wanted one (A-ViT)."""
        scores = F.pad(torch.stack(self.scores), (0, n_layer - len(self.scores)))
        scores, missing = over_tokens(scores, n), over_tokens(self.missing, n)
        depth = torch.arange(1, n_layer + 1, device=scores.device)
        wanted = (-(depth - self.depth) ** 2 / 2).softmax(0)
        found = (scores / scores.sum()).clamp_min(1e-6)
        return 5e-4 * missing + 0.1 * (found * (found / wanted).log()).sum()

@dataclass
class LearnHalting:
    """Token halting (A-ViT), for a BERT; a GPT's later tokens need the earlier ones' keys."""
    reads, writes = ('pruned', 'base'), 'halting'
    wanted = 'halting'
    looks = True
    steps: int = 130
    lr: float = 1e-3
    halting: bool = False                   # 1: tokens that have been read enough leave
    halt_depth: Annotated[float, '0..1'] = 0.5      # share of the blocks that a token should take
    distil: Annotated[float, '0..1'] = 0.0

    @torch.no_grad()
    def prepare(self, model, batches):
        model.add_halting()
        x, layout = model.embed(**next(batches)[0])
        seen = []
        for block in model.blocks:
            x = block(x, layout)
            seen.append(x[:, 0])
        # over all blocks, whose means differ: scores that have a gradient, and hardly a token halts
        std, mean = torch.std_mean(torch.cat(seen))
        model.halting.gain.copy_(2 / std.clamp_min(1e-6))
        model.halting.shift.copy_(model.halting.gain * mean + 3)
        model.halting.depth.fill_(self.halt_depth * len(model.blocks))

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        return model.loss(batch), {}

# -------------------------------------------------------------------------------------- training

@dataclass
class Route:
    """A router in front of every MLP of the frozen model; each kind is a checkpoint of its own."""
    reads, writes = ('moe',), 'd2dmoe'
    each = 'router_loss'                    # one run for each of its values
    steps: int = 280
    lr: float = 5e-3
    router_loss: Annotated[str, ROUTERS] = 'norm,active'    # kinds, the paper's first
    router_width: Annotated[int, '> 0'] = 64                # of projections at most 32

    def prepare(self, model, batches):
        model.add_routers(self.router_loss, self.router_width)
        self.grams = [grams(mlp.w_out, mlp.offsets, mlp.router.owners) for mlp in model.mlps()]

    def parameters(self, model):
        model.eval()                        # no dropout: the model is frozen
        return nn.ModuleList(mlp.router.net for mlp in model.mlps()).parameters()

    def loss(self, model, batch, progress):
        """The mean over MLPs, each a problem of its own: one forward pass without gradients."""
        tap, losses = [], []
        with torch.no_grad():
            model.encode(**batch[0], tap=tap)
        with torch.autocast(tap[0]['a'].device.type, enabled=False):
            norms_of = [expert_norms(t['a'].float(), g) for t, g in zip(tap, self.grams)]
        if not all(mlp.router.scale for mlp in model.mlps()):
            # of all ranks; where every token has halted before, a rank has none
            sums = torch.zeros(len(self.grams), 2, device=norms_of[0].device)
            for row, norms in zip(sums, norms_of):
                row += torch.stack([norms.square().sum(), norms.new_tensor(norms.numel())])
            for mlp, (square, n) in zip(model.mlps(), over_ranks(sums)):
                if mlp.router.scale == 0 and n:
                    mlp.router.scale.copy_((square / n).sqrt().clamp_min(1e-9))
        for t, mlp, g, norms in zip(tap, model.mlps(), self.grams, norms_of):
            router = mlp.router
            losses.append(router.net.loss(Seen(t['x'], t['a'], norms, router.scale, g)))
        return over_tokens(torch.stack(losses).mean(), len(tap[0]['x'])), {}

    @torch.no_grad()
    def report(self, model, batches):
        """For budgets: what every expert on costs in loss, against dense; and what every MLP alone
        costs and runs of its neurons, by tau."""
        batches, rule, mlps = batches[::2], model.mlps()[0].router.net.rule, model.mlps()

        def measured(i):
            """Loss, the share of neurons that MLP i runs."""
            losses, shares = [], []
            for batch in batches:
                losses.append(model.loss(batch, tap := Masks()))
                shares.append(mlps[i].share(tap[i]) if i < len(tap) else 0.0)
            return torch.stack(losses).mean().item(), sum(shares) / len(shares)

        model.set_rule('')
        base, _ = measured(0)
        dense = torch.stack([self.dense.loss(batch) for batch in batches]).mean().item()
        layouts = [model.embed(**inputs)[1] for inputs, _ in batches]
        tokens = sum(int(layout.starts[-1]) / layout.B for layout in layouts) / len(layouts)

        def menu(i):
            router, found = mlps[i].router, []
            router.rule, router.floor = rule, FLOOR
            for router.tau in GRID[rule]:
                loss, rho = measured(i)
                found.append((router.tau, loss / base - 1, rho))
            router.rule = ''
            return sorted(found, key=lambda entry: -entry[2])

        menus = shared_out(menu, len(mlps))
        model.config.calibration = dict(rule=rule, floor=FLOOR, tokens=tokens, menus=menus,
                                        start=base / dense - 1)

@dataclass
class Adapt:
    """Model and routers learn together, a token running what its routers choose.

    loss = task + expert_price * the share of the neurons that the scores ask for

    Forward a choice is 1 or 0, backward it has the slope of its score. Ours, not the paper's."""
    reads, writes = ('d2dmoe-active', 'd2dmoe'), 'adapted'
    wanted = 'expert_price'
    steps: int = 130
    lr: float = 1e-3
    expert_price: float = 0.0               # loss per token that runs everything; 0: no such phase
    halt_sooner: float = 0.0                # where tokens halt: so much less is their shift
    distil: Annotated[float, '0..1'] = 0.0

    def prepare(self, model, batches):
        rule = ROUTERS[model.config.router_loss].rule
        model.set_rule(rule, 0.5 if rule == 'threshold' else 0.1)
        model.config.calibration = {}       # it was another model's
        if model.halting is not None:
            model.halting.shift -= self.halt_sooner
        elif self.halt_sooner:
            print('adapt    --halt_sooner does nothing: no token halts in this model')
        for mlp in model.mlps():
            mlp.router.soft = True

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        task = model.loss(batch, tap := [])
        sizes = [mlp.offsets.diff().float() for mlp in model.mlps()]
        whole = sum(size.sum() for size in sizes)
        # shares of all neurons: what is wanted, which has a gradient, and what runs
        wanted, run = (sum(t[key].float().mean(0) @ size for t, size in zip(tap, sizes)) / whole
                       for key in ('score', 'mask'))
        wanted = over_tokens(wanted, len(tap[0]['x']))
        return task + self.expert_price * wanted, dict(task=task.detach(), experts=run.detach())

    def finish(self, model):
        for mlp in model.mlps():
            mlp.router.soft = False

    def report(self, model, batches):
        rule, tau = model.config.rule, model.config.tau
        Route.report(self, model, batches)
        model.set_rule(rule, tau)

if __name__ == '__main__':
    import train
    train.convert('router')
