"""Bytes to pixels: decoding, resampling, colour, transforms."""
