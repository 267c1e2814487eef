"""Types of numbers, JAX's own, bfloat16 say, among them: which are which, and no shorter than float32."""

import jax.numpy as jnp


def is_floating(dtype):
    """Whether it is a floating-point type of 16 bits or more, which JAX calculates with; what is no type is none."""
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating) and jnp.finfo(dtype).bits >= 16
    except TypeError:
        return False


def is_real(dtype):
    """Whether it is a floating-point type or one of whole numbers; a complex one, text and truth values are none."""
    return is_floating(dtype) or jnp.issubdtype(dtype, jnp.integer)


def wide(x):
    """x in float32 or better."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
