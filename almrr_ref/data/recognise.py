"""Which value is white in training images of more than 8 bits: settled once, by all of them, stored with the network.

Taken per image, the scale would change with the brightness of each.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from almrr_ref.config import ModelConfig
from almrr_ref.data.images import ImageError, Picture, unscaled_values
from almrr_ref.data.levels import high_value

_BITS = (8, 10, 12, 14, 16)
_FLOAT_WHITES = (1.0, *(2.0**bits - 1 for bits in _BITS))


def recognise_levels(
    pictures: Sequence[Picture], config: ModelConfig, say: Callable[[str], object] = print
) -> ModelConfig:
    """Training images -> the configuration with `bits` and `float_white`, unless it has them; each choice is one line.

    bits: the fewest of 8, 10, 12, 14 and 16 that hold the largest value of all images. float_white: the least of 1 and
    the largest values of those bits that is not below the images' median brightness, where an image's brightness is the
    value that 99% of its pixels do not exceed; so no single pixel changes it.
    """

    def values(picture: Picture) -> tuple[str, float] | None:
        try:
            pixels = unscaled_values(picture)
        except ImageError:  # loading will name it
            return None
        if pixels is None:
            return None
        return ("float", high_value(pixels)) if pixels.dtype.kind == "f" else ("integer", float(pixels.max()))

    with ThreadPoolExecutor(2) as pool:  # Pillow releases the interpreter's lock
        read = [entry for entry in pool.map(values, pictures) if entry]
    largest = max((value for kind, value in read if kind == "integer"), default=None)
    floats = [value for kind, value in read if kind == "float" and value == value]
    if config.bits is None and largest is not None:
        bits = next((bits for bits in _BITS if largest < 2**bits), 16)
        where = f"16-bit images hold {bits} bits (largest value {largest:g})"
        say(f"{where}: white is {2**bits - 1}; say otherwise with --bits")
        config = dataclasses.replace(config, bits=bits)
    if config.float_white is None and floats:
        usual = statistics.median(floats)
        white = next((white for white in _FLOAT_WHITES if usual <= white), usual)
        where = f"float images are bright at {usual:.4g} (the median of their 99% quantiles)"
        say(f"{where}: white is {white:g}; say otherwise with --set float_white=X")
        config = dataclasses.replace(config, float_white=white)
    return config
