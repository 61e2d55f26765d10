"""Numbers as people read them: three digits and a unit. Every room may import this file."""

import math


def count_text(value: float) -> str:
    """24135.2 as "24.1k", 3.2e6 as "3.20M"."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{value:.3g}"


def size_text(count: int) -> str:
    """Bytes in decimal units: 7 bytes, 212 kB, 1.38 GB."""
    if count < 1000:
        return f"{count} bytes"
    text = count_text(count)
    return f"{text[:-1]} {text[-1].replace('B', 'G')}B"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high], 1, 2, 2.5 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_text(value: float) -> str:
    """At most a few letters: 2.5, 0.001, 2e-5, 250k."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (abs(value) >= scale and scale > 1e3):
            return f"{value / scale:.6g}{letter}"
    return f"{value:.6g}".replace("e-0", "e-")
