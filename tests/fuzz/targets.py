"""What is fuzzed: each target makes a site once, then an input after the other, and uses it as the tools do."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmfinetune.apis import check_data, evaluate
from mmfinetune.config import flatten, new, resolve, resume
from mmfinetune.data.check.report import as_text
from mmfinetune.data.check.run import Options as CheckOptions
from mmfinetune.data.check.run import check
from mmfinetune.data.preflight import read_split
from mmfinetune.data.prepare import format_summary, prepare
from mmfinetune.data.split import split_file
from mmfinetune.evaluation.compare import compare_runs
from mmfinetune.weights import publish, read, sources, transfer
from tests.builders.coco import CocoData
from tests.builders.weights import mmdet_state, torchvision_state
from tests.fuzz import mutations
from tests.fuzz.mutations import Rng

ROOT = Path(__file__).parents[2]
Use = Callable[[], object]


class Target:
    """A kind of files.

    Args:
        folder: Holds ``in`` (what is read; only the target writes there) and ``out`` (all that may be written).
    """

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / 'in', folder / 'out'
        self.source.mkdir()

    def make(self, rng: Rng) -> Iterator[Use]:
        """Write an input, and give the uses of it, each to be called by itself; any error: it cannot be written."""
        raise NotImplementedError


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


class Weights(Target):
    """torch files new and old, numpy pickles, safetensors; contents, pickles and raw bytes are changed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        state, own = torchvision_state(4), mmdet_state(3)
        meta = {
            'dataset_meta': {'classes': ['a', 'b', 'c']},
            'cfg': "model = dict(backbone=dict(depth=50, style='caffe'))",
        }
        hub = {'runtime_info': {'mmfinetune': {'version': 1, 'batch_setup': None}}, 'log_scalars': {}}
        record = {
            'origin': 'torchvision',
            'style': 'pytorch',
            'mean': [1.0, 2.0, 3.0],
            'std': [1.0] * 3,
            'rgb': True,
            'notes': [['a', 'b']],
        }
        save = publish._torch_file
        (self.source / 'tv.pth').write_bytes(save(dict(state)))
        kept = sources.open_source(self.source / 'tv.pth')
        detectron = {
            'backbone.bottom_up.stem.conv1.weight': np.ones((4, 3, 7, 7), 'f4'),
            'proposal_generator.x': np.ones(3, 'f4'),
        }
        self.trees: list[dict] = [
            {'state_dict': own, 'meta': meta, 'optimizer': {'state': {}, 'param_groups': []}, 'message_hub': hub},
            {'state_dict': kept.tensors, 'meta': {**meta, **record}, 'extra': kept.extra},
            dict(state),
            {'model': state, 'epoch': 3},
            {'model': detectron, '__author__': 'x'},
            {'state_dict': {f'module.{k}': v.half() for k, v in own.items()}, 'classes': ['a', 'b', 'c']},
        ]
        self.model = mmdet_state(5)

    def odd(self, rng: Rng) -> Any:
        one = torch.ones(1)
        odd = (
            torch.tensor(1.0), torch.ones(0), torch.ones(3, 0, 2), torch.ones(4, 3, 7, 7), torch.full((4,), torch.nan), torch.ones(3).int(), torch.ones(3).bool(),
            torch.empty(1 << 40, device='meta'), one.expand(1 << 36), one.half().expand(9, 1 << 30), torch.ones(2).to(torch.complex64), torch.ones(2).to(torch.float8_e4m3fn),
            torch.ones(2, 2).to_sparse(), torch.arange(6).reshape(2, 3).t(), torch.ones(2, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bfloat16)[1:, 1:],
            torch.tensor([4, 3, 2, 1]), torch.nn.Parameter(one), b'bytes', (1, (2, 3)), OrderedDict(a=one), np.ones(3), np.float64(3), {1: 2}, mutations.SHARED, 1j,
        )  # fmt: skip
        return rng.choice(odd) if rng.random() < 0.6 else mutations.copied(rng.choice(mutations.ODD))

    def keys(self, rng: Rng, top: dict) -> dict:
        node = rng.choice([n for n in mutations._nodes(top) if isinstance(n, dict) and n])
        key = rng.choice(list(node))
        node[rng.choice((5, None, (1, 2), '\ud800', '', 1.5, b'k', 'module.', 'a' * 9000, 1 << 90, True))] = node[key]
        return top

    def content(self, rng: Rng) -> tuple[bytes, str]:
        top = rng.choice(self.trees)
        if rng.random() < 0.8:
            top = mutations.tree(rng, top, self.odd)
        if rng.random() < 0.2 and isinstance(top, dict):
            top = self.keys(rng, top)
        kind = rng.choice(('.pth', '.pth', '.pth', 'old', '.pkl', '.safetensors'))
        if kind == '.safetensors':
            from safetensors.torch import save

            flat = top.get('state_dict', top) if isinstance(top, dict) else {}
            flat = {str(k): v.clone() for k, v in flat.items() if isinstance(v, torch.Tensor) and _small(v)}
            return save(flat, {'classes': rng.choice(('["a", "b", "c"]', '[' * 9999, '5', '["\\ud800"]'))}), kind
        if kind == '.pkl':
            model = top.get('model', top.get('state_dict', top)) if isinstance(top, dict) else top
            if isinstance(model, dict):
                model = {k: v.numpy() if isinstance(v, torch.Tensor) and _small(v) else v for k, v in model.items()}
            return pickle.dumps({'model': model}, rng.choice((2, 4))), kind
        buffer = io.BytesIO()
        torch.save(top, buffer, _use_new_zipfile_serialization=kind == '.pth')
        return buffer.getvalue(), '.pth'

    def make(self, rng: Rng) -> Iterator[Use]:
        content, suffix = self.content(rng)
        if content[:2] == b'PK' and rng.random() < 0.5:
            content = _rezipped(rng, content)
        elif rng.random() < 0.5:
            content = mutations.data(rng, content)
        path = self.source / f'a{suffix}'
        path.write_bytes(content)
        loaded: list[sources.Source] = []
        yield lambda: loaded.append(sources.open_source(path, any_model=rng.random() < 0.5))
        if loaded:
            heads = {'roi_head.bbox_head.fc_cls': {'std': 0.01}}
            cfg = {'head_init': rng.choice(('reinit', 'remap')), 'reinit': heads}
            yield lambda: print('\n'.join(loaded[0].lines()))
            yield lambda: transfer.plan_transfer(self.model, loaded[0], cfg, ['a', 'b', 'c', 'd', 'e'])
            yield lambda: publish.convert_file(path, self.out / 'b.pth', rng.choice(('mmdet', 'torchvision')))
            yield lambda: sources.open_source(self.out / 'b.pth')
        yield lambda: publish.publish(path, self.out / 'published')
        yield lambda: resume._read_run(path)


def _small(tensor: torch.Tensor) -> bool:
    return read._is_dense(tensor) and tensor.numel() < 1e6 and tensor.dtype != torch.bfloat16


def _rezipped(rng: Rng, content: bytes) -> bytes:
    """A zip file, its checksums right, with changes in what it holds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, 'w', rng.choice((0, 0, 8))) as new_zip:
        for member in old.infolist():
            part = old.read(member)
            if member.filename.endswith('data.pkl') or rng.random() < 0.02:
                part = mutations.data(rng, part)
            if rng.random() > 0.01:
                new_zip.writestr(member.filename, part)
    return buffer.getvalue()


class Coco(Target):
    """Annotation files and pictures: checked, repaired, prepared, split, read for a run, made a config."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = self.source / 'annotations'
        self.folder.mkdir()
        (self.source / 'images').mkdir()
        site = CocoData(self.source / 'images')
        (folder / 'secret.png').write_bytes((self.source / 'images/2.png').read_bytes())
        rle = {'size': [30, 40], 'counts': [100, 50, 1050]}
        site.annotations += [{**site.annotation(4, 3, 5), 'segmentation': rle}, site.annotation(5, 3, 1)]
        self.seed = {
            'info': {'description': 'x'},
            'licenses': [{'id': 1, 'name': 'x'}],
            **{key: getattr(site, key) for key in ('images', 'annotations', 'categories')},
        }
        self.rows = [
            {
                'image_id': 1,
                'category_id': 1,
                'score': 0.9,
                'bbox': [1, 1, 5, 5],
                'segmentation': {'size': [30, 40], 'counts': 'a11o0'},
            },
            {'image_id': 3, 'category_id': 5, 'score': 0.5, 'bbox': [1, 1, 5, 5], 'file_name': '3.jpg'},
        ]
        self.pictures = {path: path.read_bytes() for path in (self.source / 'images').glob('*.*g')}
        shutil.copy(self.write(_json(self.seed)), self.folder / 'instances_val.json')

    def write(self, content: bytes) -> Path:
        path = self.folder / 'instances_train.json'
        path.write_bytes(content)
        return path

    def make(self, rng: Rng) -> Iterator[Use]:
        kind = rng.randrange(10)
        value = mutations.tree(rng, self.seed) if kind < 6 else self.seed
        content = _json(value)
        if kind == 6:
            content = mutations.data(rng, content)
        elif kind == 7:
            content = mutations.text(rng, content.decode()).encode()
        path = self.write(content)
        for picture, whole in self.pictures.items():
            changed = kind == 8 and rng.random() < 0.7
            picture.write_bytes(mutations.data(rng, whole) if changed else whole)
        images = self.source / 'images'
        options = CheckOptions(workers=1, cache=False, progress=False)
        if kind == 9:
            rows = self.source / 'rows.json'
            rows.write_bytes(
                _json(mutations.tree(rng, self.rows)) if rng.random() < 0.8 else mutations.data(rng, _json(self.rows))
            )
            yield lambda: evaluate.run(
                evaluate.Options(predictions=rows, ann=path, out=self.out / 'e', pictures=rng.random() < 0.1)
            )
            return
        yield lambda: print(as_text(check({'train': (path, images)}, None, options), 5))
        yield lambda: read_split(path, images)
        skip, boxes, trust = (rng.random() < 0.5 for _ in range(3))
        more = dict(skip_bad=skip, boxes_as_masks=boxes, trust_sizes=trust, workers=1, progress=False)
        source = path if rng.random() < 0.5 else self.source
        yield lambda: print(format_summary(prepare(source, self.out / 'p', rng.choice(('auto', 'coco')), **more)))
        yield lambda: print(split_file(path, [70, 30], out=self.out / 's').text())
        fixing = dict(
            targets=[path], image_root=images, fix=self.out / 'f', html=self.out / 'r.html', json=rng.random() < 0.5
        )
        if rng.random() < 0.3:
            yield lambda: check_data.run(check_data.Options(workers=1, cache=False, progress=False, **fixing))
        if rng.random() < 0.1:
            yield lambda: new.write(self.source, 'x', self.out / 'x.py', ROOT / 'configs/mask_rcnn_demo.py')


class Yaml(Target):
    """YOLO data sets: data.yaml, lists and label files."""

    SEED = 'path: .\ntrain: images/train\nval: [images/val]\nnc: 2\nnames:\n  0: cat\n  1: "dog"\nanchors: &a [1, 2]\nmore: *a\n'

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in ('train/a', 'train/b', 'val/c'):
            for kind in ('images', 'labels'):
                (self.source / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (60, 40), 'grey').save(self.source / 'images' / f'{name}.jpg')
        self.labels = '0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8\n'

    def make(self, rng: Rng) -> Iterator[Use]:
        import yaml

        kind = rng.randrange(6)
        content = self.SEED.encode()
        if kind < 2:
            content = mutations.text(rng, self.SEED).encode(errors='replace')
        elif kind == 2:
            content = mutations.data(rng, content)
        elif kind < 5:
            content = yaml.dump(
                mutations.tree(rng, yaml.safe_load(self.SEED)), default_flow_style=rng.random() < 0.5
            ).encode(errors='replace')
        (self.source / 'data.yaml').write_bytes(content)
        for path in ('train/a', 'train/b', 'val/c'):
            labels = mutations.text(rng, self.labels) if kind == 5 else self.labels
            (self.source / 'labels' / f'{path}.txt').write_bytes(
                mutations.data(rng, labels.encode()) if rng.random() < 0.1 else labels.encode()
            )
        more = dict(skip_bad=rng.random() < 0.5, boxes_as_masks=rng.random() < 0.5, workers=1, progress=False)
        yield lambda: print(format_summary(prepare(self.source, self.out / 'p', rng.choice(('auto', 'yolo')), **more)))


class Labels(Target):
    """LabelMe's JSON files, VOC's XML files and lists, Cityscapes' polygons."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in 'ab':
            (self.source / 'me').mkdir(exist_ok=True)
            Image.new('RGB', (60, 40), 'grey').save(self.source / f'me/{name}.jpg')
        square = [[10, 5], [30, 5], [30, 25], [10, 25]]
        kinds = (('polygon', square), ('rectangle', square[:3:2]), ('circle', square[:2]), ('line', square[:2]))
        buffer = io.BytesIO()
        Image.new('L', (21, 21), 255).save(buffer, 'PNG')
        import base64

        mask = {
            'label': 'cat',
            'points': square[:3:2],
            'shape_type': 'mask',
            'mask': base64.b64encode(buffer.getvalue()).decode(),
        }
        shapes = [
            {'label': 'cat', 'points': points, 'group_id': None, 'shape_type': kind, 'flags': {}}
            for kind, points in kinds
        ]
        self.me = {
            'version': '5',
            'shapes': [*shapes, mask],
            'imagePath': 'a.jpg',
            'imageData': None,
            'imageHeight': 40,
            'imageWidth': 60,
        }
        devkit = self.source / 'voc'
        for name in ('JPEGImages', 'SegmentationObject', 'SegmentationClass', 'Annotations', 'ImageSets/Segmentation'):
            (devkit / name).mkdir(parents=True)
        objects = np.zeros((40, 60), np.uint8)
        objects[5:20, 5:30] = 1
        for split in ('train', 'val'):
            (devkit / f'ImageSets/Segmentation/{split}.txt').write_text(f'{split}_1\n')
            Image.new('RGB', (60, 40), 'grey').save(devkit / f'JPEGImages/{split}_1.jpg')
            for kind in ('Object', 'Class'):
                picture = Image.fromarray(objects)
                picture.putpalette(bytes(range(256)) * 3)
                picture.save(devkit / f'Segmentation{kind}/{split}_1.png')
        self.xml = '<annotation><object><name>aeroplane</name><difficult>0</difficult><truncated>1</truncated></object></annotation>'
        (devkit / 'Annotations/val_1.xml').write_text(self.xml)
        self.png = (devkit / 'SegmentationObject/train_1.png').read_bytes()
        city = self.source / 'city'
        for name in ('leftImg8bit', 'gtFine'):
            (city / name / 'train/x').mkdir(parents=True)
        Image.new('RGB', (60, 40), 'grey').save(city / 'leftImg8bit/train/x/x_0_0_leftImg8bit.png')
        instances = np.zeros((40, 60), np.uint16)
        instances[5:20, 5:30] = 26001
        self.city = city / 'gtFine/train/x/x_0_0_gtFine_instanceIds.png'
        Image.fromarray(instances).save(self.city)
        self.instances = self.city.read_bytes()

    def make(self, rng: Rng) -> Iterator[Use]:
        which = rng.choice(('me', 'me', 'voc', 'voc', 'city'))
        if which == 'me':
            content = _json(mutations.tree(rng, self.me))
            if rng.random() < 0.3:
                content = mutations.data(rng, _json(self.me))
            (self.source / 'me/a.json').write_bytes(content)
            (self.source / 'me/b.json').write_bytes(_json({**self.me, 'imagePath': 'b.jpg'}))
        elif which == 'voc':
            xml = (
                mutations.text(rng, self.xml).encode() if rng.random() < 0.7 else mutations.data(rng, self.xml.encode())
            )
            (self.source / 'voc/Annotations/train_1.xml').write_bytes(xml)
            png = mutations.data(rng, self.png) if rng.random() < 0.2 else self.png
            (self.source / 'voc/SegmentationObject/train_1.png').write_bytes(png)
        else:
            self.city.write_bytes(mutations.data(rng, self.instances))
        more = dict(skip_bad=rng.random() < 0.5, trust_masks=rng.random() < 0.5, workers=1, progress=False)
        yield lambda: print(format_summary(prepare(self.source / which, self.out / 'p', 'auto', **more)))


class Configs(Target):
    """Configs whose values are changed, and ``--cfg-options``."""

    NAMES = ('mask_rcnn_demo', 'mask_rcnn_voc_pretrained', 'mask_rcnn_demo_scratch')

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        texts = [flatten.flatten(ROOT / f'configs/{name}.py') for name in self.NAMES]
        self.texts = [text.replace("'data/", f"'{ROOT}/data/") for text in texts]
        keys = (
            'train_cfg.max_epochs',
            'optim_wrapper.optimizer.lr',
            'optim_wrapper.optimizer.type',
            'model.backbone',
            'param_scheduler.0.end',
            'train_dataloader',
            'visualizer',
        )
        self.keys = (
            *keys,
            'train_dataloader.batch_size',
            'randomness.seed',
            'weights.reinit',
            'default_hooks.checkpoint',
            'custom_imports',
            'val_evaluator',
            'x',
            '',
            '.',
            'a.b',
        )

    def odd(self, rng: Rng) -> ast.expr:
        value = rng.choice([v for v in mutations.ODD if not isinstance(v, list) or len(v) < 100])
        with_text = repr(value).replace('nan', 'float("nan")').replace('inf', 'float("inf")')
        return ast.parse(with_text, mode='eval').body

    def make(self, rng: Rng) -> Iterator[Use]:
        module = ast.parse(rng.choice(self.texts))
        for _ in range(rng.choice((0, 1, 1, 2))):
            places = [
                (node, keyword)
                for node in ast.walk(module)
                if isinstance(node, ast.Call)
                for keyword in node.keywords
            ]  # fmt: skip
            node, keyword = rng.choice(places)
            what = rng.randrange(6)
            if what < 4:
                keyword.value = self.odd(rng)
            elif what == 4:
                node.keywords.remove(keyword)
            else:
                keyword.arg = rng.choice(
                    ('type', 'x', 'classes', 'ann_file', 'indices', 'lr', '_delete_', '_scope_', 'dataset')
                )
        path = self.source / 'c.py'
        path.write_text(ast.unparse(ast.fix_missing_locations(module)))
        options = []
        for _ in range(rng.choice((0, 0, 1, 2))):
            value = rng.choice(
                [repr(v)[:300] for v in mutations.ODD]
                + ['dict(type=Adam)', "{'type': 'Adam'}", '[(', "dict(type='AdamW', lr=1)", '1,2', 'dict(*a)', 'f(x)']
            )
            options.append(
                f'{rng.choice(self.keys)}={value if rng.random() < 0.7 else mutations.text(rng, value[:200])}'
            )
        more = dict(cfg_options=options, batch_size=rng.choice((None, 1, 3)), lr=rng.choice((None, 0.1)))
        yield lambda: resolve.resolve(
            resolve.Options(str(path), dry_run=True, work_dir=str(self.out / 'w'), **more), lambda _: 1
        )


class Runs(Target):
    """What a run leaves behind, as somebody else's work dir may have it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.logs = self.source / '20260101_000000/vis_data'
        self.logs.mkdir(parents=True)
        self.lines = [
            {'lr': 0.1, 'loss': 1.0, 'epoch': 1, 'iter': 3, 'step': 3},
            {'coco/segm_mAP': 0.1, 'coco/bbox_mAP': 0.2, 'val/loss': 1.0, 'step': 1},
            {'lr': 0.1, 'loss': 0.9, 'epoch': 2, 'iter': 6, 'step': 6},
            {'coco/segm_mAP': -1, 'coco/bbox_mAP': 0.3, 'step': 2},
        ]
        self.csv = (
            'epoch,iter,train/loss,val/loss,coco/segm_mAP,lr,train_seconds\n1,3,1.0,1.1,0.1,0.1,5\n2,6,0.9,,0.2,0.1,5\n'
        )
        self.zero = {'checkpoint': 'x', 'metrics': {'coco/segm_mAP': 0.01, 'coco/bbox_mAP': 0.02}}

    def make(self, rng: Rng) -> Iterator[Use]:
        which = rng.randrange(3)
        lines = [mutations.tree(rng, line) if which == 0 and rng.random() < 0.5 else line for line in self.lines]
        logs = '\n'.join(map(json.dumps, lines)).encode()
        (self.logs / 'scalars.json').write_bytes(
            mutations.data(rng, logs) if which == 0 and rng.random() < 0.3 else logs
        )
        (self.source / 'results.csv').write_bytes(
            mutations.text(rng, self.csv).encode() if which == 1 else self.csv.encode()
        )
        (self.source / 'zero_shot.json').write_bytes(_json(mutations.tree(rng, self.zero) if which == 2 else self.zero))
        metrics = rng.choice((['coco/segm_mAP'], ['val/loss', 'coco/bbox_mAP']))
        yield lambda: print(compare_runs([self.source], None, metrics, self.out / 'c'))


TARGETS: dict[str, type[Target]] = {
    'weights': Weights,
    'coco': Coco,
    'yaml': Yaml,
    'labels': Labels,
    'configs': Configs,
    'runs': Runs,
}
