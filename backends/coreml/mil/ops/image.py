"""Resizing and resampling of images.

All resizing samples a separable grid: one list of source coordinates an axis. The sampling modes
are those of MIL's `resize_bilinear`.
"""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, ints
from resplice.backends.coreml.mil.registry import implements


def grid(mode: str, size: int | torch.Tensor, count: int) -> torch.Tensor:
    """Source coordinates of `count` samples over `size` pixels, not yet limited to them.

    Args:
        mode: A MIL sampling mode, or one of `HALF_PIXEL` (equal to `UNALIGN_CORNERS`) and
            `ASYMMETRIC` (`i * size / count`).
        size: Pixels along the axis; a crop's extent may be fractional or negative.
        count: Samples along the axis.
    """
    steps = torch.arange(count, dtype=torch.float32)
    if mode in {"STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"}:
        if count > 1:
            return steps * ((size - 1) / (count - 1))
        return steps + ((size - 1) / 2 if mode == "ALIGN_CORNERS" else 0)
    if mode == "DEFAULT":
        return steps * ((size - size / count) / (count - 1)) if count > 1 else steps
    if mode == "OFFSET_CORNERS":
        span = max(1.0, float(size) - 1) / count
        return 0.5 * span + steps * span
    if mode == "ASYMMETRIC":
        return steps * (size / count)
    return (steps + 0.5) * (size / count) - 0.5


def _linear(x: torch.Tensor, axis: int, coordinates: torch.Tensor) -> torch.Tensor:
    """Linear interpolation along an axis; coordinates beyond the ends take the end's value."""
    last = x.shape[axis] - 1
    places = coordinates.clamp(0, last)
    low = places.floor().long()
    high = (low + 1).clamp(max=last)
    weight = (places - low).reshape([-1 if at == axis % x.dim() else 1 for at in range(x.dim())])
    below, above = x.index_select(axis, low), x.index_select(axis, high)
    return below + (above - below) * weight


def _nearest(x: torch.Tensor, axis: int, coordinates: torch.Tensor) -> torch.Tensor:
    return x.index_select(axis, coordinates.long().clamp(0, x.shape[axis] - 1))


def _bilinear(x: torch.Tensor, mode: str, height: int, width: int) -> torch.Tensor:
    x = _linear(x, -2, grid(mode, x.shape[-2], height))
    return _linear(x, -1, grid(mode, x.shape[-1], width))


@implements("resize_bilinear")
def resize_bilinear(
    x: torch.Tensor, target_size_height: int, target_size_width: int, sampling_mode: str
) -> torch.Tensor:
    """The last two axes in other sizes, linearly interpolated."""
    return _bilinear(x, sampling_mode, target_size_height, target_size_width)


@implements("resize_nearest_neighbor", moves=True)
def resize_nearest_neighbor(
    x: torch.Tensor, target_size_height: int, target_size_width: int
) -> torch.Tensor:
    """The last two axes in other sizes, by the pixel at `floor(i * size / count)`."""
    x = _nearest(x, -2, grid("ASYMMETRIC", x.shape[-2], target_size_height))
    return _nearest(x, -1, grid("ASYMMETRIC", x.shape[-1], target_size_width))


@implements("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(
    x: torch.Tensor, scale_factor_height: float, scale_factor_width: float
) -> torch.Tensor:
    """The last two axes enlarged by factors, by the pixel below."""
    height = int(x.shape[-2] * scale_factor_height)
    width = int(x.shape[-1] * scale_factor_width)
    return resize_nearest_neighbor(x, height, width)


@implements("upsample_bilinear")
def upsample_bilinear(
    x: torch.Tensor,
    scale_factor_height: float,
    scale_factor_width: float,
    align_corners: bool,
    half_pixel_centers: bool | None = None,
) -> torch.Tensor:
    """The last two axes enlarged by factors, linearly interpolated."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "HALF_PIXEL" if half else "ASYMMETRIC"
    height = int(x.shape[-2] * scale_factor_height)
    width = int(x.shape[-1] * scale_factor_width)
    return _bilinear(x, mode, height, width)


@implements("resize")
def resize(
    x: torch.Tensor,
    shape: Numbers,
    resized_dims: int,
    interpolation_mode: str,
    sampling_mode: str,
) -> torch.Tensor:
    """The last `resized_dims` axes in the sizes at the end of `shape`; 0 keeps a size."""
    dims = int(resized_dims)
    for axis, count in zip(range(-dims, 0), ints(shape)[-dims:], strict=True):
        if count in {0, x.shape[axis]} and sampling_mode != "OFFSET_CORNERS":
            continue
        places = grid(sampling_mode, x.shape[axis], count or x.shape[axis])
        if interpolation_mode == "NEAREST_NEIGHBOR":
            x = _nearest(x, axis, torch.floor(places + 0.5))
        else:
            x = _linear(x.to(torch.float32), axis, places)
    return x


@implements("crop_resize")
def crop_resize(
    x: torch.Tensor,
    target_height: int,
    target_width: int,
    normalized_coordinates: bool,
    spatial_scale: float,
    box_coordinate_mode: str,
    sampling_mode: str,
    roi: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
    box_indices: Numbers | None = None,
    pad_value: float = 0.0,
) -> torch.Tensor:
    """Boxes of `[B, C, H, W]` images, resized to one size.

    Up to iOS 16, `roi` is `[N, 1, 4 or 5, 1, 1]`, with the image's number first if there are
    five, and the result is `[N, B or 1, C, h, w]`; later, `boxes` is `[N, 4]`, `box_indices` names
    the images, and the result is `[N, C, h, w]`.
    """
    size = (target_height, target_width)
    if roi is not None:
        rows = roi.reshape(roi.shape[0], -1)
        corners = rows[:, -4:]
        images = [None if rows.shape[1] == 4 else int(row[0]) for row in rows]
    else:
        assert boxes is not None
        corners = boxes.to(torch.float32)
        images = list(range(len(boxes))) if box_indices is None else list(ints(box_indices))
    crops = []
    for corner, image in zip(corners, images, strict=True):
        source = x if image is None else x[image : image + 1]
        spans = _spans(corner, box_coordinate_mode)
        scale = torch.tensor(x.shape[-2:]) - 1 if normalized_coordinates else torch.ones(2)
        spans = spans * scale.reshape(2, 1) * spatial_scale
        axes = [
            start + grid(sampling_mode, end - start + 1, count)
            if end >= start
            else start - grid(sampling_mode, start - end + 1, count)
            for (start, end), count in zip(spans, size, strict=True)
        ]
        crops.append(_sample_box(source, axes, pad_value))
    result = torch.stack(crops)
    return result if roi is not None else result.squeeze(1)


def _spans(corner: torch.Tensor, mode: str) -> torch.Tensor:
    """First and last coordinate, `[[top, bottom], [left, right]]`."""
    pairs = corner.reshape(2, 2)
    if mode.startswith("CENTER_SIZE"):
        pairs = torch.stack((pairs[0] - pairs[1] / 2, pairs[0] + pairs[1] / 2))
    pairs = pairs.mT
    return pairs.flip(0) if mode.endswith("WIDTH_FIRST") else pairs


def _sample_box(x: torch.Tensor, axes: list[torch.Tensor], pad_value: float) -> torch.Tensor:
    result = _linear(_linear(x, -2, axes[0]), -1, axes[1])
    inside = [
        (places >= 0) & (places <= size - 1)
        for places, size in zip(axes, x.shape[-2:], strict=True)
    ]
    keep = inside[0].unsqueeze(-1) & inside[1]
    return torch.where(keep, result, torch.tensor(pad_value))


@implements("resample")
def resample(
    x: torch.Tensor,
    coordinates: torch.Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """Images `[B, C, H, W]` read at `[B, h, w, 2]` coordinates (x, y)."""
    sizes = x.shape[-1], x.shape[-2]
    places = [
        _reflected(
            _pixels(coordinates[..., at].to(torch.float32), size, coordinates_mode, align_corners),
            size, padding_mode,
        )
        for at, size in enumerate(sizes)
    ]  # fmt: skip
    if sampling_mode == "nearest":
        return _read(x, torch.round(places[1]), torch.round(places[0]), padding_value)
    top, left = places[1].floor(), places[0].floor()
    down, right = (places[1] - top).unsqueeze(1), (places[0] - left).unsqueeze(1)
    above, below = (
        _read(x, row, left, padding_value) * (1 - right)
        + _read(x, row, left + 1, padding_value) * right
        for row in (top, top + 1)
    )
    return above * (1 - down) + below * down


@implements("affine")
def affine(
    x: torch.Tensor,
    transform_matrix: torch.Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """Images `[B, C, H, W]` read at an affine map of the output's normalised coordinates."""
    y = torch.linspace(-1, 1, output_height).reshape(-1, 1).expand(-1, output_width)
    x_axis = torch.linspace(-1, 1, output_width).expand(output_height, -1)
    points = torch.stack((x_axis, y, torch.ones_like(y)), -1)
    matrix = transform_matrix.reshape(-1, 1, 2, 3)
    coordinates = torch.matmul(points.reshape(1, output_height, output_width, 3), matrix.mT)
    coordinates = coordinates.expand(x.shape[0], -1, -1, -1)
    return resample(
        x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners
    )


def _pixels(places: torch.Tensor, size: int, mode: str, align_corners: bool) -> torch.Tensor:
    if mode == "unnormalized":
        return places
    share = (places + 1) / 2 if mode == "normalized_minus_one_to_one" else places
    return share * (size - 1) if align_corners else share * size - 0.5


def _reflected(places: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Coordinates brought inside the image, unless constants are to surround it."""
    if mode == "constant":
        return places
    if mode == "border":
        return places.clamp(0, size - 1)
    low, span = (0.0, size - 1.0) if mode == "reflection" else (-0.5, float(size))
    if span == 0:
        return torch.zeros_like(places)
    turned = torch.remainder(places - low, 2 * span)
    inside = torch.where(turned > span, 2 * span - turned, turned) + low
    return inside.clamp(0, size - 1)


def _read(
    x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, outside: float
) -> torch.Tensor:
    """Pixels `[B, C, h, w]` at whole coordinates `[B, h, w]`."""
    height, width = x.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    row, column = rows.long().clamp(0, height - 1), columns.long().clamp(0, width - 1)
    places = (row * width + column).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    values = x.flatten(2).gather(2, places).reshape(*x.shape[:2], *rows.shape[1:])
    return torch.where(inside.unsqueeze(1), values, torch.tensor(outside))
