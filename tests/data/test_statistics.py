import numpy as np

from dspark_jax.data.statistics import Histogram, script, table


def test_bins_end_at_powers_of_two():
    lengths, histogram = [0, 1, 16, 17, 32, 33, 100, 128, 129], Histogram()
    for length in lengths:
        histogram.add(length)
    found = histogram.report()
    assert found["up_to"] == [16, 32, 64, 128, 256]
    below = [sum(length <= end for length in lengths) for end in found["up_to"]]
    assert np.cumsum(found["samples"]).tolist() == below
    assert found["longest"] == 129 and found["mean"] == np.mean(lengths)
    assert Histogram().report() == {"up_to": [16], "samples": [0], "mean": 0.0, "longest": 0}


def test_a_script_is_that_of_most_of_the_first_letters():
    texts = {
        "1 + 1 = ?": "",
        "Wie heißt du?": "latin",
        "请问 HTTP 是什么？它有什么用": "cjk",
        "Как дела, Bob": "cyrillic",
    }
    assert {text: script(text) for text in texts} == texts
    assert script("a" * 32 + "я" * 100) == "latin" and script("") == ""


def test_the_table_is_short_and_has_a_row_for_every_source():
    report = {
        "samples": 4,
        "sources": {"math": {"prompts": 5, "set_aside": 1}, "broken": {"prompts": 0, "set_aside": 3}},
        "prompt_sets": {"math": {"samples": 4, "tokens": 90, "loss_tokens": 60}},
        "lengths": {
            "prompt": {"up_to": [16], "samples": [4], "mean": 7.5, "longest": 9},
            "answer": {"up_to": [16, 32], "samples": [1, 3], "mean": 15.0, "longest": 20},
        },
    }
    mixed = table(report | {"scripts": {"latin": 3, "cjk": 1}})
    assert mixed.pop(3) == "scripts of the prompts: latin 75.0%, cjk 25.0%"
    assert mixed == table(report) == table(report | {"scripts": {"latin": 5}})
    lines = [line.split() for line in table(report)]
    assert lines[1:3] == [["math", "5", "1", "4", "90", "60"], ["broken", "0", "3", "0", "0", "0"]]
    assert lines[3] == ["tokens", "up", "to", "16", "32", "mean", "longest"]
    assert lines[4:] == [["prompt", "100%", "8", "9"], ["answer", "25%", "75%", "15", "20"]]
    assert len({len(line) for line in table(report)[3:]}) == 1  # columns stand below each other
