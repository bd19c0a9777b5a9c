"""Blocks of logits, of which some may be left out: properties over all sizes."""

from __future__ import annotations

from factories import logits_shapes
from hypothesis import given
from hypothesis import strategies as st

from autochunk.blocks import block_form, block_shape
from autochunk.plan import LogitsShape

REACHES = [(None, 0), (None, 5), (3, None), (255, 0), (2000, 2000)]
COVERING = [[], ["mask"], ["key_value_seq_lengths"], ["query_segment_ids"]]


@given(logits_shapes, st.sampled_from(REACHES), st.sampled_from(COVERING))
def test_blocks_cover_and_are_no_shorter_than_they_should_be(
    shape: LogitsShape, reach: tuple[int | None, int | None], names: list[str]
) -> None:
    """As equal as can be, no more than there may be, none shorter than 256 unless the whole is.

    Other axes stay as they were.
    """
    form = block_form(reach, names)
    assert form is not None
    assert min(form.rows, form.keys) >= 256
    block = block_shape(shape, form)
    assert block._replace(rows=shape.rows, keys=shape.keys) == shape
    for axis in ("rows", "keys"):
        whole, part, fewest = (getattr(sizes, axis) for sizes in (shape, block, form))
        assert part <= whole
        assert form.most is None or whole <= form.most * part
        assert part == whole or part >= fewest
    if form.band is not None and block.keys < shape.keys:
        assert block.rows + form.band <= block.keys < block.rows + form.band + 8


def test_masks_of_rows_own_are_cut_as_causality_is() -> None:
    """Beside positions and segments they change nothing."""
    by_mask = block_form((None, None), ["key_value_seq_lengths"], has_row_mask=True)
    assert by_mask == block_form((None, 0), [])
    for reach, names in (((None, 0), []), ((3, 5), []), ((None, None), ["query_segment_ids"])):
        assert block_form(reach, names, has_row_mask=True) == block_form(reach, names)


def test_where_all_is_seen_there_are_no_blocks() -> None:
    """What is cut into slices is then the whole."""
    assert block_form((None, None), []) is None
    shape = LogitsShape(2, 3, 1, 4096, 4096, 4)
    assert block_shape(shape, None) == shape
