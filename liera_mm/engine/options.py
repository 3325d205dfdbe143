"""``--cfg-options KEY=VALUE ...``: what they say, and a config that has them."""
import argparse
import ast
import copy
from typing import Any, Dict, Iterator, Sequence, Tuple

from mmengine.config import Config, DictAction

from ..core.errors import SetupError
from .config_tree import dicts, is_pretrained, type_name
from .names import CUSTOM_KEYS, check_read

DICTS = ('model', 'default_hooks', 'optim_wrapper', 'train_cfg', 'val_cfg', 'test_cfg', 'env_cfg', 'randomness',
         'auto_scale_lr', 'choices', 'optim_wrapper.paramwise_cfg', CUSTOM_KEYS)
KINDS = dict, (list, tuple, str), bool, (int, float)
DICT, LIST, DICT_OR_LIST = 'dict(...)', '[dict(...), ...]', 'dict(...) or [dict(...), ...]'


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        help='override settings of the config: key=value ...; data_root=FOLDER moves all paths below it, and a config '
        'that offers choices takes the name of one, as in task=NAME')


class OptionsAction(DictAction):
    """MMEngine's action, and values as a config has them: ``custom_hooks=[dict(type='LieRAHook')]``, ``'traffic light'``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Sequence[str],
                 option_string: str = None) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        for option in values:
            key, equals, text = map(str.strip, option.partition('='))
            if not (key and equals):
                raise SetupError(f'--cfg-options has {option!r}, which is no KEY=VALUE',
                                 'Write each as KEY=VALUE, without spaces around =, and in quotes if it has other spaces')
            options[key] = read_value(key, text)
        setattr(namespace, self.dest, options)


def read_value(key: str, text: str) -> Any:
    """What the text of an option means: Python where it has dicts or quotes within brackets, or else what MMEngine reads.

    Raises:
        SetupError: If it should be Python and is none, or its brackets do not match.
    """
    is_dict = 'dict(' in text or '{' in text
    if text.startswith(('[', '(', '{', 'dict(')) and (is_dict or '"' in text or "'" in text):
        try:
            value = _python(ast.parse(text, mode='eval').body)
            return value if isinstance(value, tuple) or text[0] != '(' else (value, )  # as MMEngine reads (1)
        except (SyntaxError, ValueError, TypeError):
            if is_dict:
                raise SetupError(f'--cfg-options {key}={text} cannot be read: it is no dict or list of Python',
                                 "Write it as in a config, in one pair of quotes: \"custom_hooks=[dict(type='EMAHook')]\""
                                 ) from None
    inner = text.strip('\'"')
    quoted = text[:1] in ('"', "'") and text == text[0] + inner + text[0] and text[0] not in inner
    if (inner[:1], inner[-1:]) not in (('[', ']'), ('(', ')')) and (quoted or ',' not in inner):
        return DictAction._parse_int_float_bool(inner)  # of which _parse_iterable would remove the spaces
    try:
        return DictAction._parse_iterable(text)
    except (AssertionError, RecursionError):
        raise SetupError(f'--cfg-options {key}={text} cannot be read: its brackets do not match',
                         'Correct them') from None


def _python(node: ast.expr) -> Any:
    """The value of a constant, list, tuple, dict or ``dict(...)``; names without quotes are texts, as MMEngine has them."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return (list if isinstance(node, ast.List) else tuple)(map(_python, node.elts))
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {str(_python(key)): _python(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args and all(
            keyword.arg for keyword in node.keywords):
        return {keyword.arg: _python(keyword.value) for keyword in node.keywords}
    if isinstance(node, (ast.Name, ast.Attribute)):
        return DictAction._parse_int_float_bool(ast.unparse(node))
    return ast.literal_eval(node)


def merge_options(cfg: Config, options: Dict[str, Any]) -> None:
    """Change a config, in place, as options say; ``KEY.0`` is the first entry of a list or tuple.

    Raises:
        SetupError: If one does not go with what the config has, or nothing reads it and something is meant.
    """
    keys = list(options)
    for index, key in enumerate(keys):
        if any(key.startswith(f'{later}.') and not isinstance(options[later], dict) for later in keys[index + 1:]):
            continue  # part of what a later one replaces
        check_read(cfg, key, options)
        value = copy.deepcopy(options[key])  # MMEngine takes _delete_ out of it
        try:
            cfg.merge_from_dict(dict([_whole(cfg, _inner(cfg, key), value)]))
        except (KeyError, TypeError, AttributeError) as error:
            place = key
            while '.' in place and _get(cfg, place) is None:
                place = place.rpartition('.')[0]
            raise SetupError(f'--cfg-options {key}={value!r:.150} does not go with the config, where {place} is '
                             f'{_get(cfg, place)!r:.150}',
                             'Give it in the same form, or all of it anew; KEY.0 is the first entry of a list, and '
                             '_delete_=True in a dict replaces what is there') from error


def _inner(cfg: Config, key: str) -> str:
    """The key of an argument of a backbone that is in a LieRABackbone by now: ``model.backbone.frozen_stages``."""
    parts = key.split('.')
    for index in range(1, len(parts)):
        parent = _get(cfg, '.'.join(parts[:index]))
        wrapped = parent.get('backbone') or () if type_name(parent) == 'LieRABackbone' else ()
        if parts[index] in wrapped and parts[index] not in parent:
            return '.'.join([*parts[:index], 'backbone', *parts[index:]])
    return key


def check_kinds(cfg: Config) -> None:
    """Raise a SetupError if a config has a text, number or list for a dict, or anything else for a list of dicts."""
    loaders = [f'{split}_dataloader' for split in ('train', 'val', 'test')]
    for key in (*DICTS, *loaders, *(f'{loader}.dataset' for loader in loaders)):
        _check_kind(key, _get(cfg, key))
    hooks = cfg.get('default_hooks') or {}
    if 'type' in hooks:
        raise SetupError(f'The config has default_hooks=dict(type={hooks["type"]!r:.100}), a hook without a name',
                         f'Give it one: default_hooks=dict(liera=dict(type={hooks["type"]!r:.100}))')
    for name, hook in hooks.items():
        _check_kind(f'default_hooks.{name}', hook)
    for key, settings in (_get(cfg, CUSTOM_KEYS) or {}).items():
        _check_kind(f'{CUSTOM_KEYS}.{key}', settings, 'dict(lr_mult=..., decay_mult=...)')
    for key in ('param_scheduler', 'val_evaluator', 'test_evaluator'):
        _check_kind(key, cfg.get(key), DICT_OR_LIST)
    _check_kind('custom_hooks', cfg.get('custom_hooks'), LIST)
    _check_kind('custom_imports', cfg.get('custom_imports'), 'dict(imports=[...])')
    for loader in loaders:
        for key, node in dicts(cfg.get(loader), loader):
            _check_kind(f'{key}.pipeline', node.get('pipeline'), LIST)
            _check_kind(f'{key}.metainfo', node.get('metainfo'))
    for key, node in dicts(cfg.get('model'), 'model'):
        _check_kind(f'{key}.init_cfg', node.get('init_cfg') or None, DICT_OR_LIST)
        if is_pretrained(node) and not isinstance(node.get('checkpoint'), str):
            raise SetupError(f'{key} of the config has no checkpoint', f'Give it one, {key}.checkpoint=FILE, or take it out')
    if not isinstance(cfg.get('resume'), (bool, int, type(None))):
        raise SetupError(f'The config has resume={cfg.resume!r:.100}, where True or False belongs',
                         'Write resume=True load_from=CHECKPOINT, or --resume CHECKPOINT for tools/train.py')
    for key in ('load_from', 'data_root'):
        if not isinstance(cfg.get(key), (str, type(None))):
            raise SetupError(f'The config has {key}={cfg.get(key)!r:.100}, which is no path',
                             f'Give it as a text; with a comma in it, in two pairs of quotes: "{key}=\'a,b\'"')


def _check_kind(key: str, value: Any, form: str = DICT) -> None:
    if isinstance(value, (list, tuple)) and form != DICT:
        for index, entry in enumerate(value):
            _check_kind(f'{key}.{index}', entry)
    elif isinstance(value, (str, int, float, list, tuple)) or (isinstance(value, dict) and form == LIST):
        meant = f'dict(type={value!r})' if isinstance(value, str) and value.isidentifier() else DICT
        raise SetupError(f'The config has {key}={value!r:.100}, where {form} belongs',
                         f'Write {key}={form.replace(DICT, meant)}')


def other_kinds(cfg: Config, options: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    """Options that set None where a config has something, or something of another kind; and what it has."""
    for key, value in options.items():
        old = _get(cfg, key)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from other_kinds(cfg, {f'{key}.{name}': part for name, part in value.items() if name != '_delete_'})
            continue
        types = next((types for types in KINDS if isinstance(old, types)), object)
        if not isinstance(value, types):
            yield f'{key}={value!r:.100}', 'a dict' if isinstance(old, dict) else f'{old!r:.100}'


def _whole(cfg: Config, key: str, value: Any) -> Any:
    """Key and value that MMEngine merges as they are meant.

    It merges nothing but a dict into an entry of a list, and a dict into a list only by the numbers of entries.
    """
    parent, _, last = key.rpartition('.')
    entries, entry = _get(cfg, parent) if last.isdigit() else None, _get(cfg, key)
    replaces = not isinstance(value, dict) or '_delete_' in value or not isinstance(entry, dict)
    if isinstance(entries, (list, tuple)) and int(last) < len(entries) and replaces:
        value = {name: part for name, part in value.items() if name != '_delete_'} if isinstance(value, dict) else value
        return _whole(cfg, parent, type(entries)([*entries[:int(last)], value, *entries[int(last) + 1:]]))
    if isinstance(value, dict) and isinstance(entry, (list, tuple)) and not all(map(str.isdigit, value)):
        value = dict(value, _delete_=True)
    return key, value


def _get(cfg: Any, key: str) -> Any:
    """What a config has for a key; None if it has nothing."""
    for name in key.split('.') if key else ():
        if isinstance(cfg, (list, tuple)):
            cfg = cfg[int(name)] if name.isdigit() and int(name) < len(cfg) else None
        else:
            cfg = cfg.get(name) if isinstance(cfg, (dict, Config)) else None
    return cfg
