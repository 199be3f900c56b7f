"""What torch loses in single operations against float64: op_errors.py [cuda|cpu] > torch_op_errors.json

The inputs are those of test/native/torch_cases.h, to the bit: the same generator (Splitmix64), seeds and order of draws.
cuda_ops_test allows the plugin twice these errors. Each is {rms: |error| / |exact|, max: largest error / largest exact
value, max_abs: largest error}; in bf16 the exact result is of inputs that bf16 holds. Weights' gradients are added to
what is there, as in accumulation."""
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F

device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


class Random:
    """op_case.h's generator."""

    def __init__(self, seed, dtype):
        self.state, self.dtype = seed, dtype

    def next(self, count):
        with np.errstate(over="ignore"):
            z = np.uint64(self.state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
            self.state = (self.state + count * GOLDEN) & MASK
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return z ^ (z >> np.uint64(31))

    def uniforms(self, count):
        return (self.next(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, *shape, deviation=1.0):
        draws = self.uniforms(12 * int(np.prod(shape))).reshape(-1, 12)
        sums = np.full(len(draws), -6.0)
        for i in range(12):
            sums += draws[:, i]
        values = torch.from_numpy((sums * deviation).astype(np.float32)).reshape(shape)
        return values.to(self.dtype).double().to(device)

    def indices(self, count, limit):
        return torch.from_numpy((self.next(count) % np.uint64(limit)).astype(np.int64)).to(device)


def leaf(values, dtype):
    return values.to(dtype).clone().requires_grad_()


def linear(which):
    def draw(random):
        return random.normals(257, 576), random.normals(192, 576), random.normals(257, 192)

    def run(inputs, dtype):
        x, w, y = (v.to(dtype) for v in inputs)
        return {"linear forward": lambda: [F.linear(x, w)], "linear backward input": lambda: [y @ w],
                "linear weight grad": lambda: [y.t() @ x]}[which]()

    return draw, run


def draw_norm(random):
    x, dy = random.normals(129, 577), random.normals(129, 577, deviation=0.1)
    return x, dy, random.normals(577), random.normals(577)


def run_norm(inputs, dtype):
    x, dy, gain, before = inputs
    x, gain = leaf(x, dtype), leaf(gain, dtype)
    gain.grad = before.to(dtype).clone()
    y = F.rms_norm(x, (577,), gain, 1e-5)
    y.backward(dy.to(dtype))
    return [y, None, x.grad, gain.grad]


def draw_bias(random):
    return random.normals(1025, 130), random.normals(130), random.normals(1025 * 130)


def run_bias(inputs, dtype):
    x, bias, addend = (v.to(dtype) for v in inputs)
    return [x + bias, bias + x.sum(0), addend + addend]


def draw_rope(random):
    x, positions = random.normals(37, 9, 64), random.indices(37, 50)
    return x, positions, 6.3 * random.uniforms(50 * 32)


def run_rope(inputs, dtype):
    x, positions, draws = inputs
    angles = torch.from_numpy(draws).to(device).reshape(50, 32)
    cos, sin = (torch.cat([t, t], 1).float().to(dtype)[positions][:, None] for t in (angles.cos(), angles.sin()))
    x = x.to(dtype)

    def rotate(sine):  # as transformers' apply_rotary_pos_emb
        half = torch.cat([-x[..., 32:], x[..., :32]], -1)
        return x * cos + half * sine

    return [rotate(sin), rotate(-sin)]


def draw_swiglu(random):
    return random.normals(31, 1536), random.normals(31, 1536), random.normals(31, 1536)


def run_swiglu(inputs, dtype):
    gate, up, dy = leaf(inputs[0], dtype), leaf(inputs[1], dtype), inputs[2].to(dtype)
    y = F.silu(gate) * up
    y.backward(dy)
    return [y, y, gate.grad, up.grad]


def draw_loss(random):
    return random.normals(5, 4111, deviation=3), random.indices(5, 4111)


def run_loss(inputs, dtype):
    logits = leaf(inputs[0], dtype)
    wide = logits if dtype == torch.float64 else logits.float()  # as transformers' ForCausalLMLoss
    losses = F.cross_entropy(wide, inputs[1], reduction="none")
    scale = float(np.float32(1) / np.float32(77))
    (losses.sum() * scale).backward()
    return [None, logits.grad, losses, losses]


STARTS = [0, 37, 38, 120, 233]


def draw_attention(random):
    return (random.normals(233, 6, 64), random.normals(233, 2, 64), random.normals(233, 2, 64),
            random.normals(233, 6, 64))


def run_attention(inputs, dtype):
    q, k, v = (leaf(x, dtype) for x in inputs[:3])
    scale = float(np.float32(1 / np.sqrt(np.float64(64))))
    rows = []
    for first, end in zip(STARTS, STARTS[1:]):
        part = [x[first:end].transpose(0, 1)[None] for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))]
        out = F.scaled_dot_product_attention(*part, is_causal=True, scale=scale)
        rows.append(out[0].transpose(0, 1))
    out = torch.cat(rows)
    out.backward(inputs[3].to(dtype))
    return [out, None, q.grad, k.grad, v.grad]


def draw_embedding(random):
    return random.indices(700, 5), random.normals(5, 129), random.normals(700, 129)


def run_embedding(inputs, dtype):
    tokens, table, dout = inputs[0], leaf(inputs[1], dtype), inputs[2].to(dtype)
    table.grad = table.detach().clone()
    out = F.embedding(tokens, table)
    out.backward(dout)
    scattered = table.detach().clone().index_add_(0, tokens, dout)
    return [out, table.grad, out, scattered]


def draw_adamw(random):
    p, m, root, gradient = random.normals(2051), *(random.normals(2051, deviation=1e-3) for _ in range(3))
    return p, m, root.float().square().to(random.dtype).double(), gradient


def run_adamw(inputs, dtype):
    p, m, v = leaf(inputs[0], dtype), inputs[1].to(dtype), inputs[2].to(dtype)
    p.grad = inputs[3].to(dtype)
    is_fused = dtype != torch.float64 and device == "cuda"
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=is_fused)
    step = torch.tensor(9.0, device="cuda" if is_fused else "cpu")  # where each of them keeps it
    optimizer.state[p] = {"step": step, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    return [p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]


CASES = {
    "linear forward": (7001, *linear("linear forward")),
    "linear backward input": (7002, *linear("linear backward input")),
    "linear weight grad": (7003, *linear("linear weight grad")),
    "rms norm": (7004, draw_norm, run_norm),
    "bias, add": (7005, draw_bias, run_bias),
    "rope": (7006, draw_rope, run_rope),
    "swiglu": (7007, draw_swiglu, run_swiglu),
    "cross entropy": (7008, draw_loss, run_loss),
    "attention": (7009, draw_attention, run_attention),
    "embedding, gather, scatter": (7010, draw_embedding, run_embedding),
    "adamw": (7011, draw_adamw, run_adamw),
}


def errors(got, want):
    if got is None:
        return None
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs()
    return {"rms": float(error.norm() / want.norm()), "max": float(error.max() / want.abs().max()),
            "max_abs": float(error.max())}


def main():
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {"torch": torch.__version__,
              "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        result[name] = {}
        for case, (seed, draw, run) in CASES.items():
            inputs = draw(Random(seed, dtype))
            exact = run(inputs, torch.float64)
            result[name][case] = [errors(g, w) for g, w in zip(run(inputs, dtype), exact)]
            for output, found in enumerate(result[name][case]):
                if found:
                    print(f"{name} {case}, output {output}: rms {found['rms']:.2g}, max {found['max']:.2g}",
                          file=sys.stderr)
    print(json.dumps(result, indent=1))


main()
