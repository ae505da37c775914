"""Keyed permutations of the numbers below n that are computed element by element, without memory for the others."""

from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]
ROUNDS = 6
SMALL, SMALL_ROUNDS = 2**8, 24  # below SMALL numbers, fewer rounds do not reach all permutations equally often


def permute(x: NDArray[Any], n: int, keys: Numbers | np.uint64) -> Numbers:
    """Returns the images of numbers below n under the permutation of [0, n) that each key selects.

    x, keys: of shapes that broadcast. 1 <= n < 2**62. The result is the same on every machine and with every version of
    numpy. A Feistel network permutes the cells of the smallest suitable grid; a number outside [0, n) is permuted again
    until it is inside (cycle walking: Black and Rogaway 2002).
    """
    return _walk(x, n, keys, range(num_rounds(n)), 1)


def unpermute(x: NDArray[Any], n: int, keys: Numbers | np.uint64) -> Numbers:
    """Invert `permute`."""
    return _walk(x, n, keys, range(num_rounds(n) - 1, -1, -1), -1)


def num_rounds(n: int) -> int:
    """Returns the number of rounds in which n numbers are permuted."""
    return SMALL_ROUNDS if n < SMALL else ROUNDS


def mix(*numbers: int) -> np.uint64:
    """Returns a 64-bit hash of some integers."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = scramble(state + np.uint64(number & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])


def scramble(x: Numbers) -> Numbers:
    """Map 64-bit numbers to pseudo-random ones, one to one (SplitMix64: Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def scale(hashes: Numbers, n: NDArray[Any] | int) -> Numbers:
    """Map 64-bit hashes to numbers below n, for n < 2**32."""
    return ((hashes >> np.uint64(32)) * np.asarray(n, dtype=np.uint64)) >> np.uint64(32)


def _walk(x: NDArray[Any], n: int, keys: Numbers | np.uint64, rounds: range, sign: int) -> Numbers:
    x, keys = np.broadcast_arrays(np.asarray(x, dtype=np.uint64), np.asarray(keys, dtype=np.uint64))
    result = _rounds(x, n, keys, rounds, sign)
    while (outside := result >= np.uint64(n)).any():
        result[outside] = _rounds(result[outside], n, keys[outside], rounds, sign)
    return result


def _rounds(x: Numbers, n: int, keys: Numbers, rounds: range, sign: int) -> Numbers:
    """Permute the cells (row, column) of a grid of at least n cells: even rounds move within columns, odd ones in rows.

    The number of columns is even, so that odd permutations of the cells occur too.
    """
    height = isqrt(n - 1) + 1
    width = 2 * -(-n // (2 * height))
    row, column = np.divmod(x, np.uint64(width))
    for number in rounds:
        round_keys = keys + np.uint64(number << 48)
        if number % 2 == 0:
            row = _shift(row, scale(scramble(round_keys ^ column), height), height, sign)
        else:
            column = _shift(column, scale(scramble(round_keys ^ row), width), width, sign)
    return row * np.uint64(width) + column


def _shift(x: Numbers, by: Numbers, n: int, sign: int) -> Numbers:
    """Returns (x + sign * by) mod n for x, by < n."""
    x = x + by if sign > 0 else x + np.uint64(n) - by
    return np.minimum(x, x - np.uint64(n))  # below n, the second one wraps around to a large number
