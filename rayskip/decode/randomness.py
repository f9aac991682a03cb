"""Counter-based random numbers: a row's stream depends on its key alone, never on batch order.

The uniform of generated position p of sample s of a row is mix(key, s, p): nothing is drawn in sequence,
so batch mates, restarts and drafters cannot shift a stream.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(key: int, sample: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for one generated position of one sample of one row."""
    return (_mix(_mix(_mix(key & _MASK) ^ sample) ^ position) >> 11) * 2.0**-53
