"""The shapes that are measured, as our configuration and as transformers', and memory."""

import threading
import time
from dataclasses import replace

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.presets import preset

SHAPES = {
    "demo": ModelConfig(
        vocab_size=2048, d_model=128, n_layers=4, n_heads=4, mlp_width=384, context_length=256
    ),
    "85M": ModelConfig(
        vocab_size=50304, d_model=512, n_layers=8, n_heads=8, mlp_width=2048, context_length=512
    ),
    "tiny": ModelConfig(
        vocab_size=128, d_model=32, n_layers=2, n_heads=2, mlp_width=64, context_length=64
    ),
}
SHAPES["olmo2_1b"] = preset("olmo2_1b")
for _layers in (16, 32):  # the same width, twice the depth
    SHAPES[f"{_layers} layers"] = ModelConfig(
        vocab_size=1024, d_model=1024, n_layers=_layers, n_heads=8, mlp_width=2816
    )
for _d in (128, 256):  # experts, and dense models of the same FLOPs a token
    _shape = ModelConfig(
        vocab_size=2048,
        d_model=_d,
        n_layers=4,
        n_heads=_d // 32,
        mlp_width=4 * _d,
        norm_place="pre",
    )
    SHAPES[f"dense {_d}"] = _shape
    for _n, _active in ((4, 2), (64, 8)):
        SHAPES[f"{_n} experts {_d}"] = replace(
            _shape,
            n_experts=_n,
            experts_per_token=_active,
            mlp_width=4 * _d // _active,
            load_balancing_loss=0.01,
            router_z_loss=1.25e-4,
        )
BATCH, LENGTH = 4, 512


def transformers_config(shape: str):
    """The same shape for `Olmo2ForCausalLM`."""
    from transformers import Olmo2Config

    from olmo_jax.convert.hf_config import to_hf_config

    return Olmo2Config(**to_hf_config(SHAPES[shape], "float32", None, None))


def step_flops(shape: str, batch: int, length: int) -> float:
    """6 FLOPs a token and weight that it meets (without the embedding table), and attention's
    causal half."""
    config = SHAPES[shape]
    weights = 6 * config.parameter_count(embedding=False, active=True)
    attention = 6 * config.n_layers * length * config.d_model
    return (weights + attention) * batch * length


def peak_memory_mb() -> float:
    """VmHWM, the largest resident size of this process so far."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


class PeakAnonymousMemory:
    """While entered, samples RssAnon, this process's memory that is no file's page; `mb` is the
    largest."""

    def __enter__(self):
        self.mb, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _sample(self):
        while not self._done.is_set():
            with open("/proc/self/status") as status:
                line = next(line for line in status if line.startswith("RssAnon"))
            self.mb = max(self.mb, int(line.split()[1]) / 1e3)
            time.sleep(0.005)
