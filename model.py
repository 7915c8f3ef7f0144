"""GPT-2 and BERT in one class, whose FFNs may be sorted into experts.

    MLP(x) = act(x W_in^T + b_in) W_out + b_out       both matrices neuron-major: neuron i is row i of each

A converted MLP is the same MLP with its rows sorted: expert e is the slice offsets[e]:offsets[e+1], and a
router says, per token, which slices to run. With every expert on it is the dense model again.

    from model import from_pretrained
    m = from_pretrained('out/d2dmoe.pt')              # or 'gpt2', or a Hugging Face folder; eval mode, no gradients
    m.set_rule('dynk', tau=0.1)                       # tau = 0 runs everything
    m.generate(idx, 100)

    python model.py export out/d2dmoe.pt DIR --tau=0.1    # a folder that transformers loads, the routing beside it

    B batch · L sequence length · T tokens (B * L, less padding) · D n_embd · H heads · F hidden neurons
    E experts (slices) · R router outputs · V vocabulary
"""

import contextlib
import functools
import http.client
import json
import math
import os
import re
import shutil
import tempfile
import urllib.error
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import router as R
from kernel import ACTIVATIONS, dense_mlp, expert_mlp, linear, neuron_mask


class BadInput(ValueError):
    """Something the user gave cannot be used: one sentence says what, where, and what would work."""


@dataclass
class Config:
    """All that is needed to rebuild the modules of a checkpoint."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    n_hidden: int = 1024
    block_size: int = 256
    vocab_size: int = 256
    activation: str = 'relu'           # relu, gelu (erf), gelu_tanh
    causal: bool = True                # GPT; False: BERT
    pre_ln: bool = True                # GPT; False: BERT
    n_types: int = 0                   # token types (BERT: 2)
    head: Optional[str] = 'lm'         # lm, mlm, cls, None
    n_classes: int = 0                 # for head = cls
    pooler: bool = False               # BERT's tanh layer on the first token
    dropout: float = 0.0               # embeddings, attention weights, residual branches; never hidden neurons
    ln_eps: float = 1e-5
    projections: str = ''              # which of q, k, v, o are MLPs of the same cost
    n_slices: list = field(default_factory=list)   # E of every MLP in forward order; [] = dense
    n_outputs: list = field(default_factory=list)  # R of every MLP that has owners, 0 elsewhere; [] = none has
    router_loss: str = ''              # '' = no routers
    router_width: int = 0
    rule: str = ''                     # '' = run every expert, no router
    tau: float = 0.0
    floor: float = 0.0                 # of dynk, in units of the layer's RMS norm


class Layout(NamedTuple):
    """Where the tokens of the flat (T, D) activations stand in their (B, L) batch."""
    B: int
    L: int
    index: Optional[torch.Tensor]      # (T,) positions of the real tokens, None when none is padding
    mask: Optional[torch.Tensor]       # (B, 1, 1 or L, L) bool for attention, None when none is needed

    def pad(self, x):                  # (T, D) -> (B, L, D)
        if self.index is not None:
            x = x.new_zeros(self.B * self.L, x.shape[-1]).index_copy(0, self.index, x)
        return x.view(self.B, self.L, -1)

    def pack(self, x):                 # (B, L, D) -> (T, D)
        x = x.reshape(self.B * self.L, -1)
        return x if self.index is None else x[self.index]


class Linear(nn.Linear):
    """nn.Linear on the fastest dense linear of the device."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """The FFN of every block, and what a replaced attention projection becomes: dense or routed."""

    def __init__(self, n_embd, n_hidden, act):
        super().__init__()
        self.act = act
        self.w_in = nn.Parameter(torch.randn(n_hidden, n_embd) * 0.02)
        self.b_in = nn.Parameter(torch.zeros(n_hidden))
        self.w_out = nn.Parameter(torch.randn(n_hidden, n_embd) * 0.02)
        self.b_out = nn.Parameter(torch.zeros(n_embd))
        self.register_buffer('offsets', torch.tensor([0, n_hidden], dtype=torch.int32))
        self.register_buffer('owners', None)                     # (R, E) bool
        self.router = None
        self.rule, self.tau, self.k, self.floor = '', 0.0, 0, 0.0                 # '' = run everything, without the router
        self.oracle = False                                      # score with the true norms (evaluation only)
        self.rho = None                                          # share of neurons run by this rule, once measured

    def n_outputs(self):                                         # R
        return len(self.offsets) - 1 if self.owners is None else len(self.owners)

    def scores(self, x):                                         # (T, D) -> (T, R)
        if self.oracle:
            a = ACTIVATIONS[self.act](linear(x, self.w_in, self.b_in))
            return R.expert_norms(a, *R.gram(self.w_out, self.offsets, self.owners))
        return self.router(x)

    def forward(self, x, tap=None):                              # (T, D) -> (T, D)
        score = mask = None
        if self.rule:
            score = self.scores(x)
            mask = R.to_slices(R.select(score, self.rule, self.tau, self.k, self.floor), self.owners)  # (T, E)
        if tap is None and mask is None:
            return dense_mlp(x, self.w_in, self.b_in, self.w_out, self.b_out, self.act)
        if tap is None:
            return expert_mlp(x, mask, self.w_in, self.b_in, self.w_out, self.b_out, self.offsets, self.act,
                              rho=self.rho)
        z = linear(x, self.w_in, self.b_in)                      # (T, F)
        a = ACTIVATIONS[self.act](z)
        tap.append(dict(x=x, z=z, a=a, score=score, mask=mask))
        if mask is not None:
            a = a.masked_fill(~neuron_mask(mask, self.offsets, self.w_in.shape[0]), 0)
        return linear(a, self.w_out.t(), self.b_out)

    @torch.no_grad()
    def sort_neurons(self, order, offsets, owners=None):
        """Put neuron order[i] at row i and cut the rows at `offsets`: the output stays what it was."""
        for p in (self.w_in, self.b_in, self.w_out):
            p.copy_(p[order])
        self.offsets = torch.as_tensor(offsets, dtype=torch.int32, device=self.w_in.device)
        self.owners = owners


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.causal, self.dropout = config.n_head, config.causal, config.dropout
        D = config.n_embd
        for name in 'qkvo':
            replaced = name in config.projections
            setattr(self, name, MLP(D, projection_width(D), 'relu') if replaced else Linear(D, D))

    def project(self, name, x, tap):
        module = getattr(self, name)
        return module(x, tap) if isinstance(module, MLP) else module(x)

    def forward(self, x, layout, cache=None, tap=None):          # (T, D) -> (T, D)
        q, k, v = (layout.pad(self.project(name, x, tap)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for name in 'qkv')                            # (B, H, L, D/H)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, layout.mask, self.dropout if self.training else 0.0,
                                           is_causal=self.causal and layout.mask is None and q.shape[2] > 1)
        return self.project('o', layout.pack(y.transpose(1, 2).flatten(2)), tap)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.pre_ln = config.pre_ln
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.ln_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.ln_eps)
        self.mlp = MLP(config.n_embd, config.n_hidden, config.activation)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, layout, cache=None, tap=None):
        if self.pre_ln:
            x = x + self.drop(self.attn(self.ln_1(x), layout, cache, tap))
            return x + self.drop(self.mlp(self.ln_2(x), tap))
        x = self.ln_1(x + self.drop(self.attn(x, layout, cache, tap)))
        return self.ln_2(x + self.drop(self.mlp(x, tap)))


class LayerCache:
    """Keys and values of one layer, (B, H, block_size, D/H), of which the first `n` positions are filled."""

    def __init__(self, size):
        self.k = self.v = None
        self.size, self.n = size, 0

    def extend(self, k, v):
        if self.k is None:
            B, H, _, d = k.shape
            self.k, self.v = k.new_empty(B, H, self.size, d), v.new_empty(B, H, self.size, d)
        end = self.n + k.shape[2]
        self.k[:, :, self.n:end], self.v[:, :, self.n:end] = k, v
        self.n = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Transformer(nn.Module):

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.n_embd % c.n_head:
            raise ValueError(f'n_embd={c.n_embd} must be a multiple of n_head={c.n_head}')
        if c.activation not in ACTIVATIONS:
            raise ValueError(f'activation must be one of {", ".join(ACTIVATIONS)}, not {c.activation!r}')
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.wtt = nn.Embedding(c.n_types, c.n_embd) if c.n_types else None
        self.ln_e = None if c.pre_ln else nn.LayerNorm(c.n_embd, eps=c.ln_eps)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.ln_eps) if c.pre_ln else None
        self.pooler = Linear(c.n_embd, c.n_embd) if c.pooler else None
        if c.head == 'mlm':                                      # BERT's: dense, GELU, LayerNorm, tied decoder
            self.mlm = nn.ModuleDict(dict(dense=Linear(c.n_embd, c.n_embd),
                                          ln=nn.LayerNorm(c.n_embd, eps=c.ln_eps)))
            self.mlm_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.classifier = Linear(c.n_embd, c.n_classes) if c.head == 'cls' else None
        self.apply(self._init)
        for name, p in self.named_parameters():                  # GPT-2: residual branches start small
            if name.endswith(('attn.o.weight', 'mlp.w_out')):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))
        if c.n_slices:
            self.add_experts(c.n_slices, c.n_outputs)
        if c.router_loss:
            self.add_routers(c.router_loss, c.router_width)
        self.set_rule(c.rule, c.tau, floor=c.floor)

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def mlps(self):
        """Every MLP in the order in which a forward pass taps them: replaced projections, then the FFN."""
        return [m for block in self.blocks
                for m in (block.attn.q, block.attn.k, block.attn.v, block.attn.o, block.mlp) if isinstance(m, MLP)]

    def ffns(self):
        return [block.mlp for block in self.blocks]

    def add_experts(self, n_slices, n_outputs=()):
        """Room for the offsets (and owners) of a checkpoint, or a note of what moefy has made."""
        for i, mlp in enumerate(self.mlps()):
            if len(mlp.offsets) != n_slices[i] + 1:
                mlp.offsets = torch.zeros(n_slices[i] + 1, dtype=torch.int32)
            if n_outputs and n_outputs[i] and mlp.owners is None:
                mlp.owners = torch.zeros(n_outputs[i], n_slices[i], dtype=torch.bool)
        self.config.n_slices, self.config.n_outputs = list(n_slices), list(n_outputs)

    def add_routers(self, loss, width):
        """A fresh router for every MLP; those of projections have width 32 (DESIGN)."""
        ffns = set(self.ffns())
        for mlp in self.mlps():
            mlp.router = R.Router(self.config.n_embd, mlp.n_outputs(), width if mlp in ffns else min(width, 32), loss)
            if loss == 'share' and not mlp.w_in.is_meta:
                mlp.router.init_share(mlp.w_in, mlp.offsets, mlp.owners)
            mlp.router.to(mlp.w_in.device)
        self.config.router_loss, self.config.router_width = loss, width

    def set_rule(self, rule, tau=0.0, oracle=False, floor=0.0):
        """How scores become experts, in every MLP; '' runs all of them without a router. oracle: true norms."""
        if rule and rule not in R.RULES:
            raise ValueError(f'rule must be one of {", ".join(R.RULES)}, not {rule!r}')
        for mlp in self.mlps():
            if rule and not oracle and mlp.router is None:
                raise ValueError(f'rule={rule} needs routers: this model has none yet')
            mlp.rule, mlp.tau, mlp.oracle, mlp.rho = rule, tau, oracle, None if tau else 1.0
            mlp.floor = floor
            mlp.k = max(1, round(tau * mlp.n_outputs()))         # for topk, tau is the share of the outputs
        self.config.rule, self.config.tau, self.config.floor = rule, tau, floor
        return self

    def encode(self, idx, attention_mask=None, token_type_ids=None, cache=None, tap=None):
        """The last hidden states: idx (B, L) -> (B, L, D), zeros where attention_mask (B, L) is 0.

        Activations are flat (T, D) between the embeddings and the end, without the padding: no expert,
        router or FLOP is spent on it. `cache` holds a LayerCache for each block; `tap`, a list, receives
        dict(x, z, a, score, mask) from every MLP.
        """
        B, L = idx.shape
        past = cache[0].n if cache else 0
        if past + L > self.config.block_size:
            raise ValueError(f'{past + L} tokens do not fit into block_size={self.config.block_size}')
        index = mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            index = attention_mask.reshape(-1).nonzero().squeeze(-1)
            mask = attention_mask.bool()[:, None, None, :]                              # (B, 1, 1, L)
            if self.config.causal:
                mask = mask & torch.ones(L, L, dtype=torch.bool, device=idx.device).tril()
        layout = Layout(B, L, index, mask)
        x = self.wte(idx) + self.wpe(torch.arange(past, past + L, device=idx.device))   # (B, L, D)
        if self.wtt is not None:
            x = x + (self.wtt.weight[0] if token_type_ids is None else self.wtt(token_type_ids))
        x = layout.pack(x)                                                              # (T, D)
        x = self.drop(x if self.ln_e is None else self.ln_e(x))
        for i, block in enumerate(self.blocks):
            x = block(x, layout, cache[i] if cache else None, tap)
        return layout.pad(x if self.ln_f is None else self.ln_f(x))

    def logits(self, h):
        """The head: (..., D) -> (..., V) for lm and mlm; (B, L, D) -> (B, classes) for cls."""
        if self.config.head == 'cls':
            h = h[:, 0]
            return self.classifier(self.drop(h if self.pooler is None else torch.tanh(self.pooler(h))))
        if self.config.head == 'mlm':
            h = self.mlm['ln'](F.gelu(self.mlm['dense'](h)))
            return linear(h, self.wte.weight, self.mlm_bias)
        return linear(h, self.wte.weight)

    def forward(self, idx, attention_mask=None, token_type_ids=None, tap=None):
        h = self.encode(idx, attention_mask, token_type_ids, tap=tap)
        return h if self.config.head is None else self.logits(h)

    @torch.inference_mode()
    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Prompt and continuation: idx (B, L) -> (B, L + n). Temperature 0 is greedy.

        A prompt longer than the block, and every full block, is re-encoded from its last half.
        """
        if not self.config.causal:
            raise ValueError('only a causal model generates')
        block, cache = self.config.block_size, None
        for _ in range(n):
            if cache is None or cache[0].n == block:
                fits = cache is None and idx.shape[1] <= block
                window = idx if fits else idx[:, -max(1, block // 2):]
                cache = [LayerCache(block) for _ in self.blocks]
            else:
                window = idx[:, -1:]
            logits = self.logits(self.encode(window, cache=cache)[:, -1])               # (B, V)
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

    def flops(self, seq_len, rho=None):
        """FLOPs per token of one forward pass over sequences of `seq_len` tokens, 2 per multiply-add.

        rho: the share of neurons run in each MLP of mlps(), routers counted; None: dense, without routers.
        Not counted: norms, softmax, activations, look-ups. Attention counts the full square.
        Returns {'attention', 'scores', 'mlp', 'router', 'head', 'total'}.
        """
        c = self.config
        D, ffns, mlps = c.n_embd, set(self.ffns()), self.mlps()
        out = dict(attention=2 * D * D * (4 - len(c.projections)) * c.n_layer,
                   scores=4 * D * seq_len * c.n_layer, mlp=0.0, router=0.0, head=0.0)
        for mlp, share in zip(mlps, rho or [1.0] * len(mlps)):
            out['mlp' if mlp in ffns else 'attention'] += 4 * D * mlp.w_in.shape[0] * share
            if rho is not None and mlp.router is not None:
                out['router'] += 2 * (mlp.router.w1.numel() + mlp.router.w2.numel())
        if c.head == 'cls':                                      # once for a sequence
            out['head'] = (2 * D * D * c.pooler + 2 * D * c.n_classes) / seq_len
        elif c.head:
            out['head'] = 2 * D * c.vocab_size + (2 * D * D if c.head == 'mlm' else 0)
        out['total'] = sum(out.values())
        return out


def projection_width(n_embd):
    """Hidden width at which an MLP with biases costs what the D x D projection with its bias did."""
    return round((n_embd ** 2 + n_embd) / (2 * n_embd + 1))


def write_atomically(path, write):
    """write(temporary path), flushed and renamed over `path`: a kill leaves the old file or the new one."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path), suffix='.tmp')
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)                               # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save(model, path, **extra):
    """One dict for torch.load(weights_only=True): config, model, and whatever `extra` says of the run."""
    data = dict(config=asdict(model.config), model=model.state_dict(), **extra)
    write_atomically(path, lambda temporary: torch.save(data, temporary))


def reason(error):
    """The first line of an exception of somebody else's, or its kind: some say nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def read_checkpoint(path):
    """The dict of a checkpoint, its tensors mapped from the file. BadInput if it is none."""
    if not os.path.isfile(path):
        raise BadInput(f'{path}: no such checkpoint')
    try:
        data = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
    except Exception as error:                                   # torch raises half a dozen kinds for bad files
        raise BadInput(f'{path}: not a readable checkpoint, perhaps cut short '
                         f'({reason(error)})') from None
    if not isinstance(data, dict) or not {'config', 'model'} <= data.keys():
        raise BadInput(f'{path}: not a d2dmoe checkpoint (it has no config and model)')
    return data


def build(data, path='checkpoint'):
    """The model of a checkpoint's dict, in eval mode and without gradients."""
    unknown = data['config'].keys() - {f.name for f in fields(Config)}
    if unknown:
        raise BadInput(f'{path}: unknown config entries {sorted(unknown)}: written by another version?')
    with torch.device('meta'):
        model = Transformer(Config(**data['config']))
    try:
        model.load_state_dict(data['model'], assign=True)
    except RuntimeError as error:
        raise BadInput(f'{path}: its tensors do not match its config ({str(error).splitlines()[1].strip()})') from None
    return model.eval().requires_grad_(False)


def load(path):
    """A model of ours from a checkpoint of ours, in eval mode and without gradients."""
    return build(read_checkpoint(path), path)


# ---------------------------------------------------------------------------------------------- published formats

GPT2 = {'blocks': 'h', 'attn.q': 'attn.c_attn', 'attn.k': 'attn.c_attn', 'attn.v': 'attn.c_attn',
        'attn.o': 'attn.c_proj', 'mlp.w_in': 'mlp.c_fc.weight', 'mlp.b_in': 'mlp.c_fc.bias',
        'mlp.w_out': 'mlp.c_proj.weight', 'mlp.b_out': 'mlp.c_proj.bias'}
BERT = {'wte': 'embeddings.word_embeddings', 'wpe': 'embeddings.position_embeddings',
        'wtt': 'embeddings.token_type_embeddings', 'ln_e': 'embeddings.LayerNorm', 'blocks': 'encoder.layer',
        'attn.q': 'attention.self.query', 'attn.k': 'attention.self.key', 'attn.v': 'attention.self.value',
        'attn.o': 'attention.output.dense', 'ln_1': 'attention.output.LayerNorm', 'ln_2': 'output.LayerNorm',
        'mlp.w_in': 'intermediate.dense.weight', 'mlp.b_in': 'intermediate.dense.bias',
        'mlp.w_out': 'output.dense.weight', 'mlp.b_out': 'output.dense.bias', 'pooler': 'pooler.dense',
        'mlm.dense': 'cls.predictions.transform.dense', 'mlm.ln': 'cls.predictions.transform.LayerNorm',
        'mlm_bias': 'cls.predictions.bias'}
TIED = {'lm_head.weight': 'wte.weight', 'cls.predictions.decoder.weight': 'wte.weight',
        'cls.predictions.decoder.bias': 'mlm_bias'}              # stored twice by some; ours: once
EXTRAS = r'h\.\d+\.attn\.(masked_)?bias|(embeddings\.)?position_ids|cls\.seq_relationship\.(weight|bias)'
KEYS = {True: dict(n_layer='n_layer', n_head='n_head', n_embd='n_embd', n_hidden='n_inner', block_size='n_positions',
                   vocab_size='vocab_size', activation='activation_function', ln_eps='layer_norm_epsilon'),
        False: dict(n_layer='num_hidden_layers', n_head='num_attention_heads', n_embd='hidden_size',
                    n_hidden='intermediate_size', block_size='max_position_embeddings', vocab_size='vocab_size',
                    activation='hidden_act', ln_eps='layer_norm_eps', n_types='type_vocab_size')}    # by `causal`
DEFAULTS = dict(n_positions=1024, activation_function='gelu_new', layer_norm_epsilon=1e-5, n_inner=None,
                hidden_act='gelu', layer_norm_eps=1e-12)
ACTS = dict(gelu='gelu', gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', relu='relu')
ONLY = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
            is_decoder=False, position_embedding_type='absolute')    # what our Transformer computes
ROUTING = ('n_slices', 'n_outputs', 'router_loss', 'router_width', 'rule', 'tau', 'floor')
NAMES = dict.fromkeys(('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'), 'openai-community/') | \
    dict.fromkeys(('bert-base-uncased', 'bert-large-uncased'), 'google-bert/')
HEADS = ('cls.', 'classifier.')                                  # stand without the prefix of the rest
TOKENIZER = ('vocab.txt', 'tokenizer.json', 'tokenizer_config.json')
WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')


def published(model):
    """{their name: [(our name, parameter), ...]}: one each, three for GPT-2's fused q, k, v; routers are not theirs."""
    table, out = GPT2 if model.config.causal else BERT, {}
    pattern = re.compile(rf'\b({"|".join(table)})\b')
    for name, p in model.named_parameters():
        if '.router.' not in name:
            out.setdefault(pattern.sub(lambda m: table[m[0]], name), []).append((name, p))
    return out


def is_turned(name, p, conv):
    """Does a file hold our matrix transposed? nn.Linear keeps (out, in), Conv1D (in, out), our MLPs neuron-major."""
    return name.startswith('blocks') and p.dim() == 2 and name.endswith('w_out') != conv


def read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            data = json.load(f)
    except (OSError, ValueError) as error:
        raise BadInput(f'{path}: not readable, perhaps missing or cut short ({error})') from None
    if not isinstance(data, dict):
        raise BadInput(f'{path}: should hold one JSON object')
    return data


def shards(index):
    """The files that an index names, all beside it."""
    files = sorted(set(read_json(index).get('weight_map', {}).values()))
    if not files or any(os.path.basename(f) != f for f in files):
        raise BadInput(f'{index}: its weight_map should name files beside it')
    return files


def fetch(name):
    """Download a published model into torch.hub's folder, unless it is there; returns the folder."""
    repo = NAMES.get(name, '') + name
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repo):
        raise BadInput(f'{name}: neither a folder, nor a checkpoint, nor one of {", ".join(NAMES)} or owner/name')
    folder = os.path.join(torch.hub.get_dir(), 'd2dmoe', repo.replace('/', '--'))
    url = (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/') + f'/{repo}/resolve/main/'
    if '://' not in url:
        raise BadInput(f'HF_ENDPOINT={url.split("/")[0]}: must begin with https:// or http://')

    def get(file):
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            torch.hub.download_url_to_file(url + file, path)     # to a temporary file first, with a progress bar
        return path

    try:
        os.makedirs(folder, exist_ok=True)
        cached = [f for f in WEIGHTS if os.path.isfile(os.path.join(folder, f))]
        if read_json(get('config.json')).get('model_type') == 'bert' and not cached:
            for file in TOKENIZER:                               # for --tokenizer=wordpiece; some have other files
                with contextlib.suppress(urllib.error.HTTPError):
                    get(file)
        for file in cached or WEIGHTS:
            try:
                path = get(file)
                for shard in shards(path) if file.endswith('.json') else ():
                    get(shard)
                return folder
            except urllib.error.HTTPError as error:
                if error.code != 404 or file == WEIGHTS[-1]:
                    raise
    except (OSError, http.client.HTTPException) as error:        # URLError and HTTPError are OSErrors
        raise BadInput(f'{name}: cannot be downloaded from {url} ({error}); offline, give a folder that holds its '
                       f'config.json and model.safetensors') from None


def tokenizer_folder(where):
    """Where the tokenizer of a published model, or of a checkpoint that began as one, lies."""
    while os.path.isfile(where):
        where = (read_checkpoint(where).get('options') or {}).get('init_from') or ''
    return where if os.path.isdir(where) else fetch(where)


def read_tensors(path):
    """{name: function that returns the tensor} of one file, to be called once each; safetensors stay mapped."""
    try:
        if path.endswith('.bin'):
            data = torch.load(path, map_location='cpu', weights_only=True)
            return {name: functools.partial(data.pop, name) for name in data}
        from safetensors import safe_open

        def read(name):                                          # maps the file anew, so that no page stays behind
            with safe_open(path, 'pt') as f:
                return f.get_tensor(name)
        with safe_open(path, 'pt') as f:
            return {name: functools.partial(read, name) for name in f.keys()}
    except ImportError:
        raise BadInput(f'{path} needs the safetensors package: pip install safetensors') from None
    except Exception as error:                                   # each library has kinds of its own for bad files
        raise BadInput(f'{path}: not readable, perhaps missing or cut short ({reason(error)})') from None


def published_config(j, tensors, path):
    """Our Config for a config.json and the tensors beside it."""
    kind = j.get('model_type', 'bert' if 'hidden_size' in j else 'gpt2')
    if kind not in ('gpt2', 'bert'):
        raise BadInput(f'{path}: model_type {kind!r} is neither gpt2 nor bert')
    if wrong := [key for key, value in ONLY.items() if j.get(key, value) != value]:
        raise BadInput(f'{path}: {wrong[0]}={j[wrong[0]]} is not supported, only {ONLY[wrong[0]]}')
    j, keys = DEFAULTS | j, KEYS[kind == 'gpt2']
    if missing := [key for key in keys.values() if key not in j]:
        raise BadInput(f'{path}: has no {missing[0]}')
    c = Config(**{ours: j[theirs] for ours, theirs in keys.items()}, causal=kind == 'gpt2', pre_ln=kind == 'gpt2')
    if c.activation not in ACTS:
        raise BadInput(f'{path}: activation {c.activation!r} is none of {", ".join(ACTS)}')
    c.activation, c.n_hidden = ACTS[c.activation], c.n_hidden or 4 * c.n_embd
    if kind == 'bert':
        c.pooler = 'pooler.dense.weight' in tensors
        c.head = 'mlm' if 'cls.predictions.bias' in tensors else None
        if c.pooler and 'classifier.bias' in tensors:            # without a pooler it is a head for tokens
            c.head, c.n_classes = 'cls', len(j.get('id2label', (0, 1)))
    return c


def read_routing(folder, config):
    """What export wrote beside a plain model: fills the routing in `config`, returns offsets, owners and routers."""
    path = os.path.join(folder, 'd2dmoe.json')
    if not os.path.isfile(path):
        return {}
    j = read_json(path)
    if missing := set(ROUTING) - j.keys():
        raise BadInput(f'{path}: has no {sorted(missing)[0]}')
    for key in ROUTING:
        setattr(config, key, j[key])
    return {name: read().clone() for name, read in read_tensors(os.path.join(folder, 'routers.safetensors')).items()}


def read_folder(folder):
    """(Config, state dict in fp32) of a Hugging Face folder. BadInput names the tensor that does not fit."""
    path = os.path.join(folder, 'config.json')
    j = read_json(path)
    first = next((f for f in WEIGHTS if os.path.isfile(os.path.join(folder, f))), None)
    if first is None:
        raise BadInput(f'{folder}: holds neither model.safetensors nor pytorch_model.bin')
    files = shards(os.path.join(folder, first)) if first.endswith('.json') else [first]
    raw = [pair for f in files for pair in read_tensors(os.path.join(folder, f)).items()]
    found = [re.fullmatch(r'(.*?)(wte|embeddings\.word_embeddings)\.weight', name) for name, _ in raw]
    prefix = next((m[1] for m in found if m), '')
    tensors = {}
    for name, read in raw:                                       # gamma and beta: TensorFlow's names
        plain = name.removeprefix(prefix).replace('Norm.gamma', 'Norm.weight').replace('Norm.beta', 'Norm.bias')
        if plain in tensors:
            raise BadInput(f'{folder}: holds the tensor {plain} twice, under two names or in two files')
        tensors[plain] = read
    config = published_config(j, tensors, path)
    state, conv = read_routing(folder, config), config.causal
    try:
        with torch.device('meta'):
            model = Transformer(config)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f'{path}: {error}') from None
    for i in range(config.n_layer):                              # one expert, unless routing says otherwise
        state.setdefault(f'blocks.{i}.mlp.offsets', torch.tensor([0, config.n_hidden], dtype=torch.int32))
    for theirs, ours in published(model).items():
        full = theirs if theirs.startswith(HEADS) else prefix + theirs
        if theirs not in tensors:
            raise BadInput(f'{folder}: has no tensor {full}')
        t = tensors.pop(theirs)()
        if theirs.endswith('c_attn.weight'):                     # first of its layer and never square: which layout?
            conv = t.shape[0] != 3 * config.n_embd
        turned = is_turned(*ours[0], conv)
        shape = [len(ours) * len(ours[0][1]), *ours[0][1].shape[1:]]
        if list(t.shape) != (shape[::-1] if turned else shape):
            raise BadInput(f'{folder}: tensor {full} has the shape {list(t.shape)}, its config.json asks for '
                           f'{shape[::-1] if turned else shape}')
        copy = turned or len(ours) > 1 or 'safetensors' in first                       # else it is ours alone already
        for (name, p), part in zip(ours, (t.T if turned else t).chunk(len(ours))):
            state[name] = torch.empty(p.shape).copy_(part) if copy else part.float()
    for name, read in tensors.items():
        if name in TIED and TIED[name] in state and not torch.equal(read().float(), state[TIED[name]]):
            raise BadInput(f'{folder}: tensor {name} differs from the embedding; only tied ones are supported')
        if name not in TIED and not re.fullmatch(EXTRAS, name):
            raise BadInput(f'{folder}: tensor {name} is not one that a {"GPT-2" if config.causal else "BERT"} has')
    return config, state


def from_pretrained(where, n_classes=0):
    """A Hugging Face folder, a published name or a checkpoint of ours -> Transformer in eval mode, without gradients.

    n_classes > 0 puts a fresh classification head on a BERT, unless it has one of that size. Every tensor of a
    folder is used or one of EXTRAS, every parameter is filled and every shape fits, or BadInput names the tensor.
    """
    where = os.fspath(where)
    if os.path.exists(os.path.join(where, 'd2dmoe.pt')):         # what export writes where it cannot write theirs
        where = os.path.join(where, 'd2dmoe.pt')
    if where.endswith('.pt') or os.path.isfile(where):
        data = read_checkpoint(where)
        config, state = dict(data['config']), data['model']
    else:
        config, state = read_folder(where if os.path.isdir(where) else fetch(where))
        config = asdict(config)
    if n_classes and (config['head'], config['n_classes']) != ('cls', n_classes):
        if config['causal']:
            raise BadInput(f'{where}: a GPT-2 gets no classification head; use a BERT')
        state = {k: v for k, v in state.items() if not k.startswith(('mlm', 'classifier'))}
        D, config = config['n_embd'], config | dict(head='cls', n_classes=n_classes, pooler=True)
        for name, n in dict(pooler=D, classifier=n_classes).items():
            state.setdefault(f'{name}.weight', torch.randn(n, D) * 0.02)
            state.setdefault(f'{name}.bias', torch.zeros(n))
    return build(dict(config=config, model=state), where)


def their_config(c, classes=None):
    """The config.json of transformers for our Config; `classes` are the labels' names, where they are known."""
    kind = dict(lm='GPT2LMHeadModel', mlm='BertForMaskedLM', cls='BertForSequenceClassification').get(c.head)
    end = 50256 if c.vocab_size == 50257 else None               # GPT-2's default is beyond a smaller vocabulary
    config = {theirs: getattr(c, ours) for ours, theirs in KEYS[c.causal].items()} | dict(
        model_type='gpt2' if c.causal else 'bert', tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
        architectures=[kind or ('GPT2Model' if c.causal else 'BertModel')])
    config[KEYS[c.causal]['activation']] = {'gelu_tanh': 'gelu_new'}.get(c.activation, c.activation)
    if c.head == 'cls':
        config['id2label'] = dict(enumerate(classes or [f'LABEL_{i}' for i in range(c.n_classes)]))
    return config


def export(path, folder, tau=None, say=print):
    """Write a checkpoint of ours as a plain GPT-2 or BERT folder for transformers, and its routing beside it.

    Neurons stay sorted, which changes nothing for a dense model. from_pretrained(folder) restores the routing:
    its router's usual rule with `tau`, or without one what the checkpoint says (of train.py's: all experts on).
    """
    data, inside = read_checkpoint(path), functools.partial(os.path.join, folder)
    model, options, about = build(data, path), data.get('options') or {}, data.get('data') or {}
    c = model.config
    if tau is not None:
        if not c.router_loss or not 0 <= tau <= 1:
            raise BadInput(f'--tau={tau:g}: must be between 0 and 1, and {path} must have routers')
        model.set_rule(R.USUAL_RULE[c.router_loss], tau)
    try:
        os.makedirs(folder, exist_ok=True)
        inside_already = os.listdir(folder)
    except OSError as error:
        raise BadInput(f'{folder}: cannot be made a folder ({error.strerror}); give another') from None
    if inside_already:
        raise BadInput(f'{folder}: is not an empty folder; give another')
    why = 'attention projections were replaced by MLPs' if c.projections else \
        'it is neither a GPT-2 nor a BERT' if c.causal != c.pre_ln or c.causal == bool(c.n_types) else \
        'BERT has a pooler before its classification head' if c.head == 'cls' and not c.pooler else ''
    if why:
        save(model, inside('d2dmoe.pt'), options=options, data=about)
        return say(f'{path}: {why}: no plain model for transformers; {inside("d2dmoe.pt")} is in our own format only')
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise BadInput('export needs the safetensors package: pip install safetensors') from None
    tensors, prefix = {}, 'transformer.' if c.causal else 'bert.'
    for theirs, ours in published(model).items():
        t = torch.cat([p.T if is_turned(name, p, c.causal) else p for name, p in ours], -1).contiguous()
        tensors[theirs if theirs.startswith(HEADS) else prefix + theirs] = t
    files = {'model.safetensors': tensors}
    if c.n_slices:
        files['routers.safetensors'] = {name: t.contiguous() for name, t in model.state_dict().items()
                                        if name.endswith(('.offsets', '.owners')) or '.router.' in name}
        files['d2dmoe.json'] = {key: getattr(c, key) for key in ROUTING} | dict(mlps=[
            dict(sizes=mlp.offsets.diff().tolist(), offsets=mlp.offsets.tolist(),
                 owners=None if mlp.owners is None else mlp.owners.int().tolist()) for mlp in model.mlps()])
    files['config.json'] = their_config(c, about.get('classes'))   # last: a folder that has it has everything
    for file, content in files.items():
        write_atomically(inside(file), lambda t: Path(t).write_text(json.dumps(content, indent=1))
                         if file.endswith('.json') else save_file(content, t, metadata=dict(format='pt')))
    if options.get('tokenizer') == 'wordpiece':
        try:
            source = tokenizer_folder(path)
            for file in [name for name in TOKENIZER if os.path.isfile(os.path.join(source, name))]:
                files[file] = shutil.copy(os.path.join(source, file), folder)
        except BadInput as error:                                # the model is written, and right without it
            say(f'{folder}: no tokenizer beside it: {error}')
    say(f'{folder}: {", ".join(files)}')


if __name__ == '__main__':
    import sys

    import model as this                                         # train knows this module, not __main__
    import train
    if len(sys.argv) not in (4, 5) or sys.argv[1] != 'export' or not all(a.startswith('--tau=') for a in sys.argv[4:]):
        sys.exit('usage: python model.py export out/d2dmoe.pt DIR [--tau=0.1]')

    def job():
        tau = [train.cast('tau', arg.removeprefix('--tau='), float) for arg in sys.argv[4:]]
        this.export(*sys.argv[2:4], *tau)
    train.guarded(job)
