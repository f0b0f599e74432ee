"""Examples in, one packed Batch out: chat template, patches, region weights, point maps, mRoPE
positions.

No padding: sequences lie one behind the other, and `segments` says who may look at whom. What
several share (an image under many questions, a prompt before many completions) is packed once.

T tokens, P patches, N distinct images, R regions, E region-patch pairs, S sequences, L targets, B
examples.
"""

import itertools
import json
import os
import re
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AddedToken, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from kernels.packed_attention import upload
from model.ahead import Ahead
from model.checkpoint import CheckpointError, copy_files, read_config, read_json, resolve
from model.head3d import point_grid, read_depth
from model.region import region_weights
from srreal import Example, prompt, target

VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# A character that goes on with a word: not in scripts that write no blanks (Thai to Khmer, kana,
# Han).
LETTER = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|-")
# special tokens that may stand in a text
GROUNDING = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")
# a family's 2D box in a text, and its unit: 1/1000 of the image, or (None) a resized pixel
BOXES = {
    "qwen2_vl": ("<|box_start|>({},{}),({},{})<|box_end|>", 1000),
    "qwen2_5_vl": ('{{"bbox_2d": [{}, {}, {}, {}]}}', None),
    "qwen3_vl": ('{{"bbox_2d": [{}, {}, {}, {}]}}', 1000),
}
# in an answer: pixels of the first image
BOX_2D = re.compile(r"<2d_box>((?:[0-9.]+,){3}[0-9.]+)</2d_box>")


@dataclass
class Batch:
    # (T,) int64; image placeholders are config.image_token_id, regions the <mask> id
    input_ids: torch.Tensor
    position_ids: torch.Tensor  # (3, T) int64; mRoPE t, h, w
    # of (start, end, prefix_start, prefix_end): [start, end) is causal and sees the prefix
    segments: list
    # (P, 3, p * p) uint8, one frame, in the image processor's order (`blocks`)
    patches: torch.Tensor | None
    levels: torch.Tensor | None  # (3, 256) f32; what a byte of each channel becomes
    frames: int  # of a patch of the tower's: a still image's frame comes so many times
    image_grid_thw: torch.Tensor | None  # (N, 3) int64; stays on the host, which alone reads it
    image_at: torch.Tensor  # (placeholders,) int64; packed index of the k-th placeholder
    # (placeholders,) int64; the merger's output row that the k-th placeholder takes
    image_rows: torch.Tensor
    # (P, 3) f32 metres, camera frame, NaN where unknown; None without depth
    points: torch.Tensor | None
    region_token: torch.Tensor  # (R,) int64; packed index of the k-th <mask>
    # (E,) int64; with the next two a sparse (R, P) matrix whose rows sum to 1
    region_id: torch.Tensor
    region_patch: torch.Tensor  # (E,) int64
    region_weight: torch.Tensor  # (E,) f32
    # (R, 3) f32; truth in the camera frame of the region's own image, NaN if unknown
    centres: torch.Tensor
    sizes: torch.Tensor  # (R, 3) f32; w, h, l
    # (L,) int64; packed index of the token whose hidden state predicts targets[l]
    predict_from: torch.Tensor
    targets: torch.Tensor  # (L,) int64
    # (S+1,) int64; sequence s owns targets [cu_targets[s], cu_targets[s+1])
    cu_targets: torch.Tensor
    last: torch.Tensor  # (B,) int64; packed index of each example's last prompt token
    next_position: torch.Tensor  # (B,) int64; mRoPE position of the first token after each prompt
    arrays: tuple = field(default=(), compare=False)  # `patches` image by image, for DeviceImages

    def to(self, device, images: "DeviceImages | None" = None) -> "Batch":
        """Move what the model reads; `images` shares a step's uploads of patches between its
        batches."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "image_grid_thw"}
        if images is not None and self.arrays:
            moved["patches"] = images.patches(self.arrays)
        moved = {k: upload(v, device) for k, v in moved.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def pixels(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Normalise the patches where they lie: (P, 3 * frames * p * p), transformers'
        pixel_values.

        A byte takes its level from a table, to the bit what arithmetic in fp32 and a cast would
        give.
        """
        if self.patches is None:
            return None
        table = self.levels.to(dtype).flatten()  # (3 * 256,)
        first = torch.arange(0, len(table), 256, dtype=torch.int32, device=table.device)[:, None]
        index = (self.patches.int() + first).flatten()
        frame = table.index_select(0, index).view(*self.patches.shape[:2], 1, -1)
        return frame.expand(-1, -1, self.frames, -1).flatten(1)

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """(P, 3 * frames * p * p) f32: for transformers' models, and for tests."""
        return self.pixels(torch.float32)


class DeviceImages:
    """A step's images on the device, each uploaded once, as bytes, whoever asks: the rollout's
    prompts, the reference's passes, the update's. Whoever makes it drops it when the step ends."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.uploaded: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def patches(self, arrays: tuple) -> torch.Tensor:
        """(P, 3, p * p) uint8 of a batch's images, one behind the other."""
        return torch.cat([self._one(array) for array in arrays])

    def _one(self, array: np.ndarray) -> torch.Tensor:
        # By the array itself: a view's key holds an id(), and the image behind that may have
        # changed since.
        if id(array) not in self.uploaded:
            self.uploaded[id(array)] = array, upload(torch.from_numpy(array), self.device)
        return self.uploaded[id(array)][1]


@dataclass
class View:
    """A decoded image on its patch grid."""

    key: tuple  # equal keys: the same image with the same depth
    size: tuple[int, int]  # width, height of the original
    grid: tuple[int, int]  # rows, columns of patches
    # (rows * columns, 3, p * p) uint8; the model makes levels and frames of them
    patches: np.ndarray
    points: np.ndarray | None  # (rows * columns, 3) f32
    sources: tuple  # image and depth, kept alive so that the id()s in the key stay theirs


@dataclass
class Prompt:
    example: Example
    ids: np.ndarray  # (n,) int64, placeholders expanded
    positions: np.ndarray  # (3, n) int64
    next: int  # position after the prompt
    views: list[View]
    weights: list[np.ndarray]  # each region's, on the patches of its view
    merged: list[int]  # tokens of each view
    masks: np.ndarray  # index of each <mask>
    images_end: int  # index behind the last placeholder


class Recent:
    """A bounded memory: the oldest leave when the bytes exceed the room. Threads may share it."""

    def __init__(self, room: float, cost):
        self.room, self.cost, self.used, self.items, self.lock = room, cost, 0, {}, threading.Lock()

    def get(self, key, make):
        if (item := self.items.get(key)) is None:
            # outside of the lock, since it takes long; of two threads' work one is
            # thrown away
            made = make()
            with self.lock:
                self.used += 0 if key in self.items else self.cost(made)
                item = self.items.setdefault(key, made)
                while self.used > self.room and len(self.items) > 1:
                    self.used -= self.cost(self.items.pop(next(iter(self.items))))
        return item

    def keep(self, keys) -> None:
        """These of what there is; nothing else."""
        with self.lock:
            self.items = {key: item for key, item in self.items.items() if key in keys}
            self.used = sum(map(self.cost, self.items.values()))


@dataclass
class Decoder:
    """An image on its patch grid, and its depth's points: all that a worker process need know."""

    images: Qwen2VLImageProcessorPil
    max_pixels: int
    points: str  # "metric" | "relative"

    def __call__(self, image, depth, camera) -> tuple:
        """Size, grid, patches and points of a View; camera None: a horizontal view of 60
        degrees."""
        picture, p, merge = self._rgb(image), self.images.patch_size, self.images.merge_size
        width, height = picture.size
        least, points = self.images.size["shortest_edge"], None
        tall, wide = smart_resize(height, width, p * merge, least, self.max_pixels)
        pixels = np.asarray(picture.resize((wide, tall), self.images.resample))
        grid = tall // p, wide // p
        # (rows, columns, 3, p, p)
        cells = pixels.reshape(grid[0], p, grid[1], p, 3).transpose(0, 2, 4, 1, 3)
        patches = blocks(cells, merge).reshape(-1, 3, p * p)
        if depth is not None:
            focal = width / 2 / np.tan(np.pi / 6)
            camera = camera or (focal, focal, (width - 1) / 2, (height - 1) / 2)
            points = blocks(
                point_grid(read_depth(depth, (height, width)), camera, grid, self.points), merge
            )
        return (width, height), grid, patches, points

    def _rgb(self, image):
        image = Image.open(image) if isinstance(image, str | Path) else image
        if not isinstance(image, Image.Image):
            return image.convert("RGB")  # something that opens, and draws its marks, when asked
        if image.mode.startswith("I"):  # 16 bit: Pillow would clip all above 255 to white
            values = np.asarray(image)
            deep = image.mode != "I" or values.max() > 255
            image = Image.fromarray((values >> 8 if deep else values).astype(np.uint8))
        if image.mode != "RGB":  # transformers' way with transparency
            rgb = self.images.process_image(image, do_convert_rgb=True)  # (3, H, W)
            image = Image.fromarray(np.moveaxis(rgb, 0, -1).copy())
        return image


# ---- what a row says, on the patch grid ----


def blocks(grid: np.ndarray, merge: int) -> np.ndarray:
    """(rows, columns, ...) -> (rows * columns, ...), in the image processor's order: merge x merge
    blocks."""
    (rows, columns), rest = grid.shape[:2], grid.shape[2:]
    return (
        grid.reshape(rows // merge, merge, -1, merge, *rest)
        .swapaxes(1, 2)
        .reshape(rows * columns, *rest)
    )


def point_rows(views: list[View]) -> torch.Tensor | None:
    """(P, 3) of all views, NaN for those without depth; None if none has any."""
    if all(view.points is None for view in views):
        return None
    unknown = [np.full((len(view.patches), 3), np.nan, np.float32) for view in views]
    rows = [
        u if view.points is None else view.points for u, view in zip(unknown, views, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def recorded_points(files: Path, wanted: str | None) -> str:
    """The kind of point map that the checkpoint was trained with; mixing is refused."""
    path, recorded = files / "spatial.safetensors", None
    if path.is_file():
        try:
            with safe_open(path, framework="np") as file:
                recorded = (file.metadata() or {}).get("points")
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); copy it again"
            ) from error
    if recorded and wanted not in (None, recorded):
        raise ValueError(f"{files}: trained with {recorded} point maps, asked for {wanted}")
    return wanted or recorded or "metric"


def image_settings(files: Path) -> list[tuple]:
    """(file, its content, the image processor's part of it) of each file that has one: newer ones
    nest it."""
    paths = [files / f"{name}_config.json" for name in ("preprocessor", "processor")]
    whole = {path: read_json(path) for path in paths if path.is_file()}
    parts = [
        (path, v, v if path == paths[0] else v.get("image_processor")) for path, v in whole.items()
    ]
    return [part for part in parts if part[2]]


def check_files(files: Path) -> None:
    """Where files are missing, transformers makes an empty tokenizer, or explains itself in a
    paragraph."""
    held = {path.name for path in files.iterdir()}
    held |= {"tokenizer.json"} if {"vocab.json", "merges.txt"} <= held else set()
    held |= {"preprocessor_config.json"} if image_settings(files) else set()
    for name in ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json"):
        if name not in held:
            raise CheckpointError(f"{files}: no {name}; copy it from the original checkpoint")
    for path in files.glob("tokenizer*.json"):  # transformers' error on a torn one names no file
        read_json(path)


def plain(region):
    """A mask in any form (tensor, nested lists) as a bool array; a box as it is."""
    return np.asarray(region) != 0 if np.ndim(region) == 2 else region


def identity(source):
    """Of a file its path, size and time of change; of an object what holds within a call."""
    if not isinstance(source, str | Path):
        return id(source)
    state = os.stat(source)
    return str(source), state.st_size, state.st_mtime_ns


def object_of(text: str, table: dict) -> str | None:
    """The table's longest mention, in whole words, that the text ends with; case and brackets don't
    count."""
    bare = lambda s: re.sub(r"\W+$", "", s.strip().lower())  # noqa: E731
    inside = lambda s, at: at > 0 and LETTER.match(s, at - 1) and LETTER.match(s, at)  # noqa: E731
    text = bare(text)
    fits = [
        m
        for m in table
        if (k := bare(m)) and text.endswith(k) and not inside(text, len(text) - len(k))
    ]
    return max(fits, key=len, default=None)


def truths(example: Example) -> list:
    """Per region (centre in its own image's camera frame, size), NaN where unknown."""
    unknown, found = (np.nan,) * 3, []
    for (view, _), text in zip(example.regions, example.question.split("<mask>"), strict=False):
        mention = object_of(text, example.objects)
        centre = example.objects.get(mention)
        if isinstance(centre, dict):
            centre = centre.get(view)
        elif len(example.images) > 1 and view != example.frame:
            # one triple for several views lies in the frame that the question asks
            # for
            centre = None
        found.append(
            (unknown if centre is None else centre, (example.sizes or {}).get(mention) or unknown)
        )
    return found


# ---- packing ----


def rope_positions(length: int, slots, merged) -> tuple[np.ndarray, int]:
    """mRoPE of a turn of `length` tokens whose `slots` expand to grids (rows, columns) -> (3, n),
    the next.

    Text counts up in all axes; an image's tokens hold (start, start + row, start + column), and
    what follows goes on at start + max(rows, columns)."""
    pieces, done, at = [], 0, 0
    for slot, (rows, columns) in zip(slots, merged, strict=True):
        pieces += [np.tile(np.arange(at, at + slot - done), (3, 1))]
        pieces += [np.indices((1, rows, columns)).reshape(3, -1) + at + slot - done]
        done, at = slot + 1, at + slot - done + max(rows, columns)
    end = int(at + length - done)
    return np.concatenate([*pieces, np.tile(np.arange(at, end), (3, 1))], 1), end


def groups(prompts: list[Prompt], completions: list) -> list:
    """Runs of (prompt, completions) that may share a prefix: neighbours with equal images, one
    each."""
    pairs = list(zip(prompts, completions, strict=True))
    keys = [
        [v.key for v in p.views] if p.views and len(c) == 1 else i for i, (p, c) in enumerate(pairs)
    ]
    return [
        [pairs[i] for i in run] for _, run in itertools.groupby(range(len(pairs)), keys.__getitem__)
    ]


def shared(group: list) -> int:
    """Length of the group's common prefix: all images or nothing; no <mask> (the regions
    differ)."""
    if len(group) == 1:
        # an RL group shares its whole prompt
        return len(group[0][0].ids) if len(group[0][1]) > 1 else 0
    limit = min(min([len(p.ids) - 1, *p.masks[:1]]) for p, _ in group)
    ids = np.stack([p.ids[:limit] for p, _ in group])
    cut = int(np.append(ids != ids[0], np.ones((len(ids), 1), bool), 1).any(0).argmax())
    return cut if cut >= max(p.images_end for p, _ in group) else 0


class Pack:
    """A Batch in the making: pieces of tokens, one behind the other."""

    def __init__(self, first: dict):
        self.first, self.length, self.ends = first, 0, [0]  # view key -> (first patch, first row)
        self.ids, self.positions, self.segments, self.rows, self.regions, self.truths = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.predict_from, self.targets, self.last, self.next = [], [], [], []

    def add(self, ids, positions, prefix=(0, 0)) -> int:
        start, self.length = self.length, self.length + len(ids)
        if len(ids):  # a completion of one token has no input of its own
            self.ids.append(ids)
            self.positions.append(positions)
            self.segments.append((start, self.length, *prefix))
        return start

    def add_group(self, group: list) -> None:
        """Prompts with a common prefix, each with its completions."""
        head, cut = group[0][0], shared(group)
        base = self.add(head.ids[:cut], head.positions[:, :cut])
        for p, completions in group:
            # token i of a prompt is at base + i in the prefix, behind it at own + i
            own = self.length - cut
            packed = [base + i if i < cut else own + i for i in (*p.masks, len(p.ids) - 1)]
            if cut == 0 or p is head:
                starts = [self.first[view.key][1] for view in p.views]
                self.rows += [
                    start + np.arange(n) for start, n in zip(starts, p.merged, strict=True)
                ]
            for c in completions or [np.empty(0, np.int64)]:
                after = np.tile(np.arange(p.next, p.next + len(c) - 1), (3, 1))
                positions = np.concatenate([p.positions[:, cut:], after], 1)
                start = self.add(
                    np.concatenate([p.ids[cut:], c[:-1]]), positions, (base, base + cut)
                )
                if completions:
                    behind = start + len(p.ids) - cut
                    self.predict_from += [
                        packed[-1:][: len(c)],
                        np.arange(behind, behind + len(c) - 1),
                    ]
                    self.targets.append(c)
                    self.ends.append(self.ends[-1] + len(c))
            self.last.append(packed[-1])
            self.next.append(p.next)
            for at, (n, _), weights in zip(packed[:-1], p.example.regions, p.weights, strict=False):
                self.regions.append((at, self.first[p.views[n].key][0], weights))
            self.truths += truths(p.example)[: len(p.masks)]


class Processor:
    """Attributes: tokenizer, config, mask_id, image_token_id, end_ids, banned (bool [V]: ids never
    sampled), max_pixels, regions ("token" | "text"), points ("metric" | "relative"), files (the
    source's directory), assumed_fov (how many images were decoded with depth but without
    intrinsics)."""

    @classmethod
    def from_pretrained(
        cls, source, max_pixels=None, regions="token", points=None, workers=0
    ) -> "Processor":
        return cls(resolve(str(source)), max_pixels, regions, points, workers)

    def __init__(self, files: Path, max_pixels=None, regions="token", points=None, workers=0):
        assert regions in ("token", "text") and points in (None, "metric", "relative"), (
            regions,
            points,
        )
        self.files, self.regions, self.points = files, regions, recorded_points(files, points)
        self.config = read_config(files)
        check_files(files)
        self.tokenizer = AutoTokenizer.from_pretrained(files)
        self.images = images = Qwen2VLImageProcessorPil.from_pretrained(files)
        self.resized, self.max_pixels = (
            max_pixels is not None,
            max_pixels or images.size["longest_edge"],
        )
        least = min(images.size["shortest_edge"], self.max_pixels)
        images.size = {"shortest_edge": least, "longest_edge": self.max_pixels}
        # (3, 256, 1): every pixel value
        values = np.tile(np.arange(256, dtype=np.uint8)[:, None], (3, 1, 1))
        values = images.rescale(values, images.rescale_factor)
        levels = images.normalize(values, images.image_mean, images.image_std)[..., 0]
        self.levels = torch.from_numpy(levels).float()  # (3, 256)
        self.image_token_id, self.assumed_fov = self.config.image_token_id, 0
        self.turns = Recent(32e6, lambda ids: 2 * ids.nbytes)
        cost = lambda view: 2 * view.patches.nbytes  # noqa: E731  and some for what the sources hold
        self.views, self.held, self.expected = Recent(256e6, cost), Recent(4e9, cost), {}
        self.ahead = Ahead(Decoder(images, self.max_pixels, self.points), workers)
        self._read_tokens()

    def _read_tokens(self):
        """`<mask>` takes the vocabulary's first spare row. What ends a turn; what is banned; the
        template."""
        tokenizer, config, rows = (
            self.tokenizer,
            self.config,
            self.config.get_text_config().vocab_size,
        )
        tokenizer.add_tokens(
            [AddedToken("<mask>", special=True, normalized=False)], special_tokens=True
        )
        vocab = tokenizer.get_vocab()
        self.mask_id = vocab["<mask>"]
        if self.mask_id >= rows:
            raise ValueError(
                f"{self.files}: no row for <mask>: {len(vocab) - 1} tokens, {rows} embeddings"
            )
        path, eos = self.files / "generation_config.json", tokenizer.eos_token_id
        end = (read_json(path) if path.is_file() else {}).get("eos_token_id")
        end = eos if end in (None, []) else end  # 0 is an id
        self.end_ids = end if isinstance(end, list) else [end]
        self.end_id = eos if eos in self.end_ids else self.end_ids[0]  # the one that closes a turn
        self.banned = torch.ones(rows, dtype=torch.bool)
        self.banned[[i for i in vocab.values() if i < rows]] = False
        never = [vocab[t] for t in VISION if t in vocab]
        self.banned[[self.mask_id, config.image_token_id, config.video_token_id, *never]] = True
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} - {
            "<mask>"
        }
        special = sorted(t for t in special if not GROUNDING.fullmatch(t))
        # (?!) matches nothing
        self.control = re.compile("|".join(map(re.escape, special)) or "(?!)")
        legacy = self.files / "chat_template.json"
        if tokenizer.chat_template is None and legacy.is_file():
            tokenizer.chat_template = read_json(legacy).get("chat_template")
        if not (tokenizer.chat_template or "").strip():
            raise CheckpointError(f"{self.files}: no chat_template.jinja, nor an older form of it")

    # ---- text ----

    def encode(self, text: str) -> np.ndarray:
        return np.array(
            self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64
        )

    def decode(self, tokens) -> str:
        """The text without the end tokens behind it; every other token stays, `<think>` too."""
        tokens = [int(t) for t in tokens]
        while tokens and tokens[-1] in self.end_ids:
            tokens.pop()
        return self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)

    def target_ids(self, example: Example) -> list[int]:
        text = target(example)
        if BOX_2D.search(text):
            view = self._view(example, 0, {})
            text = BOX_2D.sub(lambda match: self._box(map(float, match[1].split(",")), view), text)
        self._check(example, text, "target", masks=0)
        return [*self.encode(text).tolist(), self.end_id]

    def prompt_ids(self, example: Example) -> list[int]:
        return self._prompt(example, {}).ids.tolist()

    def _check(self, example, text, what, masks):
        """A text must not end its own turn or open an image: a row that holds a control token is
        refused."""
        if found := self.control.search(text):
            raise ValueError(f"{example.id}: the {what} holds the control token {found.group()}")
        if (count := text.count("<mask>")) != masks:
            raise ValueError(
                f"{example.id}: {count} <mask> in the {what}, {masks} wanted (one a region)"
            )

    def _turn(self, text, images):
        """Ids of the rendered user turn, one placeholder an image; a Thinking template's `<think>`
        is cut."""
        parts = text.split("<image>") if "<image>" in text else [""] * images + [text]
        content = [{"type": "text", "text": parts[0]}]
        for part in parts[1:]:
            content += [{"type": "image"}, {"type": "text", "text": part}]
        chat = [{"role": "user", "content": [item for item in content if item.get("text") != ""]}]
        rendered = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        return self.encode(re.sub(r"<think>\s*$", "", rendered))

    def _prompt(self, example, seen):
        text, merge = prompt(example), self.images.merge_size
        self._check(example, text, "question", len(example.regions))
        if (count := text.count("<image>")) not in (0, len(example.images)):
            raise ValueError(
                f"{example.id}: {count} <image> in the question, {len(example.images)} images"
            )
        if not all(0 <= index < len(example.images) for index, _ in example.regions):
            raise ValueError(f"{example.id}: a region lies on an image that is not there")
        views = [self._view(example, i, seen) for i in range(len(example.images))]
        weights = self._weights(example, views)
        if self.regions == "text":
            text = self._write_boxes(example, text, views)
        turn = self.turns.get((text, len(views)), lambda: self._turn(text, len(views)))
        slots = np.flatnonzero(turn == self.image_token_id)
        merged = [(view.grid[0] // merge, view.grid[1] // merge) for view in views]
        counts = np.ones(len(turn), np.int64)
        # fails if the template lost an image
        counts[slots] = [rows * columns for rows, columns in merged]
        ids = np.repeat(turn, counts)
        positions, after = rope_positions(len(turn), slots, merged)
        end, masks = (
            int(counts[: slots[-1] + 1].sum()) if views else 0,
            np.flatnonzero(ids == self.mask_id),
        )
        return Prompt(
            example, ids, positions, after, views, weights, counts[slots].tolist(), masks, end
        )

    def _weights(self, example, views):
        """Each region's area weights on its image's patches, in their packed order."""
        weights = []
        for k, (index, region) in enumerate(example.regions):
            try:
                grid = region_weights(plain(region), views[index].size, views[index].grid)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{example.id}: region {k}: {error}") from error
            weights.append(blocks(grid, self.images.merge_size))
        return weights

    def _write_boxes(self, example, text, views):
        """Each <mask> as a 2D box in the family's convention; of several images, behind its
        number."""
        pieces = text.split("<mask>")
        for k, (index, region) in enumerate(example.regions):
            if np.ndim(region := plain(region)) == 2:
                ys, xs = np.nonzero(region)
                region = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            box = self._box(region, views[index])
            pieces[k] += f"image {index} {box}" if len(views) > 1 else box
        return "".join(pieces)

    def _box(self, box, view):
        """(x0, y0, x1, y1) original pixels as the family writes a box: in 1/1000, or in resized
        pixels."""
        (form, scale), p = BOXES[self.config.model_type], self.images.patch_size
        (rows, columns), (width, height) = view.grid, view.size
        units = ((scale or columns * p) / width, (scale or rows * p) / height) * 2
        box = np.clip([float(v) for v in box], 0, (width, height) * 2) * units
        return form.format(*(round(v) for v in box.tolist()))

    # ---- images ----

    def expect(self, examples: list[Example]) -> None:
        """These come next, in this order: the workers make their images ahead, each once, and they
        are kept until the next call, which lets go of all that it does not name."""
        wanted = {}  # with its sources, so that the id()s in the keys stay theirs
        for example in examples:
            for index in range(len(example.images)):
                with suppress(OSError):  # that a file isn't there is said when it is asked for
                    key, *sources = self._source(example, index)
                    wanted[key] = sources
        self.expected = wanted
        self.held.keep(wanted)
        for key in wanted:
            if view := self.views.items.get(key):
                self.held.get(key, lambda view=view: view)
        self.ahead.expect({k: sources for k, sources in wanted.items() if k not in self.held.items})

    def _source(self, example, index):
        """(key, image, depth, camera): what a Decoder takes, and what identifies it."""
        image = example.images[index]
        depth, camera = (
            each[index] if each else None for each in (example.depths, example.intrinsics)
        )
        camera = None if depth is None or camera is None else tuple(camera)
        return (identity(image), identity(depth), camera), image, depth, camera

    def _view(self, example, index, seen):
        """From files: kept for later calls. From objects, which may change: for this call (`seen`),
        or for as long as they are expected."""
        try:
            key, *sources = self._source(example, index)
            if key not in seen:
                make = lambda: self._decode(key, sources)  # noqa: E731
                files = all(isinstance(source, str | Path | None) for source in sources[:2])
                keep = (lambda: self.views.get(key, make)) if files else make
                seen[key] = self.held.get(key, keep) if key in self.expected else keep()
            return seen[key]
        except Exception as error:  # Pillow's are many; what the user needs is the row and the file
            sources = example.images[index], example.depths and example.depths[index]
            names = [s if isinstance(s, str | Path | None) else type(s).__name__ for s in sources]
            where = f"{example.id}: image {index} ({names[0]}, depth {names[1]})"
            raise ValueError(f"{where}: {error}") from error

    def _decode(self, key, sources):
        image, depth, camera = sources
        if depth is not None and camera is None:
            if not self.assumed_fov and self.points == "metric":
                print("Depth without intrinsics: a view of 60 degrees is assumed.", file=sys.stderr)
            self.assumed_fov += 1
        return View(key, *self.ahead.take(key, sources), (image, depth))

    # ---- batch ----

    def __call__(
        self, examples: list[Example], completions: list[list[list[int]]] | None = None
    ) -> Batch:
        """Prompts only; or with completions, per example a list of token-id lists (end token
        included).

        One each (SFT): neighbours with the same images share the prompt up to where their texts
        part. Several (an RL group) share all of it. The last token of a completion is a target,
        never an input."""
        seen = {}
        prompts = [self._prompt(example, seen) for example in examples]
        completions = [[]] * len(prompts) if completions is None else completions
        completions = [[np.asarray(c, np.int64) for c in several] for several in completions]
        views = list({view.key: view for p in prompts for view in p.views}.values())
        first = np.cumsum([0, *(len(view.patches) for view in views)]).tolist()
        area = self.images.merge_size**2
        pack = Pack({view.key: (at, at // area) for view, at in zip(views, first, strict=False)})
        for group in groups(prompts, completions):
            pack.add_group(group)
        return self._batch(pack, views)

    def _batch(self, pack, views):
        ints = lambda arrays: torch.from_numpy(np.concatenate([[], *arrays]).astype(np.int64))  # noqa: E731
        truth = torch.tensor(pack.truths, dtype=torch.float32).reshape(-1, 2, 3)
        cells = [np.flatnonzero(weights) for *_, weights in pack.regions]
        pairs = list(zip(cells, pack.regions, strict=True))
        input_ids = ints(pack.ids)
        return Batch(
            input_ids=input_ids,
            segments=pack.segments,
            arrays=tuple(view.patches for view in views),
            position_ids=torch.from_numpy(
                np.concatenate([np.empty((3, 0), np.int64), *pack.positions], 1)
            ),
            patches=torch.from_numpy(np.concatenate([view.patches for view in views]))
            if views
            else None,
            levels=self.levels if views else None,
            frames=self.images.temporal_patch_size,
            image_grid_thw=torch.tensor([(1, *view.grid) for view in views]) if views else None,
            image_at=(input_ids == self.image_token_id).nonzero()[:, 0],
            image_rows=ints(pack.rows),
            points=point_rows(views),
            region_token=ints([[at] for at, *_ in pack.regions]),
            region_id=ints([np.full(len(c), k) for k, c in enumerate(cells)]),
            region_patch=ints([c + start for c, (_, start, _) in pairs]),
            region_weight=torch.from_numpy(
                np.concatenate([[], *(w[c] for c, (*_, w) in pairs)])
            ).float(),
            centres=truth[:, 0],
            sizes=truth[:, 1],
            predict_from=ints(pack.predict_from),
            targets=ints(pack.targets),
            cu_targets=ints([pack.ends]),
            last=ints([pack.last]),
            next_position=ints([pack.next]),
        )

    def save(self, directory) -> None:
        """The tokenizer with <mask>, and the source's files but for weights; max_pixels where it
        was set."""
        copy_files(self.files, Path(directory))
        self.tokenizer.save_pretrained(directory)
        least, most = self.images.size.values()
        for path, content, settings in image_settings(Path(directory)) if self.resized else ():
            # where they stand, they win over `size`
            older = {"min_pixels": least, "max_pixels": most}
            settings.update(
                {k: v for k, v in older.items() if settings.get(k)}, size=dict(self.images.size)
            )
            path.write_text(json.dumps(content, indent=2) + "\n")
