"""Time by physics: what makes one kernel slower than another is counted."""

from __future__ import annotations

import pytest

from autochunk.plan import Plan
from autochunk.predict.seconds import seconds
from autochunk.predict.work import work_of
from autochunk.workload import MODES, Workload


def took(text: str, implementation: str, mode: str = "forward", platform: str = "gpu") -> float:
    return seconds(
        Workload.parse(text, dtype="bfloat16", mode=mode), Plan(implementation), platform
    )


@pytest.mark.parametrize(
    ("implementation", "mode", "skips"),
    [
        ("cudnn", "forward", True),
        ("cudnn", "training", True),
        ("tokamax_mosaic", "forward", True),
        ("tokamax_mosaic", "training", False),
        ("tokamax_triton", "forward", False),
    ],
)
def test_only_some_skip_what_is_outside_a_window(
    implementation: str, mode: str, skips: bool
) -> None:
    """Where a kernel does not, the window saves it nothing."""
    shape = "b=1,t=8192,h=8,k=64"
    plain, window = (took(shape + text, implementation, mode) for text in ("", ",window=255:0"))
    assert (window < plain / 4) == skips


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    ("implementation", "skips_in"),
    [("cudnn", "training"), ("tokamax_mosaic", "forward"), ("tokamax_triton", "forward")],
)
def test_only_some_skip_what_is_beyond_lengths(
    implementation: str, skips_in: str, mode: str
) -> None:
    """Of keys; lengths of queries alone save none of them anything, and zeros cost as much."""
    shape = "b=8,t=2048,h=16,k=64"
    keys, queries = (
        took(shape + text, implementation, mode) for text in (",kv_lengths=yes", ",q_lengths=yes")
    )
    assert (keys < 0.95 * queries) == (mode == skips_in)


def test_few_rows_leave_a_gpu_waiting() -> None:
    """As many logits of few rows take a fused kernel longer; a CPU has no such blocks."""
    few, many = "b=1,t=512,s=32768,h=8,k=64", "b=1,t=4096,s=4096,h=8,k=64"
    assert took(few, "cudnn") > 1.5 * took(many, "cudnn")
    few, many = "b=1,t=256,s=4096,h=2,k=64", "b=1,t=1024,s=1024,h=2,k=64"  # no pages to count
    assert took(few, "xla", platform="cpu") == pytest.approx(
        took(many, "xla", platform="cpu"), rel=0.01
    )


@pytest.mark.parametrize(("form", "mode"), [(",mask=b1ts", "training"), (",bias=1hts", "forward")])
def test_masks_are_read(form: str, mode: str) -> None:
    """For each head, and by cuDNN's kernel in more bytes than by others."""
    shape = "b=8,t=2048,h=16,k=64"
    more = {
        name: took(shape + form, name, mode) - took(shape, name, mode)
        for name in ("cudnn", "tokamax_triton")
    }
    assert more["cudnn"] >= more["tokamax_triton"] > 0


@pytest.mark.parametrize("keys", [256, 2048])
@pytest.mark.parametrize("form", [",mask=b1ts", ",mask=b11s", ",q_segments=yes,kv_segments=yes"])
def test_what_masks_hide_is_left_out(form: str, keys: int) -> None:
    """Forward, by kernels that are told of it where there are many keys."""
    shape = f"b=8,t={keys},h=16,k=64"
    for name in ("cudnn", "tokamax_triton", "tokamax_mosaic"):
        for mode in MODES:
            of_all, of_some = (
                work_of(Workload.parse(text, mode=mode), Plan(name)).logits
                for text in (shape, shape + form)
            )
            skips = name != "cudnn" and keys > 1024 and mode == "forward"
            assert (of_some < 0.9 * of_all) == skips


def test_keys_for_all_heads_are_written() -> None:
    """Dense attention repeats grouped keys, which takes a decoding step longer than its logits."""
    grouped, single = "b=32,t=1,s=4096,h=32,kv_heads=8,k=128", "b=32,t=1,s=4096,h=8,k=128"
    assert took(grouped, "dense") > 2 * took(single, "dense")


@pytest.mark.parametrize("term", [",dropout=bht", ",soft_cap=yes"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_computed_of_each_logit_takes_time(term: str, platform: str) -> None:
    """In a training step of slices more than in one of dense attention, which hashes less often."""
    shape = "b=8,t=1024,h=12,k=64"
    more = {
        name: took(shape + term, name, "training", platform)
        - took(shape, name, "training", platform)
        for name in ("dense", "xla")
    }
    assert more["xla"] > more["dense"] > 0


def test_pages_of_large_buffers_take_a_cpu_time() -> None:
    """Eight times as many logits take longer than that, where they are more than is kept."""
    one, eight = "b=1,t=1024,h=4,k=64", "b=8,t=1024,h=4,k=64"
    assert took(eight, "xla", platform="cpu") > 8.4 * took(one, "xla", platform="cpu")
    assert took(eight, "xla") <= 8 * took(one, "xla")
