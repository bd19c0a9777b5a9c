"""Attention for JAX within a memory limit, tuned once for each machine.

The command ``autochunk tune`` measures this machine and stores what was fastest for each shape.
Model code then runs that, by ``max_chunk_size_mb="auto"``, which is the default:

>>> import jax, jax.numpy as jnp
>>> import autochunk
>>> x = jnp.ones((2, 128, 4, 16))  # [batch, positions, heads, head size]
>>> out = jax.jit(autochunk.dot_product_attention)(x, x, x)  # as jax.nn.dot_product_attention
>>> out.shape
(2, 128, 4, 16)

In models:
    dot_product_attention    attention of query, key and value arrays
    MultiHeadAttention       haiku's module of that name, in bounded memory
    patch_jax_nn             a context: whatever calls ``jax.nn.dot_product_attention``
    ring_attention           a sequence that is spread over devices, in the order of ``ring_order``
    chunked                  any other function, for a part of its positions at a time
    autochunk.flax, autochunk.equinox, autochunk.haiku
                             modules of these libraries, also in models left as they are

What "auto" runs:
    use                      a context: a limit, a memory budget or a store of your own
    resolve, Resolution      what "auto" means for a call, and why
    Plan                     how a call runs

Measuring, and what was measured:
    tune, tune_chunks        measure attention; measure a function of ``chunked``
    Workload                 one call: its shapes, dtype and mode
    detect, Device           the device that results belong to
    ProfileStore             the profiles that are stored
    Profile, Measurement     all that was measured of a workload; one plan of these

Errors and warnings are in ``autochunk.errors``. Sizes in MB are 10^6 bytes, times are seconds. T'
and T are numbers of queries and keys, H is heads, K and V are sizes of a key and a value.
"""

# Where things are; each room imports only from those above it, which tests/test_imports.py holds:
#
# errors                   what callers can catch
# text                     text from elsewhere, made safe to print
# operands                 the arrays of a call, in one table
# implementations          the ways to compute attention, in one table
# plan                     how a call runs: an implementation, a limit, the slices of these
# blocks                   what is sliced where positions or lengths leave logits out
# workload                 one tunable call, and the one text that names it
# functions                the same of a function that is not attention
# host, nvidia, nvml       this machine, its GPUs, what disturbs those
# device                   where a result was measured, and how alike two such places are
# store/                   what is remembered
#   measurement, interval    one plan measured; how far apart two are
#   choice                   the plan that follows from several
#   profile                  all measurements of a workload on a device
#   profiles, rows           the user's own, in an SQLite file (database), which rescue mends
#                            by what is on its pages
#   programs                 of functions that were missed, beside the user's own
#   bundle                   profiles as a file that travels, of a text (json_text) at a place
#                            (files, remote); merge takes it in
# predict/                 what was never measured, from curves that were (numpy only)
#   work, memory, seconds    what a plan computes; what it holds, and takes, by physics
#   curves, process          what was measured as points; a Gaussian process over those
#   prediction, evaluate     the plan that follows; how good it is, by leaving curves out
# resolution/              how "auto" is answered
#   settings                 what ``use`` says
#   layers, places           what profiles are read from, and where those are
#   answer, nearest          what one profile answers, or that of a neighbour, or none
#   predicted                what several answer together
#   rule                     the usual plan, where nothing is known
#   snapshot, agree          all layers at a moment; one for all processes of a program
#   reporting                what users are told of it
#   resolve                  who is asked, in which order
#   functions                the same for functions that are not attention
# attention/               what runs in the model
#   arguments, checks        the arrays of a call, brought into form; what they must be
#   kernels/                 the attention itself, for a given plan: jax only, but for what
#                            ``libraries`` calls
#   op, jax_nn               the function, also in place of ``jax.nn``'s
#   ring                     a sequence whose keys no device holds whole
# haiku, flax, equinox     attention as these have it
# chunks/                  any other function, for a part of its positions at a time
#   axes, reductions         what is chunked, and how results are merged
#   loop, modes              the loop, and a program for calls that are differentiated
#   gradients                whether they can be
#   call, chunked            one call; the function that makes others chunked, on each device's
#                            share if types tell it (shares)
#   memory, rule             what a program takes, told from its jaxpr; chunks that fit
#   sizes, auto              what answers "auto"; what is left where nothing does (describe,
#                            export, in sizes of a ladder)
# tuner/                   what measures
#   tune, events             the loop over workloads, and what is told of it
#   effort, presets, task    how hard to look, at what, for how long
#   agenda, teaching         what comes when; which few of many workloads teach most
#   sharing, attempt         who measures what; what one worker does about one workload
#   search, outcome          the loop over one workload's plans (candidates, standing); what it
#                            found
#   earlier                  what is not searched anew
#   study/                   what is measured already, and by whom: alone or with other machines
#   sync                     what machines of one kind leave for each other where they meet
#                            (study/hub)
#   probe, process, worker   the measuring process, from outside, in between and from inside
#   autotuning               what XLA tries out for a GPU, kept
#   inputs, reference        what is computed there, and what it should give
#   measure                  how a program is timed, and its memory taken
#   functions/               the same for a function that is not attention: a subject, in a
#                            worker or here; candidates, search; tune
#   joint, unsure            rounds of the plans that are close, until one is clear; once more
#                            with time that is left
#   load, page_faults        what disturbs a measurement, or makes it slow
#   bench, peers             what tuning bought, and other ways to compute the same
#   rivals, layer            plans beside the chosen one: alone, in a Transformer layer's step
#   memory                   what plans take, each in a process of its own
#   verify                   whether a profile still holds
# watch/                   the service that measures while a device is idle
#   idle, todo               decided: is it idle, what comes next (pure data)
#   eyes, lock               what others do on the device; one service on each
#   job, running             what is measured, in a process of its own; that, ended in a second
#   record, publish          what it has done, for whoever asks; its bundle
#   service                  the loop
# report/                  results as plain data (records), drawn (tables, text, progress,
#                          evaluation); a report's pictures:
#   sources, peers           where its profiles and other libraries' times come from
#   curve, overview          a profile's memory-time curve; all that a report has
#   comparison               two sets of profiles side by side
#   scales, drawing, svg     a curve's axes; the figures, as SVG in a page's colors
#   terminal, page/          a curve in a terminal; one HTML file
# doctor                   looks over the whole set-up
# cli/                     the command: tune (measuring, functions), bench (comparing), show,
#                          explain, evaluate and doctor (looking), report (reporting), export,
#                          import and forget (moving), sync and watch (sharing)

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autochunk.attention.jax_nn import patch_jax_nn
    from autochunk.attention.op import dot_product_attention
    from autochunk.attention.ring import ring_attention, ring_order
    from autochunk.chunks.chunked import chunked
    from autochunk.device import Device, detect
    from autochunk.haiku import MultiHeadAttention
    from autochunk.plan import Plan
    from autochunk.resolution.answer import Resolution
    from autochunk.resolution.resolve import resolve
    from autochunk.resolution.settings import use
    from autochunk.store.measurement import Measurement
    from autochunk.store.profile import Profile
    from autochunk.store.profiles import ProfileStore
    from autochunk.tuner.functions.here import tune_chunks
    from autochunk.tuner.tune import tune
    from autochunk.workload import Workload

__version__ = "0.2.0"

# Loaded when first asked for, so that importing autochunk is quick and pulls in neither optuna nor
# sqlitedict.
_HOMES = {
    "Device": "autochunk.device",
    "Measurement": "autochunk.store.measurement",
    "MultiHeadAttention": "autochunk.haiku",
    "Plan": "autochunk.plan",
    "Profile": "autochunk.store.profile",
    "ProfileStore": "autochunk.store.profiles",
    "Resolution": "autochunk.resolution.answer",
    "Workload": "autochunk.workload",
    "chunked": "autochunk.chunks.chunked",
    "detect": "autochunk.device",
    "dot_product_attention": "autochunk.attention.op",
    "patch_jax_nn": "autochunk.attention.jax_nn",
    "resolve": "autochunk.resolution.resolve",
    "ring_attention": "autochunk.attention.ring",
    "ring_order": "autochunk.attention.ring",
    "tune": "autochunk.tuner.tune",
    "tune_chunks": "autochunk.tuner.functions.here",
    "use": "autochunk.resolution.settings",
}

__all__ = [
    "Device",
    "Measurement",
    "MultiHeadAttention",
    "Plan",
    "Profile",
    "ProfileStore",
    "Resolution",
    "Workload",
    "__version__",
    "chunked",
    "detect",
    "dot_product_attention",
    "patch_jax_nn",
    "resolve",
    "ring_attention",
    "ring_order",
    "tune",
    "tune_chunks",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
