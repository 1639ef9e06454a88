"""Upstream's networks for components whose files hold their weights under other names or scales than upstream reads.

ditc reads such files (export/checkpoint/plain_weights.py). diffusers and transformers would ignore the tensors with a
wrapper's prefix, and the scales of FP8 weights, and draw something else without an error. So upstream's network gets
the plain weights.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from ditc.export.checkpoint.open import Checkpoint, Component
from ditc.export.checkpoint.tensors import read_safetensors

LIBRARIES = ("diffusers", "transformers")


def rewritten_networks(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Upstream's network, with the plain weights, for every component whose files upstream cannot read as they are."""
    return {
        name: _network(component, checkpoint.model_index[name], dtype)
        for name, component in checkpoint.components.items()
        if checkpoint.model_index[name][0] in LIBRARIES and _is_rewritten(component)
    }


def _is_rewritten(component: Component) -> bool:
    saved = {name for file in component.files for name in read_safetensors(file)}
    return saved != set(component.tensors)


def _network(component: Component, named: list[str], dtype: torch.dtype) -> nn.Module:
    library, class_name = named
    network_class = getattr(importlib.import_module(library), class_name)
    tensors = {name: tensor.to(dtype) for name, tensor in component.tensors.items()}
    network: nn.Module
    if library == "diffusers":
        network = network_class.from_config(component.config).to(dtype)
        network.load_state_dict(tensors)
    else:
        config = network_class.config_class.from_dict(component.config)
        network = network_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return network.eval()
