"""plan.py: counts against transformers' models, bytes against closed forms and what autograd really
keeps."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from published_sizes import BILLIONS, published
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

import plan
import train_rl
import train_sft
from errors import UserError
from kernels import layers
from kernels.linear_logprob import WORKSPACE
from model.lora import adapters, attach
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout.cache import MAX_SLOTS, PROMPT_STEP, SPARE_PLACES, Cache, Options
from model.rollout.prefill import PREFILL_TOKENS
from model.tiny import SPECIAL, configuration, write
from plan import Config, Settings, choose, count, estimate
from srreal import Example, Scores
from training import run

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NAMES = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-8B")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """name -> config, read from a directory with nothing but config.json."""
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(published()[name]))
        found[name] = AutoConfig.from_pretrained(folder)
        found[name].folder = str(folder)
    return found


def tiny(family, layers=4):
    config = configuration(family, {token: 900 + i for i, token in enumerate(SPECIAL)})
    config.text_config.num_hidden_layers = layers
    return config


def spatial(model):
    total = 0
    for part in (model.region, model.points, model.head3d):
        total += sum(p.numel() for p in part.parameters())
    return total


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_the_published_sizes(configs, name):
    config = configs[name]
    n = count(config, "all", 0)
    with torch.device("meta"):
        extra = spatial(QwenVL(config))
    assert round((n.all - extra) / 1e9, 3) == BILLIONS[name] and n.trained == n.all
    lm = count(config, "lm", 0)
    text = config.text_config
    assert lm.all == n.all and lm.vision == 0 and lm.trained == n.all - n.vision - extra
    assert lm.trained == text.num_hidden_layers * lm.layer + lm.outside
    vocab = text.vocab_size * text.hidden_size
    copies = 1 if config.tie_word_embeddings else 2
    assert lm.outside == vocab * copies + text.hidden_size and lm.head == vocab


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_a_real_model(family):
    config = tiny(family)
    model = QwenVL(config)
    assert count(config, "all", 0).all == sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    attach(model, 5)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n = count(config, "lm", 5)
    assert n.trained == own == sum(5 * sum(one.weight.shape) for one in adapters(model))
    assert n.outside == n.head == n.vision == 0
    assert n.all == sum(p.numel() for p in model.parameters())
    assert count(config, "spatial", 0).trained == spatial(model)


def test_bytes_by_closed_form(configs):
    """Qwen2.5-VL-3B by hand from its config: 36 layers, 2 key-value heads of 128, H 2048, I
    11008."""
    config = configs["Qwen2.5-VL-3B"]
    cfg = Config("m", gpus=4, prompt_tokens=512, new_tokens=256)
    n = count(config, "lm", 0)
    gb = estimate(config, cfg, Settings(slots=20, micro_tokens=1000), n)
    assert gb["weights"] == pytest.approx(2 * n.all / 1e9)
    assert gb["master and moments"] == pytest.approx(12 * n.trained / 1e9)
    assert gb["reference"] == pytest.approx(2 * n.trained / 4 / 1e9)
    # 36,864 bytes a token
    assert gb["cache"] == pytest.approx((20 * 256 + 2 * 3 * 512) * 36864 / 1e9)
    assert gb["prefill"] == pytest.approx(2 * 3 * 512 * (36864 + 2 * (3 * 11008 + 6 * 2048)) / 1e9)
    assert gb["sampler"] == pytest.approx(20 * 3 * 4 * 151936 / 1e9)
    vocab = 151936 * 2048  # the largest weight, whose bf16 gradient moves into the fp32 one
    assert gb["gradients"] == pytest.approx((4 * n.trained + 2 * vocab) / 1e9)
    layer = 2 * (4 * 2048 + 2 * (2048 + 256) + 3 * 11008)
    gradients = 2 * 3 * 11008
    assert gb["activations"] == pytest.approx(1000 * (36 * layer + gradients) / 1e9)
    assert gb["logits"] == pytest.approx((64 * 2**20 + 6 * 151936 * 2048) / 1e9)
    # gathered keys a token: 8 samples read their prompt
    keys = (512 + 8 * (512 + 256)) / (512 + 8 * 256)
    assert gb["gathered keys"] == pytest.approx(1000 * keys * 36 * 2 * 2 * 256 / 1e9)
    stays = gb["weights"] + gb["master and moments"] + gb["reference"]
    update = sum(
        gb[part] for part in ("gradients", "activations", "gathered keys", "logits", "pixels")
    )
    assert gb["peak"] == pytest.approx(
        stays + max(update, gb["cache"] + gb["prefill"] + gb["sampler"])
    )
    frugal = Settings(slots=20, micro_tokens=1000, checkpointing=True)
    less = estimate(config, cfg, frugal, n)
    assert less["activations"] == pytest.approx(1000 * (36 * 2 * 2048 + layer + gradients) / 1e9)
    assert less["gathered keys"] == pytest.approx(gb["gathered keys"] / 36)
    cut = estimate(config, cfg, Settings(shard=True, slots=20, micro_tokens=1000), n)
    assert cut["master and moments"] == pytest.approx(gb["master and moments"] / 4)
    assert cut["weights"] == pytest.approx(2 * n.all / 1e9)  # the copy that samples
    sft = estimate(config, replace(cfg, prompts=0), Settings(shard=True, micro_tokens=1000), n)
    assert sft["weights"] == pytest.approx(2 * (n.all - n.trained) / 1e9)
    gathered = (2 * n.layer + n.outside) * 2 + (n.layer + n.outside) * 4
    assert cut["gradients"] == pytest.approx((4 * n.trained / 4 + gathered) / 1e9)
    busy = estimate(config, cfg, Settings(slots=4000, micro_tokens=1000), n)
    assert busy["peak"] == pytest.approx(stays + busy["cache"] + busy["prefill"] + busy["sampler"])


def test_the_reference_is_free_where_it_can_be(configs):
    config = configs["Qwen2.5-VL-3B"]
    n = count(config, "lm", 0)
    cfg = Config("m", gpus=2)
    assert estimate(config, cfg, Settings(), n)["reference"] > 0
    for other in (replace(cfg, kl=0), replace(cfg, gpus=1)):
        assert estimate(config, other, Settings(), n)["reference"] == 0
    assert estimate(config, cfg, Settings(lora=8), count(config, "lm", 8))["reference"] < 0.05


def bytes_kept(model, tokens):
    """Of the distinct storages that a forward of text saves for its backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # alive, so that no address comes twice
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        QwenVL.logits.__wrapped__(model, torch.arange(tokens)[None])  # without its no_grad
    return sum(size for size, _ in kept.values())


class Silent:
    """A Triton kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_against_what_autograd_keeps(family, dtype, monkeypatch):
    """fp32 as on a CPU; bf16 by the way of CUDA: what its fused layers keep, whatever is in it."""
    if dtype == "bf16":
        monkeypatch.setattr(layers, "_on_triton", lambda x: True)
        monkeypatch.setattr(layers, "_on_liger", lambda x: True)
        monkeypatch.setattr(layers, "_rope_kernel", Silent())
        monkeypatch.setattr("liger_kernel.ops.rms_norm._rms_norm_forward_kernel", Silent())
        monkeypatch.setattr("liger_kernel.ops.swiglu._swiglu_forward_kernel", Silent())
    config = tiny(family, layers=6)
    tokens = 256
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = QwenVL(config).to(torch_dtype)
    cfg = Config("m", dtype=dtype)
    counts = count(config, "lm", 0)
    # inside a layer, on the way back
    gradients = tokens * 3 * config.text_config.intermediate_size * torch_dtype.itemsize
    whole = estimate(config, cfg, Settings(micro_tokens=tokens), counts)
    said = whole["activations"] * 1e9 - gradients
    assert bytes_kept(model, tokens) == pytest.approx(said, rel=0.15)
    # the estimate has one layer whole: that which the backward computes again
    model.checkpoint_blocks()
    frugal = Settings(micro_tokens=tokens, checkpointing=True)
    less = estimate(config, cfg, frugal, counts)["activations"] * 1e9 - gradients
    assert bytes_kept(model, tokens) + said / 6 == pytest.approx(less, rel=0.15)


def test_the_cache_against_the_samplers_own():
    """The sampler rounds prompts up to PROMPT_STEP, and each slot has SPARE_PLACES to spare."""
    config = tiny("qwen3_vl")
    prompt = PROMPT_STEP
    options = Options(n=4, max_new_tokens=64)
    held = Cache(QwenVL(config), options, slots=12).nbytes
    cfg = Config("m", group=4, prompt_tokens=prompt, new_tokens=64 + SPARE_PLACES, dtype="fp32")
    said = estimate(config, cfg, Settings(slots=12), count(config, "lm", 0))
    assert held == pytest.approx(said["cache"] * 1e9)
    assert PREFILL_TOKENS["cuda"] == plan.PREFILL


# ---- the peak of a whole run
class Alive(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still there, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        for storage in (t.untyped_storage() for t in tensors):
            if storage._cdata not in self.known:
                self.count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.count, storage._cdata, -storage.nbytes())
        return out

    def count(self, which, size):
        if size >= 0:
            self.known.add(which)
        else:
            self.known.discard(which)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write("qwen3_vl", folder)
    return str(folder)


def questions(count):
    """Each with an image of its own of 48 tokens."""
    images = np.random.default_rng(0).integers(0, 255, (count, 96, 128, 3), np.uint8)
    why = "Because a is much nearer than b, as far as I can see."
    return [
        Example(str(i), "lor", [Image.fromarray(image)], "What is nearer?", "a", rationale=why)
        for i, image in enumerate(images)
    ]


@pytest.mark.parametrize(
    "script, flags",
    [
        (train_sft, {}),
        (train_sft, dict(checkpointing="always")),
        (train_sft, dict(train="lm")),
        (train_rl, {}),
        (train_rl, dict(checkpointing="always")),
        (train_rl, dict(lora=4)),
    ],
)
def test_the_peak_of_a_whole_run(checkpoint, tmp_path, monkeypatch, script, flags):
    """Two steps from loading to saving: never above the plan, and below it by at most a quarter and
    the logits' workspace, which a tiny vocabulary doesn't fill. The plan is asked for the passes
    that ran."""
    rows = questions(40)
    passes = []
    asked = []
    hidden = QwenVL.hidden
    settle = run.resolve_auto_settings

    def count_tokens(model, batch, **options):
        passes.append(len(batch.input_ids))
        return hidden(model, batch, **options)

    def listen(cfg, config, device, world, **sizes):
        asked.append((config, sizes))
        return settle(cfg, config, device, world, **sizes)

    def parity(text, example, rules):  # groups must differ
        return Scores(*[float(sum(text.encode()) % 2)] * 2, 0.0, 0.0)

    monkeypatch.setattr(QwenVL, "hidden", count_tokens)
    monkeypatch.setattr(run, "resolve_auto_settings", listen)
    monkeypatch.setattr(run, "load_data", lambda cfg, *_: (rows, []))
    monkeypatch.setattr(train_rl, "score", parity)
    # what MKL packs hides its size
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    own = dict(batch=40) if script is train_sft else dict(prompts=6, group=8, max_new_tokens=48)
    common = dict(model=checkpoint, data=(), out=str(tmp_path), steps=2, checkpointing="never")
    cfg = script.Config(**common | own | flags)
    with Alive() as memory:
        script.main(cfg)
    ((config, sizes),) = asked
    sizes["prompt_tokens"] = len(Processor.from_pretrained(checkpoint).prompt_ids(rows[0]))
    wanted = Config("", train=cfg.train, lora=cfg.lora, dtype="fp32", **sizes)
    settings = Settings(
        checkpointing=cfg.checkpointing == "always",
        lora=cfg.lora,
        micro_tokens=max(passes),
        slots=48 if script is train_rl else 0,
    )
    gb = estimate(config, wanted, settings, count(config, cfg.train, cfg.lora))
    said = gb["peak"] * 1e9
    print(
        f"{script.__name__} {flags}: {memory.peak / 1e6:.0f} MB measured, {said / 1e6:.0f} planned"
    )
    assert memory.peak <= said <= 1.25 * memory.peak + WORKSPACE


# ---- decisions
def test_7b_on_eight_gpus_of_80(configs):
    s, gb = choose(configs["Qwen2.5-VL-7B"], Config("m", gpus=8))
    assert s.shard and s.checkpointing and not s.lora and gb["peak"] <= 54


def test_3b_on_one_gpu_of_80_leaves_fifteen(configs):
    cfg = Config("m", gpus=1, group=8, prompt_tokens=1024, new_tokens=1024)
    s, gb = choose(configs["Qwen2.5-VL-3B"], cfg)
    assert not s.shard and not s.lora and s.slots >= 128 and gb["peak"] <= 65


def test_3b_on_eight_gpus_is_replicated(configs):
    s, _ = choose(configs["Qwen2.5-VL-3B"], Config("m", gpus=8))
    assert not s.shard and s.slots == 64  # 8 prompts of 8 on each


@pytest.mark.parametrize("lora", [32, None])
def test_3b_on_24_is_lora(configs, lora):
    s, gb = choose(configs["Qwen2.5-VL-3B"], Config("m", memory=24, lora=lora))
    assert s.lora == 32 and gb["peak"] < 21


def test_8b_lora_on_80(configs):
    s, gb = choose(configs["Qwen3-VL-8B"], Config("m", lora=16))
    assert s.lora == 16 and not s.shard and gb["peak"] < 60


def test_where_fp32_masters_do_not_fit_lora_is_taken(configs):
    config = configs["Qwen2.5-VL-3B"]
    assert choose(config, Config("m", memory=40))[0].lora
    assert not choose(config, Config("m", memory=80))[0].lora
    with pytest.raises(plan.NothingFits, match="nothing fits into 1 x 16 GB"):
        choose(config, Config("m", memory=16, lora=0))


def test_more_memory_never_chooses_less(configs):
    """Whatever fits still fits with more; the chosen one is within the memory less its reserve."""
    order = list(plan.candidates(Config("m")))
    places = []
    for memory in (24, 32, 48, 64, 80, 141):
        s, gb = choose(configs["Qwen2.5-VL-3B"], Config("m", memory=memory))
        assert gb["peak"] <= (memory - plan.RESERVE[0]) * (1 - plan.RESERVE[1])
        places.append(order.index(replace(s, slots=0, keep=False)))
    assert places == sorted(places, reverse=True) and len(set(places)) > 2


def test_a_tiny_model_fits_anywhere():
    cfg = Config("m", memory=4, dtype="fp32", prompts=8, prompt_tokens=100, new_tokens=64)
    s, gb = choose(tiny("qwen3_vl"), cfg)
    assert s == Settings(slots=64, keep=True) and gb["peak"] < 1


@pytest.mark.parametrize(
    "name, cfg, keep",
    [
        ("Qwen2.5-VL-3B", Config("m"), True),
        ("Qwen2.5-VL-7B", Config("m", gpus=8), True),
        ("Qwen2.5-VL-3B", Config("m", memory=66), False),
        ("Qwen2.5-VL-7B", Config("m", gpus=8, memory=58), False),
        ("Qwen3-VL-8B", Config("m", gpus=8, new_tokens=4096), False),
    ],
)
def test_the_cache_stays_where_the_update_fits_beside_it(configs, name, cfg, keep):
    """Else it is released, and the run fits all the same."""
    s, gb = choose(configs[name], cfg)
    stays = ("weights", "master and moments", "reference")
    update = ("gradients", "activations", "gathered keys", "pixels", "logits")
    both = sum(gb[part] for part in (*stays, *update, "cache", "sampler"))
    room = (cfg.memory - plan.RESERVE[0]) * (1 - plan.RESERVE[1])
    assert gb["cache kept"] >= both - 1e-9 and gb["peak"] <= room
    assert s.keep == (gb["cache kept"] <= room) == keep


# ---- the command
def test_the_command_prints_parts_and_settings(configs, capsys):
    plan.main(Config(configs["Qwen2.5-VL-7B"].folder, gpus=8))
    said = capsys.readouterr().out
    for name in (
        "8.311 B parameters",
        "weights",
        "master and moments",
        "reference",
        "cache",
        "gradients",
        "activations",
        "logits",
        "pixels",
        "peak",
        "left",
        "--shard always --checkpointing always",
        "samples at a time",
    ):
        assert name in said
    plan.main(Config(configs["Qwen2.5-VL-3B"].folder))
    said = capsys.readouterr().out
    assert "8.6 GB of host memory for the reference" in said and "stay during the update" in said
    plan.main(Config(configs["Qwen2.5-VL-3B"].folder, memory=66))
    assert "goes before the update" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, reason",
    [
        (dict(gpus=0), "--gpus 0: it has to be at least 1"),
        (dict(kl=-1.0), "--kl -1.0: it has to be at least 0"),
        (dict(lora=-2), "--lora -2: it has to be at least 0"),
        (dict(memory=0, group=0), "--memory 0: .* above 0; --group 0: .* at least 1"),
        ({}, "no config.json"),
    ],
)
def test_bad_input_is_named(tmp_path, flags, reason):
    with pytest.raises(UserError, match=reason):
        plan.main(Config(str(tmp_path), **flags))


def test_the_script_ends_in_one_line(tmp_path):
    command = [sys.executable, plan.__file__, "--model", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("plan: ")
    assert len(run.stderr.strip().splitlines()) == 1


def test_another_family_is_named(tmp_path):
    with pytest.raises(UserError, match="./none: no such directory, nor hub id"):
        plan.main(Config("./none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type 'llama' is not supported"):
        plan.main(Config(str(tmp_path)))


def test_another_family_on_the_hub_is_named(monkeypatch):
    config = AutoConfig.for_model("llama")
    monkeypatch.setattr(plan, "checkpoint_of", lambda model: model)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda model: config)
    with pytest.raises(UserError, match="someone/llama: model_type 'llama' is not supported"):
        plan.main(Config("someone/llama"))


def test_the_plan_has_the_rollout_s_slots():
    assert plan.MAX_SLOTS == MAX_SLOTS
