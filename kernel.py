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

FEW = 16                             # tokens up to which reading the weights bounds an MLP, not arithmetic
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
    if impl in ('triton', 'cpp'):                                # the op costs 20 us, as much as a small layer
        return (experts_op if torch.compiler.is_compiling() else run_fused)(*args, impl, rho)
    return dense_masked(*args) if impl == 'dense' else expert_loop(*args)


def run_fused(x: torch.Tensor, mask: torch.Tensor, w_in: torch.Tensor, b_in: Optional[torch.Tensor],
              w_out: torch.Tensor, b_out: Optional[torch.Tensor], offsets: torch.Tensor, act: str, impl: str,
              rho: Optional[float]) -> torch.Tensor:
    args = x, mask, w_in, b_in, w_out, b_out, offsets, act
    return triton_expert_mlp(*args, rho) if impl == 'triton' else cpp_expert_mlp(*args)


experts_op = torch.library.custom_op('d2dmoe::experts', run_fused, mutates_args=())
experts_op.register_fake(lambda x, *_: x.new_empty(x.shape))


def choose(x, mask, w_in, act, rho):
    """The dispatcher: which implementation is the fastest for these inputs. Dense is an allowed answer."""
    if x.is_cuda:
        if triton is None:
            return 'dense'
        # Many tokens of small experts are bound by moving x in and y out, at s / rho FLOPs a byte: the roofline of
        # `python kernel.py` (never checked on a GPU) gains over dense in bf16 from s > 222 rho on an A100 and
        # s > 512 rho on an H100, in fp32 from s > 32 rho. Few tokens only read the weights they need.
        s, hopper = w_in.shape[0] / max(1, mask.shape[1]), machine(x.device)[0] == 'cuda:90'
        limit = 1.0 if x.shape[0] <= FEW else s / 32 if x.element_size() == 4 else s / 512 if hopper else s / 222
        return 'triton' if (0.25 if rho is None else rho) < min(limit, 0.8) else 'dense'
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or not have_cpp():
        return 'dense' if x.device.type == 'mps' else 'torch'
    # Measured at D 768, F 3072: with ReLU the kernel is 2.1 (rho 0.5) to 1.1 times (rho 1) as fast as dense, because
    # hidden units that are zero need no second matrix. GELU has no zeros: many tokens run at 1.2 to 1.5 (rho 0.5),
    # 0.9 to 1.1 (0.7), 0.6 to 0.8 (1) of dense, and computing everything and masking it at 0.94 to 0.98.
    if act == 'relu' or x.shape[0] <= FEW:
        return 'cpp'
    if not torch.compiler.is_compiling():
        rho = mask.sum().item() / max(1, mask.numel())
    return 'dense' if (rho or 0) > 0.7 else 'cpp'


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


def in_fp32(x, weight, bias=None):
    """For half precision on CPUs without units for it, where F.linear is slower than converting everything."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@functools.cache
def fastest_linear(rows, shape, contiguous, dtype):
    """F.linear (MKL in fp32), oneDNN or a detour by fp32: what is fastest for 2^rows / 2 tokens and this weight."""
    weight = torch.randn(shape).to(dtype) if contiguous else torch.randn(shape[::-1]).to(dtype).T
    x, best = torch.randn(max(1, 1 << rows - 1), shape[1]).to(dtype), {}
    jobs = (F.linear, onednn, in_fp32) if dtype.itemsize == 2 else (F.linear, onednn)
    for f in jobs * 4:                                           # in turn; the first round warms up
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
    y, n, E = torch.empty_like(x), len(w_in), mask.shape[1]
    everything = x.is_cpu and bool(mask.all())                   # on a GPU looking would be waiting
    equal = x.is_cpu and E > 0 and n % E == 0 and bool((offsets.diff() == n // E).all())
    block = 512 if x.is_cpu else 4096
    for rows in (slice(i, i + block) for i in range(0, len(x), block)):
        a = ACTIVATIONS[act](linear(x[rows], w_in, b_in))                               # (512, F)
        if equal and not everything:                             # without a mask of neurons: 0.95 of dense, not 0.82
            a.view(len(a), E, n // E).masked_fill_(~mask[rows, :, None], 0)
        elif not everything:
            a.masked_fill_(~neuron_mask(mask[rows], offsets, n), 0)
        y[rows] = linear(a, w_out.t(), b_out)
    return y


def expert_loop(x, mask, w_in, b_in, w_out, b_out, offsets, act):
    """The best that plain torch has: gather an expert's tokens, two matmuls, add the rows back."""
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    edges = offsets.tolist()
    for e, (lo, hi) in enumerate(zip(edges, edges[1:])):
        rows = mask[:, e].nonzero().squeeze(-1)
        if len(rows) and hi > lo:
            h = ACTIVATIONS[act](linear(x[rows], w_in[lo:hi], None if b_in is None else b_in[lo:hi]))
            y.index_add_(0, rows, (h @ w_out[lo:hi]).to(y.dtype))
    return (y if b_out is None else y + b_out).to(x.dtype)


# ---------------------------------------------------------------------------------------------- Triton
#
# The work is a list of independent items, and an item is (expert, at most SB of its neurons, at most BM of the
# tokens that run it). One program does an item
#
#     h          = act(x[tokens] @ w_in[neurons].T + b_in)      (BM, SB), stays in registers
#     y[tokens] += h @ w_out[neurons]                           atomically, a few columns at a time
#
# so no (E, T, D) buffer exists, and neither does (T, F). x and y travel once per item: that traffic bounds small
# experts. Hence tokens come in chunks whose rows of x and y stay in the L2 cache, all experts of a chunk run before
# the next chunk starts, and an item takes up to 128 neurons (64 in fp32), more than the experts one meets.
#
# The mask never travels to the host. `dispatch_kernel` turns it into lists of tokens on the device, and the grid
# of `expert_kernel` has a fixed size whose programs share out the items they find. So a call can be captured in
# a CUDA graph and replayed with another mask.

INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'
CHUNK_ELEMENTS = 1 << 22  # of x in a chunk of tokens: with y 25 MB in bf16, 34 in fp32; an A100 caches 40, an H100 50

# Tiles (BM tokens, SB neurons, BK and BN columns of D in the two loops, warps, stages), largest first, by
# target and bytes per element. All of them run on tensor cores without a spill: `python kernel.py`.
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
        h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)  # relu(NaN) is NaN
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
        if T == 1 or (T <= FEW and T * rho <= 4):
            few = decode_options(D)
            decode_kernel[T, triton.cdiv(F, few['NB'])](x, mask, w_in, b_in, w_out, offsets, y, E, D,
                                                        ACT=act, BE=BE, **few, **options)
            return y.to(x.dtype)

        CHUNK = max(128, 1 << (CHUNK_ELEMENTS // D).bit_length() - 1)                   # a power of two
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


# ---------------------------------------------------------------------------------------------- C++

ACTS = ['relu', 'gelu', 'gelu_tanh']
FLAGS = ['-O3', '-std=c++17', '-shared', '-fPIC']
NATIVE = [['-march=native', '-fopenmp'], ['-march=native'], ['-mcpu=native']]  # the first that compiles and loads
PID = os.getpid()


class Job(ctypes.Structure):  # as in the source below
    _fields_ = [(name, ctypes.c_void_p) for name in 'x mask w_in b_in w_out b_out offsets y'.split()] + [
        (name, ctypes.c_int64) for name in 'TDE'] + [(name, ctypes.c_int) for name in ('act', 'threads')]


def cpu_name():
    """What -march=native depends on."""
    try:
        with open('/proc/cpuinfo') as f:
            return ''.join(sorted({line for line in f if line.startswith(('model name', 'flags', 'Features'))}))
    except OSError:
        return platform.machine() + platform.processor()


def build(cxx):
    """Path of the shared library, compiled unless the cache has it."""
    version = subprocess.run([*cxx, '--version'], capture_output=True, text=True).stdout
    key = '\0'.join([CPP, *cxx, *FLAGS, *sum(NATIVE, []), version, cpu_name()])
    folder = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'd2dmoe')
    path = os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:16] + '.so')
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:  # the same file system: the rename is atomic
        for native in NATIVE:
            command = [*cxx, *FLAGS, *native, '-o', f'{tmp}/kernel.so', '-x', 'c++', '-']
            done = subprocess.run(command, input=CPP, capture_output=True, text=True)
            try:
                if done.returncode == 0:
                    ctypes.CDLL(f'{tmp}/kernel.so')  # OpenMP's runtime may be missing
                    os.replace(f'{tmp}/kernel.so', path)
                    return path
            except OSError as e:
                done.stderr = str(e)
    raise OSError(done.stderr.strip()[-2000:])


@functools.cache
def library():
    """The compiled kernel, or None (with one warning that says why) where it can't be built."""
    compilers = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    try:
        cxx = next((c for c in map(shlex.split, compilers) if shutil.which(c[0])), None)
        if cxx is None:
            raise OSError(f'no C++ compiler ({", ".join(compilers)}) found')
        return ctypes.CDLL(build(cxx))
    except OSError as e:
        warnings.warn(f'building the C++ kernel failed: experts run in plain torch, slowly\n{e}')


def cpp_expert_mlp(x, mask, w_in, b_in, w_out, b_out, offsets, act, path=None):
    """y[t] = b_out + sum of act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e] over the e with mask[t, e]. No autograd."""
    (T, D), E = x.shape, mask.shape[1]
    assert x.dtype in (torch.float32, torch.bfloat16) and w_in.dtype == w_out.dtype == x.dtype
    assert mask.dtype == torch.bool and mask.shape[0] == T and offsets.dtype == torch.int32 and len(offsets) == E + 1
    assert w_in.shape == w_out.shape == (w_in.shape[0], D) and w_in.is_contiguous() and w_out.is_contiguous()
    few = path == 'few' if path else T <= FEW
    x, mask, offsets = x.contiguous(), mask.contiguous(), offsets.contiguous()
    b_in, b_out = [None if b is None else b.float().contiguous() for b in (b_in, b_out)]  # kept alive to the call's end
    y = torch.empty_like(x)
    threads = torch.get_num_threads() if os.getpid() == PID else 1  # in a forked child libgomp would hang
    if T:
        pointers = [None if t is None else t.data_ptr() for t in (x, mask, w_in, b_in, w_out, b_out, offsets, y)]
        job = Job(*pointers, T, D, E, ACTS.index(act), threads)
        library().run(ctypes.byref(job), x.dtype == torch.bfloat16, few)
    return y


@torch.compiler.assume_constant_result
def have_cpp():
    return library() is not None


CPP = r'''
// y[t] = b_out + sum over experts e with mask[t, e] of act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e]
//
// Layout: x (T, D), w_in and w_out (F, D): a neuron is a row of each, so both matmuls walk along D.
//   hidden: h = x row . w_in row; a register tile of 3 tokens x 4 neurons (7 loads for 12 multiply-adds),
//           token rows gathered by pointer, nothing packed. Each h that is not zero goes to its token's list.
//   outer:  sum row += h * w_out row over the list, a strip of D at a time in registers; zeros cost nothing.
// experts() does so for a block of tokens and a range of neurons, a GROUP of neurons at a time.
// many() runs blocks of tokens in parallel, each with all neurons. A group's strip of w_out is copied to the L1 cache
//   for the block (rows a power of two apart would evict each other there).
// few() is bound by memory: it runs chunks of neurons in parallel, a weight leaves memory once for all tokens.
// The order of every sum is fixed by the shapes and the mask, never by the number of threads.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
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
#else  // NEON, SSE
enum { LANES = 4 };
#define WIDE(p) __builtin_convertvector(*(const vh*)(p), vi)  // GCC needs five instructions for it on AVX
#endif
enum { STRIP = 8 * LANES, GROUP = 96, SPAN = 24 };  // GROUP x STRIP floats: 24 KB with AVX2
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // the same, anywhere in memory
typedef float v4 __attribute__((vector_size(16)));
typedef uint32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
struct bf16 { uint16_t bits; };  // the upper half of an fp32

static inline float f32(float v) { return v; }
static inline float f32(bf16 v) { uint32_t u = (uint32_t)v.bits << 16; float f; memcpy(&f, &u, 4); return f; }
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

// What the first matmul multiplies: fp32, to which bf16 is widened, unless the CPU multiplies pairs of bf16 itself
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
template <class V> static inline V pinned(V v) {  // in a register: GCC would rather load it once for each use
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
static inline v4 lane_sums(const vf* acc) {  // of four vectors, in one; always the same order of additions
    v4 a = fold(acc[0]), b = fold(acc[1]), c = fold(acc[2]), d = fold(acc[3]);
    v4 ab = v4{a[0], b[0], a[1], b[1]} + v4{a[2], b[2], a[3], b[3]};
    v4 cd = v4{c[0], d[0], c[1], d[1]} + v4{c[2], d[2], c[3], d[3]};
    return v4{ab[0], ab[1], cd[0], cd[1]} + v4{ab[2], ab[3], cd[2], cd[3]};
}

__attribute__((noinline)) static v4 gelu(v4 h, int act) {  // out of line: its code would be in every tile
    for (int j = 0; j < 4; j++) {
        float v = h[j];
        h[j] = 0.5f * v * (1 + (act == 1 ? erff(v * 0.70710678f) : tanhf(0.79788456f * (v + 0.044715f * v * v * v))));
    }
    return h;
}

template <class W> struct Job {  // one call; kernel.py fills it through ctypes
    const W* x; const uint8_t* mask; const W* w_in; const float* b_in; const W* w_out; const float* b_out;
    const int* offsets; W* y; i64 T, D, E; int act, threads;
    i64 strips() const { return (D + STRIP - 1) / STRIP; }
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
    Scratch(i64 n, i64 D, i64 group) : x(n * D), group(group), units(n * group), counts(n), token(n) {}
};

// NT tokens x NJ neurons of the first matmul at a time. `row` is the first neuron's number in the group.
template <class W, int NT, int NJ, class X>
static void tiles(X* x, const int* token, int n, const W* w, const float* b, i64 D, int act, int row, Scratch& my) {
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
            Unit* unit = &my.units[token[t] * my.group];
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

// Hidden units of neurons j0 .. j1 for the first n of my.token, in nearly equal tiles of at most four neurons
template <class W, class X> static void hidden(const Job<W>& job, X* x, int n, i64 j0, i64 j1, i64 g0, Scratch& my) {
    // SPAN tokens at a time: their rows of x stay in the L2 cache for all the neurons
    for (int i = 0; i < n; i += SPAN) for (i64 j = j0, nj; j < j1; j += nj) {
        i64 left = (j1 - j + 3) / 4;
        nj = (j1 - j + left - 1) / left;
        auto* f = nj == 4 ? tiles<W, 3, 4, X> : nj == 3 ? tiles<W, 3, 3, X>
                : nj == 2 ? tiles<W, 3, 2, X> : tiles<W, 3, 1, X>;
        f(x, &my.token[i], std::min<int>(SPAN, n - i), job.w_in + j * job.D, job.b_in ? job.b_in + j : nullptr,
          job.D, job.act, j - g0, my);
    }
}

// The strip of a token's output += sum over its list of h * w_out row
template <class W> static inline void outer(float* sum, const Unit* unit, int n, const W* w, i64 stride, i64 width) {
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

// sum (strips, n, STRIP) = the output of neurons f0 .. f1 for the n tokens from t0 on; copy: room for a strip of w_out
template <class W>
static void experts(const Job<W>& job, i64 t0, i64 n, i64 f0, i64 f1, float* sum, float* copy, Scratch& my) {
    const i64 D = job.D, E = job.E;
    typedef typename In<W>::type X;
    const X* x = (const X*)(job.x + t0 * D);
    if (sizeof(W) < sizeof(X)) widen(my.x, job.x + t0 * D, n * D), x = (const X*)my.x.p;
    memset(sum, 0, job.strips() * n * STRIP * 4);
    for (i64 g0 = f0, g1, e = 0; g0 < f1; g0 = g1) {
        g1 = std::min(g0 + my.group, f1);
        std::fill(my.counts.begin(), my.counts.end(), 0);
        while (job.offsets[e + 1] <= g0) e++;
        for (i64 f = e; f < E && job.offsets[f] < g1; f++) {
            i64 wanted = 0;
            for (i64 t = 0; t < n; t++) {
                my.token[wanted] = t;
                wanted += job.mask[(t0 + t) * E + f] != 0;
            }
            hidden(job, x, wanted, std::max<i64>(job.offsets[f], g0), std::min<i64>(job.offsets[f + 1], g1), g0, my);
        }
        if (*std::max_element(my.counts.begin(), my.counts.end()) == 0) continue;
        for (i64 s = 0; s < job.strips() && copy; s++) {
            for (i64 j = g0; j < g1; j++)
                widen(copy + (j - g0) * STRIP, job.w_out + j * D + s * STRIP, std::min<i64>(STRIP, D - s * STRIP));
            for (i64 t = 0; t < n; t++)
                outer(sum + (s * n + t) * STRIP, &my.units[t * my.group], my.counts[t], copy, STRIP, STRIP);
        }
        for (i64 t = 0; t < n && !copy; t++)  // token by token: few rows at a time, which prefetchers can follow
            for (i64 s = 0; s < job.strips(); s++)
                outer(sum + (s * n + t) * STRIP, &my.units[t * my.group], my.counts[t],
                      job.w_out + g0 * D + s * STRIP, D, std::min<i64>(STRIP, D - s * STRIP));
    }
}

// y of the t-th of n tokens = b_out + the sums (chunks, strips, n, STRIP) over all chunks
template <class W> static void finish(const Job<W>& job, float* sums, i64 chunks, i64 n, i64 t, W* y) {
    for (i64 s = 0; s < job.strips(); s++) {
        i64 d = s * STRIP, width = std::min<i64>(STRIP, job.D - d);
        float* sum = sums + (s * n + t) * STRIP;
        for (i64 c = 1; c < chunks; c++)
            for (i64 k = 0; k < STRIP; k++) sum[k] += sum[c * job.strips() * n * STRIP + k];
        for (i64 k = 0; k < width; k++) store(y + d + k, sum[k] + (job.b_out ? job.b_out[d + k] : 0));
    }
}

template <class W> static void many(const Job<W>& job) {
    // Blocks: a multiple of the threads in number; 256 tokens where x and y then fit the L2 cache, else 512, since
    // a block reads all the weights. A token's result doesn't depend on its block.
    i64 T = job.T, D = job.D, limit = D > 256 ? 512 : 256, blocks = (T + limit - 1) / limit;
    blocks = (blocks + job.threads - 1) / job.threads * job.threads;
    i64 block = std::max<i64>((T + blocks - 1) / blocks, 16);
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
    for (i64 c = 0; c < chunks && P; c++) bounds[c] = wanted[c * P / chunks / 4 * 4];  // whole tiles
    Buffer sums(chunks * size);
    #pragma omp parallel num_threads(job.threads)
    {
        Scratch my(T, D, std::max<i64>(GROUP, 1024 / T));
        #pragma omp for schedule(dynamic)
        for (i64 c = 0; c < chunks; c++) experts(job, 0, T, bounds[c], bounds[c + 1], sums + c * size, nullptr, my);
        #pragma omp for
        for (i64 t = 0; t < T; t++) finish(job, sums, chunks, T, t, job.y + t * D);
    }
}

extern "C" void run(const void* job, int narrow, int is_few) {
    auto call = [&](auto* job) { is_few ? few(*job) : many(*job); };
    narrow ? call((const Job<bf16>*)job) : call((const Job<float>*)job);
}
'''


if __name__ == '__main__':
    import bench
    bench.kernel_report()
