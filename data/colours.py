"""The colours that a question may call a region by: the words of "red bbox", and how they look."""

# Word -> red, green, blue.
COLOURS = {
    "red": (229, 72, 77),
    "blue": (62, 123, 250),
    "green": (47, 158, 91),
    "yellow": (226, 178, 3),
    "purple": (142, 78, 198),
    "orange": (247, 107, 21),
    "cyan": (0, 162, 199),
    "pink": (214, 64, 159),
}
OTHER = (120, 120, 120)


def colour_of(mention: str) -> tuple[int, int, int]:
    """Return the colour that a mention names first, a grey if it names none."""
    for word in mention.lower().split():
        if word in COLOURS:
            return COLOURS[word]
    return OTHER
