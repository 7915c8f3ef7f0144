"""Measure: what a conversion costs in loss and saves in time, against the fastest dense model.

    python bench.py                             one MLP of GPT-2's size, routed against dense
    python bench.py --suite=decode              a whole GPT-2; also model, peers
    python bench.py out/d2dmoe.pt other.pt      loss, FLOPs and time of any checkpoints

Every speedup is a ratio of median times taken in turn within one run, against the fastest dense MLP
or the dense model.

    T tokens · D n_embd · H hidden neurons · E experts · s neurons in an expert · rho share run
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import kernel
from model import (BadInput, Config, Masks, Transformer, build, check_writable, checkpoint_hash,
                   cross_entropy, n_tokens, read_checkpoint, reason, write_atomically)
from router import GRID, ROUTERS, Router
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

class Entry(NamedTuple):
    """A checkpoint that is to be measured."""
    path: str
    hash: str
    data: dict
    kind: str                               # of its routers; '' = none

def entries(found, paths=()):
    """The checkpoints to measure, dense and sparse first. Of a folder's {path: checkpoint}: every
    finished one with routers, and what nothing else was made from; or those in `paths`, each by
    what it says of itself. BadInput if there is no dense one to compare with."""
    def entry(path, data):
        return Entry(path, checkpoint_hash(path), data, data['config']['router_loss'])

    # a phase comes after what it reads
    standing, here = [], {None}
    for path, data in found.items():
        if data['parent'] in here and data['step'] >= data['steps']:
            standing.append(entry(path, data))
            here.add(standing[-1].hash)
        elif not paths:
            print(f'{path} is not measured: unfinished, or made from a checkpoint that is no '
                  'longer here; python train.py --overwrite=1 makes it again')
    chosen = []
    for phase in ('dense', 'sparsify'):
        of_phase = [e for e in standing if e.data['phase'] == phase]
        if not of_phase:
            raise BadInput(f'there is no finished checkpoint of phase {phase} to compare with'
                           + (f' beside {paths[0]}' if paths else '')
                           + f': make it with python train.py --phase={phase}')
        chosen.append(of_phase[0])
    # what somebody else made says less of itself
    unsaid = dict(parent=None, options={}, data={})
    others = [entry(path, unsaid | dict(phase=os.path.basename(path)) | read_checkpoint(path))
              for path in paths]
    for e in others:
        if e.data.get('step', 0) < e.data.get('steps', 0):
            raise BadInput(f'{e.path} stopped at step {e.data["step"]} of {e.data["steps"]}')
    if not paths:
        made_from = {data['parent'] for data in found.values()}
        others = [e for e in standing
                  if e.kind or e.hash not in made_from and not e.data['config']['n_experts']]
    return chosen + [e for e in others if e.path not in (chosen[0].path, chosen[1].path)]

def jobs_of(entries, o):
    """[(entry, what)]: what to measure, the fields by which results.json knows a row. Routers with
    a rule of their own run with top-k, too: it is the control. The oracle replaces the first
    converted one's routers. Dense in fp32 always comes first."""
    def job(e, kind=None, rule=None, tau=None):
        floor = o.floor if rule == 'dynk' else None
        return e, dict(checkpoint=e.hash, router_loss=kind, rule=rule, tau=tau, floor=floor,
                       dtype=o.dtype)

    jobs, routed = [job(e) for e in entries if not e.kind], [e for e in entries if e.kind]
    if o.dtype != 'fp32':
        jobs = [(entries[0], jobs[0][1] | dict(dtype='fp32')), *jobs]
    oracle = [(e, 'oracle') for e in routed[:1] if o.dtype == 'fp32']
    for e, kind in [(e, e.kind) for e in routed] + oracle:
        for rule in dict.fromkeys([o.rule] if o.rule else [ROUTERS[kind].rule, 'topk']):
            jobs += [job(e, kind, rule, tau) for tau in (GRID[rule] if o.tau is None else [o.tau])]
    return jobs

def quantised_jobs(entries, rows):
    """[(entry, what)] in int8 of dense and of what `picked` says of each router's own rule."""
    wanted = [rows[0]] + [r for (kind, rule), r in picked(rows).items()
                          if kind != 'oracle' and rule == ROUTERS[kind].rule]
    names = 'checkpoint', 'router_loss', 'rule', 'tau', 'floor'
    return [(e, {name: r[name] for name in names} | dict(dtype='int8'))
            for r in wanted for e in entries if e.hash == r['checkpoint']]

def classification(predicted, labels):
    """Accuracy, and F1 averaged over the classes that occur: predicted and labels (n,)."""
    scores = []
    for c in torch.cat([predicted, labels]).unique():
        hits = ((predicted == c) & (labels == c)).sum().item()
        scores.append(2 * hits / ((predicted == c).sum() + (labels == c).sum()).item())
    return (predicted == labels).float().mean().item(), statistics.mean(scores)

@torch.inference_mode()
def row_of(model, dense, batches):
    """What the table says of a model on its fast path, timed in turn with dense. Every second batch
    is reported, the others are there to pick tau by (`loss_pick`, `accuracy_pick`). FLOPs are those
    of the mean length, padding left out."""
    config, mlps = model.config, model.mlps()
    losses, shares, predicted, times = [], [], [], []

    def run(m, inputs):
        masks = Masks()
        return m(**inputs, tap=masks), masks

    def rho(masks):                         # the share of neurons run in each MLP
        sizes = [mlp.offsets.diff().float() / len(mlp.w_in) for mlp in mlps]
        return [1.0 if mask is None else (mask.float().mean(0) @ size).item()
                for mask, size in zip(masks, sizes)]

    # a GPU sizes its grid by it
    for mlp, share in zip(mlps, rho(run(model, batches[0][0])[1])):
        if mlp.router is not None:
            mlp.router.rho = share
    for i, (inputs, targets) in enumerate(batches):
        (logits, masks), seconds = timed(lambda: run(model, inputs))
        if i % max(1, len(batches) // 8) == 0:
            times.append((n_tokens(inputs), seconds, timed(lambda: run(dense, inputs))[1]))
        losses.append(cross_entropy(logits, targets).cpu())
        shares.append(rho(masks))
        predicted.append(logits.argmax(-1) if config.head == 'cls' else None)

    pick, report = slice(None, None, 2), slice(1, None, 2) if len(batches) > 1 else slice(None)
    labels, losses = [targets for _, targets in batches], torch.stack(losses)
    tokens = np.array([n_tokens(inputs) for inputs, _ in batches])[report]
    rho = np.average(shares[report], axis=0, weights=tokens).tolist()
    seq_len = tokens.sum().item() / sum(map(len, labels[report]))
    cost, whole = model.flops(seq_len, rho if config.rule else None), dense.flops(seq_len)['total']
    k = max(1, round(config.tau * (len(model.ffns()[0].offsets) - 1)))
    counts, ours, theirs = zip(*times)
    row = dict(
        k=k if config.rule == 'topk' else None,
        experts=float(np.average(rho, weights=[len(mlp.w_in) for mlp in mlps])),
        flops=cost['total'] / whole, router_flops=cost['router'] / whole,
        loss=losses[report].mean().item(), loss_pick=losses[pick].mean().item(), metric='loss',
        accuracy=None, macro_f1=None, tokens=tokens.sum().item(), experts_per_layer=rho,
        ms_per_1k_tokens=1e6 * sum(ours) / sum(counts),
        speedup=statistics.median(b / a for a, b in zip(ours, theirs)))
    if config.head == 'cls':
        (accuracy, f1), (half, _) = (classification(torch.cat(predicted[p]), torch.cat(labels[p]))
                                     for p in (report, pick))
        row |= dict(metric='accuracy', accuracy=accuracy, macro_f1=f1, accuracy_pick=half)
    return row

def read_results(folder):
    """results.json of a folder; {} if there is none that can be read."""
    try:
        with open(os.path.join(folder, 'results.json'), encoding='utf-8') as f:
            old = json.load(f)
        return old if {'rows', 'settings', 'activity', 'config'} <= old.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}

def write_json(path, content):
    write_atomically(path, lambda t: Path(t).write_text(json.dumps(content, indent=1)))

def known_rows(old, entries, names):
    """{the fields in `names`: row} of the rows whose checkpoint is still here, or has moved."""
    here = {}
    for file in {r['file'] for r in old}:
        with contextlib.suppress(BadInput):
            here[checkpoint_hash(file)] = file
    here |= {e.hash: e.path for e in entries}
    old = [dict(dtype='fp32') | r for r in old]                  # earlier files do not say it
    return {tuple(r[name] for name in names): r | dict(file=here[r['checkpoint']])
            for r in old if r['checkpoint'] in here}

def evaluate(entries, batches, o, settings, folder, device):
    """Measure what results.json does not know yet (by checkpoint, rule, tau and floor), print the
    table, draw it. Ctrl-C keeps what is done."""
    path, jobs = os.path.join(folder, 'results.json'), jobs_of(entries, o)
    settings, old = settings | dict(dense=entries[0].hash), read_results(folder)
    # what was measured with other settings is kept beside it
    if old and old['settings'] != settings:
        os.replace(path, path.replace('.json', f'-{int(time.time())}.json'))
        old = {}
    found = known_rows(old.get('rows', ()), entries, jobs[0][1])
    about = {k: v for k, v in entries[0].data['data'].items() if k != 'tokenizer_json'}
    results = dict(config=vars(o), data=about, machine=machine(), settings=settings, rows=[],
                   activity=old.get('activity'))
    dense, loaded = build(entries[0].data, entries[0].path).to(device), {}

    def measure(e, what):
        """Its row, unless there is one; a checkpoint's model stays for the rows that follow."""
        key, kind, of = tuple(what.values()), what['router_loss'], e.data['options']
        if key in found:
            return
        if (e.hash, kind, what['dtype']) not in loaded:
            print(f'eval     {e.path}  {kind or ""}  {what["dtype"]}', flush=True)
            loaded.clear()
            model = build(e.data, e.path).to(device)
            if kind == 'oracle':
                model.add_routers('oracle', 0)
            loaded[e.hash, kind, what['dtype']] = model.quantize(what['dtype'])
        model, phase = loaded[e.hash, kind, what['dtype']], e.data['phase']
        model.set_rule(what['rule'] or '', what['tau'] or 0.0, what['floor'] or 0.0)
        row = row_of(model, dense, batches)
        if kind == 'oracle':                # a ceiling: it costs nothing, and cannot be timed
            row |= dict(ms_per_1k_tokens=None, speedup=None)
        if e is entries[0] and what['dtype'] == 'fp32':          # dense against itself
            row['speedup'] = 1.0
        if e is entries[1] and what['dtype'] == 'fp32':          # one of the middle lengths
            tap = []
            model.encode(**batches[len(batches) // 2][0], tap=tap)
            results['activity'] = sparsity_statistics(tap)
        method = dict(sparsify='sparse', router='d2dmoe').get(phase, phase)
        found[key] = dict(method=method, **what, **row, seed=of.get('seed'), split=of.get('split'),
                          file=e.path)

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

    def reported(*dtypes):
        return [r for i, r in enumerate(rows_so_far())
                if i == 0 or r['checkpoint'] in mine and r['floor'] in (None, o.floor)
                and r['dtype'] in dtypes]
    try:
        for job in jobs:
            measure(*job)
        # what is deployed; on a GPU only the weights would be int8
        for job in quantised_jobs(entries, reported('fp32')) if device == 'cpu' else ():
            measure(*job)
    finally:
        results['rows'] = rows_so_far()
        write_json(path, results)
    report(reported('fp32', o.dtype, 'int8'), reported(o.dtype), results['activity'], folder)
    return results

# -------------------------------------------------------------------------------------- tables

# title, key of a row, width, format
COLUMNS = [('experts', 'experts', 9, '.1%'), ('FLOPs', 'flops', 8, '.1%'),
           ('loss', 'loss', 9, '.4f'), ('vs dense', 'delta', 10, '+.2%'),
           ('ms/1k tok', 'ms_per_1k_tokens', 11, '.2f'), ('speedup', 'speedup', 9, '.2f'),
           ('accuracy', 'accuracy', 10, '.2%'), ('macro-F1', 'macro_f1', 10, '.2%')]

def print_table(rows, columns=COLUMNS):
    """A line for each row; columns without a figure are left out, means have half their spread."""
    columns = [c for c in columns if any(r[c[1]] is not None for r in rows)]
    print(f'{"method":8s}{"router":>8s}{"tau":>10s}{"dtype":>6s}'
          + ''.join(f'{title:>{width}}' for title, _, width, _ in columns))
    for r in rows:
        line = f'{r["method"]:8s}{r["router_loss"] or "-":>8s}{setting(r):>10s}{r["dtype"]:>6s}'
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
    if r['rule'] == 'topk':
        return f'top-{r["k"]}'
    usual = ROUTERS[r['router_loss']].rule == r['rule']
    return f'{r["tau"]:g}' if usual else f'{r["rule"][:5]} {r["tau"]:g}'

def report(rows, curve_rows, activity, folder):
    """The table, what follows from the rows of one precision, and their picture."""
    print()
    print_table(rows)
    print('\nzeros among the hidden activations of the sparse model, MLP by MLP: '
          + ' '.join(f'{zeros:.0%}' for zeros, *_ in activity))
    choice, routed = picked(curve_rows), curves(curve_rows)
    print(f'\ncheapest whose {rows[0]["metric"]} is within 1 % of dense, picked on one half of the '
          'held-out set, reported on the other:')
    if choice:
        print_table(choice.values())
    else:
        print('none')
    print()
    for (name, rule), curve in routed.items():
        control = routed.get((name, 'topk'), ())
        gap = flops_gap(curve, control) if rule != 'topk' and len(control) > 1 else []
        if gap:
            print(f'{name} {rule} against top-k at equal FLOPs: loss {np.mean(gap):+.2%} on '
                  f'average, {max(gap):+.2%} at worst, over {len(gap)} points')
    for r in rows:
        for same in (f for f in rows if r['dtype'] != 'fp32' == f['dtype'] and all(
                f[name] == r[name] for name in ('checkpoint', 'router_loss', 'rule', 'tau'))):
            metric, sign = r['metric'], -1 if r['metric'] == 'accuracy' else 1
            print(f'{r["dtype"]} costs {r["method"]} {r["router_loss"] or ""} {setting(r)} '
                  f'{sign * (r[metric] / same[metric] - 1):+.2%} of its {metric}')
    print(f'{os.path.join(folder, "results.json")} has every row'
          + plot_rows(curve_rows, os.path.join(folder, 'results.png')))

def curves(rows):
    """{(router, rule): its rows} of the routed ones."""
    out = {}
    for r in rows:
        if r['rule']:
            out.setdefault((r['router_loss'], r['rule']), []).append(r)
    return out

def picked(rows):
    """{(router, rule): its cheapest row within 1 % of dense by the half that is not reported}: of
    the loss, or of the accuracy where texts are labelled."""
    dense = rows[0]
    if dense['metric'] == 'accuracy':
        fits = [r for r in rows if r['accuracy_pick'] >= 0.99 * dense['accuracy_pick']]
    else:
        fits = [r for r in rows if r['loss_pick'] <= 1.01 * dense['loss_pick']]
    return {key: min(curve, key=lambda r: r['flops']) for key, curve in curves(fits).items()}

def flops_gap(curve, other):
    """Relative loss of a curve's points against another curve, interpolated to equal FLOPs."""
    x, y = zip(*sorted((r['flops'], r['loss']) for r in other))
    return [r['loss'] / np.interp(r['flops'], x, y) - 1
            for r in curve if x[0] <= r['flops'] <= x[-1]]

def print_seeds(results, path):
    """One table of several seeds' rows: mean and half of the spread of each figure."""
    same = ('method', 'router_loss', 'rule', 'tau', 'floor', 'k', 'dtype')
    columns = [(title, name, 16, form) for title, name, _, form in COLUMNS
               if name in ('experts', 'flops', 'delta', 'speedup', 'accuracy')]
    groups, rows = {}, []
    for r in (r for result in results for r in result['rows']):
        groups.setdefault(tuple(r[name] for name in same), []).append(r)
    for group in groups.values():
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

def new_axes():
    """An empty picture. BadInput if matplotlib is not here."""
    try:
        import matplotlib.figure
    except ImportError:
        raise BadInput('pictures need matplotlib: pip install matplotlib') from None
    return matplotlib.figure.Figure(figsize=(7, 4.2)).subplots()

def save_picture(axes, path, **about):
    axes.set(**about)
    axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(path, dpi=150, bbox_inches='tight')

def plot_rows(rows, path):
    """Loss or accuracy against FLOPs, a line for each router and rule. Returns what to say."""
    metric, dense = rows[0]['metric'], rows[0]
    with contextlib.suppress(OSError):      # never a stale one
        os.remove(path)
    try:
        axes = new_axes()
    except BadInput as error:
        return f'; {error}'

    def change(r):                          # in % of dense
        return 100 * (r[metric] / dense[metric] - 1)
    for (name, rule), curve in curves(rows).items():
        axes.plot([100 * r['flops'] for r in curve], [change(r) for r in curve], marker='o', ms=3,
                  ls='--' if rule == 'topk' else '-', label=f'{name}, {rule}')
    axes.axhline(0, color='black', lw=0.8, label='dense')
    axes.axhline(change(rows[1]), color='grey', lw=0.8, label='sparse, all experts on')
    # what is far off would squeeze the rest onto zero
    save_picture(axes, path, xlabel='FLOPs of the whole model, routers included (% of dense)',
                 ylabel=f'{metric} against dense (%)',
                 ylim=(-2, 6) if metric == 'loss' else (-8, 2))
    return f'; {path} shows it'

def plot_layers(rows, path):
    """Time against executed experts, dense as a line."""
    axes = new_axes()
    axes.axhline(1, color='black', lw=0.8, label='the fastest dense')
    axes.plot([0, 1], [0, 1], color='grey', lw=0.8, ls=':', label='proportional')
    rows = [r for r in rows if r['suite'] == 'layer' and r['dtype'] == 'float32']
    for T, s in sorted({(r['T'], r['expert_size']) for r in rows}):
        curve = [r for r in rows if (r['T'], r['expert_size']) == (T, s)]
        axes.plot([r['rho'] for r in curve], [1 / r['speedup'] for r in curve], marker='o', ms=3,
                  label=f'T {T}, experts of {s}')
    save_picture(axes, path, xlabel='share of neurons run', ylabel='time (1 = dense)')

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

def make_layers(shape, dtype, device):
    """[Experts] of random MLPs with one expert each, so many that no cache holds them."""
    H, D = shape.H, shape.D
    one = torch.tensor([0, H], dtype=torch.int32, device=device)

    def make(*size):
        w = torch.randn(*size, device=device) * 0.02
        return w if dtype == torch.int8 else w.to(dtype)

    def mlp():
        w_in, b_in, w_out, b_out = make(H, D), make(H), make(H, D), make(D)
        if dtype == torch.int8:
            w_in, w_out = kernel.int8(w_in, b_in), kernel.int8(w_out, b_out, by_column=True)
        return kernel.Experts(w_in, b_in, w_out, b_out, one, 'relu')
    return [mlp() for _ in range(math.ceil(shape.bytes / (2 * D * H * dtype.itemsize)))]

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
            jobs[name] = calls
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
    for dtype in sorted({r['dtype'] for r in rows}):
        reached = [r['of_limit'] for r in rows if r['dtype'] == dtype and r['rho'] <= 0.5]
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
    dense = in_turn(ways, 4, 2, n)
    best = min(dense, key=dense.get)
    jobs = {'dense': ways[best]}
    for suite, s, rho in cases:
        masks = [torch.rand(T, shape.H // s, device=x.device) < rho for _ in layers]
        jobs[suite, s, rho] = routed(layers, x, masks, o.impl)
    for s in shape.sizes:
        mlp = layers[0]._replace(offsets=torch.arange(0, shape.H + 1, s))
        router = Router('norm', mlp, None, 128).to(x.device, x.dtype)
        router.rule, router.tau = 'dynk', 0.5
        jobs[s] = [partial(router, x)]
    times = in_turn(jobs, 7, 2, n)
    base, flops = times['dense'], 4 * T * shape.D * shape.H
    dense[best], roof['peak'] = base, max(roof['peak'], flops / base)
    for suite, s, rho in cases:
        # the experts that any token wants, x and y
        wanted = shape.H * (1 - (1 - rho) ** T)
        moved = 2 * shape.D * (dtype.itemsize * wanted + x.itemsize * T)
        limit = base / max(flops * rho / roof['peak'], moved / roof['bandwidth'])
        seconds = times[suite, s, rho]
        row = dict(suite=suite, T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                   dtype=str(dtype)[6:], impl=o.impl or 'auto', ms=1e3 * seconds,
                   router_ms=1e3 * times[s], dense_ms={k: 1e3 * t for k, t in dense.items()},
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

    for rho in (0.1, 0.25, 0.5):
        converted.set_rule('topk', rho)
        for mlp in converted.mlps():
            mlp.router.rho = rho
        times = in_turn(dict(dense=[partial(whole, dense)], converted=[partial(whole, converted)]),
                        rounds=3)
        speedup = times['dense'] / times['converted']
        ours, theirs = tokens / times['converted'], tokens / times['dense']
        rows.append(dict(suite=o.suite, T=T, rho=rho, expert_size=s, dtype='float32',
                         tokens_per_s=ours, dense_tokens_per_s=theirs, speedup=speedup))
        print(f'{o.suite}  rho {rho:4.2f}  dense {theirs:8.1f} tokens/s  converted {ours:8.1f}  '
              f'speedup {speedup:.2f}', flush=True)
    return rows

def peers_suite(o, device, shape):
    """The layer by what one would pick instead; every token runs k = rho E, so that all can."""
    rows, layers = [], make_layers(shape, torch.float32, device)
    for T, s, rho in itertools.product((16, shape.tokens[0]), (shape.sizes[-1], shape.sizes[0]),
                                       (0.125, 0.25)):
        E, x = shape.H // s, torch.randn(T, shape.D, device=device)
        chosen = torch.rand(T, E, device=device).topk(max(1, round(rho * E))).indices   # (T, k)
        mask = torch.zeros(T, E, dtype=torch.bool, device=device).scatter_(1, chosen, True)
        masks = [mask] * len(layers)
        jobs = {'dense': [partial(kernel.experts, x, None, m) for m in layers],
                'd2dmoe': routed(layers, x, masks, o.impl),
                'loop': routed(layers, x, masks, 'torch')}
        # torch's own is not in every build
        try:
            grouped = grouped_mm(layers, x, s, chosen)
            if not torch.allclose(grouped[0](), jobs['d2dmoe'][0](), atol=1e-3):
                raise AssertionError('grouped mm computes something else')
            jobs['grouped mm'] = grouped
        except (AttributeError, RuntimeError) as error:
            print(f'grouped mm: not here ({reason(error)})')
        times = in_turn(jobs, rounds=4, n=max(1, min(len(layers), 768 // T)))
        rows += [dict(suite='peers', T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                      dtype='float32', impl=name, ms=1e3 * t, speedup=times['dense'] / t)
                 for name, t in times.items()]
        print(f'T {T:5d} size {s:4d} rho {rho:5.3f}   ' + '   '.join(
            f'{name} {times["dense"] / t:.2f}' for name, t in times.items()), flush=True)
    return rows

def grouped_mm(layers, x, s, chosen):
    """The routed layer by torch's grouped matmul, the pairs of token and expert by expert."""
    (T, k), E = chosen.shape, len(layers[0].w_in) // s
    expert, order = chosen.flatten().sort(stable=True)           # (T k)
    rows = order // k
    ends = expert.bincount(minlength=E).cumsum(0).to(torch.int32)

    def layer(m):
        h = torch._grouped_mm(x[rows], m.w_in.view(E, s, -1).mT, offs=ends)
        h = F.relu(h + m.b_in.view(E, s)[expert])
        pairs = torch._grouped_mm(h, m.w_out.view(E, s, -1), offs=ends)
        return m.b_out.repeat(T, 1).index_add_(0, rows, pairs)

    return [partial(layer, m) for m in layers]

# -------------------------------------------------------------------------------------- command

SUITES = dict(layer=layer_suite, decode=model_suite, model=model_suite, peers=peers_suite)

def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('checkpoints', nargs='*', help='measure these, each by what it says of itself, against the '
        'dense.pt beside the first')
    add('--suite', choices=SUITES, default='layer')
    add('--impl', choices=('cpp', 'triton', 'torch', 'dense'),
        help='force an implementation (suites layer and peers)')
    add('--json', metavar='FILE', help='write a JSON line for each row')
    add('--plot', metavar='FILE.png', help='draw the layer suite')
    return parser

def run(o, shape=Shape()):
    """Run one suite."""
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if o.impl == 'cpp' and not kernel.have_cpp():
        raise BadInput('--impl=cpp needs a C++ compiler; the warning above says what failed')
    if o.impl == 'triton' and (kernel.triton is None or device == 'cpu'):
        raise BadInput('--impl=triton needs triton and a GPU; leave it out to use what is here')
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
    if o.plot and o.suite == 'layer':
        plot_layers(rows, o.plot)
    return rows

if __name__ == '__main__':
    import train
    o = options().parse_args()
    if o.checkpoints and len(sys.argv) > 1 + len(o.checkpoints):
        options().error('checkpoints are measured without the options of a suite')
    train.guarded(lambda: train.evaluation({}, o.checkpoints) if o.checkpoints else run(o))
