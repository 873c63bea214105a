"""Any causal language model of Hugging Face transformers, run by PyTorch (the extra `torch`).

A drafter is trained on its features (`training.feature_cache`) and decodes with it (`target.in_torch`), where it has no
definition in JAX.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark_jax.config import InputError
from dspark_jax.hub import local_directory


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """A model in PyTorch.

    Attributes:
      model: of `AutoModelForCausalLM`.
      path: where it is from, for messages.
    """

    model: Any
    path: str

    def run(
        self, tokens: np.ndarray, taps: Sequence[int], cache: Any = None, *, keep: bool = False
    ) -> tuple[list[Any], Any]:
        """A pass over tokens [B, S], which follow what is in the cache.

        Of layers that are not tapped nothing is kept. The embeddings (-1) are what the first layer is given, scale and
        positions included, and the last layer's output has not been through the final norm. Padding on the right gets
        rows like any other; being causal, the model does not see them from before.

        Args:
          tokens: ids.
          taps: layers whose raw outputs are wanted.
          cache: what an earlier pass returned, which is written on; None begins a sequence.
          keep: return the cache, with these tokens in it.

        Returns:
          Tensors [B, S, D] of every tapped layer and of the last hidden states, in a list; and transformers' cache,
          None where it is not kept or the model has none.

        Raises:
          InputError: the model has no list of layers.
        """
        import torch

        layers, seen = self._layers(), dict[int, Any]()

        def one(hidden: Any) -> Any:  # of several residual streams [B, S, N, D] the mean, as `HyperTarget.tapped`
            return hidden.mean(dim=2) if hidden.dim() == 4 else hidden

        def before(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[-1] = one(given[0] if given else named["hidden_states"])

        def after(index: int, _: Any, given: Any, out: Any) -> None:
            seen[index] = one(out[0] if isinstance(out, tuple) else out)

        hooks = [layers[i].register_forward_hook(functools.partial(after, i)) for i in taps if i >= 0]
        hooks += [layers[0].register_forward_pre_hook(before, with_kwargs=True)] if -1 in taps else []
        try:
            with torch.inference_mode():
                ids = torch.as_tensor(np.array(tokens), dtype=torch.long, device=next(self.model.parameters()).device)
                taken = inspect.signature(self.model.base_model.forward).parameters
                name = next((name for name in _CACHES if name in taken), "")
                given = {} if cache is None else {name: cache}
                out = self.model.base_model(input_ids=ids, use_cache=keep, **given)
        finally:
            for hook in hooks:
                hook.remove()
        return [*(seen[i] for i in taps), out.last_hidden_state], out.get(name) if keep else None

    def _layers(self) -> Any:
        """The decoder's list of layers.

        Raises:
          InputError: there is no one list of as many modules as the config says.
        """
        import torch

        count = self.model.config.get_text_config().num_hidden_layers
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        for owner in (decoder, self.model.base_model):
            lists = [one for one in owner.children() if isinstance(one, torch.nn.ModuleList) and len(one) == count]
            if len(lists) == 1:
                return lists[0]
        raise InputError(
            f"{self.path}: no list of {count} layers in its {type(decoder).__name__}; features of such a model cannot "
            "be tapped, use a target with a plain stack of decoder layers"
        )

    def frozen_matrices(self) -> tuple[np.ndarray, np.ndarray, float]:
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
            same = ours.shape == logits.shape
            error = float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-6)) if same else float("inf")
        for what, values in {"logits": logits, "embeddings": embedding}.items():
            if not math.isfinite(float(values.abs().max())):
                raise InputError(f"{self.path}: its {what} are not finite; look at its weights, or compute in float32")
        if not error <= 0.03:  # bfloat16 products are off by up to a hundredth, and NaN is never within it
            raise InputError(
                f"{self.path}: its logits are not those of its LM head (off by {error:.0%}), e.g. biased or scaled; "
                "such a model is not supported"
            )
        return embedding.cpu().numpy(), head.weight.detach().float().cpu().numpy(), float(softcap)


_CACHES = ("cache", "past_key_values", "cache_params")
"""What transformers has called the cache, newest first."""


def load_torch_model(path: str, dtype: str = "auto", *, needed_by: str = "data.features=torch") -> TorchModel:
    """Loads a model onto the first accelerator that PyTorch sees, else the CPU.

    Args:
      path: a Hugging Face model directory, or the id of a model on the hub.
      dtype: float32, bfloat16, or auto: bfloat16 on accelerators, float32 on CPU.
      needed_by: what asks for PyTorch, for the message where it is not there.

    Raises:
      InputError: PyTorch is not installed, the model is not to be had, transformers cannot load it, or tensors of it
        are missing.
    """
    try:
        import torch
    except ImportError:
        raise InputError(f"{needed_by} needs PyTorch; install it with pip install 'dspark-jax[torch]'") from None
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    directory = local_directory(path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report in many lines what one says below
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (*_UNUSABLE, StrictDataclassError) as error:
        raise InputError(f"{path}: transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    model, about = loaded
    if missing := sorted(about["missing_keys"]):  # which are drawn at random
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path}: tensor {missing[0]}{more} is missing; download the checkpoint again")
    return TorchModel(model.eval().to(device), path)


_UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)
"""What transformers and PyTorch raise of files and configs that they cannot use."""
