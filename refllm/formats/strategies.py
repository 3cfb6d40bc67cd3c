"""Hypothesis strategies that follow from a layout: its fields, and the units they pack to.

For property tests of readers and writers of a packed format, yours as well as refllm's: docs/formats/README.md.
Half of the arrays are made of few different numbers, the edges among them, and shrink towards zeros; the others are
random in every bit that a number has. Hypothesis belongs to the extra `test` and is imported by the calls.
"""

import numpy as np

from refllm.formats.layouts import Field, Layout, numbers


def fields_of(layout: Layout, shape: tuple[int, ...] | None = None, *, finite: bool = False):
    """Arguments for `layout.pack`: every number that its fields can hold.

    Parameters
    ----------
    layout : Layout
    shape : tuple of int, or a strategy of tuples
        Leading axes of all fields, that is how many units; by default one axis of 0 to 3.
    finite : bool
        Leave NaN and infinities out of the fields of floats.

    Returns
    -------
    strategy of dict of name to (*shape, count) array of the field's dtype

    Examples
    --------
    >>> from hypothesis import find
    >>> from refllm.formats.layouts import codes
    >>> pairs = Layout("pairs", 1, 2, (codes("q", 2, 4, "0", "4 * i"),))
    >>> find(fields_of(pairs, (1,)), lambda fields: (fields["q"] == 15).all())["q"].tolist()
    [[15, 15]]
    """
    from hypothesis import strategies as st

    values = {field.name: (field.count, _values(field, finite)) for field in layout.fields}
    return _shapes(shape).flatmap(
        lambda lead: st.fixed_dictionaries({name: of((*lead, count)) for name, (count, of) in values.items()})
    )


def units_of(layout: Layout, shape: tuple[int, ...] | None = None, *, finite: bool = False, any_bytes: bool = False):
    """Units as a writer leaves them, or bytes of all kinds, which a reader must survive.

    Parameters
    ----------
    layout, shape, finite
        As for `fields_of`.
    any_bytes : bool
        Also bits that no field owns, and bytes that no five base-3 digits give.

    Returns
    -------
    strategy of (*shape, nbytes) uint8

    Raises
    ------
    ValueError
        finite and any_bytes together: bytes of all kinds hold NaN.

    Examples
    --------
    >>> from hypothesis import find
    >>> from refllm.formats.blocks import Q8_0
    >>> units = find(units_of(Q8_0.layout, (2,)), lambda units: (Q8_0.layout.unpack(units)["q"] == -128).all())
    >>> units.shape, sorted(set(units[:, 2:].ravel().tolist()))
    ((2, 34), [128])
    """
    if finite and any_bytes:
        raise ValueError("finite and any_bytes exclude each other: bytes of all kinds hold NaN")
    if any_bytes:
        of = _values(numbers("bytes", "u1", 0, layout.nbytes), False)
        return _shapes(shape).flatmap(lambda lead: of((*lead, layout.nbytes)))
    return fields_of(layout, shape, finite=finite).map(lambda fields: layout.pack(**fields))


def _shapes(shape):
    from hypothesis import strategies as st

    if shape is None:
        return st.tuples(st.integers(0, 3))
    return st.just(shape) if isinstance(shape, tuple) else shape


def _values(field: Field, finite: bool):
    """A function of a shape: the strategy of such arrays of a field's numbers."""
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp

    dtype = np.dtype(field.dtype)
    if dtype.kind == "f":
        info = np.finfo(dtype)
        edges = [0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.smallest_normal, info.max, info.min]
        edges += [] if finite else [np.nan, np.inf, -np.inf]
        some = hnp.from_dtype(dtype, allow_nan=not finite, allow_infinity=not finite)
    else:
        edges, some = field.limits, st.integers(*field.limits)
    some = st.sampled_from(edges) | some
    seeds = st.integers(0, 2**32 - 1)
    return lambda shape: (
        hnp.arrays(dtype, shape, elements=some) | seeds.map(lambda seed: _random(field, shape, finite, seed))
    )


def _random(field: Field, shape: tuple[int, ...], finite: bool, seed: int) -> np.ndarray:
    """Numbers that are random in all their bits."""
    rng, dtype = np.random.default_rng(seed), np.dtype(field.dtype)
    if dtype.kind != "f":
        return rng.integers(*field.limits, shape, dtype, endpoint=True)
    bits = rng.integers(0, 1 << 8 * dtype.itemsize, shape, f"u{dtype.itemsize}")
    drawn = bits.view(dtype)
    return np.where(np.isfinite(drawn), drawn, dtype.type(0)) if finite else drawn
