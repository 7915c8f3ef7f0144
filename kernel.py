"""The three operations that a transformer spends its time on, over packed tokens (no padding):

    linear       x weight^T + bias, by the fastest dense linear of the device
    attention    softmax(q k^T) v within each sequence
    experts      y[t] = b_out + sum over e with mask[t, e] of act(x[t] w_in[e]^T + b_in[e]) w_out[e]

where w_in[e] and w_out[e] are the rows offsets[e]:offsets[e+1] of two neuron-major (H, D) matrices.
`experts` exists in plain torch (differentiable), in Triton (NVIDIA and AMD GPUs) and in C++ (CPUs:
the source at the end of this file, built on first use in about 10 s, called through ctypes). All
accumulate in fp32. Experts are summed, never weighted. A NaN in a row of x stays in that row.
For inference weights may be Int8 (whole numbers, a scale a row; x is quantised row by row on the
fly); on a CPU `encode_int8` runs all blocks of a model in one call, router and rule included.

    B batch · L sequence length · T tokens · D n_embd · H hidden neurons
    E experts · s neurons in an expert · rho share of neurons run
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import platform
import shlex
import struct
import subprocess
import tempfile
import time
import warnings
from types import SimpleNamespace
from typing import NamedTuple, Optional

# Files that lie, and shapes that do not fit, would reach C++.
if not __debug__:
    raise ImportError('d2dmoe checks what it is given by asserts: run Python without -O')

import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    # macOS has no wheel: the GPU kernels stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

# Up to so many tokens reading the weights bounds an MLP, not arithmetic.
FEW = 16

# The C++ kernel knows them by their place here.
ACTIVATIONS = {'relu': F.relu, 'gelu': F.gelu,
               'gelu_tanh': lambda x: F.gelu(x, approximate='tanh')}

class Experts(NamedTuple):
    """An FFN sorted by expert: expert e owns the rows offsets[e]:offsets[e+1] of both matrices."""
    w_in: torch.Tensor                 # (H, D)
    b_in: Optional[torch.Tensor]       # (H)
    w_out: torch.Tensor                # (H, D)
    b_out: Optional[torch.Tensor]      # (D)
    offsets: torch.Tensor              # (E+1) int32
    act: str

def experts(x, mask, bundle, impl=None, rho=None):
    """The FFN by those experts that `mask` chooses for each token: x (T, D) -> (T, D).

    mask (T, E) bool; None runs every neuron, as two dense products. impl, one of IMPLS or None: the
    fastest for these inputs. rho, the share of neurons expected to run, is a hint that saves a GPU
    from waiting for the mask; the result does not depend on it. The reference serves iff grad is
    enabled and an input requires it. On a GPU fp32 sums are added atomically, so two calls may
    differ in the last bits; on a CPU they do not, whatever the number of threads.
    """
    if isinstance(bundle.w_in, Int8):
        if mask is None:
            mask = torch.ones(len(x), len(bundle.offsets) - 1, dtype=torch.bool, device=x.device)
        return (triton_experts if x.is_cuda and triton else int8_experts)(x, mask, bundle, rho)
    if mask is None:
        a = ACTIVATIONS[bundle.act](linear(x, bundle.w_in, bundle.b_in))  # (T, H)
        return linear(a, bundle.w_out.t(), bundle.b_out)
    inputs = (t for t in (x, mask, *bundle[:4]) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return reference(x, mask, bundle)
    # The compiler has to see one op; otherwise it would only cost 20 us, as much as a small layer.
    # Autocast does not see inside.
    if torch.compiler.is_compiling():
        return experts_op(x.to(bundle.w_in.dtype), mask, *bundle, impl, rho).to(x.dtype)
    return IMPLS[impl or choose(x, mask, bundle, rho)](x, mask, bundle, rho)

# The dispatcher: the first row that fits serves while rho < limit and, with a width, < s / width;
# beyond these dense is faster.
ANY, INF = None, math.inf
CHOICES = [
    # device, bytes an element, activation, tokens at most -> implementation, limit, width
    # Measured on an H200, assets/layer-h200.txt. In bf16 one token only reads the weights it needs;
    # 256 are too few to fill the tiles, 4096 are bound by moving x and y: s / rho FLOPs a byte.
    ('cuda:90', 2, ANY, 1, 'triton', 0.55, 0),
    ('cuda:90', 2, ANY, 1024, 'dense', INF, 0),
    ('cuda:90', 2, ANY, INF, 'triton', 0.8, 640),
    ('cuda:90', 4, ANY, INF, 'triton', 0.65, 0),
    # Other GPUs by the roofline in assets/gpu_kernels.txt, never checked on one.
    ('gpu', ANY, ANY, FEW, 'triton', 0.8, 0),
    ('gpu', 4, ANY, INF, 'triton', 0.8, 32),
    ('gpu', ANY, ANY, INF, 'triton', 0.8, 222),
    # CPUs, measured at D 768, H 3072. Zeros need no second matrix: 2.1 times as fast as dense at
    # rho 0.5, 1.1 at rho 1.
    ('cpu', ANY, 'relu', INF, 'cpp', INF, 0),
    # Few tokens only read the weights they need.
    ('cpu', ANY, ANY, FEW, 'cpp', INF, 0),
    # GELU has no zeros: 1.2 to 1.5 (rho 0.5), 0.9 to 1.1 (0.7, the last that runs here), 0.6 to 0.8
    # (1), where computing everything and masking it reaches 0.94 to 0.98.
    ('cpu', ANY, ANY, INF, 'cpp', math.nextafter(0.7, 1), 0),
]

def choose(x, mask, bundle, rho=None):
    """Which of IMPLS is the fastest for these inputs. Dense is an allowed answer."""
    if x.is_cuda and triton is not None:
        names = 'gpu', gpu_target(x.device)[0]
    # autocast leaves the weights as they are
    elif (x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and have_cpp()
          and x.dtype == bundle.w_in.dtype):
        names = ('cpu',)
    else:
        return 'dense' if x.device.type in ('cuda', 'mps') else 'torch'
    for device, itemsize, act, tokens, impl, limit, width in CHOICES:
        fits = device in names and itemsize in (ANY, x.element_size()) and act in (ANY, bundle.act)
        if fits and x.shape[0] <= tokens:
            break
    if limit == INF:
        return impl
    if width:
        limit = min(limit, len(bundle.w_in) / max(1, mask.shape[1]) / width)
    # Counting costs little where nothing has to wait for it.
    if x.is_cpu:
        rho = mask.sum().item() / max(1, mask.numel())
    return impl if (0.25 if rho is None else rho) < limit else 'dense'

# ------------------------------------------------------------------------------------------ ranks
#
# Under torchrun a run has several processes, its ranks; alone, all of this does nothing.

def ranks():
    """(which one this is, how many there are)."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

def over_ranks(x, op='SUM'):
    """x, in place, as all ranks together have it: their sum, or MAX."""
    if ranks()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x

def over_tokens(mean, n):
    """A mean over this rank's n tokens -> that over all ranks' tokens. Its gradient is this rank's
    part times the number of ranks: what comes after takes the average."""
    size = ranks()[1]
    if size == 1:
        return mean
    mine = mean * (n * size / over_ranks(mean.new_tensor(float(n))))
    return mine + (over_ranks(mine.detach().clone()) / size - mine.detach())

def wait_for_all():
    if ranks()[1] > 1:
        dist.barrier()

def shared_out(job, n):
    """[job(i) for i in range(n)], of which each rank does its part."""
    rank, size = ranks()
    mine, parts = [job(i) for i in range(rank, n, size)], [None] * size
    if size == 1:
        return mine
    dist.all_gather_object(parts, mine)
    return [parts[i % size][i // size] for i in range(n)]

# ------------------------------------------------------------------------------------ plain torch

def linear(x, weight, bias=None):
    """x (..., K), weight (N, K), bias (N) or None -> (..., N) by the fastest linear here.

    On a CPU that is MKL or oneDNN, timed once per shape class; only under inference_mode, because
    the two round differently and a training run has to repeat bit for bit.
    """
    if isinstance(weight, Int8):
        return int8_linear(x, weight).to(x.dtype)
    # In this order: a compiler cannot trace the question for inference mode.
    plain = torch.compiler.is_compiling() or not x.is_cpu or not x.numel()
    # Autocast casts for F.linear; oneDNN would be given two dtypes.
    plain = plain or torch.is_autocast_enabled('cpu')
    if plain or not torch.is_inference_mode_enabled():
        return F.linear(x, weight, bias)
    # From 512 tokens on, the faster one stays it.
    rows = min(x.numel() // x.shape[-1], 512).bit_length()
    f = fastest_linear(rows, tuple(weight.shape), weight.is_contiguous(), x.dtype)
    return f(x, weight, bias)

def onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

def in_fp32(x, weight, bias=None):
    """For half precision on CPUs without units for it: there converting everything is faster."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

@functools.cache
def fastest_linear(rows, shape, contiguous, dtype):
    """What is fastest for 2^rows / 2 tokens and this weight: F.linear (MKL in fp32) or another."""
    # Other numbers than a run that goes on has to draw again.
    randn = functools.partial(torch.randn, generator=torch.Generator())
    weight = randn(shape if contiguous else shape[::-1]).to(dtype)
    weight = weight if contiguous else weight.T
    x, best = randn(1 << rows - 1, shape[1]).to(dtype), {}
    jobs = (F.linear, onednn, in_fp32) if dtype.itemsize == 2 else (F.linear, onednn)
    # In turn; the first round warms up.
    for f in jobs * 4:
        # oneDNN is not in every build, nor does it take every dtype.
        try:
            start = time.perf_counter()
            f(x, weight)
            best.setdefault(f, []).append(time.perf_counter() - start)
        except (RuntimeError, AttributeError):
            pass
    return min(best, key=lambda f: min(best[f][1:]))

def neuron_mask(mask, offsets, n_hidden):  # (T, E) -> (T, H)
    return mask.repeat_interleave(offsets.diff().long(), -1, output_size=n_hidden)

def masked(a, mask, offsets):
    """a (T, H) where mask (T, E) is true, else 0; times mask, where that is being learned."""
    wide = neuron_mask(mask, offsets, a.shape[1])
    return a * wide if wide.is_floating_point() else a.masked_fill(~wide, 0)

def reference(x, mask, bundle):
    """The definition of `experts`, differentiable: computes everything and masks it."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    a = masked(ACTIVATIONS[act](F.linear(x, w_in, b_in)), mask, offsets)  # (T, H)
    return F.linear(a, w_out.t(), b_out)

def dense_masked(x, mask, bundle, rho=None):
    """Computes everything, block of tokens by block of tokens, and zeroes what was not chosen."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    y, H, E = torch.empty_like(x), len(w_in), mask.shape[1]
    # On a GPU looking at the offsets would be waiting for them.
    equal = x.is_cpu and E > 0 and H % E == 0 and bool((offsets.diff() == H // E).all())
    fused = x.is_cuda and triton is not None and H > 0
    block = 512 if x.is_cpu else 4096
    for rows in (slice(i, i + block) for i in range(0, len(x), block)):
        a = linear(x[rows], w_in, b_in)  # (block, H)
        a = masked_activation(a, mask[rows], offsets, act) if fused else ACTIVATIONS[act](a)
        # Equal experts need no mask of neurons: 0.95 times as fast as dense, not 0.82.
        if equal:
            a.view(len(a), E, H // E).masked_fill_(~mask[rows, :, None], 0)
        elif not fused:
            a.masked_fill_(~neuron_mask(mask[rows], offsets, H), 0)
        y[rows] = linear(a, w_out.t(), b_out)
    return y

def expert_loop(x, mask, bundle, rho=None):
    """The best that plain torch has: gather an expert's tokens, two products, add the rows back."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    edges = offsets.tolist()
    for e, (lo, hi) in enumerate(zip(edges, edges[1:])):
        rows = mask[:, e].nonzero().squeeze(-1)
        if len(rows) and hi > lo:
            bias = None if b_in is None else b_in[lo:hi]
            h = ACTIVATIONS[act](linear(x[rows], w_in[lo:hi], bias))  # (rows, s)
            y.index_add_(0, rows, (h @ w_out[lo:hi]).to(y.dtype))
    return (y if b_out is None else y + b_out).to(x.dtype)

# -------------------------------------------------------------------------------------- attention

class Layout(NamedTuple):
    """Where the T packed tokens stand in their batch of B sequences of at most L tokens."""
    B: int
    L: int
    starts: torch.Tensor               # (B+1) int32: of each sequence's tokens, on the CPU
    index: Optional[torch.Tensor]      # (T) places in the batch, None where none is padding
    mask: Optional[torch.Tensor]       # (B, 1, 1 or L, L) bool, None where none is needed
    causal: bool

    @staticmethod
    def of(keep, B, L, causal):
        """keep (B, L): 0 where padding is, or None."""
        if keep is None or bool(keep.all()):
            starts = torch.arange(B + 1, dtype=torch.int32) * L
            return Layout(B, L, starts, None, None, causal)
        index, mask = keep.reshape(-1).nonzero().squeeze(-1), keep.bool()[:, None, None, :]
        if causal:
            mask = mask & torch.ones(L, L, dtype=torch.bool, device=keep.device).tril()
        starts = F.pad(keep.bool().sum(1).cumsum(0), (1, 0)).to('cpu', torch.int32)
        return Layout(B, L, starts, index, mask, causal)

    def pad(self, x):  # (T, ...) -> (B, L, ...)
        if self.index is not None:
            x = x.new_zeros(self.B * self.L, *x.shape[1:]).index_copy(0, self.index, x)
        return x.view(self.B, self.L, *x.shape[1:])

    def pack(self, x):  # (B, L, ...) -> (T, ...)
        x = x.reshape(self.B * self.L, *x.shape[2:])
        return x if self.index is None else x[self.index]

    def without(self, gone):
        """Where the tokens stand that are left: gone (T) bool. Sequences of which none is go."""
        keep = torch.zeros(self.B * self.L, dtype=torch.bool, device=gone.device)
        keep[slice(None) if self.index is None else self.index] = ~gone
        keep = keep.view(self.B, self.L)
        return Layout.of(keep[keep.any(1)], int(keep.any(1).sum()), self.L, self.causal)

    def head_rows(self):  # (B): of each sequence the token that a classifier reads, a GPT the last
        return (self.starts[1:] - 1 if self.causal else self.starts[:-1]).long()

class LayerCache:
    """Keys and values of one layer, (B, heads, size, d), of which the first n are filled."""

    def __init__(self, size):
        self.k = self.v = None
        self.size, self.n = size, 0

    def reserve(self, B, heads, d, like):
        if self.k is None:
            self.k, self.v = (like.new_empty(B, heads, self.size, d) for _ in 'kv')
        assert len(self.k) == B, f'a cache of {len(self.k)} sequences, now {B}'

    def extend(self, k, v):
        self.reserve(len(k), k.shape[1], k.shape[3], k)
        end = self.n + k.shape[2]
        self.k[:, :, self.n:end], self.v[:, :, self.n:end] = k, v
        self.n = end
        return self.k[:, :, :end], self.v[:, :, :end]

def spoilt_attention(q, k, v, mask, dropout):
    """Attention where not all of k and v is finite: that reaches only who may look at it."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf)  # (B, heads, n, L)
    y = F.dropout(scores.softmax(-1), dropout) @ v.nan_to_num(0, 0, 0)
    seen = mask.to(v.dtype) @ (~v.isfinite()).to(v.dtype)
    return y.masked_fill(seen > 0, math.nan)

def attention(q, k, v, layout, cache=None, dropout=0.0):
    """k, v (T, heads, d): every token looks at those of its own sequence, a GPT's at earlier ones.
    q as k -> (T, heads, d); or (B, heads, d), of the tokens layout.head_rows() alone -> as many."""
    only, looks = len(q) < len(k), q.is_cpu and not torch.compiler.is_compiling()
    fast = looks and not dropout and q.dtype in (torch.float32, torch.bfloat16)
    if fast and torch.is_inference_mode_enabled() and have_cpp():
        return cpp_attention(q, k, v, layout, cache, only)
    q = q[:, :, None] if only else layout.pad(q).transpose(1, 2)
    k, v = (layout.pad(t).transpose(1, 2) for t in (k, v))  # (B, heads, L, d)
    if cache is not None:
        k, v = cache.extend(k, v)
    new, past = q.shape[2], k.shape[2] - q.shape[2]
    mask = layout.mask[:, :, -1:] if only and layout.mask is not None else layout.mask
    # A single query is the last token, and sees all; torch's own mask knows of no past.
    causal = layout.causal and new > 1
    # Nor of 0 times NaN; on a GPU to look would be to wait.
    spoilt = causal and looks and not (k.sum() + v.sum()).isfinite()
    if causal and mask is None and (past or spoilt):
        mask = torch.ones(new, past + new, dtype=torch.bool, device=q.device).tril(past)
    if spoilt:
        y = spoilt_attention(q, k, v, mask, dropout)
    else:
        causal = causal and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    return y[:, :, 0] if only else layout.pack(y.transpose(1, 2))

# ----------------------------------------------------------------------------------------- Triton
#
# The work is a list of items: (expert, at most SB of its neurons, at most BM of its tokens).
#
#     h          = act(x[tokens] @ w_in[neurons].T + b_in)      (BM, SB), stays in registers
#     y[tokens] += h @ w_out[neurons]                           atomically, a few columns at a time
#
# x and y travel once per item: that traffic bounds small experts. Hence tokens come in chunks whose
# rows stay in the L2 cache, all experts of a chunk run before the next chunk starts, and an item
# takes up to 128 neurons. The mask never travels to the host: `dispatch_kernel` lists the tokens
# on the device, and a fixed number of programs share out the items they find. So a call can be
# captured in a CUDA graph and replayed with another mask.

INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'

# Of x in a chunk of tokens: with y 25 MB in bf16, 34 in fp32; an A100 caches 40 MB, an H100 50.
CHUNK_ELEMENTS = 1 << 22

# Tiles (BM tokens, SB neurons, BK and BN columns of D in the two loops, warps, stages), largest
# first, by target and bytes an element: without a spill, see assets/gpu_kernels.txt. h in registers
# limits BM x SB, in fp32 sooner; BN is small where adds are not vectors (sm_80) or an activation
# needs room beside h (gelu_tanh on sm_90).
TILES = {
    ('cuda:80', 2): [(128, 128, 64, 32, 8, 3), (128, 64, 64, 32, 8, 3), (64, 32, 64, 32, 4, 3),
                     (16, 32, 64, 64, 4, 4)],
    ('cuda:80', 4): [(128, 64, 32, 16, 8, 3), (64, 32, 32, 16, 4, 3), (16, 32, 32, 32, 4, 4)],
    ('cuda:90', 2): [(128, 128, 64, 32, 8, 3), (128, 64, 64, 64, 8, 3), (64, 32, 64, 64, 4, 3),
                     (16, 32, 64, 64, 4, 4)],
    ('cuda:90', 4): [(128, 64, 32, 32, 8, 3), (64, 32, 32, 32, 4, 3), (16, 32, 32, 32, 4, 4)],
    ('hip', 2): [(128, 128, 64, 32, 8, 2), (128, 64, 64, 32, 8, 2), (64, 32, 64, 32, 4, 2),
                 (16, 32, 64, 64, 4, 2)],
    ('hip', 4): [(128, 64, 32, 32, 8, 2), (64, 32, 32, 32, 4, 2), (16, 32, 32, 32, 4, 2)],
}
# 1 byte: int8 weights and x in half precision. To convert takes registers.
for target in ('cuda:80', 'cuda:90'):
    TILES[target, 1] = [(128, 128, 32, 32, 8, 3), *TILES[target, 2][1:]]
TILES['hip', 1] = [(128, 128, 64, 16, 8, 2), (128, 64, 32, 32, 8, 2), (64, 32, 64, 16, 4, 2),
                   (16, 32, 64, 64, 4, 2)]

def jit(kernel):
    # a new number of tokens must not compile a new kernel
    return triton.jit(kernel, do_not_specialize=['T']) if triton else kernel

@jit
def activate(h, ACT: tl.constexpr):
    if ACT == 'relu':
        # relu(NaN) is NaN
        h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == 'gelu':
        h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    else:
        # gelu_tanh, where (1 + tanh z) / 2 = sigmoid(2z)
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    return h

@jit
def dispatch_kernel(mask, idx, count, T, E, LEN,
                    CHUNK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """mask (T, E) -> for each chunk and expert `count` tokens, the first `count` of idx (chunks,
    E, LEN), numbered within the chunk, in any order. A program ranks the tokens of each column of
    its BT x BE of the mask and reserves as many places in the column's list with one atomic."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    place = t[:, None].to(tl.int64) * E + e[None, :]
    run = tl.load(mask + place, mask=inside, other=0).to(tl.int32)  # (BT, BE)
    # CHUNK is a multiple of BT: a program stays within one chunk.
    chunk = tl.program_id(0) * BT // CHUNK
    column = chunk * E + e
    start = tl.atomic_add(count + column, tl.sum(run, 0), mask=e < E, sem='relaxed')  # (BE)
    rank = start[None, :] + tl.cumsum(run, 0) - run  # (BT, BE)
    token = tl.broadcast_to((t - chunk * CHUNK)[:, None], (BT, BE))
    tl.store(idx + column[None, :].to(tl.int64) * LEN + rank, token, mask=run != 0)

@jit
def expert_kernel(x, w_in, s_in, b_in, w_out, s_out, offsets, idx, count, y, E, LEN, D,
                  EVEN: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
                  CHUNK: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, SB: tl.constexpr,
                  BK: tl.constexpr, BN: tl.constexpr):
    chunk = tl.program_id(1).to(tl.int64)
    x += chunk * CHUNK * D
    y += chunk * CHUNK * D
    idx += chunk * E * LEN
    count += chunk * E

    # Number the items of all experts through: expert e holds those from end[e-1] to end[e].
    every = tl.arange(0, BE)
    lo = tl.load(offsets + every, mask=every < E, other=0)
    size = tl.load(offsets + every + 1, mask=every < E, other=0) - lo
    tokens = tl.load(count + every, mask=every < E, other=0)
    end = tl.cumsum(tl.cdiv(tokens, BM) * tl.cdiv(size, SB), 0)  # (BE)

    for item in range(tl.program_id(0), tl.max(end, 0), tl.num_programs(0)):
        e = tl.sum((end <= item).to(tl.int32), 0)
        tile = item - tl.max(tl.where(end <= item, end, 0), 0)
        n = tl.load(count + e)
        # Neighbours in time share the weights and differ in tokens: their atomics do not collide.
        m = tile % tl.cdiv(n, BM) * BM + tl.arange(0, BM)
        first = tl.load(offsets + e) + tile // tl.cdiv(n, BM) * SB
        left = tl.load(offsets + e + 1) - first
        # Lanes past the end repeat a valid row, and what they compute is dropped: cheaper than
        # masking every load. The atomic's mask drops tokens, a zero in h drops neurons.
        is_token, is_neuron = m < n, tl.arange(0, SB) < left
        row = tl.load(idx + e * LEN + m, mask=is_token, other=0).to(tl.int64) * D  # (BM)
        neuron = first.to(tl.int64) + tl.minimum(tl.arange(0, SB), left - 1)  # (SB)

        h = tl.zeros((BM, SB), tl.float32)
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            # EVEN: BK and BN divide D, and the mask folds away.
            in_d = (k < D) | EVEN
            a = tl.load(x + row[:, None] + k[None, :], mask=in_d[None, :], other=0)  # (BM, BK)
            w = tl.load(w_in + neuron[None, :] * D + k[:, None],
                        mask=in_d[:, None], other=0)  # (BK, SB)
            h = tl.dot(a, w.to(a.dtype), h, input_precision=PRECISION)
        if s_in is not None:
            h *= tl.load(s_in + neuron)[None, :]
        if b_in is not None:
            h += tl.load(b_in + neuron).to(tl.float32)[None, :]
        h = tl.where(is_neuron[None, :], activate(h, ACT), 0.0)
        if s_out is not None:
            # or they would be loaded early, where every register is in use
            tl.debug_barrier()
            h *= tl.load(s_out + neuron)[None, :]
        hidden = h.to(x.dtype.element_ty)

        for d0 in range(0, D, BN):
            d = d0 + tl.arange(0, BN)
            in_d = (d < D) | EVEN
            w = tl.load(w_out + neuron[:, None] * D + d[None, :],
                        mask=in_d[None, :], other=0)  # (SB, BN)
            out = tl.dot(hidden, w.to(hidden.dtype), input_precision=PRECISION)  # (BM, BN)
            wanted = is_token[:, None] & in_d[None, :]
            tl.atomic_add(y + row[:, None] + d[None, :], out, mask=wanted, sem='relaxed')

@jit
def decode_kernel(x, mask, w_in, s_in, b_in, w_out, s_out, offsets, y, E, D,
                  ACT: tl.constexpr, BE: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr):
    """A few tokens: a program is (token, NB neurons), whatever experts these belong to. All that
    counts is to ask for the weights at once, early and in small pieces; sums are plain fp32
    multiply-adds. Neurons that do not run are not read."""
    # Tokens vary fastest: programs side by side share weights in L2.
    t = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * NB + tl.arange(0, NB)
    e = tl.arange(0, BE)
    chosen = tl.load(mask + t * E + e, mask=e < E, other=0) != 0
    lo = tl.load(offsets + e, mask=e < E, other=0)
    hi = tl.load(offsets + e + 1, mask=e < E, other=0)
    owns = chosen[None, :] & (lo[None, :] <= j[:, None]) & (j[:, None] < hi[None, :])  # (NB, BE)
    runs = tl.sum(owns.to(tl.int32), 1) > 0  # (NB)
    if tl.sum(runs.to(tl.int32), 0) > 0:
        d = tl.arange(0, BD)
        place = j[:, None].to(tl.int64) * D + d[None, :]  # (NB, BD)
        needed = runs[:, None] & (d < D)[None, :]
        w1 = tl.load(w_in + place, mask=needed, other=0)
        w2 = tl.load(w_out + place, mask=needed, other=0)
        a = tl.load(x + t * D + d, mask=d < D, other=0)
        h = tl.sum(w1.to(tl.float32) * a.to(tl.float32)[None, :], 1)  # (NB)
        if s_in is not None:
            h *= tl.load(s_in + j, mask=runs, other=0)
        if b_in is not None:
            h += tl.load(b_in + j, mask=runs, other=0).to(tl.float32)
        h = tl.where(runs, activate(h, ACT), 0.0)
        if s_out is not None:
            h *= tl.load(s_out + j, mask=runs, other=0)
        out = tl.sum(w2.to(tl.float32) * h[:, None], 0)  # (BD)
        tl.atomic_add(y + t * D + d, out, mask=d < D, sem='relaxed')

@jit
def mask_kernel(z, mask, expert, T, E, H, ACT: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    j = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (t < T)[:, None] & (j < H)[None, :]  # (BT, BH)
    e = tl.load(expert + j, mask=j < H, other=0)
    run = tl.load(mask + t[:, None] * E + e[None, :], mask=inside, other=0)
    here = z + t[:, None] * H + j[None, :]
    a = activate(tl.load(here, mask=inside, other=0).to(tl.float32), ACT)
    tl.store(here, tl.where(run != 0, a, 0.0).to(z.dtype.element_ty), mask=inside)

def masked_activation(z, mask, offsets, act):
    """act(z) where mask (T, E) chose the neuron's expert, else 0: z (T, H) in place, one pass. In
    plain torch the passes over (T, H) cost as much as both products (bf16, an H200)."""
    (T, H), E = z.shape, mask.shape[1]
    expert = torch.bucketize(torch.arange(H, device=z.device), offsets[1:], right=True)
    mask = mask.contiguous().view(torch.uint8)
    grid = triton.cdiv(T, 16), triton.cdiv(H, 256)
    options = gpu_target(z.device)[2]
    with torch.cuda.device_of(z):
        mask_kernel[grid](z, mask, expert, T, E, H, ACT=act, BT=16, BH=256, num_warps=4, **options)
    return z

def compiler_options(target):
    # AMD: 16 x 16 matrix instructions, because with 32 x 32 the fp32 tiles spill scalar registers.
    return dict(enable_fp_fusion=True) | (dict(matrix_instr_nonkdim=16) if target == 'hip' else {})

@functools.cache
def gpu_target(device):
    """Which of TILES serve this device, its number of processors, its compiler's options."""
    if INTERPRET:
        return 'cuda:80', 1, {}
    properties = torch.cuda.get_device_properties(device)
    # The tiles of sm_80, the modest ones, serve every other GPU of NVIDIA's.
    target = 'cuda:90' if properties.major == 9 else 'cuda:80'
    target = 'hip' if torch.version.hip else target
    return target, properties.multi_processor_count, compiler_options(target)

def triton_experts(x, mask, bundle, rho=None):
    """`experts` on a GPU. Nothing here looks at the mask or the offsets: `rho` only sizes tiles and
    grid, and any mask gives the right answer with any rho. Of an Int8 only the weights are whole
    numbers, which a tile turns into x's dtype: a row's scale multiplies h, not the row."""
    (T, D), H, E, dtype = x.shape, len(bundle.w_in), mask.shape[1], x.dtype
    w_in, b_in, w_out, b_out, offsets, act = bundle
    s_in = s_out = None
    if INTERPRET:
        # which would multiply the bit patterns of bf16
        x = x.float()
    if isinstance(w_in, Int8):
        (w_in, s_in, b_in), (w_out, s_out, b_out) = ((m.w, m.scale, m.bias) for m in (w_in, w_out))
    x, w_in, w_out = (t.contiguous() for t in (x, w_in, w_out))
    mask = mask.contiguous().view(torch.uint8)
    y = torch.empty(T, D, dtype=torch.float32, device=x.device)
    y.zero_() if b_out is None else y.copy_(b_out)
    if T == 0 or H == 0 or E == 0:
        return y.to(dtype)
    target, processors, options = gpu_target(x.device)
    rho = 0.25 if rho is None else min(max(float(rho), 0.0), 1.0)
    BE = triton.next_power_of_2(max(E, 16))

    with torch.cuda.device_of(x):
        # One by one, tokens read their weights again (from L2): as long as that is a few times, it
        # is cheaper than to launch the dispatch.
        if T == 1 or (T <= FEW and T * rho <= 4):
            # About 4096 elements of each matrix a program: 12 KB in flight at D 768 in bf16.
            BD = triton.next_power_of_2(D)
            NB, num_warps = max(1, 4096 // BD), min(16, max(4, BD // 1024))
            decode_kernel[T, triton.cdiv(H, NB)](
                x, mask, w_in, s_in, b_in, w_out, s_out, offsets, y, E, D, ACT=act, BE=BE, NB=NB,
                BD=BD, num_warps=num_warps, **options)
            return y.to(dtype)

        CHUNK = max(128, 1 << (CHUNK_ELEMENTS // D).bit_length() - 1)
        chunks, length = triton.cdiv(T, CHUNK), min(triton.cdiv(T, 16) * 16, CHUNK)
        idx = torch.empty(chunks, E, length, dtype=torch.int32, device=x.device)
        count = torch.zeros(chunks, E, dtype=torch.int32, device=x.device)
        dispatch_kernel[triton.cdiv(T, 128), triton.cdiv(E, 32)](
            mask, idx, count, T, E, length, CHUNK=CHUNK, BT=128, BE=32, **options)

        tokens, s = max(1, round(rho * min(T, CHUNK))), triton.cdiv(H, E)
        full = x.dtype == torch.float32
        # The largest tile, as it reads the least, that is not mostly padding and keeps half of the
        # processors busy, else the smallest.
        for BM, SB, BK, BN, num_warps, num_stages in TILES[target, 4 if full else w_in.itemsize]:
            items = E * triton.cdiv(tokens, BM) * triton.cdiv(s, SB)
            if SB < max(2 * s, 64) and BM <= tokens and 2 * items * chunks >= processors:
                break
        # fp32 on NVIDIA is three tf32 products, as good and on tensor cores. AMD multiplies fp32.
        tf32 = full and target != 'hip'
        expert_kernel[min(items, 8 * processors), chunks](
            x, w_in, s_in, b_in, w_out, s_out, offsets, idx, count, y, E, length, D,
            EVEN=D % max(BK, BN) == 0, ACT=act, PRECISION='tf32x3' if tf32 else 'ieee',
            CHUNK=CHUNK, BE=BE, BM=BM, SB=SB, BK=BK, BN=BN, num_warps=num_warps,
            num_stages=num_stages, **options)
    return y.to(dtype)

# -------------------------------------------------------------------------------------------- C++

# Rows so small are zero in int8: their numbers would be denormal.
TINY = 1e-30
# What the source below shares with this file.
FLAGS = ['-O3', '-std=c++17', '-shared', '-fPIC', f'-DFEW={FEW}', f'-DTINY={TINY}f']
# The first that compiles and loads serves. For AMD GCC would fuse some sums and leave others, so
# that one query and eight rounded differently.
NATIVE = [['-march=native', '-fopenmp', '--param', 'avoid-fma-max-bits=0'],
          ['-march=native', '-fopenmp'], ['-march=native'], ['-mcpu=native']]

def packed(*values):
    """A struct of the source below, every field of which takes 8 bytes: of a tensor its address."""
    # of a Tensor isinstance() takes four times as long
    words = [v.data_ptr() if hasattr(v, 'data_ptr') else v or 0 for v in values]
    return struct.pack(''.join(['d' if isinstance(v, float) else 'q' for v in words]), *words)

def cpu_name():
    """What -march=native depends on."""
    if not os.path.exists('/proc/cpuinfo'):
        return platform.machine() + platform.processor()
    with open('/proc/cpuinfo') as f:
        kinds = ('model name', 'flags', 'Features')
        return ''.join(sorted({line for line in f if line.startswith(kinds)}))

def compile_cpp(cxx):
    """The shared library, compiled unless the cache has it and it is whole."""
    version = subprocess.run([*cxx, '--version'], capture_output=True, encoding='latin-1').stdout
    key = '\0'.join([CPP, *cxx, *FLAGS, *sum(NATIVE, []), version, cpu_name()])
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(cache, 'd2dmoe')
    path = os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:16] + '.so')
    with contextlib.suppress(OSError):
        return ctypes.CDLL(path)
    os.makedirs(folder, exist_ok=True)
    # In the same file system, so that the rename is atomic.
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        for native in NATIVE:
            command = [*cxx, *FLAGS, *native, '-o', f'{tmp}/kernel.so', '-x', 'c++', '-']
            done = subprocess.run(command, input=CPP, capture_output=True, errors='replace')
            try:
                if done.returncode == 0:
                    # OpenMP's runtime may be missing.
                    ctypes.CDLL(f'{tmp}/kernel.so')
                    # Cut short by a power cut, it would kill whoever loads it.
                    with open(f'{tmp}/kernel.so', 'rb+') as f:
                        os.fsync(f.fileno())
                    os.replace(f'{tmp}/kernel.so', path)
                    return ctypes.CDLL(path)
            except OSError as error:
                done.stderr = str(error)
    raise OSError(done.stderr.strip()[-2000:])

@functools.cache
def library():
    """The compiled kernel, or None (with one warning that says why) where it can't be built."""
    try:
        return compile_cpp(shlex.split(os.environ.get('CXX') or 'c++'))
    except (OSError, ValueError) as error:
        why = f'building the C++ kernel failed: experts run in plain torch, slowly\n{error}'
        return warnings.warn(why)

def have_cpp():
    return library() is not None

# In a forked child libgomp would hang, in torch's operations as in ours.
n_threads = torch.get_num_threads
if hasattr(os, 'register_at_fork'):         # not on Windows
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))

def cpp_experts(x, mask, bundle, rho=None, path=None):
    """`experts` on a CPU, in fp32 or bf16. path: 'few' or 'many' tokens, None: by their number."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    (T, D), E = x.shape, mask.shape[1]
    assert x.dtype in (torch.float32, torch.bfloat16) and offsets.dtype == torch.int32
    assert mask.dtype == torch.bool and mask.shape == (T, len(offsets) - 1)
    for w in (w_in, w_out):
        assert w.dtype == x.dtype and w.shape == (len(w_in), D) and w.is_contiguous()
    x, mask, offsets = x.contiguous(), mask.contiguous(), offsets.contiguous()
    # These names keep the copies alive to the end of the call.
    b_in, b_out = (None if b is None else b.float().contiguous() for b in (b_in, b_out))
    y = torch.empty_like(x)
    if T:
        job = packed(x, mask, w_in, b_in, w_out, b_out, offsets, y, T, D, E,
                     list(ACTIVATIONS).index(act), n_threads())
        few = T <= FEW if path is None else path == 'few'
        library().run(job, x.dtype == torch.bfloat16, few)
    return y

# ------------------------------------------------------------------------------------------- int8

@dataclasses.dataclass
class Int8:
    """A matrix (N, K) and its bias for inference: a scale a row, the largest / 127, times whole
    numbers -127 .. 127. For the C++ kernel they lie in blocks of 8 x 8, plus 128; see there."""
    w: torch.Tensor                    # (N, K) int8, or blocks (N / 8, K / 8, 64) uint8
    scale: torch.Tensor                # (N), with blocks padded to whole ones, as is bias
    bias: torch.Tensor                 # (N), of a w_out (K)
    N: int
    K: int
    by_column: bool                    # a w_out, which is multiplied from the left: h @ w

    def __len__(self):
        return self.N

    @property
    def shape(self):
        return self.N, self.K

def whole_numbers(x):
    """x (T, K) -> whole numbers as floats (T, K), scale (T, 1)."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > TINY, x / scale, 0).round(), scale

def pad_to_8(t, dim=-1):
    short = -t.shape[dim] % 8
    return t if not short else F.pad(t.movedim(dim, -1), (0, short)).movedim(-1, dim)

def int8(w, bias=None, by_column=False):
    """w (N, K) in fp32, bias (N), or (K) of a w_out -> Int8."""
    w, (N, K) = w.detach().float(), w.shape
    q, scale = whole_numbers(w)
    bias = w.new_zeros(K if by_column else N) if bias is None else bias.detach().float().clone()
    if not (w.is_cpu and have_cpp()):
        return Int8(q.to(torch.int8), scale[:, 0], bias, N, K, by_column)
    blocks = pad_to_8(pad_to_8(q), 0).view(-(-N // 8), 8, -(-K // 8), 8).transpose(1, 2)
    blocks = blocks.transpose(2, 3) if by_column else blocks
    blocks = blocks.unflatten(3, (-1, library().columns())).transpose(2, 3)
    blocks = (blocks.flatten(2) + 128).to(torch.uint8)
    return Int8(blocks, pad_to_8(scale[:, 0]), pad_to_8(bias), N, K, by_column)

def int8_linear(x, m):
    """x (..., K) -> (..., N) in fp32; x is quantised row by row, but not on a GPU."""
    assert x.shape[-1] == m.K, f'x has {x.shape[-1]} columns, the matrix {m.K}'
    if m.w.dtype == torch.uint8:
        flat = pad_to_8(x.reshape(-1, m.K).float()).contiguous()
        y = flat.new_empty(len(flat), m.N)
        library().linear8(packed(*c_matrix(m)), packed(flat, None, y, len(y), n_threads()))
        return y.view(*x.shape[:-1], m.N)
    q, scale = whole_numbers(x.float()) if x.is_cpu else (x, 1)
    return F.linear(q, m.w.to(q.dtype)) * (scale * m.scale) + m.bias

def int8_experts(x, mask, bundle, rho=None):
    """`experts` by whole numbers: h, times the scales of w_out, is quantised token by token."""
    w_in, w_out, act = bundle.w_in, bundle.w_out, bundle.act
    assert mask.dtype == torch.bool and mask.shape == (len(x), len(bundle.offsets) - 1)
    assert x.shape[1] == w_in.K, f'x has {x.shape[1]} columns, w_in {w_in.K}'
    if w_in.w.dtype == torch.uint8:
        assert not bundle.offsets.remainder(8).any(), 'experts are whole blocks: MLP.quantize'
        flat, mask = pad_to_8(x.float()).contiguous(), mask.contiguous()
        y = torch.zeros_like(flat)
        library().experts8(packed(*c_ffn(bundle)), packed(flat, mask, y, len(x), n_threads()))
        return y[:, :x.shape[1]].to(x.dtype)
    a = masked(ACTIVATIONS[act](int8_linear(x, w_in)), mask, bundle.offsets) * w_out.scale
    q, scale = whole_numbers(a)
    return (q @ w_out.w.float() * scale + w_out.bias).to(x.dtype)

ones = functools.cache(functools.partial(torch.ones, dtype=torch.float32))

def c_matrix(m):
    """The fields of a struct of that name, as the next ones."""
    rows, columns, _ = m.w.shape
    if m.by_column:
        return m.w, ones(8 * columns), m.bias, m.K, 8 * rows, 64, 64 * columns
    return m.w, m.scale, m.bias, m.N, 8 * columns, 64 * columns, 64

def c_ffn(bundle):
    return (*c_matrix(bundle.w_in), *c_matrix(bundle.w_out), bundle.w_out.scale, bundle.offsets,
            len(bundle.offsets) - 1, list(ACTIVATIONS).index(bundle.act))

def int8_layer(projections, mlps, norms):
    """A block for encode_int8. projections: q (or q, k and v in one), k, v and o as Int8, or None
    where there is none; mlps: what q, k, v and o are instead, and the FFN, each None or (Experts,
    router: None or its two matrices, whether the rule is dynk, tau, floor); norms: scale and shift
    of both LayerNorms. The caller keeps them alive.
    -> the beginning of a Layer; of each of mlps None, or how many experts its router has, or 0."""
    fields = [field for m in projections for field in (c_matrix(m) if m else [None] * 7)]
    for bundle, router in (mlp or (None, None) for mlp in mlps):
        *matrices, dynk, tau, floor = router or (None, None, False, 0, 0)
        fields += [field for m in matrices for field in (c_matrix(m) if m else [None] * 7)]
        fields += [*(c_ffn(bundle) if bundle else [None] * 18), dynk, float(tau), float(floor)]
    numbers = [mlp and (len(mlp[0].offsets) - 1 if mlp[1] else 0) for mlp in mlps]
    return packed(*fields, *norms), numbers

def c_attention(q, k, v, y, layout, cache=None, only=False):
    """q, k, v (T, heads, d), rows equally far apart; y: of the result."""
    cache = cache or LayerCache(layout.L)
    assert cache.n + layout.L <= cache.size, f'the cache has room for {cache.size} tokens'
    return (q, k, v, y, layout.starts, cache.k, cache.v, layout.B, *k.shape[1:], k.stride(0),
            layout.L, cache.n, cache.size, layout.causal, only, n_threads())

def cpp_attention(q, k, v, layout, cache=None, only=False):
    """`attention` on a CPU, computed in fp32."""
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    y = q.new_empty(q.shape)
    if cache is not None:
        cache.reserve(layout.B, *k.shape[1:], k)
    # the kernel finds the q of a sequence where its tokens are
    if only:
        q = torch.empty_like(k).index_copy_(0, layout.head_rows(), q)
    q, k, v = (t.contiguous() for t in (q, k, v))
    library().attention(packed(*c_attention(q, k, v, y, layout, cache, only)))
    if cache is not None:
        cache.n += layout.L
    return y.to(dtype)

def encode_int8(x, blocks, layout, heads, pre_ln, eps, cache=None, only=False, masks=None,
                halting=None):
    """The blocks of a model in int8, a list of int8_layer(), as one call: x (T, D) fp32 -> (T, D),
    in place; with `only` (B, D): the last block is needed for the tokens layout.head_rows() alone.
    heads: how many, of how many dimensions.
    masks: a list that receives each MLP's (T, E), None where it has no router. halting (2), gain
    and shift of router.Halting: tokens leave early; `masks` receives also what entered each block,
    its `alive`."""
    (T, D), layers, chosen = x.shape, [], []
    out, alive = x, None
    if halting is not None:
        out, alive = x.new_zeros(layout.B if only else T, D), torch.zeros(len(blocks), 3).double()
        layout = layout._replace(starts=layout.starts.clone())
    qkv, y = x.new_empty(T, 3, *heads), x.new_empty(T, math.prod(heads))
    attention = c_attention(*qkv.unbind(1), y, layout, cache[0] if cache else None, only)
    wanted = masks is not None

    def rows(i, j, tokens, texts):  # that run q, k, v, o or the FFN of a block
        return int(texts if only and i == len(blocks) - 1 and j not in (1, 2) else tokens)

    for i, (layer, numbers) in enumerate(blocks):
        k = v = None
        if cache:
            cache[i].reserve(layout.B, *qkv.shape[2:], x)
            k, v = cache[i].k, cache[i].v
            cache[i].n += layout.L
        own = [torch.empty(rows(i, j, T, layout.B), E, dtype=torch.bool) if E and wanted else None
               for j, E in enumerate(numbers)]
        chosen += [(i, j, own[j]) for j, E in enumerate(numbers) if E is not None]
        layers.append(layer + packed(k, v, *own))
    model = packed(x, qkv, *attention, len(layers), T, D, pre_ln, float(eps), halting, out, alive)
    library().encode(b''.join(layers), model)
    if halting is not None and wanted:
        here = [tuple(n) for n in alive.tolist() if n[0]]
        masks.alive = [*masks.alive, *here]
        # what had left before has no row
        chosen = [(i, j, mask if mask is None else mask[:rows(i, j, *here[i][:2])])
                  for i, j, mask in chosen if i < len(here)]
    if wanted:
        masks += [mask for *_, mask in chosen]
    return out[:layout.B] if only else out

# What `experts` chooses from, each (x, mask, bundle, rho) -> y, and the op that a compiler sees.
IMPLS = dict(triton=triton_experts, cpp=cpp_experts, torch=expert_loop, dense=dense_masked)

@torch.library.custom_op('d2dmoe::experts', mutates_args=())
def experts_op(x: torch.Tensor, mask: torch.Tensor, w_in: torch.Tensor,
               b_in: Optional[torch.Tensor], w_out: torch.Tensor, b_out: Optional[torch.Tensor],
               offsets: torch.Tensor, act: str, impl: Optional[str],
               rho: Optional[float]) -> torch.Tensor:
    bundle = Experts(w_in, b_in, w_out, b_out, offsets, act)
    return experts(x, mask, bundle, impl, rho).contiguous()

experts_op.register_fake(lambda x, *_: x.new_empty(x.shape))

CPP = r'''
// y[t] = b_out + sum over experts e with mask[t, e] of act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e]
//
// A neuron is a row of w_in and of w_out (H, D), so both matmuls walk along D.
//   hidden: h = x row . w_in row; a register tile of 3 tokens x 4 neurons (7 loads for 12 multiply-
//           adds), token rows gathered by pointer. An h that is not zero goes to its token's list.
//   outer:  sum row += h * w_out row over the list, a strip of D at a time in registers
// experts() does so for a block of tokens and a range of neurons, a GROUP of neurons at a time.
// many() runs blocks of tokens in parallel, each with all neurons. A group's strip of w_out is
//   copied to the L1 cache (rows a power of two apart would evict each other there).
// few() is bound by memory: chunks of neurons in parallel, a weight is read once for all tokens.
// The order of every sum is fixed by the shapes and the mask, never by the number of threads.
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <numeric>
#include <vector>
typedef int64_t i64;

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16 };
#define WIDE(p) (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p)))
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
#define WIDE(p) (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p)))
#else  // NEON, SSE; on AVX GCC would need five instructions for it
enum { LANES = 4 };
#define WIDE(p) __builtin_convertvector(*(const vh*)(p), vi)
#endif
enum { STRIP = 8 * LANES, GROUP = 96, SPAN = 24 };  // GROUP x STRIP floats: 24 KB with AVX2
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // not aligned
typedef float v4 __attribute__((vector_size(16)));
typedef float v4u __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
struct bf16 { uint16_t bits; };  // the upper half of an fp32

static inline float f32(float v) { return v; }
static inline float f32(bf16 v) {
    uint32_t u = (uint32_t)v.bits << 16; float f; memcpy(&f, &u, 4);
    return f;
}
static inline vf load(const float* p) { return *(const vu*)p; }
static inline vf load(const bf16* p) { return (vf)(WIDE(p) << 16); }
static inline void store(float* p, float v) { *p = v; }
static inline void store(bf16* p, float v) {  // to nearest, ties to even; a NaN stays one
    uint32_t u; memcpy(&u, &v, 4);
    p->bits = v != v ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
template <class W> static void widen(float* out, const W* in, i64 n) {
    i64 k = 0;
    for (; k + LANES <= n; k += LANES) *(vu*)(out + k) = load(in + k);
    for (; k < n; k++) out[k] = f32(in[k]);
}

// What the first matmul multiplies: fp32, to which bf16 is widened, or pairs of bf16 on some CPUs
template <class W> struct In { typedef float type; typedef vf vec; };
template <class V, class P> static inline V get(P p) { return load(p); }
static inline void multiply_add(vf& sum, vf a, vf b) { sum += a * b; }
#if defined(__AVX512BF16__)
#define DOT(sum, a, b) (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b)
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define DOT(sum, a, b) (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b)
#endif
#ifdef DOT
typedef uint16_t vb __attribute__((vector_size(4 * LANES)));
typedef uint16_t vbu __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
template <> struct In<bf16> { typedef bf16 type; typedef vb vec; };
template <> inline vb get<vb>(const bf16* p) { return *(const vbu*)p; }
static inline void multiply_add(vf& sum, vb a, vb b) { sum = DOT(sum, a, b); }
#endif
// In a register: GCC would rather load it once for each use
template <class V> static inline V pinned(V v) {
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

static inline v4 fold(vf v) {
    v4 part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int i = 1; i < LANES / 4; i++) part[0] += part[i];
    return part[0];
}
// The sums of four vectors in one; always the same order of additions
static inline v4 lane_sums(const vf* acc) {
    v4 a = fold(acc[0]), b = fold(acc[1]), c = fold(acc[2]), d = fold(acc[3]);
    v4 ab = v4{a[0], b[0], a[1], b[1]} + v4{a[2], b[2], a[3], b[3]};
    v4 cd = v4{c[0], d[0], c[1], d[1]} + v4{c[2], d[2], c[3], d[3]};
    return v4{ab[0], ab[1], cd[0], cd[1]} + v4{ab[2], ab[3], cd[2], cd[3]};
}

static i64 pieces(i64 n, i64 most) { return (n + most - 1) / most; }  // into which n is cut
static i64 round_up(i64 n, i64 to) { return pieces(n, to) * to; }
// f(N) for the n <= N that is known only now
template <int N, class F> static void constant(i64 n, F f) {
    if (n == N) return f(std::integral_constant<int, N>());
    if constexpr (N > 1) constant<N - 1>(n, f);
}
// e^x to 2e-7; NaN stays NaN
template <class V> static inline V exponential(V x) {
    typedef uint32_t U __attribute__((vector_size(sizeof(V))));
    x = x < -87.0f ? V{} - 87.0f : x > 88.0f ? V{} + 88.0f : x;
    V shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = ((r * 1.9875691e-4f + 1.3981999e-3f) * r + 8.3334519e-3f) * r + 4.1665796e-2f;
    p = (p * r + 1.6666666e-1f) * r + 0.5f;
    V y = (V)((U)(p * r * r + r + 1.0f) + ((U)shifted << 23));
    return x == x ? y : x;
}
template <class V> static inline V activate(V x, int act) {
    if (act == 0) return x < V{} ? V{} : x;  // NaN < 0 is false: relu(NaN) is NaN
    if (act == 2) return x / (1.0f + exponential(-1.5957691f * (x + 0.044715f * x * x * x)));
    V z = x * 0.70710678f, u = z < V{} ? -z : z;  // erf by Abramowitz and Stegun 7.1.26, to 1.5e-7
    V t = 1.0f / (1.0f + 0.3275911f * u);
    V p = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t;
    V erf = 1.0f - (p + 0.254829592f) * t * exponential(-u * u);
    return 0.5f * x * (1.0f + (z < V{} ? -erf : erf));
}
// Out of line: its code would be in every tile
__attribute__((noinline)) static v4 gelu(v4 h, int act) { return activate(h, act); }

template <class W> struct Job {  // one call; kernel.py fills it through ctypes
    const W* x; const uint8_t* mask; const W* w_in; const float* b_in; const W* w_out;
    const float* b_out; const int* offsets; W* y; i64 T, D, E, act, threads;
    i64 strips() const { return pieces(D, STRIP); }
};
struct Buffer {  // aligned, so that no vector of ours straddles two cache lines
    float* p;
    Buffer(i64 n) : p((float*)aligned_alloc(64, n / 16 * 64 + 64)) {}
    ~Buffer() { free(p); }
    operator float*() { return p; }
};
struct Unit { float h; int row; };  // a hidden unit that is not zero, and its row of w_out
struct Scratch {  // one thread's, for a block of n tokens and groups of at most `group` neurons
    Buffer x;                        // where it is widened
    i64 group;
    std::vector<Unit> units;         // (n, group): for each token its units in the current group
    std::vector<int> counts, token;  // (n): how many; the tokens that want an expert
    Scratch(i64 n, i64 D, i64 group)
        : x(n * D), group(group), units(n * group), counts(n), token(n) {}
    Unit* list(i64 t) { return &units[t * group]; }
};

// NT tokens x NJ neurons of the first matmul at a time; row: of the first neuron in the group
template <class W, int NT, int NJ, class X>
static void tiles(X* x, const int* token, int n, const W* w, const float* b, i64 D, int act,
                  int row, Scratch& my) {
    typedef typename In<W>::vec V;
    const i64 N = sizeof(V) / sizeof(X);
    v4 bias = {};
    for (int j = 0; b && j < NJ; j++) bias[j] = b[j];
    for (; n >= NT; n -= NT, token += NT) {
        X* xs[NT];
        vf acc[NT][4] = {};
        for (int t = 0; t < NT; t++) xs[t] = x + token[t] * D;
        i64 k = 0;
        for (; k + N <= D; k += N) {
            V xk[NT];
            for (int t = 0; t < NT; t++) xk[t] = pinned(get<V>(xs[t] + k));
            for (int j = 0; j < NJ; j++) {
                V wk = pinned(get<V>(w + j * D + k));
                for (int t = 0; t < NT; t++) multiply_add(acc[t][j], xk[t], wk);
            }
        }
        #pragma GCC unroll 4
        for (int t = 0; t < NT; t++) {
            v4 h = lane_sums(acc[t]) + bias;
            int count = my.counts[token[t]];
            Unit* unit = my.list(token[t]);
            for (i64 i = k; i < D; i++)
                for (int j = 0; j < NJ; j++) h[j] += f32(xs[t][i]) * f32(w[j * D + i]);
            h = act ? gelu(h, act) : h < v4{} ? v4{} : h;  // NaN < 0 is false: relu(NaN) is NaN
            auto alive = h != v4{};  // 0 or -1; true for NaN
            for (int j = 0; j < NJ; j++) {
                unit[count] = {h[j], row + j};
                count -= alive[j];  // no branch: it would be a coin flip
            }
            my.counts[token[t]] = count;
        }
    }
    if constexpr (NT > 1) tiles<W, NT - 1, NJ>(x, token, n, w, b, D, act, row, my);
}

// Hidden units of neurons j0 .. j1 for the first n of my.token, in nearly equal tiles of <= 4
template <class W, class X>
static void hidden(const Job<W>& job, X* x, int n, i64 j0, i64 j1, i64 g0, Scratch& my) {
    // SPAN tokens at a time: their rows of x stay in the L2 cache for all the neurons
    for (int i = 0; i < n; i += SPAN) for (i64 j = j0, nj; j < j1; j += nj) {
        nj = pieces(j1 - j, pieces(j1 - j, 4));
        constant<4>(nj, [&](auto NJ) {
            tiles<W, 3, NJ>(x, &my.token[i], std::min<int>(SPAN, n - i), job.w_in + j * job.D,
                            job.b_in ? job.b_in + j : nullptr, job.D, job.act, j - g0, my);
        });
    }
}

// The strip of a token's output += sum over its list of h * w_out row
template <class W>
static inline void outer(float* sum, const Unit* unit, int n, const W* w, i64 stride, i64 width) {
    if (width < STRIP) {
        for (int i = 0; i < n; i++)
            for (i64 k = 0; k < width; k++) sum[k] += unit[i].h * f32(w[unit[i].row * stride + k]);
        return;
    }
    vf acc[8];
    for (int v = 0; v < 8; v++) acc[v] = load(sum + v * LANES);
    for (int i = 0; i < n; i++) {
        const W* row = w + unit[i].row * stride;
        for (int v = 0; v < 8; v++) acc[v] += unit[i].h * load(row + v * LANES);
    }
    for (int v = 0; v < 8; v++) *(vu*)(sum + v * LANES) = acc[v];
}

// sum (strips, n, STRIP) = the output of neurons j0 .. j1 for the n tokens from t0 on
// copy: room for a strip of w_out, or null
template <class W>
static void experts(const Job<W>& job, i64 t0, i64 n, i64 j0, i64 j1, float* sum, float* copy,
                    Scratch& my) {
    const i64 D = job.D, E = job.E;
    typedef typename In<W>::type X;
    const X* x = (const X*)(job.x + t0 * D);
    if (sizeof(W) < sizeof(X)) widen(my.x, job.x + t0 * D, n * D), x = (const X*)my.x.p;
    memset(sum, 0, job.strips() * n * STRIP * 4);
    for (i64 g0 = j0, g1, first = 0; g0 < j1; g0 = g1) {
        g1 = std::min(g0 + my.group, j1);
        std::fill(my.counts.begin(), my.counts.end(), 0);
        while (job.offsets[first + 1] <= g0) first++;
        for (i64 e = first; e < E && job.offsets[e] < g1; e++) {
            i64 wanted = 0, lo = job.offsets[e], hi = job.offsets[e + 1];
            for (i64 t = 0; t < n; t++) {
                my.token[wanted] = t;
                wanted += job.mask[(t0 + t) * E + e] != 0;
            }
            hidden(job, x, wanted, std::max(lo, g0), std::min(hi, g1), g0, my);
        }
        if (*std::max_element(my.counts.begin(), my.counts.end()) == 0) continue;
        for (i64 s = 0; s < job.strips() && copy; s++) {
            i64 d = s * STRIP, width = std::min<i64>(STRIP, D - d);
            for (i64 j = g0; j < g1; j++)
                widen(copy + (j - g0) * STRIP, job.w_out + j * D + d, width);
            for (i64 t = 0; t < n; t++)
                outer(sum + (s * n + t) * STRIP, my.list(t), my.counts[t], copy, STRIP, STRIP);
        }
        // Token by token: few rows at a time, which prefetchers can follow
        for (i64 t = 0; t < n && !copy; t++)
            for (i64 s = 0; s < job.strips(); s++)
                outer(sum + (s * n + t) * STRIP, my.list(t), my.counts[t],
                      job.w_out + g0 * D + s * STRIP, D, std::min<i64>(STRIP, D - s * STRIP));
    }
}

// y of the t-th of n tokens = b_out + the sums (chunks, strips, n, STRIP) over all chunks
template <class W>
static void finish(const Job<W>& job, float* sums, i64 chunks, i64 n, i64 t, W* y) {
    for (i64 s = 0; s < job.strips(); s++) {
        i64 d = s * STRIP, width = std::min<i64>(STRIP, job.D - d);
        float* sum = sums + (s * n + t) * STRIP;
        for (i64 c = 1; c < chunks; c++)
            for (i64 k = 0; k < STRIP; k++) sum[k] += sum[c * job.strips() * n * STRIP + k];
        const float* b = job.b_out ? job.b_out + d : nullptr;
        for (i64 k = 0; k < width; k++) store(y + d + k, sum[k] + (b ? b[k] : 0));
    }
}

template <class W> static void many(const Job<W>& job) {
    // Blocks: a multiple of the threads in number; 256 tokens where x and y then fit the L2 cache,
    // else 512, since a block reads all the weights. No token's result depends on its block.
    i64 T = job.T, D = job.D, blocks = round_up(pieces(T, D > 256 ? 512 : 256), job.threads);
    i64 block = std::max<i64>(pieces(T, blocks), 16);
    #pragma omp parallel num_threads(job.threads)
    {
        Scratch my(block, D, GROUP);
        Buffer sum(job.strips() * block * STRIP), copy(GROUP * STRIP);
        #pragma omp for schedule(dynamic)
        for (i64 t0 = 0; t0 < T; t0 += block) {
            i64 n = std::min(block, T - t0);
            experts(job, t0, n, 0, job.offsets[job.E], sum, copy, my);
            for (i64 t = 0; t < n; t++) finish(job, sum, 1, n, t, job.y + (t0 + t) * D);
        }
    }
}

template <class W> static void few(const Job<W>& job) {
    // Chunks: of equal numbers of wanted neurons
    i64 T = job.T, D = job.D, E = job.E, size = job.strips() * T * STRIP;
    std::vector<int> wanted;
    for (i64 e = 0; e < E; e++) {
        bool any = false;
        for (i64 t = 0; t < T; t++) any |= job.mask[t * E + e];
        for (int j = job.offsets[e]; any && j < job.offsets[e + 1]; j++) wanted.push_back(j);
    }
    i64 P = wanted.size(), chunks = std::clamp<i64>(P / 16, 1, std::clamp<i64>(64 / T, 4, 24));
    std::vector<int> bounds(chunks + 1, job.offsets[E]);
    // Whole tiles
    for (i64 c = 0; c < chunks && P; c++) bounds[c] = wanted[c * P / chunks / 4 * 4];
    Buffer sums(chunks * size);
    #pragma omp parallel num_threads(job.threads)
    {
        Scratch my(T, D, std::max<i64>(GROUP, 1024 / T));
        #pragma omp for schedule(dynamic)
        for (i64 c = 0; c < chunks; c++)
            experts(job, 0, T, bounds[c], bounds[c + 1], sums + c * size, nullptr, my);
        #pragma omp for
        for (i64 t = 0; t < T; t++) finish(job, sums, chunks, T, t, job.y + t * D);
    }
}

extern "C" void run(const void* job, int narrow, int is_few) {
    auto call = [&](auto* job) { is_few ? few(*job) : many(*job); };
    narrow ? call((const Job<bf16>*)job) : call((const Job<float>*)job);
}

// -------------------------------------------------------------------------------------- attention
//
// One head of a sequence of L tokens, the last n of which ask. Keys are laid on their side, so that
// scores come LANES at a time; up to eight queries share what is loaded.
struct Head { const float *q, *k, *v; float* out; i64 qs, ks, os, d; };  // strides between tokens
struct Room {
    i64 wide, deep; Buffer keys, values, scores;  // (d, wide), (L, deep), (8, wide)
    Room(i64 L, i64 d) : wide(round_up(L, LANES)), deep(round_up(d, LANES)),
                         keys(d * wide), values(L * deep), scores(8 * wide) {
        memset(values, 0, L * deep * 4);
    }
};

// scores of n keys -> their softmax but for the factor that is returned
static float softmax(float* s, i64 n) {
    vf place, top = vf{} - INFINITY, sum = {};
    for (int k = 0; k < LANES; k++) place[k] = k;
    // Past the end they are -inf: written one by one they would have to reach memory first
    auto score = [&](i64 j) {
        return place < vf{} + (float)(n - j) ? load(s + j) : vf{} - INFINITY;
    };
    for (i64 j = 0; j < n; j += LANES) top = score(j) > top ? score(j) : top;
    v4 tops[LANES / 4];
    memcpy(tops, &top, sizeof top);
    for (int i = 1; i < LANES / 4; i++) tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];
    const float most = std::max(std::max(tops[0][0], tops[0][1]), std::max(tops[0][2], tops[0][3]));
    for (i64 j = 0; j < n; j += LANES) {
        const vf v = exponential(score(j) - most);
        *(vu*)(s + j) = v;
        sum += v;
    }
    const v4 part = fold(sum);
    return 1 / ((part[0] + part[1]) + (part[2] + part[3]));
}
// NQ queries from i on; query t sees `seen` + t * causal keys
template <int NQ> static void ask(const Head& h, i64 i, i64 seen, bool causal, Room& my) {
    const float scale = 1 / sqrtf(h.d);
    float factor[NQ];
    for (i64 j = 0; j < seen + (NQ - 1) * causal; j += LANES) {
        vf acc[NQ] = {};
        for (i64 c = 0; c < h.d; c++) {
            const vf key = load(my.keys + c * my.wide + j);
            for (int t = 0; t < NQ; t++) acc[t] += h.q[(i + t) * h.qs + c] * key;
        }
        for (int t = 0; t < NQ; t++) *(vu*)(my.scores + t * my.wide + j) = acc[t] * scale;
    }
    for (int t = 0; t < NQ; t++) factor[t] = softmax(my.scores + t * my.wide, seen + t * causal);
    for (i64 c = 0; c < h.d; c += LANES) {
        vf acc[NQ] = {};
        for (i64 j = 0; j < seen; j++) {
            const vf value = load(my.values + j * my.deep + c);
            for (int t = 0; t < NQ; t++) acc[t] += my.scores[t * my.wide + j] * value;
        }
        for (int t = 0; t < NQ; t++) {
            for (i64 j = seen; j < seen + t * causal; j++)
                acc[t] += my.scores[t * my.wide + j] * load(my.values + j * my.deep + c);
            acc[t] *= factor[t];
            float* out = h.out + (i + t) * h.os + c;
            if (c + LANES <= h.d) *(vu*)out = acc[t];
            else memcpy(out, &acc[t], (h.d - c) * 4);
        }
    }
}

// q, k, v: rows `stride` apart, of B sequences that start at `starts`; y (T, D), or (B, D) where
// only the first token (causal: the last) asks. The cache (B, heads, size, d), old_k and old_v,
// holds `past` tokens of each sequence.
struct Attention {
    const float *q, *k, *v; float* y; int* starts; float *old_k, *old_v;
    i64 B, heads, d, stride, longest, past, size, causal, only, threads;
    i64 head_row(i64 b) const { return causal ? starts[b + 1] - 1 : starts[b]; }
};
static void attend(const Attention& a, i64 item, Room& my) {
    const i64 b = item / a.heads, at = item % a.heads * a.d, D = a.heads * a.d, first = a.starts[b];
    const i64 all = a.starts[b + 1] - first, row = a.only ? a.head_row(b) : first;
    const i64 n = a.only ? 1 : all, L = a.past + all;
    Head h{a.q + row * a.stride + at, a.k + first * a.stride + at, a.v + first * a.stride + at,
           a.y + (a.only ? b : first) * D + at, a.stride, a.stride, D, a.d};
    if (a.old_k) {
        float *k = a.old_k + item * a.size * a.d, *v = a.old_v + item * a.size * a.d;
        for (i64 t = 0; t < all; t++) {
            memcpy(k + (a.past + t) * a.d, h.k + t * h.ks, a.d * 4);
            memcpy(v + (a.past + t) * a.d, h.v + t * h.ks, a.d * 4);
        }
        h.k = k, h.v = v, h.ks = a.d;
    }
    // Four keys at a time, laid on their side. Left alone the places past the end may be denormal,
    // which is slow
    for (i64 j = 0, c; j < round_up(L, LANES); j += 4) {
        float* keys = my.keys + j;
        for (c = 0; c + 4 <= h.d && j + 4 <= L; c += 4) {
            v4 row[4];
            for (int i = 0; i < 4; i++) row[i] = pinned(*(const v4u*)(h.k + (j + i) * h.ks + c));
            for (int i = 0; i < 4; i++)
                *(v4u*)(keys + (c + i) * my.wide) = v4{row[0][i], row[1][i], row[2][i], row[3][i]};
        }
        for (; c < h.d; c++) for (i64 i = 0; i < 4; i++)
            keys[c * my.wide + i] = j + i < L ? h.k[(j + i) * h.ks + c] : 0;
    }
    for (i64 j = 0; j < L; j++) memcpy(my.values + j * my.deep, h.v + j * h.ks, h.d * 4);
    for (i64 i = 0, nq; i < n; i += nq) {
        nq = pieces(n - i, pieces(n - i, 8));
        constant<8>(nq, [&](auto NQ) {
            ask<NQ>(h, i, a.causal ? L - n + i + 1 : L, a.causal, my);
        });
    }
}
extern "C" void attention(const Attention* a) {
    #pragma omp parallel num_threads(a->threads)
    {
        Room room(a->past + a->longest, a->d);
        #pragma omp for schedule(dynamic)
        for (i64 item = 0; item < a->B * a->heads; item++) attend(*a, item, room);
    }
}

// ------------------------------------------------------------------------------------------- int8
//
// A row of x, or of a matrix, is largest / 127 times whole numbers -127 .. 127, so that
//     y[t, n] = scale[t] * scale[n] * (whole number) + bias[n]
// with the same whole numbers on every CPU and in any order. A matrix (N, K) is cut into blocks of
// 8 rows x 8 columns, 64 bytes (their order: see COLUMNS). A stored weight is 128 more than it is,
// because the dot product of x86 wants unsigned bytes; 128 * (sum of the row of x) is subtracted
// at the end.
//   multiply: NT tokens x NP panels of 8 rows stay in registers along the columns, all of them: a
//             linear, the head, an expert's hidden units.
//   sparse:   one token along the blocks in which h is not zero: an FFN's output, after routing
//             and ReLU.
//   encode:   a whole model. Few tokens: threads share out the rows of each matrix and wait for
//             one another five times a layer, or more. Many: they share out blocks of tokens, and
//             wait around attention only.
typedef uint8_t u8;
typedef uint64_t u64;
typedef int8_t s8;
typedef int32_t v8i __attribute__((vector_size(32)));
typedef float v8f __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias));

// COLUMNS of a block are multiplied at a time, and lie together: (8 / COLUMNS, 8 rows, COLUMNS).
// Whole: of x; Narrow: COLUMNS of x, for each row; Wide: of a block; Sum: of a panel;
// TOKENS x PANELS sums fill the registers, as do LONG panels of one token; 64 blocks of SHORT
// panels fit into the L1 cache; SURPLUS: of a weight
#if defined(__AVX512VNNI__)
enum { COLUMNS = 8, TOKENS = 6, PANELS = 4, LONG = 24, SHORT = 6, SURPLUS = 128 };
typedef s8 Whole;
typedef __m512i Narrow, Wide, Sum;
static inline Narrow narrow(const s8* x) {
    i64 v; memcpy(&v, x, 8);
    return (Narrow)pinned((vi)_mm512_set1_epi64(v));
}
static inline Wide wide(const u8* w) { return (Wide)pinned((vi)_mm512_loadu_si512(w)); }
static inline Sum add(Sum s, Wide w, Narrow x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(w), "v"(x));  // around its own GCC copies s
    return s;
}
static inline v8i total(const Sum& s) {
    return (v8i)_mm512_cvtepi64_epi32(_mm512_add_epi32(s, _mm512_srli_epi64(s, 32)));
}
#elif defined(__AVX2__)
enum { TOKENS = 3, PANELS = 3, LONG = 12, SHORT = 6, SURPLUS = 128 };
typedef __m256i Narrow, Wide, Sum;
#if defined(__AVXVNNI__)
enum { COLUMNS = 4 };
typedef s8 Whole;
static inline Wide wide(const u8* w) { return _mm256_loadu_si256((const __m256i*)w); }
static inline Sum add(Sum s, Wide w, Narrow x) { return _mm256_dpbusd_avx_epi32(s, w, x); }
#else
enum { COLUMNS = 2 };
typedef int16_t Whole;  // two products of 16 bits and their sum fit into 32; of 8 not into 16
static inline Wide wide(const u8* w) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)w));
}
static inline Sum add(Sum s, Wide w, Narrow x) {
    const __m256i products = _mm256_madd_epi16(w, x);
    // GCC would add in another order, for which there are too few registers
    __asm__("vpaddd %1, %0, %0" : "+x"(s) : "x"(products));
    return s;
}
#endif
static inline Narrow narrow(const Whole* x) {
    int v; memcpy(&v, x, 4);
    return _mm256_set1_epi32(v);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
enum { COLUMNS = 4, TOKENS = 3, PANELS = 3, LONG = 8, SHORT = 6, SURPLUS = 0 };
typedef s8 Whole;
typedef int8x16_t Narrow;
struct Wide { int8x16_t v[2]; };
struct Sum { int32x4_t v[2]; };
static inline Narrow narrow(const s8* x) {
    int v; memcpy(&v, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}
static inline int8x16_t without_128(const u8* w) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), vdupq_n_u8(128)));
}
static inline Wide wide(const u8* w) { return {without_128(w), without_128(w + 16)}; }
static inline Sum add(Sum s, Wide w, Narrow x) {
    for (int i = 0; i < 2; i++) s.v[i] = vdotq_s32(s.v[i], w.v[i], x);
    return s;
}
#else
enum { COLUMNS = 8, TOKENS = 3, PANELS = 3, LONG = 3, SHORT = 3, SURPLUS = 128 };
typedef s8 Whole;
typedef const s8* Narrow;
typedef const u8* Wide;
struct Sum { int32_t v[8]; };
static inline Narrow narrow(const s8* x) { return x; }
static inline Wide wide(const u8* w) { return w; }
static inline Sum add(Sum s, Wide w, Narrow x) {
    for (int i = 0; i < 64; i++) s.v[i / 8] += w[i] * x[i % 8];
    return s;
}
#endif
#ifndef __AVX512VNNI__
static inline v8i total(const Sum& s) { v8i out; memcpy(&out, &s, 32); return out; }
#endif
typedef Whole v8w __attribute__((vector_size(8 * sizeof(Whole)), aligned(1), may_alias));
extern "C" i64 columns() { return COLUMNS; }

struct Matrix {  // row panel p, column block k: the 64 bytes at w + p * panel + k * step
    const u8* w; const float *scale, *bias; i64 N, K, panel, step;
    i64 panels() const { return (N + 7) / 8; }
};
struct Rows {  // n rows of K numbers, quantised
    i64 K; std::vector<Whole> q; std::vector<float> scale;
    std::vector<int> sum, ids;  // ids: 0 .. n-1
    Rows(i64 n, i64 K) : K(K), q(n * K), scale(n), sum(n), ids(n) {
        std::iota(ids.begin(), ids.end(), 0);
    }
    // Row t is x, whose largest |x| is among `most`: all of it, or the blocks in `live`, one after
    // the other or where they belong
    void set(i64 t, const float* x, v8i most, const u64* live, bool packed) {
        int bits = 0;
        for (int i = 0; i < 8; i++) bits = std::max(bits, most[i]);
        float largest; memcpy(&largest, &bits, 4);
        const float unit = largest / 127;
        const bool finite = bits < 0x7f800000, some = finite && unit > TINY;
        Whole* row = q.data() + t * K;
        v8i all = {};
        auto put = [&](i64 to, i64 k) {
            // Its low bits: to nearest, ties even. A product some CPUs would fuse with the sum.
            v8f v = *(v8u*)(x + 8 * k) / unit + 12582912.0f;
            v8i whole = some ? (v8i)v - 0x4b400000 : v8i{};
            *(v8w*)(row + 8 * to) = __builtin_convertvector(whole, v8w);
            all += whole;
        };
        if (!live) for (i64 k = 0; k < K / 8; k++) put(k, k);
        else if (!packed) std::fill_n(row, K, 0);
        for (i64 k0 = 0, i = 0; k0 < K / 8 && live; k0 += 64)
            for (u64 left = live[k0 / 64]; left; left &= left - 1, i++) {
                const i64 k = k0 + __builtin_ctzll(left);
                put(packed ? i : k, k);
            }
        sum[t] = 0;
        for (int i = 0; i < 8; i++) sum[t] += all[i];
        scale[t] = finite ? unit : NAN;
    }
    void set(i64 t, const float* x) {
        v8i most = {};
        for (i64 k = 0; k < K / 8; k++) most = larger(most, x + 8 * k);
        set(t, x, most, nullptr, false);
    }
    // |x| as an integer, so that a NaN is the largest
    static v8i larger(v8i most, const float* x) {
        const v8i u = (v8i)*(v8u*)x & 0x7fffffff;
        return u > most ? u : most;
    }
};
// Where a product goes: out[row] = or += x[row] @ panels of m + bias, of which ReLU, times fold,
// where there is one
struct Out { float* p; i64 stride; bool plus = false; const float* fold = nullptr; };

// sum += block i of each row of x times those at w, of NP panels
template <int NT, int NP>
static inline void add_block(Sum (&sum)[NT][NP], const Whole* const (&x)[NT], i64 i, const u8* w,
                             i64 panel) {
    for (int c = 0; c < 8; c += COLUMNS) {
        Narrow xi[NT];
        #pragma GCC unroll 24
        for (int t = 0; t < NT; t++) xi[t] = narrow(x[t] + 8 * i + c);
        #pragma GCC unroll 24
        for (int p = 0; p < NP; p++) {
            const Wide wp = wide(w + p * panel + 8 * c);
            #pragma GCC unroll 24
            for (int t = 0; t < NT; t++) sum[t][p] = add(sum[t][p], wp, xi[t]);
        }
    }
}
template <int NT, int NP>
static inline void write(const Sum (&sum)[NT][NP], const Matrix& m, const Rows& x, const int* rows,
                         i64 p0, Out out) {
    #pragma GCC unroll 24
    for (int p = 0; p < NP; p++) {
        const i64 j = (p0 + p) * 8, width = std::min<i64>(8, m.N - j);
        const v8f scale = *(v8u*)(m.scale + j), bias = *(v8u*)(m.bias + j);
        #pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
            const int r = rows[t];
            v8f y = __builtin_convertvector(total(sum[t][p]) - SURPLUS * x.sum[r], v8f);
            y = y * (x.scale[r] * scale) + bias;
            if (out.fold) y = (y < v8f{} ? v8f{} : y) * *(v8u*)(out.fold + j);
            float* to = out.p + r * out.stride + j;
            if (width == 8) *(v8u*)to = out.plus ? *(v8u*)to + y : y;
            else for (i64 i = 0; i < width; i++) to[i] = out.plus ? to[i] + y[i] : y[i];
        }
    }
}
template <int NT, int NP>
static void multiply(const Matrix& m, const Rows& x, const int* rows, i64 p, Out out) {
    const Whole* xs[NT];
    for (int t = 0; t < NT; t++) xs[t] = x.q.data() + rows[t] * x.K;
    Sum sum[NT][NP] = {};
    for (i64 k = 0; k < x.K / 8; k++)
        add_block<NT, NP>(sum, xs, k, m.w + p * m.panel + k * m.step, m.panel);
    write<NT, NP>(sum, m, x, rows, p, out);
}
// n rows in nearly equal tiles of at most MOST
template <int MOST, int NP>
static void tiled(const Matrix& m, const Rows& x, const int* rows, i64 n, i64 p, Out out) {
    for (i64 t = 0, nt; t < n; t += nt) {
        nt = pieces(n - t, pieces(n - t, MOST));
        constant<MOST>(nt, [&](auto NT) { multiply<NT, NP>(m, x, rows + t, p, out); });
    }
}
static void product(const Matrix& m, const Rows& x, const int* rows, i64 n, i64 p0, i64 p1,
                    Out out) {
    for (; p0 + PANELS <= p1; p0 += PANELS) tiled<TOKENS, PANELS>(m, x, rows, n, p0, out);
    for (; p0 + 2 <= p1; p0 += 2) tiled<3 * TOKENS / 2, 2>(m, x, rows, n, p0, out);
    if (p0 < p1) tiled<2 * TOKENS, 1>(m, x, rows, n, p0, out);
}
// n rows from 0 on and the part's share of the panels
static void product(const Matrix& m, const Rows& x, i64 n, i64 part, i64 parts, Out out) {
    const i64 P = m.panels();
    product(m, x, x.ids.data(), n, P * part / parts, P * (part + 1) / parts, out);
}
struct Ffn {
    Matrix in, out; const float* fold;  // of w_out's rows: h is multiplied by it, out.scale is 1
    const int* offsets; i64 E, act;     // in neurons, multiples of 8
};
struct Worker {  // one thread's room for n tokens: x and h quantised, and what each token runs
    i64 n;
    Rows x, h;
    std::vector<u8> mask; std::vector<int> rows, some;
    std::vector<u64> live;  // which blocks of h are not zero
    std::vector<v8i> most; std::vector<const Whole*> at;
    Buffer strip, sums;     // 64 blocks of SHORT panels of w_out, and the sums of n rows
    Worker(i64 n, i64 D, i64 H, i64 E)
        : n(n), x(n, D), h(n, H), mask(n * E), rows(n * E), some(E),
          live(n * pieces(H / 8, 64)), most(n), at(n), strip(64 * SHORT * 16),
          sums(std::max<i64>(n * SHORT, FEW * LONG) * sizeof(Sum) / 4) {}

    // h (n, H): the hidden units of the chosen experts, the part's share of them; n <= this->n
    void hidden(const Ffn& f, i64 n, float* h, i64 part, i64 parts) {
        const i64 H = f.in.N;
        i64 wanted = 0, before = 0;
        std::fill(some.begin(), some.end(), 0);
        for (i64 t = 0; t < n; t++) each_expert(f, t, [&](i64 e) {
            rows[e * this->n + some[e]++] = t;
        });
        for (i64 e = 0; e < f.E; e++) wanted += some[e] ? f.offsets[e + 1] - f.offsets[e] : 0;
        const i64 from = wanted / 8 * part / parts * 8, to = wanted / 8 * (part + 1) / parts * 8;
        for (i64 e = 0; e < f.E; e++) if (some[e]) {
            const i64 lo = f.offsets[e], size = f.offsets[e + 1] - lo;
            const i64 j0 = lo + std::clamp<i64>(from - before, 0, size);
            const i64 j1 = lo + std::clamp<i64>(to - before, 0, size);
            before += size;
            const int* row = &rows[e * this->n];
            const float* fold = f.act ? nullptr : f.fold;        // of ReLU at once
            product(f.in, x, row, some[e], j0 / 8, j1 / 8, {h, H, false, fold});
            for (i64 i = 0; i < some[e] && !fold; i++) {
                float* unit = h + row[i] * H;
                i64 j = j0;
                for (; j + LANES <= j1; j += LANES)
                    *(vu*)(unit + j) = activate(load(unit + j), f.act) * load(f.fold + j);
                for (; j < j1; j += 8)
                    *(v8u*)(unit + j) = activate((v8f)*(v8u*)(unit + j), f.act)
                                        * *(v8u*)(f.fold + j);
            }
        }
    }
    // h @ w_out, the part's share of the columns
    void output(const Ffn& f, i64 n, const float* unit, Out out, i64 part, i64 parts) {
        const i64 H = f.in.N, words = pieces(H / 8, 64), P = f.out.panels();
        i64 filled = 0;
        std::fill_n(live.begin(), n * words, 0);
        for (i64 t = 0; t < n; t++) {
            v8i all = {};
            each_expert(f, t, [&](i64 e) {
                for (i64 k = f.offsets[e] / 8; k < f.offsets[e + 1] / 8; k++) {
                    const float* x = unit + t * H + 8 * k;
                    u64 v[4]; memcpy(v, x, 32);
                    const u64 some = (v[0] | v[1] | v[2] | v[3]) != 0;
                    live[t * words + k / 64] |= some << k % 64;
                    filled += some;
                    all = Rows::larger(all, x);
                }
            });
            most[t] = all;
        }
        // From 60 % of the blocks on a dense product, which shares what it loads, is faster (VNNI)
        const bool packed = H && filled * 8 * 100 <= 60 * n * H;
        h.K = H;
        for (i64 t = 0; t < n; t++)
            h.set(t, unit + t * H, most[t], live.data() + t * words, packed);
        const i64 p0 = P * part / parts, p1 = P * (part + 1) / parts;
        if (!packed) product(f.out, h, n, part, parts, out);
        else if (n > FEW) sparse<SHORT>(f.out, n, p0, p1, out);
        else sparse<LONG>(f.out, n, p0, p1, out);
    }
    // n rows of h, each nothing but the blocks in its `live`: NP panels at a time, 64 blocks of
    // them, which many rows read from a copy in the L1 cache
    template <int NP> void sparse(const Matrix& m, i64 n, i64 p, i64 p1, Out out) {
        const i64 K = h.K / 8, words = pieces(K, 64);
        for (; p + NP <= p1; p += NP) {
            for (i64 t = 0; t < n; t++) at[t] = h.q.data() + t * h.K;
            for (i64 k = 0; k < K; k += 64) {
                const u8* w = m.w + p * 64 + k * m.step;
                for (i64 i = 0; i < std::min<i64>(64, K - k) && n > FEW; i++)
                    memcpy((u8*)strip.p + i * NP * 64, w + i * m.step, NP * 64);
                const i64 step = n > FEW ? NP * 64 : m.step;
                w = n > FEW ? (u8*)strip.p : w;
                for (i64 t = 0; t < n; t++) {
                    Sum sum[1][NP] = {}, *kept = (Sum*)sums.p + t * NP;
                    if (k > 0) for (int i = 0; i < NP; i++) sum[0][i] = kept[i];
                    const Whole* xt[1] = {at[t]};
                    for (u64 left = live[t * words + k / 64]; left; left &= left - 1, xt[0] += 8)
                        add_block<1, NP>(sum, xt, 0, w + __builtin_ctzll(left) * step, 64);
                    at[t] = xt[0];
                    if (k + 64 < K) for (int i = 0; i < NP; i++) kept[i] = sum[0][i];
                    else write<1, NP>(sum, m, h, &h.ids[t], p, out);
                }
            }
        }
        if constexpr (NP > 1) sparse<(NP + 1) / 2>(m, n, p, p1, out);
    }
    template <class F> void each_expert(const Ffn& f, i64 t, F call) {
        for (i64 e0 = 0; e0 < f.E; e0 += 8) {
            u64 chosen = 0;  // bytes 0 or 1
            memcpy(&chosen, &mask[t * f.E + e0], std::min<i64>(8, f.E - e0));
            for (; chosen; chosen &= chosen - 1) call(e0 + __builtin_ctzll(chosen) / 8);
        }
    }
};

static i64 block_size(i64 T, i64 threads, i64 weights) {
    // A block reads all the weights: the larger they are, from further away. As many blocks for
    // each thread.
    const i64 limit = weights > 2 << 20 ? 256 : 64;
    return T <= FEW ? FEW : pieces(T, round_up(pieces(T, limit), threads));
}
static void wait(i64 parts) {  // for who has the other parts
    if (parts == 1) return;
    #pragma omp barrier
}
// f(t0, n, part, parts) for all T tokens: a block of tokens by one thread, or few tokens by all of
// them, each its part of the columns.
template <class F> static void in_blocks(i64 T, i64 block, F f) {
    if (T <= FEW) {
        f(0, T, omp_get_thread_num(), omp_get_num_threads());
        return wait(omp_get_num_threads());
    }
    #pragma omp for schedule(dynamic)
    for (i64 t0 = 0; t0 < T; t0 += block) f(t0, std::min(block, T - t0), 0, 1);
}

struct Call { const float* x; const u8* mask; float* y; i64 T, threads; };
// y (T, N) = x (T, K) @ m.T + bias
extern "C" void linear8(const Matrix* m, const Call* c) {
    const i64 block = block_size(c->T, c->threads, m->N * m->K);
    #pragma omp parallel num_threads(c->threads)
    {
        Rows rows(block, m->K);
        in_blocks(c->T, block, [&](i64 t0, i64 n, i64 part, i64 parts) {
            for (i64 t = 0; t < n; t++) rows.set(t, c->x + (t0 + t) * m->K);
            product(*m, rows, n, part, parts, {c->y + t0 * m->N, m->N});
        });
    }
}
// y (T, D) += the FFN of x by the experts in mask (T, E)
extern "C" void experts8(const Ffn* f, const Call* c) {
    const i64 T = c->T, D = f->in.K, H = f->in.N, E = f->E;
    const i64 block = block_size(T, c->threads, 2 * D * H);
    Buffer shared(FEW * H);
    #pragma omp parallel num_threads(c->threads)
    {
        Worker my(block, D, H, E);
        Buffer own(T <= FEW ? 0 : block * H);
        float* unit = T <= FEW ? shared : own;
        in_blocks(T, block, [&](i64 t0, i64 n, i64 part, i64 parts) {
            for (i64 t = 0; t < n; t++) my.x.set(t, c->x + (t0 + t) * D);
            std::copy_n(c->mask + t0 * E, n * E, my.mask.begin());
            my.hidden(*f, n, unit, part, parts);
            wait(parts);
            my.output(*f, n, unit, {c->y + t0 * D, D, true}, part, parts);
        });
    }
}

// ------------------------------------------------------------------------- a whole model in int8

struct Branch {                  // an MLP
    Matrix r1, r2; Ffn ffn;      // the router's two matrices, null where every expert runs
    i64 dynk; double tau, floor; // dynk: run |s| >= tau * max and |s| > floor; else s >= tau
};
enum { Q, K, V, O, FFN };
struct Layer {                   // a projection is one of dense, or of mlps, the other is null
    Matrix dense[4]; Branch mlps[5];                 // three in one: dense[Q] has q, k and v
    const float *scale1, *shift1, *scale2, *shift2;  // LayerNorms
    float *k, *v; u8* masks[5];  // cache; room for the (T, E) that were chosen; or null
};
struct Model {
    float *x, *qkv; Attention a; i64 n_layer, T, D, pre_ln; double eps;
    const float* halting; float* out; double* alive;  // if tokens halt, which also changes a.starts
};
// router.Halting: tokens leave that were read enough, or with `only` whose first was. Who stays
// moves up; out, a row for each token (`only`: each sequence) there was, is the weighted sum.
struct Halting {
    const Model& m; i64 D, T, B; std::vector<float> total; std::vector<int> token, text;
    Halting(const Model& m) : m(m), D(m.D), T(m.T), B(m.a.B), total(T), token(T),
                              text(B) {
        std::iota(token.begin(), token.end(), 0);
        std::iota(text.begin(), text.end(), 0);
        if (m.halting) count(0);
    }
    void count(i64 layer) const {  // what enters it: tokens, sequences, pairs
        double* n = m.alive + 3 * layer;
        n[0] = T, n[1] = B;
        for (i64 b = 0; b < B; b++) {
            const double length = m.a.starts[b + 1] - m.a.starts[b];
            n[2] += length * length;
        }
    }
    void only_heads() {            // they alone are left of the last block
        for (i64 b = 0; b < B; b++) {
            memmove(m.x + b * D, m.x + m.a.head_row(b) * D, D * 4);
            total[b] = total[m.a.head_row(b)];
        }
        for (i64 b = 0; b < B && m.halting; b++) m.a.starts[b + 1] = b + 1;
    }
    void leave(i64 layer) {
        const bool last = layer == m.n_layer - 1;
        i64 n = 0, left = 0, end = 0;
        for (i64 b = 0; b < B; b++) {
            const i64 first = end, before = n;
            bool gone = false;
            end = m.a.starts[b + 1];
            for (i64 t = first; t < end; t++) {
                float* x = m.x + t * D;
                const float h = 1 / (1 + expf(m.halting[1] - m.halting[0] * x[0]));
                const float missing = 1 - total[t];
                const bool ends = last || h >= missing - 0.01f, head = t == first;
                const float weight = ends ? missing : h;
                float* y = m.out + (m.a.only ? text[b] : token[t]) * D;
                for (i64 i = 0; i < D && (head || !m.a.only); i++) y[i] += weight * x[i];
                gone |= m.a.only && head && ends;
                if (ends || gone) continue;
                memmove(m.x + n * D, x, D * 4);
                total[n] = total[t] + weight, token[n++] = token[t];
            }
            if (n > before) text[left] = text[b], m.a.starts[++left] = n;
        }
        T = n, B = left;
        if (T) count(layer + 1);
    }
};
struct Pass {  // one thread's way through a layer
    const Model& m; const Layer* l; i64 D, A, H; Worker my; Rows r; Buffer normed, router, score;
    Pass(const Model& m, i64 n, i64 H, i64 W, i64 E)
        : m(m), D(m.D), A(m.a.heads * m.a.d), H(H), my(n, D, H, E), r(n, W), normed(n * D),
          router(n * W), score(n * E) {}

    void norm(float* y, const float* x, bool first) {
        const float *scale = first ? l->scale1 : l->scale2, *shift = first ? l->shift1 : l->shift2;
        float sum[8] = {}, square[8] = {}, mean = 0, variance = 0;
        for (i64 i = 0; i < D; i += 8) *(v8u*)sum += *(v8u*)(x + i);
        for (int i = 0; i < 8; i++) mean += sum[i] / D;
        for (i64 i = 0; i < D; i += 8) {
            v8f v = *(v8u*)(x + i) - mean;
            *(v8u*)square += v * v;
        }
        for (int i = 0; i < 8; i++) variance += square[i] / D;
        const float inverse = 1 / sqrtf(variance + (float)m.eps);
        for (i64 i = 0; i < D; i++) y[i] = (x[i] - mean) * inverse * scale[i] + shift[i];
    }
    // Of `only` those tokens alone that go on get a q
    void qkv(i64 t0, i64 n, float* h, i64 part, i64 parts, const Attention& a) {
        for (i64 t = 0; t < n; t++) {
            const float* x = m.x + (t0 + t) * D;
            if (m.pre_ln) norm(normed + t * D, x, true), x = normed + t * D;
            my.x.set(t, x);
        }
        i64 some = 0;
        for (i64 b = 0; b < a.B && a.only; b++) {
            const i64 t = a.head_row(b) - t0;
            if (t >= 0 && t < n) my.rows[some++] = t;
        }
        for (int j = Q; j <= V; j++) if (l->dense[j].w) {
            const i64 P = l->dense[j].panels(), q = a.only && j == Q ? A / 8 : 0;
            const i64 from = P * part / parts, to = P * (part + 1) / parts;
            const Out out{m.qkv + (t0 * 3 + j) * A, 3 * A};
            product(l->dense[j], my.x, my.x.ids.data(), n, std::max(from, q), std::max(to, q),
                    out);
            product(l->dense[j], my.x, my.rows.data(), some, std::min(from, q), std::min(to, q),
                    out);
        }
        for (int j = Q; j <= V; j++) if (l->mlps[j].ffn.offsets)
            mlp(j, t0, n, parts > 1 ? h + j * n * H : h, {m.qkv + (t0 * 3 + j) * A, 3 * A}, part,
                parts, j == Q && a.only ? &a : nullptr);
    }
    // x += attention's output projection
    void project(i64 t0, i64 n, float* h, i64 part, i64 parts) {
        const Out out{m.x + t0 * D, D, true};
        my.x.K = A;
        for (i64 t = 0; t < n; t++) my.x.set(t, m.a.y + (t0 + t) * A);
        if (l->dense[O].w) product(l->dense[O], my.x, n, part, parts, out);
        else mlp(O, t0, n, h, out, part, parts);
        my.x.K = D;
    }
    // out = or += one of the MLPs of my.x
    void mlp(int j, i64 t0, i64 n, float* h, Out out, i64 part, i64 parts,
             const Attention* only = nullptr) {
        choose(j, t0, n, part, only);
        my.hidden(l->mlps[j].ffn, n, h, part, parts);
        wait(parts);
        my.output(l->mlps[j].ffn, n, h, out, part, parts);
    }
    // Which experts each token in my.x runs; with `only` none but the heads' tokens
    void choose(int j, i64 t0, i64 n, i64 part, const Attention* only = nullptr) {
        const Branch& b = l->mlps[j];
        const i64 W = b.r1.N, E = b.ffn.E;
        std::fill_n(my.mask.begin(), n * E, 1);
        if (b.r1.w) {
            product(b.r1, my.x, n, 0, 1, {router, W});
            for (i64 i = 0; i < n * W; i++) router[i] = router[i] < 0 ? 0 : router[i];
            r.K = W;
            for (i64 t = 0; t < n; t++) r.set(t, router + t * W);
            product(b.r2, r, n, 0, 1, {score, E});
        }
        for (i64 t = 0; t < n && b.r1.w; t++) {
            float *__restrict s = score + t * E, most = 0;
            u8* __restrict run = &my.mask[t * E];
            for (i64 e = 0; e < E && b.dynk; e++) {
                s[e] = fabsf(s[e]);
                most = s[e] > most ? s[e] : most;
            }
            const float tau = b.tau, floor = b.floor, least = b.dynk ? tau * most : tau;
            for (i64 e = 0; e < E; e++) run[e] = (s[e] >= least) & (s[e] > floor);
        }
        u8* shown = part ? nullptr : l->masks[j];
        if (!only && shown) memcpy(shown + t0 * E, my.mask.data(), n * E);
        for (i64 t = 0, seq = 0; t < n && only; t++) {
            while (seq < only->B && only->head_row(seq) < t0 + t) seq++;
            u8* run = &my.mask[t * E];
            if (seq == only->B || only->head_row(seq) != t0 + t) std::fill_n(run, E, 0);
            else if (shown) memcpy(shown + seq * E, run, E);
        }
    }
};

// x (T, D): embeddings -> last hidden states, or (B, D) where `only` one token of each goes on; of
// tokens that halt they are in `out`
extern "C" void encode(const Layer* layers, const Model* model) {
    const Model& m = *model;
    const i64 D = m.D;
    i64 H = 0, W = 0, E = 0;
    for (i64 i = 0; i < m.n_layer; i++) for (const Branch& b : layers[i].mlps) {
        H = std::max(H, b.ffn.in.N), W = std::max(W, b.r1.N), E = std::max(E, b.ffn.E);
    }
    const i64 most = block_size(m.T, m.a.threads, 2 * D * H);
    Buffer shared(3 * FEW * H);  // of q, k and v at the same time
    Halting here(m);
    #pragma omp parallel num_threads(m.a.threads)
    {
        Room room(m.a.past + m.a.longest, m.a.d);
        Buffer own(most * H);
        Pass pass(m, std::max<i64>(most, FEW), H, W, E);  // which `only` may leave
        i64 T = m.T;
        for (i64 i = 0; i < m.n_layer && T; i++) {
            const Layer& l = layers[i];
            const i64 block = std::min(most, block_size(T, m.a.threads, 2 * D * H));
            Attention a = m.a;
            a.old_k = l.k, a.old_v = l.v, a.only = m.a.only && i == m.n_layer - 1, a.B = here.B;
            pass.l = &l;
            in_blocks(T, block, [&](i64 t0, i64 n, i64 part, i64 parts) {
                pass.qkv(t0, n, T <= FEW ? shared : own, part, parts, a);
            });
            #pragma omp for schedule(dynamic)
            for (i64 item = 0; item < a.B * a.heads; item++) attend(a, item, room);
            if (a.only) {
                #pragma omp single
                here.only_heads();
                T = a.B;
            }
            in_blocks(T, block, [&](i64 t0, i64 n, i64 part, i64 parts) {
                float *x = m.x + t0 * D, *normed = pass.normed, *h = T <= FEW ? shared : own;
                pass.project(t0, n, h, part, parts);
                wait(parts);
                for (i64 t = 0; t < n; t++) {
                    pass.norm(normed + t * D, x + t * D, !m.pre_ln);
                    pass.my.x.set(t, normed + t * D);
                }
                pass.choose(FFN, t0, n, part);
                pass.my.hidden(l.mlps[FFN].ffn, n, h, part, parts);
                wait(parts);
                // x (post-LN: what the FFN read) += the FFN
                const i64 c0 = D / 8 * part / parts * 8, c1 = D / 8 * (part + 1) / parts * 8;
                for (i64 t = 0; t < n && !m.pre_ln; t++)
                    memcpy(x + t * D + c0, normed + t * D + c0, (c1 - c0) * 4);
                pass.my.output(l.mlps[FFN].ffn, n, h, {x, D, true}, part, parts);
                if (m.pre_ln) return;
                wait(parts);
                for (i64 t = part; t < n; t += parts) pass.norm(x + t * D, x + t * D, false);
            });
            if (!m.halting) continue;
            #pragma omp single
            here.leave(i);
            T = here.T;
        }
    }
}
'''

