"""One table of chips: peak, memory, links, power, price in watts; each number with its source.

Peaks are `train.flops`'s, so that `plan` and the progress line divide by the same number.
"""

from dataclasses import dataclass

from olmo_jax.train.flops import peak_flops

GIB = 1024**3


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Rates are per *chip*; `devices` says into how many JAX devices a
    chip is cut, and every `…_device` property is a chip's share."""

    name: str
    """As in a target: v5p, h100."""
    about: str
    """Its name for people."""
    device_kind: str
    """JAX's own name for one device."""
    memory: float
    """HBM bytes."""
    bandwidth: float
    """HBM bytes/s."""
    inside: float
    """Bytes/s that a chip can send to chips of its slice (TPU) or node (GPU) while it receives as
    much: half of what is advertised for both directions."""
    outside: float
    """Bytes/s a chip can send beyond its slice or node while it receives as much."""
    watts: float
    """Power of one chip under load, without its host and the cooling (see `host_watts`)."""
    host_watts: float
    """A chip's share of its host: processors, memory, network, fans."""
    source: str
    """Where the numbers are from."""
    devices: int = 1
    """JAX devices a chip."""
    usable: float = 1.0
    """The share of `memory` that a program gets; the rest is the runtime's."""

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of one chip."""
        peak = peak_flops(self.device_kind)
        assert peak is not None, self.device_kind
        return peak * self.devices

    @property
    def memory_device(self) -> float:
        """Bytes that a program may use on one JAX device."""
        return self.memory * self.usable / self.devices


# TPU numbers: the "system architecture" page of each version in Google Cloud's TPU documentation:
# memory, HBM bandwidth, "bidirectional inter-chip interconnect bandwidth per chip", halved here
# (v4: six links of 50 GB/s each way).
# GPU numbers: NVIDIA's data sheets of the SXM form (NVLink bidirectional, halved here), and one
# 400 Gbit/s (A100: 200) network port for each GPU, as in a DGX.
#
# outside, TPU: "data center network bandwidth per chip" of the same pages (v5p 50, v6e and TPU7x
# 100 Gbit/s; v5e: 6.4 Tbit/s over a pod's 256 chips; v4: as v5p).
#
# watts: GPU: the sheet's maximum. TPU: Google publishes none for a chip after v4; v4's mean is
# measured in Jouppi et al. 2023 (table 4: 192 W maximum). The others are estimates, and say so.
# host_watts: GPU: (DGX maximum - 8 GPUs) / 8, from the DGX A100 / H100 / B200 user guides (6.5,
# 10.2, 14.3 kW). TPU: an estimate.
_CLOUD = "cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA's data sheet and DGX user guide"
_GUESS = "; power is an estimate: none is published"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            about="TPU v4",
            device_kind="TPU v4",
            memory=32 * GIB,
            bandwidth=1228e9,
            inside=300e9,
            outside=50e9 / 8,
            watts=192,
            host_watts=85,
            source=f"{_CLOUD}/v4; power: Jouppi et al. 2023, table 4 (maximum)",
        ),
        Chip(
            name="v5e",
            about="TPU v5e",
            device_kind="TPU v5 lite",
            memory=16 * GIB,
            bandwidth=819e9,
            inside=200e9,
            outside=25e9 / 8,
            watts=200,
            host_watts=50,
            source=f"{_CLOUD}/v5e{_GUESS}",
        ),
        Chip(
            name="v5p",
            about="TPU v5p",
            device_kind="TPU v5",
            memory=95 * GIB,
            bandwidth=2765e9,
            inside=600e9,
            outside=50e9 / 8,
            watts=450,
            host_watts=90,
            source=f"{_CLOUD}/v5p{_GUESS}",
        ),
        Chip(
            name="v6e",
            about="TPU v6e",
            device_kind="TPU v6 lite",
            memory=32 * GIB,
            bandwidth=1638e9,
            inside=400e9,
            outside=100e9 / 8,
            watts=380,
            host_watts=70,
            source=f"{_CLOUD}/v6e{_GUESS}",
        ),
        Chip(
            name="tpu7x",
            about="TPU7x",
            device_kind="TPU7x",
            memory=192 * GIB,
            bandwidth=7380e9,
            inside=600e9,
            outside=100e9 / 8,
            watts=1000,
            host_watts=120,
            source=f"{_CLOUD}/tpu7x{_GUESS}",
            devices=2,
        ),
        Chip(
            name="a100",
            about="A100 SXM 80 GB",
            device_kind="NVIDIA A100-SXM4-80GB",
            memory=79.2 * GIB,
            bandwidth=2039e9,
            inside=300e9,
            outside=25e9,
            watts=400,
            host_watts=412,
            source=_NVIDIA,
            usable=0.92,
        ),
        Chip(
            name="h100",
            about="H100 SXM 80 GB",
            device_kind="NVIDIA H100 80GB HBM3",
            memory=79.1 * GIB,
            bandwidth=3352e9,
            inside=450e9,
            outside=50e9,
            watts=700,
            host_watts=575,
            source=_NVIDIA,
            usable=0.92,
        ),
        Chip(
            name="h200",
            about="H200 SXM 141 GB",
            device_kind="NVIDIA H200",
            memory=139.8 * GIB,
            bandwidth=4800e9,
            inside=450e9,
            outside=50e9,
            watts=700,
            host_watts=575,
            source=_NVIDIA,
            usable=0.92,
        ),
        Chip(
            name="b200",
            about="B200 SXM 180 GB",
            device_kind="NVIDIA B200",
            memory=178.4 * GIB,
            bandwidth=7672e9,
            inside=900e9,
            outside=50e9,
            watts=1000,
            host_watts=788,
            source=_NVIDIA,
            usable=0.92,
        ),
    )
}
