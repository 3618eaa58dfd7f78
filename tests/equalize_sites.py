"""Random graphs and scales for sites of equalization, and the check that the function stays."""

from __future__ import annotations

import numpy as np

from qpass.graph import Graph
from qpass.passes.equalize.site import Refused, Site
from qpass.passes.equalize.sites import find_sites
from qpass.passes.equalize.solve import Scales
from tests.oracle import ort, ort_plain, reference, relative_error

# About ten float32 roundings in a row, each 6e-8 of a sum with terms of both signs.
EXACT = 1e-5


def graph_of(body: str, signature: str, seed: int = 0, **shapes: tuple[int, ...]) -> Graph:
    """Build a graph whose constants are random; those named *_i hold what is given."""
    random = np.random.default_rng(seed)
    constants = {
        name: shape
        if isinstance(shape, np.ndarray)
        else random.uniform(0.5, 1.5, shape).astype(np.float32)
        * random.choice([-1, 1], shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    text = f'<ir_version: 10, opset_import: ["" : 23]> g {signature} {{ {body} }}'
    graph = Graph.from_text(text, **constants)
    graph.infer_shapes()
    return graph


def places(graph: Graph) -> tuple[list[Site], list[Refused]]:
    return find_sites(graph, [node.name for node in graph.nodes])


def random_scales(site: Site, seed: int = 3) -> Scales:
    random = np.random.default_rng(seed)
    scale = np.exp2(random.uniform(-4, 4, site.groups + 1)).astype(np.float32).astype(np.float64)
    shift = random.uniform(-1, 1, site.groups + 1).astype(np.float32).astype(np.float64)
    scale[0], shift[0] = 1.0, 0.0
    if site.shift is None:
        shift[:] = 0.0
    return Scales(method="random", scale=scale, shift=shift)


def feeds_of(graph: Graph, seed: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {t.name: random.standard_normal(t.shape).astype(np.float32) for t in graph.inputs}


def assert_exact(before: Graph, after: Graph, engines=(reference, ort_plain, ort)) -> None:
    feeds = feeds_of(before)
    wanted = reference(before.to_model(), feeds)
    for engine in engines:
        assert relative_error(engine(after.to_model(), feeds), wanted) < EXACT, engine.__name__


LINEAR = "(float[2,5,8] x) => (float[2,5,4] y)"
IMAGE = "(float[2,3,9,9] x) => (float[2,4,h,w] y)"
