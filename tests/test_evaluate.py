"""End to end: a random drafter for the tiny target is saved, loaded, decoded with and measured."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dspark_jax import command, jobs
from dspark_jax import run as resolved
from dspark_jax.benchmarks import BENCHMARKS
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    MeshConfig,
    TargetConfig,
    TrainConfig,
    resolve,
)
from dspark_jax.data.chat import load_tokenizer, prompt_tokens, stop_tokens
from dspark_jax.data.prompts import Prompt
from dspark_jax.data.regenerate import Conversation
from dspark_jax.engine.generate import decode
from dspark_jax.engine.models import Models
from dspark_jax.evaluate import _define, evaluate, show
from dspark_jax.evaluation import speed
from dspark_jax.evaluation.decoding import (
    Decoder,
    Request,
    Requests,
    answer,
    compare_greedy,
    first_difference,
    first_requests,
)
from dspark_jax.evaluation.held_out import HeldOutPrompts
from dspark_jax.evaluation.load import replay
from dspark_jax.evaluation.summary import overview, table
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import load_drafter

BLOCK, BUDGET = 3, 10
WIDTH = 96  # the same in all tests, so that they share executables
ONE_DEVICE = MeshConfig(1, 1, 1)


class Run(NamedTuple):
    config: Config
    workdir: Path
    mesh: Any
    metrics: dict[str, Any]
    printed: str
    compiled: int


def make_config(target: Path, folder: Path) -> Config:
    """Two sets; in the first, a line is malformed and a prompt too long. All prompts fit into `WIDTH` tokens."""
    math, chat = folder / "math.jsonl", folder / "chat.jsonl"
    lines = [json.dumps({"turns": ["how much is " + "one and " * 2 * i + "one"]}) for i in range(5)]
    math.write_text("\n".join([*lines, "{broken", json.dumps({"prompt": "x" * 300})]) + "\n")
    chat.write_text("".join(json.dumps({"prompt": f"say {i}", "id": 1}) + "\n" for i in range(4)))
    drafter = DrafterConfig(num_layers=1, block_size=BLOCK, target_layer_ids=(0,), mask_token_id=319, markov_rank=8)
    return resolve(
        Config(
            name="tiny",
            target=TargetConfig(path=str(target)),
            drafter=drafter,
            data=DataConfig(max_prompt_length=100, max_length=140),
            mesh=ONE_DEVICE,
            eval=EvalConfig(
                prompts=(str(math), str(chat)), batch_size=4, max_new_tokens=BUDGET, speed_prompts=1, bootstrap=50
            ),
        )
    )


@pytest.fixture(scope="module")
def run(save_untrained: Any, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("evaluate")
    config, workdir = make_config(tiny_target, folder), folder / "run"
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    save_untrained(config, workdir, mesh)
    costs = folder / "costs.json"  # room for two users
    costs.write_text(json.dumps({"sample_batch_tokens": [1, 4], "sample_steps_per_sec": [9, 5], "max_batch_tokens": 8}))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *text, sep=" ", **_: printed.append(sep.join(map(str, text))))
        # One contender in traffic, short replays, no vector graphics: the rest would only take longer.
        alone = lambda models, _: {"plain": (models.plain(), None)}  # noqa: E731
        patch.setattr("dspark_jax.evaluation.traffic.traffic_contenders", alone)
        patch.setattr("dspark_jax.evaluation.load.replay", functools.partial(replay, steps=96))
        patch.setattr("dspark_jax.evaluation.plots.Plot.svg", lambda self, theme: "<svg/>")
        before = decode._cache_size()
        metrics = evaluate(config, workdir, mesh=mesh, cost_table=str(costs), traffic="50", traffic_requests=4)
        compiled = decode._cache_size() - before
    return Run(config, workdir, mesh, metrics, "\n".join(printed), compiled)


def test_metrics_have_the_documented_layout(run: Run):
    written = json.loads((run.workdir / "eval/metrics.json").read_text())
    assert written["step"] == 1  # of `save_untrained`
    assert written == run.metrics
    assert written["temperature"] == 1.0 and list(written["temperatures"]) == ["0.0"]
    for one in (written, written["temperatures"]["0.0"]):
        assert list(one["prompt_sets"]) == ["math", "chat"]
        for name, row in one["prompt_sets"].items():
            assert (row["prompts"], row["answers"]) == {"math": (5, 5), "chat": (4, 4)}[name]
            assert row["tau"] == pytest.approx(row["tokens"] / row["rounds"])
            assert row["tau_ci95"][0] <= row["tau"] <= row["tau_ci95"][1]
            assert 1 <= row["tau"] <= BLOCK + 1
            assert 0 < row["mean_answer_tokens"] <= BUDGET and 0 <= row["stopped"] <= 1
            for key in ("conditional_acceptance", "survival"):
                assert len(row[key]) == len(row[key + "_ci95"]) == BLOCK
        assert one["tau"] == pytest.approx(np.mean([row["tau"] for row in one["prompt_sets"].values()]))
        assert one["rounds"] == sum(row["rounds"] for row in one["prompt_sets"].values())
        assert one["tokens_per_second"] > 0 and one["baseline_tokens_per_second"] > 0
        assert one["speedup"] == pytest.approx(one["tokens_per_second"] / one["baseline_tokens_per_second"])
        rate = one["adaptive_tokens_per_second"]
        assert one["adaptive_speedup"] == pytest.approx(rate / one["baseline_tokens_per_second"])
        for name in ("speedup", "adaptive_speedup"):
            assert one[f"{name}_ci95"][0] <= one[name] <= one[f"{name}_ci95"][1]
        assert one["round_cost"] > 0
    assert written["calibration"]["by_position"]["weight"][0] == written["rounds"]
    assert 0 <= written["calibration"]["ece"] <= 1 and 0 <= written["calibration"]["brier"] <= 1
    assert written["temperatures"]["0.0"]["calibration"] is None


def test_nothing_is_compiled_twice(run: Run):
    """At both temperatures a program for all answers and one for each of three ways at batch 1, and plain answers."""
    assert run.compiled == 2 * (1 + 3) + 1


def test_greedy_output_is_plain_decoding(run: Run):
    assert run.metrics["greedy_identical"] is True
    assert (run.metrics["greedy_compared"], run.metrics["greedy_different"]) == (9, 0)


def test_training_measures_what_evaluate_measures(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BENCHMARKS, "chat", dataclasses.replace(BENCHMARKS["mt-bench"], domain="code"))
    greedy = dataclasses.replace(run.config.eval, temperatures=(0.0, 1.0))
    settings = TrainConfig(evaluate_limit=0, evaluate_tokens=BUDGET)
    config, metrics = dataclasses.replace(run.config, eval=greedy, train=settings), run.metrics["temperatures"]["0.0"]
    models, before = engine_of(run).models, decode._cache_size()
    with jax.set_mesh(run.mesh):
        held_out = HeldOutPrompts(resolved.Run(config, run.workdir, run.mesh), models.target)
        row, noted = held_out.measure(models.drafter)
    assert decode._cache_size() <= max(before, 1)  # the program of `evaluate`, if it is still there
    assert row["heldout/tau"] == metrics["tau"] == noted.tau
    assert row["heldout/domain/code"] == row["heldout/tau/chat"] and "heldout/domain/chat" not in row
    for name, one in metrics["prompt_sets"].items():
        assert row[f"heldout/tau/{name}"] == one["tau"]
    rates = [one["conditional_acceptance"][0] for one in metrics["prompt_sets"].values()]
    assert min(rates) <= row["heldout/conditional@1"] <= max(rates)
    config.train.evaluate_tokens = 3  # what is asked otherwise cannot be compared
    assert HeldOutPrompts(resolved.Run(config, run.workdir, run.mesh), models.target).about != noted.asked


def test_unusable_prompts_are_set_aside_and_counted(run: Run):
    assert run.metrics["rejected"] == {"malformed": 1, "prompt_too_long": 1}
    lines = [json.loads(line) for line in (run.workdir / "eval/rejected.jsonl").read_text().splitlines()]
    assert sorted(line["line"] for line in lines) == [6, 7]
    assert f"set aside in {run.workdir / 'eval/rejected.jsonl'}: 1 malformed line, 1 prompt too long\n" in run.printed


def test_fields_of_prompts_that_are_not_used_are_named(run: Run):
    assert run.metrics["unused"] == {"id": 4}
    assert "evaluate: fields of prompts that are not used: `id` of 4\n" in run.printed


def test_figures_are_written_with_their_numbers(run: Run):
    names = {"conditional_acceptance", "survival", "threshold", "reliability", "throughput", "budget"}
    names |= {"reliability_sts", "reliability_bias_sts", "traffic"}
    written = {path.stem for path in (run.workdir / "eval").glob("*.png")}
    assert written == names
    for name in names:
        assert (run.workdir / f"eval/{name}.png").stat().st_size > 5000
    sweep = json.loads((run.workdir / "eval/threshold.json").read_text())
    assert sweep["math"]["tau"][0] == pytest.approx(run.metrics["prompt_sets"]["math"]["tau"])


def test_the_serving_engine_was_driven_with_traffic(run: Run):
    (point,) = json.loads((run.workdir / "eval/traffic.json").read_text())["plain"]
    assert (point["served"], point["refused"], point["offered"]) == (4, 0, 50.0)
    assert point["tokens_per_second"] > 0 and point["budget"] == 1.0
    assert "open-loop traffic" in run.printed


def test_load_is_replayed_on_the_given_table(run: Run):
    load = json.loads((run.workdir / "eval/load.json").read_text())
    assert load["cost_table"] == "costs.json"
    plain = load["curves"]["plain"]
    assert plain["concurrency"] == [1, 2] and plain["tokens_per_second"] == pytest.approx([9, 18])
    full = load["curves"]["fixed 3"]
    assert full["budget"] == [4, 4]
    assert full["tokens_per_second"][1] == pytest.approx(2 * 5 * full["accepted_length"][1])


def _gains(load: dict[str, Any]) -> list[float]:
    plain, full = (load["curves"][name]["tokens_per_second"] for name in ("plain", f"fixed {BLOCK}"))
    return [one / other for one, other in zip(full, plain, strict=True)]


def test_calibration_halves_cover_all_rounds(run: Run):
    data = json.loads((run.workdir / "eval/calibration.json").read_text())
    assert data["fitted_rounds"] + data["scored_rounds"] == run.metrics["rounds"]
    assert list(data["predictors"]) == ["head", "head+STS", "head+bias+STS", "online"]
    assert len(data["temperatures"]) == BLOCK


def test_report_shows_the_run(run: Run):
    page = (run.workdir / "eval/report.html").read_text()
    assert f"{run.metrics['prompt_sets']['math']['tau']:.3f}" in page
    assert page.count("<img") == 9 and "costs.json" in page


def test_the_command_ends_in_twenty_lines(run: Run):
    """Accepted length with intervals by prompt set, speed, losslessness and the report, and the traffic asked for."""
    page = run.workdir / "eval/report.html"
    load = json.loads((run.workdir / "eval/load.json").read_text())
    shown = overview(run.metrics, page, load)
    before = run.printed.removesuffix(shown)
    assert len(before) < len(run.printed) and before.count("open-loop traffic") == 1
    assert not any(word in before for word in ("ECE", "load, replayed", "macro average"))
    lines = shown.splitlines()
    assert len(lines) <= 20 and max(map(len, lines[:-1])) <= 80 and str(page) in lines[-1]
    (math,) = (line for line in lines if line.startswith("math "))
    greedy = run.metrics["temperatures"]["0.0"]
    for one in (run.metrics, greedy):
        tau, (low, high) = one["prompt_sets"]["math"]["tau"], one["prompt_sets"]["math"]["tau_ci95"]
        assert f" {tau:.2f} ({low:.2f} to {high:.2f})" in math
        assert f" {one['tau']:.2f} (" in shown and f" x {one['adaptive_speedup']:.2f} (" in shown
        assert f"{one['baseline_tokens_per_second']:.0f} tokens/s" in shown
    assert "all 9 answers are token-identical" in shown
    unmeasured = dict.fromkeys(("tokens_per_second", "baseline_tokens_per_second"))
    assert "these rounds at the times of costs.json" in shown and f"x {_gains(load)[0]:.2f}" in shown
    lines = overview(run.metrics, page).splitlines()
    silent = overview(run.metrics | unmeasured | {"temperatures": {"0.0": greedy | unmeasured}}, page)
    assert len(silent.splitlines()) == len(lines) - 4 and "tokens/s" not in silent


def test_every_table_is_printed_where_details_are_wanted(run: Run, capsys: pytest.CaptureFixture[str]):
    folder = run.workdir / "eval"
    predicted, load = (json.loads((folder / f"{name}.json").read_text()) for name in ("calibration", "load"))
    show(run.metrics, predicted, load, {}, folder / "report.html", details=True)
    printed = capsys.readouterr().out
    assert printed.startswith(table(run.metrics)) and printed.endswith(
        overview(run.metrics, folder / "report.html", load) + "\n"
    )
    assert "tiny, temperature 1: fitted on" in printed and "load, replayed on costs.json" in printed
    for temperature in ("1.0", "0.0"):
        assert f"tiny: temperature {temperature}, up to {BUDGET} new tokens" in printed
    assert f"{run.metrics['prompt_sets']['math']['tau']:.3f}" in printed and printed.count("ratio ") == 4
    different = run.metrics | {"greedy_identical": False, "greedy_different": 1}
    different["greedy_differences"] = [
        {"prompt": 2, "file": "math.jsonl", "line": 3, "position": 7, "speculative_token": 5, "plain_token": 6}
        | {"logit_gap": 0.0125}
    ]
    show(different, None, None, {}, folder / "report.html", details=False)
    assert (
        "1 of 9 answers differ from plain decoding, the first at prompt 2 (math.jsonl:3), token 7: 5 instead of 6 "
        in (capsys.readouterr().out)
    )


def test_details_are_a_flag(tmp_path: Path):
    experiment = tmp_path / "x.py"
    experiment.write_text("from dspark_jax.config import Config\ndef get_config(arg=''):\n    return Config()\n")
    for flag, expected in (((), False), (("--details",), True)):
        assert command.parse(["--config", str(experiment), *flag], _define)[2]["details"] is expected


def engine_of(run: Run) -> Decoder:
    target, tokenizer = load_target(run.config.target, run.mesh), load_tokenizer(run.config.target.path)
    drafter = load_drafter(run.workdir, run.mesh)[1]
    stops = stop_tokens(run.config.target.path, tokenizer)
    return Decoder(Models(target, drafter), tokenizer, stops, BUDGET, batch_size=4, seed=0)


def test_a_later_turn_sees_the_answer_before_it_and_a_changed_token_is_found(run: Run):
    engine = engine_of(run)
    questions = tuple({"role": "user", "content": text} for text in ("how much is one", "and two"))
    todo = [
        Conversation(number, Prompt(questions, "set", "file", number), (), questions[:turns])
        for number, turns in enumerate((1, 2))
    ]
    asked, first = first_requests(engine.tokenizer, todo, 100, lambda *_: pytest.fail("rejected"))
    assert first.width < WIDTH
    first = Requests(first.items, WIDTH)
    with jax.set_mesh(run.mesh):
        requests, result = answer(engine, asked, first, 0.0)
        assert [(item.owner, item.turn) for item in requests.items] == [(0, 0), (1, 0), (1, 1)]
        reply = {"role": "assistant", "content": engine.tokenizer.decode(result.tokens[1], skip_special_tokens=True)}
        assert requests.width == WIDTH
        assert requests.items[2].prompt == prompt_tokens(engine.tokenizer, (questions[0], reply, questions[1]))

        assert compare_greedy(engine, requests, result.tokens) == []
        tampered = [ids.copy() for ids in result.tokens]
        tampered[2][4] = (tampered[2][4] + 1) % 290
        (difference,) = compare_greedy(engine, requests, tampered)
    assert (difference.request, difference.position) == (2, 4)
    assert difference.tokens == (result.tokens[2][4], tampered[2][4])
    assert difference.gap > 0  # the plain token is the one with the largest logit


def test_first_difference():
    a = np.array([5, 6, 7])
    assert first_difference(a, a.copy()) is None
    assert first_difference(a, np.array([5, 9, 9])) == 1
    assert first_difference(a, a[:2]) == first_difference(a[:2], a) == 2
    assert first_difference(a[:0], a[:0]) is None


def refused(config: Config, workdir: Path, cost_table: str | None = None, **fields: Any) -> str:
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **fields))
    with pytest.raises(InputError) as error:
        evaluate(config, workdir, mesh=make_mesh(ONE_DEVICE, jax.devices()[:1]), cost_table=cost_table)
    return str(error.value)


def test_bad_input_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = run.config
    assert "eval.prompts is empty" in refused(config, run.workdir, prompts=())
    assert "eval.temperatures is empty" in refused(config, run.workdir, temperatures=())
    twice = (config.eval.prompts[0], str(tmp_path / "math.jsonl"))
    assert "two files named math" in refused(config, run.workdir, prompts=twice)
    assert "missing.jsonl: cannot be read" in refused(config, run.workdir, prompts=(str(tmp_path / "missing.jsonl"),))
    assert "nothing.json: cannot be read" in refused(config, tmp_path, cost_table=str(tmp_path / "nothing.json"))
    assert "no checkpoint here" in refused(config, tmp_path)
    assert not (tmp_path / "eval").exists()
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 300}))
    assert "long.jsonl: none of its prompts can be asked (1 " in refused(config, run.workdir, prompts=(str(long),))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"^--traffic=3: hosts would not launch the same rounds; leave out --distr"):
        evaluate(config, run.workdir, traffic="3")


def test_only_a_host_alone_measures_speed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["dspark_jax.evaluate"]
    monkeypatch.setattr(module, "measure_speed_in_process", lambda *_, step: [f"apart {step}"] * 2)
    monkeypatch.setattr(module, "measure_speed", lambda *_: "here")
    config, requests = Config(eval=EvalConfig(speed_threads=1)), Requests([Request([1], 0, 0, 0)], 1)
    decoder = SimpleNamespace(step=7, models=SimpleNamespace(target=None))
    for hosts, expected in ((1, "apart 7"), (2, "here")):
        monkeypatch.setattr(jax, "process_count", lambda hosts=hosts: hosts)
        assert module._speeds(resolved.Run(config, Path()), decoder, requests, lambda done: None) == [expected] * 2


def test_the_command_reports_bad_input_with_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    experiment = tmp_path / "x.py"
    experiment.write_text("from dspark_jax.config import Config\ndef get_config(arg=''):\n    return Config()\n")
    with pytest.raises(SystemExit) as status:
        command.run(evaluate, argv=["--config", str(experiment), "--workdir", str(tmp_path / "run")])
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "status, said, expected",
    [(-9, "", "eval.speed_threads=2: .* was killed, perhaps for its memory"), (2, "a\nerror: b: c; d\n", "^b: c; d$")],
)
def test_the_process_that_measures_speed_may_end_early(monkeypatch, tmp_path, status, said, expected):
    monkeypatch.setattr(jobs, "run_quietly", lambda *_: SimpleNamespace(returncode=status, stderr=said))
    with pytest.raises(InputError, match=expected):
        speed.measure_speed_in_process(resolved.Run(Config(), tmp_path), Requests([], 8), [1.0], 2)
