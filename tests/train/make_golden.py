"""Makes golden.json out of the original programs' own scheduler and SkipStep classes.

Run by hand, with torch and numpy, on bare git directories of allenai/OLMo and allenai/OLMo-core:
    python tests/train/make_golden.py OLMO_GIT OLMO_CORE_GIT > tests/train/golden.json
"""

import enum
import json
import subprocess
import sys
import types

import numpy as np
import torch


class Stub(types.ModuleType):
    """A module in which every name is an empty class: what the two files import but don't need."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class Registrable:
    @classmethod
    def register(cls, _):
        return lambda subclass: subclass

    def __class_getitem__(cls, _):
        return cls


def load(git, path, name):
    """The file at HEAD as module `name`."""
    source = subprocess.check_output(["git", "-C", git, "show", f"HEAD:{path}"], text=True)
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def commit(git):
    return subprocess.check_output(["git", "-C", git, "rev-parse", "HEAD"], text=True).strip()


olmo_git, core_git = sys.argv[1:]
for name in ["olmo", "olmo.config", "olmo.torch_util", "olmo_core", "olmo_core.config"]:
    sys.modules[name] = Stub(name)
for name in [
    "olmo_core.exceptions",
    "olmo_core.utils",
    "olmo_core.optim",
    "olmo_core.optim.config",
]:
    sys.modules[name] = Stub(name)
for name in ["olmo_core.distributed", "olmo_core.distributed.utils"]:
    sys.modules[name] = Stub(name)
sys.modules["olmo_core.config"].Registrable = Registrable
sys.modules["olmo_core.config"].StrEnum = enum.StrEnum
sys.modules["olmo_core.optim.config"].OptimConfig = Registrable
sys.modules["olmo_core.distributed.utils"].get_local_tensor = lambda x: x
sys.modules["olmo_core.utils"].move_to_device = lambda x, _: x

olmo = load(olmo_git, "olmo/optim.py", "olmo.optim")
core = load(core_git, "src/olmo_core/optim/scheduler.py", "olmo_core.optim.scheduler")
load(core_git, "src/olmo_core/optim/skip_step_optimizer.py", "olmo_core.optim.skip_step_optimizer")
adamw = load(core_git, "src/olmo_core/optim/adamw.py", "olmo_core.optim.adamw")

PEAK, TOTAL = 3e-4, 1000
POINTS = [
    1,
    2,
    7,
    50,
    99,
    100,
    101,
    250,
    333,
    500,
    501,
    600,
    749,
    750,
    751,
    899,
    900,
    901,
    999,
    1000,
]
BEYOND = [1001, 1500]


def schedule_case(original, ours, peak=PEAK, total=TOTAL, points=POINTS):
    values = [original.get_lr(peak, point, total) for point in points]
    return {
        "original": repr(original),
        "config": ours,
        "peak": peak,
        "total": total,
        "points": points,
        "values": values,
    }


def old(cls, warmup_min_lr=None, **fields):
    return cls(
        grad_clip_warmup_steps=None,
        grad_clip_warmup_factor=None,
        warmup_min_lr=warmup_min_lr,
        **fields,
    )


def schedule_cases():
    w, ten = {"warmup": 100}, {"warmup_start_fraction": 0.1}
    for kind, old_class, new_class in [
        ("cosine", olmo.CosWithWarmup, core.CosWithWarmup),
        ("linear", olmo.LinearWithWarmup, core.LinearWithWarmup),
    ]:
        yield schedule_case(
            old(old_class, warmup_steps=100), {"kind": kind, **w, **ten}, points=POINTS + BEYOND
        )
        yield schedule_case(
            old(old_class, warmup_steps=100, alpha_f=0.0, t_max=750, warmup_min_lr=0.0),
            {"kind": kind, **w, "final_fraction": 0.0, "length": 750},
        )
        yield schedule_case(old(old_class, warmup_steps=0), {"kind": kind})
        yield schedule_case(
            new_class(warmup=100, alpha_f=0.3), {"kind": kind, **w, "final_fraction": 0.3}
        )
        yield schedule_case(
            new_class(warmup_fraction=0.05), {"kind": kind, "warmup_fraction": 0.05}
        )
    yield schedule_case(
        old(olmo.InvSqrtWithWarmup, warmup_steps=100),
        {"kind": "inverse_sqrt", **w, **ten, "final_fraction": 0.0},
        points=POINTS + BEYOND,
    )
    yield schedule_case(core.InvSqrtWithWarmup(warmup=100), {"kind": "inverse_sqrt", **w})
    yield schedule_case(
        old(olmo.CosLinearEnvelope, warmup_steps=100),
        {"kind": "cosine_linear_envelope", **w, **ten},
        points=POINTS + BEYOND,
    )
    yield schedule_case(old(olmo.ConstantScheduler), {"kind": "constant"})
    yield schedule_case(
        old(olmo.ConstantWithWarmupScheduler, warmup_steps=100),
        {"kind": "constant_with_warmup", **w, **ten},
        points=POINTS + BEYOND,
    )
    yield schedule_case(core.ConstantWithWarmup(warmup=100), {"kind": "constant_with_warmup", **w})
    zero = {"final_fraction": 0.0}
    yield schedule_case(core.WSD(warmup=100), {"kind": "wsd", **w, **zero})
    yield schedule_case(
        core.WSD(warmup_fraction=0.07, decay=250, decay_fraction=None, decay_min_lr=PEAK * 0.1),
        {"kind": "wsd", "warmup_fraction": 0.07, "decay": 250},
    )
    yield schedule_case(core.PowerLR(warmup=100), {"kind": "power", **w, **zero})
    yield schedule_case(
        core.PowerLR(warmup=100, decay=250, decay_fraction=None, b=-1.0, decay_min_lr=PEAK * 0.05),
        {"kind": "power", **w, "decay": 250, "exponent": -1.0, "final_fraction": 0.05},
    )
    yield schedule_case(
        core.HalfCosWithWarmup(warmup=100),
        {"kind": "half_cosine", **w},
        points=POINTS + BEYOND,
    )
    # OLMo 3 7B after its plan grew from 5T to 7T tokens, at 4,194,304 tokens a step.
    old_steps, new_steps = round(5e12 / 4194304), round(7e12 / 4194304)
    yield schedule_case(
        core.HalfCosWithWarmup(warmup=old_steps // 2 + 1000),
        {"kind": "half_cosine", "warmup": old_steps // 2 + 1000},
        total=new_steps,
        points=[596047, old_steps // 2 + 1000, old_steps, 1_400_000, new_steps],
    )
    yield schedule_case(
        core.SequentialScheduler(
            schedulers=[
                core.InvSqrtWithWarmup(warmup=100, alpha_f=0.5),
                core.CosWithWarmup(warmup=10, alpha_f=0.2),
                core.WSD(warmup=1, decay=100, decay_fraction=None),
            ],
            schedulers_max=[250, 350],
        ),
        {
            "kind": "sequential",
            "stage_kinds": ["inverse_sqrt", "cosine", "wsd"],
            "stage_lengths": [250, 350],
            "stage_warmups": [100, 10, 1],
            "stage_final_fractions": [0.5, 0.2, 0.0],
            "stage_decays": [0, 0, 100],
        },
    )
    yield schedule_case(
        core.SequentialScheduler(
            schedulers=[core.ConstantWithWarmup(warmup=100), core.LinearWithWarmup(warmup=0)],
            schedulers_max=[600],
        ),
        {
            "kind": "sequential",
            "stage_kinds": ["constant_with_warmup", "linear"],
            "stage_lengths": [600],
            "stage_warmups": [100, 0],
        },
    )


def skip_case():
    """200 noisy steps with outliers; SkipStepAdamW with a constant learning rate on 3 numbers."""
    steps = 200
    rng = np.random.default_rng(0)
    losses = 2.5 + 0.05 * rng.standard_normal(steps) + np.linspace(1, 0, steps)
    grad_norms = 0.4 + 0.02 * rng.standard_normal(steps)
    losses[20] = 30.0  # too early to be left out: fewer than 64 values
    grad_norms[62] = 0.8  # the 63rd: the last that is too early
    grad_norms[63] = 3.0  # the first that is left out
    losses[140] = 6.0  # inside 6 sigma, while the outlier of step 20 is among the last 128
    losses[170] = 6.0  # out
    losses[171] = 6.0
    losses[175] = 0.1  # far below the mean is no outlier
    grad_norms[195] = 0.8
    # Just inside 6 sigma, and outside where the deviation divides by n instead of n - 1.
    losses[199] = losses[71:199].mean() + 6 * 0.998 * losses[71:199].std(ddof=1)
    gradients = rng.standard_normal((steps, 3))
    losses, grad_norms, gradients = (np.float32(x) for x in (losses, grad_norms, gradients))

    parameter = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    optimizer = adamw.SkipStepAdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    skipped, parameters = [], []
    for loss, grad_norm, gradient in zip(losses, grad_norms, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
        optimizer.latest_loss = torch.tensor(loss)
        optimizer.latest_grad_norm = torch.tensor(grad_norm)
        optimizer.step()
        skipped.append(int(optimizer.step_skipped))
        parameters.append(parameter.tolist())
    return {
        "learning_rate": 1e-2,
        "start": [0.5, -1.0, 2.0],
        "losses": losses.tolist(),
        "grad_norms": grad_norms.tolist(),
        "gradients": gradients.tolist(),
        "skipped": skipped,
        "parameters": parameters,
    }


json.dump(
    {
        "made_by": "python tests/train/make_golden.py OLMO_GIT OLMO_CORE_GIT",
        "commits": {"allenai/OLMo": commit(olmo_git), "allenai/OLMo-core": commit(core_git)},
        "schedules": list(schedule_cases()),
        "skip_step": skip_case(),
    },
    sys.stdout,
)
