"""The embedded quickstart: a small real target and prompt sets, so that everything runs offline on a CPU.

target/     a Qwen3-architecture language model as a Hugging Face directory, trained from scratch on what any CPython
            installation contains; it is loaded, tokenised and templated exactly like Qwen3-4B
prompts/    {math,code,chat}.{train,heldout}.jsonl, one {"turns": [...]} per line

`python -m tests.quickstart.builder.build` makes them again, from a checkout.
"""
