"""Which norms of EAGLE-3's variants each server reads (config fields as speculators names them)."""

import dataclasses

from dspark_jax.convert.drafter_files import Files, Verdict

READ = {
    "vLLM": ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"),  # 0.33, llama_eagle3, qwen3_eagle3
    "SGLang": ("norm_before_fc", "fc_norm", "norm_output"),  # 0.5.23, llama_eagle3
    "llama.cpp": ("norm_before_residual", "norm_before_fc"),  # 11434, conversion/llama.py
    "tpu-inference": ("norm_before_residual",),  # 0.32.0, llama_eagle3
    "sglang-jax": (),  # August 2026
}


def without_unread_norms(files: Files, verdict: Verdict) -> Verdict:
    """The verdict, with what a server leaves out of an EAGLE-3 drafter that it loads."""
    read = READ.get(verdict.server)
    if files.stated.family != "eagle3" or verdict.refusals or read is None:
        return verdict
    unread = [name for name in files.stated.eagle3_norms if name not in read]
    if not unread:
        return verdict
    return dataclasses.replace(
        verdict, wrong=(*verdict.wrong, f"it does not read {', '.join(unread)} and computes without it")
    )
