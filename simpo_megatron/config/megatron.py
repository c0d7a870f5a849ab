"""The settings that are passed through to Megatron's configurations, as `name=value`.

`trainer/pass_through.py` gives the values the types of Megatron's fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.config.refused import reason
from simpo_megatron.settings import Group, flag, require, setting

ITEM = "NAME=VALUE"


@dataclass(frozen=True)
class MegatronConfig(Group):
    """Passed through to Megatron."""

    transformer_config: tuple[str, ...] | None = setting(
        None,
        "fields of Megatron's TransformerConfig that have no flag here, such as moe_router_fusion=true; those that the "
        "package sets, or that do not work with pairs, are refused",
        ITEM,
    )
    ddp_config: tuple[str, ...] | None = setting(
        None, "fields of Megatron's DistributedDataParallelConfig, such as average_in_collective=true", ITEM
    )
    optimizer_config: tuple[str, ...] | None = setting(
        None,
        "fields of Megatron's OptimizerConfig, such as decoupled_weight_decay=false",
        ITEM,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("transformer_config", "ddp_config", "optimizer_config"):
            # The command line and YAML give lists.
            object.__setattr__(self, name, tuple(getattr(self, name) or ()) or None)
            self.values(name)

    @property
    def nccl_buffers(self) -> bool:
        """Whether DDP registers its buffers with NCCL."""
        return self.values("ddp_config").get("nccl_ub", "").lower() == "true"

    def values(self, name: str) -> dict[str, str]:
        """The fields of one of the settings, and their values as text.

        Args:
            name: of the setting.

        Raises:
            UserError: an item is not NAME=VALUE, a field is given twice, or it is refused.
        """
        found: dict[str, str] = {}
        for item in getattr(self, name) or ():
            field, equals, value = item.partition("=")
            require(bool(field and equals), f"{flag(name)} {item} is not {ITEM}, such as bucket_size=40000000")
            field = field.strip().replace("-", "_")
            require(field not in found, f"{flag(name)} sets {field} twice; keep one of them")
            why = reason(field)
            require(why is None, f"{flag(name)} {field} cannot be set: {why}")
            found[field] = value.strip()
        return found
