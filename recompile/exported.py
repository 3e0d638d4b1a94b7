"""A program of torch.export as the passes take it, and back.

    torch.export                                  for capture
    p_bags_0_weight: meta["val"]                  p_bags_0_weight: meta["example_value"], recompile_name "bags.0.weight"

Both are ATen operators before autograd with fake tensors, so the rest is capture's, as for a graph of Dynamo's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, OutputSpec
from torch.utils._pytree import tree_leaves


def graph_of(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the program's graph that says what a graph of Dynamo's says."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    for node, spec in _inputs(program, graph):
        if spec.target is not None:
            node.meta["recompile_name"] = spec.target
    return fx.GraphModule(program.graph_module, graph)


def inputs_of(program: ExportedProgram) -> list[Any]:
    """What the graph's inputs are: parameters, buffers and constants, then the example inputs."""
    held = {**program.state_dict, **program.constants}
    given = iter(tree_leaves(program.example_inputs))
    specs = program.graph_signature.input_specs
    return [next(given) if spec.target is None else held[spec.target] for spec in specs]


def with_graph(program: ExportedProgram, gm: fx.GraphModule) -> ExportedProgram:
    """The program with another graph of the same inputs and outputs. It shares the weights."""
    for node, spec in _inputs(program, gm.graph):
        node.name = spec.arg.name  # a copy has another name for builtins', such as `input`
    made = gm.graph.output_node().args[0]
    signature = program.graph_signature
    outputs = [_named(spec, value) for spec, value in zip(signature.output_specs, made, strict=True)]  # type: ignore[arg-type]
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=replace(signature, output_specs=outputs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _inputs(program: ExportedProgram, graph: fx.Graph) -> Iterator[tuple[fx.Node, InputSpec]]:
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    return zip(placeholders, program.graph_signature.input_specs, strict=True)


def _named(spec: OutputSpec, value: Any) -> OutputSpec:
    """The output, which may now be computed by another node."""
    return replace(spec, arg=replace(spec.arg, name=value.name)) if isinstance(value, fx.Node) else spec
