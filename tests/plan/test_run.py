"""What a request changes, how outlooks are ranked and shown, and the lines that errors end in."""

from dataclasses import replace

import pytest

from olmo_jax import cli
from olmo_jax.config import load_config
from olmo_jax.errors import UserError
from olmo_jax.plan.compile import flags_of
from olmo_jax.plan.page import memory_bars, render, roofline_plot
from olmo_jax.plan.roofline import Outlook
from olmo_jax.plan.run import Request, changed
from olmo_jax.plan.search import describe, meshes, micro_batches, rank
from olmo_jax.plan.show import rows
from olmo_jax.plan.targets import parse_target

GIB = 1024**3
RECIPE = "configs/olmo3/7b.gin"


@pytest.fixture(scope="module")
def run():
    return load_config([RECIPE], ["Data.paths=('unused',)"])


OUTLOOK = Outlook(
    name="v5p-128",
    target="v5p-128",
    about="64 x TPU v5p",
    chips=64,
    devices=64,
    mesh={"fsdp": 64},
    batch_size=64,
    micro_batch_size=None,
    sequence_length=8192,
    remat="full",
    kernels={"attention": "splash"},
    parameters=7_298_617_344,
    memory={"parameters": GIB, "optimizer": 2 * GIB, "temporaries": 5 * GIB},
    memory_needed=8 * GIB,
    memory_there=95.0 * GIB,
    fits=True,
    flops=3.3e16,
    flops_kernels=3.3e15,
    flops_device=5.2e14,
    products_compiled=4.6e14,
    calls={"splash": 64.0},
    memory_traffic=6e11,
    collective_bytes={"fsdp": 6e10, "data": 10.0},
    bound={"compute": 1.1, "memory": 0.2, "inside": 0.1, "outside": 0.0},
    bound_seconds=1.1,
    bound_by="compute",
    tokens_a_step=64 * 8192,
    tokens_per_second=64 * 8192 / 1.1,
    mfu=0.8,
    tokens=5 * 10**12,
    days=121.4,
    chip_hours=186_500.0,
    energy_kwh=1e5,
    carbon_kg=4.7e4,
    assumptions={
        "chip_watts": 450,
        "host_watts_per_chip": 90,
        "pue": 1.09,
        "grid_gco2_per_kwh": 473,
    },
    compile_seconds=90.0,
    cached=False,
    notes=("a note <of> one",),
)
TOO_LARGE = replace(OUTLOOK, name="small", memory_needed=120 * GIB, fits=False, bound_seconds=0.5)


def test_a_request_changes_what_it_names_and_nothing_else(run):
    out = changed(Request(run, "2xv5e-256", "x", mesh="tensor=4", batch=64, micro=0, remat="full"))
    mesh = out.mesh
    assert (mesh.slice, mesh.data, mesh.fsdp, mesh.tensor) == (2, 1, -1, 4)
    assert out.data.batch_size == 64 and out.train.micro_batch_size is None
    assert out.model == replace(run.model, remat="full")
    assert changed(Request(run, "v5p-128", "x")) == run


@pytest.mark.parametrize(
    ("change", "says"),
    [({"mesh": "fsdq=4"}, "fsdq=4.*slice, data, fsdp"), ({"remat": "all"}, "none, full")],
)
def test_a_wrong_change_is_refused_with_what_is_allowed(run, change, says):
    with pytest.raises(UserError, match=says):
        changed(Request(run, "v5p-128", "x", **change))


def test_a_search_tries_what_the_model_and_the_machine_allow(run):
    request = Request(run, "v5p-128", "x", batch=256)
    tried = meshes(request, parse_target("v5p-128"))
    assert "slice=1,fsdp=-1" in tried and "slice=1,fsdp=-1,tensor=8" in tried
    assert not any("expert" in mesh or "context" in mesh for mesh in tried)
    few = meshes(replace(request, batch=16), parse_target("v5p-128"))
    assert "slice=1,fsdp=-1,context=4" in few  # fewer rows than devices
    assert micro_batches(request, parse_target("v5p-128")) == [0, 64, 128]
    names = {describe(replace(request, mesh=mesh)) for mesh in tried}
    assert len(names) == len(tried)


def test_what_fits_comes_first_then_the_bound_then_memory():
    slower = replace(OUTLOOK, bound_seconds=1.2)
    larger = replace(OUTLOOK, memory_needed=9 * GIB)
    order = sorted([TOO_LARGE, slower, larger, OUTLOOK], key=rank)
    assert order == [OUTLOOK, larger, slower, TOO_LARGE]


def test_rows_say_whether_it_fits_and_by_how_much():
    assert rows(OUTLOOK)["fits"] == "yes, 87.00 GiB to spare"
    assert rows(TOO_LARGE)["fits"] == "NO, 25.00 GiB too much"
    assert rows(OUTLOOK)["bound of a step"] == "1.1 s, by compute"
    without = replace(OUTLOOK, bound=None, bound_seconds=None)  # the compiler gave up
    assert "bound of a step" not in rows(without)


def test_the_page_is_whole_and_asks_the_network_for_nothing():
    page = render([OUTLOOK, TOO_LARGE])
    assert page.count("<circle") == 2 and "a note &lt;of&gt; one" in page
    assert "://" not in page and "<script" not in page
    bars = memory_bars([OUTLOOK, TOO_LARGE])
    assert bars[1]["limit"] == pytest.approx(100 * 95 / 120)
    assert sum(part["percent"] for part in bars[0]["parts"]) == pytest.approx(100 * 8 / 120)


def test_the_roof_bends_at_the_chips_ridge_and_the_point_is_at_its_bound():
    plot = roofline_plot([OUTLOOK])
    assert plot is not None
    (roof,) = plot["roofs"].values()
    corners = [tuple(map(float, corner.split())) for corner in roof[1:].split("L")]
    (point,) = plot["points"]
    assert corners[1][1] == corners[2][1] < corners[0][1]  # rises, then flat at the peak
    # Beyond the ridge, at its bound of 5.2e14 / 1.1 s: over the peak of 4.59e14, so at most there.
    assert point["x"] > corners[1][0] and abs(point["y"] - corners[1][1]) < 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"--gin_file={RECIPE}"], "--target"),
        (["--target=v5p-128"], "--gin_file"),
        ([f"--gin_file={RECIPE}", "--target=v5p-9"], "16, 32"),
        (["find", f"--gin_file={RECIPE}", "--target=v5p-128"], "find"),
        ([f"--gin_file={RECIPE}", "--target=v5p-128", "--mesh=fsdp"], "AXIS=N"),
    ],
)
def test_errors_are_one_line(capsys, arguments, says):
    assert cli.run(["plan", *arguments]) == cli.STATUS_USER_ERROR
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], lines


def test_a_plan_has_the_compiler_flags_of_the_run(run):
    vmem = "xla_tpu_scoped_vmem_limit_kib"
    assert flags_of(run, parse_target("v5p-128"))[vmem] == "65472"
    mine = replace(run, train=replace(run.train, xla_flags=(f"-{vmem}", "xla_foo=3")))
    flags = flags_of(mine, parse_target("2xv5e-256"))
    assert vmem not in flags and flags["xla_foo"] == "3"
    assert flags["xla_tpu_enable_data_parallel_all_reduce_opt"] is True  # two slices
    assert flags_of(run, parse_target("h100-64"))["xla_gpu_enable_triton_gemm"] is False
