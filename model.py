"""GPT-2 and BERT in one class, whose FFNs may be sorted into experts.

    MLP(x) = act(x W_in^T + b_in) W_out + b_out     both matrices neuron-major: neuron i is row i

A converted MLP is the same MLP with its rows sorted: expert e is the slice offsets[e]:offsets[e+1],
and a router says, per token, which slices to run. With every expert on it is the dense model again.

    from model import load
    m = load('out/d2dmoe.pt')           # or an exported folder, 'gpt2', a folder of transformers
    m.set_rule('dynk', tau=0.1)         # m.set_rule('') runs every expert
    m.generate('def ', 100)             # or m.classify(['some text', 'another'])

    B batch · L sequence length · T tokens (B * L, less padding) · D n_embd · H hidden neurons
    E experts (slices) · R router outputs · V vocabulary
"""

import functools
import hashlib
import math
import os
import re
import shutil
import tempfile
import textwrap
import weakref
import zipfile
from dataclasses import asdict, dataclass, field, fields
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernel import (ACTIVATIONS, Experts, Int8, LayerCache, Layout, attention,
                    encode_int8, experts, int8, int8_layer, linear, masked, pad_to_8, ranks)
from router import (Active, Exits, FLOOR, GRID, Halting, Masks, Norm, ROUTERS, Router, Share,
                    ceilings)

class BadInput(ValueError):
    """What the user gave cannot be used: one sentence says what, where, and what would work."""

@dataclass
class Config:
    """All that is needed to rebuild the modules of a checkpoint."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    n_hidden: int = 1024
    block_size: int = 256
    vocab_size: int = 256
    activation: str = 'relu'            # relu, gelu (erf), gelu_tanh
    causal: bool = True                 # GPT; False: BERT
    pre_ln: bool = True                 # GPT; False: BERT
    n_types: int = 0                    # token types (BERT: 2)
    head: Optional[str] = 'lm'          # lm, mlm, cls, None
    n_classes: int = 0                  # for head = cls
    pooler: bool = False                # BERT's tanh layer on the first token
    dropout: float = 0.0                # embeddings, attention weights, residuals; never neurons
    ln_eps: float = 1e-5
    projections: str = ''               # which of q, k, v, o are MLPs of the same cost
    head_dim: int = 0                   # of q, k and v in each head; 0 = n_embd / n_head
    n_experts: list = field(default_factory=list)   # E of every MLP as tapped; [] = dense
    n_outputs: list = field(default_factory=list)   # R of every MLP with owners, 0 elsewhere
    router_loss: str = ''               # the kind of its routers; '' = none
    router_width: int = 0
    rule: str = ''                      # '' = run every expert, no router
    tau: float = 0.0
    floor: float = 0.0                  # of dynk, in units of the layer's RMS norm
    exits: bool = False                 # whether it has heads for texts that leave early
    exit_tau: float = 2.0               # how sure they have to be; above 1 nobody leaves
    halting: bool = False               # whether tokens leave early
    taus: list = field(default_factory=list)        # of every MLP, where they differ
    # what budget() chooses from: rule, tokens of a text, [[tau, loss it adds, share run]] an MLP
    calibration: dict = field(default_factory=dict)

    def check(self):                    # a file may say anything
        for f in fields(self):
            value, kind = getattr(self, f.name), int | float if f.type in (float, list) else f.type
            assert isinstance(value, list) == (f.type is list), f.name
            for v in value if f.type is list else [value]:
                small = not isinstance(v, int | float) or abs(v) < 1 << 31
                assert isinstance(v, kind) and small and (type(v) is bool) == (kind is bool), f.name

    @property
    def heads(self):                    # (how many, dimensions of each)
        return self.n_head, self.head_dim or self.n_embd // self.n_head

# -------------------------------------------------------------------------------------- modules

class Linear(nn.Linear):
    """nn.Linear on the fastest dense linear of the device."""

    def forward(self, x, tap=None):
        return linear(x, self.weight, self.bias)

def quantize(module, weight='weight', bias='bias'):
    """A module's matrix (N, K) as Int8, with its bias, in their place."""
    w, b = getattr(module, weight), getattr(module, bias, None)
    for name, value in ((weight, int8(w, b)), (bias, None)):
        module._parameters.pop(name, None)
        setattr(module, name, value)

class MLP(nn.Module):
    """The FFN of every block, and what a replaced attention projection becomes."""

    def __init__(self, n_embd, n_hidden, act):
        super().__init__()
        self.act = act
        self.w_in = nn.Parameter(torch.randn(n_hidden, n_embd) * 0.02)
        self.b_in = nn.Parameter(torch.zeros(n_hidden))
        self.w_out = nn.Parameter(torch.randn(n_hidden, n_embd) * 0.02)
        self.b_out = nn.Parameter(torch.zeros(n_embd))
        self.register_buffer('offsets', torch.tensor([0, n_hidden], dtype=torch.int32))
        # of int8's experts: offsets count what fills blocks of 8, too
        self.register_buffer('sizes', None, persistent=False)
        self.router = None

    @property
    def experts(self):
        return Experts(self.w_in, self.b_in, self.w_out, self.b_out, self.offsets, self.act)

    def forward(self, x, tap=None):
        """x (T, D) -> (T, D)."""
        score = mask = rho = None
        if self.router is not None and self.router.rule:
            score, mask = self.router(x)                         # (T, R), (T, E)
            rho = self.router.rho
        if tap is None or isinstance(tap, Masks):
            if tap is not None:
                tap.append(mask)
            return experts(x, mask, self.experts, rho=rho)
        z = linear(x, self.w_in, self.b_in)                      # (T, H)
        a = ACTIVATIONS[self.act](z)
        tap.append(dict(x=x, z=z, a=a, score=score, mask=mask))
        if isinstance(self.w_in, Int8):
            return experts(x, mask, self.experts)
        if mask is not None:
            a = masked(a, mask, self.offsets)
        return linear(a, self.w_out.t(), self.b_out)

    @torch.no_grad()
    def sort_neurons(self, order, offsets):
        """Put neuron order[i] at row i, drop those not in it, and cut the rows at `offsets`."""
        for name in ('w_in', 'b_in', 'w_out'):
            p = getattr(self, name)
            setattr(self, name, nn.Parameter(p[order], p.requires_grad))
        self.offsets = torch.as_tensor(offsets, dtype=torch.int32, device=self.w_in.device)

    @property
    def n_hidden(self):
        return len(self.w_in) if self.sizes is None else int(self.sizes.sum())

    def share(self, mask):              # of the neurons that run: mask (T, E), None: all
        size = (self.offsets.diff() if self.sizes is None else self.sizes) / max(1, self.n_hidden)
        return 1.0 if mask is None else (mask.float().mean(0) @ size).item()

    def quantize(self):
        """Both matrices as Int8, every expert filled up to whole blocks with neurons that are 0,
        which `sizes` does not count."""
        self.sizes = self.offsets.diff()
        sizes = self.sizes.tolist()
        w_in, b_in, w_out = (
            torch.cat([p[:0], *(pad_to_8(expert, 0) for expert in p.split(sizes))]).detach()
            for p in (self.w_in, self.b_in, self.w_out))
        matrices = int8(w_in, b_in), int8(w_out, self.b_out, by_column=True)
        for name in ('w_in', 'b_in', 'w_out', 'b_out'):
            delattr(self, name)
        (self.w_in, self.w_out), self.b_in, self.b_out = matrices, None, None
        ends = torch.tensor([-(-size // 8) * 8 for size in sizes]).cumsum(0)
        self.offsets = F.pad(ends, (1, 0)).to(self.offsets)

class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        D, A = config.n_embd, math.prod(config.heads)
        for name in 'qkvo':
            sizes = (A, D) if name == 'o' else (D, A)
            replaced = name in config.projections
            new = MLP(D, projection_width(D), 'relu') if replaced else Linear(*sizes)
            setattr(self, name, new)
        self.qkv = None                 # of an int8 model all three in one

    def forward(self, x, layout, cache=None, tap=None, rows=None):
        """x (T, D) -> (T, D), or of `rows` alone: (B, D)."""
        if self.qkv is not None:
            q, k, v = linear(x, self.qkv).unflatten(-1, (3, self.n_head, -1)).unbind(1)
            q = q if rows is None else q[rows]
        else:
            parts = (self.q, x if rows is None else x[rows]), (self.k, x), (self.v, x)
            q, k, v = (project(t, tap).unflatten(-1, (self.n_head, -1))
                       for project, t in parts)                  # (T, n_head, d)
        y = attention(q, k, v, layout, cache, self.dropout if self.training else 0.0)
        return self.o(y.flatten(1), tap)

    def quantize(self):
        """Plain q, k and v become one matrix, so that one product gives all three."""
        projections = self.q, self.k, self.v
        if any(isinstance(p, MLP) for p in projections):
            return
        self.qkv = int8(torch.cat([p.weight for p in projections]),
                        torch.cat([p.bias for p in projections]))
        self.q = self.k = self.v = None

class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.pre_ln = config.pre_ln
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.ln_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.ln_eps)
        self.mlp = MLP(config.n_embd, config.n_hidden, config.activation)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, layout, cache=None, tap=None, rows=None):
        """x (T, D) -> (T, D), or of `rows` alone, layout.head_rows(): (B, D)."""
        y = self.attn(self.ln_1(x) if self.pre_ln else x, layout, cache, tap, rows)
        x = (x if rows is None else x[rows]) + self.drop(y)
        if self.pre_ln:
            return x + self.drop(self.mlp(self.ln_2(x), tap))
        x = self.ln_1(x)
        return self.ln_2(x + self.drop(self.mlp(x, tap)))

class Transformer(nn.Module):

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        assert c.n_embd % c.n_head == 0 < c.n_head, 'n_embd must be a multiple of n_head'
        assert c.activation in ACTIVATIONS, f'activation={c.activation} is not known'
        assert not c.head_dim or not c.projections and 0 < c.head_dim * c.n_head <= c.n_embd
        # what a checkpoint says of the data: tokenizer, names of the classes
        self.about = {}
        self.dtype, self.decoder = 'fp32', None
        self.checkpoint_activations = False     # whether blocks compute again what they do not keep
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.wtt = nn.Embedding(c.n_types, c.n_embd) if c.n_types else None
        self.ln_e = None if c.pre_ln else nn.LayerNorm(c.n_embd, eps=c.ln_eps)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.ln_eps) if c.pre_ln else None
        self.pooler = Linear(c.n_embd, c.n_embd) if c.pooler else None
        if c.head == 'mlm':             # BERT's: dense, activation, LayerNorm, tied decoder
            norm = nn.LayerNorm(c.n_embd, eps=c.ln_eps)
            self.mlm = nn.ModuleDict(dict(dense=Linear(c.n_embd, c.n_embd), ln=norm))
            self.mlm_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.classifier = Linear(c.n_embd, c.n_classes) if c.head == 'cls' else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # GPT-2: residual branches start small
        for name, p in self.named_parameters():
            if name.endswith(('attn.o.weight', 'mlp.w_out')):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))
        for mlp, n in zip(self.mlps(), c.n_experts):
            mlp.offsets = torch.zeros(n + 1, dtype=torch.int32)
        if c.router_loss:
            self.add_routers(c.router_loss, c.router_width)
        self.exits = self.halting = None
        if c.exits:
            self.add_exits()
        if c.halting:
            self.add_halting()
        if c.rule:
            leave = c.exit_tau
            self.set_rule(c.rule, c.taus or c.tau, c.floor)
            c.exit_tau = leave

    def mlps(self):
        """Every MLP in the order in which a forward pass taps them: replaced projections, FFN."""
        return [m for block in self.blocks
                for m in (*(getattr(block.attn, name) for name in 'qkvo'), block.mlp)
                if isinstance(m, MLP)]

    def ffns(self):
        return [block.mlp for block in self.blocks]

    # ---- routing

    def add_routers(self, kind, width):
        """A fresh router for every MLP, those of projections at most 32 wide (DESIGN); who owns
        which slice is taken over from the routers before."""
        c, ffns = self.config, self.ffns()
        for i, mlp in enumerate(self.mlps()):
            owners = mlp.router.owners if mlp.router is not None else None
            if owners is None and c.n_outputs and c.n_outputs[i]:
                owners = torch.zeros(c.n_outputs[i], c.n_experts[i], dtype=torch.bool)
            own_width = width if mlp in ffns else min(width, 32)
            mlp.router = Router(kind, mlp, owners, own_width).to(mlp.w_in.device)
        if kind != c.router_loss:       # neither a rule nor what was measured is of these
            c.rule, c.calibration = '', {}
        c.router_loss, c.router_width = kind, width

    def add_exits(self):
        """Fresh heads for texts that leave early. BadInput if it does not classify."""
        c = self.config
        if c.head != 'cls' or c.n_layer < 2:
            raise BadInput('early exits are for a BERT of several blocks that classifies: the next '
                           'tokens of a GPT need the keys and values of every block')
        if c.halting:
            raise BadInput('early exits: tokens that halt do not go with texts that leave early')
        self.exits = Exits(c.n_layer, c.n_embd, c.n_classes).to(self.wte.weight.device)
        c.exits = True

    def add_halting(self):
        """Tokens may leave early from now on. BadInput if it is causal, or has exits."""
        if self.exits is not None:
            raise BadInput('tokens that halt do not go with texts that leave early: it has exits')
        if self.config.causal:
            raise BadInput('tokens halt in a BERT only: the later ones of a GPT need the keys and '
                           'values that every block makes of the earlier ones')
        self.halting, self.config.halting = Halting().to(self.wte.weight.device), True

    def set_rule(self, rule, tau=0.0, floor=FLOOR):
        """How scores become experts, in every MLP (router.select); '' runs all, without routers.
        tau: one for all, or a list of one for every MLP. `confidence` is not of routers: a text
        leaves where the largest probability reaches tau.

        ValueError if the rule is none or the model has no routers. Returns the model.
        """
        if rule and rule not in (*GRID, 'confidence'):
            raise ValueError(f'rule={rule}: must be one of {", ".join(GRID)}')
        if rule == 'confidence' and self.exits is None:
            raise ValueError('rule=confidence needs exits: this model has none')
        if rule not in ('', 'confidence') and not self.config.router_loss:
            raise ValueError(f'rule={rule} needs routers: this model has none yet')
        each, c = isinstance(tau, (list, tuple)), self.config
        if rule == 'confidence':        # experts go on as they did
            c.exit_tau = tau
            return self
        taus = list(tau) if each else [tau] * len(self.mlps())
        if not all(isinstance(t, int | float) and t >= 0 for t in taus):
            raise ValueError(f'tau={tau}: must be a number, not negative, or one for every MLP')
        if rule == 'topk' and max(taus) > 1:
            raise ValueError(f'tau={max(taus)}: of topk it is a share, at most 1')
        if len(taus) != len(self.mlps()):
            raise ValueError(f'{len(taus)} values of tau for {len(self.mlps())} MLPs')
        for mlp, own in zip(self.mlps(), taus):
            if mlp.router is not None:
                mlp.router.rule, mlp.router.tau, mlp.router.floor = rule, own, floor
                mlp.router.rho = None
        c.rule, c.floor, c.taus, c.exit_tau = rule, floor, taus if each else [], 2.0
        c.tau = sum(taus) / len(taus) if each else tau
        FUSED.pop(self, None)
        return self

    def budget(self, flops=None, max_loss=None):
        """A tau for every MLP, by what the router phase measured of each alone: the least loss at
        no more than this share of the FLOPs of every expert, or the least FLOPs at no more than
        this share added to the dense model's loss, as far as losses add up. Returns the model.
        BadInput if no tau is low enough, or nothing was measured."""
        # routers cost, too: a little above 1 is no mistake, 60 is one
        if (flops is None) == (max_loss is None) or (flops or 0) > 2:
            raise BadInput('budget: give one, a share of the FLOPs or the loss that may be added')
        c, found = self.config, self.config.calibration
        if not c.router_loss:
            raise BadInput('budget needs routers: this model has none yet')
        if not found:
            raise BadInput('nothing was measured to choose from: --phase=router and --phase=adapt '
                           'do it, for their own routers; masks have no budgets')
        at, menus, whole = [0] * len(found['menus']), found['menus'], self.flops(found['tokens'])

        def cost(at):
            rho = [menu[i][2] for menu, i in zip(menus, at)]
            return self.flops(found['tokens'], rho)['total'] / whole['total']

        def added(at):
            return found.get('start', 0.0) + sum(menu[i][1] for menu, i in zip(menus, at))

        # from most experts to fewest, always by the step that saves most FLOPs for its loss; where
        # what is adapted does better with fewer, further than it has to
        while True:
            steps = []
            for m, menu in enumerate(menus):
                for i in range(at[m] + 1, len(menu)):
                    to = [*at[:m], i, *at[m + 1:]]
                    saved = cost(at) - cost(to)
                    if saved > 0 and (flops is not None or added(to) <= max(max_loss, added(at))):
                        steps.append(((added(to) - added(at)) / saved, to))
            fits = flops is not None and cost(at) <= flops
            if not steps or fits and min(steps)[0] >= 0:
                break
            at = min(steps)[1]
        if flops is not None and cost(at) > flops or flops is None and added(at) > max_loss:
            raise BadInput(f'budget: {cost(at):.1%} of the FLOPs at {added(at):+.2%} of loss is as '
                           'close as the measured taus come, up to '
                           f'{max(menu[-1][0] for menu in menus)}')
        taus = [menu[i][0] for menu, i in zip(menus, at)]
        return self.set_rule(found['rule'], taus, found['floor'])

    @torch.no_grad()
    def quantize(self, dtype):
        """For inference, in place: 'int8' for everything with a matrix but the embeddings
        (kernel.Int8; activations are quantised on the fly), 'bf16' for all; 'fp32' changes nothing.
        Such a model is neither trained nor saved. Returns it. ValueError if it cannot be."""
        if dtype not in ('fp32', 'bf16', 'int8') or self.dtype not in ('fp32', dtype):
            raise ValueError(f'dtype={dtype}: of a model in {self.dtype}; from fp32 it may become '
                             'bf16 or int8')
        if dtype == 'bf16':
            self.bfloat16()
        if dtype == 'int8' and self.dtype == 'fp32':
            if self.config.router_loss in ceilings():
                raise ValueError(f'int8: {self.config.router_loss} needs the weights in fp32')
            if self.config.head in ('lm', 'mlm'):
                self.decoder = int8(self.wte.weight, getattr(self, 'mlm_bias', None))
            for mlp in self.mlps():
                mlp.quantize()
                # of other networks nothing is known
                two = mlp.router is not None and isinstance(mlp.router.net, (Norm, Share))
                for i in '12' if two else ():
                    quantize(mlp.router.net, f'w{i}', f'b{i}')
            for block in self.blocks:
                block.attn.quantize()
            for module in self.modules():
                if isinstance(module, Linear):
                    quantize(module)
        self.dtype = dtype
        return self.eval().requires_grad_(False)

    def _apply(self, f, *args, **more):     # .to(), .bfloat16(): weights move
        FUSED.pop(self, None)
        here = self.wte.weight.device
        if self.dtype == 'int8' and f(torch.empty(0, device=here)).device != here:
            raise BadInput(f'int8: its whole numbers lie as {here} wants them; move the model '
                           'first, then quantize it')
        return super()._apply(f, *args, **more)

    def fused(self):
        """The blocks as encode_int8 takes them: no router but the two-layer ones by their own rule.
        None where the blocks have to run one operation at a time."""
        c, plain = self.config, {Norm: 'dynk', Active: 'threshold'}      # what the C++ knows
        if self not in FUSED:
            blocks = (self.ffns()[0].w_in.w.dtype == torch.uint8
                      and all(p.dtype == torch.float32 for p in self.parameters()))
            routed = not c.rule or plain.get(ROUTERS.get(c.router_loss)) == c.rule
            owned = any(n > 0 for n in c.n_outputs)
            eights = (n % 8 == 0 for n in (c.n_embd, math.prod(c.heads), c.router_width))
            fits = blocks and routed and not owned and all(eights)
            FUSED[self] = int8_blocks(self) if fits else None
        return FUSED[self]

    # ---- running

    def embed(self, idx, attention_mask=None, token_type_ids=None, cache=None):
        """What the first block reads: (T, D) without padding, and its Layout."""
        B, L = idx.shape
        past = cache[0].n if cache else 0
        if past + L > self.config.block_size:
            raise ValueError(f'{past + L} tokens do not fit into '
                             f'block_size={self.config.block_size}')
        if attention_mask is not None and (cache or attention_mask.shape != idx.shape):
            raise ValueError('attention_mask: is of the shape of idx, and goes with no cache')
        layout = Layout.of(attention_mask, B, L, self.config.causal)
        x = self.wte(idx) + self.wpe.weight[past:past + L]       # (B, L, D)
        if self.wtt is not None:
            x = x + (self.wtt.weight[0] if token_type_ids is None else self.wtt(token_type_ids))
        x = layout.pack(x)                                       # (T, D)
        return self.drop(x if self.ln_e is None else self.ln_e(x)), layout

    def encode(self, idx, attention_mask=None, token_type_ids=None, cache=None, tap=None,
               only=False):
        """The last hidden states: idx (B, L) -> (B, L, D), zeros where attention_mask is 0; or,
        with `only`, what a head reads: (B, D), of the first token (causal: the last). Then the last
        block spends its q, o and FFN on that token alone.

        Activations are flat (T, D) between the embeddings and the end, without the padding: no
        expert, router or FLOP is spent on it. `cache` holds a LayerCache for each block; `tap`, a
        list, receives dict(x, z, a, score, mask) from every MLP, a Masks only the masks.
        """
        x, layout = self.embed(idx, attention_mask, token_type_ids, cache)
        if only or self.config.head == 'cls':
            refuse_empty(layout)
        c, masks_only = self.config, tap is None or isinstance(tap, Masks)
        fused = self.fused() if self.dtype == 'int8' and masks_only else None
        if fused is not None:
            halts = self.halting and torch.stack([self.halting.gain, self.halting.shift])
            x = encode_int8(x, fused, layout, c.heads, c.pre_ln, c.ln_eps, cache, only, tap, halts)
        elif self.halting is not None:
            x = self.halt(x, layout, tap, only)
        else:
            x = self.through(0, c.n_layer, x, layout, cache, tap, only)
        x = x if self.ln_f is None else self.ln_f(x)
        return x if only else layout.pad(x)

    def through(self, first, end, x, layout, cache=None, tap=None, only=False):
        """Blocks first to end, without the latter: x (T, D) -> (T, D), or with `only` (B, D)."""
        rows = layout.head_rows().to(x.device) if only else None
        for i in range(first, end):
            # of its own: FSDP copies lists, and a block that runs again taps again
            own = None if tap is None else type(tap)()
            args = x, layout, cache[i] if cache else None, own, rows if i == end - 1 else None
            if self.checkpoint_activations:
                x = checkpoint(self.blocks[i], *args, use_reentrant=False)
            else:
                x = self.blocks[i](*args)
            if tap is not None:
                tap += own
        return x

    def logits(self, h):
        """The head: (..., D) -> (..., V) for lm and mlm; (B, L, D) or (B, D) -> (B, classes)."""
        decoder = self.wte.weight if self.decoder is None else self.decoder
        if self.config.head == 'cls':
            h = h[:, 0] if h.dim() == 3 else h
            h = h if self.pooler is None else torch.tanh(self.pooler(h))
            return self.classifier(self.drop(h))
        if self.config.head == 'mlm':
            h = self.mlm['ln'](ACTIVATIONS[self.config.activation](self.mlm['dense'](h)))
            return linear(h, decoder, self.mlm_bias)
        return linear(h, decoder)

    def halt(self, x, layout, tap=None, only=False):
        """The blocks on tokens (T, D) of which each halts when it has been read enough; what has
        halted is no key for the others any more. -> (T, D), or with `only` (B, D): a text leaves
        with its first token, whose state is all that is asked for."""
        T, heads, scores, left_over = len(x), layout.head_rows().to(x.device), [], 0
        # of the tokens that are still read: where they stood, the sums of h and of h times x so far
        place, total, out = torch.arange(T, device=x.device), x.new_zeros(T), torch.zeros_like(x)
        done = [(place[:0], out[:0])]
        for i in range(self.config.n_layer):
            last = i == self.config.n_layer - 1
            census(layout, tap)
            x = self.through(i, i + 1, x, layout, None, tap, only and last)
            rows = layout.head_rows().to(x.device)
            if only and last:
                place, total, out = place[rows], total[rows], out[rows]
            h, missing = self.halting(x), 1 - total
            ends = (h >= missing - 0.01) | last
            scores.append(h.sum() / T)
            left_over = left_over + missing[ends].sum() / T
            weight = torch.where(ends, missing, h)
            total, out = total + weight, torch.addcmul(out, weight[:, None], x)
            if only and not last:
                lengths = layout.starts.diff().to(x.device)
                ends = ends | ends[rows].repeat_interleave(lengths)
            goes, stays = ends.nonzero()[:, 0], (~ends).nonzero()[:, 0]
            done.append((place[goes], out[goes]))
            if not len(stays):
                break
            if len(goes):
                layout = layout.without(ends)
                x, place, total, out = x[stays], place[stays], total[stays], out[stays]
        if torch.is_grad_enabled():
            self.halting.scores, self.halting.missing = scores, left_over
        places, out = map(torch.cat, zip(*done))
        # back into the order of the tokens
        at = place.new_zeros(T).index_copy_(0, places, torch.arange(len(places), device=x.device))
        return out[at[heads] if only else at]

    def leave_early(self, x, layout, tap=None, only=False):
        """The logits of texts, each from the first block after which its exit is sure of them."""
        out, said = x.new_empty(layout.B, self.config.n_classes), []
        here = torch.arange(layout.B, device=x.device)
        for i, block in enumerate(self.blocks):
            last = block is self.blocks[-1]
            census(layout, tap)
            rows = layout.head_rows()
            x = block(x, layout, None, tap, rows if last and only else None)
            if last:
                out[here] = self.logits(x if only else x[rows]).to(out.dtype)
                break
            said.append(self.exits.head(i, x[rows], said[-1] if i else None))
            answer = self.exits.answer(said)
            sure = answer.softmax(-1).amax(-1) >= self.config.exit_tau
            out[here[sure]] = answer[sure].to(out.dtype)
            if sure.all():
                break
            # most often nobody leaves
            if sure.any():
                gone = sure.repeat_interleave(layout.starts.diff().to(x.device))
                x, layout, here = x[~gone], layout.without(gone), here[~sure]
                said = [logits[~sure] for logits in said]
        return out

    def forward(self, idx, attention_mask=None, token_type_ids=None, tap=None, only=False):
        if self.exits is not None and self.config.exit_tau <= 1:
            x, layout = self.embed(idx, attention_mask, token_type_ids)
            refuse_empty(layout)
            return self.leave_early(x, layout, tap, only)
        h = self.encode(idx, attention_mask, token_type_ids, tap=tap, only=only)
        # whichever side is padded
        if self.config.head == 'cls' and not only and attention_mask is not None:
            h = h[torch.arange(len(h), device=h.device), attention_mask.bool().int().argmax(1)]
        return h if self.config.head is None else self.logits(h)

    def loss(self, batch, tap=None):
        """The task's, and in learning what halting costs: batch is (what encode takes, targets
        (B, L) or (B)) -> scalar."""
        inputs, targets = batch
        task = cross_entropy(self(**inputs, tap=tap), targets)
        pays = self.halting is not None and torch.is_grad_enabled()
        return task + self.halting.cost(len(self.blocks), n_tokens(inputs)) if pays else task

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Prompt and continuation: idx (B, L) -> (B, L + n), or a string -> a string.

        Temperature 0 is greedy. A prompt longer than the block, and every full block, is encoded
        again from its last half. ValueError if the model is not causal.
        """
        if not self.config.causal:
            raise ValueError('only a causal model generates')
        if isinstance(idx, str):
            texts = tokenizer(self.about, True)
            tokens = texts.encode([idx])[0] or texts.encode(['\n'])[0]
            idx = torch.tensor([tokens], device=self.wte.weight.device)
            return texts.decode(self.generate(idx, n, temperature, top_k, generator)[0].tolist())
        if not torch.is_tensor(idx):
            raise ValueError('generate takes one string, or a tensor of tokens (B, L)')
        block, cache = self.config.block_size, None
        for _ in range(n):
            if cache is None or cache[0].n == block:
                fits = cache is None and idx.shape[1] <= block
                window = idx if fits else idx[:, -max(1, block // 2):]
                cache = [LayerCache(block) for _ in self.blocks]
            else:
                window = idx[:, -1:]
            # around the model alone: of tokens made in it nobody could learn
            with torch.inference_mode():
                logits = self.logits(self.encode(window, cache=cache, only=True))        # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, new], 1)
        return idx

    @torch.inference_mode()
    def classify(self, texts, batch_size=32):
        """A string, or several -> the name of each one's class, or its number where no name is
        known: a list."""
        if self.config.head != 'cls':
            raise ValueError('only a model with a classification head classifies')
        tools = tokenizer(self.about, False)
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = [cut(i, self.config.block_size, tools.closing) for i in tools.encode(texts)]
        found, names = [], self.about.get('classes')
        for i in range(0, len(ids), batch_size):
            inputs = pad(ids[i:i + batch_size], self.wte.weight.device)
            found += self(**inputs, only=True).argmax(-1).tolist()
        return [names[i] for i in found] if names else found

    def flops(self, seq_len, rho=None, alive=None, only=False):
        """FLOPs per token of a forward pass over `seq_len` tokens, 2 per multiply-add.

        rho: the share of neurons run in each MLP of mlps(), routers counted; None: dense, without.
        alive: the shares of a batch's census that enter each block, exits counted; None: all.
        only: q, o and FFN of the last block for one token of each text.
        Not counted: norms, softmax, activations, look-ups. Attention counts the full square.
        Returns {'attention', 'scores', 'mlp', 'router', 'head', 'total'}.
        """
        c, D, A = self.config, self.config.n_embd, math.prod(self.config.heads)
        here, texts, pairs = zip(*(alive or [(1.0, 1.0, 1.0)] * c.n_layer))
        # tokens of each block that have a query, an output and an FFN, and pairs of their scores
        asking = [*here[:-1], texts[-1] / seq_len] if only else here
        scores = [*pairs[:-1], here[-1] / seq_len] if only else pairs
        out = dict(attention=0.0, scores=4 * A * seq_len * sum(scores), mlp=0.0, router=0.0,
                   head=0.0)
        shares = iter(rho or [1.0] * len(self.mlps()))
        for block, every, some in zip(self.blocks, here, asking):
            at = block.attn
            parts = (at.q, some), (at.k, every), (at.v, every), (at.o, some), (block.mlp, some)
            for module, tokens in parts:
                part = 'mlp' if module is block.mlp else 'attention'
                if not isinstance(module, MLP):
                    out[part] += 2 * D * A * tokens
                    continue
                out[part] += 4 * D * module.n_hidden * next(shares) * tokens
                if rho is not None and module.router is not None:
                    out['router'] += 2 * module.router.size * tokens
        if c.head == 'cls':             # once for a sequence
            out['head'] = (2 * D * D * c.pooler + 2 * D * c.n_classes) / seq_len
            heads = self.exits.heads if alive and self.exits is not None else ()
            out['head'] *= texts[-1] if heads else 1             # the others have left
            for head, share in zip(heads, texts):
                out['head'] += 2 * head.weight.numel() * share / seq_len
        elif c.head:
            out['head'] = 2 * D * c.vocab_size + (2 * D * D if c.head == 'mlm' else 0)
        out['total'] = sum(out.values())
        return out

# Of each model in int8 its fused(): pointers, which a copy of the model must not share.
FUSED = weakref.WeakKeyDictionary()

def int8_blocks(model):
    def routing(router):                # its matrices and its rule
        matrices = router.net.w1, router.net.w2
        if model.config.rule == 'dynk':
            return *matrices, True, router.tau, router.floor
        # of a sigmoid
        least = torch.logit(torch.tensor(router.tau, dtype=torch.float64)).item()
        return *matrices, False, least, -math.inf

    layers = []
    for block in model.blocks:
        at = block.attn
        parts = at.q, at.k, at.v, at.o, block.mlp                # a Linear, an MLP, None: in at.qkv
        dense = [getattr(part, 'weight', None) for part in parts[:4]]
        dense[0] = dense[0] if at.qkv is None else at.qkv
        mlps = []
        for part in parts:
            routed = isinstance(part, MLP) and model.config.rule
            router = routing(part.router) if routed else None
            mlps.append((part.experts, router) if isinstance(part, MLP) else None)
        norms = block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias
        layers.append(int8_layer(dense, mlps, norms))
    return layers

def projection_width(n_embd):
    """Hidden width at which an MLP with biases costs what the projection with its bias did."""
    return round((n_embd ** 2 + n_embd) / (2 * n_embd + 1))

def refuse_empty(layout):
    # where nothing is padding there is nothing to look at, nor for a compiler to ask
    if (layout.index is not None or not layout.L) and not layout.starts.diff().all():
        raise ValueError('a sequence without a token has no last hidden state')

def census(layout, tap):
    """Into a Masks, of what enters a block: tokens, texts, and pairs that see each other."""
    if isinstance(tap, Masks):
        lengths = layout.starts.diff().double()
        here = lengths.sum().item(), len(lengths), lengths.square().sum().item()
        tap.alive = [*tap.alive, here]

def cross_entropy(logits, targets):
    """logits (..., V), targets labels (...) or (labels, a teacher's logits, its share) -> scalar.
    A teacher's part is 4 KL(softmax(soft / 2) | softmax(logits / 2)) (Hinton et al. 2015)."""
    logits = logits.float().flatten(0, -2)
    if torch.is_tensor(targets):
        return F.cross_entropy(logits, targets.flatten())
    labels, soft, share = targets
    log_p, log_q = ((t / 2).log_softmax(-1) for t in (soft.float().flatten(0, -2), logits))
    apart = F.kl_div(log_q, log_p, reduction='batchmean', log_target=True)
    return (1 - share) * cross_entropy(logits, labels) + share * 4 * apart

def n_tokens(inputs):
    """Tokens that are not padding in what encode takes."""
    return int(inputs.get('attention_mask', torch.ones_like(inputs['idx'])).sum())

def pad(sequences, device='cpu'):
    """Lists of tokens -> what encode takes, (B, L) each: the padding is never run."""
    sequences = [torch.as_tensor(s, dtype=torch.long) for s in sequences]
    idx = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).to(device)
    return dict(idx=idx.clamp_min(0), attention_mask=idx >= 0)

# -------------------------------------------------------------------------------------- texts

class Texts(NamedTuple):
    """A tokenizer: strings to tokens and back."""
    encode: Callable                    # list of strings -> list of lists of tokens
    decode: Callable                    # list of tokens -> string
    vocab_size: int
    closing: int = 0                    # tokens that close a text and survive a cut
    json: str = ''                      # wordpieces: all there is to know of them

def cut(ids, length, closing):
    """At most `length` tokens, the closing ones among them."""
    return ids if len(ids) <= length else [*ids[:length - closing], *ids[len(ids) - closing:]]

def tokenizer(about, causal):
    """The Texts of what a checkpoint or the options say: tokenizer 'bytes', 'gpt2' (tiktoken) or
    'wordpiece', a published model's own (tokenizer_source, or its copy tokenizer_json)."""
    names = 'tokenizer', 'tokenizer_source', 'tokenizer_json'
    return read_tokenizer(*map(about.get, names), causal)

# to read 30,000 wordpieces takes as long as to classify a hundred texts
@functools.lru_cache(8)
def read_tokenizer(name, source, json, causal):
    if name == 'bytes':                 # a BERT's texts begin with a token of their own
        first = [] if causal else [256]
        return Texts(lambda texts: [first + list(t.encode('utf-8', 'replace')) for t in texts],
                     lambda ids: bytes(i for i in ids if i < 256).decode('utf-8', 'replace'),
                     256 + len(first))
    try:
        if name == 'gpt2':
            import tiktoken
            gpt2 = tiktoken.get_encoding('gpt2')
            return Texts(lambda texts: [gpt2.encode_ordinary(t) for t in texts], gpt2.decode, 50257)
        if json:
            import tokenizers
            enc = tokenizers.Tokenizer.from_str(json)
        else:
            enc = transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            enc = enc.backend_tokenizer
        enc.no_padding()
        enc.no_truncation()
    except BadInput:
        raise
    except ImportError as error:
        raise BadInput(f'tokenizer {name}: pip install {error.name}') from None
    except Exception as error:          # no network, no cache, no such file: each has its own
        raise BadInput(f'the tokenizer {name} {source or ""} can be neither found nor downloaded '
                       f'({reason(error)}); offline, fill its cache (TIKTOKEN_CACHE_DIR), give a '
                       'folder, or use --tokenizer=bytes') from None
    return Texts(lambda texts: [e.ids for e in enc.encode_batch(texts)], enc.decode,
                 enc.get_vocab_size(), 0 if causal else 1, enc.to_str())

# -------------------------------------------------------------------------------------- checkpoints

def write_atomically(path, write):
    """write(temporary path), flushed and renamed over `path`: a kill leaves the old file or the
    new one. BadInput names the path if that cannot be done; the old file stays whole. Of several
    ranks the first writes."""
    if ranks()[0]:
        return
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        write(temporary)
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    # torch.save turns a full disk into a RuntimeError
    except (OSError, RuntimeError) as error:
        full = shutil.disk_usage(os.path.dirname(path) or '.').free < 1 << 20
        why = 'the disk is full' if full else reason(error)
        raise BadInput(f'{path}: cannot be written ({why})') from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

def check_writable(path, make_folder=False):
    """Before the work: BadInput if what comes of it could not be written to `path`."""
    folder = os.path.dirname(path) or '.'
    try:
        if make_folder:
            os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if os.path.isdir(path):
            raise IsADirectoryError('a folder of this name is there')
        str(path).encode()              # torch opens no other
    except (OSError, UnicodeEncodeError) as error:
        raise BadInput(f'{path}: cannot be written ({reason(error)})') from None

def savable(model, path):
    """The model, without what torch.compile put around it. BadInput if it is for inference."""
    model = getattr(model, '_orig_mod', model)
    kinds = {model.dtype, *(str(p.dtype) for p in model.parameters())} - {'fp32', 'torch.float32'}
    if kinds:
        raise BadInput(f'{path}: a model in {min(kinds)} is for inference; save it before')
    if model.config.router_loss in ceilings():
        raise BadInput(f'{path}: routers of {model.config.router_loss} are made of the weights, '
                       'there is nothing to save; save it before')
    return model

def save(model, path, **extra):
    """One dict for torch.load(weights_only=True): config, model, data, and what `extra` says."""
    model = savable(model, path)
    data = dict(config=asdict(model.config), model=model.state_dict(), data=model.about) | extra
    write_atomically(path, lambda temporary: torch.save(data, temporary))

def checkpoint_hash(path):
    """Of what a checkpoint computes, its config and tensors: the same however often it is made."""
    data = read_checkpoint(path)
    config = {name: v for name, v in data['config'].items() if name != 'calibration'}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, t in sorted(data['model'].items()):
        digest.update(name.encode())
        digest.update(t.reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

def reason(error):
    """What an exception of somebody else's says, on one line, or its kind: some say nothing."""
    return textwrap.shorten(str(error), 160, placeholder=' ...') or type(error).__name__

def unpickled(path, every_bit=False):
    """What torch.save wrote, mapped from the file. No code runs, few bytes take little memory."""
    with zipfile.ZipFile(path) as archive:
        assert sum(r.file_size for r in archive.filelist) < os.path.getsize(path), 'compressed'
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith('.pkl')]
        assert not any(b'\nbytearray\n' in p for p in pickles), 'it makes a bytearray'
        assert not every_bit or archive.testzip() is None, 'damaged'
    return torch.load(path, map_location='cpu', mmap=True, weights_only=True)

def read_checkpoint(path):
    """The dict of a checkpoint, its tensors mapped from the file. BadInput if it is none."""
    try:
        data = unpickled(path)
        Config(**data['config']).check()
        assert isinstance(data['model'], dict) and isinstance(data.get('data'), dict | None), 'odd'
        # few bytes can be seen as many
        assert all(t.is_contiguous() for t in data['model'].values()), 'a tensor is expanded'
    except FileNotFoundError:
        raise BadInput(f'{path}: no such checkpoint') from None
    except UnicodeEncodeError:          # torch opens no file whose name it cannot encode
        raise BadInput(f'{path}: is not read as UTF-8 in this locale; set PYTHONUTF8=1') from None
    except Exception as error:          # torch raises half a dozen kinds for bad files
        raise BadInput(f'{path}: not a readable d2dmoe checkpoint, perhaps cut short or of another '
                       f'version ({reason(error)})') from None
    return data

def build(data, path='checkpoint'):
    """The model of a checkpoint's dict, in eval mode and without gradients. Kernels trust it."""
    c, state = Config(**data['config']), data['model']
    try:
        assert c.n_layer <= len(state), f'n_layer={c.n_layer}'
        with torch.device('meta'):
            model = Transformer(c)
            for i, block in enumerate(model.blocks):             # neurons may have gone
                for name in ('w_in', 'b_in', 'w_out'):
                    shape = len(state[f'blocks.{i}.mlp.w_in']), *getattr(block.mlp, name).shape[1:]
                    setattr(block.mlp, name, nn.Parameter(torch.empty(shape)))
        for name, own in model.state_dict().items():
            t, kind = state[name], torch.float32 if own.is_floating_point() else own.dtype
            assert t.dtype == kind and t.is_contiguous() and not t.is_meta, f'{name} is no {kind}'
            assert t.sum().isfinite() or t.isfinite().all(), f'{name} is not finite'
        model.load_state_dict(state, assign=True)
        for ends, H in ((mlp.offsets.tolist(), len(mlp.w_in)) for mlp in model.mlps()):
            assert ends == sorted(ends) and [ends[0], ends[-1]] == [0, H], 'offsets'
        model.about = data.get('data') or {}
        assert len(model.about.get('classes') or range(c.n_classes)) == c.n_classes, 'classes'
    except Exception as error:          # whatever a foreign config does to the modules
        raise BadInput(f'{path}: its tensors do not fit its config, or another version wrote it '
                       f'({reason(error)})') from None
    return model.eval().requires_grad_(False)

def load(where, n_classes=0, dtype='fp32'):
    """A checkpoint, an exported folder, or a published GPT-2 or BERT (folder or name) ->
    Transformer in eval mode, without gradients. n_classes > 0 puts a fresh classification head on
    a BERT, unless it has one of that size. dtype: see Transformer.quantize. Its weights stay in the
    file until they are used: put another in its place, never write into it. BadInput says what does
    not fit."""
    where = os.fspath(where)
    inside = os.path.join(where, 'd2dmoe.pt')                    # of what we exported
    path = inside if os.path.isfile(inside) else where
    ours = os.path.isfile(path) or path.endswith('.pt')
    data = read_checkpoint(path) if ours else read_published(where, n_classes)
    config, state = asdict(Config(**data['config'])), dict(data['model'])
    if n_classes and (config['head'], config['n_classes']) != ('cls', n_classes):
        if config['causal']:
            raise BadInput(f'{where}: a GPT-2 gets no classification head; use a BERT')
        build(data, where)                                       # before its sizes are trusted
        gone = 'mlm', 'classifier', 'exits.'
        state = {k: v for k, v in state.items() if not k.startswith(gone)}
        D, config = config['n_embd'], config | dict(head='cls', n_classes=n_classes, pooler=True,
                                                    exits=False, exit_tau=2.0,
                                                    calibration={})
        (data.get('data') or {}).pop('classes', None)            # they were others
        for name, n in dict(pooler=D, classifier=n_classes).items():
            state.setdefault(f'{name}.weight', torch.randn(n, D) * 0.02)
            state.setdefault(f'{name}.bias', torch.zeros(n))
    return build(dict(config=config, model=state, data=data.get('data')), where).quantize(dtype)

from_pretrained = load                  # transformers' name for it

def peek(where):
    """(Config, what is known of the data) of what load(where) would read, without its weights."""
    inside = where if os.path.isfile(where) else os.path.join(where, 'd2dmoe.pt')
    if os.path.isfile(inside):
        data = read_checkpoint(inside)
        return Config(**data['config']), data.get('data') or {}
    c = published_config(where)[1]
    name = 'bytes' if c.vocab_size == 256 else 'gpt2' if c.causal else 'wordpiece'
    return c, dict(tokenizer=name, tokenizer_source=where)

# -------------------------------------------------------------------------------------- published
#
# transformers reads and writes the files; ours is the table of names, used both ways.

GPT2 = {'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'ln_f': 'transformer.ln_f',
        'blocks': 'transformer.h', 'attn.q': 'attn.c_attn', 'attn.k': 'attn.c_attn',
        'attn.v': 'attn.c_attn', 'attn.o': 'attn.c_proj', 'mlp.w_in': 'mlp.c_fc.weight',
        'mlp.b_in': 'mlp.c_fc.bias', 'mlp.w_out': 'mlp.c_proj.weight',
        'mlp.b_out': 'mlp.c_proj.bias'}
BERT = {'wte': 'bert.embeddings.word_embeddings', 'wpe': 'bert.embeddings.position_embeddings',
        'wtt': 'bert.embeddings.token_type_embeddings', 'ln_e': 'bert.embeddings.LayerNorm',
        'blocks': 'bert.encoder.layer', 'attn.q': 'attention.self.query',
        'attn.k': 'attention.self.key', 'attn.v': 'attention.self.value',
        'attn.o': 'attention.output.dense', 'ln_1': 'attention.output.LayerNorm',
        'ln_2': 'output.LayerNorm', 'mlp.w_in': 'intermediate.dense.weight',
        'mlp.b_in': 'intermediate.dense.bias', 'mlp.w_out': 'output.dense.weight',
        'mlp.b_out': 'output.dense.bias', 'pooler': 'bert.pooler.dense',
        'mlm.dense': 'cls.predictions.transform.dense',
        'mlm.ln': 'cls.predictions.transform.LayerNorm', 'mlm_bias': 'cls.predictions.bias'}
KEYS = {'gpt2': dict(n_layer='n_layer', n_head='n_head', n_embd='n_embd', n_hidden='n_inner',
                     block_size='n_positions', vocab_size='vocab_size',
                     activation='activation_function', ln_eps='layer_norm_epsilon'),
        'bert': dict(n_layer='num_hidden_layers', n_head='num_attention_heads',
                     n_embd='hidden_size', n_hidden='intermediate_size',
                     block_size='max_position_embeddings', vocab_size='vocab_size',
                     activation='hidden_act', ln_eps='layer_norm_eps', n_types='type_vocab_size')}
ACTS = dict(gelu='gelu', gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', relu='relu')
# what our Transformer computes
ONLY = dict(model_type=tuple(KEYS), activation_function=tuple(ACTS), hidden_act=tuple(ACTS),
            scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
            is_decoder=(False,), add_cross_attention=(False,), tie_word_embeddings=(True,),
            position_embedding_type=('absolute',))

def transformers():
    """The library, quiet. BadInput says how to install it."""
    try:
        import huggingface_hub
        import transformers as library
    except ImportError:
        raise BadInput('published models need transformers: pip install transformers') from None
    huggingface_hub.logging.set_verbosity_error()                # five times that it tries again
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library

def published(model):
    """{their name: (our names, whether theirs is ours transposed)}, routing left out."""
    causal, out = model.config.causal, {}
    table = GPT2 if causal else BERT
    pattern = re.compile(rf'\b({"|".join(table)})\b')
    for name, p in model.named_parameters():
        if '.router.' not in name:
            theirs = pattern.sub(lambda m: table[m[0]], name)
            # nn.Linear keeps (out, in), GPT-2's Conv1D (in, out), our MLPs are neuron-major
            turned = name.startswith('blocks') and p.dim() == 2 and name.endswith('w_out') != causal
            out.setdefault(theirs, ([], turned))[0].append(name)
    return out

def published_class(c):
    """The class of transformers for a Config, and a prefix that its tensors lack."""
    library = transformers()
    if c.causal:
        return library.GPT2LMHeadModel, ''
    heads = dict(cls=library.BertForSequenceClassification, mlm=library.BertForMaskedLM)
    return (heads[c.head], '') if c.head else (library.BertModel, 'bert.')

def published_config(where, n_classes=0):
    """(transformers' config of a published model, our Config). BadInput says what is not ours."""
    try:
        j = transformers().AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:          # OSError, ValueError, errors of the hub and of JSON
        raise BadInput(f'{where}: neither a checkpoint, nor a folder with a config.json, nor a '
                       f'published model that can be downloaded ({reason(error)})') from None
    for key, possible in ONLY.items():
        if getattr(j, key, possible[0]) not in possible:
            raise BadInput(f'{where}: {key}={getattr(j, key)} is not supported, only '
                           f'{" or ".join(map(str, possible))}')
    causal = j.model_type == 'gpt2'
    c = Config(**{ours: getattr(j, theirs) for ours, theirs in KEYS[j.model_type].items()},
               causal=causal, pre_ln=causal)
    c.activation, c.n_hidden = ACTS[c.activation], c.n_hidden or 4 * c.n_embd
    kind = (getattr(j, 'architectures', None) or ['BertModel'])[0]
    if not causal:
        c.head, c.pooler = None, True
        if kind == 'BertForSequenceClassification' and n_classes in (0, j.num_labels):
            c.head, c.n_classes = 'cls', j.num_labels
        elif kind in ('BertForMaskedLM', 'BertForPreTraining') and not n_classes:
            c.head, c.pooler = 'mlm', False
    return j, c

def read_published(where, n_classes=0):
    """A published folder or name -> a checkpoint's dict, in fp32. Every parameter comes from the
    files, or BadInput names it; what we have no place for is named and dropped."""
    j, c = published_config(where, n_classes)
    kind, prefix = published_class(c)
    try:
        theirs, info = kind.from_pretrained(where, config=j, dtype=torch.float32,
                                            output_loading_info=True)
    except Exception as error:          # each file format has exceptions of its own
        raise BadInput(f'{where}: its weights cannot be read ({reason(error)})') from None
    missing = sorted(info['missing_keys'])
    if c.head is None and missing == ['pooler.dense.bias', 'pooler.dense.weight']:
        c.pooler, missing = False, []
    if missing:
        raise BadInput(f'{where}: has no tensor {missing[0]}')
    if info['unexpected_keys']:
        print(f'{where}: tensors that have no place here are dropped: '
              + ', '.join(sorted(info['unexpected_keys'])))
    tensors, state = theirs.state_dict(), {}
    with torch.device('meta'):
        model = Transformer(c)
    for name, (ours, turned) in published(model).items():
        t = tensors[name.removeprefix(prefix)]
        for our, part in zip(ours, (t.T if turned else t).chunk(len(ours))):
            state[our] = part.contiguous()
    for i in range(c.n_layer):          # one expert, unless routing says otherwise
        state[f'blocks.{i}.mlp.offsets'] = torch.tensor([0, c.n_hidden], dtype=torch.int32)
    about = dict(tokenizer='wordpiece', tokenizer_source=os.fspath(where))
    if c.head == 'cls':
        about['classes'] = [str(j.id2label[i]) for i in range(c.n_classes)]
    return dict(config=asdict(c), model=state, data=about)

def export(model, folder):
    """Write a model as a plain GPT-2 or BERT folder for transformers, and as our checkpoint
    d2dmoe.pt, which load(folder) reads, beside it; with replaced projections or FFNs of different
    sizes, which no plain model has, only that. BadInput if the folder is there and not empty."""
    model = savable(model, folder)
    path = os.path.join(folder, 'd2dmoe.pt')
    check_writable(path, make_folder=True)
    if os.listdir(folder):
        raise BadInput(f'{folder}: is not an empty folder; give another')
    sizes = {len(mlp.w_in) for mlp in model.ffns()}
    try:
        c = model.config
        if not c.projections and sizes == {c.n_hidden}:
            export_plain(model, folder)
        save(model, path)
    except BaseException as error:
        for name in os.listdir(folder):     # half of an export is none
            os.remove(os.path.join(folder, name))
        # safetensors has a kind of its own for a full disk
        if isinstance(error, BadInput) or not isinstance(error, Exception):
            raise
        raise BadInput(f'{folder}: cannot be written ({reason(error)})') from None

def widened(model):
    """The state of a model, narrow heads filled up with zeros to the dimensions of plain ones."""
    (n, r), state = model.config.heads, model.state_dict()
    d = model.config.n_embd // n

    def wide(t):                            # (n r, ...) -> (n d, ...)
        t = t.unflatten(0, (n, r))
        return torch.cat([t, t.new_zeros(n, d - r, *t.shape[2:])], 1).flatten(0, 1)

    for at in (f'blocks.{i}.attn' for i in range(model.config.n_layer)):
        # theirs divide scores by the root of the larger size
        for name, scale in (('q', (d / r) ** 0.5), ('k', 1.0), ('v', 1.0)):
            for kind in ('weight', 'bias'):
                state[f'{at}.{name}.{kind}'] = scale * wide(state[f'{at}.{name}.{kind}'])
        state[f'{at}.o.weight'] = wide(state[f'{at}.o.weight'].T).T
    return state

def export_plain(model, folder):
    """The folder's part for transformers: config.json, model.safetensors, the tokenizer."""
    c, (kind, prefix) = model.config, published_class(model.config)
    keys = KEYS['gpt2' if c.causal else 'bert']
    j = kind.config_class(**{theirs: getattr(c, ours) for ours, theirs in keys.items()})
    if c.causal and c.vocab_size < 50257:   # no token is special
        j.bos_token_id = j.eos_token_id = None
    setattr(j, keys['activation'], dict(gelu_tanh='gelu_new').get(c.activation, c.activation))
    if c.head == 'cls':
        labels = model.about.get('classes') or [f'LABEL_{i}' for i in range(c.n_classes)]
        j.id2label = dict(enumerate(labels))
        j.label2id = {label: i for i, label in enumerate(labels)}
    own, tensors = widened(model), {}
    for name, (ours, turned) in published(model).items():
        whole = torch.cat([own[our] for our in ours])
        tensors[name.removeprefix(prefix)] = (whole.T if turned else whole).contiguous()
    kind(j).save_pretrained(folder, state_dict=tensors)
    if model.about.get('tokenizer') == 'wordpiece':
        import tokenizers
        # d2dmoe.pt keeps it, too: what it was made from may be elsewhere later, or gone
        model.about['tokenizer_json'] = tokenizer(model.about, c.causal).json
        enc = tokenizers.Tokenizer.from_str(model.about['tokenizer_json'])
        library = transformers()
        fast = library.GPT2TokenizerFast if c.causal else library.BertTokenizerFast
        fast(tokenizer_object=enc).save_pretrained(folder)
