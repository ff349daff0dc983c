"""The checksum of TFRecord files (CRC-32C, Castagnoli), in numpy: about 2 ms for an image of 100 kB."""

import functools

import numpy as np
from jaxtyping import UInt32

_POLYNOMIAL = 0x82F63B78
_LANE = 256


@functools.cache
def _table() -> UInt32[np.ndarray, "256"]:
    """New state for each value of the lowest byte."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1)
    return values


def _advance(states: UInt32[np.ndarray, "k"], columns: np.ndarray) -> UInt32[np.ndarray, "k"]:
    """States of the checksum after more bytes; row i of ``columns`` has the i-th byte of every state."""
    table = _table()
    for column in columns:
        states = table[(states ^ column) & 255] ^ (states >> 8)
    return states


@functools.cache
def _over_a_lane() -> tuple[list[int], ...]:
    """Four tables: the state after ``_LANE`` zero bytes, for each value of each byte of a state."""
    values = np.arange(256, dtype=np.uint32)
    zeros = np.zeros((_LANE, 1), np.uint32)
    return tuple(_advance(values << np.uint32(8 * place), zeros).tolist() for place in range(4))


def crc32c(data: bytes) -> int:
    """The CRC-32C checksum of some bytes.

    The state is linear in the bytes, so lanes of 256 bytes are processed in parallel and then combined. The initial
    state of ones is equivalent to inverting the first four bytes, and leading zeros change nothing.
    """
    if len(data) < 4:
        state = np.full(1, 0xFFFFFFFF, np.uint32)
        return int(_advance(state, np.frombuffer(data, np.uint8).reshape(-1, 1))[0]) ^ 0xFFFFFFFF
    padding = -len(data) % _LANE
    padded = np.zeros(padding + len(data), np.uint8)
    padded[padding:] = np.frombuffer(data, np.uint8)
    padded[padding : padding + 4] ^= 255
    lanes = padded.reshape(-1, _LANE)
    states = _advance(np.zeros(len(lanes), np.uint32), lanes.T.astype(np.uint32))
    first, second, third, fourth = _over_a_lane()
    whole = 0
    for state in states.tolist():
        whole = first[whole & 255] ^ second[whole >> 8 & 255] ^ third[whole >> 16 & 255] ^ fourth[whole >> 24] ^ state
    return whole ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """The checksum as TFRecord stores it: rotated and offset, since a checksum of checksums would be weak."""
    value = crc32c(data)
    return (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF
