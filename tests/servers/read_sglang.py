"""Runs in an environment that has torch, msgspec and transformers: SGLang's own reading of a drafter's config.json.

The whole package does not import without a GPU's libraries, so that only its two modules that read the config are
taken, and all others of it are empty stand-ins.

Reads {"source": folder with the package sglang, "drafter": directory} from standard input.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

READ = ("sglang.srt.speculative.dflash_utils", "sglang.srt.speculative.dspark_components.dspark_config")


class StandIn(types.ModuleType):
    """A module that has every name, and nothing in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for all of sglang but the modules that are read."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] != "sglang" or fullname in READ:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = [str(SOURCE / module.__name__.replace(".", "/"))]


REQUEST = json.load(sys.stdin)
SOURCE = Path(REQUEST["source"])


def main() -> None:
    """Prints what the parser makes of the config, and the names by which the model takes tensors."""
    sys.meta_path.insert(0, Finder())
    dspark_config = importlib.import_module(READ[1])
    from transformers import PretrainedConfig

    config = PretrainedConfig.from_dict(json.loads((Path(REQUEST["drafter"]) / "config.json").read_text()))
    read = dspark_config.parse_dspark_draft_config(draft_hf_config=config)
    fields = {name: getattr(read, name) for name in read.__struct_fields__}
    fields["sample_from_anchor"] = dspark_config.get_dspark_sample_from_anchor(config)
    model = (SOURCE / "sglang/srt/models/dspark.py").read_text()
    heads = sorted(set(re.findall(r'"((?:markov_head|confidence_head)\.[\w.]*)"', model)))
    print("RESULT " + json.dumps({"config": fields, "heads": heads}, default=str))


main()
