"""The notebooks, executed from top to bottom on a tiny target, with a cell of settings that fits it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from tests.compiling import QUICKLY

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = (
    "drafter.num_layers=1", "drafter.block_size=2", "drafter.target_layer_ids=(0,)", "drafter.mask_token_id=319",
    "drafter.markov_rank=8", "data.max_prompt_length=64", "data.max_length=96", "data.min_loss_tokens=2",
    "data.decode_batch_size=4", "train.steps=2", "train.batch_size=8", "train.accumulate=1", "train.num_anchors=4",
    "train.log_every=1", "train.vocab_chunk=64", "eval.max_new_tokens=16", "eval.batch_size=4",
    "eval.temperatures=(1.0,)", "eval.speed_prompts=0", "eval.bootstrap=50",
)  # fmt: skip


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncKernelManager]:
    """One process for both, since most of the time goes into what it imports and compiles; one device, as a laptop."""
    compiled = str(tmp_path_factory.mktemp("compiled"))
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
        patch.setenv("XLA_FLAGS", QUICKLY)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield manager
    if manager.has_kernel:
        run_sync(manager.shutdown_kernel)(now=True)


def execute(
    kernel: AsyncKernelManager, name: str, target: Path, folder: Path, **settings: Any
) -> tuple[list[str], int]:
    """Runs a notebook from an empty namespace.

    Returns:
      What each cell of code printed, and how many figures there are.
    """
    prompts = folder / "sums.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"add {i}"}) + "\n" for i in range(8)))
    settings["OVERRIDES"] = [f"--config.{override}" for override in OVERRIDES]
    if "TARGET" not in settings:  # it is the embedded one, with its own prompts
        files = (f"target.path={target}", f"data.prompts=({str(prompts)!r},)", f"eval.prompts=({str(prompts)!r},)")
        settings["OVERRIDES"] += [f"--config.{override}" for override in files]
    lines = [f"WORKDIR, CONFIG = Path({str(folder / 'run')!r}), ROOT / 'configs' / 'quickstart.py'"]
    lines += [f"{key} = {value!r}" for key, value in settings.items()]

    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells), "stored with outputs"
    tagged = {tag: cell for cell in book.cells for tag in cell.metadata.get("tags", ())}
    assert set(tagged) == {"install", "parameters"}
    assert "%pip install" in tagged["install"].source
    for key in settings:
        assert key in tagged["parameters"].source, f"{name} has no {key}"
    tagged["parameters"].source = "\n".join(lines)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code" and cell is not tagged["install"]]
    book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    place = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(book, kernel, timeout=600, resources=place).execute()
    said = ["".join(out.text for out in cell.outputs if out.output_type == "stream") for cell in book.cells]
    return said, sum("image/png" in out.get("data", {}) for cell in book.cells for out in cell.outputs)


pytestmark = pytest.mark.slow


def saying(said: list[str], text: str) -> str:
    """What the one cell printed that printed `text`."""
    (found,) = [one for one in said if text in one]
    return found


def test_quickstart(kernel: AsyncKernelManager, tiny_target: Path, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"  # room for one user
    costs.write_text(json.dumps({"sample_batch_tokens": [1, 3], "sample_steps_per_sec": [9, 5], "max_batch_tokens": 3}))
    said, figures = execute(
        kernel, "quickstart.ipynb", tiny_target, tmp_path, QUESTIONS=["add 1", "add 2"], COST_TABLE=str(costs)
    )
    run = tmp_path / "run"
    drawn = {path.stem for path in (run / "eval").glob("*.png")}
    assert {"survival", "throughput", "reliability_sts"} <= drawn
    assert figures == 1 + len(drawn) + sum("reliability" in name for name in drawn)
    assert saying(said, "samples; the first one").count("<|im_start|>") == 2
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    evaluated = saying(said, "load, replayed on costs.json")
    assert "macro average" in evaluated and "all 8 answers are token-identical" in evaluated
    assert "round 1 " in saying(said, "prompt   =")
    served = saying(said, "add 1 -> ")
    assert served.index("add 1 -> ") < served.index("add 2 -> ")
    assert len(json.loads((run / "calibration.json").read_text())["temperatures"]) == 2
    assert "SGLang  " in saying(said, "deepspec dialect:")
    assert (run / "export" / "README.md").read_text() in said[-1]
    assert (run / "export" / "model.safetensors").stat().st_size > 10_000


def test_tpu_vm(kernel: AsyncKernelManager, tiny_target: Path, tmp_path: Path) -> None:
    prompts, target = str(tmp_path / "sums.jsonl"), str(tiny_target)
    said, figures = execute(
        kernel, "tpu_vm.ipynb", tiny_target, tmp_path, TARGET=target, PROMPTS=prompts, HELDOUT=prompts, SLOTS=(1,)
    )
    run = tmp_path / "run"
    drawn = {path.stem for path in (run / "eval").glob("*.png")}
    assert {"cost", "survival"} <= drawn and figures == 2 + len(drawn)
    assert saying(said, "'fsdp': 1")
    assert '"samples": 8' in saying(said, '"loss_tokens"')
    assert "MiB of weights" in saying(said, "MiB")
    assert "macro average" in saying(said, "all 8 answers are token-identical")
    assert json.loads((run / "eval" / "load.json").read_text())["cost_table"] == "cost_table.json"
    assert "SGLang  " in saying(said, "deepspec dialect:")
    assert (run / "export" / "model.safetensors").stat().st_size > 10_000
