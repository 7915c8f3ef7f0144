"""Measure: what a conversion costs in loss and saves in time, against the fastest dense model.

    T tokens · D n_embd · F hidden neurons · E experts · s neurons in an expert · rho share of neurons run
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import kernel
import router
import sparsify
from model import BadInput, Config, Transformer, write_atomically

say = functools.partial(print, flush=True)


# ---------------------------------------------------------------------------------------------- measuring

def machine():
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.isfile('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            cpu = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(gpu=gpu, cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__,
                triton=getattr(kernel.triton, '__version__', None), python=platform.python_version())


def in_turn(jobs, rounds, warmup=1):
    """Median seconds of each job, all run in turn so that a slow moment of the machine hits all of them."""
    times = [[] for _ in jobs]
    for i in range(warmup + rounds):
        for job, record in zip(jobs, times):
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elif torch.backends.mps.is_available():
                torch.mps.synchronize()
            if i >= warmup:
                record.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


# ---------------------------------------------------------------------------------------------- loss and FLOPs

GRID = dict(dynk=(0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5), threshold=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
            topk=(0.1, 0.2, 0.3, 0.4, 0.5, 0.7), cumulative=(0.5, 0.7, 0.8, 0.9, 0.95, 0.99))


def n_tokens(inputs):
    """Tokens that are not padding in what model.encode takes."""
    return int(inputs['attention_mask'].sum()) if 'attention_mask' in inputs else inputs['idx'].numel()


def classification(predicted, labels):
    """Accuracy, and F1 averaged over the classes that occur: predicted and labels (n,)."""
    hits, counts = [], []
    for c in set(predicted.tolist()) | set(labels.tolist()):
        hits.append(((predicted == c) & (labels == c)).sum().item())
        counts.append(((predicted == c).sum() + (labels == c).sum()).item())
    return sum(hits) / len(labels), statistics.mean(2 * h / n for h, n in zip(hits, counts))


class Masks(list):
    """A tap that keeps only the masks: all activations of a large model would fill the memory."""

    def append(self, t):
        super().append(t['mask'])


@torch.no_grad()
def evaluate(model, batches, cross_entropy):
    """Of every batch the loss (n,), the tokens (n,), the share of neurons run in each MLP (n, MLPs) and what was
    predicted, a list."""
    losses, shares, predicted = [], [], []
    for inputs, targets in batches:
        masks = Masks()
        logits = model(**inputs, tap=masks)
        losses.append(cross_entropy(logits, targets))
        predicted.append(logits.argmax(-1) if model.config.head == 'cls' else None)
        shares.append([1.0 if mask is None else (mask.float().mean(0) @ mlp.offsets.diff().float()).item()
                       / mlp.w_in.shape[0] for mask, mlp in zip(masks, model.mlps())])
    tokens = torch.tensor([n_tokens(inputs) for inputs, _ in batches])
    return torch.stack(losses).cpu(), tokens, torch.tensor(shares), predicted


@torch.no_grad()
def activity(model, batches):
    """How sparse each MLP is over all tokens of the batches: (MLPs, 4), see sparsify.statistics: the share of zeros,
    and of activations below 1/10, 1/100 and 1/1000 of the token's largest."""
    found = []
    for inputs, _ in batches:
        tap = []
        model.encode(**inputs, tap=tap)
        found.append([(s['zeros'], *s['below']) for s in sparsify.statistics(tap)])
    return np.average(found, axis=0, weights=[n_tokens(inputs) for inputs, _ in batches])


def sweep(models, batches, prefill, cross_entropy, rule='', tau=None, floor=0.0, say=print):
    """One row for dense, for sparse with every expert on, and for each router, rule and tau.

    models: {'dense', 'sparse', and a router loss for each converted one}. Every second batch is reported, the
    others are there to pick tau by ('loss_pick', 'accuracy_pick'). Each row is timed in turn with dense on the
    list of inputs `prefill`. FLOPs are those of the mean length without padding.
    Routers with a rule of their own are run with top-k, too: it is the control.
    """
    routed = [name for name in models if name in router.LOSSES]
    todo = [('dense', '', None), ('sparse', '', None)]
    for name in [*routed, 'oracle']:
        rules = [rule] if rule else [router.USUAL_RULE[name], 'topk']
        todo += [(name, r, t) for r in dict.fromkeys(rules) for t in (GRID[r] if tau is None else [tau])]
    rows, began = [], time.time()
    said = began
    dense, report = models['dense'], slice(1, None, 2) if len(batches) > 1 else slice(None)
    for i, (name, rule, tau) in enumerate(todo):
        model = models[routed[0] if name == 'oracle' else name]
        model.set_rule(rule, tau or 0.0, oracle=name == 'oracle', floor=0.0 if name == 'oracle' else floor)
        losses, tokens, shares, predicted = evaluate(model, batches, cross_entropy)
        tokens = tokens[report]
        rho = (tokens[:, None] * shares[report] / tokens.sum()).sum(0).tolist()
        seq_len = tokens.sum().item() / sum(len(targets) for _, targets in batches[report])
        cost = model.flops(seq_len, rho if rule else None)
        if name == 'oracle':                                     # a ceiling: it costs nothing, and cannot be timed
            cost['total'], cost['router'] = cost['total'] - cost['router'], 0
            seconds = base = None
        else:
            for mlp, share in zip(model.mlps(), rho):
                mlp.rho = share
            with torch.inference_mode():
                base, seconds = in_turn([lambda m=m: [m(**inputs) for inputs in prefill] for m in (dense, model)],
                                        rounds=3)
        total, sizes = dense.flops(seq_len)['total'], [mlp.w_in.shape[0] for mlp in model.mlps()]
        rows.append(dict(
            method='d2dmoe' if rule else name, router_loss=name if rule else None, rule=rule or None, tau=tau, floor=model.config.floor if rule == 'dynk' else None,
            k=model.ffns()[0].k if rule == 'topk' else None, experts=float(np.average(rho, weights=sizes)),
            flops=cost['total'] / total, router_flops=cost['router'] / total,
            loss=losses[report].mean().item(), loss_pick=losses[::2].mean().item(), metric='loss', accuracy=None,
            macro_f1=None, tokens=tokens.sum().item(), experts_per_layer=rho,
            ms_per_1k_tokens=seconds and 1e6 * seconds / sum(map(n_tokens, prefill)),
            speedup=1.0 if name == 'dense' else seconds and base / seconds))
        if model.config.head == 'cls':
            labels = [targets for _, targets in batches]
            (accuracy, f1), (pick, _) = (classification(torch.cat(predicted[part]), torch.cat(labels[part]))
                                         for part in (report, slice(None, None, 2)))
            rows[i] |= dict(metric='accuracy', accuracy=accuracy, macro_f1=f1, accuracy_pick=pick)
        rows[i]['delta'] = rows[i]['loss'] / rows[0]['loss'] - 1
        if time.time() - said > 10:
            said = time.time()
            left = (said - began) / (i + 1) * (len(todo) - i - 1)
            say(f'eval    {i + 1}/{len(todo)}  {left:.0f} s left', flush=True)
    for row in rows:
        row['delta_sparse'] = row['loss'] / rows[1]['loss'] - 1
    return rows


def report(models, results, inputs, folder, say=print):
    """Print the table; results.json and its picture, and the masks of `inputs` for --routing, go into `folder`."""
    rows, path = results['rows'], functools.partial(os.path.join, folder)
    write_atomically(path('results.json'), lambda t: Path(t).write_text(json.dumps(results, indent=1)))
    print_sweep(rows, say)
    ffns, activities = models['sparse'].ffns(), np.array(results['activity'])
    for what, mine in (('FFNs', True), ('projections', False)):
        some = activities[[(mlp in ffns) == mine for mlp in models['sparse'].mlps()]]
        if len(some) and (models['sparse'].config.activation == 'relu' or not mine):
            say(f'zeros among the hidden activations of the sparse {what}: {some[:, 0].mean():.1%} '
                f'({" ".join(f"{z:.0%}" for z in some[:, 0])})')
        elif len(some):                                          # GELU has next to none
            say(f'hidden activations of the sparse {what} below 1/10, 1/100, 1/1000 of the token\'s largest: '
                + ', '.join(f'{z:.1%}' for z in some[:, 1:].mean(0)))
    print_choice(rows, say)
    if row := next((r for (name, _), r in picked(rows).items() if name in models), None):
        model, tap = models[row['router_loss']].set_rule(row['rule'], row['tau'], floor=row['floor'] or 0.0), Masks()
        with torch.no_grad():
            model.encode(**inputs, tap=tap)
        masks = [mask.cpu() for mask, mlp in zip(tap, model.mlps()) if mlp in model.ffns()]
        facts = dict(masks=masks, D=model.config.n_embd, F=model.config.n_hidden)
        write_atomically(path('routing.pt'), functools.partial(torch.save, facts))
    say(f'\n{path("results.json")} has every row' + plot_sweep(rows, path('results.png')))


def print_sweep(rows, say=print):
    labelled = rows[0]['metric'] == 'accuracy'
    say(f'\n{"method":8s}{"router":>8s}{"tau":>10s}{"experts":>9s}{"FLOPs":>8s}{"loss":>9s}{"vs dense":>10s}'
        f'{"ms/1k tok":>11s}{"speedup":>9s}' + (f'{"accuracy":>10s}{"macro-F1":>10s}' if labelled else ''))
    for r in rows:
        tau = '-' if r['rule'] is None else f'top-{r["k"]}' if r['rule'] == 'topk' else f'{r["tau"]:g}'
        timing = f'{"-":>11s}{"-":>9s}' if r['speedup'] is None else f'{r["ms_per_1k_tokens"]:11.2f}{r["speedup"]:9.2f}'
        say(f'{r["method"]:8s}{r["router_loss"] or "-":>8s}{tau:>10s}{r["experts"]:9.1%}{r["flops"]:8.1%}'
            f'{r["loss"]:9.4f}{r["delta"]:+10.2%}{timing}'
            + (f'{r["accuracy"]:10.2%}{r["macro_f1"]:10.2%}' if labelled else ''))
    say(f'\nsparse: loss {rows[1]["delta"]:+.2%} against dense')


def print_choice(rows, say=print):
    labelled = rows[0]['metric'] == 'accuracy'
    say('cheapest tau within 1 % of all experts on, picked on one half of the held-out set, reported on the other:')
    curves = {(r['router_loss'], r['rule']): [] for r in rows[2:]}
    for r in rows[2:]:
        curves[r['router_loss'], r['rule']].append(r)
    for (name, rule), r in picked(rows).items():
        choice = f'top-{r["k"]}' if rule == 'topk' else f'tau {r["tau"]:g}'
        say(f'  {name:8s}{rule:10s} {choice:9s} {r["flops"]:6.1%} of the FLOPs, loss {r["delta_sparse"]:+.2%} '
            f'({r["delta"]:+.2%} against dense)'
            + (f', accuracy {r["accuracy"]:.2%} (dense {rows[0]["accuracy"]:.2%})' if labelled else '')
            + (f', {r["speedup"]:.2f} x dense' if r['speedup'] else ''))
    for name in dict.fromkeys(name for name, _ in curves):
        usual = curves.get((name, router.USUAL_RULE[name]))
        if usual and usual[0]['rule'] != 'topk' and len(curves.get((name, 'topk'), ())) > 1:
            gap = flops_gap(usual, curves[name, 'topk'])
            say(f'  {name:8s}{usual[0]["rule"]} against top-k at equal FLOPs: loss {np.mean(gap):+.2%} on average, '
                f'{max(gap):+.2%} at worst, over {len(gap)} points')


def picked(rows):
    """{(router, rule): its cheapest row within 1 % of all experts on, by the half that is not reported}: within
    1 % of the loss, or of the accuracy where texts are labelled."""
    if rows[1]['metric'] == 'accuracy':
        fits = [r for r in rows[2:] if r['accuracy_pick'] >= 0.99 * rows[1]['accuracy_pick']]
    else:
        fits = [r for r in rows[2:] if r['loss_pick'] <= 1.01 * rows[1]['loss_pick']]
    return {(r['router_loss'], r['rule']): r for r in sorted(fits, key=lambda r: -r['flops'])}


def flops_gap(curve, other):
    """Relative loss of each point of a curve against another curve interpolated to the same FLOPs."""
    other = sorted((r['flops'], r['loss']) for r in other)
    x, y = zip(*other)
    return [r['loss'] / np.interp(r['flops'], x, y) - 1 for r in curve if x[0] <= r['flops'] <= x[-1]] or [0.0]


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise BadInput('pictures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def plot_sweep(rows, path):
    """Loss or accuracy against FLOPs, a line for each router and rule. Returns what to say about it."""
    metric = rows[0]['metric']
    try:
        plt = pyplot()
    except BadInput as error:
        return f'; {error}'
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, rule in dict.fromkeys((r['router_loss'], r['rule']) for r in rows[2:]):
        curve = [r for r in rows if (r['router_loss'], r['rule']) == (name, rule)]
        axes.plot([100 * r['flops'] for r in curve], [100 * (r[metric] / (rows[1][metric] or 1) - 1) for r in curve],
                  ls=':' if name == 'oracle' else '--' if rule == 'topk' else '-', marker='o', ms=3,
                  label=f'{name}, {rule}')
    axes.axhline(0, color='black', lw=0.8, label='all experts on')
    axes.set(xlabel='FLOPs of the whole model, routers included (% of dense)',
             ylabel=f'{metric} against all experts on (%)',
             ylim=(-0.5, 6) if metric == 'loss' else (-10, 2))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f'; {path} shows it'


# ---------------------------------------------------------------------------------------------- one layer

class Layers(list):
    """Tensors of several layers, used in turn for ever."""

    def __getitem__(self, i):
        return super().__getitem__(i % len(self))


def make_layers(D, n_hidden, dtype, device):
    """Random MLPs, so many that no cache holds them: w_in, b_in, w_out, b_out, each a Layers."""
    cache = 4 * torch.cuda.get_device_properties(0).L2_cache_size if device == 'cuda' else 0
    n = math.ceil(max(200e6, cache) / (2 * D * n_hidden * dtype.itemsize))

    def make(*shape):
        return Layers((torch.randn(*shape, device=device) * 0.02).to(dtype) for _ in range(n))
    return make(n_hidden, D), make(n_hidden), make(n_hidden, D), make(D)


def dense_candidates(layers, dtype):
    """Everything torch offers for a dense ReLU MLP on this device: {name: function of (x, layer)}."""
    w_in, b_in, w_out, b_out = layers
    compiled = torch.compile(lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)), w2.t(), b2))
    candidates = {'F.linear': lambda x, i: kernel_free_mlp(F.linear, x, w_in[i], b_in[i], w_out[i].t(), b_out[i]),
                  'compiled': lambda x, i: compiled(x, w_in[i], b_in[i], w_out[i], b_out[i])}
    if w_in[0].is_cuda:
        return candidates
    packed = {}

    def prepacked(x, i):                                         # oneDNN's own layout, made for this T
        if packed.setdefault('T', len(x)) != len(x):
            packed.clear()
        if i % len(w_in) not in packed:
            packed[i % len(w_in)] = [torch.ops.mkldnn._reorder_linear_weight(w, len(x))
                                     for w in (w_in[i], w_out[i].t().contiguous())]
        a, b = packed[i % len(w_in)]
        return kernel_free_mlp(kernel.onednn, x, a, b_in[i], b, b_out[i])

    candidates |= {'onednn packed': prepacked, 'onednn': lambda x, i: kernel_free_mlp(
        kernel.onednn, x, w_in[i], b_in[i], w_out[i].t(), b_out[i])}
    if dtype != torch.float32:                                   # without bf16 units, fp32 copies may be faster
        wide = [Layers(t.float() for t in ts) for ts in layers]
        candidates['fp32 copies'] = lambda x, i: kernel_free_mlp(
            F.linear, x.float(), wide[0][i], wide[1][i], wide[2][i].t(), wide[3][i]).to(dtype)
    return candidates


def kernel_free_mlp(linear, x, w_in, b_in, w_out, b_out):
    return linear(F.relu(linear(x, w_in, b_in)), w_out, b_out)


def over_layers(f, x, n):
    """A job that runs f on the next n of all layers."""
    position = itertools.count(0, n)

    def job():
        start = next(position)
        for i in range(start, start + n):
            f(x, i)
    return job


def time_dense(candidates, x, n):
    """{name: seconds a layer}. What fails here is left out, what is three times slower is timed once only."""
    once = {}
    for name, f in candidates.items():
        try:
            f(x, 0)
            start = time.perf_counter()
            f(x, 1)
            once[name] = time.perf_counter() - start
        except Exception:                                        # not in this build, or not for this dtype
            continue
    near = [name for name in once if once[name] < 3 * min(once.values())]
    return once | dict(zip(near, [t / n for t in in_turn([over_layers(candidates[c], x, n) for c in near], 4, 2)]))


def routed(impl, layers, s, masks):
    """One routed layer as a function of (x, layer); the masks are used in turn."""
    w_in, b_in, w_out, b_out = layers
    F_, device = len(w_in[0]), w_in[0].device
    offsets = torch.arange(0, F_ + s, s, dtype=torch.int32, device=device).clamp_max(F_)
    masks = Layers(masks)
    shares = Layers(m.float().mean().item() for m in masks)
    return lambda x, i: kernel.expert_mlp(x, masks[i], w_in[i], b_in[i], w_out[i], b_out[i], offsets, 'relu',
                                          impl=impl, rho=shares[i])


def bernoulli(T, E, rho, device, n=5):
    return [torch.rand(T, E, device=device) < rho for _ in range(n)]


def measured_bandwidth(device):
    """Bytes a second that the device reads: the sum of a tensor that no cache holds."""
    big = torch.ones(128 << 20, device=device)                   # 512 MB
    return big.nbytes / in_turn([big.sum], rounds=5)[0]


def layer_suite(o, device):
    """T x expert size x rho x dtype: one MLP of GPT-2's size, dense and routed in turn."""
    D, n_hidden, sizes, shares, replay = 768, 3072, (24, 64, 128), (0.1, 0.25, 0.5, 1.0), None
    if o.routing:
        replay, D, n_hidden = read_routing(o.routing)
        sizes = (n_hidden // replay[0].shape[1],)
        shares = (statistics.mean(m.float().mean().item() for m in replay),)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        layers, peak, bandwidth = make_layers(D, n_hidden, dtype, device), 0.0, measured_bandwidth(device)
        candidates = dense_candidates(layers, dtype)
        for T in (4096, 256, 16, 1):                             # the largest first: it tells the peak
            x = torch.randn(T, D, device=device).to(dtype)
            n = len(layers[0]) if T <= 16 else 3 if T <= 256 else 1
            dense = time_dense(candidates, x, n)
            best = min(dense, key=dense.get)
            cases = [(s, rho) for s in sizes for rho in shares]
            jobs, unions = [over_layers(candidates[best], x, n)], {}                    # share of experts touched
            for s, rho in cases:
                masks = [m.repeat(-(-T // len(m)), 1)[:T].to(device) for m in replay] if replay else \
                    bernoulli(T, n_hidden // s, rho, device)
                unions[s, rho] = statistics.mean(m.any(0).float().mean().item() for m in masks)
                jobs.append(over_layers(routed(o.impl, layers, s, masks), x, n))
            for s in sizes:
                r = router.Router(D, n_hidden // s, 128).to(device, dtype).requires_grad_(False)
                jobs.append(over_layers(lambda x, i, r=r: router.select(r(x), 'dynk', 0.5), x, n))
            times = [t / n for t in in_turn(jobs, rounds=7, warmup=2)]
            base, router_times = times[0], dict(zip(sizes, times[1 + len(cases):]))
            peak = max(peak, 4 * T * D * n_hidden / base)
            for (s, rho), seconds in zip(cases, times[1:]):
                moved = 2 * D * dtype.itemsize * (n_hidden * unions[s, rho] + T)        # experts touched, x and y
                limit = base / max(4 * T * D * n_hidden * rho / peak, moved / bandwidth)
                rows.append(dict(
                    suite='layer', T=T, D=D, F=n_hidden, expert_size=s, rho=rho, dtype=str(dtype)[6:],
                    impl=o.impl or 'auto', ms=1e3 * seconds, router_ms=1e3 * router_times[s],
                    dense_ms={name: 1e3 * t for name, t in dense.items()} | {best: 1e3 * base},
                    speedup=base / seconds, speedup_with_router=base / (seconds + router_times[s]),
                    limit=limit, of_limit=base / seconds / limit))
                print_row(rows[-1], first=len(rows) == 1)
        say(f'{str(dtype)[6:]}: peak {peak / 1e9:.0f} GFLOP/s (the fastest dense), {bandwidth / 1e9:.0f} GB/s read\n')
    fp32 = [r['of_limit'] for r in rows if r['dtype'] == 'float32' and r['rho'] <= 0.5] or [math.nan]
    say(f'fp32, rho <= 0.5: median of_limit {statistics.median(fp32):.2f}, lowest {min(fp32):.2f}')
    return rows + ([] if o.routing else linearity(o, device, D, n_hidden))


def print_row(r, first):
    if first:
        say('   T  size   rho  dtype     dense by             dense ms        ms  speedup with router  limit of limit')
    best = min(r['dense_ms'], key=r['dense_ms'].get)
    say(f'{r["T"]:4d}{r["expert_size"]:6d}{r["rho"]:6.2f}  {r["dtype"]:9s} {best:18s}{r["dense_ms"][best]:10.3f}'
        f'{r["ms"]:10.3f}{r["speedup"]:9.2f}{r["speedup_with_router"]:12.2f}{r["limit"]:9.2f}{r["of_limit"]:9.2f}')


def linearity(o, device, D, n_hidden, T=4096, s=24):
    """Is time linear in the experts executed? One row for each rho, R^2 of the fitted line."""
    layers, x = make_layers(D, n_hidden, torch.float32, device), torch.randn(T, D, device=device)
    shares = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    dense = lambda x, i: kernel.dense_mlp(x, *(t[i] for t in layers), 'relu')
    times = in_turn([over_layers(dense, x, 1)] + [
        over_layers(routed(o.impl, layers, s, bernoulli(T, n_hidden // s, rho, device)), x, 1)
        for rho in shares], rounds=5)
    slope, start = np.polyfit(shares, times[1:], 1)
    r2 = np.corrcoef(shares, times[1:])[0, 1] ** 2
    say(f'T {T}, experts of {s}: time = {start / times[0]:.3f} + {slope / times[0]:.3f} rho of dense, R^2 = {r2:.4f}')
    return [dict(suite='linearity', T=T, D=D, F=n_hidden, expert_size=s, rho=rho, dtype='float32',
                 impl=o.impl or 'auto', ms=1e3 * t, dense_ms=dict(linear=1e3 * times[0]),
                 speedup=times[0] / t, r2=float(r2))
            for rho, t in zip(shares, times[1:])]


def read_routing(path):
    try:
        data = torch.load(path, weights_only=True)
        masks, D, n_hidden = data['masks'], data['D'], data['F']
        if n_hidden % masks[0].shape[1]:
            raise ValueError(f'{n_hidden} neurons in {masks[0].shape[1]} experts of unequal size')
        return masks, D, n_hidden
    except Exception as error:
        raise BadInput(f'--routing={path}: not a file of masks as python train.py --phase=eval writes it '
                       f'({str(error).splitlines()[0][:80]})') from None


# ---------------------------------------------------------------------------------------------- whole models

def gpt2_pair(device, rho, s=24):
    """GPT-2's sizes with random weights, dense and converted: random routers whose top-k runs the share rho."""
    config = dict(n_layer=12, n_head=12, n_embd=768, n_hidden=3072, block_size=1024, vocab_size=50257)
    dense, converted = (Transformer(Config(**config)).to(device).eval().requires_grad_(False) for _ in range(2))
    converted.load_state_dict(dense.state_dict())
    for mlp in converted.mlps():
        mlp.sort_neurons(torch.arange(3072, device=device), torch.arange(0, 3072 + s, s))
    converted.add_experts([3072 // s] * 12)
    converted.add_routers('norm', 128)
    converted.requires_grad_(False).set_rule('topk', rho)
    for mlp in converted.mlps():
        mlp.rho = rho
    return dense, converted


def whole_model(o, device, name, run, tokens, T):
    """Dense against converted at several rho, and what Amdahl's law makes of the FFNs timed by themselves."""
    rows = []
    for rho in (0.1, 0.25, 0.5):
        dense, converted = gpt2_pair(device, rho)
        x = torch.randn(T, 768, device=device)
        ffn = [lambda m=m: [mlp(x) for mlp in m.ffns()] for m in (dense, converted)]
        base, ours, ffn_base, ffn_ours = in_turn([lambda: run(dense), lambda: run(converted), *ffn], rounds=3)
        calls = tokens / T if name == 'decode' else 1            # the FFNs run once a token there
        law = base / (base - calls * (ffn_base - ffn_ours))
        speedup = base / ours
        rows.append(dict(suite=name, rho=rho, expert_size=24, dtype='float32', tokens_per_s=tokens / ours,
                         dense_tokens_per_s=tokens / base, speedup=speedup, amdahl=law, of_amdahl=speedup / law))
        say(f'{name}  rho {rho:4.2f}  dense {tokens / base:8.1f} tokens/s  converted {tokens / ours:8.1f}  '
            f'speedup {speedup:.2f}  Amdahl {law:.2f}  reached {speedup / law:.2f} of it')
    return rows


def model_suite(o, device):
    idx = torch.randint(0, 50257, (8, 512), device=device)
    return whole_model(o, device, 'model', lambda m: m(idx), idx.numel(), idx.numel())


def decode_suite(o, device):
    idx, n = torch.randint(0, 50257, (1, 16), device=device), 32
    return whole_model(o, device, 'decode', lambda m: m.generate(idx, n, temperature=0), n, 1)


# ---------------------------------------------------------------------------------------------- peers

def peers_suite(o, device, D=768, n_hidden=3072):
    """The same layer by what one would pick instead; every token runs k = rho E experts, so that all can."""
    rows = []
    layers = make_layers(D, n_hidden, torch.float32, device)
    for T, s, rho in [(T, s, rho) for T in (16, 4096) for s in (128, 24) for rho in (0.125, 0.25)]:
        E, x = n_hidden // s, torch.randn(T, D, device=device)
        chosen = torch.rand(T, E, device=device).topk(round(rho * E)).indices           # (T, k)
        mask = torch.zeros(T, E, dtype=torch.bool, device=device).scatter_(1, chosen, True)
        jobs = {'dense': lambda x, i: kernel.dense_mlp(x, *(t[i] for t in layers), 'relu'),
                'd2dmoe': routed(o.impl, layers, s, [mask])} | peers(layers, E, s, mask, chosen)
        n = len(layers[0]) if T <= 16 else 1
        want = jobs['d2dmoe'](x, 0)
        for name in list(jobs):
            try:
                got = jobs[name](x, 0)
            except Exception as error:
                say(f'{name}: not here ({str(error).splitlines()[0][:70]})')
                del jobs[name]
                continue
            if name not in ('dense', 'transformers (gated)') and not torch.allclose(got, want, atol=1e-3):
                raise RuntimeError(f'{name} computes something else')
        times = [t / n for t in in_turn([over_layers(f, x, n) for f in jobs.values()], rounds=4)]
        rows += [dict(suite='peers', T=T, D=D, F=n_hidden, expert_size=s, rho=rho, dtype='float32', impl=name,
                      ms=1e3 * t, speedup=times[0] / t) for name, t in zip(jobs, times)]
        say(f'T {T:5d} size {s:4d} rho {rho:5.3f}   ' + '   '.join(
            f'{name} {times[0] / t:.2f}' for name, t in zip(jobs, times)))
    return rows


def peers(layers, E, s, mask, chosen):
    """{name: function of (x, layer)}: the routed layer as others write it."""
    w_in, b_in, w_out, b_out = layers
    T, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)                # (T k): the pairs by expert
    rows, counts = order // k, chosen.flatten().bincount(minlength=E)
    ends = counts.cumsum(0).to(torch.int32)
    slot = torch.arange(T * k, device=mask.device) - (counts.cumsum(0) - counts)[chosen.flatten()[order]]

    def padded_bmm(x, i):                                        # every expert as long as the longest
        xs = x.new_zeros(E, int(counts.max()), x.shape[1])
        expert = chosen.flatten()[order]
        xs[expert, slot] = x[rows]
        h = F.relu(torch.baddbmm(b_in[i].view(E, 1, s), xs, w_in[i].view(E, s, -1).transpose(1, 2)))
        out = (h @ w_out[i].view(E, s, -1))[expert, slot]
        return b_out[i].repeat(T, 1).index_add_(0, rows, out)

    def grouped_mm(x, i):
        h = torch._grouped_mm(x[rows], w_in[i].view(E, s, -1).transpose(1, 2), offs=ends)
        h = F.relu(h + b_in[i].view(E, s)[chosen.flatten()[order]])
        out = torch._grouped_mm(h, w_out[i].view(E, s, -1), offs=ends)
        return b_out[i].repeat(T, 1).index_add_(0, rows, out)

    jobs = {'loop': routed('torch', layers, s, [mask]), 'padded bmm': padded_bmm, 'grouped mm': grouped_mm}
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return jobs
    block = MixtralSparseMoeBlock(MixtralConfig(hidden_size=w_in[0].shape[1], intermediate_size=s, num_local_experts=E,
                                                num_experts_per_tok=k)).to(mask.device).requires_grad_(False).eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)
    jobs['transformers (gated)'] = lambda x, i: block(x[None])   # three matrices an expert, and its own router
    return jobs


# ---------------------------------------------------------------------------------------------- GPU kernels compiled

DTYPES = {'bf16': torch.bfloat16, 'fp32': torch.float32, 'fp16': torch.float16}
TARGETS = {'cuda:80': ('cuda', 80, 32), 'cuda:90': ('cuda', 90, 32), 'hip': ('hip', 'gfx942', 64)}
SHARED_LIMIT = {'cuda:80': 99 << 10, 'cuda:90': 227 << 10, 'hip': 64 << 10}  # 99 KB: sm_86 and sm_89 too


def compile_kernel(fn, target, dtype, num_warps=4, num_stages=1, **constants):
    """As a launch with 16-byte aligned tensors and sizes divisible by 16 would compile it."""
    from triton.backends.compiler import GPUTarget
    types = dict(mask='*u8', y='*fp32', offsets='*i32', idx='*i32', count='*i32', T='i32', E='i32', D='i32', LEN='i32')
    signature = {name: 'constexpr' if name in constants else types.get(name, '*' + dtype) for name in fn.arg_names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(fn.arg_names)
               if name not in constants and name != 'T'}
    source = kernel.triton.compiler.ASTSource(fn, signature, constants, aligned)
    options = dict(num_warps=num_warps, num_stages=num_stages, **kernel.compiler_options(target))
    return kernel.triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def compile_tile(tile, target, dtype, act='relu', E=128, EVEN=True):
    BM, SB, BK, BN, num_warps, num_stages = tile
    return compile_kernel(kernel.expert_kernel, target, dtype, num_warps, num_stages, BM=BM, SB=SB, BK=BK, BN=BN,
                          ACT=act, BE=E, EVEN=EVEN, CHUNK=4096, INTERPRET=False,
                          PRECISION=kernel.precision(target, DTYPES[dtype]))


def shipped(target, dtypes=('bf16', 'fp32'), act='relu', EVEN=True):
    """Everything a model with D 768 (EVEN) may launch -> (dtype, name, tile, compiled)."""
    for dtype in dtypes:
        for tile in kernel.TILES[target, DTYPES[dtype].itemsize]:
            yield dtype, '{}x{} {},{} w{} s{}'.format(*tile), tile, compile_tile(tile, target, dtype, act, EVEN=EVEN)
        few = kernel.decode_options(768)
        yield dtype, 'decode', None, compile_kernel(kernel.decode_kernel, target, dtype, ACT=act, BE=128, **few)
    yield 'any', 'dispatch', None, compile_kernel(kernel.dispatch_kernel, target, '', CHUNK=4096, BT=128, BE=32)


def resources(binary, target):
    """-> registers a thread, spills, bytes of stack and of shared memory, {instruction: count}."""
    if target == 'hip':
        code = binary.asm['amdgcn']
        kinds = dict(mfma=r'\bv_mfma', fma=r'\bv_(?:pk_)?(?:fma|fmac)_f32', add=r'\bglobal_atomic_add_f32')
        registers, stack, vector, scalar = (int(re.search(rf'\.{name}:\s+(\d+)', code)[1]) for name in (
            'vgpr_count', 'private_segment_fixed_size', 'vgpr_spill_count', 'sgpr_spill_count'))
        spills = vector + scalar
    else:
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(binary.asm['cubin'])
            file.flush()
            command = [kernel.triton.knobs.nvidia.cuobjdump.path, '-sass', '-res-usage', file.name]
            code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kinds = dict(wgmma=r'\bHGMMA', mma=r'\bHMMA', fma=r'\bFFMA', add=r'\bREDG?\.E')
        registers, stack = (int(re.search(rf'{name}:(\d+)', code)[1]) for name in ('REG', 'STACK'))
        spills = len(re.findall(r'\b(?:STL|LDL)\b', code))
    counts = {kind: len(re.findall(pattern, code)) for kind, pattern in kinds.items()}
    return registers, spills, stack, binary.metadata.shared, {kind: n for kind, n in counts.items() if n}


GPUS = {  # FLOP/s of dense and of experts by bytes an element (fp32 plain; tf32 / 3), bytes/s of HBM, of L2 (assumed)
    'cuda:80': ('A100', {2: (312e12, 312e12), 4: (19.5e12, 52e12)}, 2.0e12, 4.0e12),
    'cuda:90': ('H100', {2: (989e12, 989e12), 4: (67e12, 165e12)}, 3.35e12, 5.5e12),
    'hip': ('MI300X', {2: (1307e12, 1307e12), 4: (163e12, 163e12)}, 5.3e12, 8e12),
}


def roofline(tile, target, T, D, E, s, size, rho):
    """-> bytes through L2 and FLOPs per (token, expert) pair, the most this tile can gain over a dense MLP
    running at its peak, and what stops it. Optimistic: no padded tokens, no latency, adds cost a store."""
    BM, SB = tile[:2]
    items = kernel.triton.cdiv(s, SB)            # an expert is that many items wide; each gathers x and adds to y
    pair_bytes, pair_flops = D * (items * (size + 4) + 2 * s * size / BM), 4 * D * items * SB
    _, peaks, hbm, l2 = GPUS[target]
    once = 2 * D * size * (T + E * s) / hbm                      # x, y and the weights
    dense = max(4 * T * E * s * D / peaks[size][0], once)
    touched = min(1.0, T * rho)                                  # of the weights, by few tokens
    times = dict(flops=rho * T * E * pair_flops / peaks[size][1], HBM=2 * D * size * (T + touched * E * s) / hbm,
                 L2=(rho * T * E * pair_bytes + T * D * (8 + size)) / l2)               # fill and cast y, too
    bound = max(times, key=times.get)
    return pair_bytes, pair_flops, dense / times[bound], bound


def kernel_report():
    """python kernel.py: registers, spills, instructions and the roofline of every shipped GPU configuration."""
    if kernel.triton is None:
        sys.exit('the GPU kernels need triton: pip install triton (Linux)')
    shapes = [(24, 128), (128, 24)]
    print('KB through L2 and kFLOP per (token, expert) pair, padding included, at D 768; the most that can be gained\n'
          'over dense at rho 0.25, T 4096 and what stops it (A100 for cuda:80, H100 for cuda:90, MI300X for hip):\n'
          'a model, not a timing. * marks the tile chosen there.\n')
    print('target  type kernel              regs spills stack shared instructions          '
          + ''.join(f'{f"{E} experts x {s}: KB kFLOP gain":36}' for E, s in shapes))
    for target in TARGETS:
        for dtype, name, tile, binary in shipped(target):
            size = 2 if dtype == 'bf16' else 4
            registers, spills, stack, shared, counts = resources(binary, target)
            counts = ' '.join(f'{kind} {n}' for kind, n in counts.items())
            print(f'{target:8}{dtype:5}{name:20}{registers:4}{spills:7}{stack:6}{shared:7} {counts:22}', end='')
            for E, s in shapes if tile else []:
                pair_bytes, pair_flops, gain, bound = roofline(tile, target, 4096, 768, E, s, size, 0.25)
                chosen = tile == kernel.choose_tile(kernel.TILES[target, size], 1024, E, s, chunks=1, processors=132)[0]
                columns = f'{pair_bytes / 1e3:16.1f}{pair_flops / 1e3:6.0f}{gain:6.2f} {bound}{"*" * chosen}'
                print(columns.ljust(36), end='')
            print(flush=True)


# ---------------------------------------------------------------------------------------------- command line

def plot_layers(rows, path):
    """Time against executed experts, dense as a line."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    sizes = [r['expert_size'] for r in rows if r['suite'] == 'layer']
    for T, dtype, s in sorted({(r['T'], r['dtype'], r['expert_size']) for r in rows if r['suite'] == 'layer'}):
        if dtype == 'float32' and s in (min(sizes), max(sizes)):
            line = [r for r in rows if (r['suite'], r['T'], r['dtype'], r['expert_size']) == ('layer', T, dtype, s)]
            axes.plot([r['rho'] for r in line], [1 / r['speedup'] for r in line], marker='o', ms=3,
                      ls='-' if s == min(sizes) else '--', label=f'T {T}, experts of {s}')
    axes.axhline(1, color='black', lw=0.8, label='the fastest dense')
    axes.plot([0, 1], [0, 1], color='grey', lw=0.8, ls=':', label='proportional')
    axes.set(xlabel='share of neurons run', ylabel='time (1 = dense)', xlim=(0, 1.02), ylim=(0, 1.25))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    suites = dict(layer=layer_suite, decode=decode_suite, model=model_suite, peers=peers_suite)
    parser = argparse.ArgumentParser(description='Wall-clock of routed MLPs against the fastest dense ones, as ratios '
                                     'within one run.', formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--suite', choices=suites, default='layer', help='a layer, a GPT-2, or peers')
    parser.add_argument('--impl', choices=('cpp', 'triton', 'torch', 'dense'),
                        help='force an implementation (suites layer and peers)')
    parser.add_argument('--routing', metavar='FILE', help="masks of a trained model (train.py's routing.pt) to replay")
    parser.add_argument('--json', metavar='FILE', help='write a JSON line for each row')
    parser.add_argument('--plot', metavar='FILE.png', help='draw time against executed experts (suite layer)')
    o = parser.parse_args()
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    say(' · '.join(f'{k} {v}' for k, v in machine().items() if v) + '\n')
    try:
        if o.impl == 'cpp' and not kernel.have_cpp():
            raise BadInput('--impl=cpp needs a C++ compiler; the warning above says what failed')
        if o.plot:
            pyplot()                                             # before the measurement, not after it
        for path in filter(None, (o.json, o.plot)):
            if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
                raise BadInput(f'{path}: its folder is not there or cannot be written')
        with torch.inference_mode():
            rows = suites[o.suite](o, device)
        if o.json:
            with open(o.json, 'w') as f:
                f.writelines(json.dumps(row) + '\n' for row in rows)
        if o.plot and o.suite == 'layer':
            plot_layers(rows, o.plot)
    except BadInput as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
