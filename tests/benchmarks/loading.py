"""Seconds and peak memory of loading a checkpoint onto eight host devices, against transformers' own loader.

    python tests/benchmarks/loading.py                       # 2 GB in 8 shards, mesh 2 x 2 x 2
    python tests/benchmarks/loading.py --gigabytes 0.5 --json out.json

A random bfloat16 Qwen3 is written to a temporary folder (and deleted afterwards). Each loader runs in a process of its
own, so that its peak is its own; files are in the page cache for both. Memory is counted beyond what the process held
before it began to load. Along `data` parameters are replicated, so here two copies of the model are held by devices.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARDS, MESH = 8, (2, 2, 2)
PROBES = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")


def resident(field: str = "VmRSS") -> float:
    """This process's resident memory in MB, now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes the model in `SHARDS` files with an index; returns its bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    d, f, q, kv, h, v = 2048, 6144, 2048, 1024, 128, 65536
    layer = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q), "self_attn.q_norm": (h,), "self_attn.k_norm": (h,),
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    per_layer = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(round((gigabytes * 2**30 - 4 * v * d) / per_layer), 2)
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": v, "hidden_size": d,
        "num_hidden_layers": layers, "num_attention_heads": q // h, "num_key_value_heads": kv // h, "head_dim": h,
        "intermediate_size": f, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > total / SHARDS * len(files) and len(files) < SHARDS:
            files.append({})
        files[-1][name] = shape
        size += 2 * int(np.prod(shape))
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, members in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file({name: np.resize(noise, shape) for name, shape in members.items()}, folder / file)
        weight_map |= {name: file for name in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def load_here(folder: str) -> dict[str, float]:
    """Our loader, in a process with eight devices."""
    import jax
    import numpy as np

    from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
    from dspark_jax.sharding import make_mesh
    from dspark_jax.target.loading import load_target, parameter_paths

    mesh = make_mesh(MeshConfig(*MESH))
    jax.block_until_ready(jax.numpy.zeros(1))
    before, started = resident(), time.monotonic()
    arch = TargetArchitecture.from_hf(folder)
    target = load_target(TargetConfig(path=folder, dtype="bfloat16", architecture=arch), mesh)
    jax.block_until_ready(jax.tree.leaves(target))
    seconds, peak = time.monotonic() - started, resident("VmHWM") - before
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(target) for s in leaf.addressable_shards) / 2**20
    parameters = parameter_paths(target)
    down = np.asarray(parameters["layers.mlp.down"].get_value()[1], np.float64).sum()
    embedding = np.asarray(parameters["embedding"].get_value(), np.float64).sum()
    return {"seconds": seconds, "peak_mb": peak, "held_mb": held, "embedding": embedding, "down": down}


def load_there(folder: str) -> dict[str, float]:
    """transformers' loader. It maps the files and reads nothing yet, so reading every value once belongs to it."""
    import torch
    import transformers

    before, started = resident(), time.monotonic()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.sum()
    seconds, peak = time.monotonic() - started, resident("VmHWM") - before
    state = model.state_dict()
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 2**20
    embedding, down = (state[name].double().sum().item() for name in PROBES)
    return {"seconds": seconds, "peak_mb": peak, "held_mb": held, "embedding": embedding, "down": down}


LOADERS = {"dspark_jax": load_here, "transformers": load_there}


def main() -> None:
    """Writes, loads both ways, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(LOADERS[options.child[0]](options.child[1])))
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 1.5 * options.gigabytes * 2**30:
        raise SystemExit(f"{tempfile.gettempdir()} has {free >> 20} MB free, {options.gigabytes} GB are needed")
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.gigabytes)
        print(f"{size / 2**20:.0f} MB in {len(list(Path(folder).glob('*.safetensors')))} files")
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
        environment = {**os.environ, **flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        for name in LOADERS:
            command = [sys.executable, __file__, "--child", name, folder]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            report[name] = json.loads(done.stdout.splitlines()[-1])
            r = report[name]
            print(
                f"{name:<13} {r['seconds']:6.1f} s   peak {r['peak_mb']:6.0f} MB, of which {r['held_mb']:.0f} MB "
                f"are the parameters: {r['peak_mb'] - r['held_mb']:.0f} MB beyond"
            )
    ours, theirs = report.values()
    assert ours["embedding"] == theirs["embedding"] and ours["down"] == theirs["down"], "the loaders disagree"
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
