# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Replaces torchvision if it is not installed.

No torchvision on PyPI works with torch's CPU build, and vLLM imports it for models with
image input, even if only their text part runs. Every module and every name exists here,
as a class whose attributes are such classes. That is enough for imports.
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0"
__path__: list[str] = []


class _Anything(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Module(types.ModuleType):
    __getattr__ = _Anything.__getattr__


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path, target=None):
        if fullname.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
sys.modules[__name__].__class__ = _Module
