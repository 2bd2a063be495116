"""Numbers for people."""

_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float) -> str:
    """Four digits and a unit, as in `30.93 M`."""
    for factor, unit in _UNITS:
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g}"


def gigabytes(size: float) -> str:
    """Bytes as `1.31 GB`, or as `345.5 MB` where there are fewer."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
