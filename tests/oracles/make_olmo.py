"""Makes tests/convert/fixtures/olmo.tar.xz: tiny checkpoints of the original OLMo program.

    python3.11 -m venv olmo && . olmo/bin/activate
    pip install torch==2.13.0 && pip install --no-deps ai2-olmo==0.6.0 ai2-olmo-core==0.1.0
    pip install 'numpy<2' omegaconf rich tokenizers packaging 'cached_path>=1.6.2' boto3 \
        google-cloud-storage importlib_resources safetensors pyyaml requests pydantic \
        'pyarrow<20' 'datasets<5' transformers==4.57.1 'ml_dtypes<0.6'
    git clone https://github.com/allenai/OLMo && git -C OLMo checkout 59a53e3
    python tests/oracles/make_olmo.py OLMo/scripts

For each variant: config.yaml and model.pt as ai2-olmo writes them, its logits, and what its own
converters to transformers (scripts/convert_olmo*_to_hf*.py) make of the folder, as a checksum for
each tensor. Values are rounded to bfloat16 so that the archive stays small.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import torch
from olmo.config import ModelConfig, TrainConfig
from olmo.model import OLMo
from olmo.safetensors_util import state_dict_to_safetensors_file

OUT = Path(__file__).parents[1] / "convert" / "fixtures" / "olmo.tar.xz"
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (2, 24)))
BASE = {
    "d_model": 16,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "rope": True,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "include_bias": False,
    "max_sequence_length": 32,
    "vocab_size": 60,
    "embedding_size": 64,
    "init_device": "cpu",
    "init_fn": "mitchell",
    "eos_token_id": 57,
    "pad_token_id": 1,
}
OLMO1 = BASE | {"layer_norm_with_affine": False, "attention_layer_norm_with_affine": False}
OLMO2 = BASE | {
    "layer_norm_type": "rms",
    "layer_norm_eps": 1e-6,
    "attention_layer_norm": True,
    "norm_after": True,
    "rope_theta": 500_000,
    "init_fn": "normal",
    "init_cutoff_factor": 3,
    "weight_tying": False,
}
VARIANTS = {
    "olmo1_tied": OLMO1 | {"mlp_hidden_size": None, "mlp_ratio": 4},
    "olmo1_clip": OLMO1 | {"weight_tying": False, "clip_qkv": 0.3},
    "olmo1_mqa": OLMO1 | {"weight_tying": False, "multi_query_attention": True},
    "grouped": OLMO1 | {"block_group_size": 2},
    "olmo2": OLMO2,
    "olmo2_gqa": OLMO2 | {"n_kv_heads": 2},
    "biased": BASE
    | {"include_bias": True, "activation_type": "gelu", "attention_layer_norm": True},
    "alibi": OLMO1 | {"rope": False, "alibi": True},
    "rms_pre": OLMO2 | {"norm_after": False, "attention_layer_norm": False, "embedding_size": None},
}
CONVERTERS = {
    "olmo1_tied": "convert_olmo_to_hf_new.py",
    "olmo1_clip": "convert_olmo_to_hf_new.py",
    "olmo1_mqa": "convert_olmo_to_hf_new.py",
    "olmo2": "convert_olmo2_to_hf.py",
    "olmo2_gqa": "convert_olmo2_to_hf.py",
}


def model_of(fields: dict) -> OLMo:
    model = OLMo(ModelConfig.new(**fields))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.3
            norm = "weight" in name and ("norm" in name or "ln_f" in name)
            p.copy_((1 + noise if norm else noise).bfloat16().float())
    return model.eval()


def digests(folder: Path) -> dict:
    """Every tensor's shape, type and SHA-256 of its bytes."""
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: [list(a.shape), str(a.dtype), hashlib.sha256(a.tobytes()).hexdigest()]
        for name, a in sorted(found.items())
    }


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same files give the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main(scripts: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "olmo"
        for name, fields in VARIANTS.items():
            folder = root / name
            folder.mkdir(parents=True)
            model = model_of(fields)
            TrainConfig(run_name=name, model=model.config).save(folder / "config.yaml")
            torch.save(model.state_dict(), folder / "model.pt")
            with torch.no_grad():
                logits = model(TOKENS).logits.numpy()
            assert np.array_equal(logits, OLMo.from_checkpoint(folder)(TOKENS).logits.detach())
            np.savez(folder / "logits.npz", tokens=TOKENS.numpy(), logits=logits)
            if name == "olmo2":  # ai2-olmo's own safetensors, whose names are pickles
                state_dict_to_safetensors_file(model.state_dict(), folder / "model.safetensors")
            if name in CONVERTERS:
                hf = Path(temporary) / "hf" / name
                command = [sys.executable, str(scripts / CONVERTERS[name])]
                command += ["--input_dir", str(folder), "--output_dir", str(hf), "--no_tokenizer"]
                if "olmo2" not in name:
                    command += ["--safe_serialization", "1"]
                subprocess.run(command, check=True)
                content = {"config": json.loads((hf / "config.json").read_text())}
                content["tensors"] = digests(hf)
                (folder / "hf.json").write_text(json.dumps(content, indent=1) + "\n")
        with tarfile.open(OUT, "w:xz") as archive:
            archive.add(root, "olmo", filter=anonymous)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
