"""Every kernel beside what people use instead: time, share of the machine's ceiling, peak memory.

    python -m bench.kernels [--only NAME ...]   (make bench; a GPU: some minutes, a CPU: about one)
    python -m bench.kernels --judged            (a CPU: linear_logprob at full size; 6 minutes, 16 GB)

Writes bench/results/<device>.json, after every case; `python -m bench.table` renders that into the
README. All contenders of a case see the same random inputs and are timed in turn (interleaved), so
that a disturbance hits all of them; the median counts. So are the ceilings, a copy and a square
matmul. On a GPU the L2 cache is flushed before each call, and where ours takes less than a
millisecond the host gets a head start, so that GPU time is compared and not Python's. Peak memory
is beyond the inputs and their gradients: on a CPU the high-water mark of a process of its own
(Linux). --judged takes the time in such processes, too.

Contenders: ours, which on CUDA is Liger's op for the norms and SwiGLU; naive, the plain PyTorch
that a kernel replaces; compiled, torch.compile of that (CUDA); liger, its op where ours is another;
trl, its chunked log-prob, or the few lines below in its manner; cce, Apple's cut-cross-entropy,
which gives no entropy and drops small gradients. What is not installed is left out, and named; so
is what runs out of memory. On a CPU the shapes are small, ratios say more than times, and ours is
the reference itself for policy_loss, rewards, SwiGLU and the rotation. decode_attention's bytes are
each key and value once, a prompt's too.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import (
    decode_attention,
    delta_rule,
    delta_step,
    gated_norm,
    interpreted,
    layers,
    linear_logprob,
    policy_loss,
    rewards,
    sample,
    short_conv,
)

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
REPEATS = 20 if CUDA else 3
# contenders whose backward may write over the inputs
IN_PLACE = {"ours", "liger"} if CUDA else set()
VOCAB = 151_936 if CUDA else 16_000
JUDGED = 4096, 512, 151_936  # N, H, V
SHORT, HEAD_START = 1e-3, 10_000_000  # seconds; cycles of the GPU, about 6 ms
VERSIONS = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "trl",
    "cut-cross-entropy",
    "nvidia-cutlass-dsl",
)
PEERS = {"trl": ("trl", "trl")}  # contender: module, what to install
if CUDA:
    PEERS["liger"] = ("liger_kernel", "liger-kernel[cutedsl]")
    PEERS["cce"] = ("cut_cross_entropy", "cut-cross-entropy")


@dataclass
class Case:
    """`make` draws the inputs; a contender takes them, and with `backward` its outputs are
    differentiated."""

    kernel: str
    shape: str
    make: Callable[[], list]
    contenders: dict[str, Callable]
    backward: bool = False
    flops: float = 0.0  # useful: without what is computed again; else
    bytes: float = 0.0  # the least that has to move
    apart: int = 0  # so many times in processes of their own instead of in turn


def installed(peer: str) -> bool:
    return peer in PEERS and importlib.util.find_spec(PEERS[peer][0]) is not None


def normal(*shape, scale=1.0, grad=True, dtype=DTYPE) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


def with_compiled(contenders: dict[str, Callable]) -> dict[str, Callable]:
    if not CUDA:
        return contenders
    return contenders | {"compiled": torch.compile(contenders["naive"], dynamic=False)}


# ---- Cases


def naive_logprob(hidden, weight, targets):
    # (N, V), in fp32: what the kernel never holds.
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def chunked_logprob(hidden, weight, targets, rows=1024 if CUDA else 128):
    """In the manner of trainers without a kernel: some rows at a time, made again in the
    backward."""
    chunks = [slice(i, i + rows) for i in range(0, len(hidden), rows)]
    parts = [
        checkpoint(naive_logprob, hidden[c], weight, targets[c], use_reentrant=False)
        for c in chunks
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def logprob_contenders() -> dict[str, Callable]:
    contenders = with_compiled({"ours": linear_logprob.linear_logprob, "naive": naive_logprob})
    contenders["chunked"] = chunked_logprob
    if installed("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Chunked

        # temperature, columns of a tile, softcap, scale, outputs
        more = 1.0, 8192, None, 1.0, ("entropy",)

        def trl(hidden, weight, targets):
            return Chunked.apply(hidden, weight, None, targets, *more)[:2]

        contenders["trl"] = trl
    if installed("liger"):
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

        def liger(hidden, weight, targets):
            return Liger.apply(hidden, weight, targets, 1.0, -100, 1, True)

        contenders["liger"] = liger
    if installed("cce"):
        from cut_cross_entropy import linear_cross_entropy

        # A loss a token, which is minus its log-prob.
        contenders["cce"] = partial(linear_cross_entropy, reduction="none")
    return contenders


def logprob_case(
    n: int, h: int, v: int, contenders: dict[str, Callable], backward: bool, apart=0
) -> Case:
    def make():
        targets = torch.randint(v, (n,), device=DEVICE)
        # Weights of 1 / sqrt(H) make logits of about unit spread, whatever H is.
        return [normal(n, h), normal(v, h, scale=h**-0.5), targets]

    return Case(
        "linear_logprob",
        f"N={n} H={h} V={v}",
        make,
        contenders,
        backward,
        flops=(8 if backward else 2) * n * h * v,
        apart=apart,
    )


def logprob_cases() -> list[Case]:
    contenders = logprob_contenders()
    shapes = [(512, 256)]
    if CUDA:
        shapes = list(itertools.product((2048, 8192, 32_768), (2048, 3584, 4096)))
    cases = []
    for n, h in shapes:
        for backward in (False, True):
            cases.append(logprob_case(n, h, VOCAB, contenders, backward))
    return cases


def judged_cases() -> list[Case]:
    """At a real vocabulary on a CPU: eager PyTorch holds 15 GB."""
    contenders = {"ours": linear_logprob.linear_logprob, "naive": naive_logprob}
    return [logprob_case(*JUDGED, contenders, backward=True, apart=2)]


def policy_cases() -> list[Case]:
    t = 32_768
    s = 128
    # Sequences of one length, 256 tokens each.
    cu_seqlens = torch.linspace(0, t, s + 1).long().to(DEVICE)

    def make():
        new = normal(t, dtype=torch.float32)
        old = normal(t, grad=False, dtype=torch.float32)
        return [new, old, normal(s, grad=False, dtype=torch.float32)]

    def loss_of(call):
        def run(new, old, advantage):
            return call(new, old, advantage, cu_seqlens, rollout_logprob=old)[0]

        return run

    contenders = {
        "ours": loss_of(policy_loss.policy_loss),
        "naive": loss_of(policy_loss.reference_policy_loss),
    }
    contenders = with_compiled(contenders)
    return [Case("policy_loss", f"T={t} S={s}", make, contenders, backward=True, bytes=24 * t)]


def rewards_cases() -> list[Case]:
    """Three rewards, groups of eight."""
    n = 4096
    groups = n // 8
    start = torch.arange(groups + 1, device=DEVICE) * 8

    def make():
        parts = torch.rand(n, 3, device=DEVICE, dtype=torch.float64)
        weights = torch.rand(groups, 3, device=DEVICE, dtype=torch.float64)
        return [parts, weights, start]

    both = {
        "ours": rewards.rewards_and_advantages,
        "naive": rewards.reference_rewards_and_advantages,
    }
    both = {who: partial(call, accuracy_column=0) for who, call in both.items()}
    return [Case("rewards", f"N={n} G={groups} R=3", make, both, bytes=5 * 8 * n)]


def sample_cases() -> list[Case]:
    """As the sampler has it: fp32 logits, and ids that are never drawn."""
    b, v = (256, VOCAB) if CUDA else (32, VOCAB)
    banned = torch.arange(v, device=DEVICE) >= v - 300

    def make():
        logits = normal(b, v, scale=3.0, grad=False, dtype=torch.float32)
        # They are hashed, so that any numbers will do.
        keys, positions = torch.randint(1 << 40, (2, b), device=DEVICE)
        return [logits, keys, positions]

    def ours(logits, keys, positions):
        return sample.sample(logits, keys, positions, banned=banned)

    def naive(logits, keys, positions):  # noise of torch's own; the same work otherwise
        p = logits.masked_fill(banned, -torch.inf).softmax(-1)
        token = (p / torch.empty_like(logits).exponential_()).argmax(-1, keepdim=True)
        return token, logits.log_softmax(-1).gather(1, token)

    contenders = with_compiled({"ours": ours, "naive": naive})
    return [Case("sample", f"B={b} V={v}", make, contenders, bytes=4 * b * v)]


def liger_rope() -> dict[str, Callable]:
    """Liger's rotation of queries and keys, which has no norm."""
    if not installed("liger"):
        return {}
    from liger_kernel.ops import LigerRopeFunction

    def by_heads(x):  # (T, A, D) -> (1, A, T, D)
        return x.transpose(0, 1)[None]

    def rope(q, k, cos, sin):
        return LigerRopeFunction.apply(by_heads(q), by_heads(k), cos[None], sin[None])

    return {"liger": rope}


def layer_case(op: str, shape: str, make: Callable, backward: bool, numbers: int, peers=()) -> Case:
    """numbers: how many are read and written, once each."""
    both = {"ours": getattr(layers, op), "naive": getattr(layers, "reference_" + op)}
    contenders = with_compiled(both) | dict(peers)
    moved = numbers * DTYPE.itemsize
    return Case("layers", f"{op} {shape}", make, contenders, backward, bytes=moved)


def layer_cases() -> list[Case]:
    """Widths, inner widths and heads of Qwen2.5-VL-3B, 7B and Qwen3-VL-8B."""
    if not CUDA:
        return layer_cases_of(3000, 128, 384, (4, 2, 32))
    cases = layer_cases_of(8192, 2048, 11_008, (16, 2, 128))
    cases += layer_cases_of(8192, 3584, 18_944, (28, 4, 128))
    return cases + layer_cases_of(8192, 4096, 12_288, (32, 8, 128))


def layer_cases_of(t: int, h: int, inner: int, head_sizes: tuple[int, int, int]) -> list[Case]:
    """Forward, and forward and backward, of t tokens."""
    heads, kv_heads, d = head_sizes
    row = (heads + kv_heads) * d
    # Any angles: mRoPE has been applied by whoever makes cos and sin.
    angle = torch.randn(t, d // 2, device=DEVICE).repeat(1, 2)
    turn = [angle.cos().to(DTYPE), angle.sin().to(DTYPE)]

    def norm():
        return [normal(t, h), normal(h)]

    def add_norm():
        return [normal(t, h), normal(t, h), normal(h)]

    def gate_and_up():
        return [normal(t, inner), normal(t, inner)]

    def joint():
        return [normal(t, 2 * inner)]

    def rope():
        return [normal(t, heads, d), normal(t, kv_heads, d), *turn]

    def norm_rope():
        return [*rope(), normal(d), normal(d)]

    width = f"T={t} H={h}"
    mlp = f"T={t} inner={inner}"
    qk = f"T={t} heads={heads}+{kv_heads} D={d}"
    cases = []
    for backward in (False, True):
        cases += [
            layer_case("rms_norm", width, norm, backward, (5 if backward else 2) * t * h),
            layer_case("add_rms_norm", width, add_norm, backward, (8 if backward else 4) * t * h),
            layer_case("swiglu", mlp, gate_and_up, backward, (8 if backward else 3) * t * inner),
            layer_case("swiglu_joint", mlp, joint, backward, (8 if backward else 3) * t * inner),
            layer_case(
                "qk_norm_rope",
                qk + " normed",
                norm_rope,
                backward,
                (5 if backward else 2) * t * row,
            ),
            layer_case(
                "qk_norm_rope",
                qk,
                rope,
                backward,
                (4 if backward else 2) * t * row,
                liger_rope(),
            ),
        ]
    return cases


def decode_case(slots: int, heads: int, kv: int, prompt: int, own: int, d: int, g: int = 8) -> Case:
    """A step of `slots` samples, g of a prompt, when half of their own room is filled."""
    prompts = slots // g
    places = torch.arange(slots, device=DEVICE)

    def make():
        # Twice the room for a sample's own keys: what lies behind the lengths isn't read.
        prefix = (prompts, kv, prompt, d)
        suffix = (slots, kv, 2 * own, d)
        shapes = (slots, heads, d), prefix, prefix, suffix, suffix
        table = decode_attention.Table(
            prefix_lengths=torch.full((prompts,), prompt, device=DEVICE),
            suffix_lengths=torch.full((slots,), own, device=DEVICE),
            members=places.view(prompts, g),
            member_index=places,
        )
        return [*(normal(*shape, grad=False) for shape in shapes), table]

    both = {
        "ours": decode_attention.decode_attention,
        "naive": decode_attention.reference_decode_attention,
    }
    moved = 2 * DTYPE.itemsize * kv * d * (prompts * prompt + slots * own)
    name = f"S={slots} G={g} heads={heads}+{kv} D={d} P={prompt} R={own}"
    return Case("decode_attention", name, make, both, bytes=moved)


def decode_cases() -> list[Case]:
    """Heads of Qwen2.5-VL-3B and Qwen3-VL-8B."""
    if not CUDA:
        return [decode_case(32, 8, 4, 320, 32, 64)]
    cases = []
    for heads, kv_heads in ((16, 2), (32, 8)):
        for slots in (64, 256):
            cases.append(decode_case(slots, heads, kv_heads, 896, 128, 128))
    return cases


# Value heads, key heads, and the width of both: Qwen3.5-4B and 9B.
DELTA_HEADS = (32, 16, 128) if CUDA else (4, 2, 32)


def short_conv_cases() -> list[Case]:
    """Sixteen sequences of one length."""
    heads, key_heads, d = DELTA_HEADS
    t, c = (8192, (2 * key_heads + heads) * d) if CUDA else (2048, 256)
    # How many earlier rows of its sequence each row has.
    before = torch.arange(t, device=DEVICE) % (t // 16)

    def make():
        return [normal(t, c), normal(c, 4), before]

    both = {"ours": short_conv.short_conv, "naive": short_conv.reference_short_conv}
    moved = t * c * DTYPE.itemsize
    shape = f"T={t} C={c}"
    return [
        Case("short_conv", shape, make, with_compiled(both), bytes=2 * moved),
        Case("short_conv", shape, make, with_compiled(both), backward=True, bytes=5 * moved),
    ]


def gated_norm_cases() -> list[Case]:
    heads, _, d = DELTA_HEADS
    t = 8192 if CUDA else 2048

    def make():
        return [normal(t, heads, d), normal(t, heads, d), normal(d)]

    both = {"ours": gated_norm.gated_norm, "naive": gated_norm.reference_gated_norm}
    moved = t * heads * d * DTYPE.itemsize
    shape = f"T={t} heads={heads} E={d}"
    return [
        Case("gated_norm", shape, make, with_compiled(both), bytes=3 * moved),
        Case("gated_norm", shape, make, with_compiled(both), backward=True, bytes=8 * moved),
    ]


def delta_rule_cases() -> list[Case]:
    """Sixteen sequences. On CUDA ours is fla-core's where that is installed."""
    heads, key_heads, d = DELTA_HEADS
    t = 8192 if CUDA else 1024
    chunks = delta_rule.Chunks([t // 16] * 16, torch.device(DEVICE))

    def make():
        # A state keeps 90 to 100 % of itself a token.
        g = -torch.rand(t, heads, device=DEVICE) / 10
        beta = torch.rand(t, heads, device=DEVICE)
        qk = [normal(t, key_heads, d), normal(t, key_heads, d)]
        return [*qk, normal(t, heads, d), g.requires_grad_(), beta.requires_grad_(), chunks]

    def of(call):
        return lambda *inputs: call(*inputs)[0]

    both = {"ours": of(delta_rule.delta_rule), "naive": of(delta_rule.reference_delta_rule)}
    # What fla counts: the products of the chunked form, forward.
    flops = 2 * t * heads * (3 * delta_rule.CHUNK * d + 4 * d * d)
    shape = f"T={t} heads={heads}+{key_heads} D={d}"
    return [
        Case("delta_rule", shape, make, both, flops=flops),
        Case("delta_rule", shape, make, both, backward=True, flops=3 * flops),
    ]


def delta_step_cases() -> list[Case]:
    """The bytes are those of the states, read and written."""
    heads, key_heads, d = DELTA_HEADS
    channels = (2 * key_heads + heads) * d
    cases = []
    for slots in (64, 256) if CUDA else (32,):

        def make(slots=slots):
            state = torch.randn(slots, heads, d, d, device=DEVICE)
            ring = normal(slots, 4, channels, grad=False)
            projections = [normal(slots, channels), normal(slots, heads, d)]
            gates = [normal(slots, heads), normal(slots, heads)]
            conv = normal(channels, 4, grad=False)
            per_head = normal(2, heads, grad=False)
            norm = normal(d, grad=False)
            weights = delta_step.StepWeights(conv, *per_head, norm, 1e-6, key_heads)
            place = torch.zeros(slots, dtype=torch.int64, device=DEVICE)
            ended = torch.zeros(slots, dtype=torch.bool, device=DEVICE)
            return [*projections, *gates, weights, state, ring, place, ended]

        both = {"ours": delta_step.delta_step, "naive": delta_step.reference_delta_step}
        moved = 2 * slots * heads * d * d * 4
        cases.append(Case("delta_step", f"S={slots} heads={heads} D={d}", make, both, bytes=moved))
    return cases


CASES = {
    "linear_logprob": logprob_cases,
    "policy_loss": policy_cases,
    "rewards": rewards_cases,
    "sample": sample_cases,
    "layers": layer_cases,
    "decode_attention": decode_cases,
    "short_conv": short_conv_cases,
    "gated_norm": gated_norm_cases,
    "delta_rule": delta_rule_cases,
    "delta_step": delta_step_cases,
    "judged": judged_cases,
}
KERNELS = [name for name in CASES if name != "judged"]


# ---- Measuring


def step(
    call: Callable, inputs: list, backward: bool, grads: list[Tensor] | None = None
) -> list[Tensor]:
    """Returns the outputs' gradients, for the next call: making them isn't the contender's work."""
    with torch.set_grad_enabled(backward):
        out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    # Without `backward` nothing has a gradient, but an input that is returned shows its own.
    out = [x for x in out if x.requires_grad and backward]
    grads = [torch.full_like(x, 0.1) for x in out] if grads is None else grads
    if out:
        torch.autograd.backward(out, grads)
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None
    return grads


def seconds(call: Callable, inputs: list, backward=False, grads=None, head_start=False) -> float:
    if not CUDA:
        start = time.perf_counter()
        step(call, inputs, backward, grads)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if head_start:
        # Launches queue up behind a pause, so that the events enclose the GPU's work alone.
        torch.cuda._sleep(HEAD_START)
    start.record()
    step(call, inputs, backward, grads)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def own_copy(x):
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def interleaved(
    calls: dict[str, Callable], inputs: list, backward: bool = False
) -> dict[str, float]:
    """Median seconds of each, after two calls to warm up, in which compilers run."""
    times = {name: [] for name in calls}
    flush = torch.empty(1 << 26, device=DEVICE)
    # Who writes over its inputs gets a copy, or the next contender would read what it left.
    own = dict.fromkeys(calls, inputs)
    for name in IN_PLACE & calls.keys():
        own[name] = [own_copy(x) for x in inputs]
    grads = {name: step(call, own[name], backward) for name, call in calls.items()}
    for _ in range(REPEATS + 1):
        for name, call in calls.items():
            flush.zero_()  # or who comes behind the copy has cold caches, and the others don't
            short = CUDA and times.get("ours", []) and times["ours"][0] < SHORT
            times[name].append(seconds(call, own[name], backward, grads[name], short))
    # Without the first of them, which may still find cold caches.
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def probes() -> tuple[dict[str, Callable], dict[str, float]]:
    """What the machine can do, timed in turn with the contenders: a copy, a matmul in the kernels'
    dtype. And their work: bytes read and written, FLOPs."""
    size, side = (1 << 30, 8192) if CUDA else (1 << 26, 1536)
    source, a = torch.randn(size // 4, device=DEVICE), normal(side, side, grad=False)
    target = torch.empty_like(source)
    calls = {"copy": lambda *_: target.copy_(source), "matmul": lambda *_: a @ a}
    return calls, {"copy": 2 * size, "matmul": 2 * side**3}


def high_water() -> int:
    """Bytes; of a process's whole life. 0 where there is no /proc."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0


def alone(name: str, index: int, contender: str) -> tuple[float, float]:
    """MB beyond inputs and gradients, and seconds, of one call."""
    torch.manual_seed(0)
    case = CASES[name]()[index]
    inputs = case.make()
    mark = torch.cuda.max_memory_allocated if CUDA else high_water
    call = case.contenders[contender]
    grads = None
    gradients = []
    for x in inputs:
        if case.backward and isinstance(x, Tensor) and x.requires_grad:
            gradients.append(torch.ones_like(x))
    if CUDA:
        grads = step(call, inputs, case.backward)  # compilers and autotuners run here
        torch.cuda.reset_peak_memory_stats()
    before = mark()
    del gradients
    taken = seconds(call, inputs, case.backward, grads)
    return max(mark() - before, 0) / 1e6, taken


def apart(*arguments) -> tuple[float, float]:
    """`alone`, on a CPU in a fresh process; on CUDA the allocator counts."""
    if CUDA:
        return alone(*arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(alone, arguments)


def runs_apart(name: str, index: int, case: Case) -> tuple[dict[str, list], dict[str, str]]:
    """(peak, seconds) of each contender's runs; and who can't run, with the reason."""
    runs = {who: [] for who in case.contenders}
    lost = {}
    # All in turn, and again: a disturbance then doesn't hit one of them alone.
    for who in list(case.contenders) * max(case.apart, 1):
        if who not in lost:
            try:
                runs[who].append(apart(name, index, who))
            except torch.OutOfMemoryError:
                lost[who] = "out of memory"
            # A peer that fails is a row of the table; ours that fails is a bug.
            except Exception as error:
                if who == "ours":
                    raise
                lost[who] = f"fails: {type(error).__name__}"
                print(f"{case.kernel} {case.shape} {who}: {error}", flush=True)
            if CUDA:
                torch.cuda.empty_cache()
    return runs, lost


def in_turn(
    case: Case, memory: dict[str, float], lost: dict[str, str], probe: dict
) -> dict[str, float]:
    while True:
        calls = {who: case.contenders[who] for who in memory} | probe
        try:
            return interleaved(calls, case.make(), case.backward)
        except torch.OutOfMemoryError:  # it ran alone, but has to go beside the probes' memory
            most = max(memory, key=memory.get)
            lost[most] = "out of memory"
            del memory[most]


def measure(name: str, index: int, case: Case) -> list[dict]:
    """Return the case's rows, one a contender."""
    if CUDA:
        torch._dynamo.reset()  # else the ninth shape would silently run eagerly
    runs, lost = runs_apart(name, index, case)
    torch.manual_seed(0)
    probe, work = probes()
    memory = {}
    for who, own in runs.items():
        if who not in lost:
            memory[who] = max(mb for mb, _ in own)
    if case.apart:
        taken = interleaved(probe, [])
        for who in memory:
            taken[who] = statistics.median(seconds for _, seconds in runs[who])
    else:
        taken = in_turn(case, memory, lost, probe)

    limit = "matmul" if case.flops else "copy"
    top = work[limit] / taken[limit]  # FLOP or bytes a second
    rows = []
    for who in case.contenders:
        row = dict(
            case=name,
            kernel=case.kernel,
            shape=case.shape,
            backward=case.backward,
            contender=who,
        )
        if who in lost:
            row["note"] = lost[who]
        else:
            row |= reached(case, taken[who], memory[who], limit, top)
        rows.append(row)
        report_row(row)
    return rows


def reached(case: Case, taken: float, peak_mb: float, limit: str, top: float) -> dict:
    """Return the columns of what a contender reached, beside the machine's ceiling `top`."""
    rate = (case.flops or case.bytes) / taken
    if case.flops:
        own = {"tflop_per_s": rate / 1e12}
        ceiling = f"{limit} {top / 1e12:.3g} TFLOP/s"
    else:
        own = {"gb_per_s": rate / 1e9}
        ceiling = f"{limit} {top / 1e9:.4g} GB/s"
    row = {"ms": taken * 1e3, "peak_mb": peak_mb} | own
    return row | {"percent_of_ceiling": 100 * rate / top, "ceiling": ceiling}


def report_row(row: dict) -> None:
    way = "fwd+bwd" if row["backward"] else "fwd"
    text = f"{row['kernel']} {row['shape']} {way:8} {row['contender']:9} "
    if "note" in row:
        text += row["note"]
    else:
        text += f"{row['ms']:.3f} ms, {row['percent_of_ceiling']:.1f} % of {row['ceiling']}, "
        text += f"peak {row['peak_mb']:9.1f} MB"
    print(text, flush=True)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in VERSIONS:
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


def main(names: list[str]) -> None:
    if interpreted():
        raise SystemExit("TRITON_INTERPRET=1: the interpreter's times say nothing")
    if CUDA and "judged" in names:
        raise SystemExit(
            "--judged is a CPU's row: CUDA_VISIBLE_DEVICES= python -m bench.kernels --judged"
        )
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in the product
    file = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".json")
    old = json.loads(file.read_text()) if file.exists() else {}
    report = {"device": device_name(), "cuda": CUDA, "dtype": str(DTYPE), "versions": versions()}
    # Rows of cases that aren't measured now stay as they are.
    report["rows"] = [row for row in old.get("rows", []) if row.get("case") not in names]
    print(device_name())
    for peer, (module, package) in PEERS.items():
        if not installed(peer):
            print(f"{peer} is left out: no module {module}; pip install '{package}'")
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        for index, case in enumerate(CASES[name]()):
            report["rows"] += measure(name, index, case)
            # After each case: the last ones may take minutes, or run out of memory.
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the kernels beside their peers.")
    parser.add_argument(
        "--only", nargs="*", choices=KERNELS, default=[], help="kernels; default: all"
    )
    parser.add_argument("--judged", action="store_true", help="linear_logprob on a CPU, full size")
    arguments = parser.parse_args()
    main(["judged"] if arguments.judged else arguments.only or KERNELS)
