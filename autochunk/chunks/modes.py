"""One function by two programs: one as it is called, one as it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

Arrays = list[jax.Array]
Program = Callable[[Arrays], Arrays]


def for_both(forward: Program, training: Program, arrays: Arrays) -> Arrays:
    """The results of ``forward``, or of ``training`` where they are differentiated.

    A ``custom_jvp`` tells them apart: JAX asks for its rule only when it differentiates. The rule
    linearises ``training``, so derivatives of every order are those of ``training``. Arrays that
    the programs close over, such as traced ones, become arguments, for JAX to differentiate too.
    """
    traced = [jax.make_jaxpr(program)(arrays) for program in (forward, training)]
    if any(one.effects for one in traced):
        return _evaluated(traced[1], traced[1].consts, arrays)

    @jax.custom_jvp
    def both(constants: tuple[Arrays, Arrays], arrays: Arrays) -> Arrays:
        return _evaluated(traced[0], constants[0], arrays)

    def rule(primals: Any, tangents: Any) -> Any:
        leaves, structure = jax.tree.flatten(primals)
        moves = jax.tree.leaves(tangents, is_leaf=lambda one: isinstance(one, SymbolicZero))
        moving = [n for n, one in enumerate(moves) if not isinstance(one, SymbolicZero)]

        def of_moving(*values: jax.Array) -> Arrays:
            given = dict(zip(moving, values, strict=True))
            all_ = [given.get(n, leaf) for n, leaf in enumerate(leaves)]
            constants, arrays = jax.tree.unflatten(structure, all_)
            return _evaluated(traced[1], constants[1], arrays)

        return jax.jvp(of_moving, [leaves[n] for n in moving], [moves[n] for n in moving])

    both.defjvp(rule, symbolic_zeros=True)
    found: Arrays = both((traced[0].consts, traced[1].consts), arrays)
    return found


def _evaluated(program: Any, constants: Arrays, arrays: Arrays) -> Arrays:
    found: Arrays = jax.core.eval_jaxpr(program.jaxpr, constants, *arrays)
    return found
