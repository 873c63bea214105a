"""Ratios add up before they are divided."""

import json
import math

import jax
import jax.numpy as jnp

from dspark_jax.metrics import Ratio, merge, values


def test_a_sum_of_ratios_is_the_ratio_of_sums():
    parts = [Ratio(jnp.float32(3.0), jnp.float32(4.0)), Ratio(jnp.float32(1.0), jnp.float32(12.0))]
    assert (parts[0] + parts[1]).value() == 4.0 / 16.0


def test_merge_adds_shared_names_and_keeps_the_others():
    merged = merge({"a": Ratio(1.0, 2.0), "b": Ratio(5.0, 8.0)}, {"a": Ratio(2.0, 4.0), "c": Ratio(1.0, 1.0)})
    assert merged == {"a": Ratio(3.0, 6.0), "b": Ratio(5.0, 8.0), "c": Ratio(1.0, 1.0)}


def test_ratios_pass_through_jit_and_scan():
    @jax.jit
    def total(weights):
        zero = {"x": Ratio(jnp.float32(0), jnp.float32(0))}
        return jax.lax.scan(lambda sums, w: (merge(sums, {"x": Ratio(2 * w, w)}), None), zero, weights)[0]

    assert values(total(jnp.array([1.0, 2.0, 5.0]))) == {"x": 2.0}


def test_without_observations_there_is_no_value():
    metrics = {"seen": Ratio(jnp.float32(0.0), jnp.float32(2.0)), "unseen": Ratio(jnp.float32(0.0), jnp.float32(0.0))}
    assert math.isnan(metrics["unseen"].value())
    assert values(metrics) == {"seen": 0.0}
    json.dumps(values(metrics), allow_nan=False)


def test_not_finite_values_are_kept():
    assert math.isnan(values({"loss": Ratio(jnp.float32(jnp.nan), jnp.float32(1.0))})["loss"])
