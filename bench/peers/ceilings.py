"""The card's sustained rates, as bench/gpu/limits.ts reads them: ceilings.py [HEAD,LENGTH ...] -> one JSON line (one GPU, torch).
Products of 8192^3 (bf16; on Hopper row-scaled fp8 too) on normal random data after 2 s of uninterrupted products, the median of the next second; copy (bytes read
and written) and cuDNN attention (causal, 32 query and 8 key/value heads, bf16, 16,384 tokens) after half a second."""
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def seconds(call, warm=0.5, take=0.5):
    call()
    torch.cuda.synchronize()
    stop = time.perf_counter() + warm
    while time.perf_counter() < stop:
        for _ in range(4):
            call()
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    stop = time.perf_counter() + take
    while time.perf_counter() < stop:
        for _ in range(4):
            call()
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            marks.append(mark)
        torch.cuda.synchronize()
    gaps = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    return gaps[len(gaps) // 2] / 1e3


def attention_rates(head, length, tokens=16384):
    make = lambda heads: torch.randn(max(1, tokens // length), heads, length, head, device="cuda",
                                     dtype=torch.bfloat16, requires_grad=True)
    q, k, v = make(32), make(8), make(8)
    flops = 2 * q.shape[0] * length * length * 32 * head
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        forward = seconds(run)
        out = run()
        out_grad = torch.randn_like(out)
        backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), out_grad, retain_graph=True))
    return [flops / forward, 2.5 * flops / backward]


points = [tuple(map(int, point.split(","))) for point in sys.argv[1:]]
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
card = {"device": torch.cuda.get_device_name(), "bf16": 2 * 8192**3 / seconds(lambda: a @ b, 2, 1)}
if torch.cuda.get_device_capability() == (9, 0):  # row-scaled e4m3 products, as an fp8 base's
    x, w = (m.to(torch.float8_e4m3fn) for m in (a, b))
    one = torch.ones(8192, 1, device="cuda")
    scaled = lambda: torch._scaled_mm(x, w.t(), one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    card["fp8"] = 2 * 8192**3 / seconds(scaled, 2, 1)
    del x, w
source, target = torch.randn(1 << 29, device="cuda"), torch.empty(1 << 29, device="cuda")
card["copy"] = 2 * source.nbytes / seconds(lambda: target.copy_(source))
del source, target
card["attention"] = {f"{head},{length}": attention_rates(head, length) for head, length in points}
print(json.dumps(card))
