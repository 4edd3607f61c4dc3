"""Pictures of routing: which tokens each layer computed, and how experts share the work.

Every function returns uint8 [height, width, 3], what `MetricLog.image` writes, as wide as
TensorBoard's thumbnails (`WIDTH`), with a key of its colours. Drawing needs Pillow, which
TensorBoard brings.

Shape legend: L layers, T tokens, E experts, B images, S patches.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive.routing.tape import RoutingRecord

_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 36), (150, 152, 160)
_SKIPPED, _COMPUTED, _ALWAYS = (238, 239, 243), (24, 110, 190), (176, 205, 232)
# From few to many: light to dark, so that print and colour-blind readers see the same order.
_SCALE = ((247, 247, 242), (253, 219, 158), (244, 146, 84), (205, 61, 78), (112, 20, 92))
_CELL, _MARGIN, _LINE = 7, 8, 17

WIDTH = 350
"""Pixels that TensorBoard gives a picture."""

Colour = tuple[int, ...]


class _Key:
    """A key of colours: a strip with words above it, or a square beside each word.

    Args:
        colours: of a place of the strip, from 0 to 1; or of each word.
        words: from one end of the strip to the other; or one for each colour.
    """

    def __init__(
        self, colours: Callable[[float], Colour] | Sequence[Colour], words: Sequence[str]
    ) -> None:
        self._colours, self._words = colours, words

    def draw(self, draw: Any, top: int) -> None:
        if not callable(self._colours):
            at = _MARGIN
            for colour, word in zip(self._colours, self._words, strict=True):
                draw.rectangle((at, top + 7, at + 11, top + 18), fill=colour, outline=_FAINT)
                draw.text((at + 16, top + 6), word, fill=_INK, font=_font(11))
                at += 28 + round(6.1 * len(word))
            return
        strip = WIDTH - 2 * _MARGIN
        for x in range(strip):
            colour = self._colours(x / (strip - 1))
            draw.line((_MARGIN + x, top + 15, _MARGIN + x, top + 21), fill=colour)
        for place, word in enumerate(self._words):
            left = _MARGIN + place / max(len(self._words) - 1, 1) * (strip - 6.1 * len(word))
            draw.text((left, top), word, fill=_INK, font=_font(11))


class _Head:
    """A title of as many lines as it needs, and the key under it."""

    def __init__(self, title: str, key: _Key) -> None:
        self._lines, self._key = textwrap.wrap(title, 46), key
        self.height = _MARGIN + _LINE * len(self._lines) + 30

    def draw(self, draw: Any) -> None:
        for place, line in enumerate(self._lines):
            draw.text((_MARGIN, _MARGIN - 4 + _LINE * place), line, fill=_INK, font=_font())
        self._key.draw(draw, _MARGIN - 2 + _LINE * len(self._lines))


def short_names(names: Sequence[str]) -> list[str]:
    """Names of layers without what they all begin and end with: `3` of `layers.3.block.ffn`."""
    shortest = [re.sub(r"^layers\.", "", name) for name in names]
    ends = {name.partition(".")[2] for name in shortest}
    starts = [name.partition(".")[0] for name in shortest]
    return starts if len(ends) == 1 and len(set(starts)) == len(starts) else shortest


def _left_of(names: Sequence[str]) -> int:
    return _MARGIN + round(6.1 * max(len(name) for name in names)) + 6


def chosen_by_layer(
    records: Sequence[RoutingRecord], num_layers: int | None = None, *, sequence: int = 0
) -> tuple[list[str], list[bool], Tensor]:
    """Rows of a depth map from the records of one forward.

    Args:
        records: those that choose tokens are taken, in order.
        num_layers: of a decoder: its layers without a record (`layers.3`) are rows too, full.
        sequence: which of the batch, where all have the same length.

    Returns:
        Names of the rows, whether each is routed, and bool [L, T]: computed or not.

    Raises:
        ValueError: if no record chooses tokens.
    """
    made = {r.name: r for r in records if r.chosen is not None and r.chosen.dim() == 1}
    if not made:
        raise ValueError("records: none of them chooses tokens")
    rows = {name: _of_sequence(record, sequence) for name, record in made.items()}
    tokens = next(iter(rows.values())).shape[0]
    everything = torch.ones(tokens, dtype=torch.bool)
    if num_layers is not None and set(rows) <= {f"layers.{i}" for i in range(num_layers)}:
        names = [f"layers.{i}" for i in range(num_layers)]
    else:
        names = list(rows)
    chosen_LT = torch.stack([rows.get(name, everything) for name in names])
    return names, [name in rows for name in names], chosen_LT


def experts_by_layer(
    records: Sequence[RoutingRecord], *, tokens: int
) -> tuple[list[str], list[int], Tensor]:
    """Rows of an expert map from the records of one forward of one sequence.

    Experts inside a layer that skips tokens see only some of them, and are left out.

    Returns:
        Names of the layers with experts, how many they have, and int64 [L, T]: each token's first;
        numbers from there on are of experts that compute nothing.

    Raises:
        ValueError: if no record chooses experts for every token.
    """
    made = [
        record
        for record in records
        if record.chosen is not None and record.load is not None
        if record.chosen.dim() == 2 and record.chosen.shape[0] == tokens
    ]
    if not made:
        raise ValueError("records: none of them chooses experts")
    experts_LT = torch.stack([r.chosen[:, 0].cpu() for r in made if r.chosen is not None])
    units = [r.load.shape[0] for r in made if r.load is not None]
    return [record.name for record in made], units, experts_LT


def depth_map(
    tokens: Sequence[str], names: Sequence[str], routed: Sequence[bool], chosen_LT: Tensor
) -> Tensor:
    """Tokens across, layers down: a dark cell where the layer computed the token.

    As many tokens as there is room for, from the first.

    Args:
        tokens: the text of each token; what does not print becomes a symbol.
        names, routed, chosen_LT: as `chosen_by_layer` gives them. Layers that are not routed are
            drawn paler: they compute every token.
    """
    share = chosen_LT[torch.tensor(list(routed))].float().mean() if any(routed) else torch.ones(())
    title = f"layers down, tokens across: routed layers computed {float(share):.1%}"
    key = _Key((_COMPUTED, _SKIPPED, _ALWAYS), ("computed", "skipped", "not routed"))
    colours = [
        [_ALWAYS if not is_routed else _COMPUTED if computed else _SKIPPED for computed in row]
        for is_routed, row in zip(routed, chosen_LT.tolist(), strict=True)
    ]
    notes = [f"{float(row.float().mean()):.0%}" for row in chosen_LT]
    return _bands(_Head(title, key), tokens, names, colours, notes)


def expert_map(
    tokens: Sequence[str], names: Sequence[str], units: Sequence[int], experts_LT: Tensor
) -> Tensor:
    """Tokens across, layers down: a colour for each expert. What shares a colour, shares weights.

    A token that goes to an idle expert is as pale as one that a layer skips.

    Args:
        tokens, names: as in `depth_map`.
        units: experts of each layer.
        experts_LT: int64 [L, T], the expert of each token.
    """
    title = "layers down, tokens across: the expert of each"
    most = max(units)
    key = _Key(lambda place: _hue(int(place * most * 0.999) / most), ("expert 0", f"{most - 1}"))
    colours = [
        [_hue(expert / count) if expert < count else _SKIPPED for expert in row]
        for count, row in zip(units, experts_LT.tolist(), strict=True)
    ]
    used = [
        len({expert for expert in row if expert < count})
        for count, row in zip(units, experts_LT.tolist(), strict=True)
    ]
    notes = [f"{number}/{count}" for number, count in zip(used, units, strict=True)]
    return _bands(_Head(title, key), tokens, names, colours, notes)


def text_map(tokens: Sequence[str], chosen_LT: Tensor) -> Tensor:
    """The text itself, each token on a ground that darkens with the layers that computed it."""
    cell, line = 6, 14
    per_line = (WIDTH - 2 * _MARGIN) // cell
    most = chosen_LT.shape[0]
    counts = chosen_LT.sum(0).tolist()
    least = min(counts)
    places: list[tuple[int, int, str, float]] = []
    row, column = 0, 0
    for token, count in zip(tokens, counts, strict=True):
        part = (count - least) / max(most - least, 1)
        for character in token or " ":
            if column == per_line:
                row, column = row + 1, 0
            shown = character if character == " " else _symbol(character)
            places.append((row, column, shown, part))
            column += 1
            if character == "\n":
                row, column = row + 1, 0
    key = _Key(_shade, (f"{least} layers", f"all {most}"))
    head = _Head("layers that computed each token", key)
    canvas, draw = _page(WIDTH, head.height + line * (row + 1) + _MARGIN)
    head.draw(draw)
    for row, column, character, part in places:
        x, y = _MARGIN + column * cell, head.height + row * line
        draw.rectangle((x, y, x + cell - 1, y + line - 2), fill=_shade(part))
        ink = _PAPER if part > 0.6 else _INK
        draw.text((x, y), character, fill=ink, font=_font(11))
    return _tensor(canvas)


def load_map(loads: dict[str, Tensor]) -> Tensor:
    """Layers down, experts across: the load of each as a multiple of its layer's mean.

    Dead experts are crossed out; the most, and how many are dead, stand beside each layer.

    Args:
        loads: tokens that each expert received, [E], by layer.
    """
    names = short_names(list(loads))
    relative = [(load.double() / load.double().mean().clamp(min=1e-9)) for load in loads.values()]
    notes = [f"{float(row.max()):.1f}x {int((row == 0).sum())} dead" for row in relative]
    left, height = _left_of(names), max(9, min(18, 320 // len(names)))
    right = WIDTH - _MARGIN - round(6.1 * max(map(len, notes)))
    head = _Head(
        "load of experts: layers down, experts across",
        _Key(_shade, ("0", "mean", "2x or more")),
    )
    canvas, draw = _page(WIDTH, head.height + height * len(names) + _MARGIN)
    head.draw(draw)
    for row, (name, values) in enumerate(zip(names, relative, strict=True)):
        y = head.height + height * row
        draw.text((_MARGIN, y + height // 2 - 7), name, fill=_INK, font=_font(11))
        cell = min(40.0, (right - 4 - left) / len(values))
        for column, value in enumerate(values.tolist()):
            x, end = left + round(column * cell), left + round((column + 1) * cell)
            box = (x, y, max(end - (2 if cell > 4 else 1), x), y + height - 2)
            draw.rectangle(box, fill=_shade(min(value / 2, 1.0)))
            if value == 0:
                draw.line((box[0], box[1], box[2], box[3]), fill=_FAINT)
        draw.text((right, y + height // 2 - 7), notes[row], fill=_FAINT, font=_font(11))
    return _tensor(canvas)


def history_map(
    title: str, names: Sequence[str], steps: Sequence[int], values_LN: Tensor
) -> Tensor:
    """Layers down, steps across, light where a number is low: how layers have changed.

    Args:
        title: what the numbers are.
        names: of the layers.
        steps: at which they were written, ascending.
        values_LN: float [layers, steps]; NaN is left white.
    """
    names = short_names(names)
    left = _left_of(names)
    cells = WIDTH - left - _MARGIN
    # As wide as there is room: a column of the picture shows the writing nearest to it.
    columns = torch.linspace(0, len(steps) - 1, cells).round().long()
    known = values_LN[values_LN.isfinite()]
    least, most = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    height = max(8, min(18, 320 // len(names)))
    head = _Head(title, _Key(_shade, (f"{least:.3g}", f"{most:.3g}")))
    canvas, draw = _page(WIDTH, head.height + height * len(names) + _LINE + _MARGIN)
    head.draw(draw)
    for row, name in enumerate(names):
        y = head.height + height * row
        draw.text((_MARGIN, y + height // 2 - 7), name, fill=_INK, font=_font(11))
    colours_LC3 = _shades((values_LN[:, columns] - least) / max(most - least, 1e-12))
    shown = colours_LC3.repeat_interleave(height, 0)
    shown[height - 1 :: height] = 255
    canvas.paste(_canvas(shown), (left, head.height))
    foot = head.height + height * len(names)
    draw.text((left, foot), f"step {steps[0]}", fill=_FAINT, font=_font(11))
    end = f"{steps[-1]}"
    draw.text((WIDTH - _MARGIN - 7 * len(end), foot), end, fill=_FAINT, font=_font(11))
    return _tensor(canvas)


def patch_map(chosen_BS: Tensor, grid: tuple[int, int], *, most: int = 8) -> Tensor:
    """Which patches of images were kept: one square an image, four beside one another.

    Args:
        chosen_BS: bool [images, patches], patches row by row.
        grid: rows and columns of patches.
        most: images shown.
    """
    rows, columns = grid
    across = 4
    cell = max(1, ((WIDTH - _MARGIN) // across - _MARGIN) // max(rows, columns))
    images_BRC = chosen_BS[:most].reshape(-1, rows, columns).cpu()
    head = _Head("patches of images", _Key((_COMPUTED, _SKIPPED), ("kept", "left out")))
    step_x, step_y = columns * cell + _MARGIN, rows * cell + _MARGIN
    down = -(-len(images_BRC) // across)
    width = max(WIDTH, _MARGIN + across * step_x)
    canvas, draw = _page(width, head.height + down * step_y)
    head.draw(draw)
    gap = 2 if cell > 2 else 1
    for place, image_RC in enumerate(images_BRC.tolist()):
        left = _MARGIN + place % across * step_x
        top = head.height + place // across * step_y
        for row, kept_C in enumerate(image_RC):
            for column, kept in enumerate(kept_C):
                x, y = left + column * cell, top + row * cell
                box = (x, y, max(x + cell - gap, x), max(y + cell - gap, y))
                draw.rectangle(box, fill=_COMPUTED if kept else _SKIPPED)
    return _tensor(canvas)


def _bands(
    head: _Head,
    tokens: Sequence[str],
    names: Sequence[str],
    colours: Sequence[Sequence[Colour]],
    notes: Sequence[str],
) -> Tensor:
    """A cell for each layer and token under the text, broken into bands as lines of text are."""
    names = short_names(names)
    left = _left_of(names)
    right = WIDTH - _MARGIN - round(6.1 * max(map(len, notes)))
    per_band = (right - 2 - left) // _CELL
    row_height = max(3, min(10, 200 // len(names)))
    band_height = 13 + row_height * len(names) + 6
    most = max(1, min(4, 320 // band_height)) * per_band
    bands = range(0, min(len(tokens), most), per_band)
    canvas, draw = _page(WIDTH, head.height + band_height * len(bands) + _MARGIN)
    head.draw(draw)
    labelled = -(-9 // row_height)
    for band, start in enumerate(bands):
        top = head.height + band * band_height
        for column, token in enumerate(tokens[start : start + per_band]):
            draw.text((left + column * _CELL, top), _symbol(token), fill=_INK, font=_font(11))
        for row, name in enumerate(names):
            y = top + 13 + row * row_height
            if row % labelled == labelled - 1:
                draw.text((_MARGIN, y - 2), name, fill=_INK, font=_font(10))
            for column, colour in enumerate(colours[row][start : start + per_band]):
                x = left + column * _CELL
                draw.rectangle((x, y, x + _CELL - 2, y + row_height - 2), fill=colour)
            if band == 0 and row % labelled == labelled - 1:
                draw.text((right, y - 2), notes[row], fill=_FAINT, font=_font(10))
    return _tensor(canvas)


def _of_sequence(record: RoutingRecord, sequence: int) -> Tensor:
    assert record.chosen is not None
    chosen_T = record.chosen.detach().cpu()
    lengths = record.executed_lengths
    batch = 1 if lengths is None else lengths.shape[0]
    return chosen_T.unflatten(0, (batch, -1))[sequence]


def _page(width: int, height: int) -> tuple[Any, Any]:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (width, height), _PAPER)
    return canvas, ImageDraw.Draw(canvas)


@cache
def _font(size: int = 13) -> Any:
    """A fixed-width font where matplotlib brings one, else Pillow's own."""
    from PIL import ImageFont

    found = find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSansMono.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size - 1)
    return ImageFont.load_default(size)


def _shade(part: float) -> Colour:
    """A colour of the scale, 0 to 1."""
    return tuple(_shades(torch.tensor(part)).tolist())


def _shades(parts: Tensor) -> Tensor:
    """Colours of the scale, uint8 [..., 3]; white where a part is not finite."""
    known = parts.isfinite()
    place = parts.where(known, 0).clamp(0, 1) * (len(_SCALE) - 1)
    low = place.long().clamp(max=len(_SCALE) - 2)
    scale = torch.tensor(_SCALE, dtype=torch.float32)
    mixed = torch.lerp(scale[low], scale[low + 1], (place - low)[..., None].float())
    return mixed.round().where(known[..., None], 255).to(torch.uint8)


def _hue(place: float) -> Colour:
    """A colour of the wheel, 0 to 1; neighbours differ in lightness too."""
    value = 0.92 if round(place * 64) % 2 == 0 else 0.72
    return tuple(round(255 * part) for part in hsv_to_rgb(place, 0.62, value))


def _symbol(token: str) -> str:
    """A character that stands for a token: its first one that is no blank."""
    first = (token.strip() or token)[:1]
    replaced = {"\n": "¬", "\t": "»", " ": "·"}.get(first, first)
    return replaced if replaced.isprintable() else "¤"


def _canvas(image_HWC: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image_HWC.contiguous().numpy())


def _tensor(canvas: Any) -> Tensor:
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return pixels.view(canvas.height, canvas.width, 3)
