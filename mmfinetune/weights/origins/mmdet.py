"""Weights of MMDetection, and plain state dicts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from mmfinetune.weights.source import BGR_MEAN, ONES, Origin, Source

_MAX_CONFIG = 1 << 17  # characters; whole configs have some ten thousand


def _convert(source: Source, loaded: Mapping, _bn_eps: float | None) -> None:
    if 'optimizer' in loaded or 'message_hub' in loaded:
        source.origin = 'mmdet run'
    meta = loaded.get('meta')
    texts = (meta.get('cfg'), meta.get('config')) if isinstance(meta, Mapping) else ()  # 3.x, 2.x
    text = next((text for text in texts if isinstance(text, str) and text), '')
    for settings in _dicts(text if len(text) < _MAX_CONFIG else ''):
        if source.style is None and 'depth' in settings and settings.get('style') in ('pytorch', 'caffe'):
            source.style = settings['style']
        if source.mean is None and {'mean', 'std'} <= set(settings):
            try:
                source.mean, source.std = (tuple(map(float, settings[k])) for k in ('mean', 'std'))
            except (TypeError, ValueError, OverflowError):
                continue
            # BGR is what cv2 reads; 2.x says to_rgb, 3.x bgr_to_rgb.
            source.rgb = bool(settings.get('to_rgb', settings.get('bgr_to_rgb', False)))
    if source.style is None and re.search(r'[-_]caffe[-_]', source.path.name):
        source.style = 'caffe'
        if source.mean is None:
            source.rgb, source.mean, source.std = False, BGR_MEAN, ONES
        source.note('weights-caffe-by-name')


def _dicts(text: str) -> Iterator[dict]:
    """All dicts in the text of a config, with their literal values; nothing is run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        pairs: list[tuple] = []
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


ORIGIN = Origin('mmdet', (('backbone.',), ('roi_head.', 'rpn_head.')), _convert, neck='neck.')
