"""Weights of MMDetection, and plain state dicts."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from mmfinetune.weights.source import Source


def from_mmdet(source: Source, loaded: Mapping, meta: Mapping) -> None:
    if 'optimizer' in loaded or 'message_hub' in loaded:
        source.kind = 'mmdet run'
    text = meta.get('cfg') or meta.get('config')  # 3.x, 2.x
    for told in _dicts(text if isinstance(text, str) else ''):
        if source.style is None and 'depth' in told and told.get('style') in ('pytorch', 'caffe'):
            source.style = told['style']
        if source.mean is None and {'mean', 'std'} <= set(told):
            try:
                source.mean, source.std = (tuple(map(float, told[k])) for k in ('mean', 'std'))
            except (TypeError, ValueError):
                continue
            # BGR is what cv2 reads; 2.x says to_rgb, 3.x bgr_to_rgb.
            source.rgb = bool(told.get('to_rgb', told.get('bgr_to_rgb', False)))
    if source.style is None and '_caffe_' in source.path.name:
        source.style = 'caffe'
        source.notes.append("style 'caffe' is told by the file name only")


def _dicts(text: str) -> Iterator[dict]:
    """All dicts in the text of a config, with what is literal in them; nothing is run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
            pairs = [(k.arg, k.value) for k in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
        found = {}
        for key, value in pairs:
            try:
                found[key] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, RecursionError):
                found[key] = None
        yield found
