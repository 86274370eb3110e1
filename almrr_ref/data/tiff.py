"""TIFF files: the tags that Pillow does not report, by directory, one for each image; and what it decodes wrongly.

Source: TIFF 6.0, sections 2 and 8; BigTIFF by Adobe and AWare Systems.
"""

import struct
from typing import BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from almrr_ref.run.text import counted

_SUBFILE, _OLD_SUBFILE, _BITS, _COLOURS, _CHANNELS, _PLANES, _FORMAT = 254, 255, 258, 262, 277, 284, 339
_TAGS = (_SUBFILE, _OLD_SUBFILE, _BITS, _CHANNELS, _FORMAT)
_MOST, _MOST_ENTRIES = 10_000, 512  # directories, and entries of one: a broken file may state any number


def read_directories(file: BinaryIO) -> list[dict[int, int]]:
    """TIFF file -> for every directory, the first value of each of its tags in `_TAGS`; [] for another file.

    The chain of directories ends where it repeats or leads to something that is no directory.

    Raises:
        EOFError: if it is cut off, so that pages would be missed, or longer than is sensible.
    """
    file.seek(0)
    header = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(header[:2])
    if order is None or len(header) < 8:
        return []
    version = struct.unpack(order + "H", header[2:4])[0]
    if version not in (42, 43) or len(header) < (8 if version == 42 else 16):
        return []
    # format of the number of entries, of an entry up to its value, of an offset
    count_format, entry_format, offset_format = ("H", "HHI", "I") if version == 42 else ("Q", "HHQ", "Q")
    offset = struct.unpack_from(order + offset_format, header, 4 if version == 42 else 8)[0]
    count_size, value_at, value_size = (struct.calcsize(order + f) for f in (count_format, entry_format, offset_format))
    directories: list[dict[int, int]] = []
    seen = set()
    while offset and offset < 2**63 and offset not in seen:
        seen.add(offset)
        file.seek(offset)
        head = file.read(count_size)
        if len(head) < count_size:
            raise EOFError("it ends before its next page")
        entries = struct.unpack(order + count_format, head)[0]
        if entries > _MOST_ENTRIES:
            break
        size = entries * (value_at + value_size)
        data = file.read(size + value_size)
        tags = {}
        for at in range(0, min(size, len(data) - value_size), value_at + value_size):
            tag, kind, count = struct.unpack_from(order + entry_format, data, at)
            if tag in _TAGS and kind in (3, 4):  # of 16 or 32 bits
                value = data[at + value_at : at + value_at + value_size]
                if count * (2 if kind == 3 else 4) > value_size:
                    file.seek(min(struct.unpack(order + offset_format, value)[0], 2**63 - 1))
                    value = file.read(4)
                value = value.ljust(4, b"\0")
                tags[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)[0]
        directories.append(tags)
        if len(data) < size:
            raise EOFError("it ends within the list of what a page is")
        if len(data) < size + value_size:  # some writers leave the last offset away
            break
        offset = struct.unpack_from(order + offset_format, data, size)[0]
        if offset and len(directories) == _MOST:
            raise EOFError(f"more than {_MOST:,} pages; split it")
    return directories


def is_picture(directory: dict[int, int]) -> bool:
    """Whether a directory holds a picture of its own: no thumbnail, level of a pyramid, or transparency mask."""
    return not directory.get(_SUBFILE, 0) & 5 and directory.get(_OLD_SUBFILE, 1) != 2


def settle(image: Image.Image) -> str:
    """Correct how Pillow will decode a TIFF image; -> why that cannot be done, "" for all other images.

    libtiff, by which Pillow unpacks, swaps the bytes of a big-endian file, and Pillow swaps those of floats and signed
    integers again. Of 16-bit colour in separate planes, packed or not, Pillow loses bytes or mixes them up. Where 0 is
    white, it turns 8 bits into 0 for black, but not 16. Of packed planes that are no colour it reads the first alone.
    """
    if not isinstance(image, TiffImageFile):
        return ""
    tags, bits = image.tag_v2, max(image.tag_v2.get(_BITS, (1,)))
    if tags.get(_COLOURS) == 0 and bits > 8:
        return f"a TIFF file of {bits} bits in which 0 is white; save it with 0 for black"
    if tags.get(_PLANES) == 2 and tags.get(_CHANNELS, 1) > 1 and bits > 8:
        return "a TIFF file of 16-bit colour in separate planes; save it with the channels of a pixel side by side"
    if tags.get(_CHANNELS, 1) > 1 and len(image.getbands()) == 1:
        return (
            f"a TIFF file of {tags[_CHANNELS]} channels, of which Pillow reads the first; save the one to judge alone"
        )
    for number, tile in enumerate(image.tile):
        raw, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if tile.codec_name == "libtiff" and raw in ("F;32BF", "I;16BS", "I;32BS"):
            image.tile[number] = tile._replace(args=(raw.replace("B", "N"), *rest))
    return ""


def describe(directory: dict[int, int]) -> str:
    """Directory -> what its pixels are: "5 channels of 8-bit unsigned integers"."""
    channels, bits = directory.get(_CHANNELS, 1), directory.get(_BITS, 1)
    kind = {2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}
    name = kind.get(directory.get(_FORMAT, 1), "unsigned integers")
    return f"{counted(channels, 'channel')} of {bits}-bit {name}"
