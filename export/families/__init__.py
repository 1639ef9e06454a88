"""The table of model families: each has one folder and one row. Importing this table imports no family and no torch.

Every folder has the same file names, so a row only names the folder:

    adapter.py   ADAPTER plans and loads the stages (contract.Adapter)
    recipe.py    RECIPES, by name, say which layers become 8-bit (quant.recipes.Recipe)
    convert.py   LAYOUT converts the family's native files; only where it has any (convert.layout.NativeLayout)
    keys.py      native_names says where these files hold the transformer's tensors; only where it has any
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ditc.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from ditc.export.checkpoint.open import Checkpoint
    from ditc.export.contract import Adapter
    from ditc.export.convert.layout import NativeLayout
    from ditc.export.quant.recipes import Recipe
    from ditc.runtime.weight_map import NativeName

DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family. Its modules are imported when a property first needs them.

    Attributes:
        label: the family's name in manifests, recipes and messages.
        package: the dotted name of the family's package, which is its folder.
        has_native_layout: whether `ditc convert` knows files of the family in a layout other than diffusers'.
        upstream: the package whose modules parity compares with. Where it is not diffusers, parity/reference/ has a
            module with the folder's name that assembles upstream's modules into a pipeline.
    """

    label: str
    package: str
    has_native_layout: bool = False
    upstream: str = DIFFUSERS

    @property
    def folder(self) -> str:
        """The folder's name. If the family has a module in parity/reference/, it has the same name."""
        return self.package.rpartition(".")[2]

    @property
    def adapter(self) -> Adapter:
        """The object that plans and loads the family's stages."""
        adapter: Adapter = self._module("adapter").ADAPTER
        return adapter

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        """The family's recipes by name."""
        recipes: Mapping[str, Recipe] = self._module("recipe").RECIPES
        return recipes

    @property
    def layout(self) -> NativeLayout | None:
        """The converter of the family's native files; None where it has none."""
        if not self.has_native_layout:
            return None
        layout: NativeLayout = self._module("convert").LAYOUT
        return layout

    def native_names(self, checkpoint: Checkpoint) -> dict[str, NativeName]:
        """Where the family's own files hold each tensor of the transformer; {} where it has none."""
        if not self.has_native_layout:
            return {}
        names: dict[str, NativeName] = self._module("keys").native_names(
            checkpoint.component("transformer").tensors
        )
        return names

    def _module(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")


FAMILIES = (
    Family(label="sana", package="ditc.export.families.sana", has_native_layout=True),
    Family(label="sd3", package="ditc.export.families.sd3", has_native_layout=True),
    Family(label="mmdit", package="ditc.export.families.lucidrains", upstream="mmdit"),
)


def find_family(checkpoint: Checkpoint) -> Family:
    """Find the family that the checkpoint belongs to.

    Raises:
        CheckpointError: the checkpoint belongs to no known family.
    """
    for family in FAMILIES:
        if family.adapter.accepts(checkpoint):
            return family
    pipeline = checkpoint.model_index.get("_class_name", "an unnamed pipeline")
    if "transformer" not in checkpoint.components:
        raise CheckpointError(
            f"{checkpoint.path} holds {pipeline} without a transformer: model_index.json says "
            f"{checkpoint.model_index.get('transformer')!r}",
            hint="every family is known by its transformer: fetch model_index.json and transformer/ again",
        )
    classes = [component.class_name or "?" for component in checkpoint.components.values()]
    raise CheckpointError(
        f"{checkpoint.path} holds {pipeline} ({', '.join(classes)}), which belongs to no known family",
        hint=f"known families: {', '.join(family.label for family in FAMILIES)}",
    )


def find_adapter(checkpoint: Checkpoint) -> Adapter:
    """The adapter of the checkpoint's family. Raises CheckpointError if the checkpoint belongs to no known family."""
    return find_family(checkpoint).adapter


def family_of(label: str) -> Family:
    """The family with the label that a manifest or a plan states. Raises KeyError if there is none."""
    return {family.label: family for family in FAMILIES}[label]
