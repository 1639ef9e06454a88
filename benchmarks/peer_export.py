"""Export a checkpoint with optimum-intel, in its environment: python -P peer_export.py CHECKPOINT FOLDER f32|int8"""

from __future__ import annotations

import sys
from typing import Any

from optimum.intel.openvino import OVSanaPipeline
from optimum.utils import DEFAULT_DUMMY_SHAPES, DummyVisionInputGenerator

CELLS = 4


def main() -> None:
    """Write the OpenVINO models of the checkpoint, with weights in f32, or in INT8 where they are matrices."""
    checkpoint, folder, weights = sys.argv[1:]
    # The example that is traced has so many pixels and, for the decoder, latent cells. By default they are 64, which
    # is two pictures of 2048 px for a DC-AE of released size: the export did not end within 13 minutes. 32 pixels are
    # the least that its encoder takes.
    DEFAULT_DUMMY_SHAPES.update(width=32, height=32)
    DummyVisionInputGenerator.generate = fewer_cells(DummyVisionInputGenerator.generate)
    # By default, models of more than a billion parameters would become INT8.
    pipe = OVSanaPipeline.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=weights == "int8"
    )
    pipe.save_pretrained(folder)


def fewer_cells(generate: Any) -> Any:
    """The method of optimum's class that makes example inputs, with CELLS x CELLS latent cells."""

    def changed(self: Any, input_name: str, *arguments: Any, **settings: Any) -> Any:
        if input_name == "latent_sample":
            self.height = self.width = CELLS
        return generate(self, input_name, *arguments, **settings)

    return changed


if __name__ == "__main__":
    main()
