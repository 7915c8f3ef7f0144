"""The routed expert MLP on GPU and CPU, and the fastest dense linear of the device.

    y[t] = b_out + sum over experts e with mask[t, e] of  act(x[t] W_in[e]^T + b_in[e]) W_out[e]

where W_in[e] and W_out[e] are the rows offsets[e]:offsets[e+1] of two neuron-major (F, D) matrices. Three
implementations of the one function `expert_mlp`:

    torch    `reference`, differentiable: computes everything and masks it. Without gradients, a loop over experts.
    triton   NVIDIA and AMD GPUs: gathers an expert's tokens, keeps its activations in registers, adds atomically
    cpp      CPUs: a C++ source at the end of this file, built on first use (about 3 s), called through ctypes

All accumulate in fp32. Experts are summed, never weighted. A NaN in a row of x stays in that row.

    python kernel.py      what the GPU kernels compile to (registers, spills, instructions), without a GPU

    T tokens · D n_embd · F hidden neurons · E experts · s neurons in an expert · rho share of neurons run
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                  # macOS has no wheel: the GPU kernels stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

ACTIVATIONS = {'relu': F.relu, 'gelu': F.gelu, 'gelu_tanh': lambda x: F.gelu(x, approximate='tanh')}


def expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act, impl=None, w_gate=None, rho=None):
    """The MLP of the experts that `mask` chooses for each token.

    x (T, D), mask (T, E) bool, w_in and w_out (F, D), b_in (F) and b_out (D) or None, offsets (E+1) int32,
    act one of ACTIVATIONS -> (T, D). impl: 'triton', 'cpp', 'torch', 'dense' (compute all, mask) or None: the
    fastest that serves these inputs. rho: the expected share of neurons run, a hint that saves a GPU call from
    reading the mask; the result does not depend on it. w_gate is reserved for gated units.

    The reference serves iff grad is enabled and an input requires it. fp32 sums on a GPU are added atomically,
    so two calls may differ in the last bits; on a CPU they do not, whatever the number of threads.
    """
    if w_gate is not None:
        raise ValueError('gated units are not supported yet: w_gate must be None')
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w_in, b_in, w_out, b_out)):
        return reference(x, mask, w_in, b_in, w_out, b_out, offsets, act)
    args = x, mask, w_in, b_in, w_out, b_out, offsets, act
    impl = impl or choose(x, mask, w_in, act, rho)
    if impl == 'triton':
        return triton_op(*args, rho) if torch.compiler.is_compiling() else triton_expert_mlp(*args, rho)
    if impl == 'cpp':                                            # the op costs 20 us, as much as a small layer
        return cpp_op(*args) if torch.compiler.is_compiling() else cpp_expert_mlp(*args)
    return dense_masked(*args) if impl == 'dense' else expert_loop(*args)


def choose(x, mask, w_in, act, rho):
    """The dispatcher: which implementation is the fastest for these inputs. Dense is an allowed answer."""
    if x.is_cuda:
        if triton is None:
            return 'dense'
        # On a GPU small experts are bound by moving tokens in and out, not by arithmetic: a bf16 layer of an
        # H100 gains from 128 neurons an expert on. `gain` is the model behind the table of `python kernel.py`;
        # it was never checked on a GPU.
        return 'triton' if gain(x, mask.shape[1], w_in.shape[0], 0.25 if rho is None else rho) > 1 else 'dense'
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or not have_cpp():
        return 'dense' if x.device.type == 'mps' else 'torch'
    # `python bench.py --impl=cpp`: at rho = 1 the kernel reaches 1.0 to 1.1 of dense for T > 16, because the zeros
    # of ReLU need no second matrix, and 0.9 below; GELU has no zeros.
    if not torch.compiler.is_compiling():
        rho = mask.sum().item() / max(1, mask.numel())
    return 'dense' if (rho or 0) > (0.7 if act != 'relu' else 0.8 if x.shape[0] <= FEW else 0.95) else 'cpp'


# ---------------------------------------------------------------------------------------------- plain torch

def linear(x, weight, bias=None):
    """x (..., K), weight (N, K), bias (N) or None -> (..., N), by the fastest dense linear of the device.

    On a CPU that is MKL or oneDNN, timed once per shape class; only under inference_mode, because the two
    round differently and a training run has to repeat bit for bit.
    """
    if not (x.is_cpu and torch.is_inference_mode_enabled()) or torch.compiler.is_compiling() or not x.numel():
        return F.linear(x, weight, bias)
    rows = min(x.numel() // x.shape[-1], 512).bit_length()       # from 512 tokens on, the faster one stays it
    return fastest_linear(rows, tuple(weight.shape), weight.is_contiguous(), x.dtype)(x, weight, bias)


def onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


@functools.cache
def fastest_linear(rows, shape, contiguous, dtype):
    """F.linear (MKL in fp32) or oneDNN, whichever is faster for 2^rows / 2 tokens and this weight."""
    weight = torch.randn(shape).to(dtype) if contiguous else torch.randn(shape[::-1]).to(dtype).T
    x, best = torch.randn(max(1, 1 << rows - 1), shape[1]).to(dtype), {}
    for f in (F.linear, onednn) * 4:                             # in turn; the first round warms up
        try:
            start = time.perf_counter()
            f(x, weight)
            best.setdefault(f, []).append(time.perf_counter() - start)
        except (RuntimeError, AttributeError):                   # oneDNN is not in every build, nor takes every dtype
            pass
    return min(best, key=lambda f: min(best[f][1:]))


def dense_mlp(x, w_in, b_in, w_out, b_out, act):
    """x (T, D) -> (T, D): every neuron runs; differentiable."""
    return linear(ACTIVATIONS[act](linear(x, w_in, b_in)), w_out.t(), b_out)


def neuron_mask(mask, offsets, n_hidden):                        # (T, E) -> (T, F)
    return mask.repeat_interleave(offsets.diff().long(), -1, output_size=n_hidden)


def reference(x, mask, w_in, b_in, w_out, b_out, offsets, act):
    """The routed MLP as one differentiable expression that computes everything and masks it."""
    a = ACTIVATIONS[act](F.linear(x, w_in, b_in)).masked_fill(~neuron_mask(mask, offsets, len(w_in)), 0)
    return F.linear(a, w_out.t(), b_out)


def dense_masked(x, mask, w_in, b_in, w_out, b_out, offsets, act):
    """Computes everything, block of tokens by block of tokens, and zeroes what was not chosen, if anything."""
    if x.is_cpu and mask.all():
        return dense_mlp(x, w_in, b_in, w_out, b_out, act)
    y = torch.empty_like(x)
    for i in range(0, len(x), 4096):
        a = ACTIVATIONS[act](linear(x[i:i + 4096], w_in, b_in))                         # (4096, F)
        y[i:i + 4096] = linear(a.masked_fill_(~neuron_mask(mask[i:i + 4096], offsets, len(w_in)), 0), w_out.t(), b_out)
    return y


def expert_loop(x, mask, w_in, b_in, w_out, b_out, offsets, act):
    """The best that plain torch has: gather an expert's tokens, two matmuls, add the rows back."""
    y = torch.zeros_like(x, dtype=torch.float32)
    edges = offsets.tolist()
    for e, (lo, hi) in enumerate(zip(edges, edges[1:])):
        rows = mask[:, e].nonzero().squeeze(-1)
        if len(rows) and hi > lo:
            h = ACTIVATIONS[act](linear(x[rows], w_in[lo:hi], None if b_in is None else b_in[lo:hi]))
            y.index_add_(0, rows, (h @ w_out[lo:hi]).float())
    return (y if b_out is None else y + b_out).to(x.dtype)


# ---------------------------------------------------------------------------------------------- Triton
#
# The work is a list of independent items, and an item is (expert, at most SB of its neurons, at most BM of the
# tokens that run it). One program does an item
#
#     h          = act(x[tokens] @ w_in[neurons].T + b_in)      (BM, SB), stays in registers
#     y[tokens] += h @ w_out[neurons]                           atomically, a few columns at a time
#
# so no (E, T, D) buffer exists, and neither does (T, F). x and y travel once per item, not once per layer: that
# traffic, not the arithmetic, bounds small experts. Hence tokens come in chunks whose rows of x and y stay in
# the L2 cache, all experts of a chunk run before the next chunk starts, and an item takes up to 128 neurons
# (64 in fp32), more than the experts one meets.
#
# The mask never travels to the host. `dispatch_kernel` turns it into lists of tokens on the device, and the grid
# of `expert_kernel` has a fixed size whose programs share out the items they find. So a call can be captured in
# a CUDA graph and replayed with another mask.

INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'
CHUNK_ELEMENTS = 1 << 22  # of x in a chunk of tokens: with y 25 MB in bf16, 34 in fp32; an A100 caches 40, an H100 50
FEW_TOKENS = 16

# Tiles (BM tokens, SB neurons, BK and BN columns of D in the two loops, warps, stages), largest first, by
# target and bytes per element. All of them run on tensor cores without a spill: `python kernel_triton.py`.
# h in registers limits BM x SB; fp32, three tf32 products of operands twice the size, stops at SB = 64. Where
# adds are not vectors (sm_80), or an activation needs room beside h (gelu_tanh on sm_90), BN has to be small.
TILES = {
    ('cuda:80', 2): [(128, 128, 64, 32, 8, 3), (128, 64, 64, 32, 8, 3), (64, 32, 64, 32, 4, 3), (16, 32, 64, 64, 4, 4)],
    ('cuda:80', 4): [(128, 64, 32, 16, 8, 3), (64, 32, 32, 16, 4, 3), (16, 32, 32, 32, 4, 4)],
    ('cuda:90', 2): [(128, 128, 64, 32, 8, 3), (128, 64, 64, 64, 8, 3), (64, 32, 64, 64, 4, 3), (16, 32, 64, 64, 4, 4)],
    ('cuda:90', 4): [(128, 64, 32, 32, 8, 3), (64, 32, 32, 32, 4, 3), (16, 32, 32, 32, 4, 4)],
    ('hip', 2): [(128, 128, 64, 32, 8, 2), (128, 64, 64, 32, 8, 2), (64, 32, 64, 32, 4, 2), (16, 32, 64, 64, 4, 2)],
    ('hip', 4): [(128, 64, 32, 32, 8, 2), (64, 32, 32, 32, 4, 2), (16, 32, 32, 32, 4, 2)],
}


def jit(kernel):  # a new number of tokens must not compile a new kernel
    return triton.jit(kernel, do_not_specialize=['T']) if triton else kernel


@jit
def activate(h, ACT: tl.constexpr):
    if ACT == 'relu':
        h = tl.where(h < 0, 0.0, h)  # not a maximum: relu(NaN) is NaN
    elif ACT == 'gelu':
        h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    else:  # gelu_tanh, where (1 + tanh z) / 2 = sigmoid(2z)
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    return h


@jit
def dispatch_kernel(mask, idx, count, T, E, LEN, CHUNK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """mask (T, E) -> for each chunk and expert `count` tokens, the first `count` of idx (chunks, E, LEN),
    numbered within the chunk. A program reads BT x BE of the mask as it lies in memory, ranks the tokens
    of each column, and reserves that many places in the column's list with one atomic: no sort and no
    second pass. The order of a list is arbitrary, and nothing depends on it."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    run = tl.load(mask + t[:, None].to(tl.int64) * E + e[None, :], mask=inside, other=0).to(tl.int32)  # (BT, BE)
    chunk = tl.program_id(0) * BT // CHUNK  # a multiple of BT: a program stays within one chunk
    column = chunk * E + e
    start = tl.atomic_add(count + column, tl.sum(run, 0), mask=e < E, sem='relaxed')  # (BE)
    place = start[None, :] + tl.cumsum(run, 0) - run  # (BT, BE)
    token = tl.broadcast_to((t - chunk * CHUNK)[:, None], (BT, BE))
    tl.store(idx + column[None, :].to(tl.int64) * LEN + place, token, mask=run != 0)


@jit
def expert_kernel(x, w_in, b_in, w_out, offsets, idx, count, y, E, LEN, D, EVEN: tl.constexpr, ACT: tl.constexpr,
                  PRECISION: tl.constexpr, INTERPRET: tl.constexpr, CHUNK: tl.constexpr, BE: tl.constexpr,
                  BM: tl.constexpr, SB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    chunk = tl.program_id(1).to(tl.int64)
    x += chunk * CHUNK * D
    y += chunk * CHUNK * D
    idx += chunk * E * LEN
    count += chunk * E

    # Number the items of all experts through: expert e holds those from end[e-1] to end[e].
    experts = tl.arange(0, BE)
    exists = experts < E
    size = tl.load(offsets + experts + 1, mask=exists, other=0) - tl.load(offsets + experts, mask=exists, other=0)
    tokens = tl.load(count + experts, mask=exists, other=0)
    end = tl.cumsum(tl.cdiv(tokens, BM) * tl.cdiv(size, SB), 0)  # (BE)

    for item in range(tl.program_id(0), tl.max(end, 0), tl.num_programs(0)):
        e = tl.sum((end <= item).to(tl.int32), 0)
        tile = item - tl.max(tl.where(end <= item, end, 0), 0)
        n = tl.load(count + e)
        # Neighbours in time share the weights and differ in tokens, so their atomics do not collide.
        m = tile % tl.cdiv(n, BM) * BM + tl.arange(0, BM)
        first = tl.load(offsets + e) + tile // tl.cdiv(n, BM) * SB
        left = tl.load(offsets + e + 1) - first
        # Lanes past the end repeat a valid row, and what they compute is dropped: cheaper than masking
        # every load. Tokens are dropped by the mask of the atomic, neurons by a zero in h.
        is_token, is_neuron = m < n, tl.arange(0, SB) < left
        row = tl.load(idx + e * LEN + m, mask=is_token, other=0).to(tl.int64) * D  # (BM)
        neuron = first.to(tl.int64) + tl.minimum(tl.arange(0, SB), left - 1)  # (SB)

        h = tl.zeros((BM, SB), tl.float32)
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            in_d = (k < D) | EVEN  # EVEN: BK and BN divide D, and the mask folds away
            a = tl.load(x + row[:, None] + k[None, :], mask=in_d[None, :], other=0)  # (BM, BK)
            w = tl.load(w_in + neuron[None, :] * D + k[:, None], mask=in_d[:, None], other=0)  # (BK, SB)
            if INTERPRET:  # the interpreter would multiply the bit patterns of bf16
                a, w = a.to(tl.float32), w.to(tl.float32)
            h = tl.dot(a, w, h, input_precision=PRECISION)
        if b_in is not None:
            h += tl.load(b_in + neuron).to(tl.float32)[None, :]
        h = tl.where(is_neuron[None, :], activate(h, ACT), 0.0)
        hidden = h.to(w_out.dtype.element_ty)
        if INTERPRET:
            hidden = hidden.to(tl.float32)

        for d0 in range(0, D, BN):
            d = d0 + tl.arange(0, BN)
            in_d = (d < D) | EVEN
            w = tl.load(w_out + neuron[:, None] * D + d[None, :], mask=in_d[None, :], other=0)  # (SB, BN)
            if INTERPRET:
                w = w.to(tl.float32)
            out = tl.dot(hidden, w, input_precision=PRECISION)  # (BM, BN)
            tl.atomic_add(y + row[:, None] + d[None, :], out, mask=is_token[:, None] & in_d[None, :], sem='relaxed')


@jit
def decode_kernel(x, mask, w_in, b_in, w_out, offsets, y, E, D, ACT: tl.constexpr,
                  BE: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr):
    """A few tokens: a program is (token, NB neurons), whatever experts these belong to. There is nothing
    to share between tokens but weights, so all that counts is to ask for the weights at once, early and
    in small pieces; sums are plain fp32 multiply-adds. Neurons that do not run are not read."""
    t = tl.program_id(0).to(tl.int64)  # tokens vary fastest: programs side by side share weights in L2
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
        if b_in is not None:
            h += tl.load(b_in + j, mask=runs, other=0).to(tl.float32)
        h = tl.where(runs, activate(h, ACT), 0.0)
        out = tl.sum(w2.to(tl.float32) * h[:, None], 0)  # (BD)
        tl.atomic_add(y + t * D + d, out, mask=d < D, sem='relaxed')


def compiler_options(target):
    # AMD: 16 x 16 matrix instructions, because with 32 x 32 the fp32 tiles spill scalar registers.
    return dict(enable_fp_fusion=True) | (dict(matrix_instr_nonkdim=16) if target == 'hip' else {})


@functools.cache
def machine(device):
    """The table of TILES for this device, its number of processors, and the options of its compiler."""
    if INTERPRET:
        return 'cuda:80', 1, {}
    properties = torch.cuda.get_device_properties(device)
    target = 'hip' if torch.version.hip else 'cuda:90' if properties.major == 9 else 'cuda:80'  # 80: the modest one
    return target, properties.multi_processor_count, compiler_options(target)


def precision(target, dtype):
    """fp32 on NVIDIA is three tf32 products: as good as fp32, and on tensor cores. AMD multiplies fp32 itself."""
    return 'tf32x3' if dtype == torch.float32 and target != 'hip' else 'ieee'


def decode_options(D):
    """About 4096 elements of each matrix a program: 12 KB in flight at D = 768 in bf16, 40 registers."""
    BD = triton.next_power_of_2(D)
    return dict(BD=BD, NB=max(1, 4096 // BD), num_warps=min(16, max(4, BD // 1024)))


def chunk_length(D):
    return max(128, 1 << (CHUNK_ELEMENTS // D).bit_length() - 1)


def choose_tile(tiles, tokens, E, s, chunks, processors):
    """The largest tile, as it reads the least, that is not mostly padding and keeps half the processors busy
    (these can ask for all that L2 delivers); and how many items it makes of E experts of s neurons."""
    for tile in tiles:
        BM, SB = tile[:2]
        items = E * triton.cdiv(tokens, BM) * triton.cdiv(s, SB)
        if SB < max(2 * s, 64) and BM <= tokens and 2 * items * chunks >= processors:
            break
    return tile, items  # the smallest where none will do


def triton_expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act, rho=None):
    """x (T, D), mask (T, E) bool, w_in and w_out (F, D), offsets (E+1) int32 on the device -> (T, D).
    Nothing here looks at the mask or the offsets: `rho`, the share of neurons expected to run, only
    sizes the tiles and the grid, and any mask gives the right answer with any rho."""
    T, D = x.shape
    F, E = len(w_in), mask.shape[1]
    x, w_in, w_out = x.contiguous(), w_in.contiguous(), w_out.contiguous()
    mask = mask.contiguous().view(torch.uint8)
    y = torch.empty(T, D, dtype=torch.float32, device=x.device)
    y.zero_() if b_out is None else y.copy_(b_out)
    if T == 0 or F == 0 or E == 0:
        return y.to(x.dtype)
    target, processors, options = machine(x.device)
    rho = 0.25 if rho is None else min(max(float(rho), 0.0), 1.0)
    BE = triton.next_power_of_2(max(E, 16))

    with torch.cuda.device_of(x):
        # One by one, tokens read their weights again (from L2): as long as that is a few times, it is
        # cheaper than to launch the dispatch.
        if T == 1 or (T <= FEW_TOKENS and T * rho <= 4):
            few = decode_options(D)
            decode_kernel[T, triton.cdiv(F, few['NB'])](x, mask, w_in, b_in, w_out, offsets, y, E, D,
                                                        ACT=act, BE=BE, **few, **options)
            return y.to(x.dtype)

        CHUNK = chunk_length(D)
        chunks, length = triton.cdiv(T, CHUNK), min(triton.cdiv(T, 16) * 16, CHUNK)
        idx = torch.empty(chunks, E, length, dtype=torch.int32, device=x.device)
        count = torch.zeros(chunks, E, dtype=torch.int32, device=x.device)
        dispatch_kernel[triton.cdiv(T, 128), triton.cdiv(E, 32)](mask, idx, count, T, E, length,
                                                                  CHUNK=CHUNK, BT=128, BE=32, **options)

        tokens, s = max(1, round(rho * min(T, CHUNK))), triton.cdiv(F, E)
        tile, items = choose_tile(TILES[target, x.element_size()], tokens, E, s, chunks, processors)
        BM, SB, BK, BN, num_warps, num_stages = tile
        expert_kernel[min(items, 8 * processors), chunks](
            x, w_in, b_in, w_out, offsets, idx, count, y, E, length, D, EVEN=D % max(BK, BN) == 0, ACT=act,
            PRECISION=precision(target, x.dtype), INTERPRET=INTERPRET, CHUNK=CHUNK, BE=BE,
            BM=BM, SB=SB, BK=BK, BN=BN, num_warps=num_warps, num_stages=num_stages, **options)
    return y.to(x.dtype)


GPUS = {  # FLOP/s of dense and of experts (in fp32 plain, and tf32 / 3), bytes/s of HBM and, assumed, of L2
    'cuda:80': ('A100', {2: (312e12, 312e12), 4: (19.5e12, 52e12)}, 2.0e12, 4.0e12),
    'cuda:90': ('H100', {2: (989e12, 989e12), 4: (67e12, 165e12)}, 3.35e12, 5.5e12),
}


def roofline(tile, target, T, D, E, s, size, rho):
    """-> bytes through L2 and FLOPs per (token, expert) pair, the most this tile can gain over a dense MLP
    running at its peak, and what stops it. Optimistic: no padded tokens, no latency, adds cost a store."""
    BM, SB = tile[:2]
    items = triton.cdiv(s, SB)                   # an expert is that many items wide; each gathers x and adds to y
    pair_bytes, pair_flops = D * (items * (size + 4) + 2 * s * size / BM), 4 * D * items * SB
    _, peaks, hbm, l2 = GPUS.get(target, GPUS['cuda:80'])
    once = 2 * D * size * (T + E * s) / hbm                      # x, y and the weights
    dense = max(4 * T * E * s * D / peaks[size][0], once)
    touched = min(1.0, T * rho)                                  # of the weights, by few tokens
    times = dict(flops=rho * T * E * pair_flops / peaks[size][1], HBM=2 * D * size * (T + touched * E * s) / hbm,
                 L2=(rho * T * E * pair_bytes + T * D * (8 + size)) / l2)               # fill and cast y, too
    bound = max(times, key=times.get)
    return pair_bytes, pair_flops, dense / times[bound], bound


def gain(x, E, n_hidden, rho):
    """What the roofline promises `choose` for this call: time of dense over time of experts."""
    (T, D), size, (target, processors, _) = x.shape, x.element_size(), machine(x.device)
    s = triton.cdiv(n_hidden, E)
    tile, _ = choose_tile(TILES[target, size], max(1, round(rho * T)), E, s, 1, processors)
    return roofline(tile, target, max(T, 1), D, E, s, size, rho)[2]


@torch.library.custom_op('d2dmoe::experts_triton', mutates_args=())
def triton_op(x: torch.Tensor, mask: torch.Tensor, w_in: torch.Tensor, b_in: Optional[torch.Tensor],
              w_out: torch.Tensor, b_out: Optional[torch.Tensor], offsets: torch.Tensor, act: str,
              rho: Optional[float]) -> torch.Tensor:
    return triton_expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act, rho)


@triton_op.register_fake
def _(x, *_):
    return torch.empty_like(x)


# ---------------------------------------------------------------------------------------------- C++

FEW = 16                     # tokens up to which the path bound by memory is taken
ACTS = ['relu', 'gelu', 'gelu_tanh']
FLAGS = ['-O3', '-march=native', '-std=c++17', '-shared', '-fPIC']
PID = os.getpid()


class Job(ctypes.Structure):  # as in the source above
    _fields_ = [(name, ctypes.c_void_p) for name in 'x mask w_in b_in w_out b_out offsets y'.split()] + [
        (name, ctypes.c_int64) for name in 'TDE'] + [(name, ctypes.c_int) for name in ('act', 'threads')]


@functools.cache
def library():
    """The compiled kernel, or None (with one warning that says why) where it can't be built."""
    compilers = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    cxx = next((c for c in map(shlex.split, compilers) if shutil.which(c[0])), None)
    if cxx is None:
        warnings.warn(f'no C++ compiler ({", ".join(compilers)}) found: experts run in plain torch, slowly')
        return None
    try:
        version = subprocess.run(cxx + ['--version'], capture_output=True, text=True).stdout
        key = '\0'.join([CPP, *cxx, *FLAGS, version, cpu_name()])
        folder = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'd2dmoe')
        path = os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:16] + '.so')
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as tmp:  # the same file system: the rename is atomic
                source, built = os.path.join(tmp, 'kernel.cpp'), os.path.join(tmp, 'kernel.so')
                with open(source, 'w') as f:
                    f.write(CPP)
                for openmp in (['-fopenmp'], []):
                    run = subprocess.run([*cxx, *FLAGS, *openmp, '-o', built, source], capture_output=True, text=True)
                    if run.returncode == 0:
                        break
                else:
                    raise OSError(run.stderr.strip()[-2000:])
                os.replace(built, path)
        lib = ctypes.CDLL(path)
    except OSError as e:
        warnings.warn(f'building the C++ kernel with {cxx[0]} failed: experts run in plain torch, slowly\n{e}')
        return None
    for name in ('few_f32', 'few_bf16', 'many_f32', 'many_bf16'):
        getattr(lib, name).argtypes = [ctypes.POINTER(Job)]
        getattr(lib, name).restype = None
    return lib


def cpu_name():
    """What -march=native depends on."""
    try:
        with open('/proc/cpuinfo') as f:
            return ''.join(sorted({line for line in f if line.startswith(('model name', 'flags', 'Features'))}))
    except OSError:
        return platform.machine() + platform.processor()


def cpp_expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act, path=None):
    """y[t] = b_out + sum of act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e] over the e with mask[t, e]. No autograd."""
    (T, D), E = x.shape, mask.shape[1]
    assert x.dtype in (torch.float32, torch.bfloat16) and w_in.dtype == w_out.dtype == x.dtype
    assert mask.dtype == torch.bool and mask.shape[0] == T and offsets.dtype == torch.int32 and len(offsets) == E + 1
    assert w_in.shape == w_out.shape == (w_in.shape[0], D) and w_in.is_contiguous() and w_out.is_contiguous()
    path = path or ('few' if T <= FEW else 'many')
    x, mask, offsets = x.contiguous(), mask.contiguous(), offsets.contiguous()
    b_in, b_out = [None if b is None else b.float().contiguous() for b in (b_in, b_out)]  # kept alive to the call's end
    y = torch.empty_like(x)
    fn = getattr(library(), f'{path}_{"f32" if x.dtype == torch.float32 else "bf16"}')
    threads = torch.get_num_threads() if os.getpid() == PID else 1  # in a forked child libgomp would hang
    if T:
        pointers = [None if t is None else t.data_ptr() for t in (x, mask, w_in, b_in, w_out, b_out, offsets, y)]
        fn(Job(*pointers, T, D, E, ACTS.index(act), threads))
    return y


@torch.compiler.assume_constant_result
def have_cpp():
    return library() is not None


@torch.library.custom_op('d2dmoe::experts_cpp', mutates_args=())
def cpp_op(x: torch.Tensor, mask: torch.Tensor, w_in: torch.Tensor, b_in: Optional[torch.Tensor], w_out: torch.Tensor,
           b_out: Optional[torch.Tensor], offsets: torch.Tensor, act: str) -> torch.Tensor:
    return cpp_expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act)


@cpp_op.register_fake
def _(x, *_):
    return torch.empty_like(x)


CPP = r'''
// y[t] = b_out + sum over experts e with mask[t, e] of act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e]
//
// Layout: x (T, D), w_in and w_out (F, D): a neuron is a row of each, so both matmuls walk along D.
//   hidden: h = x row . w_in row; a register tile of 3 tokens x 4 neurons (7 loads for 12 multiply-adds),
//           token rows gathered by pointer, nothing packed. Each h that is not zero goes to its token's list.
//   outer:  y row += h * w_out row over the list, a strip of D at a time in registers; zeros cost nothing.
// many() runs blocks of tokens in parallel: for each GROUP of neurons, hidden() over the block, then outer() with
//   that strip of w_out copied to the L1 cache (rows a power of two apart would evict each other there).
// few() is bound by memory: CHUNKS of neurons in parallel, a weight row leaves memory once for all tokens.
// The order of every sum is fixed by the shapes and the mask, never by the number of threads.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>
typedef int64_t i64;

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };  // NEON, SSE
#endif
enum { STRIP = 8 * LANES, GROUP = 96, SPAN = 24, PIECE = 16, CHUNKS = 32 };  // GROUP x STRIP floats: 24 KB with AVX2
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // the same, anywhere in memory
typedef float v4 __attribute__((vector_size(16)));
typedef uint32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
struct bf16 { uint16_t bits; };

// bf16 is the upper half of an fp32
static inline float f32(float v) { return v; }
static inline float f32(bf16 v) { uint32_t u = (uint32_t)v.bits << 16; float f; memcpy(&f, &u, 4); return f; }
static inline vf load(const float* p) { return *(const vu*)p; }
static inline vf load(const bf16* p) {
#if defined(__AVX__) && !defined(__AVX512F__)
    vh h = *(const vh*)p, zero = {};  // GCC 12 takes twice the instructions for convertvector
    return (vf)__builtin_shufflevector(zero, h, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15);
#else
    return (vf)(__builtin_convertvector(*(const vh*)p, vi) << 16);
#endif
}
static inline vf pinned(vf v) {  // in a register: GCC would rather load it once for each use
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}
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

struct Buffer {  // aligned, so that no vector of ours straddles two cache lines
    void* p;
    Buffer(i64 bytes) : p(aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
    ~Buffer() { free(p); }
    operator float*() { return (float*)p; }
};

__attribute__((noinline)) static v4 gelu(v4 h, int act) {  // out of line: its code would be in every tile
    for (int j = 0; j < 4; j++) {
        float v = h[j];
        h[j] = 0.5f * v * (1 + (act == 1 ? erff(v * 0.70710678f) : tanhf(0.79788456f * (v + 0.044715f * v * v * v))));
    }
    return h;
}

// The lane sums of four vectors, in one; always the same order of additions
static inline v4 fold(vf v) {
#if defined(__AVX512F__)
    auto w = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(w, w, 0, 1, 2, 3) + __builtin_shufflevector(w, w, 4, 5, 6, 7);
#elif defined(__AVX__)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}
static inline v4 sums(v4 a, v4 b, v4 c, v4 d) {
    v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

template <class W> struct Job {  // one call; kernel.py fills it through ctypes
    const W* x; const uint8_t* mask; const W* w_in; const float* b_in; const W* w_out; const float* b_out;
    const int* offsets; W* y; i64 T, D, E; int act, threads;
};

struct Unit { float h; int row; };  // a hidden unit that is not zero, and its row of w_out
struct Lists {  // one thread's scratch for a block of n tokens
    Buffer units, counts, tokens, rows;
    Unit* unit;   // (n, GROUP): for each token its units in the current group
    int* count;   // (n): how many
    int* token;   // (n): the tokens that want an expert
    Lists(i64 n, i64 D) : units(n * GROUP * sizeof(Unit)), counts(n * 4), tokens(n * 4), rows(4 * D * 4),
        unit((Unit*)units.p), count((int*)counts.p), token((int*)tokens.p) {}
    int who(const uint8_t* mask, i64 n, i64 E) {  // reads one column of the mask
        int wanted = 0;
        for (i64 t = 0; t < n; t++) {
            token[wanted] = t;
            wanted += mask[t * E] != 0;
        }
        return wanted;
    }
};

// NT tokens x NJ neurons of the first matmul. `row` is the first neuron's number in the list.
template <int NT, int NJ, class W>
static void tile(const float* x, const int* token, const W* w, const float* b, i64 D, int act, int row, Lists& lists) {
    const float* xs[NT];
    vf acc[NT][4] = {};
    for (int t = 0; t < NT; t++) xs[t] = x + token[t] * D;
    i64 k = 0;
    for (; k + LANES <= D; k += LANES) {
        vf xk[NT];
        for (int t = 0; t < NT; t++) xk[t] = pinned(load(xs[t] + k));
        for (int j = 0; j < NJ; j++) {
            vf wk = pinned(load(w + j * D + k));
            for (int t = 0; t < NT; t++) acc[t][j] += xk[t] * wk;
        }
    }
    v4 bias = {};
    for (int j = 0; b && j < NJ; j++) bias[j] = b[j];
    #pragma GCC unroll 4
    for (int t = 0; t < NT; t++) {
        v4 h = sums(fold(acc[t][0]), fold(acc[t][1]), fold(acc[t][2]), fold(acc[t][3]));
        int n = lists.count[token[t]];
        Unit* unit = lists.unit + (i64)token[t] * GROUP;
        for (i64 i = k; i < D; i++)
            for (int j = 0; j < NJ; j++) h[j] += xs[t][i] * f32(w[j * D + i]);
        h += bias;
        h = act ? gelu(h, act) : h < v4{} ? v4{} : h;  // NaN < 0 is false: relu(NaN) is NaN
        auto alive = h != v4{};  // 0 or -1; true for NaN
        for (int j = 0; j < NJ; j++) {
            unit[n] = {h[j], row + j};
            n -= alive[j];  // no branch: it would be a coin flip
        }
        lists.count[token[t]] = n;
    }
}

template <int NJ, class P>
static void tiles(const float* x, const int* token, int n, P w, const float* b, i64 D, int act, int row, Lists& lists) {
    const int NT = NJ == 4 ? 3 : 4;  // 12 sums, 3 + 1 operands: the 16 registers of AVX2
    int i = 0;
    for (; i + NT <= n; i += NT) tile<NT, NJ>(x, token + i, w, b, D, act, row, lists);
    if (n - i == 3) tile<3, NJ>(x, token + i, w, b, D, act, row, lists);
    if (n - i == 2) tile<2, NJ>(x, token + i, w, b, D, act, row, lists);
    if (n - i == 1) tile<1, NJ>(x, token + i, w, b, D, act, row, lists);
}

// Hidden units of neurons j0 .. j1 for the first n of lists.token, in nearly equal tiles of at most four neurons
template <class W>
static void hidden(const Job<W>& job, const float* x, int n, i64 j0, i64 j1, i64 row0, Lists& lists) {
    // SPAN tokens at a time: their rows of x stay in the L2 cache for all the neurons
    for (int i = 0; i < n; i += SPAN) for (i64 j = j0, nj; j < j1; j += nj) {
        i64 left = (j1 - j + 3) / 4;
        nj = (j1 - j + left - 1) / left;
        auto run = [&](auto* w) {
            const float* b = job.b_in ? job.b_in + j : nullptr;
            const int *token = lists.token + i, span = std::min<int>(SPAN, n - i);
            auto* f = nj == 4 ? tiles<4, decltype(w)> : nj == 3 ? tiles<3, decltype(w)> : nj == 2 ? tiles<2, decltype(w)> : tiles<1, decltype(w)>;
            f(x, token, span, w, b, job.D, job.act, j - row0, lists);
        };
        const W* w = job.w_in + j * job.D;
        if (std::is_same<W, float>::value || n <= 3) run(w);
        else widen((float*)lists.rows, w, nj * job.D), run((const float*)lists.rows);  // once for all tiles
    }
}

// y[0 : V vectors] += sum over the list of h * w_out row
template <int V, class W>
static inline void outer(float* y, const Unit* unit, int n, const W* w, i64 stride) {
    vf acc[V];
    for (int v = 0; v < V; v++) acc[v] = load(y + v * LANES);
    for (int i = 0; i < n; i++) {
        const W* row = w + unit[i].row * stride;
        for (int v = 0; v < V; v++) acc[v] += unit[i].h * load(row + v * LANES);
    }
    for (int v = 0; v < V; v++) *(vu*)(y + v * LANES) = acc[v];
}

template <class W>
static void many(const Job<W>& job) {
    const W *x = job.x, *w_out = job.w_out;  // plain names: clang's OpenMP doesn't capture structured bindings
    const float* b_out = job.b_out; const uint8_t* mask = job.mask; const int* offsets = job.offsets;
    W* y = job.y; const i64 T = job.T, D = job.D, E = job.E, threads = job.threads;
    // Blocks: a multiple of the threads in number; 256 tokens where x and y then fit the L2 cache, else 512, since
    // a block reads all the weights. A token's result doesn't depend on its block.
    i64 F = offsets[E], strips = (D + STRIP - 1) / STRIP, limit = D > 256 ? 512 : 256, blocks = (T + limit - 1) / limit;
    blocks = (blocks + threads - 1) / threads * threads;
    i64 block = std::max<i64>((T + blocks - 1) / blocks, 16);
    blocks = (T + block - 1) / block;
    #pragma omp parallel num_threads(threads)
    {
        Buffer xb(block * D * 4), yb(strips * block * STRIP * 4), wb(GROUP * STRIP * 4);  // yb (strips, block, STRIP)
        memset(wb.p, 0, GROUP * STRIP * 4);
        Lists lists(block, D);
        #pragma omp for schedule(dynamic)
        for (i64 i = 0; i < blocks; i++) {
            i64 t0 = i * block, n = std::min(block, T - t0), e = 0;
            const float* xs = (const float*)(x + t0 * D);
            if (!std::is_same<W, float>::value) widen((float*)xb, x + t0 * D, n * D), xs = xb;
            memset(yb.p, 0, strips * block * STRIP * 4);
            for (i64 g0 = 0; g0 < F; g0 += GROUP) {
                i64 g1 = std::min<i64>(g0 + GROUP, F), alive = 0;
                memset(lists.count, 0, n * 4);
                while (offsets[e + 1] <= g0) e++;
                for (i64 f = e; f < E && offsets[f] < g1; f++) {
                    i64 j0 = std::max<i64>(offsets[f], g0), j1 = std::min<i64>(offsets[f + 1], g1);
                    if (j0 < j1) hidden(job, xs, lists.who(mask + t0 * E + f, n, E), j0, j1, g0, lists);
                }
                for (i64 t = 0; t < n; t++) alive += lists.count[t];
                for (i64 s = 0; s < strips && alive; s++) {
                    float* ys = yb + s * block * STRIP;
                    for (i64 j = g0; j < g1; j++)
                        widen(wb + (j - g0) * STRIP, w_out + j * D + s * STRIP, std::min<i64>(STRIP, D - s * STRIP));
                    for (i64 t = 0; t < n; t++)
                        outer<8>(ys + t * STRIP, lists.unit + t * GROUP, lists.count[t], (float*)wb, STRIP);
                }
            }
            for (i64 t = 0; t < n; t++)
                for (i64 s = 0; s < strips; s++) {
                    const float* ys = yb + (s * block + t) * STRIP;
                    for (i64 d = s * STRIP; d < std::min<i64>(D, s * STRIP + STRIP); d++)
                        store(y + (t0 + t) * D + d, ys[d - s * STRIP] + (b_out ? b_out[d] : 0));
                }
        }
    }
}

template <class W>
static void few(const Job<W>& job) {
    const W *x = job.x, *w_out = job.w_out;
    const float* b_out = job.b_out; const uint8_t* mask = job.mask; const int* offsets = job.offsets;
    W* y = job.y; const i64 T = job.T, D = job.D, E = job.E, threads = job.threads;
    // Work: the slices of at most PIECE neurons of the experts that some token wants, in CHUNKS equal shares
    std::vector<std::array<int, 3>> pieces;  // expert, first neuron, last + 1
    for (i64 e = 0; e < E; e++) {
        bool wanted = false;
        for (i64 t = 0; t < T; t++) wanted |= mask[t * E + e];
        for (int j = offsets[e]; wanted && j < offsets[e + 1]; j += PIECE)
            pieces.push_back({(int)e, j, std::min<int>(j + PIECE, offsets[e + 1])});
    }
    i64 P = pieces.size(), chunks = std::min<i64>(CHUNKS, P);
    Buffer xb(T * D * 4), partial(chunks * T * D * 4);  // partial (chunks, T, D)
    widen((float*)xb, x, T * D);
    #pragma omp parallel num_threads(threads)
    {
        Lists lists(T, D);
        #pragma omp for schedule(dynamic)
        for (i64 c = 0; c < chunks; c++) {
            float* sum = partial + c * T * D;
            memset(sum, 0, T * D * 4);
            memset(lists.count, 0, T * 4);
            i64 begin = c * P / chunks, end = (c + 1) * P / chunks;
            for (i64 p = begin, held = 0; p < end; p++) {
                auto [e, j0, j1] = pieces[p];
                hidden(job, (float*)xb, lists.who(mask + e, T, E), j0, j1, 0, lists);
                held += j1 - j0;
                if (p + 1 < end && held + PIECE <= GROUP) continue;
                for (i64 t = 0; t < T; t++) {
                    const Unit* unit = lists.unit + t * GROUP;
                    i64 d = 0;
                    for (; d + STRIP <= D; d += STRIP) outer<8>(sum + t * D + d, unit, lists.count[t], w_out + d, D);
                    for (; d + LANES <= D; d += LANES) outer<1>(sum + t * D + d, unit, lists.count[t], w_out + d, D);
                    for (; d < D; d++)
                        for (int i = 0; i < lists.count[t]; i++) sum[t * D + d] += unit[i].h * f32(w_out[unit[i].row * D + d]);
                    lists.count[t] = 0;
                }
                held = 0;
            }
        }
        #pragma omp for
        for (i64 i = 0; i < T * D; i += STRIP) {
            i64 n = std::min<i64>(STRIP, T * D - i);
            float total[STRIP];
            for (i64 k = 0; k < n; k++) total[k] = b_out ? b_out[(i + k) % D] : 0;
            for (i64 c = 0; c < chunks; c++)
                for (i64 k = 0; k < n; k++) total[k] += partial[c * T * D + i + k];
            for (i64 k = 0; k < n; k++) store(y + i + k, total[k]);
        }
    }
}

extern "C" {
void few_f32(const Job<float>& job) { few(job); }
void few_bf16(const Job<bf16>& job) { few(job); }
void many_f32(const Job<float>& job) { many(job); }
void many_bf16(const Job<bf16>& job) { many(job); }
}
'''


if __name__ == '__main__':
    import bench
    bench.kernel_report()
