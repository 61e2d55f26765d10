"""Whether a model and its batches fit a mesh: each misfit refused with its numbers and a way out.

What a mesh itself can be is parallel/mesh.py's; whether it all fits in memory, plan/'s.
"""

from collections.abc import Collection

from jax.sharding import AbstractMesh, Mesh

from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.parallel.sharding import batch_parts


def refuse_misfit(
    mesh: Mesh | AbstractMesh,
    model: ModelConfig,
    sequence_length: int,
    batch_sizes: Collection[int] = (),
    micro_batch_size: int | None = None,
) -> None:
    """UserError in one line where something would not divide over the mesh's axes."""
    tensor, context, expert = (mesh.shape[axis] for axis in ("tensor", "context", "expert"))
    heads, key_heads = model.n_heads, model.kv_heads
    if heads % tensor:
        raise UserError(
            f"Mesh.tensor = {tensor} does not divide the model's {heads} heads: give one of "
            f"{_divisors(heads)}"
        )
    if key_heads % tensor and tensor % key_heads:
        raise UserError(
            f"Mesh.tensor = {tensor} neither divides the model's {key_heads} key/value heads nor "
            f"is a multiple of them: give one of {_divisors(key_heads)}"
        )
    for name, size in (("MLP width", model.mlp_width), ("vocabulary rows", model.rows)):
        if size % tensor:
            raise UserError(
                f"Mesh.tensor = {tensor} does not divide the model's {size} {name}: give a "
                f"divisor of {size}"
            )
    if expert > 1 and (not model.n_experts or model.n_experts % expert):
        has = f"{model.n_experts} experts" if model.n_experts else "no experts"
        raise UserError(
            f"Mesh.expert = {expert}: the model has {has}; give "
            + (f"one of {_divisors(model.n_experts)}" if model.n_experts else "1")
        )
    if context > 1 and sequence_length % (2 * context):
        raise UserError(
            f"Mesh.context = {context} cuts each sequence into {2 * context} chunks, and "
            f"Data.sequence_length = {sequence_length} does not divide by that: give a multiple "
            f"of {2 * context}, or another mesh"
        )
    parts = batch_parts(mesh)
    for size in batch_sizes:
        if size % parts:
            raise UserError(
                f"Data.batch_size = {size} does not divide over the mesh's {parts} batch parts "
                f"(slice x data x fsdp x expert): give a multiple of {parts}, or another mesh"
            )
        if micro_batch_size and (size % micro_batch_size or micro_batch_size % parts):
            raise UserError(
                f"Train.micro_batch_size = {micro_batch_size} must divide Data.batch_size = "
                f"{size} and be a multiple of the mesh's {parts} batch parts"
            )


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
