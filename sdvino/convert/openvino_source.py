"""An OpenVINO folder as the source of a conversion: its components are compressed further.

Weights stored in 8 or 4 bits become half precision again first, so that every recipe starts from
the same kind of model. What quantized activations are is lost for good: such a folder is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.convert.families import find_family, read_facts
from sdvino.convert.source import SourceFolder, prediction_of
from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.graph.saving import read_ir, save_ir
from sdvino.inputs.files import check_all_inside, read_json
from sdvino.inputs.ir import quantizes_activations, read_xml

# The types that NNCF stores weights in; a constant of one, converted to float, is such a weight.
_STORED = ("u8", "i8", "u4", "i4", "nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVinoFolder(SourceFolder):
    """A checked OpenVINO folder whose components are in float, or have weights in fewer bits.

    Its sub-folders are components; ``configs`` has vae, too, as the decoder has it.
    """

    @classmethod
    def open(cls, path: Path, *, name: str | None = None) -> OpenVinoFolder:
        """Read and check ``path``; raises RequestError, in one sentence, for anything else."""
        folder = ModelFolder.open(path)
        check_all_inside(path)
        return cls._of(
            path,
            folder.name if name is None else name,
            folder.model_index,
            {part: dict(files.config) for part, files in folder.components.items()},
            folder.scheduler_config,
            weights={part: (files.bin,) for part, files in folder.components.items()},
        )

    @classmethod
    def outline(cls, path: Path, *, name: str, elsewhere: Mapping[str, int]) -> OpenVinoFolder:
        """Return the source that ``path`` will be, with the .bin files that are not there yet.

        ``elsewhere``: component -> bytes of its .bin. Raises RequestError.
        """

        def here(file: str) -> Path:
            if not (path / file).is_file():
                raise RequestError(f"{name} has no {file}; choose another model.")
            return path / file

        def read(file: str) -> dict[str, Any]:
            return read_json(here(file), file)

        for part in elsewhere:
            here(f"{part}/openvino_model.xml")
        return cls._of(
            path,
            name,
            read("model_index.json"),
            {part: read(f"{part}/config.json") for part in elsewhere},
            read("scheduler/scheduler_config.json"),
            weights={},
            elsewhere=elsewhere,
        )

    @classmethod
    def _of(
        cls,
        path: Path,
        name: str,
        model_index: Mapping[str, Any],
        configs: Mapping[str, Mapping[str, Any]],
        scheduler: Mapping[str, Any],
        *,
        weights: Mapping[str, tuple[Path, ...]],
        elsewhere: Mapping[str, int] | None = None,
    ) -> OpenVinoFolder:
        for part in ("text_encoder", "unet", "vae_decoder"):
            if part not in configs:
                raise RequestError(f"{name} has no {part}; choose another model.")
        for part in configs:
            if quantizes_activations(read_xml(path / part / "openvino_model.xml", part)):
                raise RequestError(
                    f"The {part} of {path} has quantized activations already, which cannot be"
                    " undone; give the float folder, or the checkpoint, that it was made from."
                )
        names = f"{name} {model_index.get('_name_or_path')}"
        facts = read_facts(configs["unet"], configs["text_encoder"], scheduler, names)
        return cls(
            path=path,
            name=name,
            family=find_family(facts),
            model_index=model_index,
            configs={**configs, "vae": configs["vae_decoder"], "scheduler": dict(scheduler)},
            weights=weights,
            prediction_type=prediction_of(scheduler),
            has_tiny_vae="tiny_vae" in configs,
            elsewhere={} if elsewhere is None else elsewhere,
        )

    @property
    def components(self) -> dict[str, str]:
        """Return our components and the sub-folders that hold them: the same, here."""
        return {name: name for name in (*self.weights, *self.elsewhere)}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents at the model's own size."""
        size = self.configs["unet"].get("sample_size")
        height, width = size if isinstance(size, list) else [64 if size is None else size] * 2
        return self.configs["vae"].get("latent_channels", 4), height, width


def copy_component(source: OpenVinoFolder, component: str, output: Path) -> int:
    """Write ``component`` of ``source`` as ``output``/openvino_model.xml and .bin, in float.

    Returns how many weights were stored in fewer bits and are half precision now.
    """
    output.mkdir(parents=True, exist_ok=True)
    xml = source.folder(component) / "openvino_model.xml"
    model = read_ir(xml)
    changed = restore_weights(model)
    if changed:
        save_ir(model, output / xml.name)
    else:
        for suffix in (".bin", ".xml"):  # the .xml last: it stands for the whole
            shutil.copyfile(xml.with_suffix(suffix), (output / xml.name).with_suffix(suffix))
    return changed


def restore_weights(model: ov.Model) -> int:
    """Put half-precision constants in place of ``model``'s weights in 8 or 4 bits; return how many.

    A weight is a constant of a small type, converted to float, less a zero point perhaps, times a
    scale, and perhaps in another shape (NNCF's compress_weights).
    """
    core = ov.Core()
    ends = [end for node in model.get_ordered_ops() if (end := _end_of_weight(node)) is not None]
    for end in ends:
        targets = list(end.get_target_inputs())
        # OpenVINO folds it: every packing of small types is known there.
        cut = ov.Model([ops.result(end)], [], "weight")
        values = core.compile_model(cut, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({})[0]
        half = ops.constant(np.asarray(values, np.float16))
        restored = ops.convert(half, end.get_element_type().get_type_name())
        restored.set_friendly_name(end.get_node().get_friendly_name())
        for target in targets:
            target.replace_source_output(restored.output(0))
    model.validate_nodes_and_infer_types()
    return len(ends)


def _end_of_weight(node: ov.Node) -> ov.Output | None:
    """Return the float weight that the constant ``node`` becomes, or None where it is none."""
    if node.get_type_name() != "Constant":
        return None
    if node.get_element_type().get_type_name() not in _STORED:
        return None
    end, scaled = node.output(0), False
    while True:
        readers = list(end.get_target_inputs())
        if len(readers) != 1:
            break
        reader = readers[0].get_node()
        kind = reader.get_type_name()
        if kind not in ("Convert", "Subtract", "Multiply", "Reshape") or not _constant_but(
            reader, readers[0].get_index()
        ):
            break
        if kind == "Multiply" and scaled:
            break
        if readers[0].get_index() != 0 and kind != "Multiply":
            return None  # a zero point or a shape, not the weight itself
        scaled = scaled or kind == "Multiply"
        end = reader.output(0)
    return end if scaled else None


def _constant_but(node: ov.Node, index: int) -> bool:
    """Tell whether every input of ``node`` but one is a constant, converted perhaps."""
    for other in range(node.get_input_size()):
        if other == index:
            continue
        source = node.input_value(other).get_node()
        while source.get_type_name() in ("Convert", "Reshape"):
            source = source.input_value(0).get_node()
        if source.get_type_name() != "Constant":
            return False
    return True
