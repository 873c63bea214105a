"""Runs `prepare` as one of several hosts and lets it be killed after some answers: see test_prepare_hosts.

python prepare_host.py KILL_AFTER ARGUMENTS
"""

import os
import signal
import sys

from dspark_jax import command, hosts, prepare
from dspark_jax.data.answer_log import AnswerLog

if __name__ == "__main__":
    kill_after, *arguments = sys.argv[1:]
    hosts.BEAT, hosts.PATIENCE = 0.3, 5.0
    left, put = int(kill_after), AnswerLog.put

    def put_and_die(*given, **named):
        global left
        put(*given, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    AnswerLog.put = put_and_die
    command.run(prepare.prepare, define=prepare._define, together=False, argv=arguments)
