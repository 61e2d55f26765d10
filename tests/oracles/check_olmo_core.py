"""Has OLMo-core load what olmo_jax wrote, and writes fixtures/verified_olmo_core.json.

In the environment of make_olmo_core.py: python tests/oracles/check_olmo_core.py OUT (see
write_ours.py).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from olmo_core.distributed.checkpoint import load_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
import moe_cpu_kernels

from tests.convert.native import FIXTURES, sha256, unpacked

moe_cpu_kernels.install()
checked = {}
with tempfile.TemporaryDirectory() as temporary:
    for original in sorted(unpacked("olmo_core", Path(temporary)).iterdir()):
        ours = Path(sys.argv[1]) / "olmo_core" / original.name
        content = json.loads((ours / "config.json").read_text())
        model = TransformerConfig.from_dict(content["model"]).build(init_device="cpu").eval()
        load_model_and_optim_state(ours / "model_and_optim", model)
        saved = np.load(original / "logits.npz")
        with torch.no_grad():
            got = model(torch.from_numpy(saved["tokens"])).numpy()
        difference = np.abs(got - saved["logits"]).max() / np.abs(saved["logits"]).max()
        files = [ours / "config.json", *sorted((ours / "model_and_optim").iterdir())]
        checked[original.name] = {"sha256": sha256(*files), "difference": float(difference)}
        print(original.name, difference)
command = "write_ours.py OUT, then, with ai2-olmo-core 3.0.0, check_olmo_core.py OUT"
content = {"made_by": command, "checkpoints": checked}
(FIXTURES / "verified_olmo_core.json").write_text(json.dumps(content, indent=1) + "\n")
