"""Tries every kernel of this device at the shapes of an experiment: whether it runs, is right, and is worth it.

    python -m dspark_jax.kernels --config dspark_qwen3_4b

calls every implementation that this platform asks of every operation that the config's target and drafter use and that
has kernels (docs/kernels.md), with random arrays of their sizes, and compares what it gives, gradients too, with what
XLA gives in float32 for the same arrays. No weights are needed. Most kernels have never run on a card or a TPU: this is
the first thing to do on a new one.

A line for each has the time of a call (the best of several, one device), its ratio to the floor (what the bytes and the
operations that no implementation can do without take, at the rates of a large copy and of a large product, both
measured here first; a cache that holds the arrays is faster), how many times as fast it is as XLA, and how far it is
from the definition: of numbers the norm of the difference over that of the definition, of tokens the share that
differs. It ends in the setting that goes without those that fail (`DSPARK_JAX_WITHOUT`), and in status 1 if there are
some. `--json FILE` writes the lines.

    python -m dspark_jax.kernels --config dspark_qwen3_4b --requests 1,32,128 --context 1024,8192

tries decoding rounds of all these sizes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from dspark_jax import command, platform
from dspark_jax.config import Config
from dspark_jax.json_file import write_json
from dspark_jax.ops.dispatch import SWITCHED_OFF, Unsupported
from dspark_jax.planning.cases import Case, cases
from dspark_jax.planning.timing import Rates, device_seconds
from dspark_jax.progress import log

FAR = 0.02
"""Of numbers in bfloat16, further from the definition than this is wrong."""

TOKENS = 0.05
"""Of drawn tokens; sums in another order draw another one where two lie close together, and then what follows it."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """What an implementation did in a case.

    Attributes:
      operation: its name.
      case: what the arguments were like.
      implementation: its name.
      milliseconds: of a call, None where it did not run.
      floor: the milliseconds that none can be faster than, None where it was not timed.
      error: from the definition, None where it did not run.
      refused: why it leaves the case to the next one, if it does.
      failed: why it must not be used, if so.
    """

    operation: str
    case: str
    implementation: str
    milliseconds: float | None = None
    floor: float | None = None
    error: float | None = None
    refused: str = ""
    failed: str = ""


def kernels(
    config: Config,
    workdir: Path,
    *,
    requests: Sequence[str | int] = (32,),
    context: Sequence[str | int] = (1024,),
    json: str | None = None,
) -> list[Tried]:
    """Tries them and prints what came of it.

    Args:
      config: resolved; its target's weights are not read.
      workdir: not used.
      requests: of decoding rounds, several numbers of them.
      context: tokens of each, several numbers of them, too.
      json: file for the lines, if any.

    Raises:
      InputError: a number is out of range.
      SystemExit: with status 1, after everything else, if one fails.
    """
    del workdir
    batches, lengths = command.positive_integers("requests", requests), command.positive_integers("context", context)
    device, rates = jax.devices()[0], Rates.measured()
    reached = f"copy {rates.bytes / 1e9:.0f} GB/s, product {rates.operations / 1e12:.2f} TFLOP/s"
    print(f"{device.device_kind}, jax {jax.__version__}: {reached}; shapes of {config.name}", flush=True)
    found: dict[tuple[str, str], list[Tried]] = {}
    for batch, length in itertools.product(batches, lengths):
        for case in cases(config, requests=batch, context=length):
            if (key := (case.operation.name, case.label)) in found:
                continue
            print(f"{case.operation.name}: {case.label}", flush=True)
            found[key] = [*tried(case, _implementations(case), rates)]
            plain = next((one.milliseconds for one in found[key] if one.implementation == "xla"), None)
            for one in found[key]:
                print(_line(one, plain), flush=True)
    return _summary([one for lines in found.values() for one in lines], rates, json)


def _summary(found: list[Tried], rates: Rates, json: str | None) -> list[Tried]:
    """Writes and prints what came of all of them, and ends the process if some failed."""
    if json is not None:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rates": dataclasses.asdict(rates)}
        write_json(Path(json), about | {"tried": [dataclasses.asdict(one) for one in found]})
        log(f"kernels: wrote {json}")
    failed = dict.fromkeys(f"{one.operation}.{one.implementation}" for one in found if one.failed)
    if failed:
        print(f"{len(failed)} must not be used here; go without: {SWITCHED_OFF}={','.join(failed)}", flush=True)
        raise SystemExit(1)
    own = {f"{one.operation}.{one.implementation}" for one in found if one.implementation != "xla" and not one.refused}
    print(f"{len(own)} kernels agree with the definition" if own else f"{platform.current()}: XLA alone, no kernels")
    return found


def _implementations(case: Case) -> list[str]:
    """Those that this platform asks, but for what the environment switches off."""
    operation = case.operation
    return [name for name in operation.order[platform.current()] if not operation.switched_off(name)]


def tried(case: Case, names: Sequence[str], rates: Rates | None = None) -> Iterator[Tried]:
    """Every implementation of a case, one after the other; timed if the device's rates are given."""
    try:
        arrays = case.arrays()
        floor = None if rates is None else 1e3 * rates.floor(*case.work(*arrays))
        with jax.default_matmul_precision("highest"):
            wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
            expected = jax.block_until_ready(jax.jit(lambda *x: case.function(*x, implementation="xla"))(*wide))
        del wide
    except jax.errors.JaxRuntimeError as error:  # it does not fit: smaller ones are tried all the same
        left = f"XLA in float32 did not run ({_first_line(error)})"
        yield from (Tried(case.operation.name, case.label, name, refused=left) for name in names)
        return
    for name in names:
        one = Tried(case.operation.name, case.label, name)
        call = functools.partial(case.function, implementation=name)
        try:
            error, wrong = distance(jax.block_until_ready(jax.jit(call)(*arrays)), expected)
            taken = None if rates is None else 1e3 * device_seconds(call, arrays, in_place=case.in_place)
            yield dataclasses.replace(one, milliseconds=taken, floor=floor, error=error, failed=wrong)
        except Unsupported as refusal:
            yield dataclasses.replace(one, refused=str(refusal))
        except Exception as error:  # whatever a compiler or a device raises: the others are tried all the same
            yield dataclasses.replace(one, failed=f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def distance(found: Any, expected: Any) -> tuple[float, str]:
    """How far arrays are from others of the same structure, the largest of all, and why that is too far, if it is."""
    worst, wrong = 0.0, ""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(other.dtype, jnp.integer):
            far, most = float(jnp.mean(one != other)), TOKENS
        else:
            one, other = one.astype(jnp.float32), other.astype(jnp.float32)
            far, most = float(jnp.linalg.norm(one - other) / jnp.maximum(jnp.linalg.norm(other), 1e-30)), FAR
        if not far <= most:  # NaN, too
            wrong = f"differs from the definition by {far:.2g}, more than {most:g}"
        worst = max(worst, far) if far == far else far
    return worst, wrong


def _line(one: Tried, plain: float | None) -> str:
    if one.milliseconds is None or one.error is None:
        return f"  {one.implementation:12} " + (f"FAILS: {one.failed}" if one.failed else f"leaves it: {one.refused}")
    ratio = f"{plain / one.milliseconds:6.2f} x XLA" if plain is not None else " " * 12
    over = one.milliseconds / one.floor if one.floor else 0.0
    floor = f"{over:7.1f} x floor" if over > 0.95 else f"{'< floor':>15}"
    text = f"  {one.implementation:12} {one.milliseconds:9.3f} ms {floor} {ratio}  differs by {one.error:.1e}"
    return text + (f"  FAILS: {one.failed}" if one.failed else "")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("requests", ["32"], "Of decoding rounds.", flag_values=values)
    flags.DEFINE_list("context", ["1024"], "Tokens of each of them.", flag_values=values)
    command.define_path(values, "json", "File for the lines. Default: none.")


if __name__ == "__main__":
    command.run(kernels, define=_define, writes=False, distributed=False)
