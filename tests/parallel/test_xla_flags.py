"""Compiler flags: what is chosen, what a person can change, and that the compiler knows them."""

import importlib.metadata
import importlib.util

import pytest

from olmo_jax.errors import UserError
from olmo_jax.parallel.xla_flags import choose, explain, fault_of, flags_for

JAXLIB = importlib.metadata.version("jaxlib")
GPU, TPU = {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "tpu", "TPU_ACCELERATOR_TYPE": "v5p-128"}


def names(flags):
    return {flag.name: flag.value for flag in flags}


def test_the_installed_compiler_knows_every_flag_for_gpus():
    platform, flags, notes = choose((), GPU)
    assert platform == "gpu" and flags and not notes
    assert names(flags) == names(flags_for("gpu", JAXLIB))
    assert all(flag.reason and flag.source for flag in flags)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu here")
def test_the_installed_compiler_knows_every_flag_for_tpus():
    _, flags, notes = choose((), TPU | {"MEGASCALE_NUM_SLICES": "2"})
    assert names(flags) == names(flags_for("tpu", JAXLIB, "v5p", 2)) and not notes
    assert fault_of(["--xla_nonsense=1"], "tpu") is not None


def test_flags_follow_version_chip_and_slices():
    old, new = names(flags_for("gpu", "0.10.2")), names(flags_for("gpu", "0.11.2"))
    assert old["xla_gpu_enable_pipelined_all_gather"] == "true"
    assert new["xla_gpu_pipeline_all_gather"] == "on"
    vmem = "xla_tpu_scoped_vmem_limit_kib"
    assert names(flags_for("tpu", JAXLIB, "v6e"))[vmem] == "98304"
    assert vmem not in names(flags_for("tpu", JAXLIB, "v4"))
    assert len(flags_for("tpu", JAXLIB, "v5p", slices=2)) > len(flags_for("tpu", JAXLIB, "v5p"))
    assert flags_for("cpu", JAXLIB) == []


def test_a_person_adds_changes_and_drops_one():
    wanted = (
        "xla_gpu_enable_triton_gemm=true",
        "-xla_gpu_enable_latency_hiding_scheduler",
        "xla_dump_hlo_as_text=true",
        "-xla_other",
    )
    mine = "xla_gpu_enable_highest_priority_async_stream"
    _, flags, notes = choose(wanted, GPU | {"XLA_FLAGS": f"--{mine}=false"})
    chosen = names(flags)
    assert chosen["xla_gpu_enable_triton_gemm"] == "true"
    assert chosen["xla_dump_hlo_as_text"] == "true"
    assert "xla_gpu_enable_latency_hiding_scheduler" not in chosen
    assert mine not in chosen  # it stands in the environment already
    assert notes == ["-xla_other: not among the flags for gpu"]


def test_one_that_the_compiler_does_not_know_ends_in_one_line():
    for wanted, environment in (
        (("xla_nonsense=1",), GPU),
        ((), GPU | {"XLA_FLAGS": "--xla_nonsense=1"}),
        ((), {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_nonsense=1"}),
    ):
        with pytest.raises(UserError, match="does not know --xla_nonsense=1; see XLA_FLAGS") as e:
            choose(wanted, environment)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="does not take --xla_cpu_enable_fast_math=maybe"):
        choose(("xla_cpu_enable_fast_math=maybe",), {"JAX_PLATFORMS": "cpu"})
    with pytest.raises(UserError, match="'xla_dump_to': give name=value to add a flag, -name"):
        choose(("xla_dump_to",), {"JAX_PLATFORMS": "cpu"})


def test_what_libtpu_says_is_understood():
    assert "does not know --xla_foo" in explain("ERROR: Unknown command line flag 'xla_foo'", "tpu")
    illegal = "ERROR: Illegal value 'abc' specified for flag 'xla_bar'"
    assert "does not take 'abc' for --xla_bar" in explain(illegal, "tpu")
    assert explain("could not determine TPU accelerator type", "tpu") is None
