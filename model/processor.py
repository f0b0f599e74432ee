"""Examples in, prompts and packed batches out: chat template, regions, truths.

    example --prompt()--> Prompt --pack()--> Batch          processor(examples) does both

A Prompt is an example as the model reads it: token ids with every image's placeholders, mRoPE
positions, decoded images, and regions with their area weights. Whoever needs it again carries it.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError

import srreal
from mentions import object_of
from model.batch import Batch, Prompt, Region, mrope_positions, pack
from model.checkpoint import PARTS, SpatialRecord
from model.families import family_of
from model.files import (
    CheckpointError,
    copy_files,
    image_settings,
    read_config,
    read_image_processor,
    read_json,
    read_tokenizer,
    resolve,
    save_tokenizer,
)
from model.images import (
    ExampleError,
    ImageCache,
    ImageDecoder,
    View,
    byte_levels,
    in_merge_order,
    source_of,
)
from model.region import read_region, region_weights
from pictures import name_of
from srreal import Example

# Never sampled, since they open or stand for an image.
VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Special tokens that may stand in a text.
GROUNDING_TOKEN = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")
# A 2D box in an answer: pixels of the first image.
BOX_2D = re.compile(r"<2d_box>((?:[0-9.]+,){3}[0-9.]+)</2d_box>")
UNKNOWN = (np.nan, np.nan, np.nan)
BAD_TEMPLATE = (
    "its chat template is none for images; copy the original checkpoint's chat_template.json or"
    " chat_template.jinja"
)


# ---- What is known about a region


def has_depth(example: Example) -> bool:
    """Return whether any of an example's images comes with depth."""
    return any(depth is not None for depth in example.depths or ())


def truths(example: Example) -> list[tuple]:
    """Return (centre in its own image's camera frame, size) of every region, NaN where unknown.

    The k-th region belongs to the mention right before the k-th <mask>.
    """
    found = []
    texts = example.question.split("<mask>")
    for (view, _), text in zip(example.regions, texts, strict=False):
        mention = object_of(text, example.objects)
        centre = example.objects.get(mention)
        if isinstance(centre, dict):
            centre = centre.get(view)
        elif len(example.images) > 1 and view != example.frame:
            # One centre for several views lies in the frame that the question asks for.
            centre = None
        size = (example.sizes or {}).get(mention)
        found.append((UNKNOWN if centre is None else centre, size or UNKNOWN))
    return found


class Processor:
    """Turn examples into prompts and batches, and tokens into text.

    tokenizer, config, family; mask_id, image_token_id; end_ids (they end a completion), end_id (the
    one that closes a turn); banned (bool [V]: ids that are never sampled); max_pixels of an image;
    regions ("token": a region is an embedding in the place of <mask>; "text": its box is written
    out), has_read_regions (whether any prompt but a dummy had one); record (what the checkpoint
    was trained for); files (the checkpoint's directory); images (the decoded ones, and the
    workers).
    """

    @classmethod
    def from_pretrained(
        cls, source, max_pixels: int | None = None, regions: str = "token", workers: int = 0
    ) -> "Processor":
        """Read a checkpoint's tokenizer and settings: a directory or hub id.

        max_pixels: of an image after it is resized; None: the checkpoint's. workers: processes that
        decode what is prefetched.
        """
        return cls(resolve(str(source)), max_pixels, regions, workers)

    def __init__(
        self, files: Path, max_pixels: int | None = None, regions: str = "token", workers: int = 0
    ):
        assert regions in ("token", "text"), regions
        self.files = files
        self.regions = regions
        self.config = read_config(files)
        self.record = SpatialRecord.read(files)
        if self.record.regions not in (None, regions):
            raise CheckpointError(
                f"{files}: trained with --regions {self.record.regions}, and --regions {regions} is"
                f" asked for; give --regions {self.record.regions}"
            )
        self.has_read_regions = False
        self.family = family_of(self.config)
        text_config = self.config.get_text_config()
        self.tokenizer, rows = read_tokenizer(files, text_config.vocab_size, regions)
        text_config.vocab_size = rows
        self.image_token_id = self.config.image_token_id
        self._read_special_tokens()
        # Before any row is read: many templates know texts alone.
        self._turn_ids("?", images=0)

        image_processor = read_image_processor(files)
        self.image_processor = image_processor
        self.is_resized = max_pixels is not None
        self.max_pixels = max_pixels or image_processor.size["longest_edge"]
        min_pixels = image_processor.size["shortest_edge"]
        if self.is_resized:
            # An upper bound below the lower one would be no bound.
            min_pixels = min(min_pixels, self.max_pixels)
        image_processor.size = {"shortest_edge": min_pixels, "longest_edge": self.max_pixels}
        self.levels = byte_levels(image_processor)
        self.image_decoder = ImageDecoder(image_processor, self.max_pixels)
        self.images = ImageCache(self.image_decoder, workers)
        self.has_warned_of_length = False

    def _read_special_tokens(self) -> None:
        """Find what ends a turn, what is never sampled, and what may not stand in a row."""
        vocab = self.tokenizer.get_vocab()
        self.mask_id = vocab.get("<mask>")  # None: regions are text, and there was no row for it

        generation = self.files / "generation_config.json"
        end = read_json(generation).get("eos_token_id") if generation.is_file() else None
        eos = self.tokenizer.eos_token_id
        if end is None or end == []:  # 0 is an id
            end = eos
        self.end_ids = list(end) if isinstance(end, list) else [end]
        rows = self.config.get_text_config().vocab_size
        for end in self.end_ids:
            if not (type(end) is int and 0 <= end < rows):
                raise CheckpointError(
                    f"{generation}: eos_token_id {end!r} is no token's id (nor does the tokenizer"
                    " say what ends a turn); copy the original file"
                )
        self.end_id = eos if eos in self.end_ids else self.end_ids[0]
        if self.family.turn_end in vocab:
            # Some checkpoints come without a generation_config.json, and with another eos.
            self.end_id = vocab[self.family.turn_end]
            if self.end_id not in self.end_ids:
                self.end_ids.append(self.end_id)

        # Rows that no token has, and what would open an image. The ban doesn't enter log-probs.
        self.banned = torch.ones(rows, dtype=torch.bool)
        self.banned[[i for i in vocab.values() if i < rows]] = False
        never = [vocab[token] for token in VISION_TOKENS if token in vocab]
        never += [self.config.image_token_id, self.config.video_token_id]
        if self.mask_id is not None:
            never.append(self.mask_id)
        self.banned[never] = True

        # A row that held one could end its own turn, or open an image that isn't there.
        control = []
        for token in self.tokenizer.added_tokens_decoder.values():
            text = token.content
            if token.special and text != "<mask>" and not GROUNDING_TOKEN.fullmatch(text):
                control.append(re.escape(text))
        # (?!) matches nothing.
        self.control = re.compile("|".join(sorted(control)) or "(?!)")

    # ---- Text

    def encode(self, text: str) -> np.ndarray:
        """Tokenize a text as it is: (n,) int64."""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int64)

    def decode(self, tokens) -> str:
        """Return the text without the end tokens behind it.

        Every other token stays, `<think>` too.
        """
        tokens = [int(token) for token in tokens]
        while tokens and tokens[-1] in self.end_ids:
            tokens.pop()
        return self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)

    def prompt_ids(self, example: Example) -> list[int]:
        """Return the token ids of an example's prompt."""
        return self.prompt(example).ids.tolist()

    def target_ids(self, example: Example) -> list[int]:
        """Return the token ids that SFT teaches to write behind the prompt, with the end token."""
        text = srreal.target(example)
        if BOX_2D.search(text):
            view = self._view(example, 0)
            text = BOX_2D.sub(lambda match: self._write_box(match[1].split(","), view), text)
        self._check_text(example, text, "target", masks=0)
        return [*self.encode(text).tolist(), self.end_id]

    def _check_text(self, example: Example, text: str, what: str, masks: int) -> None:
        """Refuse a text that would end its own turn or open an image, or lacks a region's place."""
        control = self.control.search(text)
        if control:
            raise ExampleError(
                f"{example.id}: the {what} holds the control token {control.group()}"
            )
        count = text.count("<mask>")
        if count != masks:
            raise ExampleError(
                f"{example.id}: {count} <mask> in the {what}, {masks} wanted (one a region)"
            )

    def check_template(self) -> None:
        """Raise CheckpointError where the chat template has no place for an image."""
        self._turn_ids("?<image>", images=1)

    def _turn_ids(self, text: str, images: int) -> np.ndarray:
        """Tokenize a user turn by the checkpoint's template, with one placeholder an image.

        The k-th <image> of the text is the k-th image; without any, all come first.
        """
        if "<image>" in text:
            first, *others = text.split("<image>")
        else:
            first, *others = [""] * images + [text]
        content = [{"type": "text", "text": first}]
        for part in others:
            content.append({"type": "image"})
            content.append({"type": "text", "text": part})
        content = [item for item in content if item.get("text") != ""]
        chat = [{"role": "user", "content": content}]
        try:
            # Qwen3.8 writes a system turn about the effort of reasoning unless thinking is off.
            rendered = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except (TemplateError, TypeError) as error:  # TypeError: it glues texts together
            raise CheckpointError(f"{self.files}: {BAD_TEMPLATE} ({error})") from error
        # A template may open <think> itself, or write an empty block: our paths begin with their
        # own first tag.
        turn = self.encode(re.sub(r"<think>(\s*</think>)?\s*$", "", rendered))
        places = int((turn == self.image_token_id).sum())
        if places != images:
            reason = f"{places} places for {images} images, of token {self.image_token_id}"
            raise CheckpointError(f"{self.files}: {BAD_TEMPLATE} ({reason})")
        return turn

    # ---- Prompts

    def prompt(self, example: Example, is_dummy: bool = False) -> Prompt:
        """Build an example's prompt; ExampleError names a row that can't be used.

        An image that is an object, and not a file, must not change while its prompts are in use.
        is_dummy: nobody learns from it to read regions.
        """
        text = srreal.prompt(example)
        if not is_dummy:
            self.has_read_regions |= bool(example.regions)
        self._check_text(example, text, "question", masks=len(example.regions))
        self._check_images(example, text)
        # Before the text, since --regions text writes boxes in units of their images.
        views = [self._view(example, i) for i in range(len(example.images))]
        weights = self._region_weights(example, views)
        if self.regions == "text":
            text = self._write_boxes(example, text, views)
        turn = self._turn_ids(text, len(views))

        # Each image's placeholder becomes as many as it has tokens.
        merge = self.image_processor.merge_size
        grids = []
        for view in views:
            rows, columns = view.grid
            grids.append((rows // merge, columns // merge))
        slots = np.flatnonzero(turn == self.image_token_id)
        repeats = np.ones(len(turn), np.int64)
        repeats[slots] = [rows * columns for rows, columns in grids]  # fails if one got lost
        ids = np.repeat(turn, repeats)
        self._warn_of_length(example, len(ids))
        positions, next_position = mrope_positions(len(turn), slots, grids)
        images_end = 0
        if views:
            images_end = int(repeats[: slots[-1] + 1].sum())

        # In the template's order, the k-th <mask> is the k-th region's.
        regions = []
        if self.regions == "token":
            masks = np.flatnonzero(ids == self.mask_id).tolist()
            known = truths(example)
            for k, (view, _) in enumerate(example.regions):
                regions.append(Region(masks[k], view, weights[k], *known[k]))
        return Prompt(example, ids, positions, next_position, views, images_end, regions)

    def prompt_length(self, example: Example, sizes: list[tuple[int, int]]) -> int:
        """Count the tokens of an example's prompt from its images' (width, height) alone."""
        views = []
        for size in sizes:
            views.append(View(size, self.image_decoder.grid_of(size), patches=None, points=None))
        text = srreal.prompt(example)
        if self.regions == "text":
            text = self._write_boxes(example, text, views)
        length = len(self._turn_ids(text, len(views)))
        for view in views:
            rows, columns = view.grid
            # A placeholder each is counted already.
            length += rows * columns // self.image_processor.merge_size**2 - 1
        return length

    def pixels_of(self, size: tuple[int, int]) -> int:
        """Return how many pixels of an image of (width, height) the model reads."""
        rows, columns = self.image_decoder.grid_of(size)
        return rows * columns * self.image_processor.patch_size**2

    def _warn_of_length(self, example: Example, length: int) -> None:
        """Say of the first prompt that is too long for the checkpoint; training refuses such."""
        limit = self.max_positions
        if limit is None or length <= limit or self.has_warned_of_length:
            return
        self.has_warned_of_length = True
        limits = f"the checkpoint's max_position_embeddings is {limit}"
        print(f"warning: {example.id}: a prompt of {length} tokens, but {limits}", file=sys.stderr)

    @property
    def max_positions(self) -> int | None:
        """How many tokens the checkpoint's positions are meant for, where it says so."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def _check_images(self, example: Example, text: str) -> None:
        """Refuse a row whose text or regions speak of images that it doesn't have."""
        images = len(example.images)
        count = text.count("<image>")
        if count not in (0, images):
            raise ExampleError(f"{example.id}: {count} <image> in the question, {images} images")
        if not all(0 <= image < images for image, _ in example.regions):
            raise ExampleError(f"{example.id}: a region lies on an image that is not there")

    def _view(self, example: Example, index: int) -> View:
        """Decode an example's image; an error names the row and the file."""
        source = source_of(example, index)
        try:
            return self.images.view(source)
        except ExampleError as error:
            image = name_of(source.image)
            depth = name_of(source.depth)
            raise ExampleError(
                f"{example.id}: image {index} ({image}, depth {depth}): {error}"
            ) from error

    def _region_weights(self, example: Example, views: list[View]) -> list[np.ndarray]:
        """Weigh each region's patches, in their packed order: (P,) of its view."""
        weights = []
        for k, (index, region) in enumerate(example.regions):
            view = views[index]
            try:
                region = read_region(region, view.size)
            except ValueError as error:
                raise ExampleError(f"{example.id}: region {k}: {error}") from error
            grid = region_weights(region, view.size, view.grid)
            weights.append(in_merge_order(grid, self.image_processor.merge_size))
        return weights

    def _write_boxes(self, example: Example, text: str, views: list[View]) -> str:
        """Replace each <mask> by a 2D box in the family's convention.

        Of several images, the box comes behind the number of its own.
        """
        pieces = text.split("<mask>")
        for k, (index, region) in enumerate(example.regions):
            box = read_region(region, views[index].size)
            if isinstance(box, np.ndarray):
                box = box_around(box)
            if len(views) > 1:
                pieces[k] += f"image {index} "
            pieces[k] += self._write_box(box, views[index])
        return "".join(pieces)

    def _write_box(self, box, view: View) -> str:
        """Write x0, y0, x1, y1 in pixels of the original as the family does."""
        rows, columns = view.grid
        width, height = view.size
        scale = self.family.box_scale
        box = np.clip([float(side) for side in box], 0, (width, height) * 2)
        if scale is None:
            # In pixels of the resized image.
            patch = self.image_processor.patch_size
            unit = (columns * patch / width, rows * patch / height)
        else:
            unit = (scale / width, scale / height)
        sides = (box * (unit * 2)).tolist()
        return self.family.box.format(*[round(side) for side in sides])

    # ---- Batches

    def prefetch(self, examples: list[Example]) -> None:
        """Let the workers decode what comes next, in this order, each image once.

        It is kept until the next call, which lets go of all that it does not name.
        """
        sources = []
        for example in examples:
            sources += [source_of(example, index) for index in range(len(example.images))]
        self.images.prefetch(sources)

    def pack(
        self,
        prompts: list[Prompt],
        completions: list[list[list[int]]] | None = None,
        share: bool = False,
    ) -> Batch:
        """Pack prompts, alone or with completions: see model.batch.pack."""
        return pack(
            prompts,
            completions,
            image_token_id=self.image_token_id,
            merge=self.image_processor.merge_size,
            frames=self.image_processor.temporal_patch_size,
            levels=self.levels,
            share=share,
        )

    def __call__(
        self,
        examples: list[Example | Prompt],
        completions: list[list[list[int]]] | None = None,
    ) -> Batch:
        """Pack examples, or the prompts made of them, alone or with completions."""
        prompts = []
        for example in examples:
            prompts.append(example if isinstance(example, Prompt) else self.prompt(example))
        return self.pack(prompts, completions)

    def untrained_parts(
        self, examples: list[Example], learning: tuple[str, ...] = (), head: bool = False
    ) -> list[str]:
        """Say which parts these examples use that never learnt, a sentence each.

        learning: prefixes of the tensors that learn now; head: whether the 3D head is read.
        """
        if self.record.trained is None:
            return []
        as_token = self.regions == "token" and any(example.regions for example in examples)
        used = {
            "region": as_token,
            "points": any(has_depth(example) for example in examples),
            "head3d": as_token and head and any(example.objects for example in examples),
        }
        consequences = {
            "region": "regions are read by a random projection (--regions text needs none)",
            "points": "depth tells it nothing, or noise",
            "head3d": "its errors in metres mean nothing",
        }
        sentences = []
        for part, words in PARTS.items():
            learns = f"{part}.".startswith(learning) if learning else False
            if used[part] and not learns and part not in self.record.trained:
                sentences.append(f"{self.files}: its {words} never learnt: {consequences[part]}")
        return sentences

    def save(self, directory) -> None:
        """Write the tokenizer with <mask>, and the source's other files but for weights.

        max_pixels goes into the image settings where it was set.
        """
        directory = Path(directory)
        copy_files(self.files, directory)
        save_tokenizer(self.tokenizer, directory)
        if not self.is_resized:
            return
        size = dict(self.image_processor.size)
        for path, content, settings in image_settings(directory):
            settings["size"] = size
            # Where the older form stands, it wins over `size`.
            for key, pixels in zip(("min_pixels", "max_pixels"), size.values(), strict=True):
                if settings.get(key):
                    settings[key] = pixels
            path.write_text(json.dumps(content, indent=2) + "\n")


def box_around(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box x0, y0, x1, y1 that a mask fills."""
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
