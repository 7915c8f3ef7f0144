"""Measure: what a conversion costs in loss and saves in time, against the fastest dense model.

    python bench.py                             one MLP of GPT-2's size, routed against dense
    python bench.py --suite=decode              a whole GPT-2; also model, peers
    python bench.py out/d2dmoe.pt other.pt      loss, FLOPs and time of any checkpoints
    python bench.py --help

Every speedup is a ratio of times taken in turn within one run, against the fastest dense MLP or the
dense model. Times are medians.

    T tokens · D n_embd · H hidden neurons · E experts · s neurons in an expert
    rho share of neurons run
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import kernel
from model import (BadInput, Config, Masks, Transformer, build, cross_entropy, file_hash, n_tokens,
                   read_checkpoint, reason, write_atomically)
from router import GRID, ROUTERS, Router
from sparsify import statistics as sparsity_statistics


# -------------------------------------------------------------------------------------- measuring

def machine():
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.isfile('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            lines = f.read().splitlines()
        cpu = next((x.split(':')[1].strip() for x in lines if x.startswith('model name')), cpu)
        flags = next((x for x in lines if x.startswith('flags')), '').split()
        known = [x for x in ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16') if x in flags]
        cpu = ' '.join([cpu, *known])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(gpu=gpu, cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__,
                triton=getattr(kernel.triton, '__version__', None),
                python=platform.python_version())


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def timed(job):
    """(what the job returns, seconds)."""
    start = time.perf_counter()
    out = job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return out, time.perf_counter() - start


def in_turn(jobs, rounds, warmup=1):
    """{name: job} -> {name: median seconds}; all run in turn, so that a slow moment hits all."""
    times = {name: [] for name in jobs}
    for i in range(warmup + rounds):
        for name, job in jobs.items():
            seconds = timed(job)[1]
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


# -------------------------------------------------------------------------------------- checkpoints

class Entry(NamedTuple):
    """A checkpoint that is to be measured."""
    path: str
    hash: str
    data: dict
    kind: str                               # of its routers; '' = none

    @property
    def method(self):
        phase = self.data['phase']
        return {'sparsify': 'sparse', 'router': 'd2dmoe'}.get(phase, phase)


def entries(found, paths=()):
    """The checkpoints to measure, dense and sparse first. Of a folder's {path: checkpoint}: every
    finished one with routers, and what nothing else was made from; or those in `paths`, each by
    what it says of itself. BadInput if there is no dense one to compare with."""
    hashes = {path: file_hash(path) for path in found}
    made_from = {data['parent'] for data in found.values()}

    def stands(path):
        """Is it finished, and is all that it was made from here?"""
        if found[path]['step'] < found[path]['steps']:
            return False
        parent = found[path]['parent']
        source = next((p for p in found if hashes[p] == parent), None)
        return parent is None or source is not None and stands(source)

    chosen = {'dense': None, 'sparsify': None}
    for path, data in found.items():
        phase, config = data['phase'], data['config']
        leaf = hashes[path] not in made_from and not config['n_experts']
        if not stands(path):
            print(f'{path} is not measured: unfinished, or made from a checkpoint that is no '
                  'longer here; python train.py --overwrite=1 makes it again')
        elif phase in chosen or not paths and (config['router_loss'] or leaf):
            chosen[phase if phase in chosen else path] = Entry(path, hashes[path], data,
                                                              config['router_loss'])
    for path in paths:
        data = read_checkpoint(path)
        data = dict(phase=os.path.basename(path), parent=None, options={}, data={}) | data
        if path not in (e.path for e in chosen.values() if e):
            chosen[path] = Entry(path, file_hash(path), data, data['config']['router_loss'])
    missing = [phase for phase in ('dense', 'sparsify') if chosen[phase] is None]
    if missing:
        raise BadInput(f'there is no finished checkpoint of phase {missing[0]} to compare with: '
                       'make it with python train.py')
    return list(chosen.values())


def jobs_of(entries, o):
    """[(entry, kind, rule, tau)]: what to measure. Routers with a rule of their own run with
    top-k, too: it is the control. The oracle replaces the first converted one's routers."""
    jobs = []
    for e in entries:
        if not e.kind:
            jobs.append((e, '', '', None))
    routed = [e for e in entries if e.kind]
    for e, kind in [(e, e.kind) for e in routed] + [(e, 'oracle') for e in routed[:1]]:
        for rule in dict.fromkeys([o.rule] if o.rule else [ROUTERS[kind].rule, 'topk']):
            jobs += [(e, kind, rule, tau) for tau in (GRID[rule] if o.tau is None else [o.tau])]
    return jobs


def classification(predicted, labels):
    """Accuracy, and F1 averaged over the classes that occur: predicted and labels (n,)."""
    scores = []
    for c in set(predicted.tolist()) | set(labels.tolist()):
        hits = ((predicted == c) & (labels == c)).sum().item()
        scores.append(2 * hits / ((predicted == c).sum() + (labels == c).sum()).item())
    return (predicted == labels).float().mean().item(), statistics.mean(scores)


@torch.inference_mode()
def measure(model, dense, batches):
    """A model on its fast path: of every batch its loss (n,), tokens (n,), the share of neurons
    run in each MLP (n, MLPs), what was predicted; and (seconds, dense's seconds) of some."""
    losses, shares, predicted, times = [], [], [], []
    mlps, stride = model.mlps(), max(1, len(batches) // 8)

    def run(m, inputs):
        masks = Masks()
        return m(**inputs, tap=masks), masks

    def rho(masks):
        sizes = [mlp.offsets.diff().float() / len(mlp.w_in) for mlp in mlps]
        return [1.0 if mask is None else (mask.float().mean(0) @ size).item()
                for mask, size in zip(masks, sizes)]

    for mlp, share in zip(mlps, rho(run(model, batches[0][0])[1])):
        if mlp.router is not None:          # a GPU sizes its grid by it
            mlp.router.rho = share
    for i, (inputs, targets) in enumerate(batches):
        (logits, masks), seconds = timed(lambda: run(model, inputs))
        if i % stride == 0:
            times.append((seconds, timed(lambda: run(dense, inputs))[1]))
        losses.append(cross_entropy(logits, targets))
        predicted.append(logits.argmax(-1) if model.config.head == 'cls' else None)
        shares.append(rho(masks))
    tokens = torch.tensor([n_tokens(inputs) for inputs, _ in batches])
    return torch.stack(losses).cpu(), tokens, torch.tensor(shares), predicted, times, stride


def row_of(model, dense, batches):
    """What the table says of a model. Every second batch is reported, the others are there to pick
    tau by (`loss_pick`, `accuracy_pick`). FLOPs are those of the mean length, padding left out."""
    losses, tokens, shares, predicted, times, stride = measure(model, dense, batches)
    report = slice(1, None, 2) if len(batches) > 1 else slice(None)
    timed_tokens, tokens = tokens[::stride].sum().item(), tokens[report]
    rho = ((tokens[:, None] * shares[report]).sum(0) / tokens.sum()).tolist()
    seq_len = tokens.sum().item() / sum(len(targets) for _, targets in batches[report])
    routed = model.config.rule != ''
    cost, whole = model.flops(seq_len, rho if routed else None), dense.flops(seq_len)['total']
    row = dict(
        k=max(1, round(model.config.tau * (len(model.ffns()[0].offsets) - 1)))
        if model.config.rule == 'topk' else None,
        experts=float(np.average(rho, weights=[len(mlp.w_in) for mlp in model.mlps()])),
        flops=cost['total'] / whole, router_flops=cost['router'] / whole,
        loss=losses[report].mean().item(), loss_pick=losses[::2].mean().item(), metric='loss',
        accuracy=None, macro_f1=None, tokens=tokens.sum().item(), experts_per_layer=rho,
        ms_per_1k_tokens=1e6 * sum(seconds for seconds, _ in times) / timed_tokens,
        speedup=statistics.median(base / seconds for seconds, base in times))
    if model.config.head == 'cls':
        labels = [targets for _, targets in batches]
        (accuracy, f1), (pick, _) = (
            classification(torch.cat(predicted[part]), torch.cat(labels[part]))
            for part in (report, slice(None, None, 2)))
        row |= dict(metric='accuracy', accuracy=accuracy, macro_f1=f1, accuracy_pick=pick)
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


def evaluate(entries, batches, o, settings, folder, device):
    """Measure what results.json does not know yet (by checkpoint, rule, tau and floor), print the
    table, draw it. Rows of a checkpoint that is gone go; Ctrl-C keeps those that are done."""
    path = os.path.join(folder, 'results.json')
    settings = settings | dict(dense=entries[0].hash)
    old, jobs, hashes = read_results(folder), jobs_of(entries, o), {e.hash for e in entries}
    # what was measured with other settings is kept beside it
    if old and old['settings'] != settings:
        os.replace(path, path.replace('.json', f'-{file_hash(path)[:6]}.json'))
        old = {}
    found = {(r['checkpoint'], r['router_loss'], r['rule'], r['tau'], r['floor']): r
             for r in old.get('rows', ()) if r['checkpoint'] in hashes}
    dense, model, loaded = build(entries[0].data, entries[0].path).to(device), None, None
    began = said = time.time()
    results = dict(config=vars(o), data=entries[0].data['data'], machine=machine(),
                   settings=settings, rows=[], activity=None)
    if any(key[0] == entries[1].hash for key in found):
        results['activity'] = old['activity']
    try:
        for i, (e, kind, rule, tau) in enumerate(jobs):
            floor = o.floor if rule == 'dynk' else None
            key = e.hash, kind or None, rule or None, tau, floor
            if key not in found:
                if loaded != (e.hash, kind):
                    model, loaded = build(e.data, e.path).to(device), (e.hash, kind)
                    if kind == 'oracle':
                        model.add_routers('oracle', 0)
                model.set_rule(rule, tau or 0.0, floor or 0.0)
                row = row_of(model, dense, batches)
                if kind == 'oracle':        # a ceiling: it costs nothing, and cannot be timed
                    row |= dict(ms_per_1k_tokens=None, speedup=None)
                found[key] = dict(method=e.method, router_loss=kind or None, rule=rule or None,
                                  tau=tau, floor=floor, checkpoint=e.hash, file=e.path, **row,
                                  split=e.data['options'].get('split'), seed=o.seed)
            found[key]['file'] = e.path     # it may have moved since
            if time.time() - said > 10:
                said, left = time.time(), (time.time() - began) / (i + 1) * (len(jobs) - i - 1)
                print(f'eval     {i + 1}/{len(jobs)}  {clock(left)} left', flush=True)
        if results['activity'] is None:
            sparse = build(entries[1].data, entries[1].path).to(device)
            results['activity'] = activity(sparse, batches[::4])
    finally:
        order = {(e.hash, kind or None): i for i, (e, kind, _, _) in enumerate(jobs)}
        rows = sorted(found.values(), key=lambda r: (
            order.get((r['checkpoint'], r['router_loss']), len(order)), r['rule'] == 'topk',
            r['rule'] or '', r['tau'] or 0))
        for row in rows:
            row['delta'] = row['loss'] / rows[0]['loss'] - 1
        results['rows'] = rows
        write_json(path, results)
    report(entries, results, batches, folder)
    return results


def write_json(path, content):
    def write(temporary):
        with open(temporary, 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=1)
    write_atomically(path, write)


# -------------------------------------------------------------------------------------- tables

def report(entries, results, batches, folder):
    """The table and what follows from it, its picture, and masks for --routing."""
    rows = results['rows']
    print_rows(rows)
    print(f'\nsparse: loss {rows[1]["delta"]:+.2%} against dense')
    sparse = build(entries[1].data)
    for what, ours in (('FFNs', True), ('projections', False)):
        some = np.array([a for a, mlp in zip(results['activity'], sparse.mlps())
                         if any(mlp is ffn for ffn in sparse.ffns()) == ours])
        if len(some) and (sparse.config.activation == 'relu' or not ours):
            print(f'zeros among the hidden activations of the sparse {what}: '
                  f'{some[:, 0].mean():.1%} ({" ".join(f"{z:.0%}" for z in some[:, 0])})')
        elif len(some):                     # GELU has next to none
            print(f'hidden activations of the sparse {what} below 1/10, 1/100, 1/1000 of the '
                  'token\'s largest: ' + ', '.join(f'{z:.1%}' for z in some[:, 1:].mean(0)))
    print_choice(rows)
    best = next((r for r in picked(rows).values() if r['router_loss'] != 'oracle'), None)
    if best:
        entry = next(e for e in entries if e.hash == best['checkpoint'])
        model, masks = build(entry.data), Masks()
        model.set_rule(best['rule'], best['tau'], best['floor'] or 0.0)
        with torch.no_grad():
            model.encode(**{k: t.cpu() for k, t in batches[0][0].items()}, tap=masks)
        facts = dict(D=model.config.n_embd, H=model.config.n_hidden, masks=[
            mask for mask, mlp in zip(masks, model.mlps())
            if any(mlp is ffn for ffn in model.ffns())])
        write_atomically(os.path.join(folder, 'routing.pt'), lambda t: torch.save(facts, t))
    print(f'\n{os.path.join(folder, "results.json")} has every row'
          + plot_rows(rows, os.path.join(folder, 'results.png')))


def setting(r):
    """What a row's tau column says."""
    if r['rule'] is None:
        return '-'
    return f'top-{r["k"]}' if r['rule'] == 'topk' else f'{r["tau"]:g}'


def print_rows(rows):
    labelled = rows[0]['metric'] == 'accuracy'
    print(f'\n{"method":8s}{"router":>8s}{"tau":>10s}{"experts":>9s}{"FLOPs":>8s}{"loss":>9s}'
          f'{"vs dense":>10s}{"ms/1k tok":>11s}{"speedup":>9s}'
          + (f'{"accuracy":>10s}{"macro-F1":>10s}' if labelled else ''))
    for r in rows:
        timing = f'{"-":>11s}{"-":>9s}'
        if r['speedup'] is not None:
            timing = f'{r["ms_per_1k_tokens"]:11.2f}{r["speedup"]:9.2f}'
        print(f'{r["method"]:8s}{r["router_loss"] or "-":>8s}{setting(r):>10s}{r["experts"]:9.1%}'
              f'{r["flops"]:8.1%}{r["loss"]:9.4f}{r["delta"]:+10.2%}{timing}'
              + (f'{r["accuracy"]:10.2%}{r["macro_f1"]:10.2%}' if labelled else ''))


def print_choice(rows):
    metric = rows[0]['metric']
    print(f'cheapest tau whose {metric} is within 1 % of dense, picked on one half of the held-out '
          'set, reported on the other:')
    choice = picked(rows)
    for (name, rule), r in choice.items():
        print(f'  {name:8s}{rule:10s} {"" if rule == "topk" else "tau "}{setting(r):8s} '
              f'{r["flops"]:6.1%} of the FLOPs, loss {r["delta"]:+.2%}'
              + (f', accuracy {r["accuracy"]:.2%} (dense {rows[0]["accuracy"]:.2%})'
                 if metric == 'accuracy' else '')
              + (f', {r["speedup"]:.2f} x dense' if r['speedup'] else ''))
    if not choice:
        print(f'  none; the sparse model with every expert on: loss {rows[1]["delta"]:+.2%}')
    for (name, rule), curve in curves(rows).items():
        control = curves(rows).get((name, 'topk'), ())
        if rule != 'topk' and len(control) > 1:
            gap = flops_gap(curve, control)
            if gap:
                print(f'  {name:8s}{rule} against top-k at equal FLOPs: loss {np.mean(gap):+.2%} '
                      f'on average, {max(gap):+.2%} at worst, over {len(gap)} points')


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
    rows, names = [], ('experts', 'flops', 'delta', 'speedup', 'accuracy')
    groups = {}
    for result in results:
        for r in result['rows']:
            key = r['method'], r['router_loss'], r['rule'], r['tau']
            groups.setdefault(key, []).append(r)
    print(f'\n{len(results)} seeds: mean and half of the spread (largest - smallest)')
    print(f'{"method":8s}{"router":>8s}{"tau":>10s}{"experts":>16s}{"FLOPs":>16s}{"vs dense":>16s}'
          f'{"speedup":>16s}{"accuracy":>16s}')
    for (method, kind, rule, tau), group in groups.items():
        row = dict(method=method, router_loss=kind, rule=rule, tau=tau, k=group[0]['k'])
        text = ''
        for name in names:
            values = [r[name] for r in group if r[name] is not None]
            mean = statistics.mean(values) if values else None
            half = (max(values) - min(values)) / 2 if values else None
            row |= {name: mean, f'{name}_half': half, 'seeds': len(group)}
            form = '.2f' if name == 'speedup' else '.2%'
            text += f'{f"{mean:{form}} ± {half:{form}}" if values else "-":>16s}'
        rows.append(row)
        print(f'{method:8s}{kind or "-":>8s}{setting(row):>10s}{text}')
    write_json(path, dict(machine=machine(), seeds=[r['config']['seed'] for r in results],
                          rows=rows))
    print(f'\n{path} has every row')


# -------------------------------------------------------------------------------------- pictures

def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise BadInput('pictures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(figure, axes, path):
    axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches='tight')


def plot_rows(rows, path):
    """Loss or accuracy against FLOPs, a line for each router and rule. Returns what to say."""
    with contextlib.suppress(OSError):      # never a stale one
        os.remove(path)
    try:
        plt = pyplot()
    except BadInput as error:
        return f'; {error}'
    metric, zero = rows[0]['metric'], rows[0]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    # what is far off would squeeze the rest onto zero
    limit = 6 if metric == 'loss' else 8
    for (name, rule), curve in curves(rows).items():
        points = [(100 * r['flops'], 100 * (r[metric] / zero[metric] - 1)) for r in curve]
        near = [point for point in points if abs(point[1]) <= limit]
        style = ':' if name == 'oracle' else '--' if rule == 'topk' else '-'
        if near:
            axes.plot(*zip(*near), ls=style, marker='o', ms=3, label=f'{name}, {rule}')
    axes.axhline(0, color='black', lw=0.8, label='dense')
    axes.axhline(100 * (rows[1][metric] / zero[metric] - 1), color='grey', lw=0.8, ls=':',
                 label='sparse, all experts on')
    axes.set(xlabel='FLOPs of the whole model, routers included (% of dense)',
             ylabel=f'{metric} against dense (%)')
    save_figure(figure, axes, path)
    plt.close(figure)
    return f'; {path} shows it'


def plot_layers(rows, path):
    """Time against executed experts, dense as a line."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    lines = {}
    for r in rows:
        if r['suite'] == 'layer' and r['dtype'] == 'float32':
            lines.setdefault((r['T'], r['expert_size']), []).append(r)
    sizes = {s for _, s in lines}
    for (T, s), line in sorted(lines.items()):
        if s in (min(sizes), max(sizes)):
            axes.plot([r['rho'] for r in line], [1 / r['speedup'] for r in line], marker='o', ms=3,
                      ls='-' if s == min(sizes) else '--', label=f'T {T}, experts of {s}')
    axes.axhline(1, color='black', lw=0.8, label='the fastest dense')
    axes.plot([0, 1], [0, 1], color='grey', lw=0.8, ls=':', label='proportional')
    axes.set(xlabel='share of neurons run', ylabel='time (1 = dense)', xlim=(0, 1.02), ylim=(0))
    save_figure(figure, axes, path)
    plt.close(figure)


# -------------------------------------------------------------------------------------- one layer

class Layers(list):
    """Tensors of several layers, used in turn for ever."""

    def __getitem__(self, i):
        return super().__getitem__(i % len(self))


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
    return Layers(kernel.Experts(make(H, D), make(H), make(H, D), make(D), one, 'relu')
                  for _ in range(n))


def dense_candidates(layers, dtype):
    """Everything torch offers for a dense ReLU MLP here: {name: function of (x, layer)}."""
    def mlp(linear, x, m):
        return linear(F.relu(linear(x, m.w_in, m.b_in)), m.w_out.t(), m.b_out)

    compiled = torch.compile(lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)),
                                                                w2.t(), b2))
    out = {'F.linear': lambda x, i: mlp(F.linear, x, layers[i]),
           'compiled': lambda x, i: compiled(x, *layers[i][:4])}
    if layers[0].w_in.is_cuda:
        return out
    packed = {}

    def prepacked(x, i):                    # oneDNN's own layout, made for this T
        if packed.setdefault('T', len(x)) != len(x):
            packed.clear()
        m, reorder = layers[i], torch.ops.mkldnn._reorder_linear_weight
        if i % len(layers) not in packed:
            packed[i % len(layers)] = [reorder(m.w_in, len(x)),
                                       reorder(m.w_out.t().contiguous(), len(x))]
        w_in, w_out = packed[i % len(layers)]
        return kernel.onednn(F.relu(kernel.onednn(x, w_in, m.b_in)), w_out, m.b_out)

    out |= {'onednn packed': prepacked, 'onednn': lambda x, i: mlp(kernel.onednn, x, layers[i])}
    if dtype != torch.float32:              # without bf16 units, fp32 copies may be faster
        wide = Layers(kernel.Experts(*(t.float() for t in m[:4]), *m[4:]) for m in layers)
        out['fp32 copies'] = lambda x, i: mlp(F.linear, x.float(), wide[i]).to(dtype)
    return out


def over_layers(f, x, n):
    """A job that runs f on the next n of all layers."""
    position = itertools.count(0, n)

    def job():
        start = next(position)
        for i in range(start, start + n):
            f(x, i)
    return job


def time_dense(candidates, x, n):
    """{name: seconds a layer}. What fails here is left out, what is 3 x slower timed once only."""
    once = {}
    for name, f in candidates.items():
        try:
            f(x, 0)
            once[name] = timed(lambda: f(x, 1))[1]
        except Exception:                   # not in this build, or not for this dtype
            continue
    near = {name: over_layers(candidates[name], x, n) for name in once
            if once[name] < 3 * min(once.values())}
    return once | {name: t / n for name, t in in_turn(near, 4, 2).items()}


def routed(impl, layers, s, masks):
    """One routed layer as a function of (x, layer); the masks are used in turn."""
    H, device = len(layers[0].w_in), layers[0].w_in.device
    edges = torch.arange(0, H + s, s, dtype=torch.int32, device=device).clamp_max(H)
    cut, masks = Layers(m._replace(offsets=edges) for m in layers), Layers(masks)
    shares = Layers(m.float().mean().item() for m in masks)
    return lambda x, i: kernel.experts(x, masks[i], cut[i], impl=impl, rho=shares[i])


def bernoulli(T, E, rho, device, n=5):
    return [torch.rand(T, E, device=device) < rho for _ in range(n)]


def measured_bandwidth(device):
    """Bytes a second that the device reads: the sum of a tensor that no cache holds."""
    big = torch.ones(128 << 20, device=device)                   # 512 MB
    return big.nbytes / in_turn(dict(sum=big.sum), rounds=5)['sum']


def layer_suite(o, device, shape):
    """T x expert size x rho x dtype: one MLP, dense and routed in turn."""
    shares, replay, rows = (0.1, 0.25, 0.5, 1.0), None, []
    if o.routing:
        replay, D, H = read_routing(o.routing)
        shape = shape._replace(D=D, H=H, sizes=(H // replay[0].shape[1],))
        shares = (statistics.mean(m.float().mean().item() for m in replay),)
    print('   T  size   rho  dtype     dense by             dense ms        ms  speedup '
          'with router  limit of limit')
    for dtype in (torch.float32, torch.bfloat16):
        layers, peak = make_layers(shape, dtype, device), 0.0
        bandwidth, candidates = measured_bandwidth(device), dense_candidates(layers, dtype)
        for T in shape.tokens:
            x = torch.randn(T, shape.D, device=device).to(dtype)
            n = len(layers) if T <= 16 else min(len(layers), 3) if T <= 256 else 1
            dense = time_dense(candidates, x, n)
            best = min(dense, key=dense.get)
            masks = {(s, rho): [m.repeat(-(-T // len(m)), 1)[:T].to(device) for m in replay]
                     if replay else bernoulli(T, shape.H // s, rho, device)
                     for s in shape.sizes for rho in shares}
            jobs = {'dense': over_layers(candidates[best], x, n)}
            jobs |= {case: over_layers(routed(o.impl, layers, case[0], masks[case]), x, n)
                     for case in masks}
            jobs |= {s: over_layers(random_router(layers[0], s), x, n) for s in shape.sizes}
            times = {name: t / n for name, t in in_turn(jobs, rounds=7, warmup=2).items()}
            dense[best], flops = times['dense'], 4 * T * shape.D * shape.H
            peak = max(peak, flops / dense[best])
            for (s, rho), some in masks.items():
                # experts that any token wants, x and y
                union = statistics.mean(m.any(0).float().mean().item() for m in some)
                moved = 2 * shape.D * dtype.itemsize * (shape.H * union + T)
                limit = dense[best] / max(flops * rho / peak, moved / bandwidth)
                rows.append(layer_row(o, shape, T, s, rho, dtype, times, dense, limit))
        print(f'{str(dtype)[6:]}: peak {peak / 1e9:.0f} GFLOP/s (the fastest dense), '
              f'{bandwidth / 1e9:.0f} GB/s read\n', flush=True)
    fp32 = [r['of_limit'] for r in rows if r['dtype'] == 'float32' and r['rho'] <= 0.5]
    if fp32:
        print(f'fp32, rho <= 0.5: median of_limit {statistics.median(fp32):.2f}, '
              f'lowest {min(fp32):.2f}')
    return rows + ([] if o.routing else linearity(o, device, shape))


def random_router(m, s):
    """A router of width 128 and its rule as a function of (x, layer)."""
    edges = torch.arange(0, len(m.w_in) + s, s, dtype=torch.int32, device=m.w_in.device)
    mlp = argparse.Namespace(w_in=m.w_in, offsets=edges.clamp_max(len(m.w_in)))
    router = Router('norm', mlp, None, 128).to(m.w_in.device, m.w_in.dtype).requires_grad_(False)
    router.rule, router.tau = 'dynk', 0.5
    return lambda x, i: router(x)


def layer_row(o, shape, T, s, rho, dtype, times, dense, limit):
    """The row of one case, printed."""
    base, seconds, router = times['dense'], times[s, rho], times[s]
    best = min(dense, key=dense.get)
    row = dict(suite='layer', T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
               dtype=str(dtype)[6:], impl=o.impl or 'auto', ms=1e3 * seconds,
               router_ms=1e3 * router, dense_ms={name: 1e3 * t for name, t in dense.items()},
               speedup=base / seconds, speedup_with_router=base / (seconds + router),
               limit=limit, of_limit=base / seconds / limit)
    print(f'{T:4d}{s:6d}{rho:6.2f}  {row["dtype"]:9s} {best:18s}{1e3 * base:10.3f}'
          f'{row["ms"]:10.3f}{row["speedup"]:9.2f}{row["speedup_with_router"]:12.2f}'
          f'{limit:9.2f}{row["of_limit"]:9.2f}', flush=True)
    return row


def linearity(o, device, shape):
    """Is time linear in the experts executed? One row for each rho, R^2 of the fitted line."""
    T, s, layers = shape.tokens[0], shape.sizes[0], make_layers(shape, torch.float32, device)
    x, shares = torch.randn(T, shape.D, device=device), [0.05, *(i / 10 for i in range(1, 11))]
    jobs = {'dense': over_layers(lambda x, i: kernel.experts(x, None, layers[i]), x, 1)}
    for rho in shares:
        masks = bernoulli(T, shape.H // s, rho, device)
        jobs[rho] = over_layers(routed(o.impl, layers, s, masks), x, 1)
    times = in_turn(jobs, rounds=5)
    base, line = times['dense'], [times[rho] for rho in shares]
    slope, start = np.polyfit(shares, line, 1)
    r2 = float(np.corrcoef(shares, line)[0, 1] ** 2)
    print(f'T {T}, experts of {s}: time = {start / base:.3f} + {slope / base:.3f} rho of dense, '
          f'R^2 = {r2:.4f}')
    return [dict(suite='linearity', T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                 dtype='float32', impl=o.impl or 'auto', ms=1e3 * t,
                 dense_ms=dict(linear=1e3 * base), speedup=base / t, r2=r2)
            for rho, t in zip(shares, line)]


def read_routing(path):
    try:
        data = torch.load(path, weights_only=True)
        masks, D, H = data['masks'], data['D'], data['H']
        if H % masks[0].shape[1]:
            raise ValueError(f'{H} neurons in {masks[0].shape[1]} experts of unequal size')
        return masks, D, H
    except Exception as error:
        raise BadInput(f'--routing={path}: not a file of masks as python train.py --phase=eval '
                       f'writes it ({reason(error)})') from None


# -------------------------------------------------------------------------------------- models

def gpt2_pair(device, rho, shape):
    """GPT-2's sizes, random weights, dense and converted: random routers whose top-k runs rho."""
    s, config = shape.sizes[0], dict(
        n_layer=shape.n_layer, n_head=12, n_embd=shape.D, n_hidden=shape.H, block_size=1024,
        vocab_size=shape.vocab_size)
    dense = Transformer(Config(**config)).to(device).eval().requires_grad_(False)
    converted = Transformer(Config(**config)).to(device).eval().requires_grad_(False)
    converted.load_state_dict(dense.state_dict())
    for mlp in converted.mlps():
        mlp.sort_neurons(torch.arange(shape.H, device=device), torch.arange(0, shape.H + s, s))
    converted.add_routers('norm', 128)
    converted.requires_grad_(False).set_rule('topk', rho)
    for mlp in converted.mlps():
        mlp.router.rho = rho
    return dense, converted


def whole_model(device, name, run, tokens, T, shape):
    """Dense against converted, and what Amdahl's law makes of the FFNs timed by themselves."""
    rows = []
    for rho in (0.1, 0.25, 0.5):
        dense, converted = gpt2_pair(device, rho, shape)
        x = torch.randn(T, shape.D, device=device)
        times = in_turn(dict(
            dense=lambda: run(dense), converted=lambda: run(converted),
            dense_ffns=lambda: [mlp(x) for mlp in dense.ffns()],
            ffns=lambda: [mlp(x) for mlp in converted.ffns()]), rounds=3)
        calls = tokens / T if name == 'decode' else 1            # the FFNs run once a token there
        saved = calls * (times['dense_ffns'] - times['ffns'])
        law = times['dense'] / (times['dense'] - saved)
        speedup = times['dense'] / times['converted']
        rows.append(dict(suite=name, T=T, rho=rho, expert_size=shape.sizes[0], dtype='float32',
                         tokens_per_s=tokens / times['converted'],
                         dense_tokens_per_s=tokens / times['dense'], speedup=speedup, limit=law,
                         of_limit=speedup / law))
        print(f'{name}  rho {rho:4.2f}  dense {tokens / times["dense"]:8.1f} tokens/s  converted '
              f'{tokens / times["converted"]:8.1f}  speedup {speedup:.2f}  Amdahl {law:.2f}  '
              f'reached {speedup / law:.2f} of it', flush=True)
    return rows


def model_suite(o, device, shape):
    idx = torch.randint(0, shape.vocab_size, shape.prefill, device=device)
    n = idx.numel()
    return whole_model(device, 'model', lambda m: m(idx), n, n, shape)


def decode_suite(o, device, shape):
    idx, n = torch.randint(0, shape.vocab_size, (1, 16), device=device), 32
    return whole_model(device, 'decode', lambda m: m.generate(idx, n, temperature=0), n, 1, shape)


# -------------------------------------------------------------------------------------- peers

def peers_suite(o, device, shape):
    """The layer by what one would pick instead; every token runs k = rho E, so that all can."""
    rows, layers = [], make_layers(shape, torch.float32, device)
    cases = itertools.product((16, shape.tokens[0]), (shape.sizes[-1], shape.sizes[0]),
                              (0.125, 0.25))
    for T, s, rho in cases:
        E, x = shape.H // s, torch.randn(T, shape.D, device=device)
        chosen = torch.rand(T, E, device=device).topk(max(1, round(rho * E))).indices   # (T, k)
        mask = torch.zeros(T, E, dtype=torch.bool, device=device).scatter_(1, chosen, True)
        jobs = {'dense': lambda x, i: kernel.experts(x, None, layers[i]),
                'd2dmoe': routed(o.impl, layers, s, [mask])} | peers(layers, E, s, mask, chosen)
        n = len(layers) if T <= 16 else 1
        want = jobs['d2dmoe'](x, 0)
        for name in list(jobs):
            try:
                got = jobs[name](x, 0)
            except Exception as error:
                print(f'{name}: not here ({reason(error)})')
                del jobs[name]
                continue
            same = torch.allclose(got, want, atol=1e-3)
            if not same and name not in ('dense', 'transformers (gated)'):
                raise RuntimeError(f'{name} computes something else')
        times = in_turn({name: over_layers(f, x, n) for name, f in jobs.items()}, rounds=4)
        rows += [dict(suite='peers', T=T, D=shape.D, H=shape.H, expert_size=s, rho=rho,
                      dtype='float32', impl=name, ms=1e3 * t / n, speedup=times['dense'] / t)
                 for name, t in times.items()]
        print(f'T {T:5d} size {s:4d} rho {rho:5.3f}   ' + '   '.join(
            f'{name} {times["dense"] / t:.2f}' for name, t in times.items()), flush=True)
    return rows


def peers(layers, E, s, mask, chosen):
    """{name: function of (x, layer)}: the routed layer as others write it."""
    T, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)                # (T k): the pairs by expert
    rows, counts = order // k, chosen.flatten().bincount(minlength=E)
    expert, ends = chosen.flatten()[order], counts.cumsum(0).to(torch.int32)
    slot = torch.arange(T * k, device=mask.device) - (counts.cumsum(0) - counts)[expert]

    def padded_bmm(x, i):                   # every expert as long as the longest
        m, xs = layers[i], x.new_zeros(E, int(counts.max()), x.shape[1])
        xs[expert, slot] = x[rows]
        w_in = m.w_in.view(E, s, -1).transpose(1, 2)
        h = F.relu(torch.baddbmm(m.b_in.view(E, 1, s), xs, w_in))
        out = (h @ m.w_out.view(E, s, -1))[expert, slot]
        return m.b_out.repeat(T, 1).index_add_(0, rows, out)

    def grouped_mm(x, i):
        m = layers[i]
        h = torch._grouped_mm(x[rows], m.w_in.view(E, s, -1).transpose(1, 2), offs=ends)
        h = F.relu(h + m.b_in.view(E, s)[expert])
        out = torch._grouped_mm(h, m.w_out.view(E, s, -1), offs=ends)
        return m.b_out.repeat(T, 1).index_add_(0, rows, out)

    jobs = {'loop': routed('torch', layers, s, [mask]), 'padded bmm': padded_bmm,
            'grouped mm': grouped_mm}
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return jobs
    config = MixtralConfig(hidden_size=layers[0].w_in.shape[1], intermediate_size=s,
                           num_local_experts=E, num_experts_per_tok=k)
    block = MixtralSparseMoeBlock(config).to(mask.device).requires_grad_(False).eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)
    # three matrices an expert, and its own router
    jobs['transformers (gated)'] = lambda x, i: block(x[None])
    return jobs


# -------------------------------------------------------------------------------------- command

SUITES = dict(layer=layer_suite, decode=decode_suite, model=model_suite, peers=peers_suite)


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='*', help='measure these, each by what it says of '
                        'itself, against the dense.pt beside the first')
    parser.add_argument('--suite', choices=SUITES, default='layer')
    parser.add_argument('--impl', choices=('cpp', 'triton', 'torch', 'dense'),
                        help='force an implementation (suites layer and peers)')
    parser.add_argument('--routing', metavar='FILE', help='masks of a trained model to replay '
                        "(train.py's routing.pt)")
    parser.add_argument('--json', metavar='FILE', help='write a JSON line for each row')
    parser.add_argument('--plot', metavar='FILE.png', help='draw the layer suite')
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
        with open(o.json, 'w') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)
    if o.plot and o.suite == 'layer':
        plot_layers(rows, o.plot)
    return rows


if __name__ == '__main__':
    import train
    o = options().parse_args()
    if o.checkpoints:
        train.guarded(lambda: train.evaluation({}, o.checkpoints))
    else:
        train.guarded(lambda: run(o))
