"""Numbers as people read them: three digits and a unit. Every room may import this file."""


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
