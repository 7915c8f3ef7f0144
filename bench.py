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
from model import (BadInput, Config, Masks, Transformer, build, checkpoint_hash, cross_entropy,
                   n_tokens, read_checkpoint, reason, write_atomically)
from router import GRID, ROUTERS, Router
from sparsify import statistics as sparsity_statistics

# -------------------------------------------------------------------------------------- measuring

def machine():
    """What the figures were measured on."""
    facts = {}
    if os.path.isfile('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            facts = dict(re.findall(r'^(model name|flags)\s*: (.*)$', f.read(), re.MULTILINE))
    flags = facts.get('flags', '').split()
    units = [x for x in ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16') if x in flags]
    cpu = facts.get('model name', platform.processor() or platform.machine())
    return dict(gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                cpu=' '.join([cpu, *units]), threads=torch.get_num_threads(),
                torch=torch.__version__, triton=getattr(kernel.triton, '__version__', None),
                python=platform.python_version())

def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'

def timed(*calls):
    """(what the last call returns, seconds of all)."""
    start = time.perf_counter()
    for call in calls:
        out = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
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

    given = {path: read_checkpoint(path) for path in paths}
    known = {path: entry(path, data) for path, data in found.items()}
    made_from = {data['parent'] for data in found.values()}

    def stands(data):
        """Is it finished, and is all that it was made from here?"""
        sources = [e.data for e in known.values() if e.hash == data['parent']]
        made = data['parent'] is None or sources and stands(sources[0])
        return made and data['step'] >= data['steps']

    chosen = {'dense': None, 'sparsify': None}
    for path, e in known.items():
        leaf = e.hash not in made_from and not e.data['config']['n_experts']
        if not stands(e.data) and not paths:
            print(f'{path} is not measured: unfinished, or made from a checkpoint that is no '
                  'longer here; python train.py --overwrite=1 makes it again')
        elif stands(e.data) and chosen.get(e.data['phase'], e) is None:
            chosen[e.data['phase']] = e
        elif not paths and (e.kind or leaf):
            chosen[path] = e
    for phase in ('dense', 'sparsify'):
        if chosen[phase] is None:
            raise BadInput(f'there is no finished checkpoint of phase {phase} to compare with'
                           + (f' beside {paths[0]}' if paths else '')
                           + ': make it with python train.py')
    for path, data in given.items():
        data = dict(phase=os.path.basename(path), parent=None, options={}, data={}, step=0,
                    steps=0) | data
        if data['step'] < data['steps']:
            raise BadInput(f'{path} stopped at step {data["step"]} of {data["steps"]}')
        if path not in (e.path for e in chosen.values()):
            chosen[path] = entry(path, data)
    return list(chosen.values())

def jobs_of(entries, o):
    """[(entry, what)]: what to measure, the fields by which results.json knows a row. Routers with
    a rule of their own run with top-k, too: it is the control. The oracle replaces the first
    converted one's routers."""
    def job(e, kind=None, rule=None, tau=None):
        floor = o.floor if rule == 'dynk' else None
        return e, dict(checkpoint=e.hash, router_loss=kind, rule=rule, tau=tau, floor=floor)

    jobs, routed = [job(e) for e in entries if not e.kind], [e for e in entries if e.kind]
    for e, kind in [(e, e.kind) for e in routed] + [(e, 'oracle') for e in routed[:1]]:
        for rule in dict.fromkeys([o.rule] if o.rule else [ROUTERS[kind].rule, 'topk']):
            jobs += [job(e, kind, rule, tau) for tau in (GRID[rule] if o.tau is None else [o.tau])]
    return jobs

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
    tokens = torch.tensor([n_tokens(inputs) for inputs, _ in batches])[report]
    rho = ((tokens[:, None] * torch.tensor(shares)[report]).sum(0) / tokens.sum()).tolist()
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

@torch.no_grad()
def activity(model, batches):
    """How sparse each MLP is over all tokens: (MLPs, 4), see sparsify.statistics."""
    found = []
    for inputs, _ in batches:
        tap = []
        model.encode(**inputs, tap=tap)
        found.append(sparsity_statistics(tap))
    weights = [n_tokens(inputs) for inputs, _ in batches]
    return np.average(found, axis=0, weights=weights).tolist()

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

def evaluate(entries, batches, o, settings, folder, device):
    """Measure what results.json does not know yet (by checkpoint, rule, tau and floor), print the
    table, draw it. Ctrl-C keeps what is done."""
    path, jobs = os.path.join(folder, 'results.json'), jobs_of(entries, o)
    settings, old = settings | dict(dense=entries[0].hash), read_results(folder)
    # what was measured with other settings is kept beside it
    if old and old['settings'] != settings:
        os.replace(path, path.replace('.json', f'-{int(time.time())}.json'))
        old = {}
    # by which a row is known again; those of a checkpoint that is gone go
    names, mine = jobs[0][1], {e.hash for e in entries}
    here = set(mine)
    for file in {r['file'] for r in old.get('rows', ())}:
        with contextlib.suppress(BadInput):
            here.add(checkpoint_hash(file))
    found = {tuple(r[name] for name in names): r for r in old.get('rows', ())
             if r['checkpoint'] in here}
    for r in found.values():                # a checkpoint may have moved since
        r['file'] = next((e.path for e in entries if e.hash == r['checkpoint']), r['file'])
    sparse_known = any(r['checkpoint'] == entries[1].hash for r in found.values())
    about = {k: v for k, v in entries[0].data['data'].items() if k != 'tokenizer_json'}
    results = dict(config=vars(o), data=about, machine=machine(),
                   settings=settings, rows=[], activity=old['activity'] if sparse_known else None)
    dense, loaded = build(entries[0].data, entries[0].path).to(device), None
    began = said = time.time()
    try:
        for i, (e, what) in enumerate(jobs):
            key, kind = tuple(what.values()), what['router_loss']
            if key not in found:
                if loaded != (e.hash, kind):
                    model, loaded = build(e.data, e.path).to(device), (e.hash, kind)
                    if kind == 'oracle':
                        model.add_routers('oracle', 0)
                model.set_rule(what['rule'] or '', what['tau'] or 0.0, what['floor'] or 0.0)
                row, phase = row_of(model, dense, batches), e.data['phase']
                if kind == 'oracle':        # a ceiling: it costs nothing, and cannot be timed
                    row |= dict(ms_per_1k_tokens=None, speedup=None)
                if not i:                   # dense against itself
                    row['speedup'] = 1.0
                method = dict(sparsify='sparse', router='d2dmoe').get(phase, phase)
                found[key] = dict(method=method, **what, **row)
                found[key] |= {name: e.data['options'].get(name) for name in ('seed', 'split')}
                found[key]['file'] = e.path
            if time.time() - said > 10:
                said, left = time.time(), (time.time() - began) / (i + 1) * (len(jobs) - i - 1)
                print(f'eval     {i + 1}/{len(jobs)}  {clock(left)} left', flush=True)
        if results['activity'] is None:
            sparse = build(entries[1].data, entries[1].path).to(device)
            results['activity'] = activity(sparse, batches[::4])
    finally:
        order = {(e.hash, what['router_loss']): i for i, (e, what) in enumerate(jobs)}
        results['rows'] = rows = sorted(found.values(), key=lambda r: (
            order.get((r['checkpoint'], r['router_loss']), len(order)), r['rule'] == 'topk',
            r['rule'] or '', r['tau'] or 0))
        for row in rows:
            row['delta'] = row['loss'] / rows[0]['loss'] - 1
        write_json(path, results)
    shown = [r for r in rows if r['checkpoint'] in mine and r['floor'] in (None, o.floor)]
    report(entries, shown, results['activity'], batches, folder)
    return results

# -------------------------------------------------------------------------------------- tables

# title: key of a row, width, format
COLUMNS = {'experts': ('experts', 9, '.1%'), 'FLOPs': ('flops', 8, '.1%'),
           'loss': ('loss', 9, '.4f'), 'vs dense': ('delta', 10, '+.2%'),
           'ms/1k tok': ('ms_per_1k_tokens', 11, '.2f'), 'speedup': ('speedup', 9, '.2f'),
           'accuracy': ('accuracy', 10, '.2%'), 'macro-F1': ('macro_f1', 10, '.2%')}

def print_table(rows, columns):
    """A line for each row; columns without a figure are left out, means have half their spread."""
    columns = {title: c for title, c in columns.items() if any(r[c[0]] is not None for r in rows)}
    print(f'{"method":8s}{"router":>8s}{"tau":>10s}'
          + ''.join(f'{title:>{width}}' for title, (_, width, _) in columns.items()))
    for r in rows:
        line = f'{r["method"]:8s}{r["router_loss"] or "-":>8s}{setting(r):>10s}'
        for name, width, form in columns.values():
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

def report(entries, rows, activity, batches, folder):
    """The table and what follows from it, its picture, and masks for --routing."""
    print()
    print_table(rows, COLUMNS)
    print(f'\nsparse: loss {rows[1]["delta"]:+.2%} against dense')
    sparse = build(entries[1].data)
    for what, ours in (('FFNs', True), ('projections', False)):
        some = np.array([a for a, mlp in zip(activity, sparse.mlps())
                         if (mlp in sparse.ffns()) == ours])
        if len(some) and (sparse.config.activation == 'relu' or not ours):
            print(f'zeros among the hidden activations of the sparse {what}: '
                  f'{some[:, 0].mean():.1%} ({" ".join(f"{z:.0%}" for z in some[:, 0])})')
        elif len(some):                     # GELU has next to none
            print(f'hidden activations of the sparse {what} below 1/10, 1/100, 1/1000 of the '
                  'token\'s largest: ' + ', '.join(f'{z:.1%}' for z in some[:, 1:].mean(0)))
    print_choice(rows)
    best = next((r for r in picked(rows).values() if r['router_loss'] != 'oracle'), None)
    if best:
        entry, masks = next(e for e in entries if e.hash == best['checkpoint']), Masks()
        model = build(entry.data).set_rule(best['rule'], best['tau'], best['floor'] or 0.0)
        with torch.no_grad():
            model.encode(**{name: t.cpu() for name, t in batches[0][0].items()}, tap=masks)
        masks = [mask for mask, mlp in zip(masks, model.mlps()) if mlp in model.ffns()]
        facts = dict(D=model.config.n_embd, H=model.config.n_hidden, masks=masks)
        write_atomically(os.path.join(folder, 'routing.pt'), lambda t: torch.save(facts, t))
    print(f'\n{os.path.join(folder, "results.json")} has every row'
          + plot_rows(rows, os.path.join(folder, 'results.png')))

def print_choice(rows):
    """The cheapest row of every router and rule, and how the rules do against top-k."""
    dense, choice, routed = rows[0], picked(rows), curves(rows)
    print(f'cheapest tau whose {dense["metric"]} is within 1 % of dense, picked on one half of the '
          'held-out set, reported on the other:')
    for (name, rule), r in choice.items():
        text = f'{r["flops"]:6.1%} of the FLOPs, loss {r["delta"]:+.2%}'
        if dense['metric'] == 'accuracy':
            text += f', accuracy {r["accuracy"]:.2%} (dense {dense["accuracy"]:.2%})'
        if r['speedup']:
            text += f', {r["speedup"]:.2f} x dense'
        print(f'  {name:8s}{rule:10s} {"" if rule == "topk" else "tau "}{setting(r):8s} {text}')
    if not choice:
        print(f'  none; the sparse model with every expert on: loss {rows[1]["delta"]:+.2%}')
    for (name, rule), curve in routed.items():
        control = routed.get((name, 'topk'), ())
        gap = flops_gap(curve, control) if rule != 'topk' and len(control) > 1 else []
        if gap:
            print(f'  {name:8s}{rule} against top-k at equal FLOPs: loss {np.mean(gap):+.2%} on '
                  f'average, {max(gap):+.2%} at worst, over {len(gap)} points')

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
    same = ('method', 'router_loss', 'rule', 'tau', 'floor', 'k')
    names, groups, rows = ('experts', 'flops', 'delta', 'speedup', 'accuracy'), {}, []
    for r in (r for result in results for r in result['rows']):
        groups.setdefault(tuple(r[name] for name in same), []).append(r)
    for group in groups.values():
        rows.append({name: group[0][name] for name in same} | dict(seeds=len(group)))
        for name in names:
            values = [r[name] for r in group if r[name] is not None]
            rows[-1][name] = statistics.mean(values) if values else None
            rows[-1][f'{name}_half'] = (max(values) - min(values)) / 2 if values else None
    print(f'\n{len(results)} seeds: mean and half of the spread (largest - smallest)')
    print_table(rows, {title: (name, 16, form) for title, (name, _, form) in COLUMNS.items()
                       if name in names})
    seeds = [result['config']['seed'] for result in results]
    write_json(path, dict(machine=machine(), seeds=seeds, rows=rows))
    print(f'\n{path} has every row')

# -------------------------------------------------------------------------------------- pictures

def pyplot():
    """matplotlib, without a screen. BadInput if it is not here."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput('pictures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot

def draw(path, lines, **about):
    """A picture of lines, each its points and how it looks."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for points, look in lines:
        axes.plot(*zip(*points), **look)
    axes.set(**about)
    axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches='tight')
    plt.close(figure)

def plot_rows(rows, path):
    """Loss or accuracy against FLOPs, a line for each router and rule. Returns what to say."""
    metric, lines = rows[0]['metric'], []

    def line(some, label, **look):          # what is far off would squeeze the rest onto zero
        points = [(100 * r['flops'], 100 * (r[metric] / rows[0][metric] - 1)) for r in some]
        near = [p for p in points if abs(p[1]) <= (6 if metric == 'loss' else 8)]
        if near:
            lines.append((near, dict(label=label, **look)))
    for (name, rule), curve in curves(rows).items():
        styles = {'oracle': ':', 'topk': '--'}
        line(curve, f'{name}, {rule}', ls=styles.get(name, styles.get(rule, '-')), marker='o', ms=3)
    cheapest = min(r['flops'] for r in rows)
    for r, label, color in (rows[0], 'dense', 'black'), (rows[1], 'sparse, all experts on', 'grey'):
        line([r, r | dict(flops=cheapest)], label, color=color, lw=0.8)
    with contextlib.suppress(OSError):      # never a stale one
        os.remove(path)
    try:
        draw(path, lines, xlabel='FLOPs of the whole model, routers included (% of dense)',
             ylabel=f'{metric} against dense (%)')
    except BadInput as error:
        return f'; {error}'
    return f'; {path} shows it'

def plot_layers(rows, path):
    """Time against executed experts, dense as a line."""
    lines = [([(0, 1), (1, 1)], dict(color='black', lw=0.8, label='the fastest dense')),
             ([(0, 0), (1, 1)], dict(color='grey', lw=0.8, ls=':', label='proportional'))]
    rows = [r for r in rows if r['suite'] == 'layer' and r['dtype'] == 'float32']
    for T in sorted({r['T'] for r in rows}):
        for end, style in (min, '-'), (max, '--'):
            s = end(r['expert_size'] for r in rows)
            points = [(r['rho'], 1 / r['speedup']) for r in rows
                      if (r['T'], r['expert_size']) == (T, s)]
            lines.append((points, dict(marker='o', ms=3, ls=style, label=f'T {T}, experts of {s}')))
    draw(path, lines, xlabel='share of neurons run', ylabel='time (1 = dense)', xlim=(0, 1.02),
         ylim=0)

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
    cache = 4 * torch.cuda.get_device_properties(0).L2_cache_size if device == 'cuda' else 0
    n = math.ceil(max(shape.bytes, cache) / (2 * shape.D * shape.H * dtype.itemsize))

    def make(*size):
        return (torch.randn(*size, device=device) * 0.02).to(dtype)
    H, D = shape.H, shape.D
    one = torch.tensor([0, H], dtype=torch.int32, device=device)
    return [kernel.Experts(make(H, D), make(H), make(H, D), make(D), one, 'relu')
            for _ in range(n)]

def dense_mlp(x, w_in, b_in, w_out, b_out, linear=F.linear):
    return linear(F.relu(linear(x, w_in, b_in)), w_out, b_out)

def dense_jobs(layers, x):
    """Everything torch offers for a dense ReLU MLP that works here."""
    def packed(w_in, b_in, w_out, b_out):   # oneDNN's own layout, made for this T
        reorder = torch.ops.mkldnn._reorder_linear_weight
        return reorder(w_in, len(x)), b_in, reorder(w_out.contiguous(), len(x)), b_out

    def wide(*weights):                     # without bf16 units, fp32 copies may be faster
        return [w.float() for w in weights]

    onednn, jobs = partial(dense_mlp, linear=kernel.onednn), {}
    ways = {'F.linear': (dense_mlp, None), 'compiled': (torch.compile(dense_mlp), None),
            'onednn packed': (onednn, packed), 'onednn': (onednn, None)}
    if x.dtype != torch.float32 and not x.is_cuda:
        ways['fp32 copies'] = lambda x, *w: dense_mlp(x.float(), *w).to(x.dtype), wide
    for name, (f, prepare) in ways.items():
        with contextlib.suppress(Exception):        # not in this build, for this dtype or device
            weights = [(m.w_in, m.b_in, m.w_out.t(), m.b_out) for m in layers]
            calls = [partial(f, x, *(prepare(*w) if prepare else w)) for w in weights]
            calls[0]()
            jobs[name] = calls
    return jobs

def routed(layers, x, masks, impl):
    """Experts of equal size by masks that are used in turn."""
    H, E = len(layers[0].w_in), masks[0].shape[1]
    offsets = torch.arange(0, H + 1, H // E, dtype=torch.int32, device=x.device)
    shares = [(mask, mask.float().mean().item()) for mask in masks]
    turns = zip(itertools.cycle(layers), itertools.cycle(shares))
    return [partial(kernel.experts, x, mask, m._replace(offsets=offsets), impl, share)
            for m, (mask, share) in itertools.islice(turns, len(layers) * len(masks))]

def layer_suite(o, device, shape):
    """T x expert size x rho x dtype: one MLP, dense and routed in turn; then whether time is linear
    in the experts executed."""
    shares, replay, rows = (0.1, 0.25, 0.5, 1.0), None, []
    if o.routing:
        replay, D, H = read_routing(o.routing)
        shape = shape._replace(D=D, H=H, sizes=(H // replay[0].shape[1],))
        shares = (statistics.mean(mask.float().mean().item() for mask in replay),)
    print('   T  size   rho  dtype     dense by             dense ms        ms  speedup '
          'with router  limit of limit')
    for dtype in (torch.float32, torch.bfloat16):
        layers = make_layers(shape, dtype, device)
        # bytes a second that the device reads: the sum of a tensor that no cache holds
        big = torch.ones(128 << 20, device=device)
        roof = dict(peak=0, bandwidth=big.nbytes / in_turn(dict(sum=[big.sum]), rounds=5)['sum'])
        for T in shape.tokens:
            cases = [('layer', s, rho) for s in shape.sizes for rho in shares]
            if not replay and T == shape.tokens[0] and dtype == torch.float32:
                cases += [('linearity', shape.sizes[0], i / 20) for i in (1, *range(2, 21, 2))]
            masks = {case: [torch.rand(T, shape.H // case[1], device=device) < case[2]
                            for _ in range(5)] for case in cases}
            if replay:
                masks = {cases[0]: [m.repeat(-(-T // len(m)), 1)[:T].to(device) for m in replay]}
            x = torch.randn(T, shape.D, device=device).to(dtype)
            rows += layer_rows(o, shape, layers, x, masks, roof)
        print(f'{str(dtype)[6:]}: peak {roof["peak"] / 1e9:.0f} GFLOP/s (the fastest dense), '
              f'{roof["bandwidth"] / 1e9:.0f} GB/s read\n', flush=True)
    reached = [r['of_limit'] for r in rows if r['dtype'] == 'float32' and r['rho'] <= 0.5]
    if reached:
        print(f'fp32, rho <= 0.5: median of_limit {statistics.median(reached):.2f}, '
              f'lowest {min(reached):.2f}')
    line = [r for r in rows if r['suite'] == 'linearity']
    if line:
        rho, times = zip(*((r['rho'], 1 / r['speedup']) for r in line))
        (slope, start), r2 = np.polyfit(rho, times, 1), float(np.corrcoef(rho, times)[0, 1] ** 2)
        for r in line:
            r['r2'] = r2
        print(f'T {line[0]["T"]}, experts of {line[0]["expert_size"]}: time = {start:.3f} + '
              f'{slope:.3f} rho of dense, R^2 = {r2:.4f}')
    return rows

def layer_rows(o, shape, layers, x, masks, roof):
    """The rows of some tokens by masks {(suite, s, rho): [mask]}, printed."""
    T, n, rows = len(x), max(1, min(len(layers), 768 // len(x))), []
    # what is 3 x slower is timed once only
    ways = dense_jobs(layers, x)
    dense = {name: timed(calls[0])[1] for name, calls in ways.items()}
    near = {name: ways[name] for name, t in dense.items() if t < 3 * min(dense.values())}
    dense |= in_turn(near, 4, 2, n)
    best = min(dense, key=dense.get)
    jobs = {case: routed(layers, x, some, o.impl) for case, some in masks.items()}
    jobs['dense'] = ways[best]
    for s in shape.sizes:
        mlp = layers[0]._replace(offsets=torch.arange(0, shape.H + 1, s))
        router = Router('norm', mlp, None, 128).to(x.device, x.dtype)
        router.rule, router.tau = 'dynk', 0.5
        jobs[s] = [partial(router, x)]
    times = in_turn(jobs, 7, 2, n)
    dense[best], flops = times['dense'], 4 * T * shape.D * shape.H
    base, roof['peak'] = dense[best], max(roof['peak'], flops / dense[best])
    for (suite, s, rho), some in masks.items():
        # experts that any token wants, x and y
        union = statistics.mean(m.any(0).float().mean().item() for m in some)
        moved = 2 * shape.D * x.itemsize * (shape.H * union + T)
        limit = base / max(flops * rho / roof['peak'], moved / roof['bandwidth'])
        seconds, router = times[suite, s, rho], times[s]
        speedup, with_router = base / seconds, base / (seconds + router)
        row = dict(suite=suite, T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                   dtype=str(x.dtype)[6:], impl=o.impl or 'auto', ms=1e3 * seconds,
                   router_ms=1e3 * router, dense_ms={k: 1e3 * t for k, t in dense.items()},
                   speedup=speedup, speedup_with_router=with_router, limit=limit,
                   of_limit=speedup / limit)
        rows.append(row)
        if suite == 'layer':
            print(f'{T:4d}{s:6d}{rho:6.2f}  {row["dtype"]:9s} {best:18s}{1e3 * base:10.3f}'
                  f'{row["ms"]:10.3f}{speedup:9.2f}{with_router:12.2f}{limit:9.2f}'
                  f'{row["of_limit"]:9.2f}', flush=True)
    return rows

def read_routing(path):
    """Masks, D and H of a trained model. BadInput if the file is none of train.py's."""
    try:
        data = torch.load(path, weights_only=True)
        masks, D, H = data['masks'], data['D'], data['H']
        if H % masks[0].shape[1]:
            raise ValueError(f'{H} neurons in {masks[0].shape[1]} experts of unequal size')
        return masks, D, H
    except Exception as error:
        raise BadInput(f'--routing={path}: not a file of masks as python train.py --phase=eval '
                       f'writes it ({reason(error)})') from None

def model_suite(o, device, shape):
    """A whole GPT-2, random weights, prefill or decode: dense against random routers whose top-k
    runs rho, and what Amdahl's law makes of the FFNs timed by themselves."""
    dense = Transformer(Config(
        n_layer=shape.n_layer, n_head=12, n_embd=shape.D, n_hidden=shape.H, block_size=1024,
        vocab_size=shape.vocab_size)).to(device).eval().requires_grad_(False)
    converted, (s, *_), rows = copy.deepcopy(dense), shape.sizes, []
    for mlp in converted.mlps():
        mlp.sort_neurons(torch.arange(shape.H, device=device), torch.arange(0, shape.H + 1, s))
    converted.add_routers('norm', 128)
    decode = o.suite == 'decode'
    idx = torch.randint(0, shape.vocab_size, (1, 16) if decode else shape.prefill, device=device)
    tokens, T = (32, 1) if decode else (idx.numel(), idx.numel())           # T of them at a time
    x = torch.randn(T, shape.D, device=device)

    def whole(m):
        return m.generate(idx, tokens, temperature=0) if decode else m(idx)

    def ffns(m):
        return [mlp(x) for mlp in m.ffns()]

    for rho in (0.1, 0.25, 0.5):
        converted.set_rule('topk', rho)
        for mlp in converted.mlps():
            mlp.router.rho = rho
        times = in_turn(dict(
            dense=[partial(whole, dense)], converted=[partial(whole, converted)],
            dense_ffns=[partial(ffns, dense)], ffns=[partial(ffns, converted)]), rounds=3)
        saved = tokens / T * (times['dense_ffns'] - times['ffns'])
        law = times['dense'] / (times['dense'] - saved)
        speedup = times['dense'] / times['converted']
        ours, theirs = tokens / times['converted'], tokens / times['dense']
        rows.append(dict(suite=o.suite, T=T, rho=rho, expert_size=s, dtype='float32',
                         tokens_per_s=ours, dense_tokens_per_s=theirs, speedup=speedup, limit=law,
                         of_limit=speedup / law))
        print(f'{o.suite}  rho {rho:4.2f}  dense {theirs:8.1f} tokens/s  converted {ours:8.1f}  '
              f'speedup {speedup:.2f}  Amdahl {law:.2f}  reached {speedup / law:.2f} of it',
              flush=True)
    return rows

def peers_suite(o, device, shape):
    """The layer by what one would pick instead; every token runs k = rho E, so that all can."""
    rows, layers = [], make_layers(shape, torch.float32, device)
    for T, s, rho in itertools.product((16, shape.tokens[0]), (shape.sizes[-1], shape.sizes[0]),
                                       (0.125, 0.25)):
        E, x = shape.H // s, torch.randn(T, shape.D, device=device)
        chosen = torch.rand(T, E, device=device).topk(max(1, round(rho * E))).indices   # (T, k)
        mask = torch.zeros(T, E, dtype=torch.bool, device=device).scatter_(1, chosen, True)
        ways = {'dense': [partial(kernel.experts, x, None, m) for m in layers],
                'd2dmoe': routed(layers, x, [mask], o.impl),
                'loop': routed(layers, x, [mask], 'torch'), **peers(layers, x, s, chosen)}
        want, jobs = ways['d2dmoe'][0](), {}
        for name, calls in ways.items():
            try:
                same = torch.allclose(calls[0](), want, atol=1e-3)
            except Exception as error:
                print(f'{name}: not here ({reason(error)})')
                continue
            if not same and name not in ('dense', 'transformers (gated)'):
                raise RuntimeError(f'{name} computes something else')
            jobs[name] = calls
        times = in_turn(jobs, rounds=4, n=max(1, min(len(layers), 768 // T)))
        rows += [dict(suite='peers', T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                      dtype='float32', impl=name, ms=1e3 * t, speedup=times['dense'] / t)
                 for name, t in times.items()]
        print(f'T {T:5d} size {s:4d} rho {rho:5.3f}   ' + '   '.join(
            f'{name} {times["dense"] / t:.2f}' for name, t in times.items()), flush=True)
    return rows

def peers(layers, x, s, chosen):
    """The routed layer as others write it."""
    (T, k), E = chosen.shape, len(layers[0].w_in) // s
    expert, order = chosen.flatten().sort(stable=True)           # (T k): the pairs by expert
    rows, counts = order // k, expert.bincount(minlength=E)
    ends = counts.cumsum(0).to(torch.int32)
    slot = torch.arange(T * k, device=x.device) - (ends - counts)[expert]

    def padded_bmm(w_in, b_in, w_out):      # every expert as long as the longest
        xs = x.new_zeros(E, int(counts.max()), x.shape[1])
        xs[expert, slot] = x[rows]
        h = F.relu(torch.baddbmm(b_in[:, None], xs, w_in))
        return (h @ w_out)[expert, slot]

    def grouped_mm(w_in, b_in, w_out):
        h = F.relu(torch._grouped_mm(x[rows], w_in, offs=ends) + b_in[expert])
        return torch._grouped_mm(h, w_out, offs=ends)

    def layer(f, m):
        pairs = f(m.w_in.view(E, s, -1).mT, m.b_in.view(E, s), m.w_out.view(E, s, -1))
        return m.b_out.repeat(T, 1).index_add_(0, rows, pairs)

    jobs = {'padded bmm': [partial(layer, padded_bmm, m) for m in layers],
            'grouped mm': [partial(layer, grouped_mm, m) for m in layers]}
    # three matrices an expert, and its own router
    with contextlib.suppress(ImportError):
        from transformers.models.mixtral import modeling_mixtral as mixtral
        block = mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(
            hidden_size=x.shape[1], intermediate_size=s, num_local_experts=E,
            num_experts_per_tok=k)).to(x.device).eval()
        for p in block.parameters():
            p.normal_(std=0.02)
        jobs['transformers (gated)'] = [partial(block, x[None])]
    return jobs

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
    add('--routing', metavar='FILE', help="masks of a model to replay (train.py's routing.pt)")
    add('--json', metavar='FILE', help='write a JSON line for each row')
    add('--plot', metavar='FILE.png', help='draw the layer suite')
    return parser

def run(o, shape=Shape()):
    """Run one suite; what cannot work is refused before the measurement, not after it."""
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if o.impl == 'cpp' and not kernel.have_cpp():
        raise BadInput('--impl=cpp needs a C++ compiler; the warning above says what failed')
    if o.impl == 'triton' and (kernel.triton is None or device == 'cpu'):
        raise BadInput('--impl=triton needs triton and a GPU; leave it out to use what is here')
    if o.plot:
        pyplot()
    for path in filter(None, (o.json, o.plot)):
        if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
            raise BadInput(f'{path}: its folder is not there or cannot be written')
    print(' · '.join(f'{k} {v}' for k, v in machine().items() if v) + '\n', flush=True)
    with torch.inference_mode():
        rows = SUITES[o.suite](o, device, shape)
    if o.json:
        Path(o.json).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    if o.plot and o.suite == 'layer':
        plot_layers(rows, o.plot)
    return rows

if __name__ == '__main__':
    import train
    o = options().parse_args()
    given = [arg for arg in sys.argv[1:] if arg.startswith('-')]
    if o.checkpoints and given:
        options().error(f'{given[0]} is of a suite: leave it out beside checkpoints')
    if o.checkpoints:
        train.guarded(lambda: train.evaluation({}, o.checkpoints))
    else:
        train.guarded(lambda: run(o))
