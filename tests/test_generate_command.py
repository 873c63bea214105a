"""The generate command: a random drafter for the tiny target answers on the terminal."""

import dataclasses
import errno
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dspark_jax import command
from dspark_jax import run as resolved
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    MeshConfig,
    TargetConfig,
    resolve,
    to_json,
)
from dspark_jax.data.chat import answer_text, load_tokenizer, prompt_tokens, stop_tokens
from dspark_jax.engine import Models
from dspark_jax.engine import generate as decode
from dspark_jax.engine.request import Piece, TracedRound
from dspark_jax.engine.schedulers import SCHEDULERS, Scheduler
from dspark_jax.evaluation.run_scheduler import run_scheduler
from dspark_jax.evaluation.setup import open_decoder, open_drafter
from dspark_jax.generate import _define, _explained, _mark, _marks, generate
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target

BLOCK, BUDGET = 3, 24
DRAFTER = SimpleNamespace(block_size=BLOCK, confidence=object())
ONE_DEVICE = MeshConfig(1, 1, 1)
PROMPT = "the sum of the numbers"
ALONE = {"running": 1, "scheduled": 4, "rows": 4}
MARK = re.compile(r'([-+.=])("(?:[^"\\]|\\.)*")(?: (\d?\.\d\d))?')


class Run(NamedTuple):
    config: Config
    workdir: Path
    mesh: Any
    tokenizer: Any
    tokens: list[int]  # the target's own greedy answer


@pytest.fixture(scope="module")
def run(save_untrained: Any, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    drafter = DrafterConfig(num_layers=1, block_size=BLOCK, target_layer_ids=(0,), mask_token_id=319, markov_rank=8)
    data = DataConfig(prompts=("unused.jsonl",), max_prompt_length=100, max_length=140)
    target_config, settings = TargetConfig(path=str(tiny_target)), EvalConfig(max_new_tokens=BUDGET)
    config = resolve(Config("tiny", target=target_config, drafter=drafter, data=data, mesh=ONE_DEVICE, eval=settings))
    mesh, workdir = make_mesh(ONE_DEVICE, jax.devices()[:1]), tmp_path_factory.mktemp("generate")
    save_untrained(config, workdir, mesh)
    tokenizer = load_tokenizer(tiny_target)
    ids = prompt_tokens(tokenizer, [{"role": "user", "content": PROMPT}])
    stops = stop_tokens(tiny_target, tokenizer)
    plain = decode(Models(load_target(config.target, mesh)), [ids], max_new_tokens=BUDGET, stop_tokens=stops)
    return Run(config, workdir, mesh, tokenizer, plain.tokens[0].tolist())


def answer(run: Run, **options: Any) -> Any:
    return generate(run.config, run.workdir, mesh=run.mesh, **options)


def test_the_answer_is_the_targets(run: Run, capsys: Any, monkeypatch: Any) -> None:
    """From --prompt with a drafter, and from standard input without one."""
    request = answer(run, prompt=PROMPT)
    shown = capsys.readouterr()
    assert list(request.result().tokens) == run.tokens
    text = answer_text(run.tokenizer, run.tokens)
    assert shown.out == text + "\n"
    counted = re.fullmatch(
        rf"{len(run.tokens)} tokens, (\d+) rounds, tau (\d+\.\d\d), [\d.]+ tokens/s, first token after [\d.]+ s, "
        r"ended by (stop|length)\n",
        shown.err,
    )
    assert counted and int(counted[1]) == request.metrics.rounds > 0
    assert float(counted[2]) == round(request.metrics.emitted / request.metrics.rounds, 2) >= 1

    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    request = answer(run, plain=True)
    shown = capsys.readouterr()
    assert shown.out == text + "\n" and request.metrics.accepted == 0
    assert f"{len(run.tokens) - 1} rounds, tau 1.00" in shown.err


def expit(values: Any) -> Any:
    return 1 / (1 + np.exp(-values))


def test_explain_shows_what_became_of_every_draft(run: Run, capsys: Any) -> None:
    everything = [piece.round for piece in answer(run, prompt=PROMPT, explain=True).pieces if piece.round]
    threshold = float(expit(np.median([one.confidence for one in everything])))
    capsys.readouterr()
    request = answer(run, prompt=PROMPT, explain=True, threshold=threshold)
    lines, _, text = capsys.readouterr().out.partition("\n\n")
    assert text == answer_text(run.tokenizer, run.tokens) + "\n"
    first, *rounds = lines.split("\n")
    assert first == f"prompt   ={json.dumps(run.tokenizer.decode(run.tokens[:1]), ensure_ascii=False)}"
    assert len(rounds) == request.metrics.rounds
    kept: list[str] = [run.tokenizer.decode(run.tokens[:1])]
    signs = ""
    for number, line in enumerate(rounds, 1):
        assert line.startswith(f"round {number:<3}")
        marks = MARK.findall(line)
        assert len(marks) >= BLOCK and " ".join(m.group(0) for m in MARK.finditer(line)) == line[9:]
        signs += "".join(sign for sign, _, _ in marks)
        assert all(bool(confidence) == (sign != "=") for sign, _, confidence in marks)
        entry = request.pieces[number].round
        shown = [float(confidence) for _, _, confidence in marks[:BLOCK]]
        assert shown == pytest.approx(expit(np.asarray(entry.confidence)), abs=0.0051)
        kept += [json.loads(quoted) for sign, quoted, _ in marks if sign in "+="]
    assert kept[: len(run.tokens)] == [run.tokenizer.decode([token]) for token in run.tokens]
    assert signs.count("+") + signs.count("-") == request.metrics.admitted
    assert "." in signs and "-" in signs and "=" in signs


def test_marks_and_colours() -> None:
    entry = TracedRound((1, 2, 3, 4), (9.0, 0.0, -1.0, 2.0), admitted=3, accepted=1, next_token=5, **ALONE)
    plain = ['+"1" 1.00', '-"2" .50', '-"3" .27', '."4" .88', '="5"']
    assert _marks(entry, str, False) == plain
    coloured = [f"\x1b[{code}m{text}\x1b[0m" for code, text in zip((32, 31, 31, 90, 1), plain, strict=True)]
    assert _marks(entry, str, True) == coloured
    stopped = TracedRound((1, 2), None, admitted=2, accepted=2, next_token=None, **ALONE)
    assert _explained(Piece((1, 2), "", stopped), 12, str, colours=False) == 'round 12 +"1" +"2"'
    assert _mark("+", 'a"\n', None, False) == '+"a\\"\\n"'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_colours_are_for_terminals_that_want_them(run: Run, monkeypatch: Any, no_color: Any, coloured: bool) -> None:
    if no_color is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    answer(run, prompt=PROMPT, explain=True, max_new_tokens=2)
    assert ("\x1b[" in terminal.getvalue()) == coloured


def test_schedulers_read_what_the_working_directory_knows(tmp_path: Path) -> None:
    assert run_scheduler("threshold", DRAFTER, tmp_path).confidence == 0.5
    flat = run_scheduler("early_stop", DRAFTER, tmp_path)
    assert len(set(flat.steps_per_second.tolist())) == 1 and flat.temperatures is None
    (tmp_path / "calibration.json").write_text('{"temperatures": [1.5, 2.0, 0.5]}')
    table = {"sample_batch_tokens": [1, 2, 4], "sample_steps_per_sec": [30, 20, 10], "max_batch_tokens": 4}
    (tmp_path / "cost_table.json").write_text(json.dumps(table))
    known = run_scheduler("lagged", DRAFTER, tmp_path)
    assert known.temperatures.tolist() == [1.5, 2.0, 0.5] and known.bias is None
    both = {"temperatures": [1.5, 2.0, 0.5], "bias": -0.25, "temperatures_with_bias": [1.0, 1.25, 0.75]}
    (tmp_path / "calibration.json").write_text(json.dumps(both))
    shifted = run_scheduler("threshold", DRAFTER, tmp_path, confidence=0.3)
    assert shifted.temperatures.tolist() == [1.0, 1.25, 0.75] and float(shifted.bias) == -0.25
    assert known.steps_per_second.tolist()[1:] == [30, 20, 20, 10]
    assert known.prior.shape == (BLOCK,)
    with pytest.raises(InputError, match="nothing about rounds without drafts"):
        run_scheduler("adaptive", DRAFTER, tmp_path)
    (tmp_path / "cost_table.json").write_text(
        json.dumps(table | {"plain_batch_tokens": [1], "plain_steps_per_sec": [70]})
    )
    measured = run_scheduler("adaptive", DRAFTER, tmp_path)
    assert measured.plain_steps_per_second.tolist() == [70, 70]
    assert measured.steps_per_second.tolist()[1:] == [30, 20, 20, 10]
    (tmp_path / "cost_table.json").unlink()
    assert run_scheduler("adaptive", DRAFTER, tmp_path).steps_per_second.tolist() == [0.5]
    assert shifted.bias == measured.bias and measured.online.confident
    headless = run_scheduler("adaptive", SimpleNamespace(block_size=BLOCK, confidence=None), tmp_path)
    assert not headless.online.confident and headless.bias is None
    for name in ("threshold", "early_stop", "lagged"):
        with pytest.raises(
            InputError, match=f"--scheduler={name}: it reads a confidence head.*use --scheduler=fixed, or"
        ):
            run_scheduler(name, SimpleNamespace(block_size=BLOCK, confidence=None), tmp_path)
    for content, message in (("{}", "no calibration"), ('{"temperatures": [1]}', "has 1 temperatures; 3 positive")):
        (tmp_path / "calibration.json").write_text(content)
        with pytest.raises(InputError, match=message):
            run_scheduler("threshold", DRAFTER, tmp_path)


def test_a_cost_table_is_of_as_many_requests_as_are_decoded_together(tmp_path: Path) -> None:
    table = {"sample_batch_tokens": [1], "sample_steps_per_sec": [30], "max_batch_tokens": 1, "slots": 1}
    one, two = (run_scheduler("early_stop", DRAFTER, tmp_path, slots=n).steps_per_second.size for n in (1, 2))
    assert two - one == BLOCK + 1
    (tmp_path / "cost_table.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="table.json: measured with 1 requests at a time, and 2 .*profile --slots=1,2"):
        run_scheduler("early_stop", DRAFTER, tmp_path, slots=2)
    (tmp_path / "cost_table_s2.json").write_text(json.dumps(table | {"sample_steps_per_sec": [7], "slots": 2}))
    assert run_scheduler("early_stop", DRAFTER, tmp_path, slots=2).steps_per_second.tolist()[1:] == [7]
    assert run_scheduler("early_stop", DRAFTER, tmp_path).steps_per_second.tolist()[1:] == [30]
    assert run_scheduler("lagged", DRAFTER, tmp_path, slots=2).steps_per_second.tolist()[1:] == [7]
    (tmp_path / "cost_table.json").write_text(json.dumps(table | {"sample_steps_per_sec": [5], "slots": 2}))
    assert run_scheduler("early_stop", DRAFTER, tmp_path, slots=2).steps_per_second.tolist()[1:] == [5]  # the later one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": PROMPT, "scheduler": "none"}, "--scheduler='none' is unknown; use fixed, threshold"),
        ({"prompt": " \n"}, "the prompt is empty; give --prompt TEXT"),
        (
            {"prompt": "caf\udce9"},
            "--prompt is not UTF-8: it has the byte 0xe9 as its character 3; convert it to UTF-8",
        ),
        ({"prompt": "a", "temperature": -1.0}, "temperature=-1.0 is out of range"),
        ({"prompt": "a", "top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"prompt": "a", "seed": -4}, "seed=-4 is out of range"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0 is out of range; use 1 or more"),
        ({"prompt": "a", "max_new_tokens": 600}, "exceed the engine's capacity=512"),
        ({"prompt": "a", "plain": True, "explain": True}, "--plain decodes without drafts, --explain needs them"),
        ({"prompt": "a", "plain": True, "scheduler": "lagged"}, "--scheduler=lagged needs them"),
        ({"prompt": "a", "threshold": 0.5, "scheduler": "fixed"}, "is of no use to --scheduler=fixed"),
        ({"prompt": "a", "threshold": 1.5}, "--threshold=1.5 is no probability"),
    ],
)
def test_bad_options_are_one_line(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        answer(run, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"kind": "dflash", "markov_rank": 0, "confidence_head": False}, "drafter.kind is 'dspark' there and 'dflash'"),
        ({"block_size": 4}, "drafter.block_size is 3 there and 4 in the config"),
        ({"dtype": "bfloat16"}, "drafter.dtype is 'auto' there and 'bfloat16' in the config"),
    ],
)
def test_another_drafter_than_the_config_states_is_refused(run: Run, changes: Any, difference: str) -> None:
    """By all that open one: `generate`, and `open_decoder` of `evaluate`, `calibrate`, `profile` and `compare`."""
    config = dataclasses.replace(run.config, drafter=dataclasses.replace(run.config.drafter, **changes))
    whole = f"{run.workdir}/checkpoints/1: {difference}"
    for opened in (
        lambda: generate(config, run.workdir, mesh=run.mesh, prompt=PROMPT),
        lambda: open_decoder(resolved.Run(config, run.workdir, run.mesh)),
    ):
        with pytest.raises(InputError) as error:
            opened()
        assert str(error.value).startswith(whole) and f"; use --config {run.workdir}/config.json" in str(error.value)
    unused = dataclasses.replace(run.config.drafter, initializer_range=0.5)
    config = dataclasses.replace(run.config, drafter=unused)
    assert open_drafter(resolved.Run(config, run.workdir, run.mesh))[0] == 1


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"), "standard input is not UTF-8: it has the byte 0xe9 at 3"),
        (io.TextIOWrapper(io.BytesIO(b"\xe9"), "utf-8", "surrogateescape"), "it has the byte 0xe9 as its character 0"),
        (io.StringIO(" "), "the prompt is empty"),
        (None, "there is no standard input; give --prompt TEXT"),
    ],
)
def test_standard_input_that_is_no_text(run: Run, monkeypatch: Any, stream: Any, message: str) -> None:
    monkeypatch.setattr("sys.stdin", stream)
    with pytest.raises(InputError, match=message):
        answer(run)


def test_standard_input_that_cannot_be_read(run: Run, monkeypatch: Any) -> None:
    """A terminal that is gone."""

    def read() -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, read=read))
    with pytest.raises(InputError, match="standard input cannot be read .*; give --prompt TEXT"):
        answer(run)


def test_the_command(run: Run, capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint here"):
        generate(run.config, tmp_path, mesh=run.mesh, prompt="a")
    with pytest.raises(SystemExit) as status:
        command.run(generate, define=_define, argv=["--config", "missing.py", "--prompt=a"])
    assert status.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    command.run(generate, define=_define, argv=["--help"])
    shown = capsys.readouterr().out
    flags = ("prompt", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed", "scheduler", "threshold")
    assert all(f"--{name}\n" in shown for name in (*flags, "plain", "explain"))


RULE = """
import dataclasses
import jax
import jax.numpy as jnp
from dspark_jax.engine.schedulers import SCHEDULERS, Scheduler

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHalf(Scheduler):
    name = "first_half"
    reads_confidence = False

    def admit(self, proposal, active, history):
        batch, size = proposal.tokens.shape
        return self.within(jnp.full(batch, size // 2), active, size), history

    @classmethod
    def from_run(cls, measured):
        return cls()

SCHEDULERS["first_half"] = FirstHalf
"""


def test_a_rule_of_a_module_that_the_config_names(run: Run, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As docs/adding.md has it: the command line names the module and the rule."""
    (tmp_path / "rule_of_ones_own.py").write_text(RULE)
    (tmp_path / "config.json").write_text(to_json(run.config))
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["--config", str(tmp_path / "config.json"), "--config.imports=('rule_of_ones_own',)"]
    argv += ["--workdir", str(run.workdir), "--scheduler=first_half", f"--prompt={PROMPT}"]
    config, workdir, extra = command.parse(argv, _define)
    extra.pop("distributed")
    try:
        request = generate(resolve(config), workdir, mesh=run.mesh, **extra)
        assert {piece.round.admitted for piece in request.pieces if piece.round} <= {BLOCK // 2}
    finally:
        SCHEDULERS.pop("first_half", None)
    assert list(request.result().tokens) == run.tokens
    with pytest.raises(InputError, match="scheduler='' cannot be made by a command; give Scheduler a `from_run`"):
        Scheduler.from_run(SimpleNamespace())  # pyright: ignore[reportArgumentType]
