"""What users log, turned into plain numbers and bytes; what can't be is refused with its key named."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ray_tracking.errors import MetricError
from ray_tracking.records import Histogram

MAX_TEXT = 1_000_000
"""Characters of one text that are kept; the rest is cut with a mark."""

_HISTOGRAM_BINS = 64
_LARGEST = 8.9e307
"""Half of the largest float, so that the range of a histogram is finite."""
_STEP_LIMIT = 2**63
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def is_step(value: object) -> bool:
    """Whether `value` is an int that the journal can hold."""
    return type(value) is int and -_STEP_LIMIT <= value < _STEP_LIMIT


def step(value: Any) -> int:
    """A step as an int of 64 bits: from an int, an integral float, an array or tensor of one. Raises MetricError."""
    try:
        number = int(value)
        if number == value and is_step(number):
            return number
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise MetricError(f"The step is no whole number of 64 bits: {value!r:.80}.", hint="For example step=run.step.")


def scalars(metrics: Mapping[str, Any], *, defer_gpu: bool = False) -> dict[str, Any]:
    """Numbers by key: nested mappings are joined with `/`; tensors and arrays of one element become floats.

    With `defer_gpu`, tensors on an accelerator become copies there, since reading one would make training wait
    for the device; a second call, on another thread, turns them into floats.
    Raises MetricError that names the key for anything that is no number.
    """
    if not isinstance(metrics, Mapping):
        raise MetricError(
            f"log_metrics takes a mapping of names to numbers, not {type(metrics).__name__}.",
            hint='For example run.log_metrics({"train/loss": loss}).',
        )
    return dict(_flatten("", metrics, defer_gpu))


def _flatten(prefix: str, metrics: Mapping[Any, Any], defer_gpu: bool) -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(f"{name}/", value, defer_gpu)
        elif defer_gpu and getattr(value, "is_cuda", False) and value.numel() == 1:
            yield name, value.detach().clone()
        else:
            yield name, _number(name, value)


def _number(key: str, value: Any) -> float:
    if isinstance(value, str | bytes) or value is None:
        raise _no_number(key, value)
    try:
        # item() of a tensor or array: float() of an array with dimensions is deprecated, and of a tensor that
        # requires a gradient a warning.
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        raise _no_number(key, value) from None


def _no_number(key: str, value: Any) -> MetricError:
    shape = getattr(value, "shape", None)
    found = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else repr(value)[:80]
    return MetricError(
        f"The metric {key!r} is no number: {found}.",
        hint="Allowed: numbers, and tensors or arrays of one element. "
        "Use log_text for text and log_histogram for many values.",
    )


def array(key: str, value: Any) -> Any:
    """A NumPy array of a tensor, array or sequence. Raises MetricError naming the key."""
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16
    try:
        result = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise MetricError(f"{key!r} can't be read as an array: {error}") from None
    if result.dtype.kind not in "fiub":
        raise MetricError(f"{key!r} holds {result.dtype}, not numbers.")
    return result


def histogram(key: str, value: Any) -> bytes:
    """Counts of the finite values in 64 equal bins, as JSON. `value`: a tensor, array or sequence of any shape."""
    import numpy as np

    flat = array(key, value).ravel().astype(np.float64, copy=False)
    finite = flat[np.isfinite(flat)]
    counts, edges = _counts(finite.clip(-_LARGEST, _LARGEST)) if finite.size else ([0], [0.0, 1.0])
    with np.errstate(over="ignore"):
        total, total_squares = float(finite.sum()), float(np.square(finite).sum())
    return Histogram(
        tuple(float(edge) for edge in edges), tuple(int(count) for count in counts), total, total_squares
    ).encode()


def _counts(finite: Any) -> tuple[Any, Any]:
    """Counts [B] and edges [B + 1]; one bin where 64 would be narrower than floats are apart."""
    import numpy as np

    try:
        return np.histogram(finite, bins=_HISTOGRAM_BINS)
    except ValueError:
        low, high = float(finite.min()), float(finite.max())
        return [finite.size], [low, high if high > low else math.nextafter(low, math.inf)]


def image(key: str, value: Any) -> bytes:
    """PNG bytes of a PIL image, or of an array or tensor [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4.

    Floats are taken as 0 to 1, integers as 0 to 255.
    """
    import numpy as np
    from PIL import Image

    if isinstance(value, Image.Image):
        picture = value
    else:
        pixels = array(key, value)
        channels = (1, 3, 4)
        if pixels.ndim == 3 and pixels.shape[0] in channels and pixels.shape[-1] not in channels:
            pixels = np.moveaxis(pixels, 0, -1)
        drawable = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in channels)
        if not drawable or pixels.size == 0:
            raise MetricError(
                f"The image {key!r} has shape {tuple(pixels.shape)}.",
                hint="Allowed: [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4.",
            )
        if pixels.dtype != np.uint8:
            scaled = np.nan_to_num(pixels.astype(np.float64)) * (1 if pixels.dtype.kind in "iu" else 255)
            pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def text(value: object) -> bytes:
    """UTF-8 of at most MAX_TEXT characters."""
    content = str(value)
    if len(content) > MAX_TEXT:
        content = f"{content[:MAX_TEXT]}\n… [cut: {len(content) - MAX_TEXT} more characters]"
    return content.encode("utf-8", "replace")
