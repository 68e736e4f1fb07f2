"""How transformers splits a model's attention heads over processes (`tp_plan`)."""

from transformers import PreTrainedModel

# projections that compute keys, alone or together with queries and values
_MAKES_KEYS = ("k_proj", "qkv_proj", "query_key_value")


def head_group(model: PreTrainedModel) -> tuple[str, int] | None:
    """torch's name of the group of processes that share a model's heads, and their number; None for one process."""
    mesh = getattr(model, "_device_mesh", None)
    size = getattr(model, "_tp_size", None) or 1
    plan = getattr(model, "_tp_plan", None) or {}
    splits = any(rule.rpartition(".")[2] in _MAKES_KEYS and "colwise" in how for rule, how in plan.items())
    if mesh is None or size == 1 or not splits:
        return None
    group = mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
    return group.group_name, size


def spread_over(model: PreTrainedModel) -> dict[str, object]:
    """Where accelerate has put the parts of a model; empty if it has placed none."""
    return dict(getattr(model, "hf_device_map", None) or {})
