"""Has ai2-olmo load what olmo_jax wrote, and writes tests/convert/fixtures/verified_olmo.json.

In the environment of make_olmo.py: python tests/oracles/check_olmo.py OUT (see write_ours.py).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from olmo.model import OLMo

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.convert.native import FIXTURES, sha256, unpacked

checked = {}
with tempfile.TemporaryDirectory() as temporary:
    for original in sorted(unpacked("olmo", Path(temporary)).iterdir()):
        ours = Path(sys.argv[1]) / "olmo" / original.name
        torch.load(ours / "model.pt", weights_only=True)
        saved = np.load(original / "logits.npz")
        with torch.no_grad():
            got = OLMo.from_checkpoint(ours)(torch.from_numpy(saved["tokens"])).logits.numpy()
        difference = np.abs(got - saved["logits"]).max() / np.abs(saved["logits"]).max()
        checked[original.name] = {
            "sha256": sha256(ours / "config.yaml", ours / "model.pt"),
            "difference": float(difference),
        }
        print(original.name, difference)
command = "write_ours.py OUT, then, with ai2-olmo 0.6.0, check_olmo.py OUT"
content = {"made_by": command, "checkpoints": checked}
(FIXTURES / "verified_olmo.json").write_text(json.dumps(content, indent=1) + "\n")
