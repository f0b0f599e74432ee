"""Which rows are longer than the positions that a checkpoint was trained on."""

from concurrent.futures import ThreadPoolExecutor

from data.marks import Marked
from errors import UserError
from model.processor import Processor
from pictures import BadPicture, image_key, picture_size
from srreal import Example, prompt, target

# More than a chat template adds to a text, and a region written out as a box; in tokens.
TEMPLATE = 256
BOX = 64


def check_lengths(processor: Processor, examples: list[Example], with_target: bool) -> None:
    """Refuse rows that are longer than the checkpoint's max_position_embeddings."""
    reason = too_long(processor, examples, with_target)
    if reason:
        raise UserError(reason)


def too_long(processor: Processor, examples: list[Example], with_target: bool) -> str | None:
    """Say which rows are too long, with both numbers; None if none is.

    Images are not decoded: their headers say how many tokens they become. with_target: count the
    answer that SFT teaches as well.
    """
    limit = processor.max_positions
    if limit is None:
        return None
    # Headers of all images at once, in threads: a set's questions share images, and disks wait.
    sizes_of = measured(examples)
    lengths = {}
    for example in examples:
        sizes = [sizes_of[key_of(image)] for image in example.images]
        # A bad image is named with its row when it is used.
        if None in sizes:
            continue
        answer = target(example) if with_target else ""
        # Almost every row ends here, without a tokenizer.
        if bound(processor, example, answer, sizes) <= limit:
            continue
        length = processor.prompt_length(example, sizes)
        if with_target:
            # And the end token.
            length += len(processor.encode(answer)) + 1
        if length > limit:
            lengths[example.id] = length
    if not lengths:
        return None
    longest = max(lengths, key=lengths.get)
    count = f"{len(lengths)} of {len(examples)} rows are too long for it"
    return (
        f"{longest}: {lengths[longest]} tokens, but the checkpoint's max_position_embeddings is "
        f"{limit}; {count}: a smaller --max-pixels shortens images"
    )


def bound(processor: Processor, example: Example, answer: str, sizes: list) -> int:
    """Bound a row's tokens from above without its tokenizer, which takes no more than bytes."""
    count = TEMPLATE + BOX * len(example.regions)
    # A byte-level BPE starts from bytes and merges: never more tokens than bytes.
    count += len(prompt(example).encode()) + len(answer.encode())
    for size in sizes:
        rows, columns = processor.image_decoder.grid_of(size)
        # A token is a square of patches, merged.
        count += rows * columns // processor.image_processor.merge_size**2
    return count


def measured(examples: list[Example]) -> dict:
    """Return (width, height) of every image, each file opened once.

    It is None for a bad file, whose row is named when it is used.
    """
    images = {}
    for example in examples:
        for image in example.images:
            images[key_of(image)] = image
    with ThreadPoolExecutor() as pool:
        return dict(zip(images, pool.map(size_of, images.values()), strict=True))


def size_of(image) -> tuple[int, int] | None:
    try:
        return picture_size(image)
    except BadPicture:
        return None


def key_of(image):
    """Return what is equal for one image, whatever is marked in it."""
    return image_key(image.source if isinstance(image, Marked) else image)
