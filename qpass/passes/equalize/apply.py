"""Write the scales of a site into the constants that take them, or buy a Mul."""

from __future__ import annotations

import numpy as np

from qpass.graph import Graph, array_of
from qpass.passes.affine.absorb import absorb, overflow
from qpass.passes.equalize.site import Reader, Site
from qpass.passes.equalize.solve import Scales
from qpass.passes.normalize.folding import write_constant
from qpass.passes.normalize.linear_folding import Affine


def apply_scales(graph: Graph, site: Site, scales: Scales) -> str:
    """Let the constants of `site` take `scales`; return why not, "" when it is done.

    The tensor of the site becomes ``(x - shift) / scale``. Products are taken in float64 and
    rounded once to float32. Nothing is changed when a number would not be finite.
    """
    changes = []
    for slot in site.slots:
        values = array_of(slot.node.inputs[slot.index]).astype(np.float64)
        if slot is site.shift:
            values = values - scales.shift[slot.labels]
        values = values * scales.scale[slot.labels] ** slot.power
        if not np.isfinite(values.astype(np.float32)).all():
            return f"a constant of {slot.node.name} would not be finite"
        changes.append((slot, values.astype(np.float32)))
    affines = [(reader, affine_of(reader, scales)) for reader in site.readers]
    for reader, affine in affines:
        reason = overflow(reader.linear, affine)
        if reason:
            return f"{reader.linear.node.name}: {reason}"
    for slot, values in changes:
        write_constant(graph, slot.node, slot.index, values)
    for reader, affine in affines:
        absorb(graph, reader.linear, affine)
    return ""


def affine_of(reader: Reader, scales: Scales) -> Affine:
    """Return what the weights of a reader have to make up for."""
    gain = scales.scale[reader.labels] ** -reader.power
    return Affine(gain=gain, offset=scales.shift[reader.labels])


def buy_mul(graph: Graph, tensor: str, readers: tuple[Reader, ...], scales: Scales) -> str:
    """Put one Mul by channel in front of the linear ops that read `tensor`; "" when it is done."""
    affines = [(reader, affine_of(reader, scales)) for reader in readers]
    for reader, affine in affines:
        reason = overflow(reader.linear, affine)
        if reason:
            return f"{reader.linear.node.name}: {reason}"
    node = readers[0].linear.node
    source = node.inputs[0]
    conv = node.op in ("Conv", "ConvTranspose")
    # By the rank of the weight: behind an If that of the tensor may be unknown.
    trailing = len(node.inputs[1].shape) - 2 if conv else 0
    # The reciprocal is rounded once; the weights take the inverse of what was stored.
    factor = (1.0 / scales.scale[readers[0].labels]).astype(np.float32)
    constant = graph.constant(f"{tensor}_scale", factor.reshape(-1, *[1] * trailing))
    scaled = graph.variable(f"{tensor}_scaled", source.dtype, source.shape)
    mul = graph.make("Mul", [source, constant], [scaled], name=f"{node.name}_scale")
    place = {id(node): i for i, node in enumerate(graph.nodes)}
    graph.add(mul, before=min((r.linear.node for r in readers), key=lambda n: place[id(n)]))
    for reader in readers:
        exact = Affine(gain=1.0 / factor.astype(np.float64), offset=np.zeros(factor.size))
        absorb(graph, reader.linear, exact)
        graph.set_input(reader.linear.node, 0, scaled)
    return ""
