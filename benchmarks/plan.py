"""The tables of docs/plan_tables.md: python -m benchmarks.plan [--only=olmo3|models|weak]

Compiles OLMo-3-7B as docs/plan.md compares it with MaxText, and with a long context; every released
model of the table for every machine; and one model on 16 to 4096 chips.
What was compiled before comes from plan's cache; figures are kept in results/plan.json.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from olmo_jax.plan.targets import parse_target, prepare_process

prepare_process()

from olmo_jax.config import load_config  # noqa: E402
from olmo_jax.errors import UserError  # noqa: E402
from olmo_jax.files import write_bytes  # noqa: E402
from olmo_jax.plan.run import Request, carry_out  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "plan.json"
PAGE = ROOT / "docs" / "plan_tables.md"
MODELS = {
    "OLMo-2-1B": "configs/olmo2/1b.gin",
    "OLMo-2-7B": "configs/olmo2/7b.gin",
    "OLMo-2-13B": "configs/olmo2/13b.gin",
    "OLMo-2-32B": "configs/olmo2/32b.gin",
    "OLMo-3-32B": "configs/olmo3/32b.gin",
    "OLMoE-1B-7B": "configs/olmoe/1b_7b.gin",
}
MACHINES = ("v5e-256", "v5p-128", "v6e-256", "h100-64", "h100-256")
OLMO3 = {  # on v5p-128: recipe, mesh, instances a step
    "T 8,192, FSDP": ("configs/olmo3/7b.gin", "fsdp=64", 64),
    "T 65,536, context parallel": ("configs/olmo3/7b_long.gin", "fsdp=16,context=4", 16),
}
TOKENS_A_DEVICE = 16_384  # a step: 4 instances of 4096 tokens, 2 of 8192
WEAK = {  # chips: machine and mesh
    16: ("v5p-32", "fsdp=16"),
    64: ("v5p-128", "fsdp=64"),
    256: ("v5p-512", "fsdp=256"),
    1024: ("v5p-2048", "data=4,fsdp=256"),
    4096: ("4xv5p-2048", "slice=4,data=4,fsdp=256"),
}
WEAK_MODEL = "configs/olmo2/7b.gin"


def request(
    config: str, machine: str, name: str, mesh: str = "fsdp=-1", rows: int | None = None
) -> Request:
    run = load_config([str(ROOT / config)], ["Data.paths=('unused',)"])
    rows = rows or TOKENS_A_DEVICE // run.data.sequence_length * parse_target(machine).devices
    return Request(run, machine, name, mesh, batch=rows, micro=0, remat="full")


def requests(only: str | None) -> dict[str, Request]:
    out = {}
    if only in (None, "olmo3"):
        for name, (config, mesh, rows) in OLMO3.items():
            out[name] = request(config, "v5p-128", name, mesh, rows)
    if only in (None, "models"):
        for model, config in MODELS.items():
            for machine in MACHINES:
                name = f"{model} on {machine}"
                out[name] = request(config, machine, name)
    if only in (None, "weak"):
        for chips, (machine, mesh) in WEAK.items():
            name = f"weak {chips}"
            out[name] = request(WEAK_MODEL, machine, name, mesh)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("olmo3", "models", "weak"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--match", default="", help="Only names with this in them.")
    arguments = parser.parse_args()
    wanted = {n: r for n, r in requests(arguments.only).items() if arguments.match in n}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        running = {pool.submit(carry_out, r): name for name, r in wanted.items()}
        for future in as_completed(running):
            try:
                outlook = future.result().as_json()
            except UserError as error:
                print(f"{running[future]}: {error}", flush=True)
                continue
            kept[running[future]] = outlook
            print(f"{running[future]}: {outlook['compile_seconds']:.0f} s", flush=True)
            write_bytes(RESULTS, (json.dumps(kept, indent=1) + "\n").encode())
    write_page(kept)


def write_page(kept: dict) -> None:
    """docs/plan_tables.md from what was compiled."""
    PAGE.parent.mkdir(exist_ok=True)
    write_bytes(PAGE, "\n".join(page_lines(kept)).encode())
    print(f"wrote {PAGE.relative_to(ROOT)}")


def page_lines(kept: dict) -> list[str]:
    lines = [
        "# Plans of the released models",
        "",
        "Made by `python -m benchmarks.plan`; how to read them: [plan.md](plan.md).",
        "",
        f"Full remat, FSDP over all devices, {TOKENS_A_DEVICE:,} tokens a device and step "
        "(4 instances of 4,096 tokens; OLMo 3: 2 of 8,192). Memory in GiB a device; bound, MFU "
        "and days are at the roofline bound: what no run of this program can beat, no forecast. "
        "Days are for the recipe's own number of tokens.",
        "",
    ]
    found = {name: kept[name] for name in OLMO3 if name in kept}
    if found:
        lines += [
            "## OLMo-3-7B on v5p-128 (64 chips)",
            "",
            "| | mesh | instances | temporaries, bytes | memory, GiB of 95 | fits | "
            "FLOPs a device | bound s | by | sent, GB | compiled in s |",
            "|---|---|" + "---:|" * 9,
        ]
        for name, o in found.items():
            mesh = ", ".join(f"{axis} {n}" for axis, n in o["mesh"].items())
            lines.append(
                f"| {name} | {mesh} | {o['batch_size']} | {o['memory']['temporaries']:,} | "
                f"{o['memory_needed'] / 1024**3:.1f} | {'yes' if o['fits'] else '**no**'} | "
                f"{o['flops_device']:.4g} | {o['bound_seconds']:.4g} | {o['bound_by']} | "
                f"{sum(o['collective_bytes'].values()) / 1e9:.1f} | {o['compile_seconds']:.0f} |"
            )
        lines.append("")
    head = (
        "memory | of | fits | FLOPs a device | bound s | by | tokens/s a chip | MFU | days | t CO2e"
    )
    for machine in MACHINES:
        rows = {m: kept.get(f"{m} on {machine}") for m in MODELS}
        if not any(rows.values()):
            continue
        about = next(o["about"] for o in rows.values() if o)
        lines += [f"## {machine}: {about}", "", f"| model | {head} | compiled in s |"]
        lines += ["|---|" + "---:|" * 11]
        for model, o in rows.items():
            lines.append(f"| {model} | {cells(o)} |" if o else f"| {model} |" + " |" * 11)
        lines.append("")
    return lines + weak_lines(kept)


def cells(o: dict) -> str:
    gib = 1024**3
    out = [
        f"{o['memory_needed'] / gib:.1f}",
        f"{o['memory_there'] / gib:.1f}",
        "yes" if o["fits"] else "**no**",
        f"{o['flops_device']:.3g}",
    ]
    if o["bound_seconds"]:
        out += [
            f"{o['bound_seconds']:.3g}",
            o["bound_by"],
            f"{o['tokens_per_second'] / o['chips']:,.0f}",
            f"{o['mfu']:.0%}",
            f"{o['days']:,.1f}",
            f"{o['carbon_kg'] / 1000:,.1f}",
        ]
    else:
        out += [""] * 6
    return " | ".join([*out, f"{o['compile_seconds']:.0f}"])


def expected_bytes(fsdp: int, copies: int) -> tuple[float, float]:
    """Bytes that one device sends in a step, over fsdp and over slice and data: the formula.

    Under full remat a layer's weights are gathered in bfloat16 three times (forward, again for the
    recomputation, backward), the head's once; gradients are scattered in float32. Between copies of
    the weights each device's part of the gradients is all-reduced in float32.
    """
    model = load_config([str(ROOT / WEAK_MODEL)], ["Data.paths=('unused',)"]).model
    tables = model.rows * model.d_model
    layers = model.parameter_count() - 2 * tables
    within = (fsdp - 1) / fsdp * (layers * (3 * 2 + 4) + tables * (2 + 4))
    between = 2 * (copies - 1) / copies * 4 * model.parameter_count() / fsdp
    return within, between


def weak_rows(kept: dict) -> list[dict]:
    """Each size's figures beside the formula's, and relative to the smallest's."""
    found = {n: kept[f"weak {n}"] for n in WEAK if f"weak {n}" in kept}
    out = []
    for n, o in found.items():
        fsdp = o["mesh"].get("fsdp", 1)
        gradients = 4 * o["parameters"] / fsdp
        sent = sum(o["collective_bytes"].values())
        expected = sum(expected_bytes(fsdp, n // fsdp))
        out.append(
            {
                "chips": n,
                "mesh": ", ".join(f"{a} {k}" for a, k in o["mesh"].items()),
                "temporaries": o["memory"]["temporaries"],
                "activations": o["memory"]["temporaries"] - gradients,
                "flops": o["flops_device"],
                "products": o["products_compiled"],
                "axes": {a: b for a, b in o["collective_bytes"].items() if b > 1e7},
                "sent": sent,
                "expected": expected,
                "bound": f"{o['bound_seconds']:.3g}",
                "by": o["bound_by"],
                "seconds": o["compile_seconds"],
            }
        )
    return out


def weak_lines(kept: dict) -> list[str]:
    rows = weak_rows(kept)
    if not rows:
        return []
    write_bytes(PAGE.with_name("weak_scaling.svg"), weak_plot(rows).encode())
    lines = [
        f"## Weak scaling: OLMo-2-7B on v5p, {TOKENS_A_DEVICE:,} tokens a chip",
        "",
        "Per device. *Activations* are the compiler's temporaries less the float32 gradients' "
        "shard, 4 bytes x parameters / fsdp, which is the one part that is meant to shrink.",
        "Expected bytes: (n - 1)/n of each layer gathered three times in bfloat16 (forward, "
        "recomputation, backward) and of the head once; gradients scattered in float32, and "
        "between copies of the weights their parts all-reduced (`expected_bytes` in "
        "`benchmarks/plan.py`). On 64 and 256 chips libtpu 0.0.52 writes each gather as an "
        "all-reduce, twice the bytes; on 16 it takes collective matrix products.",
        "",
        "![weak scaling](weak_scaling.svg)",
        "",
        "| chips | mesh | temporaries, GB | activations, GB | FLOPs | compiled products | "
        "sent, GB | expected, GB | ratio | bound s | by | compiled in s |",
        "|---:|---|" + "---:|" * 8 + "---|---:|",
    ]
    for r in rows:
        axes = ", ".join(f"{a} {b / 1e9:.2f}" for a, b in r["axes"].items())
        lines.append(
            f"| {r['chips']} | {r['mesh']} | {r['temporaries'] / 1e9:.3f} | "
            f"{r['activations'] / 1e9:.3f} | {r['flops']:.4g} | {r['products']:.4g} | "
            f"{r['sent'] / 1e9:.2f} ({axes}) | {r['expected'] / 1e9:.2f} | "
            f"{r['sent'] / r['expected']:.3f} | {r['bound']} | {r['by']} | {r['seconds']:.0f} |"
        )
    return [*lines, ""]


def weak_plot(rows: list[dict]) -> str:
    """An SVG: figures a device relative to the smallest size's, over chips (powers of four)."""
    width, height, left, right, top, bottom = 640, 300, 56, 16, 16, 60
    series = {
        "FLOPs": ("#1f6f8b", [r["products"] / rows[0]["products"] for r in rows]),
        "activations": ("#c8551b", [r["activations"] / rows[0]["activations"] for r in rows]),
        "bytes sent / formula": ("#5b6f2f", [r["sent"] / r["expected"] for r in rows]),
    }
    low, high = 0.8, 1.2

    def x(i: int) -> float:
        return left + i * (width - left - right) / max(1, len(rows) - 1)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return height - bottom - share * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" fill="#777">'
    ]
    for tick in (0.8, 0.9, 1.0, 1.1, 1.2):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            f'stroke="#ccc"/><text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{tick:.1f}</text>"
        )
    for i, r in enumerate(rows):
        parts.append(
            f'<text x="{x(i):.1f}" y="{height - bottom + 18}" text-anchor="middle">'
            f"{r['chips']}</text>"
        )
    for k, (name, (colour, values)) in enumerate(series.items()):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="4" fill="{colour}"/>'
            for i, v in enumerate(values)
        ]
        parts.append(
            f'<text x="{left + 190 * k}" y="{height - 10}" fill="{colour}">● {name}</text>'
        )
    return "".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
