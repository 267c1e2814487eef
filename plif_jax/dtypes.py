"""Number types, JAX's bfloat16 included: which are which, and widening to float32."""

import jax
import jax.numpy as jnp
import numpy as np


def is_floating(dtype):
    """Whether it is a floating-point type of at least 16 bits, with which JAX calculates; False for what is no type."""
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating) and jnp.finfo(dtype).bits >= 16
    except TypeError:
        return False


def is_real(dtype):
    """Whether it is a floating-point or integer type; complex numbers, text and truth values are not."""
    return is_floating(dtype) or jnp.issubdtype(dtype, jnp.integer)


def is_whole(n, least=1):
    """Whether n is a whole number from `least`."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= least


def at_least_float32(dtype):
    """A floating-point type, or float32 where it is shorter."""
    with jax.numpy_dtype_promotion("standard"):  # whatever the user forbids
        return jnp.promote_types(dtype, jnp.float32)


def wide(x):
    """x in float32 or better."""
    return x.astype(at_least_float32(x.dtype))
