"""The three operations that a transformer spends its time on, over packed tokens (no padding):

    linear       x weight^T + bias, by the fastest dense linear of the device
    attention    softmax(q k^T) v within each sequence
    experts      y[t] = b_out + sum over e with mask[t, e] of act(x[t] w_in[e]^T + b_in[e]) w_out[e]

where w_in[e] and w_out[e] are the rows offsets[e]:offsets[e+1] of two neuron-major (H, D) matrices.
`experts` exists in plain torch (differentiable), in Triton (NVIDIA and AMD GPUs) and in C++ (CPUs:
the source at the end of this file, built on first use in about 3 s, called through ctypes). All
accumulate in fp32. Experts are summed, never weighted. A NaN in a row of x stays in that row.

    B batch · L sequence length · T tokens · D n_embd · H hidden neurons
    E experts · s neurons in an expert · rho share of neurons run
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from types import SimpleNamespace
from typing import NamedTuple, Optional

import torch
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
    if mask is None:
        a = ACTIVATIONS[bundle.act](linear(x, bundle.w_in, bundle.b_in))  # (T, H)
        return linear(a, bundle.w_out.t(), bundle.b_out)
    inputs = x, bundle.w_in, bundle.b_in, bundle.w_out, bundle.b_out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return reference(x, mask, bundle)
    impl = impl or choose(x, mask, bundle, rho)
    # The compiler has to see one op; otherwise it would only cost 20 us, as much as a small layer.
    if impl in ('triton', 'cpp') and torch.compiler.is_compiling():
        return experts_op(x, mask, *bundle, impl, rho)
    return IMPLS[impl](x, mask, bundle, rho)

# The dispatcher: the first row that fits serves while rho < limit and, with a width, < s / width;
# beyond these dense is faster.
ANY, INF = None, math.inf
CHOICES = [
    # device, bytes an element, activation, tokens at most -> implementation, limit, width
    # GPUs, by the roofline in assets/gpu_kernels.txt (never checked on one). Few tokens only read
    # the weights they need; many are bound by moving x in and y out, at s / rho FLOPs a byte.
    ('gpu', ANY, ANY, FEW, 'triton', 0.8, 0),
    ('gpu', 4, ANY, INF, 'triton', 0.8, 32),
    ('cuda:90', ANY, ANY, INF, 'triton', 0.8, 512),
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
    elif x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and have_cpp():
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
    if x.is_cpu and not torch.compiler.is_compiling():
        rho = mask.sum().item() / max(1, mask.numel())
    return impl if (0.25 if rho is None else rho) < limit else 'dense'

# ------------------------------------------------------------------------------------ plain torch

def linear(x, weight, bias=None):
    """x (..., K), weight (N, K), bias (N) or None -> (..., N) by the fastest linear here.

    On a CPU that is MKL or oneDNN, timed once per shape class; only under inference_mode, because
    the two round differently and a training run has to repeat bit for bit.
    """
    # In this order: a compiler cannot trace the question for inference mode.
    plain = torch.compiler.is_compiling() or not x.is_cpu or not x.numel()
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
    weight = torch.randn(shape if contiguous else shape[::-1]).to(dtype)
    weight = weight if contiguous else weight.T
    x, best = torch.randn(max(1, 1 << rows - 1), shape[1]).to(dtype), {}
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

def reference(x, mask, bundle):
    """The definition of `experts`, differentiable: computes everything and masks it."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    dropped = ~neuron_mask(mask, offsets, len(w_in))
    a = ACTIVATIONS[act](F.linear(x, w_in, b_in)).masked_fill(dropped, 0)  # (T, H)
    return F.linear(a, w_out.t(), b_out)

def dense_masked(x, mask, bundle, rho=None):
    """Computes everything, block of tokens by block of tokens, and zeroes what was not chosen."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    y, H, E = torch.empty_like(x), len(w_in), mask.shape[1]
    # On a GPU looking at the mask would be waiting for it.
    everything = x.is_cpu and bool(mask.all())
    equal = x.is_cpu and E > 0 and H % E == 0 and bool((offsets.diff() == H // E).all())
    block = 512 if x.is_cpu else 4096
    for rows in (slice(i, i + block) for i in range(0, len(x), block)):
        a = ACTIVATIONS[act](linear(x[rows], w_in, b_in))  # (block, H)
        # Equal experts need no mask of neurons: 0.95 times as fast as dense, not 0.82.
        if equal and not everything:
            a.view(len(a), E, H // E).masked_fill_(~mask[rows, :, None], 0)
        elif not everything:
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
    index: Optional[torch.Tensor]      # (T) places in the batch, None where none is padding
    mask: Optional[torch.Tensor]       # (B, 1, 1 or L, L) bool, None where none is needed
    causal: bool

    def pad(self, x):  # (T, ...) -> (B, L, ...)
        if self.index is not None:
            x = x.new_zeros(self.B * self.L, *x.shape[1:]).index_copy(0, self.index, x)
        return x.view(self.B, self.L, *x.shape[1:])

    def pack(self, x):  # (B, L, ...) -> (T, ...)
        x = x.reshape(self.B * self.L, *x.shape[2:])
        return x if self.index is None else x[self.index]

class LayerCache:
    """Keys and values of one layer, (B, heads, size, d), of which the first n are filled."""

    def __init__(self, size):
        self.k = self.v = None
        self.size, self.n = size, 0

    def extend(self, k, v):
        if self.k is None:
            B, heads, _, d = k.shape
            self.k, self.v = (t.new_empty(B, heads, self.size, d) for t in (k, v))
        end = self.n + k.shape[2]
        self.k[:, :, self.n:end], self.v[:, :, self.n:end] = k, v
        self.n = end
        return self.k[:, :, :end], self.v[:, :, :end]

def attention(q, k, v, layout, cache=None, dropout=0.0):
    """q, k, v (T, heads, d) -> (T, heads, d): every token looks at those of its own sequence."""
    q, k, v = (layout.pad(t).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, d)
    if cache is not None:
        k, v = cache.extend(k, v)
    # A single query is the last token, and sees all.
    causal = layout.causal and layout.mask is None and q.shape[2] > 1
    y = F.scaled_dot_product_attention(q, k, v, layout.mask, dropout, is_causal=causal)
    return layout.pack(y.transpose(1, 2))

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
def expert_kernel(x, w_in, b_in, w_out, offsets, idx, count, y, E, LEN, D, EVEN: tl.constexpr,
                  ACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
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
            # The interpreter would multiply the bit patterns of bf16.
            if INTERPRET:
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
            w = tl.load(w_out + neuron[:, None] * D + d[None, :],
                        mask=in_d[None, :], other=0)  # (SB, BN)
            if INTERPRET:
                w = w.to(tl.float32)
            out = tl.dot(hidden, w, input_precision=PRECISION)  # (BM, BN)
            wanted = is_token[:, None] & in_d[None, :]
            tl.atomic_add(y + row[:, None] + d[None, :], out, mask=wanted, sem='relaxed')

@jit
def decode_kernel(x, mask, w_in, b_in, w_out, offsets, y, E, D, ACT: tl.constexpr,
                  BE: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr):
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
        if b_in is not None:
            h += tl.load(b_in + j, mask=runs, other=0).to(tl.float32)
        h = tl.where(runs, activate(h, ACT), 0.0)
        out = tl.sum(w2.to(tl.float32) * h[:, None], 0)  # (BD)
        tl.atomic_add(y + t * D + d, out, mask=d < D, sem='relaxed')

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

def choose_tile(tiles, tokens, E, s, chunks, processors):
    """The largest tile, as it reads the least, that is not mostly padding and keeps half of the
    processors busy, else the smallest; and how many items it makes of E experts of s neurons."""
    for tile in tiles:
        BM, SB = tile[:2]
        items = E * triton.cdiv(tokens, BM) * triton.cdiv(s, SB)
        if SB < max(2 * s, 64) and BM <= tokens and 2 * items * chunks >= processors:
            break
    return tile, items

def triton_experts(x, mask, bundle, rho=None):
    """`experts` on a GPU. Nothing here looks at the mask or the offsets: `rho` only sizes tiles and
    grid, and any mask gives the right answer with any rho."""
    (T, D), H, E = x.shape, len(bundle.w_in), mask.shape[1]
    x, w_in, w_out = (t.contiguous() for t in (x, bundle.w_in, bundle.w_out))
    b_in, b_out, offsets, act = bundle.b_in, bundle.b_out, bundle.offsets, bundle.act
    mask = mask.contiguous().view(torch.uint8)
    y = torch.empty(T, D, dtype=torch.float32, device=x.device)
    y.zero_() if b_out is None else y.copy_(b_out)
    if T == 0 or H == 0 or E == 0:
        return y.to(x.dtype)
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
                x, mask, w_in, b_in, w_out, offsets, y, E, D, ACT=act, BE=BE, NB=NB, BD=BD,
                num_warps=num_warps, **options)
            return y.to(x.dtype)

        CHUNK = max(128, 1 << (CHUNK_ELEMENTS // D).bit_length() - 1)
        chunks, length = triton.cdiv(T, CHUNK), min(triton.cdiv(T, 16) * 16, CHUNK)
        idx = torch.empty(chunks, E, length, dtype=torch.int32, device=x.device)
        count = torch.zeros(chunks, E, dtype=torch.int32, device=x.device)
        dispatch_kernel[triton.cdiv(T, 128), triton.cdiv(E, 32)](
            mask, idx, count, T, E, length, CHUNK=CHUNK, BT=128, BE=32, **options)

        tokens, s = max(1, round(rho * min(T, CHUNK))), triton.cdiv(H, E)
        tiles = TILES[target, x.element_size()]
        tile, items = choose_tile(tiles, tokens, E, s, chunks, processors)
        BM, SB, BK, BN, num_warps, num_stages = tile
        # fp32 on NVIDIA is three tf32 products, as good and on tensor cores. AMD multiplies fp32.
        tf32 = x.dtype == torch.float32 and target != 'hip'
        expert_kernel[min(items, 8 * processors), chunks](
            x, w_in, b_in, w_out, offsets, idx, count, y, E, length, D,
            EVEN=D % max(BK, BN) == 0, ACT=act, PRECISION='tf32x3' if tf32 else 'ieee',
            INTERPRET=INTERPRET, CHUNK=CHUNK, BE=BE, BM=BM, SB=SB, BK=BK, BN=BN,
            num_warps=num_warps, num_stages=num_stages, **options)
    return y.to(x.dtype)

# -------------------------------------------------------------------------------------------- C++

FLAGS = ['-O3', '-std=c++17', '-shared', '-fPIC']
# The first that compiles and loads serves.
NATIVE = [['-march=native', '-fopenmp'], ['-march=native'], ['-mcpu=native']]
PID = os.getpid()

class Job(ctypes.Structure):
    """As in the source below."""
    pointers = 'x', 'mask', 'w_in', 'b_in', 'w_out', 'b_out', 'offsets', 'y'
    _fields_ = [*((name, ctypes.c_void_p) for name in pointers),
                *((name, ctypes.c_int64) for name in 'TDE'),
                *((name, ctypes.c_int) for name in ('act', 'threads'))]

def cpu_name():
    """What -march=native depends on."""
    try:
        with open('/proc/cpuinfo') as f:
            kinds = ('model name', 'flags', 'Features')
            return ''.join(sorted({line for line in f if line.startswith(kinds)}))
    except OSError:
        return platform.machine() + platform.processor()

def compile_cpp(cxx):
    """Path of the shared library, compiled unless the cache has it."""
    version = subprocess.run([*cxx, '--version'], capture_output=True, text=True).stdout
    key = '\0'.join([CPP, *cxx, *FLAGS, *sum(NATIVE, []), version, cpu_name()])
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(cache, 'd2dmoe')
    path = os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:16] + '.so')
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    # In the same file system, so that the rename is atomic.
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        for native in NATIVE:
            command = [*cxx, *FLAGS, *native, '-o', f'{tmp}/kernel.so', '-x', 'c++', '-']
            done = subprocess.run(command, input=CPP, capture_output=True, text=True)
            try:
                if done.returncode == 0:
                    # OpenMP's runtime may be missing.
                    ctypes.CDLL(f'{tmp}/kernel.so')
                    os.replace(f'{tmp}/kernel.so', path)
                    return path
            except OSError as error:
                done.stderr = str(error)
    raise OSError(done.stderr.strip()[-2000:])

@functools.cache
def library():
    """The compiled kernel, or None (with one warning that says why) where it can't be built."""
    compilers = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    try:
        cxx = next((c for c in map(shlex.split, compilers) if shutil.which(c[0])), None)
        if cxx is None:
            raise OSError(f'no C++ compiler ({", ".join(compilers)}) found')
        return ctypes.CDLL(compile_cpp(cxx))
    except OSError as error:
        why = f'building the C++ kernel failed: experts run in plain torch, slowly\n{error}'
        warnings.warn(why)

@torch.compiler.assume_constant_result
def have_cpp():
    return library() is not None

def cpp_experts(x, mask, bundle, rho=None, path=None):
    """`experts` on a CPU, in fp32 or bf16. path: 'few' or 'many' tokens, None: by their number."""
    w_in, b_in, w_out, b_out, offsets, act = bundle
    (T, D), E = x.shape, mask.shape[1]
    assert x.dtype in (torch.float32, torch.bfloat16) and w_in.dtype == w_out.dtype == x.dtype
    assert w_in.shape == w_out.shape == (len(w_in), D)
    assert w_in.is_contiguous() and w_out.is_contiguous()
    assert mask.dtype == torch.bool and offsets.dtype == torch.int32
    assert len(mask) == T and len(offsets) == E + 1
    x, mask, offsets = x.contiguous(), mask.contiguous(), offsets.contiguous()
    # These names keep the copies alive to the end of the call.
    b_in, b_out = (None if b is None else b.float().contiguous() for b in (b_in, b_out))
    y = torch.empty_like(x)
    if T:
        # In a forked child libgomp would hang.
        threads = torch.get_num_threads() if os.getpid() == PID else 1
        tensors = x, mask, w_in, b_in, w_out, b_out, offsets, y
        job = Job(*(None if t is None else t.data_ptr() for t in tensors), T, D, E,
                  list(ACTIVATIONS).index(act), threads)
        few = T <= FEW if path is None else path == 'few'
        library().run(ctypes.byref(job), x.dtype == torch.bfloat16, few)
    return y

# What `experts` chooses from, each (x, mask, bundle, rho) -> y, and the op that a compiler sees.
IMPLS = dict(triton=triton_experts, cpp=cpp_experts, torch=expert_loop, dense=dense_masked)

def experts_flat(x: torch.Tensor, mask: torch.Tensor, w_in: torch.Tensor,
                 b_in: Optional[torch.Tensor], w_out: torch.Tensor, b_out: Optional[torch.Tensor],
                 offsets: torch.Tensor, act: str, impl: str, rho: Optional[float]) -> torch.Tensor:
    return IMPLS[impl](x, mask, Experts(w_in, b_in, w_out, b_out, offsets, act), rho)

experts_op = torch.library.custom_op('d2dmoe::experts', experts_flat, mutates_args=())
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
#else  // NEON, SSE; on AVX GCC would need five instructions for it
enum { LANES = 4 };
#define WIDE(p) __builtin_convertvector(*(const vh*)(p), vi)
#endif
enum { STRIP = 8 * LANES, GROUP = 96, SPAN = 24 };  // GROUP x STRIP floats: 24 KB with AVX2
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // not aligned
typedef float v4 __attribute__((vector_size(16)));
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

// Out of line: its code would be in every tile
__attribute__((noinline)) static v4 gelu(v4 h, int act) {
    for (int j = 0; j < 4; j++) {
        float v = h[j];
        h[j] = 0.5f * v * (1 + (act == 1 ? erff(v * 0.70710678f)
                                         : tanhf(0.79788456f * (v + 0.044715f * v * v * v))));
    }
    return h;
}

template <class W> struct Job {  // one call; kernel.py fills it through ctypes
    const W* x; const uint8_t* mask; const W* w_in; const float* b_in; const W* w_out;
    const float* b_out; const int* offsets; W* y; i64 T, D, E; int act, threads;
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
        i64 left = (j1 - j + 3) / 4;
        nj = (j1 - j + left - 1) / left;
        auto* f = nj == 4 ? tiles<W, 3, 4, X> : nj == 3 ? tiles<W, 3, 3, X>
                : nj == 2 ? tiles<W, 3, 2, X> : tiles<W, 3, 1, X>;
        f(x, &my.token[i], std::min<int>(SPAN, n - i), job.w_in + j * job.D,
          job.b_in ? job.b_in + j : nullptr, job.D, job.act, j - g0, my);
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
'''

