"""Prompts and completions packed into one Batch: what a forward of the model reads.

No padding: sequences lie one behind the other, and `segments` says who may look at whom. What
several share (an image under many questions, a prompt before many completions) is packed once:

    [ prompt ][ completion 1 ][ completion 2 ] ...     each completion sees the prompt and itself
    [ images, begin of the text ][ question 1, its answer ][ question 2, its answer ] ...

T tokens, P patches, N distinct images, M image tokens (placeholders), R regions, E region-patch
pairs, S sequences (completions), L targets, B prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from kernels.packed_attention import Segment, upload
from model.images import DeviceImages, View
from srreal import Example

NO_INDEX = torch.zeros(0, dtype=torch.int64)
NO_WEIGHT = torch.zeros(0)
NO_VECTOR = torch.zeros(0, 3)


@dataclass
class Batch:
    """One forward's input. Indices are int64, other numbers fp32."""

    # Tokens. Images are config.image_token_id, once a merged token, and regions are <mask>.
    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (3, T) mRoPE: time, row, column
    # (start, end, prefix_start, prefix_end): tokens [start, end) see the prefix and, causally, each
    # other.
    segments: list[Segment]

    # Images. A still image's frame stands for every frame of a patch.
    patches: Tensor | None = None  # (P, 3, p * p) uint8, in the image processor's order
    levels: Tensor | None = None  # (3, 256); what a byte of each channel becomes
    frames: int = 0  # of a patch
    image_grid_thw: Tensor | None = None  # (N, 3); stays on the host, which alone reads it
    points: Tensor | None = None  # (P, 3) metres, camera frame, NaN where unknown
    image_at: Tensor = NO_INDEX  # (M,) where the placeholders are in T
    image_rows: Tensor = NO_INDEX  # (M,) merged token that each one takes

    # Regions, as a sparse (R, P) matrix whose rows sum to 1, and what is known about them.
    region_token: Tensor = NO_INDEX  # (R,) where the <mask>s are in T
    region_id: Tensor = NO_INDEX  # (E,)
    region_patch: Tensor = NO_INDEX  # (E,)
    region_weight: Tensor = NO_WEIGHT  # (E,)
    # Truth in the camera frame of the region's own image: x, y, z; w, h, l. NaN if unknown.
    centres: Tensor = NO_VECTOR  # (R, 3) metres
    sizes: Tensor = NO_VECTOR  # (R, 3) metres

    # Targets: the tokens of the completions. Sequence s owns [cu_targets[s], cu_targets[s + 1]).
    predict_from: Tensor = NO_INDEX  # (L,) the token that predicts each
    targets: Tensor = NO_INDEX  # (L,)
    cu_targets: Tensor = NO_INDEX  # (S + 1,)

    # Prompts.
    last: Tensor = NO_INDEX  # (B,) where each one's last token is
    next_position: Tensor = NO_INDEX  # (B,) mRoPE position behind it

    # `patches` image by image, for DeviceImages.
    arrays: tuple[np.ndarray, ...] = field(default=(), compare=False)

    def to(self, device, images: DeviceImages | None = None) -> "Batch":
        """Move what the model reads; `images` shares a step's uploads between its batches."""
        moved = {}
        if images is not None and self.arrays:
            moved["patches"] = images.patches(self.arrays)
        for entry in fields(self):
            value = getattr(self, entry.name)
            stays = entry.name in moved or entry.name == "image_grid_thw"
            if isinstance(value, Tensor) and not stays:
                moved[entry.name] = upload(value, device)
        return replace(self, **moved)

    def pixels(self, dtype: torch.dtype) -> Tensor | None:
        """Normalise the patches where they lie: transformers' pixel_values.

        Returns (P, 3 * frames * p * p). A byte takes its level from a table, to the bit what
        arithmetic in fp32 and a cast would give.
        """
        if self.patches is None:
            return None
        table = self.levels.to(dtype).flatten()  # (3 * 256,)
        # Each channel has its own 256 levels in the table. int32, as there is an index a pixel.
        first = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=table.device)
        index = self.patches.int() + first[:, None]
        frame = table.index_select(0, index.flatten())
        frame = frame.view(*self.patches.shape[:2], 1, -1)  # (P, 3, 1, p * p)
        return frame.expand(-1, -1, self.frames, -1).flatten(1)

    @property
    def pixel_values(self) -> Tensor | None:
        """(P, 3 * frames * p * p) fp32: for transformers' models, and for tests."""
        return self.pixels(torch.float32)


# ---- mRoPE positions


def mrope_positions(length: int, slots, grids) -> tuple[np.ndarray, int]:
    """Give a turn of `length` tokens its positions: (3, n), and the position behind it.

    The tokens at `slots` are images, each of a grid (rows, columns) of merged tokens. Text counts
    up on all three axes; an image's tokens hold (start, start + row, start + column), and what
    follows goes on at start + max(rows, columns).
    """
    pieces = []
    token = 0
    position = 0
    for slot, (rows, columns) in zip(slots, grids, strict=True):
        text = int(slot) - token
        pieces.append(text_positions(position, text))
        position += text
        pieces.append(np.indices((1, rows, columns)).reshape(3, -1) + position)
        position += max(rows, columns)
        token = int(slot) + 1
    text = length - token
    pieces.append(text_positions(position, text))
    return np.concatenate(pieces, 1), position + text


def text_positions(start: int, count: int) -> np.ndarray:
    """Count up from `start` on all three axes: (3, count)."""
    return np.tile(np.arange(start, start + count), (3, 1))


def expanded_positions(is_image: list[bool], grids: Iterator[list[int]], merge: int) -> Tensor:
    """Give positions (3, T) to a sequence whose placeholders are expanded already.

    grids yields (frames, rows, columns) in patches for every image.
    """
    slots = []
    merged_grids = []
    token = 0
    # Placeholders beyond one an image, so far.
    extra = 0
    while token < len(is_image):
        if not is_image[token]:
            token += 1
            continue
        _, rows, columns = next(grids)
        rows //= merge
        columns //= merge
        slots.append(token - extra)
        merged_grids.append((rows, columns))
        token += rows * columns
        extra += rows * columns - 1
    positions, _ = mrope_positions(len(is_image) - extra, slots, merged_grids)
    return torch.from_numpy(positions)


# ---- Prompts


@dataclass
class Region:
    """A region of a prompt: its token, its patches, and the truth about its object."""

    index: int  # of its <mask> in the prompt's ids
    view: int  # of the prompt's views
    weights: np.ndarray  # (P,) of the view's patches, sum 1
    centre: tuple  # x, y, z metres in the view's camera frame; NaN if unknown
    size: tuple  # w, h, l metres; NaN if unknown


@dataclass
class Prompt:
    """An example as the model reads it. It may be packed any number of times."""

    example: Example
    ids: np.ndarray  # (n,) int64, placeholders expanded
    positions: np.ndarray  # (3, n) int64
    next_position: int  # of the first token behind it
    views: list[View]
    images_end: int  # index behind the last placeholder
    regions: list[Region]

    @property
    def image_keys(self) -> list[tuple]:
        """The keys of its images, in their order: equal ones are the same images."""
        return [view.key for view in self.views]


# ---- Packing


def pack(
    prompts: list[Prompt],
    completions: list[list[list[int]]] | None = None,
    *,
    image_token_id: int,
    merge: int,
    frames: int,
    levels: Tensor,
    share: bool = False,
) -> Batch:
    """Pack prompts alone, or with completions: per prompt a list of token-id lists.

    A completion includes its end token, if it has one. One each (SFT): neighbours with the same
    images, or of texts that begin alike, share the prompt up to where they part. Several (an RL
    group): they share all of it. The last token of a completion is a target, never an input.
    share: prompts alone share as those with one completion each do, so that one is not always one
    segment.
    """
    if completions is None:
        completions = [[]] * len(prompts)
    views = distinct_views(prompts)
    packer = Packer(views, merge)
    for group in sharing_groups(prompts, completions, share):
        packer.add_group(group)
    batch = packer.batch(image_token_id)
    if not views:
        return batch
    arrays = tuple(view.patches for view in views)
    return replace(
        batch,
        patches=torch.from_numpy(np.concatenate(arrays)),
        arrays=arrays,
        levels=levels,
        frames=frames,
        image_grid_thw=torch.tensor([(1, *view.grid) for view in views]),
        points=join_points(views),
    )


def distinct_views(prompts: list[Prompt]) -> list[View]:
    """List each view once, in the order of first use."""
    views = {}
    for prompt in prompts:
        for view in prompt.views:
            views[view.key] = view
    return list(views.values())


def join_points(views: list[View]) -> Tensor | None:
    """Join the views' point maps, (P, 3), NaN for those without depth; None if none has any."""
    if all(view.points is None for view in views):
        return None
    pieces = []
    for view in views:
        if view.points is None:
            shape = len(view.patches), 3
            pieces.append(np.full(shape, np.nan, np.float32))
        else:
            pieces.append(view.points)
    return torch.from_numpy(np.concatenate(pieces))


# Prompts with their completions, token ids of each.
Group = list[tuple[Prompt, list[np.ndarray]]]


def sharing_groups(prompts: list[Prompt], completions: list, share: bool = False) -> list[Group]:
    """Cut into runs that may share a prefix: neighbours of one beginning, one completion each.

    share: also those without any. Any other prompt is a run of its own.
    """
    groups = []
    before = None  # the first prompt of the last run, if others may join it
    for prompt, several in zip(prompts, completions, strict=True):
        pair = prompt, [np.asarray(one, np.int64) for one in several]
        may_share = len(several) == 1 or (share and not several)
        if may_share and before is not None and begin_alike(prompt, before):
            groups[-1].append(pair)
            continue
        groups.append([pair])
        before = prompt if may_share else None
    return groups


def begin_alike(prompt: Prompt, other: Prompt) -> bool:
    """Tell whether two prompts have the same images or, of text alone, half of it in common."""
    if prompt.views or other.views:
        return prompt.image_keys == other.image_keys
    return 2 * common_length(prompt.ids, other.ids) >= min(len(prompt.ids), len(other.ids))


def common_length(ids: np.ndarray, others: np.ndarray) -> int:
    """Count the tokens with which both begin."""
    limit = min(len(ids), len(others))
    differs = ids[:limit] != others[:limit]
    return int(differs.argmax()) if differs.any() else limit


def shared_length(group: Group) -> int:
    """Count the tokens of a group's common prefix.

    It has all images or is empty, and has no <mask>: regions differ where their ids don't.
    """
    first, completions = group[0]
    if len(group) == 1:
        return len(first.ids) if len(completions) > 1 else 0
    limit = len(first.ids)
    for prompt, _ in group:
        # A prompt's last token stays its own: it predicts that prompt's first target.
        limit = min(limit, len(prompt.ids) - 1)
        if prompt.regions:
            limit = min(limit, prompt.regions[0].index)
    shared = limit
    for prompt, _ in group[1:]:
        shared = min(shared, common_length(prompt.ids, first.ids))
    # A prefix that ended among the images would leave some of them to be packed twice.
    images_end = max(prompt.images_end for prompt, _ in group)
    return shared if shared >= images_end else 0


class Packer:
    """A Batch in the making: pieces of tokens, one behind the other."""

    def __init__(self, views: list[View], merge: int):
        self.first_patch = {}  # by view key
        self.merge = merge
        patches = 0
        for view in views:
            self.first_patch[view.key] = patches
            patches += len(view.patches)
        self.length = 0  # tokens so far
        self.ids = []
        self.positions = []
        self.segments = []
        self.image_rows = []
        # Of every region: where its token is, its view's first patch, itself.
        self.regions = []
        self.predict_from = []
        self.targets = []
        # Where the sequences end in targets.
        self.ends = [0]
        self.last = []
        self.next_position = []

    def append(self, ids: np.ndarray, positions: np.ndarray, prefix=(0, 0)) -> int:
        """Append a piece of tokens that sees `prefix`; return where it starts."""
        start = self.length
        self.length += len(ids)
        # A completion of one token has no input of its own.
        if len(ids):
            self.ids.append(ids)
            self.positions.append(positions)
            self.segments.append((start, self.length, *prefix))
        return start

    def add_group(self, group: Group) -> None:
        """Append prompts with a common prefix, each with its completions."""
        shared = shared_length(group)
        first, _ = group[0]
        prefix_positions = first.positions[:, :shared]
        start = self.append(first.ids[:shared], prefix_positions)
        for k, (prompt, completions) in enumerate(group):
            # The shared prefix holds its images once; without one each prompt brings its own.
            if k == 0 or not shared:
                self.add_images(prompt)
            self.add_prompt(prompt, completions, (start, start + shared))

    def add_images(self, prompt: Prompt) -> None:
        """Note which merged tokens the prompt's placeholders, packed here, take."""
        unit = self.merge**2
        for view in prompt.views:
            start = self.first_patch[view.key] // unit
            count = len(view.patches) // unit
            self.image_rows.append(np.arange(start, start + count))

    def add_prompt(self, prompt: Prompt, completions: list, prefix: tuple[int, int]) -> None:
        """Append the rest of a prompt behind its prefix, once for every completion."""
        prefix_start, prefix_end = prefix
        shared = prefix_end - prefix_start
        rest_start = self.length

        # Token i of the prompt is in the prefix, or in the first copy of the rest.
        def packed_index(i: int) -> int:
            return prefix_start + i if i < shared else rest_start + i - shared

        last = packed_index(len(prompt.ids) - 1)
        for region in prompt.regions:
            first_patch = self.first_patch[prompt.views[region.view].key]
            self.regions.append((packed_index(region.index), first_patch, region))
        self.last.append(last)
        self.next_position.append(prompt.next_position)

        rest_ids = prompt.ids[shared:]
        rest_positions = prompt.positions[:, shared:]
        if not completions:
            self.append(rest_ids, rest_positions, prefix)
        # Positions restart after the prompt for each completion: they know nothing of each other.
        for completion in completions:
            inputs = completion[:-1]
            ids = np.concatenate([rest_ids, inputs])
            positions = text_positions(prompt.next_position, len(inputs))
            positions = np.concatenate([rest_positions, positions], 1)
            first_input = self.append(ids, positions, prefix) + len(rest_ids)
            # The prompt's last token predicts the first target, each input the next one.
            sources = [last, *range(first_input, first_input + len(inputs))]
            self.predict_from.append(sources[: len(completion)])
            self.targets.append(completion)
            self.ends.append(self.ends[-1] + len(completion))

    def batch(self, image_token_id: int) -> Batch:
        """Join all pieces into a Batch; its images are the caller's to add."""
        input_ids = join(self.ids)
        no_positions = np.empty((3, 0), np.int64)
        positions = np.concatenate([no_positions, *self.positions], 1)
        region_id = []
        region_patch = []
        region_weight = []
        for k, (_, first_patch, region) in enumerate(self.regions):
            # Sparse: a region covers few of an image's patches.
            patches = np.flatnonzero(region.weights)
            region_id.append(np.full(len(patches), k))
            region_patch.append(first_patch + patches)
            region_weight.append(region.weights[patches])
        centres = [region.centre for *_, region in self.regions]
        sizes = [region.size for *_, region in self.regions]
        return Batch(
            input_ids=input_ids,
            position_ids=torch.from_numpy(positions),
            segments=self.segments,
            image_at=(input_ids == image_token_id).nonzero()[:, 0],
            image_rows=join(self.image_rows),
            region_token=join([[index for index, *_ in self.regions]]),
            region_id=join(region_id),
            region_patch=join(region_patch),
            region_weight=join(region_weight, np.float32),
            centres=join(centres, np.float32).view(-1, 3),
            sizes=join(sizes, np.float32).view(-1, 3),
            predict_from=join(self.predict_from),
            targets=join(self.targets),
            cu_targets=join([self.ends]),
            last=join([self.last]),
            next_position=join([self.next_position]),
        )


def join(pieces: list, dtype=np.int64) -> Tensor:
    """Concatenate arrays or lists of numbers; of none make an empty tensor."""
    return torch.from_numpy(np.concatenate([[], *pieces]).astype(dtype))
