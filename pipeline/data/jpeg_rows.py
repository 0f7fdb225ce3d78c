"""The upper rows of a JPEG, without decoding what lies below them.

libjpeg stops where the header says that the picture ends. With a smaller height written there it reads and decodes that
many rows; of the bytes that are left it complains, which is what tells that all was well until then. The rows are bit
for bit those of the whole picture: only whole blocks are left out, and one row more than asked for is decoded, because
its colours are interpolated with their neighbours.
"""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_FRAMES = (0xC0, 0xC1)  # one pass from top to bottom, Huffman codes
_OTHER_FRAMES = frozenset(range(0xC0, 0xD0)) - {*_FRAMES, 0xC4, 0xC8, 0xCC}  # progressive, arithmetic and so on
_NUM_COMPONENTS = (1, 3)  # CMYK, simplejpeg turns into RGB after decoding, in memory of its own
_BLOCK = 8
_BYTES_LEFT = "extraneous bytes before marker"  # libjpeg's words for what follows the last row


def upper_rows(content: bytes, source: tuple[int, int], num_rows: int, reduction: int = 1) -> NDArray[np.uint8] | None:
    """At least the first `num_rows` rows of a JPEG as RGB: (rows / reduction, width / reduction, 3).

    None where decoding all is no slower, or safer: hardly a row to leave out, not a baseline JPEG in one scan, no end
    of the picture where its file ends, or anything wrong in the rows that were decoded. What is wrong below them is not
    seen: for pictures that were decoded to the end before.

    Args:
        content: The JPEG file.
        source: (height, width) as the header has them.
        num_rows: Rows of the picture as it is in the file.
        reduction: 1, 2, 4 or 8.
    """
    if not (content.startswith(_START) and content.endswith(_END)):
        return None
    try:
        found = _place_of_height(content)
    except IndexError:  # the header is cut short
        return None
    if found is None:
        return None
    place, block_rows = found
    # Shrunk, more than a row may take part in the interpolation of colours.
    rows = -(-(num_rows + 1) // block_rows) * block_rows + (block_rows if reduction > 1 else 0)
    if rows >= source[0]:
        return None
    height, width = -(-rows // reduction), -(-source[1] // reduction)
    pixels = np.empty((height, width, 3), np.uint8)
    shortened = b"".join((content[:place], rows.to_bytes(2, "big"), content[place + 2 :]))
    try:
        simplejpeg.decode_jpeg(
            shortened, min_height=height, min_width=width, min_factor=reduction, buffer=pixels.reshape(-1)
        )
    except ValueError as error:
        if _BYTES_LEFT not in str(error):
            return None
    return pixels


def _place_of_height(content: bytes) -> tuple[int, int] | None:
    """(where the height's two bytes are, rows of pixels that are coded together); None for JPEGs of other kinds."""
    place, found, num_components = 2, None, 0
    while content[place] == 0xFF:
        marker, length = content[place + 1], 256 * content[place + 2] + content[place + 3]
        if marker in _OTHER_FRAMES:
            return None
        if marker in _FRAMES:
            precision, num_components = content[place + 4], content[place + 9]
            if found is not None or precision != 8 or num_components not in _NUM_COMPONENTS:
                return None
            found = place + 5, _BLOCK * max(content[place + 11 + 3 * number] & 15 for number in range(num_components))
        if marker == _SCAN:
            return found if content[place + 4] == num_components else None
        place += 2 + length
    return None
