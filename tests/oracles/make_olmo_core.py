"""Makes tests/convert/fixtures/olmo_core.tar.xz: tiny checkpoints of OLMo-core, by itself.

    python3.11 -m venv olmo_core && . olmo_core/bin/activate
    pip install torch==2.13.0 ai2-olmo-core==3.0.0 ml_dtypes
    python tests/oracles/make_olmo_core.py

For each variant: config.json and model_and_optim/, and the model's logits. "olmo2_fsdp" is written
by two processes, each tensor in two uneven parts. Values are rounded to bfloat16 so that the
archive stays small.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from olmo_core.nn.attention import SlidingWindowAttentionConfig
from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
from olmo_core.nn.rope import StepwiseRoPEScalingConfig, YaRNRoPEScalingConfig
from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig, TransformerType

sys.path.insert(0, str(Path(__file__).parent))
import moe_cpu_kernels

moe_cpu_kernels.install()
torch.set_num_threads(1)
OUT = Path(__file__).parents[1] / "convert" / "fixtures" / "olmo_core.tar.xz"
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (2, 24)))
TOKENIZER = {"vocab_size": 60, "eos_token_id": 57, "pad_token_id": 1}
TOKENIZER["_CLASS_"] = "olmo_core.data.tokenizer.TokenizerConfig"
Block = TransformerBlockType
FSDP = "olmo2_fsdp"


def like(**fields) -> TransformerConfig:
    base = {
        "d_model": 16,
        "vocab_size": 64,
        "n_layers": 2,
        "n_heads": 2,
        "qk_norm": True,
        "rope_theta": 500_000,
        "layer_norm_eps": 1e-6,
        "hidden_size_multiple_of": 8,
        "block_name": Block.reordered_norm,
    }
    return TransformerConfig.llama_like(**base | fields)


def moe(kind: MoEType, block: Block, normalize: float | None = None, **fields) -> TransformerConfig:
    experts = MoEConfig(
        name=kind,
        num_experts=4,
        hidden_size=8,
        capacity_factor=8.0 if kind == MoEType.default else None,
        router=MoERouterConfig(top_k=2, normalize_expert_weights=normalize),
        lb_loss_weight=0.01,
        z_loss_weight=0.001,
    )
    return like(name=TransformerType.moe, block_name=block, feed_forward_moe=experts, **fields)


WINDOW = SlidingWindowAttentionConfig(pattern=[4, -1], force_full_attention_on_first_layer=False)
LLAMA = {"block_name": Block.default, "qk_norm": False, "n_kv_heads": 1, "layer_norm_eps": 1e-5}
VARIANTS = {
    "olmo3_yarn": like(n_layers=4, sliding_window=WINDOW, n_kv_heads=1).with_rope_scaling(
        YaRNRoPEScalingConfig(factor=8.0, old_context_len=8)
    ),
    "llama3": like(**LLAMA).with_rope_scaling(
        StepwiseRoPEScalingConfig(factor=4.0, old_context_len=12)
    ),
    "tied": like(tie_word_embeddings=True),
    "olmoe": moe(MoEType.dropless, Block.moe, rope_theta=10_000, layer_norm_eps=1e-5),
    "olmoe_normalized": moe(MoEType.dropless, Block.moe, normalize=1.0),
    "flexolmo": moe(MoEType.dropless, Block.moe_reordered_norm),
    "not_dropless": moe(MoEType.default, Block.moe_reordered_norm),
    FSDP: like(vocab_size=61, n_kv_heads=1),
}


def model_of(config: TransformerConfig) -> torch.nn.Module:
    model = config.build(init_device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.3
            p.copy_((1 + noise if "norm" in name else noise).bfloat16().float())
    return model.eval()


def save_from_two_ranks(folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model, mesh = model_of(VARIANTS[FSDP]), init_device_mesh("cpu", (2,))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    save_model_and_optim_state(folder / "model_and_optim", model, save_overwrite=True)
    dist.barrier()
    dist.destroy_process_group()


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # OLMo-core writes the folder's name into .metadata
        root = Path("olmo_core")
        for name, config in VARIANTS.items():
            folder = root / name
            folder.mkdir(parents=True)
            model = model_of(config)
            if name == FSDP:
                command = ["-m", "torch.distributed.run", "--nproc-per-node=2", __file__]
                subprocess.run([sys.executable, *command, str(folder)], check=True)
            else:
                weights = folder / "model_and_optim"
                threads = 3 if name == "tied" else 1
                save_model_and_optim_state(weights, model, thread_count=threads)
            content = {"model": config.as_config_dict(), "dataset": {"tokenizer": TOKENIZER}}
            (folder / "config.json").write_text(json.dumps(content))
            with torch.no_grad():
                tokens = TOKENS % config.vocab_size
                np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=model(tokens).numpy())
        with tarfile.open(OUT, "w:xz") as archive:
            archive.add(root, "olmo_core", filter=anonymous)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        save_from_two_ranks(Path(sys.argv[1]))
    else:
        main()
