"""The embedded quickstart: a small real target and prompt sets, so that everything runs offline on a CPU.

target/     a Qwen3-architecture language model as a Hugging Face directory, trained from scratch on what any CPython
            installation contains; it is loaded, tokenised and templated exactly like Qwen3-4B
prompts/    {math,code,chat}.{train,heldout}.jsonl, one {"turns": [...]} per line
corpus.py   the conversations the model was trained on, and their train / held-out split
build.py    `python -m dspark_jax.quickstart.build` makes all of the above again
"""
