"""Every kernel beside what people use instead: time, share of the machine's ceiling, peak memory.

    python -m bench.kernels [--only NAME ...]     (make bench; a GPU: some minutes, a CPU: about one)

Writes bench/results/<device>.json; `python -m bench.table` renders that into the README. All contenders of a
case see the same random inputs and are timed in turn (interleaved), so that a disturbance hits all of them;
the median counts. So are the ceilings, a copy and a square matmul. Peak memory is
beyond the inputs and their gradients: on a CPU the high-water mark of a process of its own (Linux).

Contenders: ours; naive, the plain PyTorch that a kernel replaces; compiled, torch.compile of that (CUDA);
liger, the op of the same name; trl, its chunked log-prob, or the few lines below in its manner; cce, Apple's
cut-cross-entropy, which gives no entropy and drops small gradients. What is not installed is left out. On a
CPU the shapes are small, ratios say more than times, and ours is the reference itself for policy_loss,
rewards, SwiGLU and the rotation. decode_attention's bytes are each key and value once, a prompt's too.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import attention, layers, linear_logprob, policy_loss, rewards, sample

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
REPEATS = 20 if CUDA else 3
VOCAB = 151_936 if CUDA else 16_000
PEERS = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "nvidia-cutlass-dsl")


@dataclass
class Case:
    """`make` draws the inputs; a contender takes them, and with `backward` its outputs are differentiated."""

    kernel: str
    shape: str
    make: Callable[[], list]
    contenders: dict[str, Callable]
    backward: bool = False
    flops: float = 0.0  # useful: without what is computed again; else
    bytes: float = 0.0  # the least that has to move


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def normal(*shape, scale=1.0, grad=True, dtype=DTYPE) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


def with_compiled(contenders: dict[str, Callable]) -> dict[str, Callable]:
    return contenders | ({"compiled": torch.compile(contenders["naive"], dynamic=False)} if CUDA else {})


# ---- Cases


def naive_logprob(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def chunked_logprob(hidden, weight, targets, rows=1024 if CUDA else 128):
    """In the manner of trainers without a kernel: some rows at a time, made again in the backward."""
    chunks = [slice(i, i + rows) for i in range(0, len(hidden), rows)]
    parts = [checkpoint(naive_logprob, hidden[c], weight, targets[c], use_reentrant=False) for c in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def logprob_contenders() -> dict[str, Callable]:
    contenders = with_compiled({"ours": linear_logprob.linear_logprob, "naive": naive_logprob})
    contenders["chunked"] = chunked_logprob
    if installed("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Chunked

        more = 1.0, 8192, None, 1.0, ("entropy",)  # temperature, columns of a tile, softcap, scale, outputs
        contenders["trl"] = lambda h, w, t: Chunked.apply(h, w, None, t, *more)[:2]
    if installed("liger_kernel") and CUDA:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

        contenders["liger"] = lambda h, w, t: Liger.apply(h, w, t, 1.0, -100, 1, True)
    if installed("cut_cross_entropy") and CUDA:
        from cut_cross_entropy import linear_cross_entropy

        contenders["cce"] = lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none")
    return contenders


def logprob_cases() -> list[Case]:
    contenders, cases = logprob_contenders(), []
    shapes = [(n, h) for h in (2048, 3584, 4096) for n in (2048, 8192, 32_768)] if CUDA else [(512, 256)]
    for n, h in shapes:
        make = lambda n=n, h=h: [normal(n, h), normal(VOCAB, h, scale=h**-0.5),  # noqa: E731
                                 torch.randint(VOCAB, (n,), device=DEVICE)]
        for backward, flops in ((False, 2 * n * h * VOCAB), (True, 8 * n * h * VOCAB)):
            name = f"N={n} H={h} V={VOCAB}"
            cases.append(Case("linear_logprob", name, make, contenders, backward, flops=flops))
    return cases


def policy_cases() -> list[Case]:
    t, s = 32_768, 128
    cu = torch.linspace(0, t, s + 1).long().to(DEVICE)
    call = lambda f: lambda new, old, advantage: f(new, old, advantage, cu, rollout_logprob=old)[0]  # noqa: E731
    make = lambda: [normal(t, dtype=torch.float32), normal(t, grad=False, dtype=torch.float32),  # noqa: E731
                    normal(s, grad=False, dtype=torch.float32)]
    both = {"ours": call(policy_loss.policy_loss), "naive": call(policy_loss.reference_policy_loss)}
    return [Case("policy_loss", f"T={t} S={s}", make, with_compiled(both), backward=True, bytes=24 * t)]


def rewards_cases() -> list[Case]:
    """One box and one true centre a completion, groups of eight, answers that are numbers."""
    n, groups = 4096, 512
    whole = lambda count, value=0: torch.full((count,), value, device=DEVICE)  # noqa: E731
    yes = torch.ones(n, dtype=torch.bool, device=DEVICE)
    wide = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=torch.float64)  # noqa: E731
    ramp = lambda count, step=1: torch.arange(count + 1, device=DEVICE) * step  # noqa: E731
    make = lambda: [rewards.Scored(  # noqa: E731
        yes, yes, wide(n, 5), whole(n, rewards.NO_FRAME), ramp(n), wide(n, 3), whole(n), ramp(groups, 8),
        whole(groups, rewards.DTR), whole(groups, rewards.NUMBER), wide(groups, 5), whole(groups, 1),
        whole(groups, rewards.ANY_FRAME), ramp(groups), wide(groups, 3), whole(groups),
        whole(groups, rewards.ANY_FRAME))]
    both = {"ours": rewards.rewards_and_advantages, "naive": rewards.reference_rewards_and_advantages}
    return [Case("rewards", f"N={n} G={groups}", make, both, bytes=200 * n)]


def sample_cases() -> list[Case]:
    b, v = (256, VOCAB) if CUDA else (32, VOCAB)
    make = lambda: [normal(b, v, scale=3.0, grad=False),  # noqa: E731
                    *torch.randint(1 << 40, (2, b), device=DEVICE)]

    def naive(logits, keys, positions):  # noise of torch's own; the same work otherwise
        token = torch.multinomial(logits.float().softmax(-1), 1)
        return token, logits.float().log_softmax(-1).gather(1, token)

    both = {"ours": sample.sample, "naive": naive}
    return [Case("sample", f"B={b} V={v}", make, both, bytes=b * v * DTYPE.itemsize)]


def liger_ops() -> dict[str, Callable]:
    if not (installed("liger_kernel") and CUDA):
        return {}
    from liger_kernel import ops

    swap = lambda x: x.transpose(0, 1)[None]  # (T, A, D) -> (1, A, T, D)  # noqa: E731
    return {
        "rms_norm": lambda x, w: ops.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        "add_rms_norm": lambda x, d, w: ops.LigerFusedAddRMSNormFunction.apply(x, d, w, 1e-6)[::-1],
        "swiglu": ops.LigerSiLUMulFunction.apply,
        "qk_norm_rope": lambda q, k, cos, sin: ops.LigerRopeFunction.apply(
            swap(q), swap(k), cos[None], sin[None]),
    }


def layer_cases() -> list[Case]:
    """Widths, inner widths and heads of Qwen2.5-VL-3B, 7B and Qwen3-VL-8B; bytes: read and written once."""
    shapes = (2048, 11_008, 16, 2), (3584, 18_944, 28, 4), (4096, 12_288, 32, 8)
    t, liger, cases = 8192 if CUDA else 3000, liger_ops(), []
    shapes = shapes if CUDA else [(128, 384, 4, 2)]
    for h, inner, heads, kv_heads in shapes:
        d = 128 if CUDA else 32
        angle = torch.randn(t, d // 2, device=DEVICE).repeat(1, 2)
        turn, norms = [angle.cos().to(DTYPE), angle.sin().to(DTYPE)], lambda d=d: [normal(d), normal(d)]
        qk = lambda a=heads, k=kv_heads, d=d: [normal(t, a, d), normal(t, k, d)]  # noqa: E731
        row = (heads + kv_heads) * d
        inputs = {  # name: shape, inputs, numbers moved forward, and forward and backward
            "rms_norm": (f"T={t} H={h}", lambda h=h: [normal(t, h), normal(h)], 2 * h, 5 * h),
            "add_rms_norm": (f"T={t} H={h}", lambda h=h: [normal(t, h), normal(t, h), normal(h)],
                             4 * h, 8 * h),
            "swiglu": (f"T={t} inner={inner}", lambda i=inner: [normal(t, i), normal(t, i)],
                       3 * inner, 8 * inner),
            "qk_norm_rope": (f"T={t} heads={heads}+{kv_heads} D={d} normed",
                             lambda qk=qk, turn=turn, norms=norms: qk() + turn + norms(),
                             2 * row, 5 * row),
            "qk_norm_rope, no norm": (f"T={t} heads={heads}+{kv_heads} D={d}",
                                      lambda qk=qk, turn=turn: qk() + turn, 2 * row, 4 * row),
        }
        for name, (shape, make, *moved) in inputs.items():
            op = name.split(",")[0]
            both = {"ours": getattr(layers, op), "naive": getattr(layers, "reference_" + op)}
            peer = {} if shape.endswith("normed") or op not in liger else {"liger": liger[op]}
            for backward, numbers in zip((False, True), moved, strict=True):
                cases.append(Case("layers", f"{op} {shape}", make, with_compiled(both) | peer, backward,
                                  bytes=t * numbers * DTYPE.itemsize))
    return cases


def decode_case(slots: int, heads: int, kv: int, prompt: int, own: int, d: int, g: int = 8) -> Case:
    """A step of `slots` samples, g of a prompt, when half of their own room is filled."""
    prompts = slots // g
    lengths = lambda count, length: torch.full((count,), length, device=DEVICE)  # noqa: E731
    places = torch.arange(slots, device=DEVICE)
    shapes = (slots, heads, d), *[(prompts, kv, prompt, d)] * 2, *[(slots, kv, 2 * own, d)] * 2
    make = lambda: [*(normal(*shape, grad=False) for shape in shapes), attention.Table(  # noqa: E731
        lengths(prompts, prompt), lengths(slots, own), places.view(prompts, g), places)]
    both = {"ours": attention.decode_attention, "naive": attention.reference_decode_attention}
    moved = 2 * DTYPE.itemsize * kv * d * (prompts * prompt + slots * own)
    name = f"S={slots} G={g} heads={heads}+{kv} D={d} P={prompt} R={own}"
    return Case("decode_attention", name, make, both, bytes=moved)


def decode_cases() -> list[Case]:
    """Heads of Qwen2.5-VL-3B and Qwen3-VL-8B."""
    sizes = [(s, *heads, 896, 128, 128) for heads in ((16, 2), (32, 8)) for s in (64, 256)]
    return [decode_case(*size) for size in (sizes if CUDA else [(32, 8, 4, 320, 32, 64)])]


CASES = {"linear_logprob": logprob_cases, "policy_loss": policy_cases, "rewards": rewards_cases,
         "sample": sample_cases, "layers": layer_cases, "decode_attention": decode_cases}  # fmt: skip


# ---- Measuring


def step(call: Callable, inputs: list, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = call(*inputs)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    if out:
        torch.autograd.backward(out, [torch.full_like(x, 0.1) for x in out])
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None


def seconds(call: Callable, inputs: list, backward: bool = False) -> float:
    if not CUDA:
        start = time.perf_counter()
        step(call, inputs, backward)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(call, inputs, backward)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(calls: dict[str, Callable], inputs: list, backward: bool = False) -> dict[str, float]:
    """Median seconds of each, after two calls to warm up, in which compilers run."""
    times = {name: [] for name in calls}
    for repeat in range(REPEATS + 2):
        for name, call in calls.items():
            taken = seconds(call, inputs, backward)
            times[name] += [taken] if repeat >= 2 else []
    return {name: statistics.median(taken) for name, taken in times.items()}


def probes() -> tuple[dict[str, Callable], dict[str, float]]:
    """What the machine can do, timed in turn with the contenders: a copy, a matmul in the kernels' dtype. And
    their work: bytes read and written, FLOPs."""
    size, side = (1 << 30, 8192) if CUDA else (1 << 26, 512)
    source, a = torch.randn(size // 4, device=DEVICE), normal(side, side, grad=False)
    target = torch.empty_like(source)
    return ({"copy": lambda *_: target.copy_(source), "matmul": lambda *_: a @ a},
            {"copy": 2 * size, "matmul": 2 * side**3})  # fmt: skip


def high_water() -> int:
    """Bytes; of a process's whole life."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak(name: str, index: int, contender: str) -> float:
    """MB beyond inputs and gradients, of one call."""
    torch.manual_seed(0)
    case = CASES[name]()[index]
    inputs, mark = case.make(), torch.cuda.max_memory_allocated if CUDA else high_water
    learning = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad] if case.backward else []
    gradients = [torch.ones_like(x) for x in learning]
    if CUDA:
        seconds(case.contenders[contender], inputs, case.backward)  # compilers and autotuners run here
        torch.cuda.reset_peak_memory_stats()
    before = mark()
    del gradients
    seconds(case.contenders[contender], inputs, case.backward)
    return max(mark() - before, 0) / 1e6


def peak_apart(*arguments) -> float | None:
    """`peak` in a fresh process on a CPU (None where /proc is missing); on CUDA the allocator counts."""
    if CUDA:
        return peak(*arguments)
    if not Path("/proc/self/status").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, arguments)


def measure(name: str, index: int, case: Case) -> list[dict]:
    memory = {who: peak_apart(name, index, who) for who in case.contenders}
    torch.manual_seed(0)
    probe, work = probes()
    taken, rows = interleaved(case.contenders | probe, case.make(), case.backward), []
    limit = "matmul" if case.flops else "copy"
    top = work[limit] / taken[limit]  # FLOP or bytes a second
    for who in case.contenders:
        rate = (case.flops or case.bytes) / taken[who]
        rows.append({"kernel": case.kernel, "shape": case.shape, "backward": case.backward, "contender": who,
                     "ms": taken[who] * 1e3, "peak_mb": memory[who], "percent_of_ceiling": 100 * rate / top,
                     **({"tflop_per_s": rate / 1e12} if case.flops else {"gb_per_s": rate / 1e9}),
                     "ceiling": f"{limit} {top / 1e12:.3g} TFLOP/s" if case.flops else
                                f"{limit} {top / 1e9:.4g} GB/s"})  # fmt: skip
        print(f"{case.kernel} {case.shape} {'fwd+bwd' if case.backward else 'fwd':8} {who:9} "
              f"{taken[who] * 1e3:.3f} ms, {rows[-1]['percent_of_ceiling']:.1f} % of {rows[-1]['ceiling']}, "
              f"peak {memory[who] or 0:9.1f} MB", flush=True)
    return rows


def fused_rows() -> dict[int, int]:
    """What linear_logprob.FUSED_ROWS should be: for each H, up to which N its fused forward wins."""
    table = {}
    for h in (2048, 3584, 4096):
        weight, table[h] = normal(VOCAB, h, scale=h**-0.5, grad=False), 0
        for n in (1, 16, 64, 256, 1024, 4096, 16_384):
            inputs = [normal(n, h, grad=False), weight, torch.randint(VOCAB, (n,), device=DEVICE), 1.0]
            taken = interleaved({"fused": linear_logprob._forward_fused,
                                 "tiles": linear_logprob._forward_tiles}, inputs)  # fmt: skip
            if taken["fused"] > taken["tiles"]:
                break
            table[h] = n
    return table


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PEERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def main(only: list[str]) -> None:
    if linear_logprob.INTERPRET:
        raise SystemExit("TRITON_INTERPRET=1: the interpreter's times say nothing")
    file = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".json")
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    names = only or list(CASES)
    print(device_name())
    rows = [row for row in old if row["kernel"] not in names]
    for name in names:
        for index, case in enumerate(CASES[name]()):
            rows += measure(name, index, case)
    report = {"device": device_name(), "dtype": str(DTYPE), "versions": versions()}
    if CUDA and "linear_logprob" in names:
        report["fused_rows"] = fused_rows()
        print(f"kernels/linear_logprob.py: FUSED_ROWS = {report['fused_rows']}")
    elif "linear_logprob" in names:
        print("kernels/linear_logprob.py: FUSED_ROWS needs a GPU to be measured; it stays a guess")
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the kernels beside their peers.")
    parser.add_argument("--only", nargs="*", choices=CASES, default=[], help="kernels; default: all")
    main(parser.parse_args().only)
