"""Measure: what a conversion costs in loss and saves in time, against the fastest dense model.

    T tokens · D n_embd · F hidden neurons · E experts · s neurons in an expert · rho share of neurons run
"""

import os
import platform
import statistics
import time

import numpy as np
import torch

import router
import sparsify

# ---------------------------------------------------------------------------------------------- measuring

def machine():
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.isfile('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            cpu = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=cpu, threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__,
                python=platform.python_version())


def in_turn(jobs, rounds, warmup=1):
    """Median seconds of each job, all run in turn so that a slow moment of the machine hits all of them."""
    times = [[] for _ in jobs]
    for i in range(warmup + rounds):
        for job, record in zip(jobs, times):
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                record.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


# ---------------------------------------------------------------------------------------------- loss and FLOPs

GRID = dict(dynk=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7), cumulative=(0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
            threshold=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7), topk=(0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7))


@torch.no_grad()
def evaluate(model, batches, task_loss):
    """Of every batch the loss (n,), the share of neurons run and that of exact zeros in each MLP (n, MLPs)."""
    losses, shares, zeros = [], [], []
    for batch in batches:
        tap = []
        losses.append(task_loss(model, batch, tap))
        shares.append([1.0 if t['mask'] is None else (t['mask'].float().mean(0) @ mlp.offsets.diff().float()).item()
                       / mlp.w_in.shape[0] for t, mlp in zip(tap, model.mlps())])
        zeros.append([s['zeros'] for s in sparsify.statistics(tap)])
    return torch.stack(losses).cpu(), torch.tensor(shares), torch.tensor(zeros)


def sweep(models, batches, prefill, task_loss, rule='', tau=None, say=print):
    """One row for dense, for sparse with every expert on, and for each router, rule and tau.

    models: {'dense', 'sparse', and a router loss for each converted one}. Every second batch is reported, the
    others are there to pick tau by ('loss_pick'). Each row is timed in turn with dense on `prefill`.
    Returns the rows and the share of exact zeros in each MLP of the sparse model.
    """
    routed = [name for name in models if name in router.LOSSES]
    todo = [('dense', '', None), ('sparse', '', None)]
    for name in [*routed, 'oracle']:
        rules = [rule] if rule else [router.USUAL_RULE[name], 'topk']
        todo += [(name, r, t) for r in dict.fromkeys(rules) for t in (GRID[r] if tau is None else [tau])]
    rows, zeros, began, seq_len = [], None, time.time(), prefill['idx'].shape[1]
    dense, report = models['dense'], slice(1, None, 2) if len(batches) > 1 else slice(None)
    for i, (name, rule, tau) in enumerate(todo):
        model = models[routed[0] if name == 'oracle' else name]
        model.set_rule(rule, tau or 0.0, oracle=name == 'oracle')
        losses, shares, zero = evaluate(model, batches, task_loss)
        rho = shares[report].mean(0).tolist()
        cost = model.flops(seq_len, rho if rule else None)
        if name == 'oracle':                                     # a ceiling: it costs nothing, and cannot be timed
            cost['total'], cost['router'] = cost['total'] - cost['router'], 0
            seconds = base = None
        else:
            for mlp, share in zip(model.mlps(), rho):
                mlp.rho = share
            with torch.inference_mode():
                base, seconds = in_turn([lambda: dense(**prefill), lambda: model(**prefill)], rounds=5)
        total, sizes = dense.flops(seq_len)['total'], [mlp.w_in.shape[0] for mlp in model.mlps()]
        rows.append(dict(
            method='d2dmoe' if rule else name, router_loss=name if rule else None, rule=rule or None, tau=tau,
            k=model.mlps()[0].k if rule == 'topk' else None, experts=float(np.average(rho, weights=sizes)),
            flops=cost['total'] / total, router_flops=cost['router'] / total, metric='loss',
            loss=losses[report].mean().item(), loss_pick=losses[::2].mean().item(), accuracy=None,
            tokens=sum(targets.numel() for _, targets in batches[report]), experts_per_layer=rho,
            ms_per_1k_tokens=seconds and 1e6 * seconds / prefill['idx'].numel(),
            speedup=1.0 if name == 'dense' else seconds and base / seconds))
        rows[i]['delta'] = rows[i]['loss'] / rows[0]['loss'] - 1
        rows[i]['delta_sparse'] = rows[i]['loss'] / rows[min(i, 1)]['loss'] - 1
        zeros = zero if name == 'sparse' else zeros
        if i % 5 == 4:
            left = (time.time() - began) / (i + 1) * (len(todo) - i - 1)
            say(f'eval    {i + 1}/{len(todo)}  {left:.0f} s left', flush=True)
    return rows, zeros.mean(0).tolist()


def print_sweep(rows, zeros, say=print):
    say(f'\n{"method":8s}{"router":>8s}{"tau":>10s}{"experts":>9s}{"FLOPs":>8s}{"loss":>9s}{"vs dense":>10s}'
        f'{"ms/1k tok":>11s}{"speedup":>9s}')
    for r in rows:
        tau = '-' if r['rule'] is None else f'top-{r["k"]}' if r['rule'] == 'topk' else f'{r["tau"]:g}'
        timing = f'{"-":>11s}{"-":>9s}' if r['speedup'] is None else f'{r["ms_per_1k_tokens"]:11.2f}{r["speedup"]:9.2f}'
        say(f'{r["method"]:8s}{r["router_loss"] or "-":>8s}{tau:>10s}{r["experts"]:9.1%}{r["flops"]:8.1%}'
            f'{r["loss"]:9.4f}{r["delta"]:+10.2%}{timing}')
    say(f'\nzeros after sparsify: {np.mean(zeros):.1%} of FFN activations ({" ".join(f"{z:.0%}" for z in zeros)} '
        f'by layer), loss {rows[1]["delta"]:+.2%} against dense')
    say('cheapest tau within 1 % of all experts on, picked on one half of the held-out set, reported on the other:')
    curves = {(r['router_loss'], r['rule']): [] for r in rows[2:]}
    for r in rows[2:]:
        curves[r['router_loss'], r['rule']].append(r)
    for (name, rule), curve in curves.items():
        fits = [r for r in curve if r['loss_pick'] <= 1.01 * rows[1]['loss_pick']]
        if fits:
            r = min(fits, key=lambda r: r['flops'])
            say(f'  {name:8s}{rule:10s} tau {r["tau"]:<5g} {r["flops"]:6.1%} of the FLOPs, loss {r["delta_sparse"]:+.2%}'
                + (f', {r["speedup"]:.2f} x dense' if r['speedup'] else ''))
    for name in dict.fromkeys(name for name, _ in curves):
        if (name, 'topk') in curves and len(curves[name, 'topk']) > 1 and router.USUAL_RULE[name] != 'topk':
            usual = curves[name, router.USUAL_RULE[name]]
            gap = flops_gap(usual, curves[name, 'topk'])
            say(f'  {name:8s}{usual[0]["rule"]} against top-k at equal FLOPs: loss {np.mean(gap):+.2%} on average, '
                f'{max(gap):+.2%} at worst, over {len(gap)} points')


def flops_gap(curve, other):
    """Relative loss of each point of a curve against another curve interpolated to the same FLOPs."""
    other = sorted((r['flops'], r['loss']) for r in other)
    x, y = zip(*other)
    return [r['loss'] / np.interp(r['flops'], x, y) - 1 for r in curve if x[0] <= r['flops'] <= x[-1]] or [0.0]


def plot_sweep(rows, path):
    """Loss against FLOPs, a line for each router and rule. Returns what to say about it."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError:
        return '; pip install matplotlib draws it'
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, rule in dict.fromkeys((r['router_loss'], r['rule']) for r in rows[2:]):
        curve = [r for r in rows if (r['router_loss'], r['rule']) == (name, rule)]
        axes.plot([100 * r['flops'] for r in curve], [100 * r['delta_sparse'] for r in curve],
                  marker='o', ms=3, ls=':' if name == 'oracle' else '--' if rule == 'topk' else '-', label=f'{name}, {rule}')
    axes.axhline(0, color='black', lw=0.8, label='all experts on')
    axes.set(xlabel='FLOPs of the whole model, routers included (% of dense)', ylabel='loss against all experts on (%)',
             ylim=(-0.5, 6))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f'; {path} shows it'
