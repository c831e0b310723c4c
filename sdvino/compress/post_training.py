"""NNCF's post-training quantization on statistics that were collected before.

NNCF asks for statistics of points in a graph, and has them collected by running the graph on a
dataset, once before SmoothQuant and once after. Here it is given them: those of the float graph,
scaled where SmoothQuant scales. This is the only module that knows NNCF's inside: of its public
steps, `Pipeline.get_statistic_points_for_step` and `run_step`, and of its collectors.
Source: NNCF 3.4, nncf.quantization.algorithms.pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import openvino as ov

from sdvino.compress.bias_correction import constant_value, smoothing
from sdvino.compress.quiet import quiet
from sdvino.compress.statistics import Array, Channels, Statistics, value_of
from sdvino.errors import SdvinoError
from sdvino.graph.cut import Value
from sdvino.graph.walk import by_name, consumers

#: What hands values on as they are, or some of them.
_PASSING = frozenset(
    {"Concat", "Convert", "DepthToSpace", "Interpolate", "MaxPool", "Reshape", "Slice", "Split"}
    | {"Squeeze", "StridedSlice", "Transpose", "Unsqueeze", "VariadicSplit"}
)


def apply_nncf(
    model: ov.Model,
    statistics: Statistics,
    crossing: Mapping[str, Value],
    ignored: Iterable[str],
    options: Mapping[str, Any],
) -> ov.Model:
    """Return ``model`` as nncf.quantize would with the data that ``statistics`` are of.

    ``crossing`` says which values of the whole its inputs stand for, ``ignored`` are names of
    operations, ``options`` further arguments of NNCF. Biases are not corrected. ``model`` is
    consumed.
    """
    with quiet():
        import nncf
        from nncf.openvino.graph.nncf_graph_builder import GraphConverter
        from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
        from openvino._offline_transformations import compress_quantize_weights_transformation

        pipeline = create_ptq_pipeline(
            # For this type NNCF leaves sums alone and has SmoothQuant.
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=list(dict.fromkeys(ignored))),
            **options,
        )
        for step in range(len(pipeline.pipeline_steps)):
            graph = GraphConverter.create_nncf_graph(model)
            points = pipeline.get_statistic_points_for_step(step, model, graph)
            Answers(model, statistics, crossing).give(points)
            model = pipeline.run_step(step, points, model, graph)
        compress_quantize_weights_transformation(model)
    return model


class Answers:
    """Finds what NNCF asks about the values of a model, which may be smoothed."""

    def __init__(
        self, model: ov.Model, statistics: Statistics, crossing: Mapping[str, Value]
    ) -> None:
        self._nodes = by_name(model)
        self._statistics = statistics
        self._crossing = crossing

    def give(self, points: Any) -> None:
        """Fill the collectors of ``points``, NNCF's StatisticPointsContainer."""
        from nncf.common.graph.transformations.commands import TargetType
        from nncf.common.tensor_statistics.collectors import AbsMaxReducer, MeanAggregator
        from nncf.common.tensor_statistics.statistics import MinMaxTensorStatistic
        from nncf.tensor import Tensor

        for _, point, collector in points.get_tensor_collectors():
            target = point.target_point
            node = self._nodes[target.target_node_name]
            if target.type == TargetType.POST_LAYER_OPERATION:
                value = node.output(target.port_id)
            else:
                value = node.input_value(target.port_id)
            if target.is_weight_target_point():
                collector.register_input_for_all_reducers(Tensor(constant_value(value)))
            elif any(isinstance(a, MeanAggregator) for a in collector.aggregators.values()):
                even = any(isinstance(reducer, AbsMaxReducer) for reducer in collector.reducers)
                low, high = self.ends(value, even=even)
                collector.set_cache(MinMaxTensorStatistic(Tensor(low), Tensor(high)))
            else:
                collector.register_input_for_all_reducers(Tensor(self.extremes(value)))

    def ends(self, value: ov.Output, *, even: bool) -> tuple[Array, Array]:
        """Return the range of ``value``: the means of the ends that it has in each evaluation.

        An ``even`` one is measured by the greatest magnitudes. Both have as many axes as ``value``.
        """
        found = self.find(value)
        low, high = found.low.min(axis=1), found.high.max(axis=1)
        if even:
            high = np.maximum(high, -low)
        shape = [1] * value.get_partial_shape().rank.get_length()
        return low.mean().reshape(shape), high.mean().reshape(shape)

    def extremes(self, value: ov.Output) -> Array:
        """Return a small tensor whose channels have the least and greatest values of ``value``'s.

        It has as many axes, and the channels where they are.
        """
        found = self.find(value)
        rank = max(2, value.get_partial_shape().rank.get_length())
        other = 1 if found.axis == 0 else 0
        shape = [1] * rank
        shape[found.axis], shape[other] = found.low.shape[1], 2
        both = np.stack([found.low.min(axis=0), found.high.max(axis=0)], axis=other)
        return both.reshape(shape)

    def find(self, value: ov.Output) -> Channels:
        """Return what ``value`` is like; raises SdvinoError where nothing tells."""
        node = value.get_node()
        factors = smoothing(value)
        if factors is not None:
            return self.find(node.input_value(0)).scaled(factors)
        found = self._statistics.find(value_of(value, self._crossing))
        if found is not None:
            return found
        # NNCF quantizes before what only hands values on: they are the values that are read behind.
        behind = self._behind(value)
        if not behind:
            raise SdvinoError(
                f"There are no statistics of what {node.get_friendly_name()} gives;"
                " convert again from the start."
            )
        low = np.min([channels.low.min(axis=1) for channels in behind], axis=0)
        high = np.max([channels.high.max(axis=1) for channels in behind], axis=0)
        return Channels(low[:, None], high[:, None], np.zeros(1, np.float32))

    def _behind(self, value: ov.Output) -> list[Channels]:
        """Return what the values are like that ``value`` is handed on as."""
        found: list[Channels] = []
        for node in consumers(value):
            if node.get_type_name() in _PASSING:
                for port in node.outputs():
                    known = self._statistics.find(value_of(port, self._crossing))
                    found += self._behind(port) if known is None else [known]
        return found
