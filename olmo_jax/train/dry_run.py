"""What a run would be, in words, before anything is allocated: size, plan, kernels, mesh.

Nothing is compiled and no data file is opened; `plan/` measures memory and time.
"""

import os

import jax

from olmo_jax.errors import UserError
from olmo_jax.model.transformer import kernels_for
from olmo_jax.parallel.mesh import build_mesh
from olmo_jax.parallel.xla_flags import VARIABLES, choose
from olmo_jax.train.config import RunConfig
from olmo_jax.train.fit import refuse_misfit
from olmo_jax.train.flops import flops_per_token
from olmo_jax.train.plan import Plan


def describe(run: RunConfig) -> str:
    """Lines "name: value". A mesh that does not fit this machine is told there, not raised."""
    # First: XLA would abort at a flag that it does not know, with the first look at the devices.
    platform, flags, flag_notes = choose(run.train.xla_flags, os.environ, run.train.deterministic)
    plan, T = Plan(run), run.data.sequence_length
    flops = flops_per_token(run.model, T)
    sizes = sorted(plan.batch_sizes)
    tokens_a_step = " to ".join(f"{size * T:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    instances = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    try:
        mesh = build_mesh(run.mesh)
        refuse_misfit(mesh, run.model, T, plan.batch_sizes, run.train.micro_batch_size)
        device, devices = mesh.devices.flat[0], mesh.size
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        where = f"{axes or 'one device'} ({devices} x {device.device_kind})"
    except UserError as error:
        device, devices = jax.devices()[0], jax.device_count()
        where = f"does not fit this machine ({error})"
    kernels = kernels_for(run.model, device, devices=devices)
    blocks = f" ({kernels.splash.q:,} queries at a time)" if kernels.splash else ""
    experts = f", experts {kernels.experts}" if run.model.n_experts else ""
    count = run.model.parameter_count()
    lines = {
        "parameters": f"{count:,} ({run.model.parameter_count(embedding=False):,} without the "
        "embedding table)",
        "FLOPs a token": f"{flops:.4g} (6 x parameters without the embedding table, and attention "
        "over all T x T pairs)",
        "tokens a step": f"{tokens_a_step} ({instances} instances of {T:,})",
        "steps": f"{plan.steps:,}"
        + (f", stopping at {run.train.stop_at:,}" if run.train.stop_at else ""),
        "tokens": f"{plan.tokens:,}",
        **(
            {"data": f"from step {first:,} of its order, instance {plan.first_n(0):,}"}
            if (first := run.train.data_from_step)
            else {}
        ),
        "FLOPs": f"{flops * plan.tokens:.4g}",
        "kernels": f"linear {kernels.linear}, attention {kernels.attention}{blocks}{experts}, "
        f"cross-entropy over {kernels.cross_entropy_tokens:,} tokens at a time",
        "mesh": where,
    }
    if run.model.n_experts:
        active = run.model.parameter_count(active=True)
        lines["parameters"] += f"; {active:,} active, {run.model.n_experts} experts"
    variable = VARIABLES[platform]
    given = os.environ.get(variable)
    lines["XLA flags"] = f"{len(flags) or 'none'} for {platform} ({variable})" + (
        f", beside what it says already: {given}" if given else ""
    )
    width = max(len(name) for name in lines) + 2
    text = [f"{name + ':':{width}}{value}" for name, value in lines.items()]
    text += [f"  {flag}: {flag.reason} [{flag.source}]" for flag in flags]
    notes = [*flag_notes, *kernels.notes]
    return "\n".join([*text, *(f"{'note:':{width}}{note}" for note in notes)])
