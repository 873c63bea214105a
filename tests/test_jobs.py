"""Jobs in a process of their own: what they find, what they refuse, and how they die."""

import pytest

from dspark_jax import jobs
from dspark_jax.config import InputError

MODULE = """
import os
from dspark_jax import jobs
from dspark_jax.config import InputError

def work(job):
    if job["what"] == "refuse":
        print("more words", file=__import__("sys").stderr)
        raise InputError(f"what={job['what']}: cannot\\nbe done")
    if job["what"] == "die":
        os.abort()
    return {"found": [1.25, float("nan")], "added": os.environ["ADDED"]}

if __name__ == "__main__":
    jobs.do(work)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(MODULE)
    return lambda what: jobs.run("worker", {"what": what}, {"PYTHONPATH": f"{tmp_path}:.", "ADDED": "this"})


def test_what_a_job_finds_comes_back(started):
    ended = started("work")
    assert ended.status == 0 and ended.result == {"found": [1.25, None], "added": "this"}


def test_what_a_job_refuses_is_raised_here(started):
    with pytest.raises(InputError, match="^what=refuse: cannot be done$"):
        started("refuse")


def test_a_job_that_dies_says_how(started):
    ended = started("die")
    assert ended.status == -6 and ended.result is None


def test_a_job_that_wrote_its_own_result_keeps_it(tmp_path):
    (tmp_path / "job.json").write_text('{"out": "%s"}' % (tmp_path / "out"))

    def work(job):
        (tmp_path / "out").write_text("kept")

    jobs.do(work, tmp_path / "job.json")
    assert (tmp_path / "out").read_text() == "kept"
