"""Names of machines, the table of chips, and the formula of the bound."""

import pytest

from olmo_jax.errors import UserError
from olmo_jax.plan.chips import CHIPS
from olmo_jax.plan.hlo import Collective
from olmo_jax.plan.roofline import Place, link_seconds
from olmo_jax.plan.targets import parse_target, require_compiler

MACHINES = {  # chips, devices, slices, devices joined by fast links
    "v5p-128": (64, 64, 1, 64),
    "v4-8": (4, 4, 1, 4),
    "v5e-256": (256, 256, 1, 256),
    "2xv5e-16": (32, 32, 2, 16),
    "V6E-8": (8, 8, 1, 8),
    "tpu7x-128": (64, 128, 1, 128),
    "h100-64": (64, 64, 1, 8),
    "a100-1": (1, 1, 1, 1),
    "b200-256": (256, 256, 1, 8),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_name_says_how_many_chips_there_are(name):
    target = parse_target(name)
    found = target.chips, target.devices, target.slices, target.together
    assert found == MACHINES[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-9", "16, 32, 64"),
        ("v5e-512", "2xv5e-256"),
        ("h100-12", "whole nodes of 8"),
        ("2xh100-8", "h100-16"),
        ("v9-8", "v5p, v6e"),
        ("v5p", "v5p-128"),
    ],
)
def test_a_wrong_name_is_refused_with_what_there_is(name, says):
    with pytest.raises(UserError, match="(?s)" + says) as error:
        parse_target(name)
    assert "\n" not in str(error.value)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, module in (("v5p-8", "libtpu"), ("h100-8", "xla_cuda13")):
        with pytest.raises(UserError, match=rf"{module}.*olmo-jax\[aot\]"):
            require_compiler(parse_target(name))


def test_every_chip_has_a_peak_and_a_source():
    for chip in CHIPS.values():
        assert chip.peak > 1e14 and chip.source
        assert chip.outside < chip.inside < chip.bandwidth < chip.peak


def test_the_links_of_a_torus_are_those_of_the_axes_that_a_group_lies_on():
    target = parse_target("v5p-128")  # 4 x 4 x 4, 600 GB/s a chip
    places = [Place(0, (i // 16, i // 4 % 4, i % 4)) for i in range(64)]
    payload = 64 * 10**9
    whole = Collective("all-gather", ("fsdp",), tuple(range(64)), payload, 1.0)
    one_axis = Collective("all-gather", ("tensor",), (0, 1, 2, 3), payload, 1.0)
    assert link_seconds(whole, target, places)[0] == pytest.approx(payload * 63 / 64 / 600e9)
    assert link_seconds(one_axis, target, places)[0] == pytest.approx(payload * 3 / 4 / 200e9)


def test_what_crosses_nodes_is_shared_by_their_ports():
    """16 GPUs in two nodes: half of the array crosses, an eighth of it over each port of 50 GB/s;
    within a node the ring sends 15/16 of it over NVLink. An all-reduce is twice that."""
    target = parse_target("h100-16")
    places = [Place(i // 8) for i in range(16)]
    gather = Collective("all-gather", ("fsdp",), tuple(range(16)), 10**9, 3.0)
    inside, outside = link_seconds(gather, target, places)
    assert inside == pytest.approx(3 * 1e9 * 15 / 16 / 450e9)
    assert outside == pytest.approx(3 * 1e9 / 2 / 8 / 50e9)
    reduce = Collective("all-reduce", ("fsdp",), tuple(range(16)), 10**9, 3.0)
    assert link_seconds(reduce, target, places) == pytest.approx((2 * inside, 2 * outside))
    across = Collective("all-reduce", ("data",), (0, 8), 10**9, 1.0)
    assert link_seconds(across, target, places) == pytest.approx((0, 1e9 / 50e9))
