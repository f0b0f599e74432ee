"""step-000123/: a checkpoint that transformers loads, and trainer/ with what a resumed run needs.

    trainer/master, exp_avg, exp_avg_sq, momentum_buffer .safetensors    by full parameter names
    trainer/random.safetensors    random states
    trainer/state.json            step, rows taken from the data, updates, what the run must not
                                  change, sizes of all files

A step is written aside and renamed, so that it is whole or not there. It resumes to the bit on a
CPU, on any number of ranks.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from errors import UserError
from model import checkpoint as model_checkpoint
from model.checkpoint import PARTS, save_tensors
from model.files import check_readable, missing_file
from model.qwen_vl import QwenVL
from srreal import Example
from training import folder, ranks
from training.optim import KINDS, Optimizer, whole
from training.policy import compute_dtype, reshard


def find_start(cfg) -> tuple[Path | None, int]:
    """Return (the checkpoint to go on from or None, steps done); nothing is written.

    UserError where --out holds a run that is not to be resumed, or can't be.
    """
    out = Path(cfg.out)
    held = what_it_holds(out)
    if held and not cfg.resume:
        raise UserError(f"{out} holds a run ({held}) already: --resume it, or choose another --out")
    # By flags first: it takes no more than a file, and says most.
    if held:
        folder.refuse_other_flags(cfg)
    found = newest(out) if cfg.resume else None
    done = read_state(found)["step"] if found else 0
    # Ranks that see another disk would train from different steps, and never say so.
    most = ranks.all_reduce([done], "MAX")[0]
    least = ranks.all_reduce([done], "MIN")[0]
    if most != least:
        raise UserError(
            f"{out}: the ranks find different checkpoints in it; --out has to be on a shared disk"
        )
    if held and not found:
        raise UserError(
            f"{out} holds a run ({held}), but no whole checkpoint to go on from: move {out} away "
            "to start again, or choose another --out"
        )
    if found and done >= cfg.steps:
        ranks.say(f"{found} is the last of {cfg.steps} steps: there is nothing to do")
    elif found:
        ranks.say(f"going on from {found}")
    elif cfg.resume:
        ranks.say(f"there is no run in {out}: starting at step 0")
    return found, done


def what_it_holds(out: Path) -> str:
    """Return what a run has left in the folder; "": nothing that could be lost."""
    rows = folder.whole_rows(out / "metrics.jsonl")
    if rows:
        return f"metrics.jsonl, {len(rows)} steps"
    steps = sorted(out.glob("step-*"))
    return steps[-1].name if steps else ""


def step_folders(out: Path) -> list[Path]:
    return sorted(out.glob("step-*[0-9]"))


def fingerprint(examples: Sequence[Example]) -> str:
    """Return what a checkpoint keeps of the data set, to refuse to resume on another."""
    # Images are left out: to read all of them would take minutes.
    digest = hashlib.sha256()
    for e in examples:
        row = (e.id, e.path, e.question, e.answer, e.rationale)
        # repr, so that no two rows look alike where one field's end is the next one's start.
        digest.update(repr(row).encode())
    return f"{len(examples)} rows, sha256 {digest.hexdigest()[:16]}"


def save(cfg, step: int, rows: int, model: QwenVL, processor, optimizer: Optimizer, **same) -> None:
    """Write out/step-000123. Rank 0 writes, but gathering is collective.

    rows: how many the run has taken from the data; same: name -> what a resumed run must have again
    (`restore`). UserError on all ranks where it can't be written; nothing stays of it.
    """
    # A name that no reader takes for a checkpoint, until the last file is on the disk.
    final = Path(cfg.out) / f"step-{step:06d}"
    aside = final.with_suffix(".partial")
    note_learnt(model, processor, optimizer)
    trainer = aside / "trainer"
    # Collective: with shards every rank sends its own, whoever writes.
    weights = gather_weights(model)
    # A full disk must not keep this rank from what it gathers with the others: it is said later.
    problem = None
    if ranks.is_first():
        problem = folder.attempt(final, write_model, aside, weights, model, processor)
    del weights  # before the moments come: they are twice as large
    for kind in KINDS:
        state = {}
        for name, full in optimizer.state(kind):
            if ranks.is_first():
                # A parameter at a time on the device; the host holds all of one kind, fp32.
                state[name] = full.cpu()
        if ranks.is_first() and problem is None:
            problem = folder.attempt(final, save_tensors, state, trainer / f"{kind}.safetensors")
    if ranks.is_first() and problem is None:
        record = {"step": step, "rows": rows, "updates": optimizer.updates, "same": same}
        problem = folder.attempt(final, finish, aside, final, record, cfg.keep)
    if problem:
        shutil.rmtree(aside, ignore_errors=True)
        kept = newest(final.parent, say_skipped=False)
        then = f"--resume goes on from {kept}" if kept else "no checkpoint was saved before"
        problem = f"{problem}; {then}"
    # Nobody goes on before it is there.
    ranks.raise_together(problem)
    ranks.say(f"saved {final.name}")


def write_model(aside: Path, weights: dict, model: QwenVL, processor) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "trainer").mkdir(parents=True)
    model_checkpoint.write(aside, weights, model.origin, processor)


def finish(aside: Path, final: Path, record: dict, keep: int) -> None:
    """Write what is left of a checkpoint, and give it its name; take old ones' trainer/ away."""
    save_tensors({"torch": torch.get_rng_state()}, aside / "trainer" / "random.safetensors")
    write_state(aside, record)
    model_checkpoint.replace(aside, final)
    if keep:
        steps = step_folders(final.parent)
        # Behind it stand incomplete ones alone: the run went on from one before them.
        up_to_this = steps[: steps.index(final) + 1]
        for old in up_to_this[:-keep]:
            # The weights stay: they are a checkpoint to evaluate, though not to go on from.
            shutil.rmtree(old / "trainer", ignore_errors=True)


def note_learnt(model: QwenVL, processor, optimizer: Optimizer) -> None:
    """Put on the model's record how it reads regions now, and which parts have learnt. Collective.

    A part has learnt if a gradient of it was not zero: what --train leaves out doesn't count, nor a
    loss of weight 0, nor depth that no row has.
    """
    record = model.record
    learnt = [optimizer.has_learnt(f"{part}.") for part in PARTS]
    # A rank whose rows had no depth has heard nothing of the point map, and one whose rows had no
    # region has read none; another may have.
    *learnt, has_read_regions = ranks.all_reduce([*learnt, processor.has_read_regions], "MAX")
    if record.trained is not None:
        record.trained.update(part for part, flag in zip(PARTS, learnt, strict=True) if flag)
    if has_read_regions:
        record.regions = processor.regions


def gather_weights(model: QwenVL) -> dict[str, torch.Tensor]:
    """Return the whole weights by name on the first rank's host, {} on others. Collective."""
    reshard(model)
    weights = {}
    for name, p in model.named_parameters():
        # Cast before it is gathered: in bf16 half the bytes travel between ranks.
        full = whole(p.detach().to(compute_dtype(p.device)))
        if ranks.is_first():
            weights[name] = full.cpu()
    return weights


def write_state(aside: Path, record: dict) -> None:
    files = {}
    for path in aside.rglob("*"):
        if path.is_file():
            # state.json itself isn't there yet: it is written last, and its presence says that all
            # is.
            files[str(path.relative_to(aside))] = path.stat().st_size
    state = {**record, "ranks": ranks.world_size(), "files": files}
    text = json.dumps(state, indent=1, allow_nan=False)
    (aside / "trainer" / "state.json").write_text(text)


def restore(checkpoint: Path | None, optimizer: Optimizer, **same) -> int:
    """Restore optimiser, masters and random states; return the rows taken from the data so far.

    checkpoint None: a new run, nothing to do.

    UserError where `same` differs from what `save` was given, or a file is torn.
    """
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    for key, now in same.items():
        then = state["same"][key]
        if then != now:
            raise UserError(f"{checkpoint}: the run had {key} {then}, now it is {now}")
    world = ranks.world_size()
    before = state["ranks"]
    if before != world:
        ranks.say(f"going on with {world} ranks after {before}: the same run, but not to the bit")
    trainer = checkpoint / "trainer"
    check_readable(trainer)
    try:
        # Opened, not read: whole tensors come one at a time, and each rank keeps its part.
        files = {kind: safe_open(trainer / f"{kind}.safetensors", "pt") for kind in KINDS}
        random_states = safe_open(trainer / "random.safetensors", "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{trainer}: {error}") from error
    optimizer.load(lambda kind, name: files[kind].get_tensor(name), state["updates"])
    torch.set_rng_state(random_states.get_tensor("torch"))
    return state["rows"]


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer" / "state.json").read_text())


def newest(out: Path, say_skipped: bool = True) -> Path | None:
    """Return the newest whole checkpoint of a run; name the incomplete ones that are skipped."""
    for step in sorted(out.glob("step-*"), key=lambda path: path.name, reverse=True):
        lack = missing_file(step)
        # step-000123.partial may be whole as well, but was never renamed.
        if lack is None and not step.suffix:
            return step
        if say_skipped:
            ranks.say(f"skipping the incomplete checkpoint {step}: {lack or 'never renamed'}")
    return None
