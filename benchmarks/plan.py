"""The tables of docs/plan_tables.md: python -m benchmarks.plan [--only=models|weak] [--processes=2]

Compiles every released model of the table for every machine, and one model on 16 to 4096 chips.
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
TOKENS_A_DEVICE = 16_384  # a step: 4 instances of 4096 tokens, 2 of 8192
WEAK = {  # chips: machine and mesh
    16: ("v5p-32", "fsdp=16"),
    64: ("v5p-128", "fsdp=64"),
    256: ("v5p-512", "fsdp=256"),
    1024: ("v5p-2048", "data=4,fsdp=256"),
    4096: ("4xv5p-2048", "slice=4,data=4,fsdp=256"),
}
WEAK_MODEL = "configs/olmo2/7b.gin"


def request(config: str, machine: str, name: str, mesh: str | None = None) -> Request:
    run = load_config([str(ROOT / config)], ["Data.paths=('unused',)"])
    rows = TOKENS_A_DEVICE // run.data.sequence_length * parse_target(machine).devices
    mesh = mesh or "fsdp=-1"
    return Request(run, machine, name, mesh, batch=rows, micro=0, remat="full")


def requests(only: str | None) -> dict[str, Request]:
    out = {}
    if only != "weak":
        for model, config in MODELS.items():
            for machine in MACHINES:
                name = f"{model} on {machine}"
                out[name] = request(config, machine, name)
    if only != "models":
        for chips, (machine, mesh) in WEAK.items():
            name = f"weak {chips}"
            out[name] = request(WEAK_MODEL, machine, name, mesh)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("models", "weak"))
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


def weak_lines(kept: dict) -> list[str]:
    rows = {n: kept[f"weak {n}"] for n in WEAK if f"weak {n}" in kept}
    if not rows:
        return []
    lines = [
        "## Weak scaling: OLMo-2-7B on v5p, 16,384 tokens a chip",
        "",
        "| chips | mesh | temporaries, GB | FLOPs a device | compiled products | bytes over each "
        "axis, GB | bound s | by |",
        "|---:|---|---:|---:|---:|---|---:|---|",
    ]
    for n, o in rows.items():
        axes = ", ".join(f"{a} {b / 1e9:.2f}" for a, b in o["collective_bytes"].items() if b > 1e7)
        mesh = ", ".join(f"{a} {k}" for a, k in o["mesh"].items())
        lines.append(
            f"| {n} | {mesh} | {o['memory']['temporaries'] / 1e9:.3f} | {o['flops_device']:.4g} | "
            f"{o['products_compiled']:.4g} | {axes} | {o['bound_seconds']:.3g} | {o['bound_by']} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
