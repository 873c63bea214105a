"""Features of any causal language model of Hugging Face transformers, computed in PyTorch (the extra `torch`).

With them a drafter can be trained here for a target that has no definition in JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark_jax.config import InputError
from dspark_jax.hub import local_directory


@dataclasses.dataclass(frozen=True)
class TorchTarget:
    """A model in PyTorch.

    Attributes:
      model: of `AutoModelForCausalLM`.
      taps: layers whose raw outputs are features; -1 = the embeddings.
      path: where it is from, for messages.
    """

    model: Any
    taps: tuple[int, ...]
    path: str

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [B, S, M*D] and last hidden states [B, S, D] of tokens [B, S] padded on the right, as float32.

        Rows behind a length are computed like any other; being causal, the model does not see them from before.
        """
        import torch

        del lengths
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            out = self.model.base_model(
                input_ids=torch.as_tensor(tokens, dtype=torch.long, device=device),
                output_hidden_states=True,
                use_cache=False,
            )
        # hidden_states[i + 1] is the raw output of layer i, but for the last layer, where it is normed (trap 10).
        features = torch.cat([out.hidden_states[i + 1] for i in self.taps], dim=-1)
        return features.float().cpu().numpy(), out.last_hidden_state.float().cpu().numpy()

    def lent(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Embedding [V, D] with its scale in it, LM head [V, D], and the soft-cap of the logits (0 = none).

        Raises:
          InputError: the model makes its logits in a way that the three do not describe.
        """
        import torch

        head, ids = self.model.get_output_embeddings(), torch.arange(self.model.config.get_text_config().vocab_size)
        device = next(self.model.parameters()).device
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        sample = ids[None, : min(len(ids), 32)].to(device)
        with torch.inference_mode():
            embedding = self.model.get_input_embeddings()(ids.to(device)).float()
            logits = self.model(input_ids=sample, use_cache=False).logits.float()
            last = self.model.base_model(input_ids=sample, use_cache=False).last_hidden_state.float()
            ours = last @ head.weight.float().T
            ours = softcap * torch.tanh(ours / softcap) if softcap else ours
            error = float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-6))
        if ours.shape != logits.shape or error > 0.03:  # bfloat16 products are off by up to a hundredth
            raise InputError(
                f"{self.path}: its logits are not those of its LM head (off by {error:.0%}), e.g. biased or scaled; "
                "such a model is not supported"
            )
        return embedding.cpu().numpy(), head.weight.detach().float().cpu().numpy(), float(softcap)


def load_torch_target(path: str, taps: Sequence[int], dtype: str = "auto") -> TorchTarget:
    """Loads a model onto the first accelerator that PyTorch sees, else the CPU.

    Args:
      path: a Hugging Face model directory, or the id of a model on the hub.
      taps: layer ids, never the last layer's.
      dtype: float32, bfloat16, or auto: bfloat16 on accelerators, float32 on CPU.

    Raises:
      InputError: PyTorch is not installed, the model is not to be had, or transformers cannot load it.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            "data.features=torch needs PyTorch; install it with pip install 'dspark-jax[torch]', or use online or cache"
        ) from None
    from transformers import AutoModelForCausalLM

    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    directory = local_directory(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for files and configs it cannot use
        raise InputError(f"{path}: transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
    return TorchTarget(model.eval().to(device), tuple(taps), path)
