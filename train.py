"""From a dense transformer to a dynamic-k mixture of experts: phases, data, the loop, the command line.

    python train.py                              every phase that is not done yet, then the table
    python train.py --phase=sparsify             one phase, on the checkpoint before it
    python train.py --phase=sample --prompt='def ' --tau=0.1
    python train.py --preset=bert --data=emotion.tsv --attn_projections=qkvo
    python train.py --help                       every option

    base --> dense                               the control: as many more steps, no penalty
      +--> [attn] --> sparsify --> moefy --> router --> eval
    base.pt  attn.pt  sparse.pt    moe.pt    d2dmoe.pt  results.json

A phase is a row of PHASES: what it reads and writes, what it does to the model once (`make`), which
parameters learn from which loss (`learn`), for how long. All of them share one loop (`run_phase`). A new
method is a new row and a loss function.

An option that is not typed keeps the value with which the phase before was run; one that is typed and
differs from a finished phase stops the run, unless --overwrite=1 runs that phase again.
"""

import difflib
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F

import bench
import moefy
import router
import sparsify
from kernel import ACTIVATIONS
from model import (ROUTING, TOKENIZER, BadInput, Config, Transformer, build, from_pretrained, read_checkpoint, save,
                   tokenizer_folder)


# ---------------------------------------------------------------------------------------------- options

@dataclass
class Options:
    phase: str = 'all'               # base, dense, attn, sparsify, moefy, router, eval, sample, or all that is left
    preset: str = ''                 # gpt2, bert (the paper's settings), hour (about an hour on 2 cores)
    out_dir: str = 'out'             # checkpoints, the encoded data, results.json
    overwrite: bool = False          # run phases again whose options or input changed
    # data
    data: str = 'stdlib'             # gpt: stdlib, a text, a folder of texts or of .bin; bert: stdlib, .tsv, .jsonl
    val: str = ''                    # bert: the dev file; empty: every 10th line of --data
    tokenizer: str = 'bytes'         # bytes, gpt2, wordpiece (init_from's own)
    # model
    arch: str = 'gpt'                # gpt predicts the next token, bert the label of a text
    init_from: str = ''              # a published model (folder or name) or a checkpoint of ours, not a new model
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256                # the FFN has 4 n_embd neurons
    block_size: int = 256
    activation: str = 'relu'         # of the base: relu, gelu, gelu_tanh; sparsify turns gelu into relu
    dropout: float = 0.0
    # the loop
    seed: int = 0                    # repeats a CPU run bit for bit
    device: str = 'auto'             # auto, cpu, cuda, mps
    compile: bool = False            # torch.compile in base, dense and sparsify
    batch_size: int = 8              # sequences a micro-step
    grad_accum: int = 1              # micro-steps a step
    learning_rate: float = 2e-3      # of the base; cosine to a tenth, warm-up over 5 %
    finetune_lr: float = 1e-3        # of dense and sparsify
    router_lr: float = 5e-3
    weight_decay: float = 0.1        # on matrices only
    base_steps: int = 400
    sparsify_steps: int = 130        # of dense, too
    router_steps: int = 280
    attn_steps: int = 150
    attn_lr: float = 1e-3
    # the method
    attn_projections: str = ''       # which of q, k, v, o become MLPs of the same cost, for example qkvo
    sparsity_loss: str = 'l1'        # hoyer, l1; gelu_clamp keeps GELU
    sparsity_weight: float = 2e-3
    sparsity_ramp: float = 0.5       # share of the run over which the weight rises
    n_experts: int = 128
    expert_size: int = 0             # neurons an expert, instead of n_experts
    split: str = 'kmeans'            # kmeans, random
    router_loss: str = 'norm,active' # norm (the paper), active, share
    router_width: int = 64
    # evaluation and sampling
    rule: str = ''                   # dynk, threshold, topk, cumulative; empty: the router's usual one
    tau: Optional[float] = None      # one tau in [0, 1] instead of the grid; for topk the share of experts
    floor: float = 0.1               # of dynk: an expert below it does not run; in units of the layer's RMS norm
    eval_batches: int = 8            # of batch_size held-out sequences; every second batch picks tau
    prompt: str = '\n'
    n_tokens: int = 300              # to sample
    temperature: float = 0.8
    top_k: int = 50


PRESETS = {
    'hour': dict(out_dir='out-hour', n_layer=6, n_head=6, n_embd=384, batch_size=16, base_steps=900,
                 sparsify_steps=250, router_steps=300, learning_rate=1e-3, finetune_lr=5e-4, router_width=96),
    # the authors' settings for GPT-2 on OpenWebText: 1000 steps of 960 x 1024 tokens, 768 experts of 4
    'gpt2': dict(out_dir='out-gpt2', tokenizer='gpt2', init_from='gpt2', base_steps=0, n_layer=12, n_head=12,
                 n_embd=768, block_size=1024, activation='gelu_tanh', batch_size=8, grad_accum=120,
                 sparsify_steps=1000, finetune_lr=6e-4, sparsity_loss='l1', sparsity_weight=5e-4,
                 sparsity_ramp=0.0, n_experts=768, router_steps=5000, router_lr=3e-3, router_width=128),
    # the authors' settings for ReLU-fied BERT-base on emotion (CARER): 16,000 texts, so 250 steps are an epoch;
    # 10 epochs a phase, 3 for the projections; 128 experts of 24; the penalty's weight is constant
    'bert': dict(out_dir='out-bert', arch='bert', tokenizer='wordpiece', init_from='bert-base-uncased', n_layer=12,
                 n_head=12, n_embd=768, block_size=128, activation='gelu', dropout=0.1, batch_size=64,
                 weight_decay=0.01, learning_rate=2e-5, finetune_lr=2e-5, base_steps=2500, sparsify_steps=2500,
                 attn_steps=750, sparsity_loss='l1', sparsity_weight=1e-4, sparsity_ramp=0.0, n_experts=128,
                 router_steps=2500, router_lr=1e-3, router_width=128, eval_batches=32),
}

CHOICES = dict(activation=tuple(ACTIVATIONS), sparsity_loss=sparsify.LOSSES, split=moefy.SPLITS,
               tokenizer=('bytes', 'gpt2', 'wordpiece'), arch=('gpt', 'bert'), preset=('', *PRESETS),
               rule=('', *router.RULES), device=('auto', 'cpu', 'cuda', 'mps'))
POSITIVE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'grad_accum', 'eval_batches', 'n_experts',
            'router_width', 'learning_rate', 'finetune_lr', 'router_lr', 'attn_lr')


def parse(argv):
    """`--key=value` arguments -> (Options, the set of names that were typed, or given by a typed preset)."""
    defaults = Options()
    types = {f.name: type(getattr(defaults, f.name)) for f in fields(Options)} | {'tau': float}
    typed = {}
    for arg in argv:
        key, eq, value = arg.partition('=')
        name = key.removeprefix('--').replace('-', '_')
        if not key.startswith('--') or not eq:
            raise BadInput(f'{arg!r} is not of the form --key=value (python train.py --help lists the keys)')
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            raise BadInput(f'--{name}: unknown option' + (f'; did you mean --{near[0]}?' if near else '; see --help'))
        typed[name] = cast(name, value, types[name])
    o = Options(**{**PRESETS[typed.get('preset') or 'none'], **typed} if typed.get('preset') else typed)
    typed = set(typed) | (set(PRESETS[o.preset]) if o.preset else set())
    check(o)
    return o, typed


def cast(name, value, kind):
    words = {'1': True, 'true': True, 'True': True, '0': False, 'false': False, 'False': False}
    try:
        value = words[value] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise BadInput(f'--{name}={value}: must be {"0 or 1" if kind is bool else "of type " + kind.__name__}') \
            from None
    if name in CHOICES and value not in CHOICES[name]:
        raise BadInput(f'--{name}={value}: must be one of {", ".join(c for c in CHOICES[name] if c)}')
    return value


def check(o):
    """Everything about the options that can be wrong before anything is read or written."""
    if o.phase not in (*(p.name for p in PHASES), 'all', 'eval', 'sample'):
        raise BadInput(f'--phase={o.phase}: must be all, eval, sample or one of '
                       + ', '.join(dict.fromkeys(p.name for p in PHASES)))
    for name in POSITIVE:
        if not getattr(o, name) > 0:
            raise BadInput(f'--{name}={getattr(o, name)}: must be positive')
    for name in ('base_steps', 'sparsify_steps', 'router_steps', 'attn_steps', 'sparsity_weight', 'weight_decay',
                 'floor', 'temperature', 'seed', 'n_tokens', 'top_k'):
        if not getattr(o, name) >= 0:
            raise BadInput(f'--{name}={getattr(o, name)}: must not be negative')
    for name in ('tau', 'sparsity_ramp', 'dropout'):
        if getattr(o, name) is not None and not 0 <= getattr(o, name) <= 1:
            raise BadInput(f'--{name}={getattr(o, name)}: must be between 0 and 1')
    if o.n_embd % o.n_head:
        raise BadInput(f'--n_embd={o.n_embd}: must be a multiple of --n_head={o.n_head}')
    labelled = o.data.endswith(('.tsv', '.jsonl'))
    if labelled != (o.arch == 'bert') and o.data != 'stdlib' or o.val and not labelled:
        raise BadInput(f'--data={o.data}: --arch=bert, and only it, learns from labelled texts (and their --val), '
                       'a .tsv or .jsonl file')
    if o.tokenizer == ('gpt2' if o.arch == 'bert' else 'wordpiece') or o.tokenizer == 'wordpiece' and not o.init_from:
        raise BadInput(f'--tokenizer={o.tokenizer}: --arch=bert takes bytes, or wordpiece from --init_from')
    if not set(o.attn_projections) <= set('qkvo') or len(set(o.attn_projections)) < len(o.attn_projections):
        raise BadInput(f'--attn_projections={o.attn_projections}: must be some of the letters qkvo, each once')
    if unknown := [loss for loss in losses(o) if loss not in router.LOSSES]:
        raise BadInput(f'--router_loss={",".join(unknown)}: must be one or more of {", ".join(router.LOSSES)}')
    if o.expert_size < 0 or o.expert_size > 4 * o.n_embd and not o.init_from:
        raise BadInput(f'--expert_size={o.expert_size}: must be between 1 and the {4 * o.n_embd} neurons of an FFN')
    if not o.expert_size and o.n_experts > 4 * o.n_embd and not o.init_from:
        raise BadInput(f'--n_experts={o.n_experts}: more experts than the {4 * o.n_embd} neurons of an FFN')
    if not dict(cuda=torch.cuda, mps=torch.backends.mps).get(o.device, torch.cpu).is_available():
        raise BadInput(f'--device={o.device}: torch {torch.__version__} finds none here; try --device=auto')


def losses(o):
    return [loss.strip() for loss in o.router_loss.split(',')]


def print_help():
    print(__doc__)
    for line in open(__file__, encoding='utf-8').read().split('class Options:')[1].split('\n\n\n')[0].splitlines():
        name, _, rest = line.strip().partition(':')
        if line.strip().startswith('#'):
            print(f'\n  {line.strip()[2:]}')
        elif rest:
            default, _, comment = rest.partition('=')[2].partition('#')
            print(f'  --{name:<16} {default.strip():<14} {comment.strip()}')


# ---------------------------------------------------------------------------------------------- data

def tokenizer(name):
    """The tiktoken Encoding behind --tokenizer: the 256 bytes, or GPT-2's vocabulary (downloaded once)."""
    import tiktoken
    if name == 'bytes':                                          # whole lines as pieces: nothing merges in them
        return tiktoken.Encoding('bytes', pat_str=r'[^\n]*\n|[^\n]+', special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:                                   # requests' errors, a bad cache: one way out
        raise BadInput(f'--tokenizer={name}: its vocabulary could be neither downloaded nor found in '
                       f'TIKTOKEN_CACHE_DIR ({type(error).__name__}); connect once, set that folder to a filled '
                       f'cache, or use --tokenizer=bytes') from None


STDLIB = sysconfig.get_paths()['stdlib']


def text_files(source):
    """The files behind --data: (path, bytes) in a fixed order, and how the source is called."""
    label = source
    if source == 'stdlib':
        left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
        found = [os.path.join(d, f) for d, _, names in os.walk(STDLIB) for f in names
                 if f.endswith('.py') and not left_out & set(os.path.relpath(d, STDLIB).split(os.sep))]
        label = f"Python {platform.python_version()}'s standard library"
    elif os.path.isfile(source):
        found = [source]
    elif os.path.isdir(source):
        found = [os.path.join(d, f) for d, _, names in os.walk(source) for f in names if not f.startswith('.')]
        found = [f for f in found if b'\0' not in open(f, 'rb').read(8192)]             # text only
    else:
        raise BadInput(f'--data={source}: no such file or folder (or use --data=stdlib)')
    return [(f, os.path.getsize(f)) for f in sorted(found)], label


def text_chunks(files, size):
    """The text of all files in pieces of `size` characters, never more than two in memory."""
    rest = ''
    for i, (path, _) in enumerate(files):
        rest += '\n' if i else ''
        with open(path, encoding='utf-8', errors='replace') as f:
            while piece := f.read(size):
                rest += piece
                while len(rest) >= size:
                    yield rest[:size]
                    rest = rest[size:]
    if rest:
        yield rest


class Corpus(NamedTuple):
    """Token files mapped into memory, or lists of (tokens of a text, its class); and where they came from."""
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    about: dict
    classes: tuple = ()                                          # none: the next token is to be predicted


def open_corpus(o, say=print):
    """--data as mapped uint16 tokens. Text is encoded once, into out_dir; a fingerprint says when again.

    Every 20th chunk of the text is held out, so that the held-out part is spread over all of it.
    """
    if o.arch == 'bert':
        return open_labelled(o.data, o.val, o.tokenizer, o.init_from, o.block_size, say)
    vocab_size = dict(bytes=256, gpt2=50257)[o.tokenizer]        # token files need no vocabulary to be downloaded
    if os.path.isdir(o.data) and os.path.isfile(os.path.join(o.data, 'train.bin')):
        folder, about = o.data, dict(source=o.data, tokenizer=o.tokenizer)
        if not os.path.isfile(os.path.join(folder, 'val.bin')):
            raise BadInput(f'--data={o.data}: has train.bin but no val.bin')
    else:
        files, label = text_files(o.data)
        total = sum(n for _, n in files)
        if total == 0:
            raise BadInput(f'--data={o.data}: empty')
        stamp = [(f, n, os.stat(f).st_mtime_ns) for f, n in files]
        key = hashlib.sha256(json.dumps([stamp, o.tokenizer]).encode()).hexdigest()[:12]
        folder = os.path.join(o.out_dir, f'data-{key}')
        about = dict(source=label, tokenizer=o.tokenizer, n_files=len(files), bytes=total)
        if not os.path.isfile(os.path.join(folder, 'meta.json')):
            encode_text(tokenizer(o.tokenizer), files, folder, about, say)
    tokens = []
    for name in ('train.bin', 'val.bin'):
        path = os.path.join(folder, name)
        n = os.path.getsize(path) // 2
        if n < o.block_size + 1:
            raise BadInput(f'--data={o.data}: {n} tokens in {name} are too few for --block_size={o.block_size}')
        tokens.append(np.memmap(path, dtype=np.uint16, mode='r', shape=(n,)))
        top = int(tokens[-1][:10_000_000].max())
        if top >= vocab_size:
            raise BadInput(f'--data={o.data}: token {top} in {name} is beyond the {vocab_size} of '
                           f'--tokenizer={o.tokenizer}')
    about |= dict(train_tokens=len(tokens[0]), val_tokens=len(tokens[1]))
    detail = f'{about["n_files"]:,} files, {about["bytes"] / 1e6:.1f} MB' if 'bytes' in about else 'token files'
    say(f'data: {about["source"]} ({detail}): {len(tokens[0]):,} tokens to train on, {len(tokens[1]):,} held out')
    return Corpus(*tokens, vocab_size, about)


def encode_text(enc, files, folder, about, say):
    """Write train.bin, val.bin and meta.json (which files, how many bytes) into `folder`, all or nothing."""
    make_folder(os.path.dirname(folder))
    building = f'{folder}.{os.getpid()}'
    os.makedirs(building)
    try:
        total, seen, last = about['bytes'], 0, time.time()
        size = max(1, min(65536, total // 40))
        with open(os.path.join(building, 'train.bin'), 'wb') as train, \
             open(os.path.join(building, 'val.bin'), 'wb') as val:
            for i, text in enumerate(text_chunks(files, size)):
                np.array(enc.encode_ordinary(text), dtype=np.uint16).tofile(val if i % 20 == 10 else train)
                seen += len(text)
                if time.time() - last > 5:
                    last = time.time()
                    say(f'encoding {about["source"]}: {seen / total:.0%}')
        with open(os.path.join(building, 'meta.json'), 'w') as f:
            json.dump(dict(about, files=files), f, indent=1)
        if os.path.isdir(folder):                                # another process was faster, or one was killed
            shutil.rmtree(folder)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, 'not writable')
    except OSError as error:
        raise BadInput(f'--out_dir={path}: cannot be written ({error.strerror})') from None


def read_labelled(path):
    """[(label, text)] for each line of a .tsv (label<TAB>text) or .jsonl (objects with label and text)."""
    if not os.path.isfile(path):
        raise BadInput(f'{path}: no such file')
    rows, broken, is_json = [], 0, path.endswith('.jsonl')
    with open(path, 'rb') as f:
        for n, raw in enumerate(f, 1):
            line = raw.decode('utf-8', 'replace').removeprefix('\ufeff').rstrip('\r\n')
            broken += '\ufffd' in line and '\ufffd'.encode() not in raw
            try:
                row = json.loads(line) if is_json else dict(zip(('label', 'text'), line.split('\t', 1)))
                # JSON can spell half a character (a lone surrogate), which nothing can encode
                label, text = (t.encode('utf-8', 'replace').decode() for t in (str(row['label']), row['text']))
                empty = not text.strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                form = '{"label": ..., "text": ...}' if is_json else 'label<TAB>text'
                raise BadInput(f'{path}, line {n}: is not of the form {form}') from None
            if empty:
                raise BadInput(f'{path}, line {n}: its text is empty')
            rows.append((label, text))
    if broken:
        print(f'{path}: {broken:,} lines have bytes that are no UTF-8: replaced by \ufffd')
    return rows


def stdlib_snippets(size):
    """[(package, snippet)]: the 8 largest packages of the standard library in pieces of size / 4 to size."""
    packages = {}
    for path, n in text_files('stdlib')[0]:
        top, _, inside = os.path.relpath(path, STDLIB).partition(os.sep)
        if inside:
            packages.setdefault(top, []).append((path, n))
    largest = sorted(packages, key=lambda top: -sum(n for _, n in packages[top]))[:8]
    rng = np.random.default_rng(0)
    return [(top, text[:rng.integers(size // 4, size) + 1]) for top in sorted(largest)
            for text in text_chunks(packages[top], size)]


def labelled_tokenizer(name, init_from):
    """-> texts to token lists with a CLS in front, how many tokens close a text, the size of the vocabulary."""
    if name == 'bytes':
        return lambda texts: [[256, *text.encode()] for text in texts], 0, 257
    try:
        import tokenizers
    except ImportError:
        raise BadInput('--tokenizer=wordpiece needs tokenizers: pip install tokenizers') from None
    folder = Path(tokenizer_folder(init_from))
    if not any((folder / name).is_file() for name in TOKENIZER[:2]):
        raise BadInput(f'--tokenizer=wordpiece: {folder} has neither tokenizer.json nor vocab.txt')
    try:
        if (folder / 'tokenizer.json').is_file():
            enc = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
            enc.no_padding()
            enc.no_truncation()
        else:
            about = folder / 'tokenizer_config.json'
            cased = about.is_file() and json.loads(about.read_text()).get('do_lower_case') is False
            enc = tokenizers.BertWordPieceTokenizer(str(folder / 'vocab.txt'), lowercase=not cased)
    except Exception as error:                                   # the library raises plain Exceptions
        raise BadInput(f'--tokenizer=wordpiece: the tokenizer in {folder} is damaged ({error})') from None
    return lambda texts: [e.ids for e in enc.encode_batch(texts)], 1, enc.get_vocab_size()


@functools.lru_cache(maxsize=1)                                  # the phases of a run share it
def open_labelled(data, val_file, tokenizer, init_from, block_size, say):
    """Labelled texts as lists of (tokens, class). Without a dev file every 10th line is held out."""
    encode, closing, vocab_size = labelled_tokenizer(tokenizer, init_from)
    rows = stdlib_snippets(block_size - 1) if data == 'stdlib' else read_labelled(data)
    source = "8 packages of Python's standard library" if data == 'stdlib' else data
    val = read_labelled(val_file) if val_file else rows[9::10]
    train = rows if val_file else [row for i, row in enumerate(rows) if i % 10 != 9]
    classes = sorted({label for label, _ in rows})
    if len(classes) < 2 or not val:
        raise BadInput(f'--data={data}: {len(rows)} texts of {len(classes)} classes, of which {len(val)} are held '
                       'out, are too few')
    for n, (label, _) in enumerate(val, 1):
        if label not in classes:
            raise BadInput(f'{val_file}, line {n}: label {label!r} is not one of the {len(classes)} in {data}')
    cut, encoded, everything = 0, [], train + val
    for i in range(0, len(everything), 1000):                    # the tokenizer's own objects are large
        labels, texts = zip(*everything[i:i + 1000])
        for label, ids in zip(labels, encode(list(texts))):
            if len(ids) > block_size:
                cut, ids = cut + 1, ids[:block_size - closing] + ids[len(ids) - closing:]
            encoded.append((np.array(ids, dtype=np.int32), classes.index(label)))
    say(f'data: {source}: {len(train):,} texts of {len(classes)} classes to train on, {len(val):,} held out'
        + (f'; {cut:,} longer than --block_size={block_size} tokens are cut' if cut else ''))
    about = dict(source=source, tokenizer=tokenizer, classes=classes, train_texts=len(train), val_texts=len(val),
                 cut=cut)
    return Corpus(encoded[:len(train)], encoded[len(train):], vocab_size, about, classes)


def get_batch(corpus, o, device, step, phase):
    """Batch number `step` of a phase: random crops or texts that depend on nothing but seed, phase and step."""
    rng = np.random.default_rng([o.seed, zlib.crc32(phase.encode()), step])
    if corpus.classes:                                           # one of 16 batches of texts of like lengths
        pool = by_length(corpus.train, rng.integers(0, len(corpus.train), 16 * o.batch_size))
        return pad_batch(corpus.train, pool.reshape(16, -1)[rng.integers(16)], device)
    at = rng.integers(0, len(corpus.train) - o.block_size, o.batch_size)
    return to_batch(corpus.train, at, o.block_size, corpus.vocab_size, device)


def held_out(corpus, o, device, n=None, size=None):
    """`n` held-out sequences (eval_batches x batch_size), evenly spread, in batches of `size`; texts by length."""
    n, size = n or o.eval_batches * o.batch_size, size or o.batch_size
    if corpus.classes:
        n = min(n, len(corpus.val))
        at = by_length(corpus.val, np.linspace(0, len(corpus.val) - 1, n).astype(int))
        return [pad_batch(corpus.val, a, device) for a in np.array_split(at, max(min(n, 2), math.ceil(n / size)))]
    n = min(n, max(1, (len(corpus.val) - 1) // o.block_size))
    at = np.linspace(0, len(corpus.val) - o.block_size - 1, n).astype(int)
    return [to_batch(corpus.val, a, o.block_size, corpus.vocab_size, device)
            for a in np.array_split(at, max(1, n // size))]


def by_length(texts, at):
    return at[np.argsort([len(texts[i][0]) for i in at], kind='stable')]


def pad_batch(texts, at, device):
    """(what model.encode takes, each (B, L)), the classes (B,)): the padding is never run."""
    ids, classes = zip(*(texts[i] for i in at))
    mask = torch.arange(max(map(len, ids))) < torch.tensor([len(i) for i in ids])[:, None]
    idx = torch.zeros(mask.shape, dtype=torch.long)
    idx[mask] = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    return dict(idx=idx.to(device), attention_mask=mask.to(device)), torch.tensor(classes, device=device)


def to_batch(tokens, at, length, vocab_size, device):
    """(what model.encode takes, the targets), each (B, L) int64."""
    crops = np.stack([tokens[i:i + length + 1] for i in at]).astype(np.int64)
    if crops.max() >= vocab_size:
        raise BadInput(f'--data: token {crops.max()} is beyond the {vocab_size} of --tokenizer')
    crops = torch.from_numpy(crops).to(device)
    return dict(idx=crops[:, :-1]), crops[:, 1:]


# ---------------------------------------------------------------------------------------------- phases

def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def task_loss(model, batch, tap=None):
    inputs, targets = batch
    return cross_entropy(model(**inputs, tap=tap), targets)


class Phase(NamedTuple):
    name: str
    source: Optional[str]             # the phase whose checkpoint it reads
    file: str
    steps: Optional[str]              # names of options
    lr: Optional[str]
    make: Optional[Callable]          # (model, options, say): the change made once, in place -> what to remember
    learn: Optional[Callable]         # (model, options, the input's checkpoint) -> parameters that learn,
                                      # loss_fn(batch, progress) -> loss, log; and perhaps report(batches) -> metrics
    depends: tuple                    # options that change its result


def learn_task(model, o, parent):
    return model.parameters(), lambda batch, progress: (task_loss(model, batch), {})


def make_sparsify(model, o, say):
    if o.sparsity_loss != 'gelu_clamp' and model.config.activation != 'relu':
        say(f'{model.config.activation} becomes relu')
        sparsify.relufy(model)


def learn_attn(model, o, parent):
    return sparsify.learn_projections(model, build(parent).to(model.wte.weight.device))


def learn_sparsify(model, o, parent):
    return sparsify.learn(model, task_loss, o.sparsity_loss, o.sparsity_weight, o.sparsity_ramp)


def router_phase(loss):
    return Phase('router', 'moefy', 'd2dmoe.pt' if loss == 'norm' else f'd2dmoe-{loss}.pt', 'router_steps', 'router_lr',
                 lambda model, o, say: model.add_routers(loss, o.router_width),
                 lambda model, o, parent: router.learn(model), (*LOOP, 'router_lr', 'router_steps', 'router_width'))


SAVE_EVERY = 60                     # seconds between checkpoints of a running phase
LOOP = ('seed', 'batch_size', 'grad_accum', 'weight_decay')
PHASES = [
    Phase('base', None, 'base.pt', 'base_steps', 'learning_rate', None, learn_task,
          (*LOOP, 'data', 'val', 'tokenizer', 'arch', 'init_from', 'n_layer', 'n_head', 'n_embd', 'block_size',
           'activation', 'dropout', 'learning_rate', 'base_steps')),
    Phase('dense', 'base', 'dense.pt', 'sparsify_steps', 'finetune_lr', None, learn_task,
          (*LOOP, 'finetune_lr', 'sparsify_steps')),
    Phase('attn', 'base', 'attn.pt', 'attn_steps', 'attn_lr',
          lambda model, o, say: sparsify.replace_projections(model, o.attn_projections), learn_attn,
          (*LOOP, 'attn_projections', 'attn_steps', 'attn_lr')),
    Phase('sparsify', 'base', 'sparse.pt', 'sparsify_steps', 'finetune_lr', make_sparsify, learn_sparsify,
          (*LOOP, 'finetune_lr', 'sparsify_steps', 'sparsity_loss', 'sparsity_weight', 'sparsity_ramp')),
    Phase('moefy', 'sparsify', 'moe.pt', None, None,
          lambda model, o, say: moefy.split_model(model, o.n_experts, o.expert_size, o.split, o.seed, say), None,
          ('seed', 'n_experts', 'expert_size', 'split')),
    *map(router_phase, router.LOSSES),
]
READ_ONLY = Phase('eval', None, '', None, None, None, None, ('batch_size', 'grad_accum', 'weight_decay'))


def wanted(name, o):
    """The rows of PHASES called `name`: the router's are one for each loss that was asked for."""
    rows = [p for p in PHASES if p.name == name and (name != 'attn' or o.attn_projections)]
    return [row for row, loss in zip(rows, router.LOSSES) if loss in losses(o)] if name == 'router' else rows


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def stale(path, source_path):
    """Was the checkpoint made from another input than the one that lies there now?"""
    return all(map(os.path.isfile, (path, source_path))) and read_phase(path)['parent'] != file_hash(source_path)


def settle(phase, o, typed, parent, own, names):
    """The options a phase runs with, and whether its finished checkpoint still stands.

    Untyped options come from the input's checkpoint, then from the phase's own. Typed ones that differ from
    the input's are an error, from the phase's own an error too unless --overwrite=1.
    """
    o = Options(**asdict(o))
    source_name, own_name = names
    for name, value in (parent or {}).get('options', {}).items():
        if name not in typed:
            setattr(o, name, value)
        elif name not in phase.depends and getattr(o, name) != value:
            raise BadInput(f'--{name}={getattr(o, name)}: {source_name} was made with {value}; leave the option out, '
                           f'or start again with --phase=all --overwrite=1 or another --out_dir')
    if own:
        for name in phase.depends:
            value = own['options'].get(name, getattr(Options, name))         # new since then: its default
            if name not in typed:
                setattr(o, name, value)
            elif getattr(o, name) != value:
                if not o.overwrite:
                    raise BadInput(f'--{name}={getattr(o, name)}: {own_name} was made with {value}; leave the option '
                                   f'out, run the phase again with --overwrite=1, or use another --out_dir')
                print(f'{phase.name}: --{name} changed from {value} to {getattr(o, name)}: running it again')
                own = None
                break
    check(o)
    return o, own


def run_phase(phase, o, typed, source_path, path, say=print):
    """Bring one phase to its end, from nothing or from where it was stopped. Returns what it wrote."""
    parent = parent_hash = None
    if phase.source:
        if not os.path.isfile(source_path):
            raise BadInput(f'--phase={phase.name} needs {source_path}: make it with python train.py '
                           f'--phase={phase.source}' + (f' --out_dir={o.out_dir}' if o.out_dir != 'out' else ''))
        parent = read_phase(source_path)
        if unfinished(parent):
            raise BadInput(f'{source_path} stopped at step {parent["step"]} of {parent["steps"]}: finish it with '
                           f'python train.py --phase={parent["phase"]}')
        if parent['phase'] != phase.source and (parent['phase'], phase.name) != ('attn', 'sparsify'):
            raise BadInput(f'{source_path} is a checkpoint of phase {parent["phase"]}, --phase={phase.name} needs one '
                           f'of {phase.source}')
        parent_hash = file_hash(source_path)
    own = read_phase(path) if os.path.exists(path) else None
    o, own = settle(phase, o, typed, parent, own, (source_path, path))
    if own and own.get('parent') != parent_hash:
        if not o.overwrite:
            raise BadInput(f'{path} was made from another {source_path}; --overwrite=1 makes it again')
        say(f'{phase.name}: {source_path} changed: running it again')
        own = None
    steps = getattr(o, phase.steps) if phase.steps else 0
    if own and not unfinished(own):
        if not (o.overwrite and o.phase == phase.name):
            say(f'{phase.name:8s}done ({path})')
            return own
        own = None
    make_folder(os.path.dirname(os.path.abspath(path)))
    torch.manual_seed(o.seed)
    device, corpus = pick_device(o), open_corpus(o, say) if phase.learn else None
    if own:
        model, notes = build(own, path), own['metrics']
        say(f'{phase.name:8s}going on at step {own["step"]} of {steps}')
    else:
        model = build(parent, source_path) if parent else new_model(o, corpus)
        notes = (phase.make and phase.make(model, o, say)) or {}
    model.to(device)
    options = {**(parent or {}).get('options', {}), **{k: getattr(o, k) for k in phase.depends}}
    record = dict(phase=phase.name, steps=steps, options=options, parent=parent_hash,
                  data=corpus.about if corpus else parent.get('data'), metrics=notes)
    if phase.learn:
        train(phase, model, o, corpus, device, record, path, parent, own, say)
    save(model, path, step=steps, optimizer=None, rng=torch.get_rng_state(), **record)
    return read_checkpoint(path)


def read_phase(path):
    """A checkpoint that a phase wrote; BadInput if it is none."""
    data = read_checkpoint(path)
    if not {'phase', 'step', 'steps', 'options', 'metrics'} <= data.keys():
        raise BadInput(f'{path}: no checkpoint of train.py (start from it with --init_from={path})')
    return data


def unfinished(checkpoint):
    return checkpoint['step'] < checkpoint['steps']


def new_model(o, corpus):
    if not o.init_from:
        bert = dict(causal=False, pre_ln=False, n_types=2, head='cls', n_classes=len(corpus.classes), pooler=True,
                    ln_eps=1e-12) if o.arch == 'bert' else {}
        return Transformer(Config(n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd, n_hidden=4 * o.n_embd,
                                  block_size=o.block_size, vocab_size=corpus.vocab_size, activation=o.activation,
                                  dropout=o.dropout, **bert))
    model = from_pretrained(o.init_from, n_classes=len(corpus.classes))
    c, have = model.config, f'--init_from={o.init_from} has'
    if c.causal != (o.arch == 'gpt') or c.n_classes != len(corpus.classes):
        raise BadInput(f'{have} {"a GPT" if c.causal else "a BERT"} with {c.n_classes} classes, --arch={o.arch} and '
                       f'--data={o.data} need {len(corpus.classes)}')
    if corpus.vocab_size > c.vocab_size or corpus.vocab_size < c.vocab_size and o.tokenizer != 'wordpiece':
        raise BadInput(f'{have} {c.vocab_size} tokens, --tokenizer={o.tokenizer} has {corpus.vocab_size}')
    if o.block_size > c.block_size:
        raise BadInput(f'{have} {c.block_size} positions, fewer than --block_size={o.block_size}; '
                       f'use --block_size={c.block_size}')
    # an MLP that was routed becomes dense again: this is the base of another conversion
    plain = {key: value for key, value in asdict(Config()).items() if key in ROUTING} | dict(dropout=o.dropout)
    state = {k: v for k, v in model.state_dict().items() if '.router.' not in k and not k.endswith('.owners')}
    for name in [k for k in state if k.endswith('.offsets')]:
        state[name] = torch.stack([state[name][0], state[name][-1]])
    return build(dict(config=asdict(c) | plain, model=state))


def pick_device(o):
    if o.device != 'auto':
        return o.device
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def train(phase, model, o, corpus, device, record, path, parent, own, say):
    """The loop: AdamW (decay on matrices only), cosine with warm-up, clipping, accumulation, checkpoints."""
    parameters, loss_fn, *reports = phase.learn(model, o, parent)
    parameters, steps, start = list(parameters), record['steps'], own['step'] if own else 0
    for p in parameters:
        p.requires_grad_(True)
    model.train(phase.name != 'router')                          # the routers learn on a frozen model
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    peak = getattr(o, phase.lr)
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=o.weight_decay),
                                   dict(params=others, weight_decay=0.0)], lr=peak, betas=(0.9, 0.95),
                                  fused=device in ('cpu', 'cuda'))
    if own:
        optimizer.load_state_dict(own['optimizer'])
        torch.set_rng_state(own['rng'])
    if o.compile:
        model.compile()
    cast = torch.autocast('cuda', torch.bfloat16, enabled=device == 'cuda')
    warmup = max(1, steps // 20)
    stopped, saved_step, began, tokens = [], start, time.time(), 0
    logged = saved = began
    handlers = {s: signal.signal(s, lambda *_: stopped.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(start, steps):
            rate = peak * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group['lr'] = rate
            for micro in range(o.grad_accum):
                batch = get_batch(corpus, o, device, step * o.grad_accum + micro, phase.name)
                tokens += bench.n_tokens(batch[0])
                with cast:
                    loss, log = loss_fn(batch, (step + 1) / steps)
                if torch.isfinite(loss):
                    (loss / o.grad_accum).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not torch.isfinite(loss + norm):                  # before it gets into the weights
                raise FloatingPointError(
                    f'{phase.name}: at step {step + 1} the loss is {loss.item()}, its gradient {norm.item()} long; '
                    + (f'{path} keeps step {saved_step}' if saved_step else f'{path} was not written')
                    + f'; a smaller --{phase.lr} than {peak} may help')
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = time.time()
            if now - logged > 5 or step + 1 in (steps, start + 2):
                logged, speed = now, (step + 1 - start) / (now - began)
                zeros = f'  zeros {log["zeros"]:.1%}' if 'zeros' in log else ''
                say(f'{phase.name:8s} step {step + 1}/{steps}  loss {log.get("task", loss).item():.4f}{zeros}  '
                    f'{tokens / (now - began):,.0f} tokens/s  {clock((steps - step - 1) / speed)} left', flush=True)
            if stopped or now - saved > SAVE_EVERY:
                save(model, path, step=step + 1, optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                     **record)
                saved, saved_step = now, step + 1
            if stopped and step + 1 < steps:
                raise KeyboardInterrupt(f'{phase.name} stopped at step {step + 1} of {steps}; '
                                        'the same command goes on from there')
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    model.eval().requires_grad_(False)
    for report in reports:
        record['metrics'] |= report(held_out(corpus, o, device), say)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}' if seconds >= 3600 else \
        f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


# ---------------------------------------------------------------------------------------------- evaluation

def evaluation(o, typed, say=print):
    """Load what the phases made, measure it (bench.sweep), print the table and write results.json."""
    path = functools.partial(os.path.join, o.out_dir)
    files = dict(dense='dense.pt', sparse='sparse.pt') | {
        loss: p.file for loss, p in zip(router.LOSSES, [p for p in PHASES if p.name == 'router'])}
    make_folder(o.out_dir)
    models = {}
    for name, file in files.items():
        if not os.path.isfile(path(file)):
            if name in router.LOSSES:                            # not every router need be trained
                continue
            raise BadInput(f'--phase=eval needs {path(file)}: make it with python train.py')
        data = read_phase(path(file))
        origin = ['attn.pt', 'base.pt'] if data['config']['projections'] else ['base.pt']
        chain = ['moe.pt', 'sparse.pt'] if name in router.LOSSES else ['base.pt'] if name == 'dense' else origin
        if any(stale(path(f), path(source)) for f, source in zip([file, *chain], chain)):
            if name in router.LOSSES and name not in losses(o):
                continue                                         # left over from another conversion
            raise BadInput(f'{path(file)} was made from another {chain[0]}: run python train.py --overwrite=1')
        if unfinished(data):
            raise BadInput(f'{path(file)} stopped at step {data["step"]} of {data["steps"]}: run python train.py')
        o = settle(READ_ONLY, o, typed, data, None, (path(file), ''))[0]
        models[name] = build(data, path(file)).to(pick_device(o))
    if not models.keys() & set(router.LOSSES):
        raise BadInput(f'--phase=eval needs {path("d2dmoe.pt")}: make it with python train.py --phase=router')
    corpus = open_corpus(o, say)
    batches = held_out(corpus, o, pick_device(o))
    n = max(1, 4096 // o.block_size)                             # timed at once; labelled texts are short
    timed = held_out(corpus, o, pick_device(o), *((128, 32) if corpus.classes else (n, n)))
    rows = bench.sweep(models, batches, [inputs for inputs, _ in timed], cross_entropy, o.rule, o.tau, o.floor, say)
    for row in rows:
        row |= dict(split=o.split, seed=o.seed)
    results = dict(config=asdict(o), data=corpus.about, machine=bench.machine(), rows=rows,
                   activity=bench.activity(models['sparse'], batches).tolist())
    bench.report(models, results, timed[0][0], o.out_dir, say)
    return results


# ---------------------------------------------------------------------------------------------- command line

def sample(o, typed, say=print):
    """Print a continuation of --prompt from the newest checkpoint."""
    files = [p.file for p in PHASES if os.path.isfile(os.path.join(o.out_dir, p.file))]
    if not files:
        raise BadInput(f'--phase=sample finds no checkpoint in --out_dir={o.out_dir}: run python train.py first')
    path = os.path.join(o.out_dir, 'd2dmoe.pt' if 'd2dmoe.pt' in files else files[-1])
    data = read_checkpoint(path)
    o, _ = settle(READ_ONLY, o, typed, data, None, (path, ''))
    model = build(data, path).to(pick_device(o))
    if not model.config.causal:
        raise BadInput(f'--phase=sample: {path} is a BERT, which labels texts and writes none')
    if model.config.router_loss:
        rule = o.rule or router.USUAL_RULE[model.config.router_loss]
        model.set_rule(rule, 0.1 if o.tau is None else o.tau, floor=o.floor)
        say(f'{path}: rule {rule}, tau {model.config.tau:g}')
    elif o.tau is not None:
        raise BadInput(f'--tau={o.tau}: {path} has no routers yet; leave it out or run --phase=router first')
    enc = tokenizer(o.tokenizer)
    tokens = enc.encode_ordinary(o.prompt) or enc.encode_ordinary('\n')
    generator = torch.Generator(pick_device(o)).manual_seed(o.seed)
    idx = model.generate(torch.tensor([tokens], device=pick_device(o)), o.n_tokens, o.temperature, o.top_k, generator)
    say(enc.decode(idx[0].tolist()))


def run(o, typed, say=print):
    file = {p.name: p.file for p in PHASES if p.name != 'router'}
    if o.phase == 'sample':
        return sample(o, typed, say)
    distilled = os.path.join(o.out_dir, file['attn'])
    if 'attn_projections' not in typed and os.path.isfile(distilled):
        o.attn_projections = read_checkpoint(distilled)['options']['attn_projections']
    if o.phase == 'attn' and not o.attn_projections:
        raise BadInput('--phase=attn needs --attn_projections: some or all of the letters qkvo')
    names = dict.fromkeys(p.name for p in PHASES) if o.phase == 'all' else [o.phase] if o.phase != 'eval' else []
    for phase in [p for name in names for p in wanted(name, o)]:
        if phase.name == 'sparsify' and o.attn_projections:
            phase = phase._replace(source='attn')
        source = phase.source and os.path.join(o.out_dir, file[phase.source])
        run_phase(phase, o, typed, source, os.path.join(o.out_dir, phase.file), say)
    if o.phase in ('all', 'eval'):
        return evaluation(o, typed, say)


def convert(name, argv):
    """`python moefy.py IN OUT --key=value`: one phase from file to file."""
    if len(argv) < 2 or argv[0].startswith('-') or argv[1].startswith('-'):
        sys.exit(f'usage: python {os.path.basename(sys.argv[0])} IN.pt OUT.pt [--key=value ...]')

    def job():
        o, typed = parse([*argv[2:], f'--phase={name}', f'--out_dir={os.path.dirname(argv[1]) or "."}'])
        run_phase(wanted(name, o)[0], o, typed, argv[0], argv[1])
    guarded(job)


def guarded(job):
    """Run it; whatever the user can mend ends in one sentence and a non-zero exit, not in a traceback."""
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
        guarded(lambda: run(*parse(sys.argv[1:])))
