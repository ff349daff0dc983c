"""Draws characters of matplotlib's fonts as small grey images, for the data set `glyphs`.

Uses NumPy, OpenCV and Pillow only. All functions are pure: the randomness of an image comes from the generator that the
caller passes in.
"""

import functools
import hashlib
import unicodedata
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import PIL
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

KINDS = ("clean", "blur", "occlusion", "noise", "blend")

_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# Computer Modern's charmaps are correct for basic Latin letters only; these faces are not used for other characters.
_LATIN_FACES = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
_ALL_FACES = (*_FACES, *_LATIN_FACES)
_BLOCKS = (
    (0x0021, 0x02AF),  # Latin with its extensions and the phonetic alphabet
    (0x0370, 0x0587),  # Greek, Cyrillic, Armenian
    (0x0E81, 0x0EB0),  # Lao
    (0x10A0, 0x10FA),  # Georgian
    (0x20A0, 0x214E),  # currencies, letter-like symbols
    (0x2190, 0x22FF),  # arrows, mathematical operators
    (0x2D00, 0x2D25),  # Georgian, the church alphabet
)
_CATEGORIES = frozenset({"Lu", "Ll", "Lo", "Nd", "Sm", "Sc", "So", "Po"})
_MIN_FACES = 6
_TWIN_FACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono-Bold", "STIXGeneral")
_TWIN_POSES = ((0.0, 1.0), (0.2, 1.0), (0.0, 0.75))  # rotation in radians, width / height
_TWIN_CORRELATION = 0.9

# What `told_apart` finds, for the font files of this digest: the code points, one a line.
_KNOWN = Path(__file__).with_name("characters.txt")
_KNOWN_FONTS = "65b743947cc9b959e34a4b053b55399a6018c059f6a18bac3129295a317e891f"

_GLYPH_SIDE = 96  # longest side of a glyph before it is placed in an image
_SUPERSAMPLE = 4


def font_file(face: str) -> Path:
    """Path of a face's TTF file.

    Raises:
      FileNotFoundError: if the face is not in matplotlib's font folder, which the message names.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    path = folder / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(
            f"No font {path.name} in {folder}: the glyphs are drawn with the fonts that matplotlib's wheels ship "
            "(some distributions leave them out); reinstall it with pip."
        )
    return path


@functools.lru_cache(maxsize=64)  # each holds a file open
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file(face)), points, layout_engine=ImageFont.Layout.BASIC)


def _ink(face: str, code: int, points: int) -> np.ndarray:
    """The glyph cropped to its ink: uint8 [h, w], empty for a blank one."""
    font, text = _font(face, points), chr(code)
    left, top, right, bottom = font.getbbox(text)
    canvas = Image.new("L", (max(1, int(right - left) + 4), max(1, int(bottom - top) + 4)))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), text, fill=255, font=font)
    pixels = np.asarray(canvas)
    rows, columns = np.flatnonzero(pixels.max(1) > 64), np.flatnonzero(pixels.max(0) > 64)
    if not len(rows) or not len(columns):
        return np.zeros((0, 0), np.uint8)
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@functools.lru_cache(maxsize=128)  # the images of a character are drawn one after the other
def glyph(face: str, code: int) -> np.ndarray:
    """The character in a face as an ink mask, cropped to the ink: uint8 [h, w], the longer side about 96 (70 to 125).

    All glyphs are scaled to the same size, so that a full stop is as legible as a W; characters that differ only in
    size become twins, which `characters` leaves out. The shape is [0, 0] if the face draws nothing.
    """
    ink = _ink(face, code, _GLYPH_SIDE)
    if ink.size and not 0.7 < max(ink.shape) / _GLYPH_SIDE < 1.3:
        half_octaves = round(2 * np.log2(_GLYPH_SIDE / max(ink.shape)))  # few sizes, so that fonts are reused
        ink = _ink(face, code, round(_GLYPH_SIDE * 2 ** (half_octaves / 2)))
    ink.flags.writeable = False
    return ink


def _place(mask: np.ndarray, matrix: np.ndarray, shift: np.ndarray, side: int) -> np.ndarray:
    """`mask` mapped by the 2x2 `matrix` about its centre onto a side x side canvas, antialiased by area: [0, 1]."""
    fine = side * _SUPERSAMPLE
    source = (np.array(mask.shape[::-1]) - 1) / 2
    target = (fine - 1) / 2 + shift * _SUPERSAMPLE
    matrix = matrix * _SUPERSAMPLE
    warp = np.column_stack([matrix, target - matrix @ source])
    big = cv2.warpAffine(mask, warp, (fine, fine), flags=cv2.INTER_LINEAR)
    return cv2.resize(big, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _extent(matrix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Width and height of the box around the mapped mask."""
    return np.abs(matrix) @ np.array(mask.shape[::-1])


def _views(masks: list[np.ndarray], angle: float, aspect: float) -> np.ndarray:
    """The glyphs in a pose, normalised for size and contrast: unit vectors with mean 0, float32 [n, 576]."""
    views = np.zeros((len(masks), 24, 24), np.float32)
    for mask, view in zip(masks, views, strict=True):
        matrix = _rotation(angle) @ np.diag([aspect**0.5, aspect**-0.5])
        matrix *= 20 / _extent(matrix, mask).max()
        view[:] = cv2.GaussianBlur(_place(mask, matrix, np.zeros(2), 24), (0, 0), 0.8)
    rows = views.reshape(len(masks), -1)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _twins(codes: list[int], faces: dict[int, tuple[str, ...]]) -> np.ndarray:
    """Largest correlation of each pair of characters over faces and small changes of pose: float32 [n, n]."""
    likeness = np.full((len(codes), len(codes)), -1, np.float32)
    for face in _TWIN_FACES:
        rows = [i for i, code in enumerate(codes) if face in faces[code]]
        masks = [glyph(face, codes[i]) for i in rows]
        views = [_views(masks, *pose) for pose in _TWIN_POSES]
        block = np.max([view @ views[0].T for view in views], axis=0)
        cells = np.ix_(rows, rows)
        # Comparing A turned left with B equals comparing B turned right with A.
        likeness[cells] = np.maximum(likeness[cells], np.maximum(block, block.T))
    return likeness


def _is_wanted(code: int) -> bool:
    text = chr(code)
    # With two diacritics a letter is no longer legible at 32 pixels.
    return unicodedata.category(text) in _CATEGORIES and len(unicodedata.normalize("NFD", text)) <= 2


@functools.cache
def characters() -> dict[int, tuple[str, ...]]:
    """The characters that can be told apart by eye: code point -> names of the faces that have it, ascending.

    Included are letters, digits, signs, arrows and operators that at least 6 faces draw. Excluded are marks, spaces and
    characters that look like one with a smaller code point (Greek and Cyrillic capitals like Latin ones, o like O):
    in some face the two correlate by more than 0.9 when scaled to the same size, under a small rotation or stretch. For
    the fonts of matplotlib 3.10 the result is stored; for others the first call takes three seconds.

    Raises:
      FileNotFoundError: if a font is missing.
    """
    coverage: dict[int, list[str]] = {}
    for face in _ALL_FACES:
        for code, index in FT2Font(str(font_file(face))).get_charmap().items():
            wanted = index and any(low <= code <= high for low, high in _BLOCKS) and _is_wanted(code)
            if wanted and (face in _FACES or (code < 0x7F and chr(code).isalpha())):
                coverage.setdefault(code, []).append(face)
    faces = {code: tuple(names) for code, names in sorted(coverage.items()) if len(names) >= _MIN_FACES}
    known = fonts_digest() == _KNOWN_FONTS
    codes = [int(line, 16) for line in _KNOWN.read_text().split()] if known else told_apart(faces)
    return {code: faces[code] for code in codes}


def fonts_digest() -> str:
    """SHA-256 of the font files, in the order of ``_ALL_FACES``."""
    digest = hashlib.sha256()
    for face in _ALL_FACES:
        digest.update(font_file(face).read_bytes())
    return digest.hexdigest()


def told_apart(faces: dict[int, tuple[str, ...]]) -> list[int]:
    """The code points, of those with their faces, that look like none with a smaller code point; see ``characters``."""
    codes = list(faces)
    likeness = _twins(codes, faces)
    kept: list[int] = []
    for i in range(len(codes)):
        if not kept or likeness[i, kept].max() <= _TWIN_CORRELATION:
            kept.append(i)
    return [codes[i] for i in kept]


def _thicken(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Thickens the strokes by `pixels` on each side, or erodes them if negative, unless too little would remain."""
    if not pixels:
        return mask
    padded = cv2.copyMakeBorder(mask, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=0)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(pixels) + 1,) * 2)
    if pixels > 0:
        return cv2.dilate(padded, brush)
    thin = cv2.erode(padded, brush)
    return thin if thin.sum() > 0.5 * padded.sum() else padded


def layer(rng: np.random.Generator, code: int, side: int) -> np.ndarray:
    """The share of ink in each pixel of a randomly posed character: float32 [side, side] in [0, 1].

    Face, stroke width, rotation, shear, aspect, size and position are drawn from `rng`; the ink stays inside the image.
    """
    faces = characters()[code]
    mask = _thicken(glyph(faces[rng.integers(len(faces))], code), int(rng.integers(-2, 2)))
    angle, shear, stretch, fill = rng.uniform((-0.17, -0.15, -0.1, 0.65), (0.17, 0.15, 0.1, 0.9))
    shift = rng.uniform(-0.35, 0.35, 2)
    matrix = _rotation(angle) @ np.array([[1, shear], [0, 1]]) @ np.diag(np.exp([stretch, -stretch]))
    matrix *= fill * side / _extent(matrix, mask).max()
    return _place(mask, matrix, shift * (side - _extent(matrix, mask)), side)


@functools.lru_cache(maxsize=8)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of each pixel's place, from -0.5 to 0.5: float64 [side, side] each."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    y.flags.writeable = x.flags.writeable = False
    return y, x


def _waves(rng: np.random.Generator, side: int) -> np.ndarray:
    """A smooth random field with unit variance: float32 [side, side]."""
    coarse = rng.standard_normal((5, 5)).astype(np.float32)
    field = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / field.std()


def _cover(rng: np.random.Generator, ink: np.ndarray, share: float) -> np.ndarray:
    """Mask of a patch that hides `share` of the ink: bool [side, side]. It enters from one side with a wavy edge."""
    side = len(ink)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = _grid(side)
    height = np.cos(angle) * x + np.sin(angle) * y + 0.08 * _waves(rng, side)
    order = np.argsort(height, axis=None)
    hidden = np.append(0, np.cumsum(ink.ravel()[order]))  # ink under the first 0, 1, 2, ... pixels
    covered = np.zeros(side * side, bool)
    covered[order[: np.searchsorted(hidden, share * hidden[-1])]] = True
    return covered.reshape(ink.shape)


def picture(
    rng: np.random.Generator, code: int, side: int = 32, kind: str = "clean", ambiguity: float = 0.0, other: int = 0
) -> np.ndarray:
    """Draws one image of a character: uint8 [side, side].

    Equal `rng` states give the same pose, grey levels and sensor noise for every `kind` and `ambiguity`, so that two
    strengths can be compared.

    Args:
      rng: random generator of this image.
      code: a code point from `characters`.
      side: width and height in pixels; above about 96 the outlines become soft.
      kind: one of KINDS, see `glyphs.Glyphs` for what each does.
      ambiguity: strength in [0, 1].
      other: the second character of a blend.
    """
    ink = layer(rng, code, side)
    contrast = rng.uniform(0.4, 0.95)
    pen = rng.uniform(0, 1 - contrast)
    paper = pen + contrast
    slope = rng.uniform(-0.1, 0.1, 2)
    grain = rng.standard_normal((side, side)) * rng.uniform(0.005, 0.04)

    if kind == "blend":
        weight = ambiguity**0.5 / 2
        ink = (1 - weight) * ink + weight * layer(rng, other, side)
    y, x = _grid(side)
    light = paper + slope[0] * x + slope[1] * y + (pen - paper) * ink
    if kind == "blur":
        light = cv2.GaussianBlur(light, (0, 0), side * 0.25 * max(ambiguity, 1e-3), borderType=cv2.BORDER_REPLICATE)
    elif kind == "occlusion":
        light = np.where(_cover(rng, ink, ambiguity), rng.uniform(), light)
    elif kind == "noise":
        weight = ambiguity**0.5
        light = (1 - weight) * light + weight * rng.normal(0.5, 0.25, light.shape)
    return np.clip((light + grain) * 255 + 0.5, 0, 255).astype(np.uint8)


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the bytes of an image."""
    return {module.__name__: module.__version__ for module in (np, cv2, PIL, matplotlib)}
