"""From a dense transformer to a dynamic-k mixture of experts: options, data, the loop, the phases.

    python train.py                             every phase that is not done yet, then the table
    python train.py --phase=sparsify            one phase, on the checkpoint before it
    python train.py --seeds=0,1,2               all of it once a seed, then mean and spread
    python train.py --phase=sample --prompt='def ' --tau=0.1
    python train.py --phase=export --to=DIR --tau=0.1       a folder that transformers loads, too
    python train.py --preset=bert --data=emotion.tsv --attn_projections=qkvo

    base --> dense                              the control: as many more steps, no penalty
      +--> [attn] --> sparsify --> moefy --> router --> eval
    base.pt attn.pt   sparse.pt    moe.pt    d2dmoe.pt  results.json

A phase is a class whose fields are its options, and it lives with its method:

    reads       names of checkpoints: the first that exists      writes      the name of its own
    wanted()    optional: False skips it in a full run           each        optional: an option of
    prepare(model, batches)   the change made once, in place                 which every value gets
    parameters(model)         what learns; [] for no loop                    a run of its own
    loss(model, batch, progress) -> loss, what to log
    report(model, batches)    optional: what to remember

`steps` and `lr` are options with the phase's name in front. A new method is such a class and its
place in PHASES. An option that is not typed keeps the value with which the checkpoints of the
folder were made; one that is typed and differs stops the run, unless --overwrite=1 runs that phase
again. (Edited code does not count: --phase=NAME --overwrite=1 runs a phase anew.)
"""

if __name__ == '__main__':                  # Ctrl-C while torch is being imported ends quietly
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import difflib
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, Optional, get_args, get_origin, get_type_hints

import numpy as np
import torch

import bench
from model import (BadInput, Config, Transformer, build, cut, export, checkpoint_hash, load,
                   n_tokens, pad, peek, read_checkpoint, reason, save, tokenizer,
                   write_atomically)
from moefy import Moefy
from router import GRID, FLOOR, ROUTERS, Route
from sparsify import Distil, Sparsify

# -------------------------------------------------------------------------------------- options

@dataclass
class Command:
    """the command"""
    phase: str = 'all'                      # one of the phases, eval, sample, export, or all
    preset: str = ''                        # gpt2, bert (the paper's), hour (an hour on 2 cores)
    out_dir: str = 'out'                    # checkpoints, the encoded data, results.json
    overwrite: bool = False                 # run phases again whose options or input changed
    seeds: Annotated[str, '0,1,2'] = ''     # several, 0,1,2: each in its folder, then one table
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'
    compile: bool = False                   # torch.compile in base, dense and sparsify

@dataclass
class Loop:
    """the loop, of every phase that learns"""
    seed: int = 0                           # repeats a CPU run bit for bit
    batch_size: Annotated[int, '> 0'] = 8   # sequences a micro-step
    grad_accum: Annotated[int, '> 0'] = 1   # micro-steps a step
    weight_decay: float = 0.1               # on matrices only

@dataclass
class Use:
    """what is done with the checkpoints: eval, sample, export"""
    rule: Annotated[str, {'': (), **GRID}] = ''     # '' = the router's usual
    tau: Annotated[Optional[float], '0..1'] = None  # instead of the grid; of topk the share
    floor: float = FLOOR                    # of dynk: less than it does not run; in RMS of a layer
    eval_batches: Annotated[int, '> 0'] = 32    # held out; every second one picks tau
    prompt: str = '\n'
    n_tokens: int = 300                     # to sample
    temperature: float = 0.8
    top_k: int = 50
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
        c, n_classes = self, len(about.get('classes', ()))
        if self.init_from:
            return adopted(self, about)
        bert = dict(causal=False, pre_ln=False, n_types=2, head='cls', n_classes=n_classes,
                    pooler=True, ln_eps=1e-12) if self.arch == 'bert' else {}
        return Transformer(Config(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_hidden=4 * c.n_embd,
            block_size=c.block_size, vocab_size=about['vocab'], activation=c.activation,
            dropout=c.dropout, **bert))

    def prepare(self, model, batches):
        pass

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        return model.loss(batch), {}

class Dense:
    """The control: sparsify's steps and rate, no penalty. It has no options of its own."""
    reads, writes, like = ('base',), 'dense', 'sparsify'
    prepare, parameters, loss = Base.prepare, Base.parameters, Base.loss

PHASES = dict(base=Base, dense=Dense, attn=Distil, sparsify=Sparsify, moefy=Moefy, router=Route)
# what each command takes of Use
COMMANDS = dict(eval=('rule', 'tau', 'floor', 'eval_batches', 'router_loss'),
                sample=('rule', 'tau', 'floor', 'prompt', 'n_tokens', 'temperature', 'top_k',
                        'router_loss', 'seed'),
                export=('rule', 'tau', 'floor', 'to', 'router_loss'))
LOOP = tuple(f.name for f in fields(Loop))
PRESETS = {
    'hour': dict(out_dir='out-hour', n_layer=6, n_head=6, n_embd=384, batch_size=16,
                 base_steps=900, sparsify_steps=250, router_steps=300, base_lr=1e-3,
                 sparsify_lr=5e-4, router_width=96),
    # the authors' settings for GPT-2 on OpenWebText: 1000 steps of 960 x 1024 tokens, 768 x 4
    'gpt2': dict(out_dir='out-gpt2', tokenizer='gpt2', init_from='gpt2', base_steps=0,
                 block_size=1024, batch_size=8, grad_accum=120, sparsify_steps=1000,
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
# what an annotation may ask for, beside a dict of choices
RANGES = {'0,1,2': ('different whole numbers, a comma between them',
                    lambda v: all(n.isdigit() and v.split(',').count(n) == 1
                                  for n in v.split(','))),
          '> 0': ('positive', lambda v: v > 0), '0..1': ('between 0 and 1', lambda v: 0 <= v <= 1),
          'letters of qkvo': ('some of the letters qkvo, each once',
                              lambda v: set(v) <= set('qkvo') and len(set(v)) == len(v))}

def own_options(name):
    """{option: (field, type, default)} of a phase, or of Command, Loop, Use."""
    cls = PHASES.get(name, name)
    if hasattr(cls, 'like'):
        theirs = own_options(cls.like)
        return {key: theirs[key] for key in (f'{cls.like}_steps', f'{cls.like}_lr')}
    hints = get_type_hints(cls, include_extras=True)
    return {f'{name}_{f.name}' if f.name in ('steps', 'lr') else f.name:
            (f.name, hints[f.name], f.default) for f in fields(cls)}

def all_options():
    out = {}
    for section in (Command, *PHASES, Loop, Use):
        out |= own_options(section)
    return out

def cast(name, value, hint):
    """The value that a typed text stands for, checked by its annotation."""
    condition, choices = None, ()
    if hasattr(hint, '__metadata__'):
        hint, condition = hint.__origin__, hint.__metadata__[0]
    if get_origin(hint) is Literal:
        hint, choices = str, get_args(hint)
    kind = next((t for t in get_args(hint) if t is not type(None)), hint)
    words = {'1': True, 'true': True, 'True': True, '0': False, 'false': False, 'False': False}
    try:
        value = words[value] if kind is bool else kind(value)
    except (ValueError, KeyError):
        what = '0 or 1' if kind is bool else f'of type {kind.__name__}'
        raise BadInput(f'--{name}={value}: must be {what}') from None
    if isinstance(condition, dict):         # names; of an `each` perhaps several
        choices = condition
    elif condition and not RANGES[condition][1](value):
        raise BadInput(f'--{name}={value}: must be {RANGES[condition][0]}')
    elif kind in (int, float) and not 0 <= value < math.inf:
        raise BadInput(f'--{name}={value}: must be finite and not negative')
    several = any(getattr(cls, 'each', None) == name for cls in PHASES.values())
    for word in (value.split(',') if several else [value]) if choices else ():
        if word not in choices:
            raise BadInput(f'--{name}={word}: must be one of {", ".join(c for c in choices if c)}')
    return value

def parse(argv):
    """`--key=value` arguments, a preset's among them -> {option: value} of what was typed."""
    known, typed = all_options(), {}
    for arg in argv:
        key, eq, value = arg.partition('=')
        name = key.removeprefix('--').replace('-', '_')
        if not key.startswith('--') or not eq:
            raise BadInput(f'{arg!r} is not of the form --key=value (--help lists the keys)')
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f'did you mean --{near[0]}?' if near else 'see --help'
            raise BadInput(f'--{name}: unknown option; {hint}')
        typed[name] = cast(name, value, known[name][1])
    if typed.get('preset') and typed['preset'] not in PRESETS:
        raise BadInput(f'--preset={typed["preset"]}: must be one of {", ".join(PRESETS)}')
    explicit, preset = set(typed), dict(PRESETS.get(typed.get('preset'), {}))
    if 'n_experts' in typed:                # one excludes the other, a preset's too
        typed.setdefault('expert_size', 0)
    if typed.get('expert_size'):
        preset.pop('n_experts', None)
    typed = preset | typed
    typed |= implied(typed)
    check(typed, explicit)
    return typed

def implied(typed):
    """What --data and --init_from say of --arch and --tokenizer, where these are not typed."""
    source, out = typed.get('init_from'), {}
    if source and not {'arch', 'tokenizer'} <= typed.keys():
        c, about = peek(source)
        out = dict(arch='gpt' if c.causal else 'bert', tokenizer=about.get('tokenizer', 'bytes'))
    elif str(typed.get('data')).endswith(('.tsv', '.jsonl')):
        out = dict(arch='bert')
    return {name: value for name, value in out.items() if name not in typed}

def with_defaults(typed):
    return SimpleNamespace(**{k: default for k, (_, _, default) in all_options().items()} | typed)

def ancestors(name):
    """The phases that lead to this one, itself among them."""
    out = {name}
    for other, cls in PHASES.items():
        if name in PHASES and cls.writes in PHASES[name].reads:
            out |= ancestors(other)
    return out

def check(typed, explicit):
    """What options can get wrong together, and explicit ones that nothing would read."""
    o = with_defaults(typed)
    if o.phase not in (*PHASES, *COMMANDS, 'all'):
        raise BadInput(f'--phase={o.phase}: must be all, {", ".join((*COMMANDS, *PHASES))}')
    used = {*own_options(Command), *COMMANDS.get('eval' if o.phase == 'all' else o.phase, ())}
    if o.phase not in ('sample', 'export'):
        phases = ancestors(o.phase) if o.phase in PHASES else PHASES
        used = used.union(LOOP, *map(own_options, phases))
    for name in sorted(explicit - used) + (['seed'] if {'seed', 'seeds'} <= explicit else []):
        raise BadInput(f'--{name}: --phase={o.phase} does not use it; leave it out')
    labelled = o.data.endswith(('.tsv', '.jsonl'))
    if labelled != (o.arch == 'bert') and o.data != 'stdlib' or o.val and not labelled:
        raise BadInput(f'--data={o.data}: --arch=bert, and only it, learns from labelled texts '
                       '(and their --val), a .tsv or .jsonl file')
    if o.tokenizer == ('gpt2' if o.arch == 'bert' else 'wordpiece') or \
            o.tokenizer == 'wordpiece' and not o.init_from:
        raise BadInput(f'--tokenizer={o.tokenizer}: --arch=bert takes bytes, or wordpiece from '
                       '--init_from')
    sizes = {'n_layer', 'n_head', 'n_embd', 'activation'} & typed.keys()
    if o.init_from and sizes:
        raise BadInput(f'--{min(sizes)}: --init_from={o.init_from} brings its own; leave it out')
    if {'n_experts', 'expert_size'} <= typed.keys() and o.expert_size:
        raise BadInput(f'--n_experts={o.n_experts} and --expert_size={o.expert_size}: give one')
    new = not o.init_from and not os.path.exists(os.path.join(o.out_dir, 'base.pt'))
    if new and max(o.expert_size, 0 if o.expert_size else o.n_experts) > 4 * o.n_embd:
        name = 'expert_size' if o.expert_size else 'n_experts'
        raise BadInput(f'--{name}={getattr(o, name)}: more than the {4 * o.n_embd} neurons of '
                       'an FFN')
    if o.n_embd % o.n_head:
        raise BadInput(f'--n_embd={o.n_embd}: must be a multiple of --n_head={o.n_head}')
    if 'oracle' in o.router_loss:
        raise BadInput('--router_loss=oracle: has nothing to learn; eval shows it anyway')
    if not o.out_dir:
        raise BadInput('--out_dir=: give a folder')
    if o.seeds and o.phase in ('sample', 'export'):
        raise BadInput(f'--seeds={o.seeds}: --phase={o.phase} takes one --out_dir={o.out_dir}/sN')
    if o.phase == 'export' and not o.to:
        raise BadInput('--phase=export needs --to=DIR, a folder that is not there yet')
    if not dict(cuda=torch.cuda, mps=torch.backends.mps).get(o.device, torch.cpu).is_available():
        raise BadInput(f'--device={o.device}: torch {torch.__version__} finds none here; '
                       'try --device=auto')

def print_help():
    print(__doc__)
    for name in (Command, *PHASES, Loop, Use):
        cls = PHASES.get(name, name)
        print(f'\n  {name if isinstance(name, str) else ""} {cls.__doc__.splitlines()[0]}'.rstrip())
        lines = inspect.getsource(cls).splitlines()
        for option, (field, _, default) in own_options(name).items():
            line = next((x for x in lines if x.strip().startswith(f'{field}:')), '')
            print(f'    --{option:<18} {default!s:<12} {line.partition("# ")[2]}'.rstrip())

# -------------------------------------------------------------------------------------- data

class Rows(NamedTuple):
    """Labelled texts in one array: text(i), cut to `block_size`, is of class classes[i]."""
    tokens: np.ndarray
    ends: np.ndarray
    classes: np.ndarray
    block_size: int
    closing: int                            # tokens that close a text and survive the cut

    def lengths(self):                      # before the cut
        return np.diff(self.ends, prepend=0)

    def text(self, i):
        tokens = self.tokens[self.ends[i - 1] if i else 0:self.ends[i]].astype(np.int64)
        return cut(tokens, self.block_size, self.closing)

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
        found = [f for f in found if os.path.isfile(f) and b'\0' not in open(f, 'rb').read(8192)]
    return sorted(found)

def content_hash(files):
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as f:
            while piece := f.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]

def open_corpus(o, folder):
    """--data as tokens, encoded once into folder/data.pt, where they are found again even if the
    source is gone. A source that changed stops the run, unless --overwrite=1 encodes it anew."""
    bins = [os.path.join(o.data, name) for name in ('train.bin', 'val.bin')]
    if os.path.isfile(bins[0]):             # nanoGPT's folder, used where it is
        if not all(os.path.isfile(f) and os.path.getsize(f) for f in bins):
            raise BadInput(f'--data={o.data}: needs both train.bin and val.bin')
        about = dict(source=o.data, tokenizer=o.tokenizer, hash=content_hash(bins),
                     vocab=256 if o.tokenizer == 'bytes' else 50257)
        return as_corpus(o, dict(about=about, **{name: np.memmap(f, np.uint16, 'r') for name, f
                                                 in zip(('train', 'val'), bins)}))
    wanted, path = [o.data, o.val, o.tokenizer, o.arch], os.path.join(folder, 'data.pt')
    wanted += [o.init_from] if o.tokenizer == 'wordpiece' else []
    wanted += [o.block_size] if o.arch == 'bert' and o.data == 'stdlib' else []
    known = {}
    with contextlib.suppress(Exception):    # not there, or damaged: encoded again
        known = torch.load(path, mmap=True, weights_only=True)
    sources = [text_files(source) for source in (o.data, o.val) if source]
    files = sum(sources, [])
    if known.get('wanted') != wanted:
        known = {}
    if known and all(sources) and content_hash(files) != known['about']['hash']:
        if not (o.overwrite and o.phase in ('all', 'base')):
            raise BadInput(f'--data={o.data}: changed since it was encoded into {path}; bring it '
                           'back, use another --out_dir, or start again with --phase=all '
                           '--overwrite=1')
        known = {}
    if not known:
        if not all(sources) or not sum(map(os.path.getsize, files)):
            raise BadInput(f'--data={o.data}: no such file, no texts in it, or empty')
        make_folder(folder)
        known = encode(o, files) | dict(wanted=wanted)
        write_atomically(path, lambda temporary: torch.save(known, temporary))
    arrays = {name: t.numpy() for name, t in known.items() if torch.is_tensor(t)}
    return as_corpus(o, known | arrays)

def as_corpus(o, known):
    """What open_corpus found, checked against the options, and one line about it."""
    about, parts = known['about'], [known['train'], known['val']]
    if 'classes' in about:
        parts = [Rows(known[name], known[f'{name}_ends'], known[f'{name}_classes'], o.block_size,
                      about['closing']) for name in ('train', 'val')]
        cut = sum(int((rows.lengths() > o.block_size).sum()) for rows in parts)
        say = f'{len(parts[0].ends):,} texts of {len(about["classes"])} classes to train on, ' \
              f'{len(parts[1].ends):,} held out'
        say += f'; {cut:,} longer than --block_size={o.block_size} are cut' if cut else ''
    else:
        say = f'{len(parts[0]):,} tokens to train on, {len(parts[1]):,} held out'
        for name, tokens in zip(('train on', 'evaluate with'), parts):
            if len(tokens) <= o.block_size:
                raise BadInput(f'--data={o.data}: {len(tokens)} tokens to {name} are too few for '
                               f'--block_size={o.block_size}')
            if tokens.max() >= about['vocab']:
                raise BadInput(f'--data={o.data}: token {tokens.max()} is beyond the '
                               f'{about["vocab"]} of --tokenizer={o.tokenizer}')
    say_once(f'data: {about["source"]}: {say}')
    return Corpus(*parts, about)

def encode(o, files):
    """The tokens of all files and what there is to know about them, as open_corpus keeps them."""
    about = dict(source=o.data, tokenizer=o.tokenizer, hash=content_hash(files),
                 n_files=len(files))
    if o.tokenizer == 'wordpiece':
        theirs = peek(o.init_from)[1]
        about |= {key: theirs[key] for key in theirs if key.startswith('tokenizer_')}
    if o.data == 'stdlib':
        about['source'] = f"Python {platform.python_version()}'s standard library"
    texts = tokenizer(about, o.arch == 'gpt')
    about |= dict(vocab=texts.vocab_size) | (dict(tokenizer_json=texts.json) if texts.json else {})
    kind = np.uint16 if texts.vocab_size <= 1 << 16 else np.uint32
    if o.arch == 'bert':
        return encode_labelled(o, texts, kind, about)
    everything = b'\n'.join(open(path, 'rb').read() for path in files)
    # every 20th chunk is held out, so that the held-out part is spread over all of it
    size, parts = max(1, min(65536, len(everything) // 40)), dict(train=[], val=[])
    for i, start in enumerate(range(0, len(everything), size)):
        chunk = everything[start:start + size]
        tokens = np.frombuffer(chunk, np.uint8) if o.tokenizer == 'bytes' else \
            texts.encode([chunk.decode('utf-8', 'replace')])[0]
        parts['val' if i % 20 == 10 else 'train'].append(np.array(tokens, kind))
    if not parts['val']:
        raise BadInput(f'--data={o.data}: {len(everything)} bytes are too few')
    return dict(about=about, **{name: torch.from_numpy(np.concatenate(part))
                                for name, part in parts.items()})

def read_labelled(path):
    """[(label, text)] for each line of a .tsv (label<TAB>text) or .jsonl (label and text)."""
    rows, broken, is_json = [], 0, path.endswith('.jsonl')
    for n, raw in enumerate(open(path, 'rb'), 1):
        line = raw.decode('utf-8', 'replace').removeprefix('\ufeff').rstrip('\r\n')
        broken += '\ufffd' in line and '\ufffd'.encode() not in raw
        try:
            row = json.loads(line) if is_json else dict(zip(('label', 'text'), line.split('\t', 1)))
            # JSON can spell half a character (a lone surrogate), which nothing can encode
            label, text = (t.encode('utf-8', 'replace').decode()
                           for t in (str(row['label']), row['text']))
        except (ValueError, KeyError, TypeError, AttributeError):
            form = '{"label": ..., "text": ...}' if is_json else 'label<TAB>text'
            raise BadInput(f'{path}, line {n}: is not of the form {form}') from None
        if not text.strip():
            raise BadInput(f'{path}, line {n}: its text is empty')
        rows.append((label, text))
    if broken:
        print(f'{path}: {broken:,} lines have bytes that are no UTF-8: replaced by \ufffd')
    return rows

def stdlib_snippets(size):
    """[(package, snippet)]: the 8 largest packages of the standard library in pieces."""
    packages, rng = {}, np.random.default_rng(0)
    for path in text_files('stdlib'):
        top, _, inside = os.path.relpath(path, STDLIB).partition(os.sep)
        if inside:
            text = open(path, encoding='utf-8', errors='replace').read()
            packages[top] = packages.get(top, '') + text
    largest = sorted(sorted(packages, key=lambda top: -len(packages[top]))[:8])
    return [(top, packages[top][i:i + rng.integers(size // 4, size) + 1])
            for top in largest for i in range(0, len(packages[top]), size)]

def encode_labelled(o, texts, kind, about):
    """Tokens, ends and classes of both parts; every 10th line is held out without --val."""
    rows = stdlib_snippets(o.block_size - 1) if o.data == 'stdlib' else read_labelled(o.data)
    parts = dict(train=rows, val=read_labelled(o.val)) if o.val else \
        dict(train=[row for i, row in enumerate(rows) if i % 10 != 9], val=rows[9::10])
    classes, n_val = sorted({label for label, _ in rows}), len(parts['val'])
    if len(classes) < 2 or not n_val:
        raise BadInput(f'--data={o.data}: {len(rows)} texts of {len(classes)} classes, of which '
                       f'{n_val} are held out, are too few')
    if len(classes) > len(rows) / 3:
        print(f'warning: {len(rows):,} texts of {len(classes):,} classes: are labels and texts '
              'swapped? The label comes first')
    if n_val < 100:
        print(f'warning: {n_val} held-out texts decide: an accuracy is uncertain by about '
              f'{50 / n_val ** 0.5:.0f} points')
    out, number = dict(about=about), {label: i for i, label in enumerate(classes)}
    about |= dict(classes=classes, closing=texts.closing)
    for name, part in parts.items():
        ids, unknown = [], [label for label, _ in part if label not in number]
        if unknown:
            raise BadInput(f'{o.val}: label {unknown[0]!r} is not one of the {len(classes)} in '
                           f'{o.data}')
        for i in range(0, len(part), 1000):                      # the tokenizer's objects are large
            encoded = texts.encode([text for _, text in part[i:i + 1000]])
            ids += [np.array(tokens, kind) for tokens in encoded]
        out |= {name: torch.from_numpy(np.concatenate(ids)),
                f'{name}_ends': torch.tensor([len(i) for i in ids]).cumsum(0),
                f'{name}_classes': torch.tensor([number[label] for label, _ in part])}
    return out

def get_batch(corpus, o, device, step, phase):
    """Batch number `step` of a phase: depends on nothing but seed, the phase's name and step."""
    rng = np.random.default_rng([o.seed, zlib.crc32(phase.encode()), step])
    if 'classes' in corpus.about:           # one of 16 batches of texts of like lengths
        pool = rng.integers(0, len(corpus.train.ends), 16 * o.batch_size)
        pool = by_length(corpus.train, pool).reshape(16, -1)
        return text_batch(corpus.train, pool[rng.integers(16)], device)
    at = rng.integers(0, len(corpus.train) - o.block_size, o.batch_size)
    return token_batch(corpus.train, at, o.block_size, device)

def held_out(corpus, o, device):
    """eval_batches x batch_size held-out sequences, evenly spread; texts by length."""
    n = o.eval_batches * o.batch_size
    if 'classes' in corpus.about:
        n_val = len(corpus.val.ends)
        n = min(n, n_val)
        at = by_length(corpus.val, np.linspace(0, n_val - 1, n).astype(int))
        parts = np.array_split(at, max(min(n, 2), math.ceil(n / o.batch_size)))
        return [text_batch(corpus.val, part, device) for part in parts]
    n = min(n, max(1, (len(corpus.val) - 1) // o.block_size))
    at = np.linspace(0, len(corpus.val) - o.block_size - 1, n).astype(int)
    return [token_batch(corpus.val, part, o.block_size, device)
            for part in np.array_split(at, max(min(n, 2), n // o.batch_size))]

def by_length(rows, at):
    return at[np.argsort(np.minimum(rows.lengths()[at], rows.block_size), kind='stable')]

def text_batch(rows, at, device):
    """(what model.encode takes, each (B, L)), the classes (B,)): the padding is never run."""
    return pad([rows.text(i) for i in at], device), torch.from_numpy(rows.classes[at]).to(device)

def token_batch(tokens, at, length, device):
    """(what model.encode takes, the targets), each (B, L) int64."""
    crops = np.stack([tokens[i:i + length + 1] for i in at]).astype(np.int64)
    crops = torch.from_numpy(crops).to(device)
    return dict(idx=crops[:, :-1]), crops[:, 1:]

# -------------------------------------------------------------------------------------- phases

def make_folder(path):
    """The folder, made if need be and found to be writable: before the work, not after it."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BadInput(f'{path}: cannot be written to ({reason(error)})') from None

def read_phase(path):
    """A checkpoint that a phase wrote; BadInput if it is none."""
    data = read_checkpoint(path)
    if not {'phase', 'step', 'steps', 'options', 'metrics'} <= data.keys():
        raise BadInput(f'{path}: no checkpoint of train.py (start from it with --init_from={path})')
    return data

def finished(path):
    data = read_phase(path)
    if data['step'] < data['steps']:
        raise BadInput(f'{path} stopped at step {data["step"]} of {data["steps"]}: finish it with '
                       f'python train.py --phase={data["phase"]}')
    return data

def siblings(folder):
    """{path: checkpoint} of all that phases wrote into a folder, in the order of PHASES."""
    found, rank = {}, list(PHASES)
    for path in glob.glob(os.path.join(glob.escape(folder), '*.pt')):
        with contextlib.suppress(BadInput):
            found[path] = read_phase(path)
    known = [path for path in found if found[path]['phase'] in rank]
    known.sort(key=lambda path: (rank.index(found[path]['phase']), len(path), path))
    return {path: found[path] for path in known}

def places(name, value, folder):
    """(what a phase reads, what it writes) in a folder; with `each`, what was made with value."""
    cls = PHASES[name]
    sources = [os.path.join(folder, f'{stem}.pt') for stem in cls.reads]
    source = next(filter(os.path.isfile, sources), sources[-1] if sources else '')
    path = os.path.join(folder, f'{cls.writes}.pt')
    for other, data in siblings(folder).items() if value else ():
        if data['phase'] == name and data['options'][cls.each] == value:
            return source, other
    if value and os.path.exists(path):
        path = os.path.join(folder, f'{cls.writes}-{value}.pt')
    return source, path

def resolve(name, typed, value, source, path):
    """(options, parent, own): what a phase runs with, what it starts from, and its own checkpoint
    as far as it stands. An option is what was typed, what its own checkpoint, the parent or the
    others of the folder say, or the default, in this order. BadInput where things do not fit."""
    cls, mine = PHASES[name], {*own_options(name), *LOOP}
    if cls.reads and not os.path.isfile(source):
        maker = next(other for other, c in PHASES.items() if c.writes == cls.reads[-1])
        raise BadInput(f'--phase={name} needs {source}: make it with python train.py '
                       f'--phase={maker} --out_dir={os.path.dirname(source)}')
    parent = finished(source) if cls.reads else None
    if parent and PHASES[parent['phase']].writes not in cls.reads:
        raise BadInput(f'{source} is a checkpoint of phase {parent["phase"]}, --phase={name} needs '
                       f'one of {" or ".join(cls.reads)}')
    own = read_phase(path) if os.path.exists(path) else None
    if own and own['phase'] != name:
        raise BadInput(f'{path}: holds a checkpoint of phase {own["phase"]}; give another place')
    values = vars(with_defaults({}))
    inherited = parent['options'] if parent else {}
    others = list(siblings(os.path.dirname(path) or '.').values())[::-1]
    like_it = [data['options'] for data in others if data['phase'] == name]
    for options in (*(data['options'] for data in others), inherited, *like_it,
                    own['options'] if own else {}):
        values |= {k: v for k, v in options.items() if k in mine}
    values |= {k: v for k, v in inherited.items() if k not in mine}
    values |= typed | ({cls.each: value} if value else {})
    for option, had in inherited.items():
        if values[option] != had and option not in mine:
            raise BadInput(f'--{option}={values[option]}: {source} was made with {had}; leave the '
                           'option out, use another --out_dir, or start again with --phase=all '
                           '--overwrite=1')
    changed = [f'--{option}={values[option]}: {path} was made with {had}'
               for option, had in (own['options'].items() if own else ())
               if option in mine and values[option] != had]
    if own and cls.reads and own['parent'] != checkpoint_hash(source):
        changed.append(f'{path} was made from another {source}')
    if changed and not typed.get('overwrite'):
        advice = 'leave the option out, ' if changed[0].startswith('--') else ''
        raise BadInput(f'{changed[0]}; {advice}use another --out_dir, or run the phase again with '
                       '--overwrite=1')
    if changed:
        print(f'{name:8s} {changed[0]}: again')
        own = None
    return SimpleNamespace(**values), parent, own

def run_phase(name, typed, value=None, source=None, path=None):
    """Bring one phase to its end, from nothing or from where it was stopped."""
    cls, usual = PHASES[name], places(name, value, with_defaults(typed).out_dir)
    source, path = source or usual[0], path or usual[1]
    o, parent, own = resolve(name, typed, value, source, path)
    options = own_options(name)
    phase = cls() if hasattr(cls, 'like') else cls(
        **{field: getattr(o, option) for option, (field, _, _) in options.items()})
    phase.seed = o.seed
    if hasattr(phase, 'wanted') and not phase.wanted():
        if typed.get('phase') == name:
            raise BadInput(f'--phase={name} needs one of --{", --".join(options)} that asks for it')
        if os.path.isfile(path):            # not any more, by --overwrite=1
            os.remove(path)
        return
    like = getattr(cls, 'like', name)
    steps, device, corpus = getattr(o, f'{like}_steps', 0), pick_device(o), None
    again = o.overwrite and typed.get('phase') == name
    done = own and own['step'] == own['steps'] and not again
    if not parent or steps and not done:    # what the base learned from must not have changed
        corpus = open_corpus(o, os.path.dirname(source or path) or '.')
        learned = (parent or own or {}).get('data') or corpus.about
        if learned['hash'] != corpus.about['hash']:
            if parent or not o.overwrite:
                raise BadInput(f'{source or path} learned from another --data={o.data}; '
                               'bring that back, or start again with --phase=all --overwrite=1')
            own = done = None
    if done:
        return print(f'{name:8s} done ({path})')
    own = None if again else own
    make_folder(os.path.dirname(path) or '.')
    torch.manual_seed(o.seed)
    model = (build(parent, source) if parent else phase.create(corpus.about)).to(device)
    batches = (get_batch(corpus, o, device, i, name) for i in itertools.count())
    notes = phase.prepare(model, batches) or {}
    made_with = {option: getattr(o, option) for option in (*LOOP, *options)}
    if not parent:                          # --init_from brings sizes of its own
        made_with |= {f: value for f, value in asdict(phase).items() if f in made_with}
    record = dict(phase=name, steps=steps, metrics=notes, parent=checkpoint_hash(source) if parent
                  else None, options={**(parent['options'] if parent else {}), **made_with},
                  data=parent['data'] if parent else corpus.about,
                  asked=typed.get(getattr(cls, 'each', '')))

    def keep(step, optimizer=None):
        save(model, path, step=step, optimizer=optimizer, rng=torch.get_rng_state(), **record)

    if steps:
        learn(phase, name, o, own, model.to(device), corpus, device, steps, keep)
    if hasattr(phase, 'report'):
        notes |= phase.report(model, held_out(corpus, o, device)[:8])
    keep(steps)

def adopted(base, about):
    """The model of --init_from, dense again if it was routed: the base of another conversion."""
    n_classes = len(about.get('classes', ()))
    model = load(base.init_from, n_classes=n_classes)
    c, have = model.config, f'--init_from={base.init_from} has'
    if c.causal != (base.arch == 'gpt') or c.n_classes != n_classes:
        raise BadInput(f'{have} {"a GPT" if c.causal else "a BERT"} with {c.n_classes} classes, '
                       f'--arch={base.arch} and --data={base.data} need {n_classes}')
    if about['vocab'] > c.vocab_size or \
            about['vocab'] < c.vocab_size and base.tokenizer != 'wordpiece':
        raise BadInput(f'{have} {c.vocab_size} tokens, --tokenizer={base.tokenizer} has '
                       f'{about["vocab"]}')
    if base.block_size > c.block_size:
        raise BadInput(f'{have} {c.block_size} positions; use --block_size={c.block_size}')
    base.n_layer, base.n_head, base.n_embd = c.n_layer, c.n_head, c.n_embd
    base.activation = c.activation
    fresh = asdict(Config(dropout=base.dropout))
    plain = {key: fresh[key] for key in ('n_experts', 'n_outputs', 'router_loss', 'router_width',
                                         'rule', 'tau', 'floor', 'dropout')}
    state = {k: v for k, v in model.state_dict().items() if '.router.' not in k}
    for name in [k for k in state if k.endswith('.offsets')]:
        state[name] = torch.stack([state[name][0], state[name][-1]])
    return build(dict(config=asdict(c) | plain, model=state, data=about))

def pick_device(o):
    if o.device != 'auto':
        return o.device
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    return next(device for device, there in here.items() if there)

# -------------------------------------------------------------------------------------- the loop

SAVE_EVERY = 60                             # seconds between checkpoints of a running phase

def schedule(step, steps):
    """The learning rate as a share of its peak: warm-up over 5 %, then a cosine to a tenth."""
    return min((step + 1) / max(1, steps // 20), 0.55 + 0.45 * math.cos(math.pi * step / steps))

def learn(phase, name, o, own, model, corpus, device, steps, keep):
    """AdamW, clipping, accumulation; keep(step, optimizer) writes a checkpoint."""
    model.train()
    parameters = [p.requires_grad_(True) for p in phase.parameters(model)]
    rate = f'{getattr(phase, "like", name)}_lr'
    start, peak = own['step'] if own else 0, getattr(o, rate)
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=o.weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device != 'mps')
    if own:
        print(f'{name:8s} going on at step {start} of {steps}')
        model.load_state_dict(own['model'])
        torch.set_rng_state(own['rng'])
        if own['optimizer']:
            optimizer.load_state_dict(own['optimizer'])
    else:
        keep(0)                             # a place that cannot be written to shows now
    if o.compile:
        model.compile()
    saved, say = time.time(), progress(name, start, steps)
    autocast = torch.autocast('cuda', torch.bfloat16, enabled=device == 'cuda')
    with stopped_by_signals() as stopped:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group['lr'] = peak * schedule(step, steps)
            tokens = 0
            for micro in range(o.grad_accum):
                batch = get_batch(corpus, o, device, step * o.grad_accum + micro, name)
                tokens += n_tokens(batch[0])
                with autocast:
                    loss, log = phase.loss(model, batch, (step + 1) / steps)
                (loss / o.grad_accum).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not torch.isfinite(loss + norm):                  # before it gets into the weights
                raise FloatingPointError(
                    f'{name}: at step {step + 1} the loss is {loss.item()}, its gradient '
                    f'{norm.item()} long; what was saved before stays; a smaller --{rate} than '
                    f'{peak} may help')
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            say(step + 1, tokens, log.get('task', loss), log)
            if step + 1 < steps and (stopped or time.time() - saved > SAVE_EVERY):
                keep(step + 1, optimizer.state_dict())
                saved = time.time()
            if stopped and step + 1 < steps:
                raise KeyboardInterrupt(f'{name} stopped at step {step + 1} of {steps}; the same '
                                        'command goes on from there')
    model.eval().requires_grad_(False)

@contextlib.contextmanager
def stopped_by_signals():
    """A list that is no longer empty once SIGINT or SIGTERM came: the step is finished first."""
    stopped = []
    handlers = {s: signal.signal(s, lambda *_: stopped.append(s))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)

def progress(name, start, steps):
    """-> say(step, tokens, loss, log): a line every five seconds, with the time that is left."""
    began = said = time.time()
    seen = 0

    def say(step, tokens, loss, log):
        nonlocal said, seen
        now, seen = time.time(), seen + tokens
        if now - said > 5 or step in (steps, start + 2):
            said, left = now, (steps - step) * (now - began) / (step - start)
            zeros = f'  zeros {log["zeros"]:.1%}' if 'zeros' in log else ''
            print(f'{name:8s} step {step}/{steps}  loss {loss.item():.4f}{zeros}  '
                  f'{seen / (now - began):,.0f} tokens/s  {bench.clock(left)} left', flush=True)
    return say

# -------------------------------------------------------------------------------------- commands

def evaluation(typed, paths=()):
    """Measure the checkpoints of out_dir, or those given, each by what it says of itself; print
    the table, write results.json and its picture beside them."""
    o = with_defaults(typed)
    folder = os.path.dirname(paths[0]) or '.' if paths else o.out_dir
    entries = bench.entries(siblings(folder), paths)
    make_folder(folder)
    kinds = typed.get('router_loss', ','.join(ROUTERS)).split(',')
    if 'router_loss' in typed and not {e.kind for e in entries} & set(kinds):
        raise BadInput(f'--router_loss={o.router_loss}: no finished checkpoint in {folder} has it')
    entries = [e for e in entries if e.kind in ('', *kinds)]
    for e in entries:
        for name in typed.keys() & e.data['options'].keys() - {*LOOP, 'router_loss'}:
            had = e.data['options'][name]
            if typed[name] != had:
                raise BadInput(f'--{name}={typed[name]}: {e.path} was made with {had}; leave the '
                               'option out')
    dense, sparse = (e.data['options'] for e in entries[:2])
    if any(dense[key] != sparse[key] for key in own_options('dense')):
        print('warning: dense.pt and sparse.pt were trained for other steps or at another rate: '
              'run --phase=dense --overwrite=1')
    options = entries[-1].data['options'] | dense
    before = bench.read_results(folder).get('config', {})
    o = with_defaults(options | {key: before[key] for key in ('eval_batches',) if key in before}
                      | typed)
    corpus, device = open_corpus(o, folder), pick_device(o)
    for e in entries:
        if (e.data['data'] or {}).get('hash', corpus.about['hash']) != corpus.about['hash']:
            raise BadInput(f'{e.path} learned from another --data than {entries[0].path}')
    settings = dict(data=corpus.about['hash'], batches=o.eval_batches, batch_size=o.batch_size,
                    block_size=o.block_size, device=device, threads=torch.get_num_threads())
    return bench.evaluate(entries, held_out(corpus, o, device), o, settings, folder, device)

def chosen(typed, device):
    """The model that sample and export take: of --router_loss, else d2dmoe.pt, else the latest."""
    o = with_defaults(typed)
    found = {path: data for path, data in siblings(o.out_dir).items()
             if 'router_loss' not in typed or data['config']['router_loss'] == o.router_loss}
    if not found:
        raise BadInput(f'--phase={o.phase} finds no checkpoint in --out_dir={o.out_dir}'
                       + (f' with --router_loss={o.router_loss}' if 'router_loss' in typed else '')
                       + ': run python train.py first')
    usual = os.path.join(o.out_dir, 'd2dmoe.pt')
    path = usual if usual in found else list(found)[-1]
    model, kind = build(finished(path), path).to(device), found[path]['config']['router_loss']
    if not kind and {'tau', 'rule', 'floor'} & typed.keys():
        raise BadInput(f'--tau, --rule, --floor: {path} has no routers yet; leave them out or run '
                       '--phase=router first')
    if kind and (o.phase == 'sample' or {'tau', 'rule', 'floor'} & typed.keys()):
        rule = o.rule or ROUTERS[kind].rule
        model.set_rule(rule, 0.1 if o.tau is None else o.tau, o.floor)
        print(f'{path}: router {kind}, rule {rule}, tau {model.config.tau:g}')
    return path, model

def sample(typed):
    """Print a continuation of --prompt."""
    o = with_defaults(typed)
    device = pick_device(o)
    path, model = chosen(typed, device)
    if not model.config.causal:
        raise BadInput(f'--phase=sample: {path} is a BERT, which labels texts and writes none')
    generator = torch.Generator(device).manual_seed(o.seed)
    print(model.generate(o.prompt, o.n_tokens, o.temperature, o.top_k, generator))

def run_seeds(typed):
    """Every phase once a seed, each in a folder of its own, then mean and spread in one table."""
    o, results = with_defaults(typed), []
    for seed in o.seeds.split(','):
        own = {name: value for name, value in typed.items() if name != 'seeds'}
        print(f'---- seed {seed}', flush=True)
        results.append(run(own | dict(seed=cast('seeds', seed, int),
                                      out_dir=os.path.join(o.out_dir, f's{seed}'))))
    if o.phase in ('all', 'eval'):
        bench.print_seeds(results, os.path.join(o.out_dir, 'seeds.json'))

def run(typed):
    o = with_defaults(typed)
    if o.seeds:
        return run_seeds(typed)
    if o.phase == 'sample':
        return sample(typed)
    if o.phase == 'export':
        path, model = chosen(typed, 'cpu')
        export(model, o.to)
        return print(f'{o.to}: load() reads {path} from it, with its routing' + (
            '; projections are MLPs: in our own format only' if model.config.projections else
            '; transformers reads it, too, as a dense model: it knows no experts'))
    for name in PHASES if o.phase == 'all' else [o.phase] if o.phase in PHASES else []:
        each = getattr(PHASES[name], 'each', None)
        values = [None]
        if each:                            # untyped: those that are there
            there = [data for data in siblings(o.out_dir).values() if data['phase'] == name]
            asked = (there[0].get('asked') if there else None) or getattr(o, each)
            values = (getattr(o, each) if each in typed else asked).split(',')
            if each not in typed:
                values += [data['options'][each] for data in there]
        asked = {each: ','.join(dict.fromkeys(values))} if each else {}
        for value in dict.fromkeys(values):
            run_phase(name, typed | asked, value)
    if o.phase in ('all', 'eval'):
        return evaluation(typed)

def convert(name):
    """`python moefy.py IN.pt OUT.pt --key=value`: one phase from file to file."""
    argv = sys.argv[1:]
    if len(argv) < 2 or any(arg.startswith('-') for arg in argv[:2]):
        print(f'usage: python {os.path.basename(sys.argv[0])} IN.pt OUT.pt [--key=value ...], keys '
              'as in python train.py --help')
        sys.exit(0 if {'-h', '--help'} & set(argv) else 2)

    def job():
        source, path = argv[:2]
        if os.path.abspath(source) == os.path.abspath(path):
            raise BadInput(f'{path}: is what the phase reads; give another place to write to')
        typed = parse([*argv[2:], f'--phase={name}'])
        for arg in argv[2:]:
            if arg.startswith(('--phase=', '--out_dir=', '--seeds=')):
                raise BadInput(f'{arg}: goes from {source} to {path}; leave it out')
        each = getattr(PHASES[name], 'each', None)
        value = None
        if each:                            # untyped: the first of the default
            value = typed.get(each) or getattr(with_defaults({}), each).split(',')[0]
        if value and ',' in value:
            raise BadInput(f'--{each}={value}: one of them; {path} is one file')
        run_phase(name, typed | dict(out_dir=os.path.dirname(path) or '.'), value, source, path)
    guarded(job)

def guarded(job):
    """Run it; what the user can mend ends in one sentence and a non-zero exit, no traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job()
    except (BadInput, FloatingPointError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 3)
    except KeyboardInterrupt as error:
        print(f'\n{error or "interrupted"}', file=sys.stderr)
        sys.exit(130)

if __name__ == '__main__':
    if {'-h', '--help'} & set(sys.argv[1:]):
        print_help()
    else:
        guarded(lambda: run(parse(sys.argv[1:])))
