"""The routed expert MLP, and the fastest dense linear of the device.

    y[t] = b_out + sum over experts e with mask[t, e] of  act(x[t] W_in[e]^T + b_in[e]) W_out[e]

T tokens · D n_embd · F hidden neurons · E experts (slices of the hidden dimension)
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = {'relu': F.relu, 'gelu': F.gelu, 'gelu_tanh': lambda x: F.gelu(x, approximate='tanh')}


def linear(x, weight, bias=None):
    """x (T, K), weight (N, K), bias (N) or None -> (T, N)."""
    return F.linear(x, weight, bias)


def dense_mlp(x, w_in, b_in, w_out, b_out, act):
    """x (T, D) -> (T, D): every neuron runs; differentiable."""
    return linear(ACTIVATIONS[act](linear(x, w_in, b_in)), w_out.t(), b_out)


def reference(x, mask, w_in, b_in, w_out, b_out, offsets, act):
    """The routed MLP as one differentiable expression that computes everything and masks it."""
    a = ACTIVATIONS[act](F.linear(x, w_in, b_in))                                       # (T, F)
    sizes = offsets.diff().long()
    neuron_mask = mask.repeat_interleave(sizes, -1, output_size=w_in.shape[0])          # (T, F)
    return F.linear(a.masked_fill(~neuron_mask, 0), w_out.t(), b_out)


def expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act, impl=None, w_gate=None, rho=None):
    """x (T, D), mask (T, E) bool -> (T, D)."""
    if torch.is_grad_enabled() or impl == 'torch':
        return reference(x, mask, w_in, b_in, w_out, b_out, offsets, act)
    y = x.new_zeros(x.shape) if b_out is None else b_out.expand_as(x).clone()
    edges = offsets.tolist()
    for e, (lo, hi) in enumerate(zip(edges, edges[1:])):
        rows = mask[:, e].nonzero().squeeze(-1)
        if len(rows) and hi > lo:
            h = ACTIVATIONS[act](linear(x[rows], w_in[lo:hi], None if b_in is None else b_in[lo:hi]))
            y.index_add_(0, rows, h @ w_out[lo:hi])
    return y
