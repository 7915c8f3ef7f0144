"""From a dense transformer to a dynamic-k mixture of experts: options, data, the loop, the phases.

    python train.py                             every phase that is not done yet, then the table
    python train.py --phase=sparsify            one phase, on the checkpoint before it
    python train.py --seeds=0,1,2               all of it once a seed, then mean and spread
    python train.py --phase=sample --prompt='def ' --tau=0.1
    python train.py --phase=export --to=DIR --tau=0.1       a folder that transformers loads, too
    python train.py --preset=paper              without what is ours; also hour, gpt2, bert
    python train.py --preset=bert --data=emotion.tsv --attn_projections=qkvo

    base --> dense                              the control: as many more steps, no penalty
      +--> [prune] --> [halting] --> [narrow], [attn] --> sparsify --> moefy --> router --> [adapt]
      +--> [masks]                narrow.pt  attn.pt     sparse.pt   moe.pt    d2dmoe.pt     eval
                                                           [exits] of d2dmoe.pt, or of dense.pt

A phase is a class whose fields are its options, and it lives with its method:

    reads       names of checkpoints: the first that exists      writes      the name of its own
    wanted      optional: without this option a full run skips it each       optional: an option of
    prepare(model, batches)   the change made once, in place                 which every value gets
    parameters(model)         what learns, in so many `steps`                a run of its own
    loss(model, batch, progress) -> loss, what to log: the task, shares by name
    finish(model)             optional: the change made at the end; what to remember
    report(model, batches)    optional: what to remember; may compare with self.dense
    looks                     optional: whether prepare() reads batches though nothing learns

`steps` and `lr` are options with the phase's name in front. A new method is such a class and its
place in PHASES; the phase that comes after it has to name what it writes, first in its `reads`. An
option that is not typed keeps the value with which the checkpoints of the folder were made; one
that is typed and differs stops the run, unless --overwrite=1 runs that phase again. (Edited code
does not count: --phase=NAME --overwrite=1 runs a phase anew.)
"""

if __name__ == '__main__':                  # Ctrl-C while torch is being imported ends quietly
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import collections
import contextlib
import copy
import datetime
import difflib
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import signal
import sys
import sysconfig
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType, SimpleNamespace
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import bench
from kernel import over_ranks, ranks, wait_for_all
from model import (BadInput, Config, Masks, Transformer, build, check_writable, checkpoint_hash,
                   cut, export, load, n_tokens, pad, peek, read_checkpoint, reason, save, tokenizer,
                   unpickled, write_atomically)
from moefy import LearnMasks, Moefy
from router import GRID, FLOOR, ROUTERS, Adapt, LearnExits, LearnHalting, Route
from sparsify import Distil, Narrow, Prune, Sparsify

# -------------------------------------------------------------------------------------- options

# where no preset is named: narrow heads, of a GPT from scratch (what is published loses more by
# them); model and routers learn together in the end, the rate comes down once
OURS = dict(narrow=0.5, lr_end=1.0, router_loss='active,norm', expert_price=0.1)
PRESETS = {
    # the small GPT as the paper does it; the presets below, too
    'paper': dict(out_dir='out-paper', lr_end=0.1, router_loss='norm,active',
                  expert_price=0.0),
    'hour': dict(out_dir='out-hour', n_layer=6, n_head=6, n_embd=384, batch_size=16,
                 base_steps=900, sparsify_steps=250, router_steps=300, base_lr=1e-3,
                 sparsify_lr=5e-4, adapt_steps=250, adapt_lr=5e-4, router_width=96),
    # the authors' settings for GPT-2 on OpenWebText: 1000 steps of 960 x 1024 tokens, 768 x 4
    'gpt2': dict(out_dir='out-gpt2', arch='gpt', tokenizer='gpt2', init_from='gpt2',
                 base_steps=0, block_size=1024, batch_size=8, grad_accum=120, sparsify_steps=1000,
                 sparsify_lr=6e-4, sparsity_loss='l1', sparsity_weight=5e-4, sparsity_ramp=0.0,
                 n_experts=768, router_steps=5000, router_lr=3e-3, router_width=128),
    # the authors' settings for ReLU-fied BERT-base on emotion (CARER): 16,000 texts, so 250 steps
    # are an epoch; 10 epochs a phase, 3 for the projections; the penalty's weight is constant
    'bert': dict(out_dir='out-bert', arch='bert', tokenizer='wordpiece',
                 init_from='bert-base-uncased', block_size=128, dropout=0.1, batch_size=64,
                 weight_decay=0.01, base_lr=2e-5, sparsify_lr=2e-5, base_steps=2500,
                 sparsify_steps=2500, attn_steps=750, sparsity_loss='l1', sparsity_weight=1e-4,
                 sparsity_ramp=0.0, n_experts=128, router_steps=2500, router_lr=1e-3,
                 router_width=128),
}

BERT = dict(causal=False, pre_ln=False, n_types=2, head='cls', pooler=True, ln_eps=1e-12)

def new_config(o, vocab, n_classes):
    bert = BERT | dict(n_classes=n_classes) if o.arch == 'bert' else {}
    return Config(n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd, n_hidden=4 * o.n_embd,
                  block_size=o.block_size, vocab_size=vocab, activation=o.activation,
                  dropout=o.dropout, **bert)

@dataclass
class Command:
    """the command"""
    phase: str = 'all'                      # one of the phases, eval, sample, export, or all
    preset: Annotated[str, {'': (), **PRESETS}] = ''     # '' = ours; hour: the paper's, larger
    out_dir: str = 'out'                    # checkpoints, the encoded data, results.json
    overwrite: bool = False                 # run phases again whose options or input changed
    seeds: Annotated[str, '0,1,2'] = ''     # several, 0,1,2: each in its folder, then one table
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'
    compile: bool = False                   # torch.compile in every phase that learns
    fsdp: bool = False                      # under torchrun: each rank keeps a part of the blocks
    checkpoint_activations: bool = False    # blocks compute again what they would have to keep
    profile: bool = False                   # a table of a few steps, and OUT_DIR/PHASE-trace.json

@dataclass
class Loop:
    """the loop, of every phase that learns"""
    seed: int = 0                           # repeats a run on the same kind of CPU bit for bit
    batch_size: Annotated[int, '> 0'] = 8   # sequences a micro-step
    grad_accum: Annotated[int, '> 0'] = 1   # micro-steps a step
    weight_decay: float = 0.1               # on matrices only

@dataclass
class Use:
    """what is done with the checkpoints: eval, sample, export"""
    rule: Annotated[str, {'': (), **GRID}] = ''     # '' = the router's usual
    tau: Annotated[float, '0..1'] = None    # instead of the grid; of topk the share
    floor: float = FLOOR                    # of dynk: less than it does not run; in RMS of a layer
    budget: Annotated[float, '0..1'] = 0.0  # share of its FLOPs with every expert: a tau an MLP
    max_loss: float = 0.0                   # the same by the share of loss that may be added
    eval_batches: Annotated[int, '> 0'] = 32    # held out; every second one picks tau
    dtype: Literal['fp32', 'bf16', 'int8'] = 'fp32'     # eval ends with int8 in any case
    prompt: str = '\n'                      # to go on from; a newline
    n_tokens: int = 300                     # to sample; show_load shows the last block_size
    temperature: float = 0.8
    top_k: int = 50
    show_load: bool = False                 # colour each token by the share of the FFNs it ran
    to: str = ''                            # the folder to export to

@dataclass
class Base:
    """A dense model, from random weights or from --init_from."""
    reads, writes = (), 'base'
    data: str = 'stdlib'            # a text, a folder of texts or of .bin; bert: a .tsv or .jsonl
    val: str = ''                   # bert: the dev file; empty: every 10th line of --data
    tokenizer: Literal['bytes', 'gpt2', 'wordpiece'] = 'bytes'   # wordpiece is init_from's own
    arch: Literal['gpt', 'bert'] = 'gpt'    # gpt predicts the next token, bert a text's label
    init_from: str = ''             # a published model (folder or name) or a checkpoint of ours
    n_layer: Annotated[int, '> 0'] = 4
    n_head: Annotated[int, '> 0'] = 4
    n_embd: Annotated[int, '> 0'] = 256     # the FFN has 4 n_embd neurons
    block_size: Annotated[int, '> 0'] = 256
    activation: Literal['relu', 'gelu', 'gelu_tanh'] = 'relu'    # sparsify turns gelu into relu
    dropout: Annotated[float, '0..1'] = 0.0
    steps: int = 400
    lr: float = 2e-3                # cosine to a tenth, warm-up over 5 %

    def create(self, about):
        if self.init_from:
            return self.adopt(about)
        return Transformer(new_config(self, about['vocab'], len(about.get('classes', ()))))

    def adopt(self, about):
        """The model of --init_from, dense again if it was routed."""
        model = load(self.init_from, n_classes=len(about.get('classes', ())))
        c, vocab, have = model.config, about['vocab'], f'--init_from={self.init_from} has'
        refuse(c.causal != (self.arch == 'gpt'), f'{have} another --arch than {self.arch}')
        # published embeddings of wordpieces may have rows to spare
        refuse(vocab > c.vocab_size or vocab < c.vocab_size and self.tokenizer != 'wordpiece',
               f'{have} {c.vocab_size} tokens, --tokenizer={self.tokenizer} has {vocab}')
        refuse(self.block_size > c.block_size,
               f'{have} {c.block_size} positions; use --block_size={c.block_size}')
        for name in ('n_layer', 'n_head', 'n_embd', 'activation'):
            setattr(self, name, getattr(c, name))
        c = replace(c, dropout=self.dropout, n_experts=[], n_outputs=[], router_loss='', rule='',
                    router_width=0, tau=0.0, floor=0.0, taus=[], calibration={}, exits=False,
                    exit_tau=2.0, halting=False)
        state = {k: v[[0, -1]] if k.endswith('.offsets') else v
                 for k, v in model.state_dict().items()
                 if '.router.' not in k and not k.startswith(('exits.', 'halting.'))}
        return build(dict(config=asdict(c), model=state, data=about))

    def prepare(self, model, batches):
        pass

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        return model.loss(batch), {}

@dataclass
class Dense:
    """The control: sparsify's steps and rate, no penalty."""
    reads, writes, like = ('base',), 'dense', 'sparsify'
    steps: int = Sparsify.steps
    lr: float = Sparsify.lr
    prepare, parameters, loss = Base.prepare, Base.parameters, Base.loss

PHASES = dict(base=Base, dense=Dense, prune=Prune, halting=LearnHalting, narrow=Narrow,
              attn=Distil, sparsify=Sparsify, moefy=Moefy, router=Route, adapt=Adapt,
              exits=LearnExits, masks=LearnMasks)
# what each command takes, eval beside what made the checkpoints
EACH = ('phase', 'preset', 'out_dir', 'seeds', 'router_loss', 'rule', 'tau', 'floor', 'budget',
        'max_loss')
COMMANDS = dict(eval=(*EACH, 'device', 'eval_batches', 'dtype', 'batch_size'),
                sample=(*EACH, 'device', 'prompt', 'n_tokens', 'temperature', 'top_k', 'seed',
                        'dtype', 'show_load'), export=(*EACH, 'to'))
LOOP = tuple(f.name for f in fields(Loop))
# what an annotation may ask for, beside a dict of choices
RANGES = {'0,1,2': ('different whole numbers, a comma between them',
                    lambda v: all(n.isdigit() and v.split(',').count(n) == 1
                                  for n in v.split(','))),
          '> 0': ('positive', lambda v: v > 0), '0..1': ('between 0 and 1', lambda v: 0 <= v <= 1),
          '0..8': ('between 0 and 8', lambda v: 0 <= v <= 8),
          'letters of qkvo': ('some of the letters qkvo, each once',
                              lambda v: set(v) <= set('qkvo') and len(set(v)) == len(v))}

def own_options(section):
    """{option: its dataclass field} of a phase, or of Command, Loop, Use."""
    cls = PHASES.get(section, section)
    prefix = getattr(cls, 'like', section)
    return {f'{prefix}_{f.name}' if f.name in ('steps', 'lr') else f.name: f for f in fields(cls)}

def all_options():
    sections = Command, *PHASES, Loop, Use
    return {option: f for section in sections for option, f in own_options(section).items()}

def refuse(wrong, sentence):
    if wrong:
        raise BadInput(sentence)

def asked(f):
    """What the annotation of an option asks for: names to choose from, or a key of RANGES."""
    return f.type.__metadata__[0] if hasattr(f.type, '__metadata__') else get_args(f.type)

def cast(name, text, f):
    """The value that a typed text stands for, checked by the annotation of its field."""
    kind, asks = float if f.default is None else type(f.default), asked(f)
    words = {'1': True, 'true': True, '0': False, 'false': False}
    try:
        value = words[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        what = '0 or 1' if kind is bool else f'of type {kind.__name__}'
        raise BadInput(f'--{name}={text}: must be {what}') from None
    if isinstance(asks, str):
        refuse(not RANGES[asks][1](value), f'--{name}={text}: must be {RANGES[asks][0]}')
    elif kind in (int, float):
        refuse(not 0 <= value < math.inf, f'--{name}={text}: must be finite and not negative')
    elif asks:
        several = any(getattr(cls, 'each', None) == name for cls in PHASES.values())
        for word in text.split(',') if several else [text]:
            refuse(word not in asks,
                   f'--{name}={word}: must be one of {", ".join(filter(None, asks))}')
    return value

def parse(argv, presets=True):
    """`--key=value` arguments -> {option: value} of what was typed, with `presets` of theirs."""
    known, typed = all_options(), {}
    for arg in argv:
        key, eq, text = arg.partition('=')
        name = key.removeprefix('--').replace('-', '_')
        refuse(not key.startswith('--') or not eq,
               f'{arg!r} is not of the form --key=value (--help lists the keys)')
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f'did you mean --{near[0]}?' if near else 'see --help'
            raise BadInput(f'--{name}: unknown option; {hint}')
        # torch opens no file whose name it cannot encode
        refuse(text.encode(errors='replace').decode() != text, f'--{name}: is not read as UTF-8 '
               'in this locale; set PYTHONUTF8=1')
        typed[name] = cast(name, text, known[name])
    explicit, preset = set(typed), PRESETS.get(typed.get('preset'), {})
    if 'n_experts' in typed:                # one excludes the other
        typed.setdefault('expert_size', 0)
    typed = implied(preset | typed) | typed
    check(typed, explicit)
    return preset | typed if presets else typed

def implied(typed):
    """What --init_from and --data say of --arch and --tokenizer, where these are not typed."""
    if typed.get('init_from') and not {'arch', 'tokenizer'} <= typed.keys():
        c, about = peek(typed['init_from'])
        return dict(arch='gpt' if c.causal else 'bert', tokenizer=about.get('tokenizer', 'bytes'))
    return dict(arch='bert') if is_labelled(typed.get('data', '')) else {}

def is_labelled(source):
    return source.endswith(('.tsv', '.jsonl'))

def with_defaults(typed):
    usual = {option: f.default for option, f in all_options().items()}
    usual |= PRESETS.get(typed.get('preset'), OURS)
    if typed.get('expert_price') == 0:      # no adapt lowers the rate
        usual['lr_end'] = Sparsify.lr_end
    o = usual | typed
    if o['init_from'] or o['attn_projections'] or o['arch'] == 'bert':
        usual['narrow'] = Narrow.narrow
    return SimpleNamespace(**usual | typed)

def first_folder(o):
    """Where the first of several seeds, or the only one, keeps its checkpoints."""
    return os.path.join(o.out_dir, f's{o.seeds.split(",")[0]}') if o.seeds else o.out_dir

def ancestors(name):
    """The phases that lead to this one, itself among them."""
    before = [other for other, cls in PHASES.items() if cls.writes in PHASES[name].reads]
    return {name}.union(*map(ancestors, before))

def check(typed, explicit):
    """What options can get wrong together, and explicit ones that nothing would read."""
    o, one_model = with_defaults(typed), typed.get('phase') in ('sample', 'export')
    refuse(o.phase not in (*PHASES, *COMMANDS, 'all'),
           f'--phase={o.phase}: must be all, {", ".join((*COMMANDS, *PHASES))}')
    refuse(not o.out_dir, '--out_dir=: give a folder')
    used = {*COMMANDS.get('eval' if o.phase == 'all' else o.phase, ())}
    if not one_model:
        phases = ancestors(o.phase) if o.phase in PHASES else PHASES
        used = used.union(*map(own_options, phases))
    if o.phase not in COMMANDS:
        used = used.union(LOOP, own_options(Command))
    if hasattr(PHASES.get(o.phase), 'report'):
        used.add('eval_batches')
    if o.seeds:
        used.discard('seeds' if one_model else 'seed')
    for name in sorted(explicit - used):
        raise BadInput(f'--{name}: --phase={o.phase} does not use it; leave it out')
    refuse('floor' in explicit and o.rule not in ('', 'dynk'),
           f'--floor: --rule={o.rule} has none; leave it out')
    bert = o.arch == 'bert'
    refuse(is_labelled(o.data) != bert and o.data != 'stdlib' or o.val and not is_labelled(o.data),
           f'--data={o.data}: --arch=bert, and only it, learns from labelled texts (and their '
           '--val), a .tsv or .jsonl file')
    refuse(o.tokenizer == ('gpt2' if bert else 'wordpiece') or
           o.tokenizer == 'wordpiece' and not o.init_from,
           f'--tokenizer={o.tokenizer}: --arch=bert takes bytes, or wordpiece from --init_from')
    for name in ('n_layer', 'n_head', 'n_embd', 'activation'):
        refuse(o.init_from and name in typed,
               f'--{name}: --init_from={o.init_from} brings its own; leave it out')
    refuse('n_experts' in typed and o.expert_size,
           f'--n_experts={o.n_experts} and --expert_size={o.expert_size}: give one')
    splits = o.phase == 'all' or o.phase in PHASES and 'moefy' in ancestors(o.phase)
    o.out_dir = first_folder(o)
    begins = not os.path.exists(os.path.join(o.out_dir, 'base.pt'))
    new = splits and not o.init_from and begins
    name = 'expert_size' if o.expert_size else 'n_experts'
    refuse(new and getattr(o, name) > 4 * o.n_embd, f'--{name}={getattr(o, name)}: more than the '
           f'{4 * o.n_embd} neurons of an FFN')
    refuse(o.n_embd % o.n_head, f'--n_embd={o.n_embd}: must be a multiple of --n_head={o.n_head}')
    check_routers(o, explicit, begins)
    least = least_flops(o) if o.budget else 0.0
    refuse(o.budget and o.budget <= least, f'--budget={o.budget}: attention and head alone cost '
           f'{least:.1%} of the FLOPs; ask for more')
    refuse((o.exits or o.halting) and begins and not bert, '--exits=1, --halting=1: for BERTs '
           'only; the next tokens of a GPT need the keys and values of every block')
    refuse(o.narrow and o.attn_projections, '--narrow, --attn_projections: narrow heads do not go '
           'with projections that are MLPs; give one')
    refuse(o.exits and o.halting, '--exits=1, --halting=1: tokens that halt do not go with texts '
           'that leave early; give one')
    refuse(o.fsdp and int(os.environ.get('WORLD_SIZE', 1)) == 1,
           '--fsdp=1: of several processes each keeps a part; start them with torchrun')
    refuse(o.phase == 'export' and not o.to,
           '--phase=export needs --to=DIR, a folder that is not there yet')

def check_routers(o, explicit, begins):
    """The part of check() that asks what kinds of routers can do."""
    kinds = o.router_loss.split(',')
    for kind in kinds:
        refuse(not hasattr(ROUTERS.get(kind, Route), 'loss') and o.phase in ('all', 'router'),
               f'--router_loss={kind}: has nothing to learn here; eval shows it anyway')
    refuse(o.phase == 'all' and begins and o.expert_price
           and all(ROUTERS[kind].rule != 'threshold' for kind in kinds), f'--router_loss='
           f'{o.router_loss}: adapt learns with active routers; add active, or --preset=paper, '
           'which does without adapt')
    refuse('router_width' in explicit
           and all(getattr(ROUTERS.get(kind), 'square', False) for kind in kinds),
           f'--router_width: --router_loss={o.router_loss} is as wide as it has experts')
    refuse(o.halt_sooner and begins and not o.halting, f'--halt_sooner={o.halt_sooner}: of tokens '
           'that halt; add --halting=1')

def least_flops(o):
    """What of the dense FLOPs is left where no expert runs."""
    made = [os.path.join(o.out_dir, f'{name}.pt') for name in ('attn', 'narrow', 'base')]
    made = next(filter(os.path.exists, made), o.init_from)
    c = peek(made)[0] if made else new_config(o, 50257 if o.tokenizer == 'gpt2' else 256, 2)
    c.head_dim = c.head_dim or math.ceil(o.narrow * c.n_embd / c.n_head)
    with torch.device('meta'):
        model = Transformer(replace(c, projections=o.attn_projections or c.projections, rule='',
                                    router_loss=''))
    all_off = [0.0] * len(model.mlps())
    whole, least = (model.flops(c.block_size, rho)['total'] for rho in (None, all_off))
    return least / whole

def print_help():
    said, usual = [__doc__], with_defaults({})
    for section in (Command, *PHASES, Loop, Use):
        cls = PHASES.get(section, section)
        title = section if section in PHASES else ''
        said.append(f'\n  {title} {cls.__doc__.splitlines()[0]}'.rstrip())
        lines = inspect.getsource(cls).splitlines()
        for option, f in own_options(section).items():
            line = next((x for x in lines if x.strip().startswith(f'{f.name}:')), '')
            names = () if isinstance(asked(f), str) else filter(None, asked(f))
            words = line.partition('# ')[2], f'({", ".join(names)})'.replace('()', '')
            said.append(f'    --{option:<18} {str(getattr(usual, option)).strip():<12} '
                        + ' '.join(filter(None, words)))
    print('\n'.join(said))                  # at once: `| head` may close before the end

# -------------------------------------------------------------------------------------- data

class Rows(NamedTuple):
    """Labelled texts: tokens of each, cut to --block_size, and the number of its class."""
    texts: list
    classes: np.ndarray

class Corpus(NamedTuple):
    """Tokens, mapped into memory, or Rows of labelled texts; and where they came from."""
    train: np.ndarray
    val: np.ndarray
    about: dict                             # source, hash, tokenizer, vocab, perhaps classes

say_once = functools.cache(print)           # the phases of a run share their data
STDLIB = sysconfig.get_paths()['stdlib']

def text_files(source):
    """The files behind --data, in a fixed order."""
    if source == 'stdlib':
        left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
        found = glob.glob(os.path.join(glob.escape(STDLIB), '**', '*.py'), recursive=True)
        found = [f for f in found
                 if not left_out & set(os.path.relpath(f, STDLIB).split(os.sep)[:-1])]
    else:
        found = [source, *glob.glob(os.path.join(glob.escape(source), '**', '*'), recursive=True)]
        # a run inside would read what it writes
        ours = {folder for folder, name in map(os.path.split, found)
                if name in ('data.pt', 'base.pt', 'seeds.json')}
        found = [f for f in found if os.path.isfile(f) and os.path.dirname(f) not in ours
                 and b'\0' not in open(f, 'rb').read(8192)]
    return sorted(found)

def content_hash(files):
    digest = hashlib.sha256()
    for path in filter(os.path.getsize, files):
        digest.update(np.memmap(path, mode='r'))
    return digest.hexdigest()[:16]

def open_corpus(o, folder, made=None):
    """--data as tokens, encoded once into folder/data.pt, where they are found again even if the
    source is gone; which stays, where a checkpoint `made` from it has not learned from the new one.
    """
    bins = [os.path.join(o.data, name) for name in ('train.bin', 'val.bin')]
    if os.path.isfile(bins[0]):             # nanoGPT's folder, used where it is
        refuse(not all(os.path.isfile(f) and os.path.getsize(f) for f in bins)
               or any(os.path.getsize(f) % 2 for f in bins),
               f'--data={o.data}: needs both train.bin and val.bin, of whole uint16')
        about = dict(source=o.data, tokenizer=o.tokenizer, hash=content_hash(bins),
                     vocab=256 if o.tokenizer == 'bytes' else 50257)
        return checked(o, Corpus(*(np.memmap(f, np.uint16, 'r') for f in bins), about))
    path, known = os.path.join(folder, 'data.pt'), {}
    with contextlib.suppress(Exception):    # not there, or damaged: encoded again
        found = unpickled(path, every_bit=True)
        known = found if found['about']['hash'] and found['wanted'] else {}
    wanted = [o.data, o.val, o.tokenizer, o.arch, o.init_from, o.block_size]
    try:
        sources = [text_files(source) for source in (o.data, o.val) if source]
        files = sum(sources, [])
        stale = known and all(sources) and known['about']['hash'] != content_hash(files)
    except OSError as error:
        raise BadInput(f'--data={o.data}: cannot be read ({reason(error)})') from None
    if stale or known.get('wanted') != wanted:
        other = f'; {path} is of other options, or of an older version' if known else ''
        refuse(not all(sources) or not sum(map(os.path.getsize, files)),
               f'--data={o.data}{f", --val={o.val}" * bool(o.val)}: no such file, no texts in it, '
               f'or empty{other}')
        known = encode(o, files, folder) | dict(wanted=wanted)
        if not made or made['data']['hash'] == known['about']['hash']:      # else it is refused
            write_atomically(path, lambda temporary: torch.save(known, temporary))
    try:
        known |= {name: x.numpy() for name, x in known.items() if torch.is_tensor(x)}
        for name in ('train', 'val') if o.arch == 'bert' else ():
            ends, classes = known[f'{name}_ends'], known[f'{name}_classes']
            sizes, n_classes = np.diff(ends, prepend=0), len(known['about']['classes'])
            assert 0 < sizes.min() <= sizes.max() <= o.block_size, 'sizes of texts'
            assert len(ends) == len(classes) and ends[-1] == len(known[name]), 'ends of texts'
            assert 0 <= classes.min() <= classes.max() < n_classes, 'classes'
            assert known[name].max() < known['about']['vocab'], 'tokens'
            known[name] = Rows(np.split(known[name], ends[:-1]), classes)
        return checked(o, Corpus(known['train'], known['val'], known['about']))
    except BadInput:
        raise
    except Exception as error:          # of the right names, but not what encode() writes
        raise BadInput(f'{path}: damaged ({reason(error)}); without it --data is encoded again'
                       ) from None

def open_in_turn(o, folder, made=None):
    """open_corpus: the first rank encodes, the others map its file."""
    if ranks()[0]:
        wait_for_all()
    corpus = open_corpus(o, folder, made)
    if not ranks()[0]:
        wait_for_all()
    return corpus

def checked(o, corpus):
    """A corpus that fits the options, and one line about it."""
    if o.arch == 'bert':
        counts, what = [len(rows.classes) for rows in corpus[:2]], 'labelled texts'
        n, n_classes = sum(counts), len(corpus.about['classes'])
        if n_classes > n / 3:
            say_once(f'warning: {n:,} texts of {n_classes:,} classes: are labels and texts '
                     'swapped? The label comes first')
        held = len(np.unique(corpus.val.classes))
        if 2 * held <= n_classes <= n / 3 and not o.val:
            say_once(f'warning: the held-out texts, every 10th line, are of {held} of the '
                     f'{n_classes} classes: shuffle the file, or give --val')
        if counts[1] < 100:
            say_once(f'warning: {counts[1]} held-out texts decide: an accuracy is uncertain by '
                     f'about {50 / counts[1] ** 0.5:.0f} points')
    else:
        counts, what = [len(tokens) for tokens in corpus[:2]], 'tokens'
        refuse(min(counts) <= o.block_size, f'--data={o.data}: {counts[0]} tokens to train on and '
               f'{counts[1]} held out are too few for --block_size={o.block_size}')
        largest, vocab = max(tokens.max() for tokens in corpus[:2]), corpus.about['vocab']
        refuse(largest >= vocab, f'--data={o.data}: token {largest} is beyond the {vocab} of '
               f'--tokenizer={o.tokenizer}')
    say_once(f'data: {o.data}: {counts[0]:,} {what} to train on, {counts[1]:,} held out')
    return corpus

def encode(o, files, folder):
    """The tokens of all files and what there is to know about them, as open_corpus keeps them."""
    about = peek(o.init_from)[1] if o.tokenizer == 'wordpiece' else {}
    about |= dict(source=o.data, tokenizer=o.tokenizer, hash=content_hash(files))
    texts = tokenizer(about, o.arch == 'gpt')
    about |= dict(vocab=texts.vocab_size, tokenizer_json=texts.json)
    kind = np.uint16 if texts.vocab_size <= 1 << 16 else np.uint32
    if o.arch == 'bert':
        return encode_labelled(o, texts, kind, about)
    n_bytes = sum(map(os.path.getsize, files)) + len(files) - 1
    size = max(1, min(65536, n_bytes // 40))
    # of a large corpus neither text nor tokens fit into memory: these go to files without a name
    try:
        parts = {name: tempfile.TemporaryFile(dir=folder) for name in ('train', 'val')}
        # every 20th chunk is held out, so that the held-out part is spread over all of it
        for i, chunk in enumerate(chunks(files, size)):
            tokens = np.frombuffer(chunk, np.uint8) if o.tokenizer == 'bytes' else \
                texts.encode([chunk.decode('utf-8', 'replace')])[0]
            parts['val' if i % 20 == 10 else 'train'].write(np.array(tokens, kind))
        refuse(not parts['val'].tell(), f'--data={o.data}: {n_bytes} bytes are too few')
        return dict(about=about, **{name: torch.from_numpy(np.memmap(part, kind))
                                    for name, part in parts.items()})
    except OSError as error:
        raise BadInput(f'{folder}: --data={o.data} cannot be encoded there ({reason(error)})'
                       ) from None

def chunks(files, size):
    """The bytes of all files, a newline between two, so many at a time."""
    held = b''
    for path in files:
        held += b'\n' * (path != files[0])
        with open(path, 'rb') as f:
            while block := f.read(1 << 20):
                held += block
                whole = len(held) // size * size
                yield from (held[i:i + size] for i in range(0, whole, size))
                held = held[whole:]
    yield from (held[i:i + size] for i in range(0, len(held), size))

def read_labelled(path):
    """[(label, text)] for each line of a .tsv (label<TAB>text) or .jsonl (label and text)."""
    rows = []
    file = open(path, encoding='utf-8-sig', errors='replace', newline='\n')
    for n, line in enumerate(iter(lambda: file.readline(1 << 24), ''), 1):
        refuse(len(line) >> 24, f'{path}, line {n}: has 16 million characters or more')
        try:
            if path.endswith('.jsonl'):
                row = json.loads(line)
                label, text = str(row['label']), row['text']
            else:
                label, text = line.rstrip('\r\n').split('\t', 1)
            # JSON can spell half a character (a lone surrogate), which nothing can encode
            rows.append(tuple(t.encode('utf-8', 'replace').decode() for t in (label, text)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadInput(f'{path}, line {n}: is not of the form label<TAB>text, or in a .jsonl '
                           '{"label": ..., "text": ...}') from None
        refuse(not text.strip(), f'{path}, line {n}: its text is empty')
    return rows

def stdlib_paragraphs():
    """[(package, paragraph)] of the 8 packages of the standard library that have the most."""
    packages = collections.defaultdict(list)
    for path in text_files('stdlib'):
        package, _, inside = os.path.relpath(path, STDLIB).partition(os.sep)
        if inside:
            text = open(path, encoding='utf-8', errors='replace').read()
            packages[package] += [(package, part) for part in text.split('\n\n') if part.strip()]
    # a licence stands in many files: once, or the held-out ones have been learned
    return list(dict.fromkeys(sum(sorted(packages.values(), key=len)[-8:], [])))

def encode_labelled(o, texts, kind, about):
    """Tokens, ends and classes of both parts; every 10th line is held out without --val."""
    rows = stdlib_paragraphs() if o.data == 'stdlib' else read_labelled(o.data)
    parts = dict(train=rows, val=read_labelled(o.val)) if o.val else \
        dict(train=[row for i, row in enumerate(rows) if i % 10 != 9], val=rows[9::10])
    number = {label: i for i, label in enumerate(sorted({label for label, _ in rows}))}
    refuse(len(number) < 2 or not parts['val'], f'--data={o.data}: {len(rows)} texts of '
           f'{len(number)} classes, of which {len(parts["val"])} are held out, are too few')
    out, n_cut = dict(about=about | dict(classes=list(number))), 0
    for name, part in parts.items():
        ids = []
        # in pieces, as the tokenizer's objects are large
        for i in range(0, len(part), 1000):
            for tokens in texts.encode([text for _, text in part[i:i + 1000]]):
                ids.append(np.array(cut(tokens, o.block_size, texts.closing), kind))
                n_cut += len(tokens) > o.block_size
        for label, _ in part:
            refuse(label not in number, f'{o.val}: label {label!r} is not in {o.data}')
        out |= {name: torch.from_numpy(np.concatenate(ids)),
                f'{name}_ends': torch.tensor([len(i) for i in ids]).cumsum(0),
                f'{name}_classes': torch.tensor([number[label] for label, _ in part])}
    print(f'data: {len(number)} classes; {n_cut:,} texts longer than --block_size={o.block_size} '
          'are cut')
    return out

def get_batch(corpus, o, device, step, phase, part=slice(None)):
    """Batch number `step` of a phase, batch_size sequences a rank: depends on nothing but seed, the
    phase's name and step. Or a part of it."""
    rng = np.random.default_rng([o.seed, zlib.crc32(phase.encode()), step])
    n = o.batch_size * ranks()[1]
    if 'classes' in corpus.about:           # one of 16 batches of texts of like lengths
        pool = rng.integers(0, len(corpus.train.texts), 16 * n)
        at = by_length(corpus.train, pool).reshape(16, -1)[rng.integers(16)]
    else:
        at = rng.integers(0, len(corpus.train) - o.block_size, n)
    return batch_at(corpus.train, at[part], o.block_size, device)

def held_out(corpus, o, device):
    """eval_batches x batch_size sequences a rank, held out, evenly spread; texts by length."""
    n, rows = o.eval_batches * o.batch_size * ranks()[1], corpus.val
    if 'classes' in corpus.about:
        n = min(n, len(rows.texts))
        at = by_length(rows, np.linspace(0, len(rows.texts) - 1, n).astype(int))
    else:
        n = min(n, max(1, (len(rows) - 1) // o.block_size))
        at = np.linspace(0, len(rows) - o.block_size - 1, n).astype(int)
    # every second picks tau: the same texts, however many ranks there are
    parts = np.array_split(at, max(min(n, 2), math.ceil(n / o.batch_size / ranks()[1])))
    return [batch_at(rows, part, o.block_size, device) for part in parts]

def by_length(rows, at):
    return at[np.argsort([len(rows.texts[i]) for i in at], kind='stable')]

def batch_at(rows, at, length, device):
    """(what model.encode takes, the targets or classes): the padding of texts is never run."""
    if isinstance(rows, Rows):
        texts = [rows.texts[i].astype(np.int64) for i in at]
        return pad(texts, device), torch.from_numpy(rows.classes[at]).to(device)
    crops = torch.from_numpy(np.stack([rows[i:i + length + 1] for i in at]).astype(np.int64))
    return dict(idx=crops[:, :-1].to(device)), crops[:, 1:].to(device)

# -------------------------------------------------------------------------------------- phases

START_AGAIN = 'use another --out_dir, or start again with --phase=all --overwrite=1'

def read_phase(path, unfinished=True):
    """A checkpoint that a phase wrote; BadInput if it is none."""
    data = read_checkpoint(path)
    data.setdefault('ranks', 1)
    kinds = dict(phase=str, step=int, steps=int, ranks=int, options=dict, metrics=dict)
    refuse(not all(type(data.get(name)) is kind for name, kind in kinds.items())
           or not 0 <= data['step'] <= data['steps'],
           f'{path}: no checkpoint of train.py (start from it with --init_from={path})')
    check_said(data, path)
    refuse(data['step'] < data['steps'] and not unfinished,
           f'{path} stopped at step {data["step"]} of {data["steps"]}: finish it with '
           f'python train.py --phase={data["phase"]} --out_dir={os.path.dirname(path) or "."}')
    # another number of ranks shares out the same batch
    batch = data['options'].get('batch_size', 0) * data['ranks']
    if batch and batch % ranks()[1] == 0:
        data['options']['batch_size'] = batch // ranks()[1]
    elif batch:
        say_once(f'warning: {ranks()[1]} processes do not share out the batch of {batch} of {path}')
    return data

def check_said(data, path):
    """BadInput if what a checkpoint says of how it was made is of another type or range."""
    known, about = all_options(), data['data'] or {}
    for name in known.keys() & data['options'].keys():
        value = data['options'][name]
        with contextlib.suppress(BadInput):
            if type(value) in (str, int, float, bool, NoneType) and (
                    value == known[name].default or cast(name, str(value), known[name]) == value):
                continue
        raise BadInput(f'{path}: damaged, its option {name} is {reason(value)}')
    seconds, hashes = data['metrics'].get('seconds', 0), (about.get('hash'), data.get('parent'))
    refuse(type(seconds) not in (int, float) or any(type(h) not in (str, NoneType) for h in hashes),
           f'{path}: damaged, in what it says of its data, parent or seconds')

def siblings(folder):
    """{path: checkpoint} of all that phases wrote into a folder, in the order of PHASES."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.pt')),
                       key=lambda path: (len(path), path)):
        with contextlib.suppress(BadInput):
            found[path] = read_phase(path)
    return {path: data for name in PHASES for path, data in found.items()
            if data['phase'] == name}

def places(name, value, folder):
    """(what a phase reads, what it writes) in a folder; with `each`, what was made with value."""
    cls = PHASES[name]
    sources = [os.path.join(folder, f'{stem}.pt') for stem in cls.reads]
    source = next(filter(os.path.isfile, sources), sources[-1] if sources else '')
    first, own = (os.path.join(folder, f'{cls.writes}{end}.pt') for end in ('', f'-{value}'))
    for path in (first, own) if value else ():
        if os.path.exists(path) and read_phase(path)['options'].get(cls.each) == value:
            return source, path
    return source, own if value and os.path.exists(first) else first

def resolve(name, typed, value, source, path):
    """(options, parent, own): what a phase runs with, what it starts from, and its own checkpoint
    as far as it stands. An option is what was typed, what its own checkpoint, the parent or the
    others of the folder say, or the default, in this order. BadInput where things do not fit."""
    cls, mine = PHASES[name], {*own_options(name), *LOOP}
    maker = next((other for other, c in PHASES.items() if c.writes in cls.reads[-1:]), None)
    refuse(maker and not os.path.isfile(source), f'--phase={name} needs {source}: make it with '
           f'python train.py --phase={maker} --out_dir={os.path.dirname(source) or "."}')
    parent = read_phase(source, unfinished=False) if cls.reads else {}
    if parent and PHASES[parent['phase']].writes not in cls.reads:
        raise BadInput(f'{source} is of phase {parent["phase"]}: --phase={name} starts from '
                       f'{" or ".join(cls.reads)}')
    own = read_phase(path) if os.path.exists(path) else {}
    refuse(own and own['phase'] != name,
           f'{path}: holds a checkpoint of another phase; give another place')
    here = siblings(os.path.dirname(path) or '.')
    others = [*here.values()][::-1]
    values = {}
    # each says more than those before it
    for data in (*others, parent, *(data for data in others if data['phase'] == name), own):
        values |= data.get('options', {})
    values = vars(with_defaults(values | typed)) | values
    several = {getattr(other, 'each', '') for other in PHASES.values()}      # a run for each value
    inherited = {option: had for option, had in parent.get('options', {}).items()
                 if option not in mine and option not in several}
    values |= inherited | typed | ({cls.each: value} if value else {})
    for option, had in inherited.items():
        refuse(values[option] != had, f'--{option}={values[option]}: {source} was made with '
               f'{had}; leave the option out, {START_AGAIN}')
    refuse_unread(name, typed, parent, source)
    if not own and typed.get('phase') == name:
        say_left_out(name, values, parent, os.path.dirname(source))
    refuse(name in ('narrow', 'attn') and values['narrow'] and values['attn_projections'],
           '--narrow, --attn_projections: give one; the other has been here, use another --out_dir')
    # an optional phase would come between what is there already
    wanted = getattr(cls, 'wanted', '')
    if wanted and values[wanted] and not own and not typed.get('overwrite'):
        known = {checkpoint_hash(other) for other in here}
        without = [other for other, data in here.items()
                   if cls.writes in PHASES[data['phase']].reads and data['parent'] in known]
        refuse(without and wanted in typed, f'--{wanted}: {"".join(without[:1])} was made '
               'without it; use another --out_dir (copies of data.pt, base.pt and dense.pt save '
               'their time), or --overwrite=1')
        values[wanted] = getattr(cls, wanted) if without else values[wanted]
    changed = [f'--{option}={values[option]}: {path} was made with {had}'
               for option, had in own.get('options', {}).items()
               if option in mine and values[option] != had]
    if own and parent and own['parent'] != checkpoint_hash(source):
        changed.append(f'{path} was made from another {source}')
    taught = own.get('metrics', {}).get('teacher')
    dense = os.path.join(os.path.dirname(source or path), 'dense.pt')
    if taught and os.path.isfile(dense) and taught != checkpoint_hash(dense):
        changed.append(f'{path} learned from another {dense}')
    if changed:
        refuse(not typed.get('overwrite'), f'{changed[0]}; keep to that, use another --out_dir, '
               'or run the phase again with --overwrite=1')
        print(f'{name:8s} {changed[0]}: again')
    again = changed or typed.get('overwrite') and typed.get('phase') == name
    return SimpleNamespace(**values), parent, {} if again else own

def refuse_unread(name, typed, parent, source):
    """BadInput if one phase alone is to run and an option is typed of another, before it, that had
    no part in what it starts from, or had another value."""
    known, made = all_options(), parent.get('options', {})
    others = set().union(*map(own_options, PHASES)) - own_options(name).keys()
    for option in sorted(typed.keys() & others) if typed.get('phase') == name else ():
        how = f'with {made[option]}' if option in made else 'without it'
        refuse(typed[option] != made.get(option, known[option].default),
               f'--{option}={typed[option]}: {source} was made {how}; leave the option out')

def say_left_out(name, values, parent, folder):
    """Of one phase alone that starts before an optional one has been, which is wanted."""
    been = ancestors(parent['phase']) if parent else PHASES
    for other in (other for other in PHASES if other not in been):
        before = PHASES[other]
        path, wanted = os.path.join(folder, f'{before.writes}.pt'), getattr(before, 'wanted', '')
        if before.writes in PHASES[name].reads and values.get(wanted) and not os.path.exists(path):
            print(f'note: {path} is not there: --phase={other} makes it, of '
                  f'--{wanted}={values[wanted]}; {name} goes on without')

def run_phase(name, typed, value=None, source=None, path=None):
    """Bring one phase to its end, from nothing or from where it was stopped."""
    cls, usual = PHASES[name], places(name, value, with_defaults(typed).out_dir)
    source, path = source or usual[0], path or usual[1]
    o, parent, own = resolve(name, typed, value, source, path)
    options = own_options(name)
    phase = cls(**{f.name: getattr(o, option) for option, f in options.items()})
    phase.seed, phase.folder = o.seed, os.path.dirname(source or path) or '.'
    if hasattr(cls, 'wanted') and not getattr(phase, cls.wanted):
        refuse(typed.get('phase') == name, f'--phase={name} needs a --{cls.wanted} that '
               'asks for it')
        with contextlib.suppress(FileNotFoundError):             # not any more, by --overwrite=1
            os.remove(path)
        return
    wait_for_all()                          # they have read what is there
    steps, device, corpus, began = getattr(phase, 'steps', 0), pick_device(o), None, time.time()
    done = own and own['step'] == own['steps']
    if not done:
        check_writable(path, make_folder=True)
    looks = steps or getattr(phase, 'looks', False) or hasattr(phase, 'report')
    if not parent or looks and not done:    # what the base learned from must not have changed
        corpus = open_in_turn(o, phase.folder, parent or not o.overwrite and own)
        learned = (parent or own or dict(data=corpus.about))['data']
        if learned['hash'] != corpus.about['hash']:
            refuse(parent or not o.overwrite, f'--data={o.data}: changed since {source or path} '
                   f'learned from it; bring it back, {START_AGAIN}')
            own, done = {}, False
    if done:
        return print(f'{name:8s} done ({path})')
    torch.manual_seed(o.seed)
    model = (build(parent, source) if parent else phase.create(corpus.about)).to(device)
    phase.teacher, notes = teacher_of(phase, device)
    batches = (get_batch(corpus, o, device, i, name) for i in itertools.count())
    notes |= phase.prepare(model, batches) or {}
    for t in model.state_dict().values() if ranks()[1] > 1 else ():
        dist.broadcast(t, 0)
    # --init_from brought sizes of its own
    made_with = {option: getattr(phase, f.name) for option, f in options.items()}
    made_with = parent.get('options', {}) | {name: getattr(o, name) for name in LOOP} | made_with
    record = dict(phase=name, steps=steps, metrics=notes, options=made_with, preset=o.preset,
                  asked=typed.get(getattr(cls, 'each', '')),
                  parent=checkpoint_hash(source) if parent else None,
                  data=parent['data'] if parent else corpus.about, ranks=ranks()[1])

    def keep(step, optimizer=None):
        notes['seconds'] = own.get('metrics', {}).get('seconds', 0) + time.time() - began
        save(model, path, step=step, optimizer=optimizer, **record)

    waits = o.fsdp or name == 'router' and getattr(ROUTERS[o.router_loss], 'waits', False)
    refuse(model.halting is not None and ranks()[1] > 1 and waits, '--halting=1 in several '
           'processes does not go with --fsdp or share: one may have no token left')
    stopped = learn(name, phase, model.to(device), own, corpus, o, device, keep) if steps else 0
    if hasattr(phase, 'finish'):
        notes |= phase.finish(model) or {}
    if hasattr(phase, 'report'):
        notes |= reported(phase, model, corpus, o, typed, device)
    keep(steps)
    wait_for_all()
    if stopped:
        raise KeyboardInterrupt(f'{name} is done; the same command goes on', 128 + stopped)

def reported(phase, model, corpus, o, typed, device):
    """What a phase has to say on 8 of the held-out batches: texts come by length."""
    known = bench.read_results(phase.folder).get('config', vars(o))
    o.eval_batches = typed.get('eval_batches', known['eval_batches'])
    batches, dense = held_out(corpus, o, device), os.path.join(phase.folder, 'dense.pt')
    phase.dense = model
    with contextlib.suppress(BadInput):     # not there, or not finished
        phase.dense = build(read_phase(dense, unfinished=False), dense).to(device)
    return phase.report(model, batches[::max(1, len(batches) // 8)]) or {}

def pick_device(o):
    kinds = dict(cuda=torch.cuda, mps=torch.backends.mps, cpu=torch.cpu)
    there = [name for name, kind in kinds.items() if kind.is_available()]
    refuse(o.device not in ('auto', *there), f'--device={o.device}: torch {torch.__version__} '
           'finds none here; try --device=auto')
    return there[0] if o.device == 'auto' else o.device

def has_bf16(device):
    """Whether learning multiplies in bf16: where there are units for it, 1.7 x a step on a Zen 4.
    Weights stay fp32, as is what is measured."""
    # an older torch does not say, and bool() is False
    return device == 'cuda' or device == 'cpu' and getattr(
        torch.cpu, '_is_avx512_bf16_supported', bool)()

# -------------------------------------------------------------------------------------- the loop

SAVE_EVERY = 60                             # seconds between checkpoints of a running phase

def schedule(step, steps, end=0.1):
    """The learning rate as a share of its peak: warm-up over 5 %, then a cosine down to `end`."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min((step + 1) / max(1, steps // 20), end + (1 - end) * cosine)

def set_rate(optimizer, phase, step):
    for group in optimizer.param_groups:
        group['lr'] = phase.lr * schedule(step, phase.steps, getattr(phase, 'lr_end', 0.1))

def teacher_of(phase, device):
    """dense.pt where --distil asks for its soft labels, else None; and what to remember of it."""
    if not getattr(phase, 'distil', 0) or not phase.steps:
        return None, {}
    path = os.path.join(phase.folder, 'dense.pt')
    refuse(not os.path.isfile(path), f'--distil={phase.distil} learns from {path}, which is not '
           'there: make it with python train.py --phase=dense')
    teacher = build(read_phase(path, unfinished=False), path)
    return teacher.to(device), dict(teacher=checkpoint_hash(path))

@torch.no_grad()
def taught(batch, phase):
    """The batch; of a phase that has a teacher with targets as cross_entropy takes them."""
    if not phase.teacher:
        return batch
    inputs, labels = batch
    return inputs, (labels, phase.teacher(**inputs), phase.distil)

def is_sharded(p):
    return hasattr(p, 'full_tensor')

def full(t):
    """What FSDP keeps a part of on each rank, whole."""
    return t.full_tensor().cpu() if is_sharded(t) else t

def sharded(model, device):
    """A copy of which each rank keeps a part of every block; embeddings and heads stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh, copied = init_device_mesh(device, (ranks()[1],)), copy.deepcopy(model.cpu())
    for block in copied.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return copied.to(device)

def gather(model, whole):
    """What was learned by a sharded copy, into `whole`."""
    for mine, theirs in zip(whole.parameters(), model.parameters()) if whole != model else ():
        mine.data.copy_(full(theirs))

def whole_state(optimizer):
    """Of the rank that writes; the others only help to gather it."""
    def kept(t):
        t = full(t)
        return None if ranks()[0] else t

    state = optimizer.state_dict()
    return state | dict(state={i: {key: kept(t) for key, t in known.items()}
                               for i, known in state['state'].items()})

def average(parameters):
    """Gradients become their mean over ranks, a bucket at a time; FSDP's are it already."""
    if ranks()[1] == 1:
        return
    own = [p for p in parameters if not is_sharded(p)]
    # what one rank did not reach the others may have
    there = over_ranks(torch.tensor([int(p.grad is not None) for p in own]), 'MAX')
    own = [p for p, reached in zip(own, there.tolist()) if reached]
    while own:
        bucket = [own.pop()]
        while own and sum(p.numel() for p in bucket) < 2 ** 24:
            bucket.append(own.pop())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        means = over_ranks(torch.cat([g.flatten() for g in grads])) / ranks()[1]
        for p, mean in zip(bucket, means.split([p.numel() for p in bucket])):
            p.grad = mean.view_as(p)

def clip(parameters, most=1.0):
    """Scale the gradients until their norm, which it returns, is at most so much."""
    learning = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in learning if is_sharded(p) == kind] for kind in (True, False)]
    norms = [full(nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]
    norm = torch.stack([norm.to(norms[-1].device) for norm in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm

def begun_here(phase, job, *asked):
    """job(*asked), which takes up what a checkpoint of another version may not have."""
    try:
        return job(*asked)
    except Exception as error:          # whatever a foreign one does to torch
        raise BadInput(f'{phase.writes}.pt: damaged, or begun by another version; finish it there, '
                       f'or begin again with --overwrite=1 ({reason(error)})') from None

def make_optimizer(model, parameters, phase, o, device, state=None):
    """AdamW, as a checkpoint's `state` left it: of one rank, of several and of FSDP it is one."""
    in_blocks, groups = {id(p) for p in model.blocks.parameters()}, []
    for inside, matrix in itertools.product((True, False), repeat=2):
        own = [p for p in parameters if (id(p) in in_blocks, p.dim() >= 2) == (inside, matrix)]
        groups.append(dict(params=own, weight_decay=o.weight_decay * matrix))
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.95), fused=device != 'mps')

    from torch.distributed.tensor import distribute_tensor
    mine = [p for group in groups for p in group['params']]

    def part(t, p):                     # of a sharded parameter's, before it goes to the device
        return distribute_tensor(t, p.device_mesh, p.placements) if is_sharded(p) and t.dim() else t

    def moments():
        optimizer.load_state_dict(state | dict(state={
            i: {key: part(t, mine[i]) for key, t in known.items()}
            for i, known in state['state'].items()}))
        for p, known in optimizer.state.items():                 # the fused kernel trusts them
            for t in (known['exp_avg'], known['exp_avg_sq']):
                own = t.to_local() if is_sharded(t) else t
                assert t.shape == p.shape and own.isfinite().all(), 'its moments do not fit'

    if state:
        begun_here(phase, moments)
    return optimizer

@contextlib.contextmanager
def stops():
    """The signals that came: Ctrl-C and a polite kill let a step be finished first."""
    came = []
    usual = {s: signal.signal(s, lambda number, frame: came.append(number))
             for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for s, handler in usual.items():
            signal.signal(s, handler)

def gradient(name, phase, model, corpus, o, device, step):
    """Of this rank's part of a batch, left in the parameters -> loss and shares, tokens of all."""
    (rank, size), tokens, means = ranks(), 0, collections.Counter()
    for micro in range(o.grad_accum):
        batch = get_batch(corpus, o, device, step * o.grad_accum + micro, name,
                          slice(rank, None, size))
        tokens += size * n_tokens(batch[0])
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16(device)):
            loss, log = phase.loss(model, taught(batch, phase), (step + 1) / phase.steps)
        (loss / o.grad_accum).backward()
        for key, value in (dict(task=loss.detach()) | log).items():
            means[key] += value / o.grad_accum
    return dict(means), tokens

def say_step(name, done, steps, log, speed, cost, left):
    """A line about a step: means over ranks, tokens a second, and what that is of the peak, of
    which a token's cost is so much."""
    shares = ''.join(f'  {key} {mean:.1%}' for key, mean in log.items() if key != 'task')
    print(f'{name:8s} step {done}/{steps}  loss {log["task"]:.4f}{shares}  {speed:,.0f} tokens/s, '
          f'{speed * cost:.0%} of the peak  {bench.clock(left)} left', flush=True)

def agree(log, *flags):
    """Of all ranks: the mean of everything in a log, and whether one has raised a flag."""
    state = torch.cat([torch.stack([*log.values()]).float(), torch.tensor(flags).to(log['task'])])
    means = (over_ranks(state) / ranks()[1]).tolist()
    return dict(zip(log, means)), *means[len(log):]

def ready(name, phase, whole, own, o, device):
    """-> (what learns: `whole`, unless FSDP shards a copy of it; its parameters; their optimizer;
    the forward passes that a step costs)."""
    if own:
        print(f'{name:8s} going on at step {own["step"]} of {phase.steps}')
        begun_here(phase, whole.load_state_dict, own['model'])
    model, parameters = whole.train(), [p.requires_grad_(True) for p in phase.parameters(whole)]
    # forward, and twice that backward; what is frozen is small enough for one device
    passes = 3 if len(parameters) == len([*whole.parameters()]) else 1
    if o.fsdp and passes == 3:
        model = sharded(whole, device)
        parameters = [*phase.parameters(model)]
    optimizer = make_optimizer(model, parameters, phase, o, device, own.get('optimizer'))
    model.checkpoint_activations = o.checkpoint_activations
    if o.compile:
        model.compile()
    return model, parameters, optimizer, passes

def learn(name, phase, whole, own, corpus, o, device, keep):
    """AdamW, clipping, accumulation; keep(step, optimizer's state) writes a checkpoint of `whole`.
    -> the signal that came in the end."""
    (rank, size), start, steps = ranks(), own.get('step', 0), phase.steps
    model, parameters, optimizer, passes = ready(name, phase, whole, own, o, device)

    def write(step):
        gather(model, whole)
        keep(step, whole_state(optimizer))

    if not own:
        write(0)                            # a place that cannot be written to shows now
    peak = bench.peak(device, torch.bfloat16 if has_bf16(device) else torch.float32)
    began, tokens, stopped = time.time(), 0, 0
    said = saved = began
    with stops() as came, bench.profiler(o.profile, phase.folder, name) as profiler:
        for step in range(start, steps):
            set_rate(optimizer, phase, step)
            # whatever came before; dropout is another for other texts
            own_rank = rank if whole.config.dropout else 0
            torch.manual_seed(zlib.crc32(f'{o.seed} {name} {step} {own_rank}'.encode()))
            log, n = gradient(name, phase, model, corpus, o, device, step)
            average(parameters)
            norm, now, done, tokens = clip(parameters), time.time(), step + 1, tokens + n
            log, stop, due = agree(log, len(came), not rank and now - saved > SAVE_EVERY)
            if not math.isfinite(log['task'] + norm):            # before it gets into the weights
                raise FloatingPointError(
                    f'{name}: loss {log["task"]}, gradient {norm.item()} long at step {done}; '
                    f'a smaller --{getattr(phase, "like", name)}_lr than {phase.lr} may help')
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if now - said > 5 or done == steps:
                said, took = now, now - began
                flops = passes * whole.flops(n / o.batch_size / o.grad_accum / size)['total']
                say_step(name, done, steps, log, tokens / took, flops / peak / size,
                         took * (steps - done) / (done - start))
            profiler.step()
            if done < steps and (stop or due):
                write(done)
                saved = now
            stopped = [*came, signal.SIGTERM][0] if stop else 0
            if done < steps and stopped:
                but = ' without --overwrite=1' * (o.overwrite and o.phase == name)
                raise KeyboardInterrupt(f'{name} stopped at step {done} of {steps}; the same '
                                        f'command{but} goes on from there', 128 + stopped)
    gather(model, whole)
    whole.to(device).eval().requires_grad_(False)
    return stopped

# -------------------------------------------------------------------------------------- commands

def evaluation(typed, paths=()):
    """Measure the checkpoints of out_dir, or those given, each by what it says of itself; print
    the table, write results.json and its picture beside them."""
    o = with_defaults(typed)
    folder = os.path.dirname(paths[0]) or '.' if paths else o.out_dir
    entries = bench.entries(siblings(folder), paths)
    kinds = typed.get('router_loss', ','.join(ROUTERS)).split(',')
    refuse('router_loss' in typed and not {e.kind for e in entries} & set(kinds),
           f'--router_loss={o.router_loss}: no finished checkpoint in {folder} has it')
    entries = [e for e in entries if e.kind in ('', *kinds)]
    for e in entries:
        for name in typed.keys() & e.data['options'].keys() - {*LOOP, 'router_loss'}:
            had = e.data['options'][name]
            refuse(typed[name] != had, f'--{name}={typed[name]}: {e.path} was made with {had}; '
                   'leave the option out')
    dense = entries[0].data['options']
    sparse = next((e.data['options'] for e in entries if e.data['phase'] == 'sparsify'), dense)
    if any(dense[key] != sparse[key] for key in own_options('dense')):
        print('warning: dense.pt and sparse.pt were trained for other steps or at another rate: '
              'run --phase=dense --overwrite=1')
    # dense learns as long as sparsify
    adapted = [e.data['options']['adapt_steps'] for e in entries if e.data['phase'] == 'adapt']
    if adapted:
        print(f'note: what is adapted learned {adapted[0]} steps more than dense.pt; part of its '
              'gain is that; bench.py --suite=methods has a dense model of as many')
    before = bench.read_results(folder).get('config', vars(o))
    o = with_defaults(entries[-1].data['options'] | dense
                      | dict(eval_batches=before['eval_batches']) | typed)
    check_writable(os.path.join(folder, 'results.json'))
    corpus, device = open_in_turn(o, folder, entries[0].data), pick_device(o)
    for e in entries:
        refuse((e.data['data'] or {}).get('hash', corpus.about['hash']) != corpus.about['hash'],
               f'--data={o.data}: {e.path} learned from another')
    settings = dict(data=corpus.about['hash'], batches=o.eval_batches, block_size=o.block_size,
                    batch_size=o.batch_size * ranks()[1], device=device,
                    threads=torch.get_num_threads())
    return bench.evaluate(entries, held_out(corpus, o, device), o, settings, folder, device)

def chosen(typed, device):
    """The model that sample and export take, of --router_loss if that is typed: adapted.pt where it
    is finished and of what is here, else d2dmoe.pt, else the latest."""
    o, asked = with_defaults(typed), typed.get('router_loss')
    here = siblings(o.out_dir)
    kinds = {path: data['config']['router_loss'] for path, data in here.items()}
    paths = [path for path, kind in kinds.items() if asked in (None, kind)]
    refuse(',' in (asked or ''), f'--router_loss={asked}: --phase={o.phase} takes one of them')
    refuse(not paths, f'--phase={o.phase} finds no checkpoint in --out_dir={o.out_dir} (of '
           f'--router_loss={o.router_loss}): run python train.py first')
    known = {checkpoint_hash(path) for path in here}
    usual = [path for path in paths if here[path]['phase'] == 'adapt'
             and here[path]['step'] == here[path]['steps'] and here[path]['parent'] in known]
    usual += [path for path in paths if os.path.basename(path) == 'd2dmoe.pt']
    path = [*usual, paths[-1]][0]
    model, kind = build(read_phase(path, unfinished=False), path).to(device), kinds[path]
    ruled = {'tau', 'rule', 'floor'} & typed.keys()
    refuse(ruled and not kind,
           f'--{min(ruled, default="")}: {path} has no routers yet; run --phase=router first')
    if o.budget or o.max_loss:
        refuse(ruled, f'--{min(ruled, default="")}: --budget, --max_loss choose it; leave it out')
        model.budget(o.budget or None, o.max_loss or None)
        print(f'{path}: tau of every MLP {" ".join(map(str, model.config.taus))}')
    elif kind and (ruled or o.phase == 'sample'):
        rule = o.rule or ROUTERS[kind].rule
        refuse('floor' in typed and rule != 'dynk', f'--floor: is of rule dynk, not {rule}')
        usual = model.config.tau if model.config.rule == rule else 0.1
        model.set_rule(rule, usual if o.tau is None else o.tau, o.floor)
        print(f'{path}: router {kind}, rule {rule}, tau {model.config.tau:g}')
    return path, model

def sample(typed):
    """Print a continuation of --prompt."""
    o = with_defaults(typed)
    device = pick_device(o)
    path, model = chosen(typed, device)
    refuse(not model.config.causal,
           f'--phase=sample: {path} is a BERT, which labels texts and writes none')
    generator = torch.Generator(device).manual_seed(o.seed)
    model.quantize(o.dtype)
    text = model.generate(o.prompt, o.n_tokens, o.temperature, o.top_k, generator)
    print(shaded(model, text, path) if o.show_load else text)

SHADES = 235, 22, 28, 64, 136, 166, 160     # backgrounds of a terminal, from grey over green to red

@torch.inference_mode()
def shaded(model, text, path):
    """The end of a text, each token on a background that says how much of the FFNs it ran; and as a
    picture, load.png."""
    refuse(not model.config.rule, f'--show_load: {path} is dense; every token runs everything')
    tools = tokenizer(model.about, True)
    ids = tools.encode([text])[0][-model.config.block_size:]
    model(torch.tensor([ids], device=model.wte.weight.device), tap=(masks := Masks()))
    sizes = [mlp.offsets.diff().float() / mlp.offsets[-1] for mlp in model.mlps()]
    ran = torch.stack([mask.float() @ size for mask, size in zip(masks, sizes)]).mean(0)     # (T)
    shares, words = ran / ran.max().clamp_min(1e-9), [tools.decode([i]) for i in ids]
    levels = (shares * (len(SHADES) - 1)).round().int().tolist()
    shown = ''.join(f'\x1b[48;5;{SHADES[level]}m{word}\x1b[0m'
                    for level, word in zip(levels, words))
    # a line ends without its colour
    shown = shown.replace('\n\x1b[0m', '⏎\x1b[0m\n')
    picture = os.path.join(os.path.dirname(path), 'load.png')
    return (f'{shown}\n\ngrey ran nothing, red {ran.max():.1%} of the FFNs, the mean '
            f'{ran.mean():.1%}' + bench.plot_load(words, shares.tolist(), picture))

def run(typed):
    o, results = with_defaults(typed), []
    for data in siblings(first_folder(o)).values():              # a folder stays what it was
        began = data.get('preset', 'paper')
        if typed.get('preset', began) != began:
            say_once(f'note: {o.out_dir} was begun with --preset={began}; what is done stays so')
        typed = dict(preset=began, out_dir=o.out_dir) | typed
    o = with_defaults(typed)
    if o.seeds:                             # each in a folder of its own, then one table
        for seed in map(int, o.seeds.split(',')):
            print(f'---- seed {seed}', flush=True)
            folder = os.path.join(o.out_dir, f's{seed}')
            results.append(run(typed | dict(seeds='', seed=seed, out_dir=folder)))
        if o.phase in ('all', 'eval'):
            bench.print_seeds(results, os.path.join(o.out_dir, 'seeds.json'))
        return
    if o.phase == 'sample':
        return sample(typed)
    if o.phase == 'export':
        path, model = chosen(typed, 'cpu')
        export(model, o.to)
        return print(f'{o.to}: load() reads {path} from it, with its routing; transformers a '
                     'dense model, unless projections are MLPs')
    for name, cls in PHASES.items() if o.phase == 'all' else ():
        wanted, made = getattr(cls, 'wanted', ''), os.path.join(o.out_dir, f'{cls.writes}.pt')
        idle = typed.keys() & own_options(name).keys() - {wanted, *own_options('sparsify')}
        refuse(idle and wanted and not getattr(o, wanted) and not os.path.exists(made),
               f'--{min(idle, default="")}: no phase {name} without --{wanted}; leave it out')
    if o.phase in ('all', 'base'):
        check_writable(os.path.join(o.out_dir, 'base.pt'), make_folder=True)
    with locked(o.out_dir):
        for name in (name for name in PHASES if o.phase in ('all', name)):
            each, values = getattr(PHASES[name], 'each', None), [None]
            if each:                        # untyped: what was asked for once, and what is there
                known = [data['asked'] or data['options'][each]
                         for data in siblings(o.out_dir).values() if data['phase'] == name]
                asked = [typed[each]] if each in typed else known or [getattr(o, each)]
                values = dict.fromkeys(','.join(asked).split(','))
            for value in values:
                run_phase(name, typed | ({each: ','.join(values)} if each else {}), value)
        return evaluation(typed) if o.phase in ('all', 'eval') else None

@contextlib.contextmanager
def locked(folder):
    """One run in a folder at a time. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:                     # Windows
        fcntl = None
    with contextlib.ExitStack() as at_the_end:
        if fcntl and os.path.isdir(folder) and not ranks()[0]:
            place = os.open(folder, os.O_RDONLY)
            at_the_end.callback(os.close, place)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f'--out_dir={folder}: another run is at work there; wait for it, or '
                               'give another') from None
            # by who was killed
            for left in glob.glob(os.path.join(glob.escape(folder), '*.pt.[0-9]*.tmp')):
                os.remove(left)
        yield

def convert(name):
    """`python moefy.py IN.pt OUT.pt --key=value`: one phase from file to file."""
    argv = sys.argv[1:]
    if len(argv) < 2 or any(arg.startswith('-') for arg in argv[:2]):
        print(f'usage: python {os.path.basename(sys.argv[0])} IN.pt OUT.pt [--key=value ...], '
              'keys as in python train.py --help')
        sys.exit(0 if {'-h', '--help'} & set(argv) else 2)

    def job():
        source, path, *rest = argv
        for arg in rest:
            refuse(arg.startswith(('--phase=', '--out_dir=', '--seeds=')),
                   f'{arg}: goes from {source} to {path}; leave it out')
        typed, value = dict(preset='paper') | parse([*rest, f'--phase={name}'], False), None
        if hasattr(PHASES[name], 'each'):   # untyped: the first of the default
            each = PHASES[name].each
            value = typed.setdefault(each, getattr(with_defaults(typed), each).split(',')[0])
            refuse(',' in value, f'--{each}={value}: one of them; {path} is one file')
        folder = os.path.dirname(path) or '.'
        with locked(folder):
            run_phase(name, typed | dict(out_dir=folder), value, source, path)
    guarded(job)

def join():
    """Under torchrun become one rank of many, of which the first prints -> a call that says whether
    to tell what failed: True for the rank that asks first."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return lambda: True
    store, rank, size = next(dist.rendezvous('env://'))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=size,
                            timeout=datetime.timedelta(days=1))   # the first may have to encode
    if rank:
        sys.stdout = open(os.devnull, 'w')
    return lambda: store.add('failed', 1) == 1

def guarded(job):
    """Run it; what the user can mend ends in one sentence and a non-zero exit, no traceback."""
    def stop(number, frame):
        raise KeyboardInterrupt('stopped', 128 + number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)     # what is measured is kept, as after Ctrl-C
    first = join()
    sys.stdout.reconfigure(errors='replace')                     # what a terminal cannot show
    try:
        job()
        sys.stdout.flush()
        if ranks()[1] > 1:                  # their threads may not outlive the interpreter
            wait_for_all()
            dist.destroy_process_group()
    except (BadInput, FloatingPointError) as error:
        if first():
            print(f'error: {error}', file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 3)
    except KeyboardInterrupt as error:
        sentence, code = error.args or ('interrupted', 130)
        if first():
            print(f'\n{sentence}', file=sys.stderr)
        sys.exit(code)
    except BrokenPipeError:                 # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:              # of the others it is only that one is gone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)            # torchrun's, while this is said
        if first():
            if ranks()[1] == 1 or ' by peer' not in str(error):  # closed or reset
                raise
            print('error: another process has died; the same command goes on', file=sys.stderr)
        sys.exit(1)

if __name__ == '__main__':
    if {'-h', '--help'} & set(sys.argv[1:]):
        print_help()
    else:
        guarded(lambda: run(parse(sys.argv[1:], False)))
