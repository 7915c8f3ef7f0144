"""Measure: what a conversion costs in loss and saves in time, against the fastest dense model.

    python bench.py                             one MLP of GPT-2's size, routed against dense
    python bench.py --suite=decode              a whole GPT-2; also model, peers, engines
    python bench.py --suite=engines --checkpoint=out/adapted.pt   what people deploy
    python bench.py --suite=methods             every rival on the same base, control and steps
    python bench.py out/d2dmoe.pt other.pt      loss, FLOPs and time of any checkpoints

Every speedup is a ratio of median times taken in turn within one run, against the fastest dense MLP
or the dense model.

    T tokens · D n_embd · H hidden neurons · E experts · s neurons in an expert · rho share run
"""

if __name__ == '__main__':                  # Ctrl-C while torch is being imported ends quietly
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import kernel
from model import (MLP, BadInput, Config, Masks, Transformer, build, check_writable,
                   checkpoint_hash, cross_entropy, export_plain, load, n_tokens, pad,
                   read_checkpoint, reason, save, transformers, write_atomically)
from router import CONFIDENCE, FLOOR, GRID, ROUTERS, Router, ceilings, select
from sparsify import statistics as sparsity_statistics

# -------------------------------------------------------------------------------------- measuring

def machine():
    """What the figures were measured on."""
    facts = kernel.cpu_name()
    name = re.search(r'model name\s*: (.*)', facts)
    units = [x for x in ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16') if f' {x}' in facts]
    return dict(gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                cpu=' '.join([name[1] if name else platform.machine(), *units]),
                threads=torch.get_num_threads(), torch=torch.__version__,
                triton=getattr(kernel.triton, '__version__', None))

def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'

def timed(*calls):
    """(what the last call returns, seconds of all)."""
    start = time.perf_counter()
    for call in calls:
        out = call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return out, time.perf_counter() - start

def in_turn(jobs, rounds, warmup=1, n=1):
    """{name: [calls]} -> {name: median seconds of a call}. The jobs run in turn, so that a slow
    moment hits all; each makes its next n calls at a time, and begins again after the last."""
    turns = {name: itertools.cycle(calls) for name, calls in jobs.items()}
    times = {name: [] for name in jobs}
    for i in range(warmup + rounds):
        for name, turn in turns.items():
            seconds = timed(*itertools.islice(turn, n))[1]
            if i >= warmup:
                times[name].append(seconds / n)
    return {name: statistics.median(t) for name, t in times.items()}

def replayed(calls):
    """On a GPU [one call] that does all `calls` as a CUDA graph, or the host's launches would be
    what is timed; elsewhere `calls`."""
    if not torch.cuda.is_available():
        return calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # what compiles does so before the capture
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [partial(lambda graph, inputs: graph.replay(), graph, calls)]     # which must live on

@functools.cache
def peak(device, dtype):
    """FLOPs a second of a large matrix product."""
    # a generator of its own: runs that go on have to draw the same numbers
    a = torch.randn(2 * (8192 if device == 'cuda' else 1024,), device=device,
                    generator=torch.Generator(device)).to(dtype)
    return 2 * len(a) ** 3 / min(timed(lambda: a @ a)[1] for _ in range(10))

def profiler(wanted, folder, name):
    """A context whose step() counts. Of steps 4 to 8, if it gets there: a table of what took how
    long, the share that torch's own operations took, and a trace for Perfetto in the folder."""
    def show(found):
        events = found.key_averages()
        print(events.table(sort_by='self_cpu_time_total', row_limit=15, max_name_column_width=40))
        steps = next(e for e in events if e.key.startswith('ProfilerStep'))
        python = steps.self_cpu_time_total / steps.cpu_time_total
        path = os.path.join(folder, f'{name}-trace.json')
        found.export_chrome_trace(path)
        print(f'{name:8s} {1 - python:.1%} of the time in torch\'s operations; {path} has each')
    steps = torch.profiler.schedule(wait=2, warmup=1, active=5, repeat=1)
    if wanted and not kernel.ranks()[0]:
        return torch.profiler.profile(schedule=steps,
                                      on_trace_ready=lambda p: p.step_num > 3 and show(p))
    return contextlib.nullcontext(SimpleNamespace(step=lambda: None))

class Entry(NamedTuple):
    """A checkpoint that is to be measured."""
    path: str
    hash: str
    data: dict
    kind: str                               # of its routers; '' = none

def entries(found, paths=()):
    """The checkpoints to measure, dense and, if it is there, sparse first. Of a folder's {path:
    checkpoint}: every finished one with routers unless it was adapted, and what nothing else was
    made from; or those in `paths`, each by what it says of itself. BadInput if there is no dense
    one to compare with."""
    def entry(path, data):
        return Entry(path, checkpoint_hash(path), data, data['config']['router_loss'])

    # a phase comes after what it reads
    standing, here = [], {None}
    for path, data in found.items():
        alone = paths and data['phase'] == 'dense' and data['parent'] not in here
        if (alone or data['parent'] in here) and data['step'] >= data['steps']:
            if alone:
                print(f'note: what {path} was made from is not here; is it the right one?')
            standing.append(entry(path, data))
            here.add(standing[-1].hash)
        elif not paths:
            print(f'{path} is not measured: unfinished, or made from a checkpoint that is no '
                  'longer here; python train.py --overwrite=1 makes it again')
    # what somebody else made says less of itself
    unsaid, chosen = dict(parent=None, options={}, data={}), []
    others = [entry(path, unsaid | dict(phase=os.path.basename(path)) | read_checkpoint(path))
              for path in paths]
    for phase in ('dense', 'sparsify'):
        chosen += [e for e in standing if e.data['phase'] == phase][:1]
        if not chosen:
            raise BadInput('there is no finished checkpoint of phase dense to compare with'
                           + (f' beside {paths[0]}' if paths else '')
                           + ': make it with python train.py --phase=dense, in the same --out_dir')
    for e in others:
        if e.data.get('step', 0) < e.data.get('steps', 0):
            raise BadInput(f'{e.path} stopped at step {e.data["step"]} of {e.data["steps"]}')
    if not paths:
        made_from = {data['parent'] for data in found.values()}
        adapted = {e.data['parent'] for e in standing if e.data['phase'] == 'adapt'}
        others = [e for e in standing if e.hash not in adapted
                  and (e.kind or e.hash not in made_from and not e.data['config']['n_experts'])]
    return chosen + [e for e in others if e.path not in {c.path for c in chosen}]

def jobs_of(entries, o):
    """[(entry, what)]: what to measure, the fields by which results.json knows a row. Routers with
    a rule of their own run with top-k, too: it is the control. Ceilings replace the first
    converted one's routers, by their own rule or the one asked for. Dense in fp32 comes first."""
    def job(e, kind=None, rule=None, tau=None, taus=None, budget=None):
        floor = o.floor if rule == 'dynk' else None
        return e, dict(checkpoint=e.hash, router_loss=kind, rule=rule, tau=tau, floor=floor,
                       dtype=o.dtype, taus=taus, budget=budget)

    jobs = [job(e) for e in entries if not e.kind]
    # with exits their routers do as the exits' phase told them to
    routed = [e for e in entries if e.kind and not e.data['config'].get('exits')]
    if o.dtype != 'fp32':
        jobs = [(entries[0], jobs[0][1] | dict(dtype='fp32')), *jobs]
    # of masks, which overlap, there is none; MoEfication's own beside its router
    known = [e for e in routed if ROUTERS[e.kind].ceiling and o.dtype == 'fp32']
    # rather of what was adapted
    known.sort(key=lambda e: e.data['phase'] != 'adapt')
    above = {'oracle': e for e in known[:1]}
    for e in known:
        above.setdefault(ROUTERS[e.kind].ceiling, e)
    for kind, e in [(e.kind, e) for e in routed] + [*above.items()]:
        usual = ROUTERS[kind].rule
        for rule in dict.fromkeys([usual, o.rule or (usual if kind in ceilings() else 'topk')]):
            grid = GRID[rule]
            if kind == 'masks':             # one of them, two, three, as many as it learned with
                K, own = e.data['config']['n_outputs'][0], e.data['options'].get('masks_chosen', 1)
                grid = [k / K for k in range(1, max(K // 2, own) + 1)]
            jobs += [job(e, kind, rule, tau) for tau in (grid if o.tau is None else [o.tau])]
    measured = [e for e in routed if e.data['config'].get('calibration')]
    # where none was, budget() says what to do
    for e in measured or routed if o.budget or o.max_loss else ():
        try:
            c = build(e.data, e.path).budget(o.budget or None, o.max_loss or None).config
        except BadInput as error:
            raise BadInput(f'{e.path}: {error}') from None
        jobs.append(job(e, e.kind, c.rule, c.tau, tuple(c.taus), o.budget or o.max_loss))
    return jobs + [job(e, e.kind or None, 'confidence', tau) for e in entries
                   if e.data['config'].get('exits') for tau in CONFIDENCE]

def quantised_jobs(entries, rows, names):
    """[(entry, what)] in int8 of dense and of what `picked` says of each router's own rule."""
    wanted = [rows[0]] + [
        r for (_, kind, rule), r in picked(rows).items()
        if rule == 'confidence' or kind not in ceilings() and rule == ROUTERS[kind].rule]
    return [(e, {name: r[name] for name in names} | dict(dtype='int8'))
            for r in wanted for e in entries if e.hash == r['checkpoint']]

def classification(predicted, labels):
    """Accuracy, and F1 averaged over the classes that occur: predicted and labels (n,)."""
    classes = torch.cat([predicted, labels]).unique()[:, None]
    said, true = predicted == classes, labels == classes         # (classes, n) each
    f1 = 2 * (said & true).sum(1) / (said.sum(1) + true.sum(1))
    return (predicted == labels).float().mean().item(), f1.mean().item()

def spared(model, inputs):
    """FLOPs per token that are counted and not run: routed, only those of the hidden units that
    are not zero meet the second matrix, in int8 the blocks of 8 that are not."""
    model(**inputs, tap=(tap := []))
    zeros, block = 0, 8 if model.dtype == 'int8' else 1
    for mlp, t in zip(model.mlps(), tap):
        if t['mask'] is not None:
            wide = kernel.neuron_mask(t['mask'], mlp.offsets, len(mlp.w_in))
            silent = (t['a'] == 0).unflatten(1, (-1, block)).all(2).repeat_interleave(block, 1)
            zeros += (wide & silent).sum().item()
    return 2 * model.config.n_embd * zeros / n_tokens(inputs)

def forward(model, inputs, only=False):
    """On the fast path -> logits, Masks."""
    return model(**inputs, tap=(masks := Masks()), only=only), masks

def extent(model, masks):
    """The share of neurons that each MLP ran, and the census of each block, (n_layer, 3)."""
    # all may have left before
    shares = [mlp.share(mask) for mlp, mask in itertools.zip_longest(model.mlps(), masks)]
    return shares, [*masks.alive, *[(0, 0, 0)] * (model.config.n_layer - len(masks.alive))]

def cost_of(model, batches, extents, only=False):
    """FLOPs of batches of which forward() had these extents, as model.flops() has them, at their
    mean length, padding left out; and the mean share of neurons of each MLP."""
    tokens, config = np.array([n_tokens(inputs) for inputs, _ in batches]), model.config
    shares, alive = map(np.array, zip(*extents))                 # (n, MLPs), (n, n_layer, 3)
    # of each block's tokens that are still there
    weights = alive[..., 0] if alive.any() else tokens[:, None].repeat(config.n_layer, 1)
    weights = weights.repeat(shares.shape[1] // config.n_layer, 1)
    rho = ((shares * weights).sum(0) / weights.sum(0).clip(1)).tolist()
    seq_len, alive = tokens.sum() / sum(len(targets) for _, targets in batches), alive.sum(0)
    return model.flops(seq_len, rho if config.rule and config.router_loss else None,
                       (alive / alive[0]).tolist() if alive.any() else None, only), rho

def seconds_of(model, dense, inputs, only=False):
    """Of a forward pass of each. Of texts the second: oneDNN prepares a product for each new shape,
    and where tokens leave every block has one."""
    jobs = dict(ours=[partial(forward, model, inputs, only)],
                theirs=[partial(forward, dense, inputs, only)])
    return in_turn(jobs, rounds=1, warmup=int(model.config.head == 'cls')).values()

def first_token(model, dense, batches):
    """Of a classifier as classify() runs it, with the last block's q, o and FFN for the token alone
    that is classified: FLOPs over those of a dense model that runs all, speedup over one that runs
    so, too."""
    extents, ratios = [], []
    for inputs, _ in batches:
        extents.append(extent(model, forward(model, inputs, only=True)[1]))
        ours, theirs = seconds_of(model, dense, inputs, True)
        ratios.append(theirs / ours)
    cost, _ = cost_of(model, batches, extents, only=True)
    whole, _ = cost_of(dense, batches, [extent(dense, Masks())] * len(batches))
    return dict(flops_first=cost['total'] / whole['total'],
                speedup_first=statistics.median(ratios))

@torch.inference_mode()
def row_of(model, dense, batches):
    """What the table says of a model on its fast path, timed in turn with dense. Every second batch
    is reported, the others are there to pick tau by (`loss_pick`, `accuracy_pick`)."""
    config, mlps = model.config, model.mlps()
    # a GPU sizes its grid by it
    for mlp, share in zip(mlps, extent(model, forward(model, batches[0][0])[1])[0]):
        if mlp.router is not None:
            mlp.router.rho = share

    def measure(i):
        (inputs, targets), seconds, each = batches[i], [], []
        logits, masks = forward(model, inputs)
        if i % max(1, len(batches) // 8) == 0:
            seconds = [(n_tokens(inputs), *seconds_of(model, dense, inputs))]
        # the experts of all MLPs together; where tokens leave there is no such share
        chosen = [mask for mask in masks if mask is not None]    # (T, E) each
        if chosen and not masks.alive:
            each = torch.cat(chosen, 1).float().mean(1).nan_to_num().tolist()
        return (cross_entropy(logits, targets).cpu(), extent(model, masks), seconds, each,
                logits.argmax(-1).cpu() if config.head == 'cls' else None)

    losses, extents, times, each, predicted = zip(*kernel.shared_out(measure, len(batches)))
    each = sum(each, [])
    pick, report = slice(None, None, 2), slice(1, None, 2) if len(batches) > 1 else slice(None)
    labels, reported = [targets.cpu() for _, targets in batches], batches[report]
    losses = torch.stack(losses)
    cost, rho = cost_of(model, reported, extents[report])
    whole, k = cost_of(dense, reported, [extent(dense, Masks())] * len(reported))[0]['total'], None
    if config.rule == 'topk':
        k = max(1, round(config.tau * model.ffns()[0].router.n_outputs))
    counts, ours, theirs = zip(*sum(times, []))
    sizes = [len(mlp.w_in) for mlp in mlps]                      # masks may leave none
    row = dict(
        k=k, madds=(cost['total'] - spared(model, batches[len(batches) // 2][0])) / whole,
        weight_bytes=None if model.dtype == 'int8' else sum(
            p.numel() * p.element_size() for p in model.state_dict().values()),
        experts=float(np.dot(rho, sizes) / max(1, sum(sizes))),
        flops=cost['total'] / whole, router_flops=cost['router'] / whole,
        parts={name: flops / whole for name, flops in cost.items() if name != 'total'},
        loss=losses[report].mean().item(), loss_pick=losses[pick].mean().item(), metric='loss',
        accuracy=None, macro_f1=None, experts_per_layer=rho,
        tokens=sum(n_tokens(inputs) for inputs, _ in reported),
        experts_per_token=np.histogram(each, 20, (0, 1))[0].tolist() if each else None,
        machine=machine()['cpu'], ms_per_1k_tokens=1e6 * sum(ours) / sum(counts),
        speedup=statistics.median(b / a for a, b in zip(ours, theirs)))
    if config.head == 'cls':
        (accuracy, f1), (half, _) = (classification(torch.cat(predicted[p]), torch.cat(labels[p]))
                                     for p in (report, pick))
        row |= dict(metric='accuracy', accuracy=accuracy, macro_f1=f1, accuracy_pick=half,
                    **first_token(model, dense, reported[::max(1, len(reported) // 8)]))
    return row

def read_results(folder):
    """results.json of a folder; {} if there is none that can be read."""
    try:
        with open(os.path.join(folder, 'results.json'), encoding='utf-8') as f:
            old = json.load(f)
        whole = old['config']['eval_batches'] > 0 and {'settings', 'activity'} <= old.keys()
        # rows say the same things, but for what earlier ones did not
        alike = {'file', 'checkpoint', 'loss', *old['rows'][0]} - {'dtype', 'budget'}
        return old if whole and all(alike <= r.keys() for r in old['rows']) else {}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return {}

def set_aside(folder, settings):
    """read_results, unless they were measured with other settings: then kept beside the new."""
    path, old = os.path.join(folder, 'results.json'), read_results(folder)
    kernel.wait_for_all()                   # all ranks have read it
    if not old or old['settings'] == settings:
        return old
    if not kernel.ranks()[0]:
        os.replace(path, path.replace('.json', f'-{int(time.time())}.json'))
    return {}

def write_json(path, content):
    write_atomically(path, lambda t: Path(t).write_text(json.dumps(content, indent=1)))

def known_rows(old, entries, names, folder):
    """{the fields in `names`: row} of the rows whose checkpoint is still here, or has moved."""
    here, files = {}, {r['file'] for r in old}
    # with the folder, too
    for file in (*files, *(os.path.join(folder, os.path.basename(file)) for file in files)):
        with contextlib.suppress(BadInput):
            here[checkpoint_hash(file)] = file
    here |= {e.hash: e.path for e in entries}
    # earlier files do not say these
    old = [dict(dtype='fp32', budget=None) | r | dict(taus=r.get('taus') and tuple(r['taus']))
           for r in old]
    return {tuple(r[name] for name in names): r | dict(file=here[r['checkpoint']])
            for r in old if r['checkpoint'] in here}

def model_for(e, what, loaded, device):
    """A checkpoint's model under a rule; `loaded` keeps the last one for the rows that follow."""
    key, kind = (e.hash, what['router_loss'], what['dtype']), what['router_loss']
    if key not in loaded:
        print(f'eval     {e.path}  {kind or ""}  {what["dtype"]}', flush=True)
        loaded.clear()
        model = build(e.data, e.path).to(device)
        if kind in ceilings():
            model.add_routers(kind, 0)
        loaded[key] = model.quantize(what['dtype'])
    tau = what['taus'] or what['tau'] or 0.0
    return loaded[key].set_rule(what['rule'] or '', tau, what['floor'] or 0.0)

# what rows call a phase, if not by its name
ROW_OF = dict(sparsify='sparse', router='d2dmoe')

def evaluate(entries, batches, o, settings, folder, device):
    """Measure what results.json does not know yet (by checkpoint, rule, tau and floor), print the
    table, draw it. Ctrl-C keeps what is done."""
    path, jobs = os.path.join(folder, 'results.json'), jobs_of(entries, o)
    settings = settings | dict(dense=entries[0].hash)
    old = set_aside(folder, settings)
    found = known_rows(old.get('rows', ()), entries, jobs[0][1], folder)
    about = {k: v for k, v in entries[0].data['data'].items() if k != 'tokenizer_json'}
    sparse = next((e for e in entries if e.data['phase'] == 'sparsify'), None)
    known = sparse and sparse.hash == old.get('sparse')
    results = dict(config=vars(o), data=about, machine=machine(), settings=settings, rows=[],
                   sparse=sparse and sparse.hash, activity=old['activity'] if known else None)
    dense, loaded = build(entries[0].data, entries[0].path).to(device), {}

    def measure(e, what):
        key = tuple(what.values())
        if key not in found:
            row = row_of(model_for(e, what, loaded, device), dense, batches)
            phase, options = e.data['phase'], e.data['options']
            if what['router_loss'] in ceilings():                # cost nothing, cannot be timed
                row |= dict(ms_per_1k_tokens=None, speedup=None)
            if phase == 'dense' and what['dtype'] == 'fp32':     # dense against itself
                row['speedup'] = 1.0
            found[key] = dict(method=ROW_OF.get(phase, phase), **what, **row, file=e.path,
                              seed=options.get('seed'), split=options.get('split'))

    mine, rank = {e.hash for e in entries}, {}
    for e, what in jobs:
        rank.setdefault((e.hash, what['router_loss']), len(rank))

    def rows_so_far():
        rows = sorted(found.values(), key=lambda r: (
            r['dtype'] != 'fp32', rank.get((r['checkpoint'], r['router_loss']), len(rank)),
            r['rule'] or '', r['tau'] or 0))
        for row in rows:
            row['delta'] = row['loss'] / rows[0]['loss'] - 1
        return rows

    def rows_in(*dtypes):
        return [r for i, r in enumerate(rows_so_far())
                if i == 0 or r['checkpoint'] in mine and r['floor'] in (None, o.floor)
                and r['dtype'] in dtypes]
    if sparse and not known:
        tap = []                            # texts come by length: one of the middle
        build(sparse.data, sparse.path).to(device).encode(**batches[len(batches) // 2][0], tap=tap)
        results['activity'] = sparsity_statistics(tap)
    try:
        for job in jobs:
            measure(*job)
        # what is deployed; on a GPU only the weights would be int8
        for job in quantised_jobs(entries, rows_in('fp32'), jobs[0][1]) if device == 'cpu' else ():
            measure(*job)
    finally:
        results['rows'] = rows_so_far()
        write_json(path, results)
    if not kernel.ranks()[0]:
        table = rows_in('fp32', o.dtype, 'int8')
        print_results(table, rows_in(o.dtype), results['activity'], folder)
    return results

# -------------------------------------------------------------------------------------- tables

# title, key of a row, width, format
COLUMNS = [('experts', 'experts', 9, '.1%'), ('FLOPs', 'flops', 8, '.1%'),
           ('executed', 'madds', 10, '.1%'), ('loss', 'loss', 9, '.4f'),
           ('vs dense', 'delta', 10, '+.2%'), ('ms/1k tok', 'ms_per_1k_tokens', 11, '.2f'),
           ('speedup', 'speedup', 9, '.2f'), ('accuracy', 'accuracy', 10, '.2%'),
           ('macro-F1', 'macro_f1', 10, '.2%')]

def print_table(rows, columns=COLUMNS):
    """A line for each row; columns without a figure are left out, means have half their spread."""
    columns = [c for c in columns if any(r[c[1]] is not None for r in rows)]
    names = [label(r, rows) for r in rows]
    wide = max(8, 1 + max(map(len, names)))
    print(f'{"method":{wide}s}{"router":>8s}{"tau":>10s}{"dtype":>6s}'
          + ''.join(f'{title:>{width}}' for title, _, width, _ in columns))
    for name, r in zip(names, rows):
        line = f'{name:{wide}s}{r["router_loss"] or "-":>8s}{setting(r):>10s}{r["dtype"]:>6s}'
        for _, name, width, form in columns:
            text = '-' if r[name] is None else f'{r[name]:{form}}'
            if r.get(f'{name}_half') is not None:
                text += f' ± {r[f"{name}_half"]:{form.lstrip("+")}}'
            line += f'{text:>{width}}'
        print(line)

def setting(r):
    """What a row's tau column says."""
    if r['rule'] is None:
        return '-'
    if r.get('taus'):
        return 'per MLP'
    if r['rule'] == 'topk':
        return f'top-{r["k"]}'
    usual = r['rule'] == 'confidence' or ROUTERS[r['router_loss']].rule == r['rule']
    return f'{r["tau"]:g}' if usual else f'{r["rule"][:5]} {r["tau"]:g}'

def print_results(rows, curve_rows, activity, folder):
    """The table, what follows from the rows of one precision, and their picture."""
    print()
    print_table(rows)
    print('executed: multiply-adds less those with known zeros; oracle: the true norms as a '
          'router, which none has; speedup: the median of times taken in turn with dense')
    if activity:
        print('\nzeros among the hidden activations of the sparse model, MLP by MLP: '
              + ' '.join(f'{zeros:.0%}' for zeros, *_ in activity))
    choice, routed = picked(curve_rows), curves(curve_rows)
    print(f'\ncheapest whose {rows[0]["metric"]} is within 1 % of dense, picked on one half of the '
          'held-out set, reported on the other:')
    if choice:
        print_table(choice.values())
    else:
        print('none')
    print_parts(curve_rows, activity)
    print()
    for (path, name, rule), curve in routed.items():
        control = routed.get((path, name, 'topk'), ())
        gap = flops_gap(curve, control) if rule != 'topk' and len(control) > 1 else []
        if gap:
            print(f'{label(curve[0], curve_rows)} {name}: the loss by {rule} against that by top-k '
                  f'at as many FLOPs: {np.mean(gap):+.2%} on average, {max(gap):+.2%} at worst '
                  f'({len(gap)} values of tau)')
    names = 'checkpoint', 'router_loss', 'rule', 'tau', 'taus'
    for r in rows:
        for same in (f for f in rows if r['dtype'] != 'fp32' == f['dtype']
                     and all(f[name] == r[name] for name in names)):
            name = ' '.join(filter(None, [r['method'], r['router_loss'], setting(r).strip('-')]))
            print(f'{r["dtype"]} costs {name} {worse(r, [same]):+.2%} of its {r["metric"]}')
    print(f'{os.path.join(folder, "results.json")} has every row'
          + plot_rows(curve_rows, os.path.join(folder, 'results.png')))
    faster = [r for r in choice.values() if r['speedup'] and r['speedup'] > 1]
    best = max(faster, key=lambda r: r['speedup'], default=None)
    if choice and not best:
        print('none of these is faster than the dense model here')
    if best:
        loaded = repr(best['file']) + f', dtype={best["dtype"]!r}' * (best['dtype'] != 'fp32')
        print(f'\nat most 1 % worse on the half that picks ({rows[0]["metric"]} '
              f'{change(best, rows):+.2%} on the other): {best["rule"]} {setting(best)}, '
              f'{best["flops"]:.0%} of the FLOPs, {best["speedup"]:.2f} x as fast; to use it: '
              f'load({loaded}).set_rule({best["rule"]!r}, {best["taus"] or best["tau"]})')

def print_parts(rows, activity):
    """Where the FLOPs that are left lie, at +0.5 % of loss or -1 % of accuracy; how many times the
    neurons of the true norms (oracle) a router of the same experts runs, and the oracle those that
    are not zero."""
    most = 0.005 if rows[0]['metric'] == 'loss' else 0.01
    choice = [r for r in picked(rows, most).values() if r.get('parts')]
    if choice:
        print(f'\nFLOPs by part where {rows[0]["metric"]} is within {most:.1%}, picked likewise:')
    for r in choice:
        print(f'{label(r, rows)} {r["router_loss"] or ""} {setting(r)}: {r["flops"]:.1%} = '
              + ', '.join(f'{name} {share:.1%}' for name, share in r['parts'].items()))
    ideal = next((r for r in choice if r['router_loss'] == 'oracle' and r['experts']), None)
    alive = 1 - statistics.mean(zeros for zeros, *_ in activity or [(1,)])
    if ideal:
        said = f'neurons run: oracle {ideal["experts"]:.1%}'
        # what is adapted has other zeros than sparse.pt
        if alive and ideal['method'] == 'd2dmoe':
            said += f', {ideal["experts"] / alive:.2f} x as many as are not zero'
        print(said + ''.join(
                  f'; {r["router_loss"]} {r["experts"] / ideal["experts"]:.2f} x the oracle\'s'
                  for r in choice if r['router_loss'] not in ceilings()
                  and (r['method'], r['rule']) == (ideal['method'],
                                                   ROUTERS[r['router_loss']].rule)))

def grouped(rows, *names):
    """{the values of these fields: its rows}."""
    out = {}
    for r in rows:
        out.setdefault(tuple(r[name] for name in names), []).append(r)
    return out

def curves(rows):
    return grouped((r for r in rows if r['rule']), 'file', 'router_loss', 'rule')

def label(r, rows):
    """How a table names a row's model: by its method, or its file where that is not enough."""
    files = {x['file'] for x in rows if x['method'] == r['method']
             and x['router_loss'] == r['router_loss'] and 'file' in x}
    return Path(r['file']).stem if len(files) > 1 else r['method']

def picked(rows, most=0.01):
    """{(file, router, rule): its cheapest row at most so much worse than dense by the half that is
    not reported}: of the loss, or of the accuracy where texts are labelled."""
    return {key: min(curve, key=lambda r: r['flops'])
            for key, curve in curves([r for r in rows if fits(r, rows, most)]).items()}

def fits(r, rows, most=0.01):
    return worse(r, rows, '_pick') <= most + 1e-9

def change(r, rows, half=''):
    """Of the metric, as a share of dense's; half='_pick': on the half that is not reported."""
    name = r['metric'] + half
    # an accuracy may be 0: then whatever is right is gained
    return (r[name] - rows[0][name]) / (rows[0][name] or 1)

def worse(r, rows, half=''):
    return change(r, rows, half) * (-1 if r['metric'] == 'accuracy' else 1)

def flops_gap(curve, other):
    """Relative loss of a curve's points against another curve, interpolated to equal FLOPs."""
    x, y = zip(*sorted((r['flops'], r['loss']) for r in other))
    return [r['loss'] / np.interp(r['flops'], x, y) - 1
            for r in curve if x[0] <= r['flops'] <= x[-1]]

def print_seeds(results, path):
    """One table of several seeds' rows: mean and half of the spread of each figure."""
    same = ('method', 'router_loss', 'rule', 'tau', 'floor', 'k', 'dtype', 'taus', 'budget')
    columns = [(title, name, 16, form) for title, name, _, form in COLUMNS
               if name in ('experts', 'flops', 'delta', 'speedup', 'accuracy')]
    # a budget is one for all, its taus are a seed's own
    rows, each = [], [r | (dict(tau=None, k=None, taus=True) if r['taus'] else {})
                      for result in results for r in result['rows']]
    for group in grouped(each, *same).values():
        row = {name: group[0][name] for name in same} | dict(seeds=len(group))
        for _, name, _, _ in columns:
            values = [r[name] for r in group if r[name] is not None]
            row[name] = statistics.mean(values) if values else None
            row[f'{name}_half'] = (max(values) - min(values)) / 2 if values else None
        rows.append(row)
    print(f'\n{len(results)} seeds: mean and half of the spread (largest - smallest)')
    # seeds that picked another tau have other rows in int8
    print_table([row for row in rows if row['seeds'] == len(results)], columns)
    seeds = [result['config']['seed'] for result in results]
    write_json(path, dict(machine=machine(), seeds=seeds, rows=rows))
    print(f'\n{path} has every row')

# -------------------------------------------------------------------------------------- pictures

def new_axes(columns=1, path=''):
    """An empty picture, or several beside one another. BadInput if matplotlib is not here."""
    with contextlib.suppress(OSError):      # never a stale one
        os.remove(path)
    try:
        import matplotlib.figure
    except ImportError:
        raise BadInput('pictures need matplotlib: pip install matplotlib') from None
    return matplotlib.figure.Figure(figsize=(7 * columns, 4.2)).subplots(1, columns)

def save_picture(axes, path, **about):
    axes.set(**about)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    write_atomically(path, lambda temporary: axes.figure.savefig(
        temporary, format='png', dpi=150, bbox_inches='tight'))

def plot_rows(rows, path):
    """What every MLP of the first two routers runs, by tau; how much tokens run; loss or accuracy
    against FLOPs, a line for each router and rule. Returns what to say."""
    try:
        *heats, spread, axes = new_axes(4, path)
    except BadInput as error:
        return f'; {error}'
    for other in (*heats, spread):
        other.set_axis_off()
    own = [c for c in curves(rows).values()
           if c[0]['router_loss'] and c[0]['rule'] not in ('topk', 'confidence')]
    for heat, curve in zip(heats, own):
        heat.set_axis_on()
        shares = np.array([r['experts_per_layer'] for r in curve])           # (tau, MLP)
        heat.imshow(shares, cmap='Greys', vmin=0, vmax=1, aspect='auto')
        for (i, j), share in np.ndenumerate(shares):
            heat.text(j, i, f'{share:.0%}', ha='center', va='center', fontsize=7,
                      color='white' if share > 0.5 else 'black')
        heat.set(xlabel=f'MLP: neurons run by {label(curve[0], rows)} {curve[0]["router_loss"]}',
                 ylabel=curve[0]['rule'], xticks=range(shares.shape[1]),
                 yticks=range(len(curve)), yticklabels=[setting(r) for r in curve])
    # of the last one
    last = [r for curve in own[:2][-1:] for r in curve if r.get('experts_per_token')]
    for i, r in enumerate(last):
        spread.set_axis_on()
        counts = np.array(r['experts_per_token'])
        spread.stairs(100 * counts / counts.sum(), np.linspace(0, 100, len(counts) + 1),
                      color=str(0.8 * i / len(last)), label=f'{r["rule"]} {setting(r)}')
        spread.set(xlabel='experts that a token runs, all MLPs (%)', ylabel='tokens (%)')
        spread.legend(frameon=False, fontsize=7)

    def percent(r):
        return 100 * change(r, rows)
    for (_, name, rule), curve in curves(rows).items():
        axes.plot([100 * r['flops'] for r in curve], [percent(r) for r in curve], marker='o', ms=3,
                  ls='--' if rule == 'topk' else '-',
                  label=f'{label(curve[0], rows)} {name or ""}, {rule}')
    axes.axhline(0, color='black', lw=0.8, label='dense')
    for r in (r for r in rows if r['method'] == 'sparse'):
        axes.axhline(percent(r), color='grey', lw=0.8, label='sparse, all experts on')
    # what is much worse would squeeze the rest onto zero
    far = 0.06 if any(r['rule'] and worse(r, rows) < 0.06 for r in rows) else math.inf
    near = [percent(r) for r in rows if worse(r, rows) < far] + [-0.5, 0.5]
    save_picture(axes, path, xlabel='FLOPs of the whole model, routers included (% of dense)',
                 ylabel=f'{rows[0]["metric"]} against dense (%)',
                 ylim=(min(near) - 0.2, max(near) + 0.2))
    return f'; {path} shows it'

def plot_layers(rows, path):
    """FLOPs and time against executed experts, dense as a line."""
    share, axes = new_axes(2)
    axes.axhline(1, color='black', lw=0.8, label='the fastest dense')
    axes.plot([0, 1], [0, 1], color='grey', lw=0.8, ls=':', label='proportional')
    rows = [r for r in rows if r['suite'] == 'layer' and r['dtype'] == 'float32']
    for (T, s), curve in sorted(grouped(rows, 'T', 'expert_size').items()):
        axes.plot([r['rho'] for r in curve], [1 / r['speedup'] for r in curve], marker='o', ms=3,
                  label=f'T {T}, experts of {s}')
    share.axhline(1, color='black', lw=0.8)
    for ls, (D, H, s) in zip(itertools.cycle(('-', '--', ':', '-.')), sorted({
            (r['D'], r['H'], r['expert_size']) for r in rows})):
        router = 128 * (D + H / s) / (2 * D * H)                 # of width 128
        share.plot([0, 1], [router, 1 + router], color='black', ls=ls, label=f'experts of {s}')
    share.legend(frameon=False, fontsize=8)
    share.set(xlabel='share of neurons run', ylabel='FLOPs, router included (1 = dense)')
    save_picture(axes, path, xlabel='share of neurons run', ylabel='time (1 = dense)')

def plot_load(words, shares, path):
    """A text; the darker a token stands, the more it ran: shares in 0..1. Returns what to say."""
    try:
        write_json(os.path.splitext(path)[0] + '.json', dict(words=words, shares=shares))
        axes = new_axes(1, path)
        check_writable(path)
    except BadInput as error:
        return f'; {error}'
    line, column = 0, 0
    for word, share in zip(words, shares):
        for letter in word:
            axes.fill([column, column + 1, column + 1, column], [line, line, line - 1, line - 1],
                      color=str(1 - 0.7 * share), lw=0)
            axes.text(column + 0.5, line - 0.5, letter.strip(), fontsize=7, family='monospace',
                      ha='center', va='center')
            column += 1
            if letter == '\n' or column == 80:
                line, column = line - 1, 0
    axes.set(xlim=(0, 80), ylim=(line - 1, 0), aspect=2)
    axes.set_axis_off()
    save_picture(axes, path)
    return f'; {path} shows it'

def plot_methods(rows, path):
    """Every main variant within 60 % of the FLOPs; quality against FLOPs and against measured time:
    the mean over seeds of each method's own rule, half of the spread as bars."""
    bars, *pictures = new_axes(3)
    own = [r for r in rows if r['dtype'] == 'fp32' and r['variant'] in MAIN.get(r['method'], ('',))]
    within = {' '.join(key).strip(): 100 * statistics.mean(reached[0.6])
              for key, reached in at_budgets(own).items() if 0.6 in reached}
    # the best on top
    names = sorted(within, key=within.get, reverse=rows[0]['metric'] == 'loss')
    bars.barh(names, np.clip([within[name] for name in names], -6, 6), color='grey')
    bars.tick_params(labelsize=8)
    bars.set(xlabel=f'{rows[0]["metric"]} against dense at 60 % of the FLOPs (%, cut at 6)')
    for i, (key, mine) in enumerate(grouped(own, 'method', 'variant').items()):
        points = grouped(mine, 'rule', 'tau')
        for axes, cost in zip(pictures, (lambda r: r['flops'], lambda r: 1 / r['speedup'])):
            line = sorted((100 * statistics.mean(map(cost, of)), [100 * r['delta'] for r in of])
                          for of in points.values()
                          if abs(statistics.mean(r['delta'] for r in of)) < 0.06)
            if line:
                x, y = zip(*line)
                axes.errorbar(x, [statistics.mean(v) for v in y], [np.ptp(v) / 2 for v in y],
                              marker='o*s^vDPX<>ph8d'[i % 14], ms=4, lw=1, capsize=2,
                              color=f'C{i % 10}' if i < 10 else str(0.2 + 0.1 * (i - 10)),
                              label=' '.join(key), ls='-' if key[0] == 'ours' else ':')
    for axes, what in zip(pictures, ('FLOPs', 'measured time')):
        axes.axhline(0, color='black', lw=0.6)
        axes.set(xlabel=f'{what} of the whole model (% of dense)',
                 ylabel=f'{rows[0]["metric"]} against dense (%)')
    save_picture(pictures[1], path)

# -------------------------------------------------------------------------------------- suites
#
# What is timed in turn is {name: [calls]}: a call for each of so many layers that no cache holds
# their weights.

class Shape(NamedTuple):
    """The layer that is measured, GPT-2's unless a test wants a smaller one."""
    D: int = 768
    H: int = 3072
    sizes: tuple = (24, 64, 128)            # of experts
    tokens: tuple = (4096, 256, 16, 1)      # the largest first: it tells the peak
    bytes: float = 200e6                    # of weights, so that no cache holds them
    n_layer: int = 12
    vocab_size: int = 50257
    prefill: tuple = (8, 512)
    bert: tuple = (6, 384, 1536, 30522)     # MiniLM's layers, D, H and vocabulary
    turn: float = 0.3                       # seconds that an engine runs before the next does

def make_layers(shape, dtype, device):
    """[Experts] of random MLPs with one expert each, so many that no cache holds them."""
    def mlp():
        m = MLP(shape.D, shape.H, 'relu').to(device).requires_grad_(False)
        if dtype == torch.int8:
            m.quantize()
            return m.experts
        return m.to(dtype).experts
    return [mlp() for _ in range(math.ceil(
        shape.bytes / (2 * shape.D * shape.H * dtype.itemsize)))]

def dense_mlp(x, w_in, b_in, w_out, b_out, linear=F.linear):
    return linear(F.relu(linear(x, w_in, b_in)), w_out, b_out)

def dense_jobs(layers, x):
    """Everything torch offers for a dense ReLU MLP that works here."""
    def packed(w_in, b_in, w_out, b_out):   # oneDNN's own layout, made for this T
        reorder = torch.ops.mkldnn._reorder_linear_weight
        return reorder(w_in, len(x)), b_in, reorder(w_out.contiguous(), len(x)), b_out

    def wide(*weights):                     # without bf16 units, fp32 copies may be faster
        return [w.float() for w in weights]

    if isinstance(layers[0].w_in, kernel.Int8):
        return {'every expert': [partial(kernel.experts, x, None, m) for m in layers]}
    onednn, jobs = partial(dense_mlp, linear=kernel.onednn), {}
    plain = [(m.w_in, m.b_in, m.w_out.t(), m.b_out) for m in layers]
    ways = {'F.linear': (dense_mlp, None), 'compiled': (torch.compile(dense_mlp), None),
            'onednn packed': (onednn, packed), 'onednn': (onednn, None)}
    if x.dtype != torch.float32 and not x.is_cuda:
        ways['fp32 copies'] = lambda x, *w: dense_mlp(x.float(), *w).to(x.dtype), wide
    for name, (f, prepare) in ways.items():
        with contextlib.suppress(Exception):        # not in this build, for this dtype or device
            calls = [partial(f, x, *(prepare(*w) if prepare else w)) for w in plain]
            calls[0]()
            jobs[name] = replayed(calls)
    return jobs

def routed(layers, x, masks, impl):
    """Each layer by its own mask, in experts of equal size."""
    H, E = len(layers[0].w_in), masks[0].shape[1]
    offsets = torch.arange(0, H + 1, H // E, dtype=torch.int32, device=x.device)
    return [partial(kernel.experts, x, mask, m._replace(offsets=offsets), impl,
                    mask.float().mean().item()) for m, mask in zip(layers, masks)]

def layer_suite(o, device, shape):
    """T x expert size x rho x dtype: one MLP, dense and routed in turn; then whether time is linear
    in the experts executed."""
    rows = []
    print('   T  size   rho  dtype     dense by             dense ms        ms  speedup '
          'with router  limit of limit')
    for dtype in (torch.float32, torch.bfloat16, *([torch.int8] if device == 'cpu' else ())):
        layers = make_layers(shape, dtype, device)
        # bytes a second that the device reads: the sum of a tensor that no cache holds
        big = torch.ones(128 << 20, device=device)
        roof = dict(peak=0, bandwidth=big.nbytes / in_turn(dict(sum=[big.sum]), rounds=5)['sum'])
        for T in shape.tokens:
            cases = [('layer', s, rho) for s in shape.sizes for rho in (0.1, 0.25, 0.5, 1.0)]
            if T == shape.tokens[0] and dtype == torch.float32:
                cases += [('linearity', shape.sizes[0], i / 20) for i in (1, *range(2, 21, 2))]
            x = torch.randn(T, shape.D, device=device)
            x = x if dtype == torch.int8 else x.to(dtype)
            rows += layer_rows(o, shape, layers, x, cases, roof, dtype)
        print(f'{str(dtype)[6:]}: peak {roof["peak"] / 1e9:.0f} GFLOP/s (the fastest dense), '
              f'{roof["bandwidth"] / 1e9:.0f} GB/s read\n', flush=True)
    for (dtype,), of in sorted(grouped(rows, 'dtype').items()):
        reached = [r['of_limit'] for r in of if r['rho'] <= 0.5]
        print(f'{dtype}, rho <= 0.5: median of_limit {statistics.median(reached):.2f}, '
              f'lowest {min(reached):.2f}')
    line = [r for r in rows if r['suite'] == 'linearity']
    rho, times = [r['rho'] for r in line], [1 / r['speedup'] for r in line]
    slope, start = np.polyfit(rho, times, 1)
    r2 = float(np.corrcoef(rho, times)[0, 1] ** 2)
    for r in line:
        r['r2'] = r2
    print(f'T {line[0]["T"]}, experts of {line[0]["expert_size"]}: time = {start:.3f} + '
          f'{slope:.3f} rho of dense, R^2 = {r2:.4f}')
    return rows

def layer_rows(o, shape, layers, x, cases, roof, dtype):
    """The rows of some tokens for cases (suite, s, rho), printed."""
    T, n, rows = len(x), max(1, min(len(layers), 768 // len(x))), []
    ways = dense_jobs(layers, x)
    # a GPU replays all layers at a time
    n, at_once = (1, len(layers)) if x.is_cuda else (n, 1)
    dense = {k: t / at_once for k, t in in_turn(ways, 4, 2, n).items()}
    best = min(dense, key=dense.get)
    jobs = {'dense': ways[best]}
    for suite, s, rho in cases:
        masks = [torch.rand(T, shape.H // s, device=x.device) < rho for _ in layers]
        jobs[suite, s, rho] = replayed(routed(layers, x, masks, o.impl))
    for s in shape.sizes:
        mlp = layers[0]._replace(offsets=torch.arange(0, shape.H + 1, s))
        router = Router('norm', mlp, None, 128).to(x.device, x.dtype)
        router.rule, router.tau = 'dynk', 0.5
        jobs[s] = replayed([partial(router, x)] * at_once)
    times = {k: t / at_once for k, t in in_turn(jobs, 7, 2, n).items()}
    base, flops = times['dense'], 4 * T * shape.D * shape.H
    dense[best], roof['peak'] = base, max(roof['peak'], flops / base)
    for suite, s, rho in cases:
        # the experts that any token wants, x and y
        wanted = shape.H * (1 - (1 - rho) ** T)
        moved = 2 * shape.D * (dtype.itemsize * wanted + x.itemsize * T)
        limit = base / max(flops * rho / roof['peak'], moved / roof['bandwidth'])
        seconds = times[suite, s, rho]
        row = dict(suite=suite, T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                   dtype=str(dtype)[6:], impl='cpp' if dtype == torch.int8 else o.impl or 'auto',
                   ms=1e3 * seconds, router_ms=1e3 * times[s],
                   dense_ms={k: 1e3 * t for k, t in dense.items()},
                   speedup=base / seconds, speedup_with_router=base / (seconds + times[s]),
                   limit=limit, of_limit=base / seconds / limit)
        rows.append(row)
        if suite == 'layer':
            print(f'{T:4d}{s:6d}{rho:6.2f}  {row["dtype"]:9s} {best:18s}{1e3 * base:10.3f}'
                  f'{row["ms"]:10.3f}{row["speedup"]:9.2f}{row["speedup_with_router"]:12.2f}'
                  f'{limit:9.2f}{row["of_limit"]:9.2f}', flush=True)
    return rows

def model_suite(o, device, shape):
    """A whole GPT-2, random weights, prefill or decode: dense against random routers whose top-k
    runs rho."""
    dense = Transformer(Config(
        n_layer=shape.n_layer, n_head=12, n_embd=shape.D, n_hidden=shape.H, block_size=1024,
        vocab_size=shape.vocab_size)).to(device).eval().requires_grad_(False)
    converted, s, rows = copy.deepcopy(dense), shape.sizes[0], []
    for mlp in converted.mlps():
        mlp.sort_neurons(torch.arange(shape.H, device=device), torch.arange(0, shape.H + 1, s))
    converted.add_routers('norm', 128)
    decode = o.suite == 'decode'
    idx = torch.randint(0, shape.vocab_size, (1, 16) if decode else shape.prefill, device=device)
    tokens, T = (32, 1) if decode else (idx.numel(), idx.numel())           # T of them at a time

    def whole(m):
        return m.generate(idx, tokens, temperature=0) if decode else m(idx)

    def step(m, cache):                     # the token after idx; again and again, as a graph is
        for layer in cache:
            layer.n = idx.shape[1]
        return m.logits(m.encode(idx[:, -1:], cache=cache))

    def job(m):
        if device == 'cpu' or not decode:
            return replayed([partial(whole, m)])
        cache = [kernel.LayerCache(1024) for _ in m.blocks]
        m.encode(idx, cache=cache)
        return replayed([partial(step, m, cache)] * tokens)

    kinds = [torch.float32] if device == 'cpu' else [torch.float32, torch.bfloat16]
    for dtype, rho in itertools.product(kinds, (0.1, 0.25, 0.5)):
        dense.to(dtype)
        converted.to(dtype).set_rule('topk', rho)
        for mlp in converted.mlps():
            mlp.router.rho = rho
        times = in_turn(dict(dense=job(dense), converted=job(converted)), rounds=3)
        speedup = times['dense'] / times['converted']
        ours, theirs = tokens / times['converted'], tokens / times['dense']
        rows.append(dict(suite=o.suite, T=T, rho=rho, expert_size=s, dtype=str(dtype)[6:],
                         tokens_per_s=ours, dense_tokens_per_s=theirs, speedup=speedup))
        print(f'{o.suite}  {str(dtype)[6:]:8s}  rho {rho:4.2f}  dense {theirs:8.1f} tokens/s  '
              f'converted {ours:8.1f}  speedup {speedup:.2f}', flush=True)
    return rows

def peers_suite(o, device, shape):
    """The layer by what one would pick instead; every token runs k = rho E, so that all can."""
    rows, layers = [], make_layers(shape, torch.float32, device)
    for T, s, rho in itertools.product((16, shape.tokens[0]), (shape.sizes[-1], shape.sizes[0]),
                                       (0.125, 0.25)):
        E, x = shape.H // s, torch.randn(T, shape.D, device=device)
        mask = select(torch.rand(T, E, device=device), 'topk', rho)
        masks = [mask] * len(layers)
        jobs = {'dense': [partial(kernel.experts, x, None, m) for m in layers],
                'd2dmoe': routed(layers, x, masks, o.impl),
                'loop': routed(layers, x, masks, 'torch')}
        # torch's own is not in every build
        try:
            by_torch = grouped_mm(layers, x, mask)
            if not torch.allclose(by_torch[0](), jobs['d2dmoe'][0](), atol=1e-3):
                raise AssertionError('grouped mm computes something else')
            jobs['grouped mm'] = by_torch
        except (AttributeError, RuntimeError) as error:
            print(f'grouped mm: not here ({reason(error)})')
        times = in_turn(jobs, rounds=4, n=max(1, min(len(layers), 768 // T)))
        rows += [dict(suite='peers', T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                      dtype='float32', impl=name, ms=1e3 * t, speedup=times['dense'] / t)
                 for name, t in times.items()]
        print(f'T {T:5d} size {s:4d} rho {rho:5.3f}   ' + '   '.join(
            f'{name} {times["dense"] / t:.2f}' for name, t in times.items()), flush=True)
    return rows

def grouped_mm(layers, x, mask):
    """The routed layer by torch's grouped matmul, the pairs of token and expert by expert."""
    T, E = mask.shape
    expert, rows = mask.T.nonzero(as_tuple=True)                 # (T k) each
    ends = mask.sum(0).cumsum(0).to(torch.int32)

    def layer(m):
        h = torch._grouped_mm(x[rows], m.w_in.view(E, -1, x.shape[1]).mT, offs=ends)
        h = F.relu(h + m.b_in.view(E, -1)[expert])
        pairs = torch._grouped_mm(h, m.w_out.view(E, -1, x.shape[1]), offs=ends)
        return m.b_out.repeat(T, 1).index_add_(0, rows, pairs)

    return [partial(layer, m) for m in layers]

# -------------------------------------------------------------------------------------- engines
#
# Whole programs: our models against what people deploy, at equal threads. Each engine has a
# process of its own that loads it and then waits for its turns.

NEW = 32                                    # tokens to decode

class Job(NamedTuple):
    """What a process runs."""
    engine: str
    variant: str                            # dense, converted, ...
    dtype: str
    only: tuple = (False,)                  # True: the last block for the head's token alone

class Plain(torch.nn.Module):
    """A model of transformers from what a graph takes to what it gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, keep):           # (B, L) each
        return self.model(idx, attention_mask=keep).logits

class Graph(Plain):
    """Our dense model as engines may trace it: texts with padding; the last block spends q, o and
    FFN on the token that the head reads; keys and values come in and go out."""

    def forward(self, idx, keep, *cache):   # (B, L), (B, past + L), 2 a layer (B, heads, past, d)
        m, c, new = self.model, self.model.config, []
        past = cache[0].shape[2] if cache else 0
        place = torch.arange(past, past + idx.shape[1])
        x = m.wte(idx) + m.wpe(place)
        x = x if m.ln_e is None else m.ln_e(x + m.wtt.weight[0])
        mask = keep.bool()[:, None, None]
        if c.causal:
            mask = mask & (torch.arange(keep.shape[1]) <= place[:, None])
        for i, block in enumerate(m.blocks):
            head = slice(-1, None) if c.causal else slice(0, 1)
            rows = head if i == c.n_layer - 1 else slice(None)
            h, a = block.ln_1(x) if c.pre_ln else x, block.attn
            q, k, v = (p(t).unflatten(-1, (c.n_head, -1)).transpose(1, 2)
                       for p, t in ((a.q, h[:, rows]), (a.k, h), (a.v, h)))  # (B, heads, L, d)
            if cache:
                k, v = torch.cat([cache[2 * i], k], 2), torch.cat([cache[2 * i + 1], v], 2)
                new += [k, v]
            y = F.scaled_dot_product_attention(q, k, v, mask[:, :, rows])
            x = x[:, rows] + a.o(y.transpose(1, 2).flatten(2))
            if c.pre_ln:
                x = x + block.mlp(block.ln_2(x))
            else:
                x = block.ln_1(x)
                x = block.ln_2(x + block.mlp(x))
        return m.logits((x if m.ln_f is None else m.ln_f(x))[:, 0]), *new

def hf_model(folder, causal):
    library = transformers()
    kind = library.AutoModelForCausalLM if causal else library.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, use_cache=False).eval().requires_grad_(False)

def feed(c, inputs, only, past=0):
    """{name: tensor} of what a graph takes; only a GPT's for the last token has a cache."""
    idx, past = inputs['idx'], past if only and c.causal else 0
    keep = inputs.get('attention_mask', torch.ones_like(idx)).long()
    names = [f'{kind}{i}' for i in range(c.n_layer) for kind in 'kv'] if only and c.causal else []
    return dict(idx=idx, keep=F.pad(keep, (past, 0), value=1)) | {
        name: torch.zeros(len(idx), c.n_head, past, c.n_embd // c.n_head) for name in names}

def export_graph(dense, plain, only, path):
    """The ONNX file of transformers' own model, or with `only` of Graph."""
    c = dense.config
    given = feed(c, dict(idx=torch.ones(2, 8, dtype=torch.long)), only, past=3)
    caches = [name for name in given if name not in ('idx', 'keep')]
    axes = dict(idx={0: 'B', 1: 'L'}, keep={0: 'B', 1: 'all' if caches else 'L'},
                logits={0: 'B', 1: 'L'} if c.causal and not only else {0: 'B'})
    for name in caches:
        axes |= {name: {0: 'B', 2: 'past'}, f'new_{name}': {0: 'B', 2: 'all'}}
    module = Graph(dense) if only else Plain(hf_model(plain, c.causal))
    torch.onnx.export(module, tuple(given.values()), path, input_names=list(given),
                      output_names=['logits', *(f'new_{name}' for name in caches)],
                      dynamic_axes=axes, opset_version=17, dynamo=False)

def file_of(job):
    """What its engine reads."""
    kind = 'xml' if (job.engine, job.dtype) == ('openvino', 'int8') else 'onnx'
    graph = f'{job.only[-1]:d}-{job.dtype.replace("bf16", "fp32")}.{kind}'
    return dict(ours=f'{job.variant}.pt', onnxruntime=graph, openvino=graph,
                ctranslate2=f'ctranslate2-{job.dtype}').get(job.engine, 'plain')

def prepare(job, dense, folder, texts):
    """Write what an engine reads, unless another already did."""
    path, graph, plain = (os.path.join(folder, name) for name in (
        file_of(job), file_of(job._replace(engine='onnxruntime', dtype='fp32')), 'plain'))
    if job.engine != 'ours' and not os.path.exists(plain):
        export_plain(dense, plain)
    if job.engine in ('onnxruntime', 'openvino') and not os.path.exists(graph):
        export_graph(dense, plain, job.only[-1], graph)
    if job.engine == 'onnxruntime' and job.dtype == 'int8':
        from onnxruntime.quantization import QuantType, quantize_dynamic
        quantize_dynamic(graph, path, weight_type=QuantType.QInt8)
    if job.engine == 'openvino' and job.dtype == 'int8':
        import nncf
        import openvino
        data = nncf.Dataset([{name: t.numpy() for name, t in feed(dense.config, x, job.only[-1])
                              .items()} for x in texts])
        quantized = nncf.quantize(openvino.Core().read_model(graph), data, subset_size=4,
                                  model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(quantized, path, compress_to_fp16=False)
    if job.engine == 'ctranslate2':
        prepare_ctranslate2(job, dense.config, plain, path)

def prepare_ctranslate2(job, c, plain, path):
    """Its converter knows BERT without a head, an old field of the config, and asks for words."""
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models
    model, source = hf_model(plain, c.causal), f'{path}-source'
    model = model if c.causal else model.base_model
    model.config.position_embedding_type = 'absolute'
    model.save_pretrained(source)
    words = models.WordLevel({str(i): i for i in range(c.vocab_size)}, unk_token='0')
    transformers().PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), **dict.fromkeys(
            ('unk_token', 'bos_token', 'eos_token'), '0')).save_pretrained(source)
    TransformersConverter(source).convert(path, quantization=job.dtype.replace('fp', 'float'))

# what loads an engine: -> forward(inputs, only) -> logits, decode(idx) or None, bytes of weights,
# and of ours share(inputs), of the neurons that run, of another's None

def load_ours(path, job, c):
    m = load(path, dtype=job.dtype)
    matrices = [value for module in m.modules() for value in vars(module).values()
                if isinstance(value, kernel.Int8)]
    tensors = [*m.parameters(), *m.buffers(),
               *(t for x in matrices for t in (x.w, x.scale, x.bias))]
    # parts of a matrix share its memory
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors if t is not None}

    def share(inputs):
        _, masks = forward(m, inputs)
        return statistics.mean(mlp.share(mask) for mlp, mask in zip(m.mlps(), masks))
    return (lambda x, only: m(**x, only=only), partial(m.generate, n=NEW, temperature=0),
            sum(storages.values()), share)

def load_transformers(path, job, c):
    m = hf_model(path, c.causal)
    plain, size = Plain(m), sum(p.nbytes for p in m.parameters())
    if 'compiled' in job.engine:
        m.forward = torch.compile(m.forward)

    def decode(idx):
        return m.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW,
                          min_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True)
    return lambda x, only: plain(x['idx'], x.get('attention_mask')), decode, size, None

def load_graph(path, job, c):
    """onnxruntime or openvino."""
    n, library = torch.get_num_threads(), importlib.import_module(job.engine)
    if job.engine == 'onnxruntime':
        settings = library.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = n, 1
        run = partial(library.InferenceSession(path, settings, ['CPUExecutionProvider']).run, None)
    else:
        hints = dict(INFERENCE_NUM_THREADS=n, PERFORMANCE_HINT='LATENCY',
                     INFERENCE_PRECISION_HINT='bf16' if job.dtype == 'bf16' else 'f32')
        request = library.Core().compile_model(path, 'CPU', hints).create_infer_request()

        def run(arrays):
            return list(request.infer(arrays).values())

    def forward(inputs, only):
        return torch.from_numpy(run({k: t.numpy() for k, t in feed(c, inputs, only).items()})[0])

    def decode(idx):
        arrays = {k: t.numpy() for k, t in feed(c, dict(idx=idx), True).items()}
        for _ in range(NEW):
            logits, *cache = run(arrays)
            keep = np.pad(arrays['keep'], ((0, 0), (0, 1)), constant_values=1)
            arrays = dict(zip(arrays, [logits.argmax(-1)[:, None], keep, *cache]))
    return (forward, decode if c.causal and job.only[-1] else None,
            os.path.getsize(path.replace('.xml', '.bin')), None)

def load_ctranslate2(path, job, c):
    import ctranslate2
    kind = ctranslate2.Generator if c.causal else ctranslate2.Encoder
    m = kind(path, compute_type=job.dtype.replace('fp', 'float'),
             intra_threads=torch.get_num_threads())
    head = read_checkpoint(os.path.join(os.path.dirname(path), 'dense.pt'))['model']

    def forward(inputs, only):
        idx = inputs['idx']
        keep = inputs.get('attention_mask', torch.ones_like(idx, dtype=torch.bool))
        out = m.forward_batch([row[k].tolist() for row, k in zip(idx, keep)])
        if c.causal:
            return torch.from_numpy(np.array(out))
        pooled = torch.from_numpy(np.array(out.pooler_output))
        return F.linear(pooled, head['classifier.weight'], head['classifier.bias'])

    def decode(idx):
        return m.generate_batch([[str(i) for i in row] for row in idx.tolist()], sampling_topk=1,
                                max_length=NEW, min_length=NEW, include_prompt_in_result=False)
    return forward, decode, os.path.getsize(os.path.join(path, 'model.bin')), None

# name: what loads it, dtypes, what `only` its processes run, what has to be installed
BOTH, GRAPH = ((False,), (True,)), 'transformers onnx onnxscript'
ENGINES = {
    'ours': (load_ours, ('fp32', 'bf16', 'int8'), ((False, True),), ''),
    'transformers': (load_transformers, ('fp32',), BOTH[:1], 'transformers'),
    'transformers compiled': (load_transformers, ('fp32',), BOTH[:1], 'transformers'),
    'onnxruntime': (load_graph, ('fp32', 'int8'), BOTH, f'{GRAPH} onnxruntime'),
    'openvino': (load_graph, ('fp32', 'bf16', 'int8'), BOTH, f'{GRAPH} openvino nncf'),
    'ctranslate2': (load_ctranslate2, ('fp32', 'int8'), BOTH[:1], 'transformers ctranslate2')}

def peak_memory():
    """Of this process, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])
    return 0

def engine_worker(pipe, folder, job, threads):
    """The process of an engine: says what it can do, then takes its turns."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(threads)
    warnings.simplefilter('ignore')
    tasks, held_out = torch.load(os.path.join(folder, 'texts.pt'))
    c = Config(**read_checkpoint(os.path.join(folder, 'dense.pt'))['config'])
    pipe.send(None)                         # imports are done
    pipe.recv()
    try:
        with torch.inference_mode():
            if job.engine != 'ours':
                importlib.import_module(job.engine.split()[0])
            # torch, which every process has for its tensors, and the engine's code do not count
            before, calls = peak_memory(), {}
            path = os.path.join(folder, file_of(job))
            forward, decode, size, share = ENGINES[job.engine][0](path, job, c)
            for only, (i, (task, _, texts)) in itertools.product(job.only, enumerate(tasks)):
                if task != 'decode':
                    calls[i, only] = [partial(forward, x, only) for x in texts]
                elif decode is not None and only == job.only[-1]:
                    calls[i, only] = [partial(decode, texts[0]['idx'])]
            for call in sum(calls.values(), []) * 2:
                call()
            quality = {only: quality_of(forward, only, held_out) for only in job.only
                       if held_out and not (c.causal and only)}
            pipe.send(dict(size=size, seconds={key: [] for key in calls}, quality=quality,
                           experts=[share and share(texts[0]) for _, _, texts in tasks]))
            while request := pipe.recv():
                key, most = request
                pipe.send((turn(calls[key], most), peak_memory() - before))
    except Exception as error:              # each engine has exceptions of its own
        pipe.send(reason(error))

def turn(calls, most):
    """Seconds of each run of all calls; the first warms up, unless it takes as long as `most`."""
    seconds, end = [], time.perf_counter() + most
    while not seconds or time.perf_counter() < end:
        seconds.append(timed(*calls)[1])
    return seconds[1:] or seconds

def quality_of(forward, only, held_out):
    """Accuracy on texts, or loss on windows, which takes the logits of all tokens."""
    causal = held_out[0][1].dim() == 2
    score = cross_entropy if causal else lambda z, y: (z.argmax(-1) == y).float().mean()
    scores = [score(forward(inputs, only), y).item() for inputs, y in held_out]
    return float(np.average(scores, weights=[len(y) for _, y in held_out]))

def aimed(dense, s, rho, texts, width):
    """A copy in experts of s, whose random routers run each for a share rho of the tokens."""
    model = copy.deepcopy(dense)
    H, mlps = dense.config.n_hidden, model.mlps()
    for mlp in mlps:
        mlp.sort_neurons(torch.arange(H), torch.arange(0, H + 1, s))
    model.config.n_experts = [H // s] * len(mlps)
    model.add_routers('active', width)
    model.set_rule('threshold', 0.5)
    # what an MLP reads depends on what those before it run
    for i, mlp in enumerate(mlps):
        tap, net = [], mlp.router.net
        model.encode(**texts[len(texts) // 2], tap=tap)
        net.b2.copy_(-net.logits(tap[i]['x']).quantile(1 - rho, dim=0))
    return model

def random_models(shape):
    """(name, {variant: model}, tasks, held-out texts: none) of a BERT and a GPT-2."""
    n, D, H, V = shape.bert
    bert = Config(n_layer=n, n_head=12, n_embd=D, n_hidden=H, vocab_size=V, block_size=512,
                  causal=False, pre_ln=False, n_types=2, head='cls', pooler=True, n_classes=45)
    gpt = Config(n_layer=shape.n_layer, n_head=12, n_embd=shape.D, n_hidden=shape.H,
                 vocab_size=shape.vocab_size, block_size=1024)
    # as long as WordNet's glosses
    lengths = np.clip(6 + np.random.default_rng(0).exponential(8, 128), 6, 45).astype(int)
    texts = [torch.randint(0, V, (length,)) for length in sorted(lengths)]
    texts = [pad(texts[i:i + 32]) for i in range(0, 128, 32)]
    tokens = torch.randint(0, shape.vocab_size, (1, shape.prefill[1]))
    for name, config, s, shares, width, tasks in (
            ('BERT', bert, 8, (0.18, 0.1), 64, text_tasks(texts)),
            ('GPT-2', gpt, shape.sizes[0], (0.1,), 128, token_tasks(tokens))):
        dense = Transformer(config).eval().requires_grad_(False)
        yield f'{name}, {config.n_layer} x {config.n_embd}', dict(dense=dense) | {
            f'converted, {rho:g}': aimed(dense, s, rho, tasks[0][2], width) for rho in shares}, \
            tasks, []

def text_tasks(texts):
    """(task, batch, inputs): all of them, and one of about 6 tokens alone."""
    single = [idx[keep] for x in texts for idx, keep in zip(x['idx'], x['attention_mask'])]
    one = min(single, key=lambda t: abs(len(t) - 6))
    return [('encode', 32, texts), ('encode', 1, [dict(idx=one[None])])]

def token_tasks(tokens):
    prompt = tokens[:, :max(1, min(16, tokens.shape[1] - NEW))]
    return [('prefill', 1, [dict(idx=tokens)]), ('decode', 1, [dict(idx=prompt)])]

def checkpoint_models(o):
    """The same of a checkpoint and the dense.pt beside it, with held-out texts of its data."""
    folder, data = os.path.dirname(o.checkpoint) or '.', read_checkpoint(o.checkpoint)
    dense, model = load(os.path.join(folder, 'dense.pt')), build(data, o.checkpoint)
    if not model.config.router_loss or 'options' not in data:
        raise BadInput(f'{o.checkpoint}: the suite takes what train.py --phase=router wrote')
    c, options = model.config, o.train.with_defaults(data['options'])
    if not c.rule or o.tau is not None:
        # what the sweep picked, if there was one
        usual, rows = ROUTERS[c.router_loss].rule, read_results(folder).get('rows')
        found = picked(rows).get((o.checkpoint, c.router_loss, usual)) if rows else None
        tau = found['tau'] if found else 0.1
        model.set_rule(c.rule or usual, tau if o.tau is None else o.tau, FLOOR)
    options.batch_size, options.eval_batches = (8, 8) if c.causal else (32, 64)
    held_out = o.train.held_out(o.train.open_corpus(options, folder, data), options, 'cpu')
    some = [inputs for inputs, _ in held_out[len(held_out) // 8::max(1, len(held_out) // 4)]][:4]
    tasks = token_tasks(some[0]['idx'][:1, :512]) if c.causal else text_tasks(some)
    name = f'{o.checkpoint}, {c.rule} {c.tau:g}'
    return [(name, dict(dense=dense, converted=model), tasks, held_out)]

def engines_suite(o, device, shape):
    """Ours, dense and converted, and other engines on the dense one."""
    rows, here = [], {}
    for engine, about in ENGINES.items():
        missing = [name for name in about[3].split() if importlib.util.find_spec(name) is None]
        if missing:
            print(f'{engine} is left out: pip install {" ".join(missing)}')
        else:
            here[engine] = about
    with torch.inference_mode(False), torch.no_grad():
        for name, models, tasks, held_out in (checkpoint_models(o) if o.checkpoint
                                              else random_models(shape)):
            jobs = [Job(engine, variant, dtype, only)
                    for engine, (_, dtypes, ways, _) in here.items() for dtype in dtypes
                    for variant in (models if engine == 'ours' else ['dense']) for only in ways]
            with tempfile.TemporaryDirectory() as folder:
                for variant, model in models.items():
                    save(model, os.path.join(folder, f'{variant}.pt'))
                torch.save((tasks, held_out), os.path.join(folder, 'texts.pt'))
                found = engine_times(jobs, models['dense'], tasks, folder, shape.turn)
            rows += engine_rows(name, found, tasks, models['dense'].config.causal)
    return rows

def start_worker(job, dense, folder, texts):
    """-> its process and our end of the pipe to it."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        prepare(job, dense, folder, texts)
    spawn = multiprocessing.get_context('spawn')
    pipe, other = spawn.Pipe()
    process = spawn.Process(target=engine_worker, daemon=True,
                            args=(other, folder, job, torch.get_num_threads()))
    process.start()
    other.close()
    return process, pipe

def ask(worker, message):
    """The answer of a process; RuntimeError says why there is none."""
    worker[1].send(message)
    answer = worker[1].recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer

def engine_times(jobs, dense, tasks, folder, turn, rounds=3):
    """{job: what its process says, and seconds: {(task, only): [of each run]}}. All processes are
    there from the beginning and take turns."""
    workers, found = {}, {}
    # seconds a job expects of: writing its files, loading and warming up, all its turns
    work, done, began = len(jobs) * (2 + 6 + 2 * rounds), 0, time.time()

    def attempt(job, what, seconds, f, *args):
        """f(), or None, and the job is left out."""
        nonlocal done
        answer, done = None, done + seconds
        try:
            answer = f(*args)
        except Exception as error:          # each engine has exceptions of its own
            found.pop(job, None)
            what = f'left out ({reason(error)})'
        left = (time.time() - began) * (work / done - 1)
        print(f'{job.engine} {job.variant} {job.dtype}: {what}, {clock(left)} left', flush=True)
        return answer

    def take_turn(job):
        for key, seconds in found[job]['seconds'].items():
            time.sleep(turn / 2)            # threads of the one before may still spin
            times, found[job]['peak'] = ask(workers[job], (key, turn))
            seconds += times

    for job in jobs:
        workers[job] = attempt(job, 'written', 2, start_worker, job, dense, folder,
                               (tasks[0][2] * 4)[:4])
    workers = {job: worker for job, worker in workers.items() if worker}
    for _, pipe in workers.values():        # imports disturb
        pipe.poll(60) and pipe.recv()
    for job, worker in workers.items():
        answer = attempt(job, 'ready', 6, ask, worker, 'go')
        if answer:
            found[job] = answer
    for i, job in itertools.product(range(rounds), list(found)):
        if job in found:
            attempt(job, f'round {i + 1}', 2, take_turn, job)
    for process, pipe in workers.values():
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(5)
        process.terminate()
    return found

def engine_rows(name, found, tasks, causal):
    """The rows of a model, and its table: a line for each program."""
    head, rows = 'last token' if causal else 'first token', []
    ours = next(a['seconds'] for job, a in found.items() if job[:3] == ('ours', 'dense', 'fp32'))
    # of its two ways the first that does a task
    base = {i: statistics.median(seconds) for (i, _), seconds in reversed(ours.items())}
    for job, answer in found.items():
        for (i, only), seconds in answer['seconds'].items():
            task, batch, texts = tasks[i]
            n = NEW if task == 'decode' else sum(
                x['idx'].numel() if causal else len(x['idx']) for x in texts)
            # a GPT's loss takes the logits of all tokens: it is that of the same weights
            way, t = only and not causal, statistics.median(seconds)
            quality = [a['quality'][way] for j, a in found.items()
                       if j[:3] == job[:3] and way in a['quality']]
            rows.append(dict(
                suite='engines', model=name, engine=job.engine.split()[0],
                variant=job.variant.split(',')[0], dtype=job.dtype, batch=batch, task=task,
                ms=1e3 * t, per_s=n / t, speedup=base[i] / t,
                quality=quality[0] if quality else None,
                weight_bytes=answer['size'], experts=answer['experts'][i],
                peak_bytes=answer['peak'], threads=torch.get_num_threads(), only=only,
                program=[job.engine, job.variant + f', {head}' * only, job.dtype]))
    titles = ''.join(f'{f"{task} x {batch}, ms":>16}  speedup' for task, batch, _ in tasks)
    print(f'\n{name}\n{"engine":22s}{"variant":29s}{"dtype":6s}{titles}   experts   quality'
          '  weights MB  peak MB')
    for program, group in itertools.groupby(rows, lambda r: r['program']):
        r, *others = group
        cells = {(x['task'], x['batch']): f'{x["ms"]:.2f}{x["speedup"]:9.2f}'
                 for x in (r, *others)}
        share, quality = ('-' if r[key] is None else f'{r[key]:.3f}'
                          for key in ('experts', 'quality'))
        print('{:22s}{:29s}{:6s}'.format(*program)
              + ''.join(f'{cells.get(task[:2], "-"):>25s}' for task in tasks) + f'{share:>10s}'
              f'{quality:>10s}{r["weight_bytes"] / 1e6:12.0f}{r["peak_bytes"] / 1e6:9.0f}')
    print(flush=True)
    return rows

# -------------------------------------------------------------------------------------- methods

# the rate stays up in sparsify, adapt takes it down
ONE_SCHEDULE = '--router_loss=active --lr_end=1 --expert_price=0.1'
HALTING = ONE_SCHEDULE + ' --expert_price=1 --halting=1 --halt_sooner=1'
# name, variant: whose checkpoints it starts from, the phases that it adds, their options. All on
# the same base and control, fine-tuned for as many steps. A method is a line here.
METHODS = {
    ('dense', ''): ('', 'base dense', ''),
    ('small', ''): ('', 'base dense', ''),              # 0.69 of the width, half of the FLOPs
    ('d2dmoe', 'GELU kept'): ('', 'base dense sparsify moefy router', '--activation=gelu '
                              '--sparsity_loss=gelu_clamp --sparsity_weight=5e-5'),
    ('d2dmoe', ''): ('dense', 'sparsify moefy router', ''),
    ('ours', ''): ('d2dmoe', 'router', '--router_loss=active'),
    ('moefication', ''): ('dense', 'sparsify moefy router',
                          '--sparsity_weight=0 --split=coactivation --router_loss=share'),
    ('masks', ''): ('dense', 'masks', '--n_masks=8'),
    ('pruning', ''): ('dense', 'prune', '--prune=0.5'),
    ('d2dmoe', 'share'): ('d2dmoe', 'router', '--router_loss=share'),
    ('d2dmoe', 'router as the authors'): ('d2dmoe', 'router',
                                          '--router_steps=5000 --router_width=128'),
    ('d2dmoe', 'random split'): ('d2dmoe', 'moefy router', '--split=random'),
    ('d2dmoe', 'co-activation'): ('d2dmoe', 'moefy router', '--split=coactivation'),
    ('d2dmoe', 'without sparsification'): ('dense', 'sparsify moefy router', '--sparsity_weight=0'),
    ('d2dmoe', 'penalty / 4'): ('dense', 'sparsify moefy router', '--sparsity_weight=5e-4'),
    ('d2dmoe', 'penalty x 4'): ('dense', 'sparsify moefy router', '--sparsity_weight=8e-3'),
    ('d2dmoe', 'projections'): ('dense', 'attn sparsify moefy router', '--attn_projections=qkvo'),
    ('d2dmoe', 'on the pruned'): ('dense', 'prune sparsify moefy router',
                                  '--prune=0.5 --prune_steps=0 --n_experts=64'),
    ('moefication', 'k-means'): ('moefication', 'moefy router',
                                 '--split=kmeans --router_loss=share'),
    ('moefication', 'random split'): ('moefication', 'moefy router',
                                      '--split=random --router_loss=share'),
    ('moefication', 'centres'): ('moefication', 'router', '--router_loss=share --router_steps=0'),
    ('masks', '2 of 8'): ('dense', 'masks', '--n_masks=8 --masks_chosen=2'),
    ('pruning', 'by output'): ('dense', 'prune', '--prune=0.5 --prune_by=output'),
    ('pruning', 'three quarters'): ('dense', 'prune', '--prune=0.75'),
    ('neuron', ''): ('d2dmoe', 'moefy router', '--expert_size=1 --router_loss=active'),
    ('ours', 'with exits'): ('ours', 'exits', '--exits=1'),
    ('ours', 'with halting'): ('dense', 'halting sparsify moefy router',
                               '--halting=1 --router_loss=active'),
    ('ours', 'adapted'): ('ours', 'adapt', '--expert_price=1 --distil=0.5'),
    ('ours', 'with halting, adapted'): ('ours with halting', 'adapt',
                                        '--expert_price=1 --distil=0.5 --halt_sooner=1'),
    ('ours', 'projections'): ('dense', 'attn sparsify moefy router',
                              '--attn_projections=qkvo --distil=0.5 --router_loss=active'),
    ('ours', 'one schedule'): ('dense', 'sparsify moefy router adapt', ONE_SCHEDULE),
    ('ours', 'q and k, one schedule'): (
        'dense', 'attn sparsify moefy router adapt', ONE_SCHEDULE + ' --attn_projections=qk'),
    ('ours', 'projections, one schedule'): (
        'dense', 'attn sparsify moefy router adapt', ONE_SCHEDULE + ' --attn_projections=qkvo'),
    ('ours', 'narrow heads, one schedule'): (                     # half of the dimensions
        'dense', 'narrow sparsify moefy router adapt', ONE_SCHEDULE + ' --narrow=0.5'),
    ('ours', 'with halting, one schedule'): (
        'dense', 'halting sparsify moefy router adapt', HALTING),
    ('ours', 'with halting, narrow heads, one schedule'): (
        'dense', 'halting narrow sparsify moefy router adapt', HALTING + ' --narrow=0.5'),
    # the controls of all that is adapted, twice the steps: no penalty; the paper's method
    ('dense', 'longer'): ('dense', 'sparsify', '--sparsity_weight=0'),
    ('d2dmoe', 'longer'): ('dense', 'sparsify moefy router', ''),
    ('d2dmoe', 'projections, longer'): ('dense', 'attn sparsify moefy router',
                                        '--attn_projections=qkvo'),
    ('exits', ''): ('dense', 'exits', '--exits=1'),
    ('halting', ''): ('dense', 'halting', '--halting=1'),
} | {('d2dmoe', f'experts of {s}'): ('d2dmoe', 'moefy router', f'--expert_size={s}')
     for s in (4, 16, 32, 64, 128)}
MAIN = {                                # three seeds
    'dense': ('', 'longer'), 'small': ('',), 'moefication': ('',), 'masks': ('',),
    'd2dmoe': ('', 'longer', 'projections, longer'), 'pruning': ('',),
    'ours': ('', 'adapted', 'with halting', 'with halting, adapted', 'projections', 'one schedule',
             'q and k, one schedule', 'projections, one schedule', 'narrow heads, one schedule',
             'with halting, one schedule', 'with halting, narrow heads, one schedule')}

def place(out_dir, method, seed):
    name = '-'.join(filter(None, method)).replace(',', '').replace(' ', '-').replace('/', 'by')
    return os.path.join(out_dir, f'{name}-s{seed}')

def run_method(train, method, seed, out_dir, typed):
    """Every phase of a method that is not done yet, and its evaluation -> (rows, seconds, base)."""
    start, phases, own = METHODS[method]
    folder = place(out_dir, method, seed)
    os.makedirs(folder, exist_ok=True)
    # a method's own options hold for its own phases; the files it starts from keep theirs
    if start:
        source = place(out_dir, tuple(start.partition(' ')[::2]), seed)      # name, variant
        earlier = itertools.takewhile(lambda name: name != phases.split()[0], train.PHASES)
        # what is known of them, too
        for name in ('data.pt', 'results.json', *(f'{train.PHASES[p].writes}.pt' for p in earlier)):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                os.link(os.path.join(source, name), os.path.join(folder, name))
    # a preset's values are an option each: what an earlier phase was told otherwise stays so
    known, own = train.all_options(), (a[2:].split('=') for a in own.split())
    own = {name: train.cast(name, text, known[name]) for name, text in own}
    said = typed | dict(router_loss='norm') | own | dict(seed=seed)
    if said.get('expert_size'):
        said.pop('n_experts', None)
    # whatever is fine-tuned takes sparsify's steps and rate
    tuned = 'prune', 'masks', 'halting', 'adapt'
    for phase, what in itertools.product(tuned, ('steps', 'lr')):
        if f'sparsify_{what}' in said:
            said.setdefault(f'{phase}_{what}', said[f'sparsify_{what}'])
    if method[1].endswith('longer'):
        said['sparsify_steps'] = 2 * train.with_defaults(said).sparsify_steps
    if method[0] == 'small':
        heads = said.get('n_head', 4)
        said['n_embd'] = heads * int(0.69 * said.get('n_embd', 256) / heads)

    def run(phase, names, **more):
        mine = {name: value for name, value in said.items() if name in names}
        return train.run(mine | more | dict(out_dir=folder, phase=phase, preset='paper'))

    for phase in phases.split():
        # calibrated on the half that is not reported
        run(phase, {*train.LOOP, *train.own_options(phase), 'eval_batches'})
    asked = 'eval_batches', 'batch_size'
    if method == ('d2dmoe', ''):            # in its results.json, and so among the rows below
        run('eval', asked, rule='cumulative')
    rows = [r for r in run('eval', asked)['rows'] if os.path.dirname(r['file']) == folder]
    if method[0] == 'small':                # compared with the other dense one
        dense = place(out_dir, ('dense', ''), seed)
        mine, other = (load(os.path.join(d, 'dense.pt')) for d in (folder, dense))
        tokens = mine.config.block_size
        share = mine.flops(tokens)['total'] / other.flops(tokens)['total']
        first = read_results(dense)['rows'][0] | dict(method='')
        # not in turn with the other
        rows = [first] + [
            r | dict(flops=share, madds=share, flops_first=None, speedup_first=None,
                     speedup=first['ms_per_1k_tokens'] / r['ms_per_1k_tokens']) for r in rows]
    control = 'dense' in phases.split() or method[0] == 'exits'
    seconds = sum(data['metrics'].get('seconds', 0) for data in train.siblings(folder).values()
                  if control or data['phase'] != 'dense')
    return rows, seconds, checkpoint_hash(os.path.join(folder, 'base.pt'))

def method_row(r, rows, method, seed, seconds, base):
    """A row of results.json as the methods' table has it."""
    variant, routed = method[1], r['router_loss']
    if routed and r['rule'] not in ('confidence', ROUTERS[routed].rule) or routed in ceilings():
        variant = ' '.join(filter(None, [variant, routed * (routed in ceilings()), r['rule']]))
    alike = [rows[0], *(x for x in rows if x['dtype'] == r['dtype'])]
    best = picked(alike).values() if r['rule'] else [x for x in alike if fits(x, rows)]
    copied = ('machine', 'flops', 'flops_first', 'madds', 'experts', 'metric', 'ms_per_1k_tokens',
              'speedup', 'speedup_first', 'weight_bytes', 'tau', 'rule', 'dtype')
    return dict(
        method=method[0], variant=variant, seed=seed, base=base, **{k: r.get(k) for k in copied},
        quality=r[r['metric']], delta=change(r, rows), worse_pick=worse(r, rows, '_pick'),
        picked=any(r is x for x in best), train_s=seconds)

def left_out(method, typed):
    """Why a method is not run on a base; '' if it is."""
    bert = typed.get('arch') == 'bert'
    combined = 'with exits', *(v for m, v in METHODS if v.startswith('with halting'))
    if (method[0] in ('exits', 'halting') or method[1] in combined) and not bert:
        return 'for BERTs only: the next tokens of a GPT need the keys and values of every block'
    if 'init_from' in typed and (method[0] == 'small' or method[1] == 'GELU kept'):
        return ('only where the base is trained from scratch: a smaller one, or one of GELU, that '
                'has seen as much text as --init_from is not at hand')
    shown = '', 'on the pruned', 'adapted', 'one schedule', 'longer', *combined
    return 'ablations are for GPTs only' if bert and method[1] not in shown else ''

def methods_suite(o, device, shape):
    """Every method on the same base, control and steps. What is done is not done again."""
    out_dir = o.out_dir or 'out-methods'
    options, rows = [*o.rest, *([f'--data={o.data}'] if o.data else [])], []
    # a wrong one now, not after hours; so is --seed: the suite counts them
    typed = o.train.parse([*options, '--seeds=0'])
    reasons = {method: left_out(method, typed) for method in METHODS}
    others = [dict(method=method[0], variant=method[1], why=why)
              for method, why in reasons.items() if why]
    for r in others:
        print(f'{r["method"]} {r["variant"]}'.rstrip() + f': {r["why"]}')
    todo = [(method, seed) for seed in range(o.seeds) for method in METHODS
            if not reasons[method] and (seed == 0 or method[1] in MAIN.get(method[0], ()))]
    began = time.time()
    for i, (method, seed) in enumerate(todo):
        left = f', {clock((time.time() - began) / i * (len(todo) - i))} left' if i else ''
        print(f'---- {" ".join(filter(None, method))}, seed {seed}: {i + 1} of {len(todo)}{left}',
              flush=True)
        with torch.inference_mode(False):
            found, seconds, base = run_method(o.train, method, seed, out_dir, typed)
        phases = METHODS[method][1].split()
        # ceilings belong to the experts, not to every router of them
        rows += [method_row(r, found, method, seed, seconds, base) for r in found
                 if r['method'] == ROW_OF.get(phases[-1], phases[-1])
                 and (r['router_loss'] not in ceilings() or 'moefy' in phases)]
        write_json(os.path.join(out_dir, 'methods.json'),
                   dict(config=dict(options=options, seeds=o.seeds), rows=rows, left_out=others))
    print_methods(rows)
    return rows

BUDGETS = 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3

def at_budgets(rows):
    """{(method, variant): {budget: [change against dense, a seed each]}} in fp32, by the setting
    that is best on the other half of the held-out set; every seed has to reach the budget."""
    table, fp32 = {}, [r for r in rows if r['dtype'] == 'fp32']
    for key, found in sorted(grouped(fp32, 'method', 'variant').items()):
        table[key] = {}
        for budget in BUDGETS:
            # of equals the cheapest: what is reported has no say
            best = [min((r for r in of if r['flops'] <= budget + 1e-9), default=None,
                        key=lambda r: (r['worse_pick'], r['flops']))
                    for of in grouped(found, 'seed').values()]
            if None not in best:
                table[key][budget] = [r['delta'] for r in best]
    return table

def print_methods(rows):
    """By method: the change against dense within each budget of FLOPs; the mean over seeds and half
    of their spread."""
    print('\nchange against dense at FLOPs of ' + ', '.join(f'{b:.0%}' for b in BUDGETS))
    for key, reached in at_budgets(rows).items():
        line = f'{key[0]:12s}{key[1]:32s}'
        for budget in BUDGETS:
            values = reached.get(budget, ())
            said = f'{statistics.mean(values):+.2%}' if values else '-'
            spread = f' ± {np.ptp(values) / 2:.2%}' if len(values) > 1 else ''
            line += f'{said:>9s}{spread:8s}'
        print(line)

# -------------------------------------------------------------------------------------- command

SUITES = dict(layer=layer_suite, decode=model_suite, model=model_suite, peers=peers_suite,
              engines=engines_suite, methods=methods_suite)

def options():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('checkpoints', nargs='*', help='measure these, each by what it says of itself, against the '
        'dense.pt beside the first')
    add('--suite', choices=SUITES, default='layer')
    add('--impl', choices=('cpp', 'triton', 'torch', 'dense'),
        help='force an implementation (suites layer and peers)')
    add('--checkpoint', metavar='FILE.pt', help='of a converted model, for the suite engines; '
        'dense.pt is beside it')
    add('--tau', type=float, help='of the --checkpoint, instead of the one it was saved with')
    add('--data', help='of the suite methods, as train.py takes it; so are other options of it')
    add('--seeds', type=int, default=3, help='how many, of the main rows of the suite methods')
    add('--out_dir', help='of the suite methods: it goes on where it was')
    add('--json', metavar='FILE', help='write a JSON line for each row')
    add('--plot', metavar='FILE.png', help='draw the suite layer or methods')
    return parser

def run_suites(o, shape=Shape()):
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if o.impl == 'cpp' and not kernel.have_cpp():
        raise BadInput('--impl=cpp needs a C++ compiler; the warning above says what failed')
    if o.impl == 'triton' and (kernel.triton is None or device == 'cpu'):
        raise BadInput('--impl=triton needs triton and a GPU; leave it out to use what is here')
    if o.seeds < 1:
        raise BadInput(f'--seeds={o.seeds}: says how many, 1 or more')
    if o.suite != 'engines' and (o.checkpoint or o.tau is not None):
        raise BadInput('--checkpoint and its --tau are for --suite=engines')
    plots = dict(layer=plot_layers, methods=plot_methods)
    if o.impl and o.suite not in ('layer', 'peers') or o.plot and o.suite not in plots:
        raise BadInput(f'--suite={o.suite} takes no --impl (layer, peers) or no --plot (layer, '
                       'methods)')
    if o.plot:
        new_axes()
    for path in filter(None, (o.json, o.plot)):
        check_writable(path)
    print(' · '.join(f'{k} {v}' for k, v in machine().items() if v) + '\n', flush=True)
    with torch.inference_mode():
        rows = SUITES[o.suite](o, device, shape)
    if o.json:
        lines = ''.join(json.dumps(row) + '\n' for row in rows)
        write_atomically(o.json, lambda t: Path(t).write_text(lines))
    if o.plot:
        plots[o.suite](rows, o.plot)
    return rows

if __name__ == '__main__':
    import train
    o, o_rest = options().parse_known_args()
    o.train, o.rest = train, o_rest
    if o_rest and o.suite != 'methods':
        options().error(f'{o_rest[0]} is no option of --suite={o.suite}')
    if o.checkpoints and len(sys.argv) > 1 + len(o.checkpoints):
        options().error('checkpoints are measured without the options of a suite')
    train.guarded(lambda: train.evaluation({}, o.checkpoints) if o.checkpoints else run_suites(o))
